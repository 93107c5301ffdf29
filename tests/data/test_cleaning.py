"""The official cleaning: rows that the authors' code produced."""

import pytest

from mplug_jax.data.cleaning import pre_caption, pre_question

SURF = "A man, riding a wave  on top of a surfboard.\n"
QUOTED = '<person> in-front of the w/out; "quoted" (text)!'
DOGS = " Two   dogs: one's black-and-white ~ #tag * "
LETTERS = "a b c d e f g h"


@pytest.mark.parametrize(
    ("text", "max_words", "expected"),
    [
        (SURF, 30, "a man riding a wave on top of a surfboard"),
        (SURF, 5, "a man riding a wave"),
        (QUOTED, 30, "person in front of the w out quoted text"),
        (QUOTED, 5, "person in front of the"),
        (DOGS, 30, "two dogs ones black and white tag"),
        (DOGS, 5, "two dogs ones black and"),
        (LETTERS, 30, LETTERS),
        (LETTERS, 5, "a b c d e"),
        ("", 5, ""),
        ("?!", 5, ""),
    ],
)
def test_captions(text, max_words, expected):
    assert pre_caption(text, max_words) == expected


@pytest.mark.parametrize(
    ("text", "max_words", "expected"),
    [
        (SURF, 30, "a man riding a wave  on top of a surfboard\n"),
        (SURF, 5, "a man riding a wave"),
        (QUOTED, 30, "<person> in front of the w out quoted text"),
        (QUOTED, 5, "<person> in front of the"),
        (DOGS, 30, " two   dogs ones black and white  tag"),
        (DOGS, 5, " two   dogs"),
        (LETTERS, 30, LETTERS),
        (LETTERS, 5, "a b c d e"),
        ("What is it?  ", 30, "what is it"),
    ],
)
def test_questions(text, max_words, expected):
    assert pre_question(text, max_words) == expected

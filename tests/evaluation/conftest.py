"""A corpus of made-up captions with all that a tokeniser and an n-gram metric can trip over."""

import random

import pytest

THINGS = ("a dog", "two dogs", "the man's T-shirt", "a black-and-white cat", "an O'Neil surfboard")
THINGS += (
    "a 5-year-old",
    "1,000 people",
    'a "STOP" sign',
    "Mr. Bean",
    "a cat (asleep)",
    "50% of it",
)
DEEDS = (
    "runs",
    "isn't running",
    "sits",
    "can't see",
    "is looking at",
    "jumps over",
    "eats",
    "holds",
)
PLACES = ("in the U.S.", "on grass", "at 10:30 a.m.", "in a park w/ trees", "near the water's edge")
PLACES += ("on/under a bench", "in front of a café", "at home -- alone", "at home...")
ENDS = (".", " .", "!", "", "?!", ";", " & more.")


def _sentence(draw: random.Random) -> str:
    words = (
        f"{draw.choice(THINGS)} {draw.choice(DEEDS)} {draw.choice(THINGS)} {draw.choice(PLACES)}"
    )
    if draw.random() < 0.2:
        words = " ".join([words, *[words.split()[0]] * draw.randint(2, 5)])
    return words[0].upper() + words[1:] + draw.choice(ENDS)


@pytest.fixture(scope="session")
def caption_corpus() -> tuple[dict[int | str, str], dict[int | str, list[str]]]:
    """Hypotheses and 1 .. 5 references of 120 pictures, by id; raw text."""
    draw = random.Random(0)
    references = {}
    hypotheses = {}
    for number in range(120):
        key = f"picture {number}" if number % 2 else number
        references[key] = [_sentence(draw) for _ in range(1 + number % 5)]
        hypothesis = _sentence(draw)
        if draw.random() < 0.5:
            hypothesis = " ".join([*references[key][0].split()[:6], *hypothesis.split()[-4:]])
        hypotheses[key] = hypothesis
    # One word, no word, punctuation alone, a reference repeated word for word, unknown words.
    hypotheses |= {0: "dog", 2: "", 4: "...", 6: references[6][0], 8: "zyx zyx qqq zyx"}
    references |= {10: ["dog", "."], 12: ["Dog."], 14: ["", "a dog runs"]}
    return hypotheses, references

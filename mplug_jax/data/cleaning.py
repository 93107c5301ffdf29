"""How the official code cleans texts before it tokenises them (`dataset/utils.py`).

Models released by the authors have seen questions and captions only like this. The two differ:
captions lose doubled white space, questions keep it and count it when they are cut.
"""

import re

_MARKS = re.compile(r"[,.'!?\"()*#:;~]")
_SEPARATORS = str.maketrans("-/", "  ")
_SPACES = re.compile(r"\s{2,}")


def pre_caption(text: str, max_words: int) -> str:
    """A caption in lower case without punctuation, at most `max_words` words of it.

    Hyphens and slashes separate words, `<person>` becomes a word, runs of white space one space.
    """
    text = _without_marks(text).replace("<person>", "person")
    text = _SPACES.sub(" ", text).rstrip("\n").strip(" ")
    return _first_words(text, max_words)


def pre_question(text: str, max_words: int) -> str:
    """A question in lower case without punctuation, at most `max_words` words of it.

    A word here is what single spaces separate: two spaces have an empty word between them.
    """
    return _first_words(_without_marks(text).rstrip(" "), max_words)


def _without_marks(text: str) -> str:
    return _MARKS.sub("", text.lower()).translate(_SEPARATORS)


def _first_words(text: str, max_words: int) -> str:
    return " ".join(text.split(" ")[:max_words])

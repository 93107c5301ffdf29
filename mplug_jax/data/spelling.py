"""What a misspelt word was perhaps meant to be."""

import difflib
from collections.abc import Iterable
from typing import Any


def nearest(word: Any, known: Iterable[str]) -> str:
    """The end of a message about an unknown word: the nearest known one, and all of them."""
    choices = sorted(known)
    near = difflib.get_close_matches(str(word), choices, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ";"
    return f"{hint} Choose from {', '.join(choices)}"

"""CIDEr-D and CIDEr of many captions at once, fast enough for a reward in training.

CIDEr (Vedantam et al., CVPR 2015, arXiv 1411.5726) compares TF-IDF vectors of 1- to 4-grams.
CIDEr-D is its variant against gaming (section 6 there): n-gram counts are clipped at those of the
reference and a Gaussian penalises a difference in length. What pycocoevalcap calls `Cider`, and
every published table prints as CIDEr, is CIDEr-D with sigma 6, times 10.

Texts are tokens joined by white space, as `mplug_jax.evaluation.ptb.ptb_tokenize` makes them. The
references are turned into arrays once; a call then scores a batch without a loop over captions.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

ORDERS = 4
SIGMA = 6.0
# Captions scored at a time: bounds memory, not results.
CHUNK = 4096


@dataclass(frozen=True)
class DocumentFrequency:
    """In how many documents (pictures) an n-gram stands in some reference, and of how many."""

    counts: Mapping[tuple[str, ...], float]
    documents: int

    def __post_init__(self) -> None:
        if self.documents < 1:
            raise ValueError(f"documents is {self.documents}; there has to be at least 1")
        bad = next((gram for gram in self.counts if not 1 <= len(gram) <= ORDERS), None)
        if bad is not None:
            raise ValueError(f"{bad!r} is no tuple of 1 to {ORDERS} words")

    @classmethod
    def count(cls, references: Iterable[Sequence[str]]) -> DocumentFrequency:
        """Counts over pictures, each a list of references."""
        counts: Counter[tuple[str, ...]] = Counter()
        documents = 0
        for captions in references:
            documents += 1
            counts.update({gram for caption in captions for gram in _ngrams(caption.split())})
        return cls(counts, documents)


class Cider:
    """Scores captions against the references of their pictures.

    Args:
      references: by id of the picture, at least one reference each.
      frequency: document frequencies counted elsewhere (on the training captions, say); without
        them those of `references`, pycocoevalcap's and the papers' way for an evaluation.
      variant: "cider_d", or "cider" for the metric without clipping and penalty.

    Raises:
      ValueError: no picture, a picture without references, references without a single word, or
        an unknown variant.
    """

    def __init__(
        self,
        references: Mapping[Hashable, Sequence[str]],
        *,
        frequency: DocumentFrequency | None = None,
        variant: Literal["cider_d", "cider"] = "cider_d",
    ):
        if variant not in ("cider_d", "cider"):
            raise ValueError(f"variant is {variant!r}; it is 'cider_d' or 'cider'")
        if not references:
            raise ValueError("CIDEr needs the references of at least one picture")
        bare = [key for key, captions in references.items() if not captions]
        if bare:
            raise ValueError(f"{len(bare)} pictures have no reference, the first is {bare[0]!r}")
        self._variant = variant
        self._row = {key: row for row, key in enumerate(references)}
        lengths = [len(captions) for captions in references.values()]
        # Row r has the references first[r] .. first[r + 1] - 1.
        self._first = np.concatenate([[0], np.cumsum(lengths)])
        texts = [caption.split() for captions in references.values() for caption in captions]
        if not any(texts):
            raise ValueError("no reference has a word")
        self._index(texts, np.repeat(np.arange(len(references)), lengths), frequency)

    def _index(
        self, texts: list[list[str]], document: np.ndarray, frequency: DocumentFrequency | None
    ) -> None:
        """Numbers every n-gram, and stores counts, norms and lengths of every reference."""
        # An n-gram of `frequency` is numbered as a text of its own, whose first n-gram it is.
        known = list(frequency.counts) if frequency else []
        vocabulary = _Vocabulary({})
        words, remaining = _flatten([*texts, *known], vocabulary)
        self._vocabulary = vocabulary.new
        self._keys, ids = _number(words, remaining, len(vocabulary))
        sizes = [len(vocabulary), *(len(keys) for keys in self._keys[1:])]
        self._offset = np.concatenate([[0], np.cumsum(sizes)])
        self._grams = int(self._offset[-1])

        own = np.repeat(np.arange(len(texts)), _lengths(texts))
        inside = [remaining[: len(own)] > n for n in range(ORDERS)]
        gram = [ids[n][: len(own)][inside[n]] + self._offset[n] for n in range(ORDERS)]
        text = [own[inside[n]] for n in range(ORDERS)]
        entry, self._count = np.unique(
            np.concatenate(text) * self._grams + np.concatenate(gram), return_counts=True
        )
        text, self._gram = np.divmod(entry, self._grams)
        if frequency is None:
            # Counts are asked for, not needed: without them NumPy hashes, ten times slower here.
            pairs, _ = np.unique(document[text] * self._grams + self._gram, return_counts=True)
            frequencies = np.bincount(pairs % self._grams, minlength=self._grams)
            documents = int(document[-1]) + 1
        else:
            frequencies = np.zeros(self._grams)
            starts = len(own) + np.cumsum([0, *_lengths(known)])
            for start, (ngram, value) in zip(starts, frequency.counts.items(), strict=False):
                n = len(ngram) - 1
                frequencies[ids[n][start] + self._offset[n]] = value
            documents = frequency.documents
        self._log_documents = math.log(documents)
        self._idf = self._log_documents - np.log(np.maximum(1.0, frequencies))

        self._order = np.repeat(np.arange(ORDERS), sizes)[self._gram]
        self._pointer = np.searchsorted(text, np.arange(len(texts) + 1))
        self._norm = _norms(text, self._order, self._count * self._idf[self._gram], len(texts))
        self._bigrams = np.maximum(np.array(_lengths(texts)) - 1, 0)

    def score(self, hypotheses: Sequence[str], ids: Sequence[Hashable]) -> np.ndarray:
        """CIDEr of each hypothesis, float64 [N], on pycocoevalcap's scale (0 .. 10).

        Args:
          hypotheses: N token strings; any number of them may belong to one picture.
          ids: N ids of their pictures.

        Raises:
          ValueError: not as many ids as hypotheses, or an id without references.
        """
        if len(hypotheses) != len(ids):
            raise ValueError(f"{len(hypotheses)} hypotheses, but {len(ids)} ids")
        unknown = [key for key in ids if key not in self._row]
        if unknown:
            raise ValueError(f"{len(unknown)} ids have no references, the first is {unknown[0]!r}")
        rows = np.array([self._row[key] for key in ids], np.int64)
        chunks = [
            self._score(hypotheses[start : start + CHUNK], rows[start : start + CHUNK])
            for start in range(0, len(hypotheses), CHUNK)
        ]
        return np.concatenate([np.zeros(0), *chunks])

    def _score(self, hypotheses: Sequence[str], rows: np.ndarray) -> np.ndarray:
        entries, weights, norm, bigrams = self._vectors([text.split() for text in hypotheses])
        # One pair for each hypothesis and each of its references, one entry for each n-gram of it.
        pair_hypothesis, reference = _ranges(self._first[rows], self._first[rows + 1])
        pair, entry = _ranges(self._pointer[reference], self._pointer[reference + 1])
        wanted = pair_hypothesis[pair] * self._grams + self._gram[entry]
        place = np.searchsorted(entries, wanted)
        place[place == len(entries)] = 0
        found = entries[place] == wanted if len(entries) else np.zeros(len(wanted), bool)
        pair, entry, place = pair[found], entry[found], place[found]

        theirs = self._count[entry] * self._idf[self._gram[entry]]
        ours = weights[place]
        if self._variant == "cider_d":
            ours = np.minimum(ours, theirs)
        shape = (len(reference), ORDERS)
        cells = pair * ORDERS + self._order[entry]
        dot = np.bincount(cells, ours * theirs, minlength=shape[0] * ORDERS).reshape(shape)
        scale = norm[pair_hypothesis] * self._norm[reference]
        similarity = (dot / np.where(scale > 0, scale, 1.0)).mean(axis=1)
        if self._variant == "cider_d":
            gap = bigrams[pair_hypothesis] - self._bigrams[reference]
            similarity *= np.exp(-(gap**2) / (2 * SIGMA**2))
        total = np.bincount(pair_hypothesis, similarity, minlength=len(rows))
        return 10.0 * total / np.bincount(pair_hypothesis, minlength=len(rows))

    def _vectors(
        self, texts: list[list[str]]
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """TF-IDF of hypotheses: of the n-grams that occur in references the sorted keys (text *
        grams + n-gram) and weights; of all n-grams the norms [N, ORDERS] and bigram counts [N]."""
        vocabulary = _Vocabulary(self._vocabulary)
        words, remaining = _flatten(texts, vocabulary)
        text_of = np.repeat(np.arange(len(texts)), _lengths(texts))
        size = len(vocabulary)
        keys, ids = _number(words, remaining, size)
        entries, weights = [], []
        norm = np.zeros((len(texts), ORDERS))
        found = np.where(np.arange(size) < len(self._vocabulary), np.arange(size), -1)
        for n in range(ORDERS):
            if n:
                found = self._look_up(n, found[keys[n] // size], keys[n] % size)
            inside = remaining > n
            number = max(len(found), 1)
            entry, count = np.unique(text_of[inside] * number + ids[n][inside], return_counts=True)
            text, local = np.divmod(entry, number)
            gram = np.where(found[local] >= 0, found[local] + self._offset[n], -1)
            idf = np.where(gram >= 0, self._idf[gram], self._log_documents)
            weight = count * idf
            norm[:, n] = np.sqrt(np.bincount(text, weight**2, minlength=len(texts)))
            entries.append((text * self._grams + gram)[gram >= 0])
            weights.append(weight[gram >= 0])
        entry = np.concatenate(entries)
        order = np.argsort(entry)
        bigrams = np.maximum(np.array(_lengths(texts)) - 1, 0)
        return entry[order], np.concatenate(weights)[order], norm, bigrams

    def _look_up(self, n: int, prefix: np.ndarray, word: np.ndarray) -> np.ndarray:
        """Numbers of (n+1)-grams given those of their first n words and the last word, or -1."""
        keys = self._keys[n]
        possible = (prefix >= 0) & (word < len(self._vocabulary)) & (len(keys) > 0)
        wanted = np.where(possible, prefix * len(self._vocabulary) + word, -1)
        place = np.minimum(np.searchsorted(keys, wanted), max(len(keys) - 1, 0))
        return np.where(possible & (keys[place] == wanted), place, -1) if len(keys) else wanted


class _Vocabulary:
    """Numbers words: the known ones as they are, others after them and only in `new`."""

    def __init__(self, known: Mapping[str, int]):
        self._known, self._first = known, len(known)
        self.new: dict[str, int] = {}

    def __call__(self, word: str) -> int:
        number = self._known.get(word)
        if number is None:
            number = self.new.setdefault(word, self._first + len(self.new))
        return number

    def __len__(self) -> int:
        return self._first + len(self.new)


def _ngrams(words: Sequence[str]) -> Iterable[tuple[str, ...]]:
    for n in range(1, ORDERS + 1):
        yield from (tuple(words[i : i + n]) for i in range(len(words) - n + 1))


def _lengths(texts: Sequence[Sequence[str]]) -> list[int]:
    return [len(text) for text in texts]


def _flatten(
    texts: Sequence[Sequence[str]], vocabulary: _Vocabulary
) -> tuple[np.ndarray, np.ndarray]:
    """Word numbers of all texts end to end, and at each word how many its text still has."""
    words = np.array([vocabulary(word) for text in texts for word in text], np.int64)
    lengths = np.array(_lengths(texts), np.int64)
    return words, np.repeat(np.cumsum(lengths), lengths) - np.arange(len(words))


def _number(
    words: np.ndarray, remaining: np.ndarray, size: int
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Numbers of the n-grams that start at each word, for n = 1 .. ORDERS.

    An n-gram is the pair of its first n - 1 words' number and its last word, coded as
    `number * size + word`. Returns for each n the sorted codes, an n-gram's number being its place
    there (none for n = 1, where it is the word's), and the numbers, -1 where the text ends before.
    """
    keys, ids = [np.zeros(0, np.int64)], [words]
    for n in range(1, ORDERS):
        inside = np.flatnonzero(remaining > n)
        codes, numbers = np.unique(ids[-1][inside] * size + words[inside + n], return_inverse=True)
        number = np.full(len(words), -1, np.int64)
        number[inside] = numbers
        keys.append(codes)
        ids.append(number)
    return keys, ids


def _norms(text: np.ndarray, order: np.ndarray, weight: np.ndarray, texts: int) -> np.ndarray:
    """Euclidean norms [texts, ORDERS] of each text's weights of each order."""
    cells = np.bincount(text * ORDERS + order, weight**2, minlength=texts * ORDERS)
    return np.sqrt(cells.reshape(texts, ORDERS))


def _ranges(start: np.ndarray, stop: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """All of start[i] .. stop[i] - 1 for each i in turn: the i of each, and the values."""
    length = stop - start
    owner = np.repeat(np.arange(len(start)), length)
    offset = np.repeat(np.cumsum(length) - length, length)
    return owner, np.arange(len(owner)) - offset + start[owner]

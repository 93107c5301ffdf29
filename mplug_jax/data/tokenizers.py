"""Tokenizers: SentencePiece trained on the texts at hand, and BERT's WordPiece.

Both split a text at whitespace and encode word by word, so that a caption can be cut between
words (prefix LM) and `encode` is always the concatenation of `words`.
"""

import io
import itertools
import logging
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import sentencepiece
from tokenizers import Tokenizer as RustTokenizer
from tokenizers import models, normalizers, pre_tokenizers

from mplug_jax.data.files import place
from mplug_jax.data.records import BadSample, Source, SourceError

logger = logging.getLogger(__name__)

SENTENCEPIECE_FILE = "tokenizer.model"
# SentencePiece is trained on about this many captions, spread over the source.
TRAINING_TEXTS = 50_000
# Words whose ids are remembered: bounds the memory of a worker on captions from the web.
CACHED_WORDS = 100_000
CACHED_LENGTH = 64  # characters; "words" of a megabyte come up as well


class Tokenizer(Protocol):
    """What models and examples may ask of a tokenizer."""

    vocab_size: int
    pad_id: int
    unk_id: int
    cls_id: int
    sep_id: int
    mask_id: int

    def words(self, text: str) -> list[list[int]]:
        """Token ids of each whitespace-separated word, no special tokens."""

    def encode(self, text: str, max_length: int) -> tuple[np.ndarray, np.ndarray]:
        """`[CLS] text [SEP]` cut and padded: ids int32 [max_length], mask bool [max_length]."""

    def decode(self, ids: Iterable[int]) -> str:
        """Text of the ids up to the first [SEP], special tokens dropped."""


def pad(ids: list[int], length: int, pad_id: int) -> tuple[np.ndarray, np.ndarray]:
    """Right-pads `ids` (at most `length` of them) to int32 [length] and its bool mask."""
    padded = np.full(length, pad_id, np.int32)
    padded[: len(ids)] = ids
    return padded, np.arange(length) < len(ids)


def encode_words(
    tokenizer: Tokenizer, words: list[list[int]], max_length: int
) -> tuple[np.ndarray, np.ndarray]:
    """`[CLS] words [SEP]`; tokens that do not fit are cut before the [SEP]."""
    tokens = list(itertools.chain.from_iterable(words))[: max_length - 2]
    return pad([tokenizer.cls_id, *tokens, tokenizer.sep_id], max_length, tokenizer.pad_id)


def _until_sep(ids: Iterable[int], sep_id: int, dropped: frozenset[int]) -> Iterator[int]:
    for token in ids:
        if token == sep_id:
            return
        if token not in dropped:
            yield int(token)


class WordCache:
    """Remembers the ids of words, which recur: encoding a caption becomes look-ups."""

    def __init__(self, encode: Callable[[str], list[int]]):
        self._encode = encode
        self._known: dict[str, list[int]] = {}

    def __call__(self, word: str) -> list[int]:
        """The ids of `word`; not to be changed in place."""
        ids = self._known.get(word)
        if ids is None:
            ids = self._encode(word)
            if len(self._known) < CACHED_WORDS and len(word) <= CACHED_LENGTH:
                self._known[word] = ids
        return ids

    def __reduce__(self) -> tuple[Any, ...]:
        return WordCache, (self._encode,)


class SentencePieceTokenizer:
    """A SentencePiece model file written by `train_sentencepiece`.

    Raises:
      SourceError: the file is missing or no SentencePiece model with the special tokens needed.
    """

    def __init__(self, path: str | os.PathLike[str]):
        try:
            self._load(place(path).read_bytes())
        except (OSError, RuntimeError, ValueError) as error:
            raise SourceError(f"tokenizer: cannot read {path}: {error}") from error

    def _load(self, model: bytes) -> None:
        self._model = model
        self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        self._encode_word = WordCache(self._processor.encode)
        self.vocab_size = self._processor.get_piece_size()
        self.pad_id, self.unk_id = self._processor.pad_id(), self._processor.unk_id()
        self.cls_id, self.sep_id = self._processor.bos_id(), self._processor.eos_id()
        self.mask_id = self._processor.piece_to_id("[MASK]")
        ids = (self.pad_id, self.unk_id, self.cls_id, self.sep_id, self.mask_id)
        if min(ids) < 0 or len(set(ids)) < 5:
            raise ValueError("the model lacks one of [PAD] [UNK] [CLS] [SEP] [MASK]")
        self._dropped = frozenset((self.pad_id, self.cls_id, self.mask_id))

    def __getstate__(self) -> bytes:
        return self._model

    def __setstate__(self, model: bytes) -> None:
        self._load(model)

    def words(self, text: str) -> list[list[int]]:
        """See `Tokenizer.words`."""
        return [self._encode_word(word) for word in text.split()]

    def encode(self, text: str, max_length: int) -> tuple[np.ndarray, np.ndarray]:
        """See `Tokenizer.encode`."""
        return encode_words(self, self.words(text), max_length)

    def decode(self, ids: Iterable[int]) -> str:
        """See `Tokenizer.decode`; an unknown token reads [UNK]."""
        text = self._processor.decode(list(_until_sep(ids, self.sep_id, self._dropped)))
        return " ".join(text.split())


def train_sentencepiece(
    texts: Iterable[str], path: str | os.PathLike[str], vocab_size: int
) -> None:
    """Trains a case-folding model on `texts` and writes it to `path` in one atomic step.

    Ids: [PAD] 0, [UNK] 1, [CLS] 2, [SEP] 3, [MASK] 4, then the pieces; `vocab_size` counts all of
    them and is an upper bound: small corpora give smaller vocabularies. The same texts in the same
    order always give the same file.

    Raises:
      SourceError: the texts hold no words, or more different characters than `vocab_size` admits.
    """
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(texts),
            model_writer=model,
            vocab_size=vocab_size,
            hard_vocab_limit=False,
            model_type="bpe",
            character_coverage=0.9995,
            normalization_rule_name="nmt_nfkc_cf",
            shuffle_input_sentence=False,
            num_threads=1,  # with more, rounding depends on which thread ends first
            pad_id=0,
            unk_id=1,
            bos_id=2,
            eos_id=3,
            pad_piece="[PAD]",
            unk_piece="[UNK]",
            bos_piece="[CLS]",
            eos_piece="[SEP]",
            unk_surface=" [UNK] ",
            control_symbols=["[MASK]"],
            minloglevel=2,
        )
    except RuntimeError as error:
        raise SourceError(
            f"tokenizer: SentencePiece could not be trained on the texts with vocab_size="
            f"{vocab_size}: {error}"
        ) from error
    _write_atomically(Path(path), model.getvalue())


def _write_atomically(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        os.chmod(temporary, 0o644)  # mkstemp's 0600 would lock colleagues out of the workdir
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


class WordPieceTokenizer:
    """BERT's lower-casing WordPiece over a `vocab.txt` (one token a line, the line number its id).

    Raises:
      SourceError: the file is missing, or lacks one of BERT's special tokens.
    """

    def __init__(self, path: str | os.PathLike[str]):
        try:
            # Not splitlines(): a token may be one of its rarer separators, such as U+2028.
            lines = place(path).read_text(encoding="utf-8").removesuffix("\n").split("\n")
        except (OSError, UnicodeDecodeError) as error:
            raise SourceError(f"tokenizer: cannot read the vocabulary {path}: {error}") from error
        vocab = {token: index for index, token in enumerate(lines)}
        special = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
        missing = [token for token in special if token not in vocab]
        if missing:
            raise SourceError(
                f"tokenizer: {path} is no BERT vocabulary: it lacks {' '.join(missing)} "
                f"({len(lines)} lines)"
            )
        self.vocab_size = len(lines)
        self.pad_id, self.unk_id, self.cls_id, self.sep_id, self.mask_id = (
            vocab[token] for token in special
        )
        self._dropped = frozenset((self.pad_id, self.cls_id, self.mask_id))
        self._tokens = lines
        self._model = RustTokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
        self._model.normalizer = normalizers.BertNormalizer(lowercase=True)
        self._model.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        self._encode_word = WordCache(self._word_ids)

    def words(self, text: str) -> list[list[int]]:
        """See `Tokenizer.words`."""
        return [self._encode_word(word) for word in text.split()]

    def _word_ids(self, word: str) -> list[int]:
        return self._model.encode(word, add_special_tokens=False).ids

    def encode(self, text: str, max_length: int) -> tuple[np.ndarray, np.ndarray]:
        """See `Tokenizer.encode`."""
        return encode_words(self, self.words(text), max_length)

    def decode(self, ids: Iterable[int]) -> str:
        """See `Tokenizer.decode`; pieces are joined, punctuation stays set off by spaces."""
        tokens = (self._tokens[i] for i in _until_sep(ids, self.sep_id, self._dropped))
        return " ".join(tokens).replace(" ##", "")


def build_tokenizer(
    spec: Mapping[str, Any],
    workdir: str | os.PathLike[str],
    text_source: Source | None = None,
    anew: bool = False,
) -> Tokenizer:
    """The tokenizer of a config.

    Args:
      spec: `{"kind": "wordpiece", "path": vocab.txt}`, or `{"kind": "sentencepiece",
        "vocab_size": n}`, which is trained on the texts of `text_source` at first use and
        kept in `workdir`, or `{"kind": "sentencepiece", "path": model file}`. Paths may be URLs.
      workdir: where the trained model is kept.
      text_source: read only when there is a model to train.
      anew: train one even where `workdir` has one, which it replaces.

    Raises:
      ValueError: `spec` is malformed.
      SourceError: a file is missing or unreadable, or there are no texts to train on.
    """
    kind = spec.get("kind")
    known = {"sentencepiece": {"kind", "vocab_size", "path"}, "wordpiece": {"kind", "path"}}
    if kind not in known:
        raise ValueError(f"tokenizer.kind is {kind!r}; choose one of {', '.join(known)}")
    unknown = set(spec) - known[kind]
    if unknown:
        raise ValueError(
            f"tokenizer of kind {kind!r} has no {', '.join(sorted(map(repr, unknown)))}; "
            f"it takes {', '.join(sorted(known[kind]))}"
        )
    path = spec.get("path")
    if kind == "wordpiece":
        if not path:
            raise ValueError("tokenizer of kind 'wordpiece' needs a path (BERT's vocab.txt)")
        return WordPieceTokenizer(path)
    if path:
        return SentencePieceTokenizer(path)
    return _trained_tokenizer(spec, Path(workdir), text_source, anew)


def _trained_tokenizer(
    spec: Mapping[str, Any], workdir: Path, text_source: Source | None, anew: bool
) -> SentencePieceTokenizer:
    vocab_size = spec.get("vocab_size")
    if not isinstance(vocab_size, int) or vocab_size <= 5:
        raise ValueError(
            f"tokenizer.vocab_size is {vocab_size!r}; it must be a whole number above 5"
        )
    path = workdir / SENTENCEPIECE_FILE
    if anew or not path.exists():
        if text_source is None:
            raise SourceError(f"tokenizer: {path} does not exist and there are no texts here")
        logger.info("training a SentencePiece tokenizer on the texts: %s", path)
        train_sentencepiece(source_texts(text_source), path, vocab_size)
    return SentencePieceTokenizer(path)


def source_texts(source: Source, enough: int = TRAINING_TEXTS) -> Iterator[str]:
    """Texts of records in a fixed random order, all of them or at least `enough`.

    Those of bad records are passed over: training names them when it comes to them.
    """
    given = 0
    for index in np.random.default_rng(0).permutation(len(source)):
        try:
            texts = record_texts(source[int(index)])
        except BadSample:
            continue
        yield from texts
        given += len(texts)
        if given >= enough:
            return


def record_texts(record: Mapping[str, Any]) -> list[str]:
    """Whatever of a record a model reads or writes: captions, questions, answers, phrases, ..."""
    texts = list(record.get("captions") or ())
    for question in record.get("questions") or ():
        texts += [question["question"], *question.get("answers", ())]
    texts += [phrase["phrase"] for phrase in record.get("phrases") or ()]
    if "pair" in record:
        texts.append(record["pair"]["sentence"])
    if "entailment" in record:
        texts.append(record["entailment"]["hypothesis"])
    if "clip" in record:
        texts += record_texts(record["clip"])
    return texts

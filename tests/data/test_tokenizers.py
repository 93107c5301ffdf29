"""Tokenizers against hand-made vocabularies and an independent WordPiece."""

import itertools
import pickle
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mplug_jax.data.records import SourceError
from mplug_jax.data.tokenizers import (
    SentencePieceTokenizer,
    WordPieceTokenizer,
    build_tokenizer,
    source_texts,
    train_sentencepiece,
)

SPECIAL = ["[PAD]", "[unused0]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
PIECES = ["un", "##aff", "##able", "##a", "hello", "world", ",", "!", "a", "##b", "e", "##s", "'"]


def scene_captions() -> list[str]:
    draw = random.Random(0)
    sizes, colours = ("large", "small"), ("red", "green", "blue", "yellow")
    shapes = ("circle", "square", "triangle")

    def thing() -> str:
        return f"a {draw.choice(sizes)} {draw.choice(colours)} {draw.choice(shapes)}"

    return [f"{thing()} to the left of {thing()}" for _ in range(400)]


@pytest.fixture(scope="module")
def sentencepiece_path(tmp_path_factory):
    path = tmp_path_factory.mktemp("sentencepiece") / "tokenizer.model"
    train_sentencepiece(scene_captions(), path, vocab_size=256)
    return path


@pytest.fixture(scope="module")
def wordpiece(tmp_path_factory):
    path = tmp_path_factory.mktemp("wordpiece") / "vocab.txt"
    path.write_text("\n".join(SPECIAL + PIECES) + "\n", encoding="utf-8")
    return WordPieceTokenizer(path)


def reference_wordpiece(word: str) -> list[int]:
    """Greedy longest match, as in the BERT paper's code, of one punctuation-free word."""
    vocab = {piece: i for i, piece in enumerate(SPECIAL + PIECES)}
    ids, start = [], 0
    while start < len(word):
        for end in range(len(word), start, -1):
            piece = ("##" if start else "") + word[start:end]
            if piece in vocab:
                ids.append(vocab[piece])
                start = end
                break
        else:
            return [vocab["[UNK]"]]
    return ids


def test_sentencepiece_special_ids_and_one_piece_per_frequent_word(sentencepiece_path):
    tokenizer = SentencePieceTokenizer(sentencepiece_path)
    special = (tokenizer.pad_id, tokenizer.unk_id, tokenizer.cls_id, tokenizer.sep_id)
    assert (*special, tokenizer.mask_id) == (0, 1, 2, 3, 4)
    assert tokenizer.vocab_size <= 256
    words = tokenizer.words("a large red circle")
    assert [len(word) for word in words] == [1, 1, 1, 1]
    assert min(min(word) for word in words) > tokenizer.mask_id
    assert {len(word) for text in scene_captions() for word in tokenizer.words(text)} == {1}


def test_sentencepiece_round_trip_ignores_case_and_special_tokens(sentencepiece_path):
    tokenizer = SentencePieceTokenizer(sentencepiece_path)
    ids, mask = tokenizer.encode("A  Large red\nCircle", 10)
    assert ids.dtype == np.int32 and mask.dtype == bool
    assert mask.tolist() == [True] * 6 + [False] * 4
    assert ids[0] == tokenizer.cls_id and ids[5] == tokenizer.sep_id and not ids[6:].any()
    assert tokenizer.decode(ids) == "a large red circle"
    after = [*ids[:6], *tokenizer.words("blue")[0]]
    assert tokenizer.decode(after) == "a large red circle", "what follows [SEP] is not text"
    masked = [tokenizer.cls_id, tokenizer.mask_id, tokenizer.words("blue")[0][0]]
    assert tokenizer.decode(masked) == "blue"


def test_unknown_characters_are_unk(sentencepiece_path):
    tokenizer = SentencePieceTokenizer(sentencepiece_path)
    assert tokenizer.unk_id in tokenizer.words("日")[0]
    assert "[UNK]" in tokenizer.decode(tokenizer.encode("red 日", 10)[0])


def test_encode_truncates_before_sep(sentencepiece_path):
    tokenizer = SentencePieceTokenizer(sentencepiece_path)
    ids, mask = tokenizer.encode("a large red circle", 5)
    assert mask.all() and ids[-1] == tokenizer.sep_id
    assert tokenizer.decode(ids) == "a large red"


@settings(max_examples=40, deadline=None)
@given(text=st.text(max_size=40), length=st.integers(3, 20))
def test_encode_is_the_concatenation_of_words(sentencepiece_path, text, length):
    tokenizer = SentencePieceTokenizer(sentencepiece_path)
    ids, mask = tokenizer.encode(text, length)
    tokens = list(itertools.chain(*tokenizer.words(text)))[: length - 2]
    assert ids[mask].tolist() == [tokenizer.cls_id, *tokens, tokenizer.sep_id]
    assert (ids[~mask] == tokenizer.pad_id).all()


def test_training_is_deterministic_and_leaves_no_other_file(tmp_path):
    first, second = tmp_path / "1" / "tokenizer.model", tmp_path / "2" / "tokenizer.model"
    train_sentencepiece(scene_captions(), first, 128)
    train_sentencepiece(scene_captions(), second, 128)
    assert first.read_bytes() == second.read_bytes()
    assert [path.name for path in first.parent.iterdir()] == ["tokenizer.model"]


def test_tokenizers_survive_pickling(sentencepiece_path, wordpiece):
    text = "a large hello unaffable"
    for tokenizer in (SentencePieceTokenizer(sentencepiece_path), wordpiece):
        ids, _ = tokenizer.encode(text, 20)
        copy = pickle.loads(pickle.dumps(tokenizer))
        assert copy.words(text) == tokenizer.words(text)
        assert copy.decode(ids) == tokenizer.decode(ids)


def test_sentencepiece_errors(tmp_path):
    with pytest.raises(SourceError, match=r"missing\.model"):
        SentencePieceTokenizer(tmp_path / "missing.model")
    junk = tmp_path / "junk.model"
    junk.write_text("no model")
    with pytest.raises(SourceError, match=r"junk\.model"):
        SentencePieceTokenizer(junk)
    with pytest.raises(SourceError, match="vocab_size=300"):
        train_sentencepiece([], tmp_path / "empty.model", 300)
    assert not (tmp_path / "empty.model").exists()


def test_wordpiece_ids_by_hand(wordpiece):
    tokenizer = wordpiece
    special = (tokenizer.pad_id, tokenizer.unk_id, tokenizer.cls_id, tokenizer.sep_id)
    assert (*special, tokenizer.mask_id) == (0, 2, 3, 4, 5)
    assert tokenizer.vocab_size == len(SPECIAL) + len(PIECES)
    number = {piece: i for i, piece in enumerate(SPECIAL + PIECES)}
    expected = [["hello", ","], ["un", "##aff", "##able"], ["world", "!"]]
    words = tokenizer.words("HELLO, unaffable Wörld!")
    assert words == [[number[piece] for piece in word] for word in expected]
    ids, _ = tokenizer.encode("Hello, unaffable world!", 12)
    assert tokenizer.decode(ids) == "hello , unaffable world !"
    assert tokenizer.words("zebra") == [[tokenizer.unk_id]]


@settings(max_examples=60, deadline=None)
@given(
    words=st.lists(
        st.lists(st.sampled_from(["un", "aff", "able", "a", "b", "hello", "s", "e"]), min_size=1),
        max_size=4,
    )
)
def test_wordpiece_matches_greedy_longest_match(wordpiece, words):
    vocab_words = ["".join(pieces) for pieces in words]
    expected = [reference_wordpiece(word) for word in vocab_words]
    assert wordpiece.words(" ".join(vocab_words)) == expected


def test_wordpiece_errors(tmp_path):
    with pytest.raises(SourceError, match=r"nowhere\.txt"):
        WordPieceTokenizer(tmp_path / "nowhere.txt")
    (tmp_path / "vocab.txt").write_text("[PAD]\n[UNK]\nword\n")
    with pytest.raises(SourceError, match=r"lacks \[CLS\] \[SEP\] \[MASK\]"):
        WordPieceTokenizer(tmp_path / "vocab.txt")


class Captions:
    """A source of captions that counts how often it is read."""

    def __init__(self, captions):
        self.captions, self.reads = captions, 0

    def __len__(self):
        return len(self.captions)

    def __getitem__(self, index):
        self.reads += 1
        return {"id": str(index), "image_id": index, "captions": [self.captions[index]] * 2}


def test_build_tokenizer_trains_once_and_keeps_the_model(tmp_path):
    source = Captions(scene_captions())
    spec = {"kind": "sentencepiece", "vocab_size": 256}
    first = build_tokenizer(spec, tmp_path, source)
    assert source.reads == 400
    again = build_tokenizer(spec, tmp_path, None)
    assert source.reads == 400
    assert again.words("a large red circle") == first.words("a large red circle")


def test_source_texts_spread_over_a_large_source():
    source = Captions([str(index) for index in range(1000)])
    texts = list(source_texts(source, enough=100))
    assert len(texts) == 100 and source.reads == 50
    assert np.mean([int(text) for text in texts]) == pytest.approx(500, abs=130)
    assert texts == list(source_texts(source, enough=100))


def test_build_tokenizer_errors(tmp_path):
    with pytest.raises(ValueError, match="sentencepiece, wordpiece"):
        build_tokenizer({"kind": "bpe"}, tmp_path)
    with pytest.raises(ValueError, match="'vocab'"):
        build_tokenizer({"kind": "sentencepiece", "vocab": 5}, tmp_path)
    with pytest.raises(ValueError, match="vocab_size is None"):
        build_tokenizer({"kind": "sentencepiece"}, tmp_path)
    with pytest.raises(ValueError, match=r"vocab\.txt"):
        build_tokenizer({"kind": "wordpiece"}, tmp_path)
    with pytest.raises(SourceError, match="no texts"):
        build_tokenizer({"kind": "sentencepiece", "vocab_size": 256}, tmp_path)

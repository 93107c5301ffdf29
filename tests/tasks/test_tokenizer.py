"""Which tokenizer a run takes: the config's file, its own, or that of the run it starts from."""

import fsspec
import pytest
from ml_collections import ConfigDict

from mplug_jax.config import ConfigError, defaults
from mplug_jax.data.records import BadSample, SourceError
from mplug_jax.data.tokenizers import SENTENCEPIECE_FILE, source_texts, train_sentencepiece
from mplug_jax.tasks.restored import for_use
from mplug_jax.tasks.tokenizer import ORIGIN_FILE, make_tokenizer
from mplug_jax.training.checkpoint import CheckpointError

TEXTS = ("a red square above a blue circle", "two small yellow stars", "what colour is it")
OTHERS = ("the quick brown fox", "jumps over the lazy dog", "sphinx of black quartz")
VOCABULARY = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "red"]


class Captions(list):
    """Records of texts; counts how often one is read. None is a record that cannot be used."""

    reads = 0

    def __getitem__(self, index):
        self.reads += 1
        if (text := super().__getitem__(index)) is None:
            raise BadSample(f"{index}: is damaged")
        return {"id": str(index), "image_id": index, "captions": [text]}


def config_of(vocab_size: int = 60, **tokenizer) -> ConfigDict:
    config = defaults("tiny")
    settings = {"kind": "sentencepiece", "path": "", "vocab_size": vocab_size, **tokenizer}
    config.data.tokenizer.update(settings)
    return config


def made(config, workdir, texts=TEXTS):
    return make_tokenizer(config, str(workdir), [(Captions(texts), 1.0)])


def model(workdir) -> bytes:
    return (workdir / SENTENCEPIECE_FILE).read_bytes()


def finished_run(workdir, texts=TEXTS):
    """A workdir with a tokenizer and a checkpoint."""
    train_sentencepiece(iter(texts), workdir / SENTENCEPIECE_FILE, 60)
    (workdir / "checkpoints" / "7" / "state").mkdir(parents=True)
    return workdir


def test_the_same_settings_and_texts_take_it_up_again(tmp_path, caplog):
    first = made(config_of(), tmp_path)
    before = model(tmp_path), (tmp_path / SENTENCEPIECE_FILE).stat().st_mtime_ns
    again = made(config_of(), tmp_path)
    assert before == (model(tmp_path), (tmp_path / SENTENCEPIECE_FILE).stat().st_mtime_ns)
    assert again.words("a red star") == first.words("a red star")
    assert not caplog.records


@pytest.mark.parametrize(("vocab_size", "texts"), [(45, TEXTS), (60, OTHERS), (60, TEXTS[:2])])
def test_other_settings_or_texts_train_it_anew(tmp_path, vocab_size, texts, caplog):
    made(config_of(), tmp_path)
    stale = model(tmp_path)
    made(config_of(vocab_size), tmp_path, texts)
    train_sentencepiece(source_texts(Captions(texts)), tmp_path / "expected", vocab_size)
    assert model(tmp_path) == (tmp_path / "expected").read_bytes() != stale
    assert "was made for other settings or texts, and is made anew" in caplog.text


def test_a_checkpoint_keeps_its_tokenizer(tmp_path):
    made(config_of(), tmp_path)
    before = model(tmp_path)
    (tmp_path / "checkpoints" / "100").mkdir(parents=True)
    made(config_of(45), tmp_path, OTHERS)
    assert model(tmp_path) == before
    (tmp_path / "checkpoints" / "100").rename(tmp_path / "checkpoints" / "100.damaged")
    made(config_of(45), tmp_path, OTHERS)
    assert model(tmp_path) != before


def test_the_texts_setting_counts_not_the_training_data(tmp_path):
    scenes = {"kind": "scenes", "level": "easy", "split": "train", "size": 60}
    config = config_of(texts=(scenes,))
    made(config, tmp_path, TEXTS)
    before = model(tmp_path)
    made(config, tmp_path, OTHERS)
    assert model(tmp_path) == before


def test_the_start_of_another_run_brings_its_tokenizer(tmp_path):
    first, second = (finished_run(tmp_path / str(i), t) for i, t in ((1, TEXTS), (2, OTHERS)))
    config, own = config_of(), tmp_path / "own"
    own.mkdir()
    for start in (first, second, first):
        config.init_from = str(start)
        made(config, own)
        assert model(own) == model(start)
    made(config_of(), own, OTHERS)
    assert model(own) != model(first)
    config.init_from = str(tmp_path / "lost")
    with pytest.raises(CheckpointError, match="no checkpoint there"):
        made(config, own)


def test_a_file_that_somebody_put_there_is_used_or_told_never_replaced(tmp_path):
    train_sentencepiece(iter(OTHERS), tmp_path / SENTENCEPIECE_FILE, 60)
    before = model(tmp_path)
    tokenizer = made(config_of(), tmp_path)
    with pytest.raises(ConfigError, match=rf"has {tokenizer.vocab_size} tokens, more than .*=20"):
        made(config_of(20), tmp_path)
    config = config_of()
    config.init_from = str(finished_run(tmp_path / "start"))
    with pytest.raises(ConfigError, match=r"not the tokenizer that the parameters of config\.init"):
        made(config, tmp_path)
    assert model(tmp_path) == before and not (tmp_path / ORIGIN_FILE).exists()
    (tmp_path / ORIGIN_FILE).write_text('{"sha256": "of another file", "origin": {}}')
    made(config_of(), tmp_path)
    assert model(tmp_path) == before


def test_bad_records_are_passed_over(tmp_path):
    made(config_of(), tmp_path, [None, *TEXTS, None])
    assert model(tmp_path)
    with pytest.raises(SourceError, match="could not be trained"):
        made(config_of(), tmp_path / "none", [None, None])


@pytest.fixture(params=["memory", "local"])
def root(request, tmp_path):
    """A folder or URL that holds vocab.txt and tokenizer.model."""
    train_sentencepiece(iter(TEXTS), tmp_path / "root" / SENTENCEPIECE_FILE, 60)
    (tmp_path / "root/vocab.txt").write_text("\n".join(VOCABULARY) + "\n")
    if request.param == "local":
        return str(tmp_path / "root")
    for name in ("vocab.txt", SENTENCEPIECE_FILE):
        content = (tmp_path / "root" / name).read_bytes()
        fsspec.filesystem("memory").pipe(f"memory:///tokenizers/{name}", content)
    return "memory:///tokenizers"


@pytest.mark.parametrize("whole", [False, True])
def test_a_path_is_joined_with_the_root_be_it_a_url_or_not(root, whole, tmp_path):
    def named(name):
        return f"{root}/{name}" if whole else name

    words = {"kind": "wordpiece", "path": named("vocab.txt"), "vocab_size": 0}
    pieces = {"kind": "sentencepiece", "path": named(SENTENCEPIECE_FILE), "vocab_size": 0}
    for settings, expected in ((words, [[5]]), (pieces, None)):
        config = config_of(**settings)
        # A root that is not there: whole paths do not need it.
        config.data.root = "gs://bucket/nowhere" if whole else root
        used = for_use(config, tmp_path / "run" / "checkpoints" / "7")
        for tokenizer in (make_tokenizer(config, "", []), make_tokenizer(used, "", [])):
            ids = tokenizer.words("red")
            assert ids == expected or (expected is None and tokenizer.decode(ids[0]) == "red")


def test_a_url_without_a_tokenizer_is_one_message(tmp_path):
    config = config_of(kind="wordpiece", path="lost.txt", vocab_size=0)
    config.data.root = "memory:///nowhere"
    with pytest.raises(
        SourceError, match=r"cannot read the vocabulary memory:///nowhere/lost\.txt"
    ):
        make_tokenizer(config, "", [])
    with pytest.raises(CheckpointError, match=r"no tokenizer file .* nor memory:///nowhere/lost"):
        for_use(config, tmp_path / "run" / "checkpoints" / "7")

"""Order, determinism, state and bad records of the pipelines, without worker processes."""

import json
import logging
from collections import Counter

import grain
import numpy as np
import pytest

from mplug_jax.data.pipeline import BadBudget, eval_batches, train_iterator
from mplug_jax.data.records import BadSample, SourceError


class Numbers:
    """Records that know their index; those in `bad` cannot be used."""

    def __init__(self, size, name="numbers", bad=()):
        self.size, self.name, self.bad = size, name, frozenset(bad)

    def __len__(self):
        return self.size

    def __getitem__(self, index):
        return {"id": f"{self.name}/{index}", "image_id": index, "bad": index in self.bad}


def make_example(record, rng):
    if record["bad"]:
        raise BadSample(f"{record['id']}: is bad")
    name, index = record["id"].split("/")
    return {
        "index": np.int32(index),
        "image_id": np.int32(record["image_id"]),
        "noise": rng.random(3) if rng is not None else np.zeros(3),
        "first": np.bool_(name == "numbers"),
    }


def draw(count, *, sources=None, start=None, **options):
    sources = sources or [(Numbers(37), 1.0)]
    options = {"seed": 3, "batch_size": 8, "threads": 0, **options}
    iterator = train_iterator(sources, make_example, **options)
    if start is not None:
        iterator.set_state(start)
    batches = [next(iterator) for _ in range(count)]
    iterator.close()
    return batches


def assert_same(left, right):
    assert len(left) == len(right)
    for a, b in zip(left, right, strict=True):
        assert list(a) == list(b)
        for key in a:
            np.testing.assert_array_equal(a[key], b[key], err_msg=key)


def indices(batches):
    return np.concatenate([batch["index"] for batch in batches])


def test_batches_have_fixed_shapes_and_the_added_fields():
    for batch in draw(3):
        assert batch["index"].shape == (8,) and batch["noise"].shape == (8, 3)
        assert batch["valid"].dtype == bool and batch["valid"].all()
        assert batch["bad"].dtype == np.int32 and not batch["bad"].any()


def test_every_epoch_is_another_permutation():
    order = indices(draw(20))[: 4 * 37].reshape(4, 37)
    for epoch in order:
        assert sorted(epoch) == list(range(37))
    assert len({tuple(epoch) for epoch in order}) == 4
    assert not any((epoch == np.arange(37)).all() for epoch in order)


def test_the_seed_decides_order_and_noise_and_nothing_else_does():
    reference = draw(6)
    for threads in (1, 3):
        assert_same(reference, draw(6, threads=threads))
    other = draw(6, seed=4)
    assert (indices(other) != indices(reference)).any()
    noise = np.concatenate([batch["noise"] for batch in reference + other])
    assert len(np.unique(noise)) == noise.size


@pytest.mark.parametrize("processes", [2, 4, 8])
def test_processes_share_one_global_batch(processes):
    shards = [draw(5, process_index=i, process_count=processes) for i in range(processes)]
    joined = [
        {key: np.concatenate([batch[key] for batch in batches]) for key in batches[0]}
        for batches in zip(*shards, strict=True)
    ]
    assert_same(joined, draw(5))


def test_state_continues_in_the_middle_of_an_epoch_under_any_process_count():
    reference = draw(9)
    iterator = train_iterator([(Numbers(37), 1.0)], make_example, seed=3, batch_size=8)
    assert_same([next(iterator) for _ in range(4)], reference[:4])
    state = json.loads(json.dumps(iterator.get_state()))
    assert_same([next(iterator) for _ in range(3)], reference[4:7])
    iterator.set_state(state)  # back again, while batches are made ahead
    assert_same([next(iterator) for _ in range(5)], reference[4:])
    iterator.close()
    assert_same(draw(5, start=state, threads=2), reference[4:])
    halves = [draw(5, start=state, process_index=i, process_count=2) for i in (0, 1)]
    np.testing.assert_array_equal(
        np.concatenate([halves[0][0]["index"], halves[1][0]["index"]]), reference[4]["index"]
    )


def test_first_example_does_not_move_the_iterator():
    iterator = train_iterator([(Numbers(37), 1.0)], make_example, seed=3, batch_size=8)
    example = iterator.first_example()
    assert_same([next(iterator)], draw(1))
    assert {key: np.shape(value) for key, value in example.items()} == {
        key: value.shape[1:] for key, value in draw(1)[0].items()
    }
    assert example["index"] == draw(1)[0]["index"][0]
    iterator.close()


def test_grains_checkpoint_handler_saves_and_restores(tmp_path):
    handler = grain.checkpoint.CheckpointHandler()
    options = {"seed": 3, "batch_size": 8}
    iterator = train_iterator([(Numbers(37), 1.0)], make_example, **options)
    for _ in range(3):
        next(iterator)
    handler.save(tmp_path, iterator)
    restored = train_iterator([(Numbers(37), 1.0)], make_example, **options)
    handler.restore(tmp_path, restored)
    assert_same([next(restored) for _ in range(2)], draw(5)[3:])


def test_restoring_under_other_data_warns(caplog):
    state = train_iterator([(Numbers(37), 1.0)], make_example, seed=3, batch_size=8).get_state()
    with caplog.at_level(logging.WARNING):
        draw(1, start=state)
    assert not caplog.records
    draw(1, start=state, batch_size=16, sources=[(Numbers(40), 1.0)])
    assert [record.args[0] for record in caplog.records] == ["batch_size", "sources"]


def test_mixture_keeps_weights_and_picture_ids_apart():
    sources = [(Numbers(30), 3.0), (Numbers(10, "others"), 1.0)]
    batches = draw(20, sources=sources)
    assert [int(batch["first"].sum()) for batch in batches] == [6] * 20
    first = np.concatenate([batch["first"] for batch in batches])
    ids = np.concatenate([batch["image_id"] for batch in batches])
    assert not set(ids[first]) & set(ids[~first])
    assert len(set(ids[first])) == 30 and len(set(ids[~first])) == 10
    assert ids.min() >= 0
    counts = Counter(indices(batches)[~first][:40])
    assert set(counts.values()) == {4}, "the small source repeats epoch by epoch"
    assert_same(batches, draw(20, sources=sources))


def test_bad_records_are_replaced_counted_and_named(caplog):
    bad = {3, 4, 5, 20}
    source = [(Numbers(37, bad=bad), 1.0)]
    batches = draw(20, sources=source)
    assert not bad & set(indices(batches))
    clean = draw(20)
    for batch, reference in zip(batches, clean, strict=True):
        good = ~np.isin(reference["index"], list(bad))
        np.testing.assert_array_equal(batch["index"][good], reference["index"][good])
        np.testing.assert_array_equal(batch["noise"], reference["noise"])
        np.testing.assert_array_equal(batch["bad"] > 0, ~good)
    assert any("numbers/20: is bad" in message for message in caplog.messages)
    assert_same(batches, draw(20, sources=source, threads=2))


def test_nothing_but_bad_records_is_an_error_at_once():
    with pytest.raises(SourceError, match=r"20 records in a row.*numbers/\d+: is bad"):
        draw(1, sources=[(Numbers(5, bad=range(5)), 1.0)])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 9, "process_count": 2}, "multiple of the 2"),
        ({"batch_size": 0}, "positive multiple"),
        ({"process_index": 1}, "process_index"),
        ({"sources": [(Numbers(0), 1.0)]}, "empty"),
        ({"sources": [(Numbers(5), 0.0)]}, "weight"),
        ({"seed": -1}, "seed"),
    ],
)
def test_impossible_settings_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        draw(1, **options)


def test_a_closed_iterator_says_so():
    iterator = train_iterator([(Numbers(37), 1.0)], make_example, seed=3, batch_size=8)
    next(iterator)
    iterator.close()
    iterator.close()
    with pytest.raises(ValueError, match="closed"):
        next(iterator)


def batch_with(valid, bad):
    return {"valid": np.arange(50) < valid, "bad": np.array([bad] + [0] * 49, np.int32)}


def test_bad_budget_waits_for_a_hundred_records():
    budget = BadBudget(0.05)
    budget.update(batch_with(50, 20))
    with pytest.raises(SourceError, match=r"20 of the 120 .*max_bad_fraction=0\.05"):
        budget.update(batch_with(50, 0))
    tolerant = BadBudget(0.05)
    for _ in range(20):
        tolerant.update(batch_with(50, 2))
    assert (tolerant.seen, tolerant.bad) == (1040, 40)
    with pytest.raises(ValueError, match="max_bad_fraction"):
        BadBudget(2.0)


@pytest.mark.parametrize("processes", [1, 2])
def test_eval_batches_pad_the_last(processes):
    shards = [
        list(eval_batches(Numbers(19), make_example, 8, process_index=i, process_count=processes))
        for i in range(processes)
    ]
    batches = [
        {key: np.concatenate([batch[key] for batch in parts]) for key in parts[0]}
        for parts in zip(*shards, strict=True)
    ]
    assert len(batches) == 3
    assert {batch["noise"].shape for batch in batches} == {(8, 3)}
    valid = np.concatenate([batch["valid"] for batch in batches])
    place = np.concatenate([batch["index"] for batch in batches])
    assert valid.tolist() == [True] * 19 + [False] * 5
    assert place.tolist() == [*range(19), -1, -1, -1, -1, -1]
    assert not batches[2]["noise"][3:].any()
    again = list(eval_batches(Numbers(19), make_example, 8, threads=3))
    assert_same(again, batches)


def test_eval_limit_and_bad_records(caplog):
    batches = list(eval_batches(Numbers(50, bad={0, 6}), make_example, 4, limit=7))
    valid = np.concatenate([batch["valid"] for batch in batches])
    assert np.flatnonzero(~valid).tolist() == [0, 6, 7]
    assert np.concatenate([batch["index"] for batch in batches])[6] == 6
    assert "2 of 7 records" in caplog.messages[-1]


def test_eval_errors():
    with pytest.raises(SourceError, match="nothing to evaluate"):
        eval_batches(Numbers(0), make_example, 4)
    with pytest.raises(ValueError, match="multiple"):
        eval_batches(Numbers(4), make_example, 5, process_count=2)
    with pytest.raises(SourceError, match="none of the first records"):
        list(eval_batches(Numbers(40, bad=range(40)), make_example, 4))

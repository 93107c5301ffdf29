"""Beam search against plain Python over a decoder without cache, and against enumeration."""

import functools
import itertools
import math
import re

import jax
import numpy as np
import pytest

from mplug_jax.generation.beam import BeamConfig, beam_search, length_penalty
from mplug_jax.generation.scoring import sequence_log_probs

ROWS, BEAMS, MAX_LENGTH, ALPHA = 3, 4, 6, 0.6
PLAIN = {"min_length": 0, "prompt": None}
PROMPTED = {"min_length": 2, "prompt": (1, 7, 4)}
# (seed, bias of [SEP]): chosen to show every kind of ending, which is asserted below.
MODELS = [(2, 3), (1, 3), (3, 2), (1, 1), (0, 1)]


@pytest.fixture(scope="module")
def settings(make_params, make_memory):
    """(params, memory, mask) of each model."""
    return [(make_params(seed, sep=sep), *make_memory(seed + 50, ROWS)) for seed, sep in MODELS]


@pytest.fixture(scope="module")
def log_probs_of(settings, reader):
    """(model, row) -> log p of the next token of a text; each text is read once."""

    @functools.cache
    def make(number, row):
        params, memory, mask = settings[number]
        return reader(params, memory[row], mask[row])

    return make


@pytest.fixture(scope="module")
def search(model, ids_of):
    """(procedure, case, other settings) -> compiled search."""

    @functools.cache
    def make(procedure, min_length=0, prompt=None, beams=BEAMS, max_length=MAX_LENGTH, **more):
        config = BeamConfig(beams, max_length, min_length, ALPHA, procedure, **more)
        prompt = None if prompt is None else np.array(prompt)
        run = jax.jit(
            lambda params, memory, mask, allowed: beam_search(
                model, params, memory, mask, config, prompt_ids=prompt, allowed=allowed, **ids_of
            )
        )
        # Without a prompt, one program serves limited and unlimited searches.
        anything = np.ones((max_length, 12), bool) if prompt is None else None
        return lambda *args, allowed=anything: run(*args, allowed)

    return make


def penalty(length):
    return ((5 + length) / 6) ** ALPHA


def candidates(alive, log_probs, prompt, forbidden, allowed=None):
    """(log p, text) of every continuation, best first."""
    found = []
    for log_p, text in alive:
        row = log_probs(prompt + text).copy()
        if allowed is not None:
            row[~allowed[len(text)]] = -np.inf
            row -= np.log(np.exp(row).sum())
        for token, value in forbidden.items():
            row[token] = value
        found += [(log_p + row[v], (*text, v)) for v in range(len(row)) if row[v] > -np.inf]
    return sorted(found, key=lambda c: -c[0])


def official(log_probs, sep, min_length, prompt):
    """Texts and scores, best first, and the number of steps."""
    alive, written = [(0.0, ())], []
    for step in range(MAX_LENGTH):
        forbidden = {sep: -1e20} if step < min_length else {}
        alive = candidates(alive, log_probs, prompt, forbidden)[:BEAMS]
        ended = alive[0][1][-1] == sep or step + 1 == MAX_LENGTH
        written += [
            (log_p / penalty(step + 1), text) for log_p, text in alive if ended or text[-1] == sep
        ]
        if ended:
            break
    return sorted(written, key=lambda c: -c[0])[:BEAMS], step + 1


def standard(log_probs, sep, min_length, prompt, kept=BEAMS, allowed=None):
    """Never stops early; the steps are those after which nothing can change any more."""
    alive, pool, steps = [(0.0, ())], [], None
    for step in range(MAX_LENGTH):
        forbidden = {0: -np.inf, 1: -np.inf} | ({sep: -np.inf} if step < min_length else {})
        survivors = []
        for rank, (log_p, text) in enumerate(
            candidates(alive, log_probs, prompt, forbidden, allowed)
        ):
            if text[-1] != sep:
                survivors.append((log_p, text))
            elif rank < BEAMS:
                pool.append((log_p / penalty(step + 1), text))
        alive = survivors[:BEAMS]
        pool = sorted(pool, key=lambda c: -c[0])[:kept]
        # A set of tokens may leave no continuation but [SEP].
        hope = alive[0][0] / penalty(MAX_LENGTH) if alive else -math.inf
        if steps is None and len(pool) == kept and pool[-1][0] >= hope:
            steps = step + 1
    pool += [(log_p / penalty(MAX_LENGTH), text) for log_p, text in alive]
    return sorted(pool, key=lambda c: -c[0])[:kept], steps or MAX_LENGTH


def check(got, want, pad=0):
    """``want``: (texts with scores, steps) of each row."""
    for row, (texts, _) in enumerate(want):
        for place, (score, text) in enumerate(texts):
            padded = list(text) + [pad] * (got.ids.shape[-1] - len(text))
            np.testing.assert_array_equal(got.ids[row, place], padded)
            np.testing.assert_allclose(got.scores[row, place], score, atol=1e-4)
            assert got.lengths[row, place] == len(text)
    assert got.steps == max(steps for _, steps in want)


@pytest.mark.parametrize("case", [PLAIN, PROMPTED])
@pytest.mark.parametrize("procedure", [official, standard])
def test_search_is_the_plain_one(settings, search, log_probs_of, ids_of, procedure, case):
    run = search(procedure.__name__, **case)
    all_texts, all_steps = [], []
    prompt = case["prompt"] or (ids_of["cls_id"],)
    for number, setting in enumerate(settings):
        want = [
            procedure(log_probs_of(number, row), ids_of["sep_id"], case["min_length"], prompt)
            for row in range(ROWS)
        ]
        check(run(*setting), want)
        all_texts += [text for texts, _ in want for _, text in texts]
        all_steps += [steps for _, steps in want]
    # Every kind of text and of ending has been seen.
    sep = ids_of["sep_id"]
    assert any(sep not in text for text in all_texts)
    assert any(text[-1] == sep and len(text) < MAX_LENGTH for text in all_texts)
    assert min(all_steps) < MAX_LENGTH == max(all_steps)
    went_on = any(sep in text[:-1] for text in all_texts)
    assert went_on == (procedure is official)
    assert min(len(text) for text in all_texts) > case["min_length"]


def test_wide_standard_search_finds_the_best_of_all_texts(settings, search, log_probs_of, ids_of):
    length, sep, words = 3, ids_of["sep_id"], range(3, 12)
    # As many beams as there are candidates in the last step: nothing is ever cut.
    run = search("standard", beams=9 * 9 * 10, max_length=length, returned=7)
    got = run(*settings[2])
    for row in range(ROWS):
        log_probs = log_probs_of(2, row)
        texts = [
            (*text, sep) for n in range(length) for text in itertools.product(words, repeat=n)
        ] + list(itertools.product(words, repeat=length))
        scored = []
        for text in texts:
            whole = (ids_of["cls_id"], *text)
            log_p = sum(log_probs(whole[:i])[whole[i]] for i in range(1, len(whole)))
            scored.append((log_p / penalty(len(text)), text))
        want = sorted(scored, reverse=True)[:7]
        np.testing.assert_allclose(got.scores[row], [score for score, _ in want], atol=1e-4)
        found = [tuple(text[mask]) for text, mask in zip(got.ids[row], got.mask[row], strict=True)]
        assert found == [text for _, text in want]


def test_fewer_returned_texts_are_the_same_and_come_sooner(settings, search):
    params, memory, mask = settings[0]
    many, one = (
        search("standard", **PLAIN)(params, memory, mask),
        search("standard", **PLAIN, returned=1)(params, memory, mask),
    )
    np.testing.assert_array_equal(one.ids[:, 0], many.ids[:, 0])
    np.testing.assert_array_equal(one.scores[:, 0], many.scores[:, 0])
    assert one.steps < many.steps and one.ids.shape[1] == 1


@pytest.mark.parametrize("procedure", ["official", "standard"])
def test_a_picture_does_not_see_its_neighbours(settings, search, make_memory, procedure):
    params, memory, mask = settings[3]
    run = search(procedure, **PLAIN)
    together = run(params, memory, mask)
    # The others are replaced by pictures that take another number of steps.
    for row in range(ROWS):
        others, other_mask = make_memory(99 + row, ROWS)
        others[ROWS - 1 - row], other_mask[ROWS - 1 - row] = memory[row], mask[row]
        got = run(params, others, other_mask)
        np.testing.assert_array_equal(got.ids[ROWS - 1 - row], together.ids[row])
        np.testing.assert_allclose(got.scores[ROWS - 1 - row], together.scores[row], atol=1e-6)


def test_search_stays_within_the_allowed_tokens(settings, search, log_probs_of, ids_of):
    allowed = np.random.default_rng(5).random((MAX_LENGTH, 12)) < 0.4
    allowed[:, 3:5] = True
    got = search("standard", **PLAIN)(*settings[1], allowed=allowed)
    sep, prompt = ids_of["sep_id"], (ids_of["cls_id"],)
    want = [standard(log_probs_of(1, row), sep, 0, prompt, allowed=allowed) for row in range(ROWS)]
    check(got, want)
    for step in range(MAX_LENGTH):
        assert allowed[step][np.asarray(got.ids)[..., step][np.asarray(got.mask)[..., step]]].all()

    # A single allowed text leaves the other places empty.
    only = np.zeros((MAX_LENGTH, 12), bool)
    only[np.arange(3), [5, 8, ids_of["sep_id"]]] = True
    for procedure in ("official", "standard"):
        got = search(procedure, **PLAIN)(*settings[1], allowed=only)
        np.testing.assert_array_equal(got.ids[:, 0], [[5, 8, 2, 0, 0, 0]] * ROWS)
        np.testing.assert_allclose(got.scores[:, 0], 0, atol=1e-5)
        assert np.all(got.scores[:, 1:] == -np.inf) and np.all(got.lengths[:, 1:] == 0)


@pytest.mark.parametrize("case", [PLAIN, PROMPTED])
@pytest.mark.parametrize("procedure", ["official", "standard"])
def test_scores_are_those_of_reading_the_texts_again(
    settings, search, model, ids_of, procedure, case
):
    prompt = None if case["prompt"] is None else np.array(case["prompt"])
    read = jax.jit(
        functools.partial(sequence_log_probs, model, cls_id=ids_of["cls_id"], prompt_ids=prompt)
    )
    for params, memory, mask in settings:
        got = search(procedure, **case)(params, memory, mask)
        log_probs = read(params, got.ids, got.mask, memory, mask).sum(-1)
        scores = log_probs / length_penalty(got.lengths, ALPHA)
        np.testing.assert_allclose(scores, got.scores, atol=2e-5)


def test_cross_keys_are_not_repeated_for_each_beam(settings, model, ids_of):
    config = BeamConfig(BEAMS, MAX_LENGTH, procedure="official")
    run = jax.jit(functools.partial(beam_search, model, config=config, **ids_of))
    program = run.lower(*settings[0]).compile().as_text()
    shapes = [
        [int(n) for n in shape.split(",")] for shape in re.findall(r"f32\[([\d,]+)\]", program)
    ]
    text, memory_length = model.config.text, settings[0][1].shape[1]
    of_a_row = memory_length * text.width
    # The cache holds them once a layer and picture ...
    cached = [text.heads, memory_length, text.width // text.heads]
    assert any(s[:2] == [model.config.decoder.depth, ROWS] and s[2:] == cached for s in shapes)
    # ... and nothing along the memory is as large as one layer's keys for all beams.
    along = [math.prod(s) for s in shapes if memory_length in s and text.width // text.heads in s]
    assert along and max(along) == model.config.decoder.depth * ROWS * of_a_row
    assert max(along) < BEAMS * ROWS * of_a_row


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"procedure": "offical"}, "'offical' is unknown; choose one of: standard, official"),
        ({"beams": 0}, "at least 1 beam, got 0"),
        ({"max_length": 5, "min_length": 5}, "min_length 5 must be .* below max_length 5"),
        ({"length_penalty": -1.0}, "length_penalty -1.0 is negative"),
        ({"returned": 6}, "6 texts cannot be returned of 5 beams"),
    ],
)
def test_settings_are_checked(options, message):
    with pytest.raises(ValueError, match=message):
        BeamConfig(**options)

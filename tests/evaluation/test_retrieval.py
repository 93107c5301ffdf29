"""Recall against a plain-Python count, hand-made cases, and the official figure's definition."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mplug_jax.evaluation import retrieval


def slow_recall(scores, positives, k):
    """Percent of queries whose best right item is beaten or tied by fewer than k wrong ones."""
    hits = 0
    for row, right in zip(scores.tolist(), positives.tolist(), strict=True):
        best = max(s for s, r in zip(row, right, strict=True) if r)
        ahead = [s for s, r in zip(row, right, strict=True) if not r and s >= best]
        hits += len(ahead) < k
    return 100 * hits / len(scores)


def official_itm_eval(image_to_text, text_to_image, text_of_image, image_of_text):
    """Recalls as the official evaluation computes them (sorting; for scores without ties)."""
    ranks = []
    for index, row in enumerate(image_to_text):
        order = np.argsort(row)[::-1].tolist()
        ranks.append(min(order.index(text) for text in text_of_image[index]))
    text_recalls = [100 * float(np.mean(np.array(ranks) < k)) for k in (1, 5, 10)]
    ranks = [
        np.argsort(row)[::-1].tolist().index(image_of_text[i])
        for i, row in enumerate(text_to_image)
    ]
    image_recalls = [100 * float(np.mean(np.array(ranks) < k)) for k in (1, 5, 10)]
    return text_recalls, image_recalls


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 8), st.integers(1, 12), st.booleans())
def test_recall_equals_plain_count(seed, queries, gallery, ties):
    rng = np.random.default_rng(seed)
    scores = rng.integers(0, 3, (queries, gallery)) if ties else rng.normal(size=(queries, gallery))
    positives = rng.random((queries, gallery)) < 0.3
    positives[np.arange(queries), rng.integers(0, gallery, queries)] = True
    recall = retrieval.recall_at_k(scores, positives, ks=(1, 3, 20))
    expected = {k: slow_recall(scores, positives, k) for k in (1, 3, 20)}
    assert recall == pytest.approx(expected)


def test_metrics_equal_official_evaluation_without_ties():
    rng = np.random.default_rng(0)
    image_ids = np.arange(20) * 7 + 3
    text_image_ids = np.repeat(image_ids, 3)
    shuffle = rng.permutation(60)
    text_image_ids = text_image_ids[shuffle]
    match = image_ids[:, None] == text_image_ids[None, :]
    image_to_text = rng.normal(size=(20, 60)) + 1.5 * match
    text_to_image = rng.normal(size=(60, 20)) + 1.0 * match.T
    text_of_image = [np.flatnonzero(text_image_ids == i).tolist() for i in image_ids]
    image_of_text = [int(np.flatnonzero(image_ids == i)[0]) for i in text_image_ids]
    texts, images = official_itm_eval(image_to_text, text_to_image, text_of_image, image_of_text)

    metrics = retrieval.retrieval_metrics(image_to_text, text_to_image, image_ids, text_image_ids)

    assert 10 < texts[0] < 100 and 10 < images[0] < 100
    assert metrics == pytest.approx(
        {
            "txt_r1": texts[0],
            "txt_r5": texts[1],
            "txt_r10": texts[2],
            "img_r1": images[0],
            "img_r5": images[1],
            "img_r10": images[2],
            "txt_r_mean": sum(texts) / 3,
            "img_r_mean": sum(images) / 3,
            "r_mean": (sum(texts) + sum(images)) / 6,
        }
    )


def test_any_text_of_an_image_is_a_hit():
    image_to_text = np.array([[0.1, 0.9, 0.5], [0.9, 0.8, 0.1]])
    metrics = retrieval.retrieval_metrics(image_to_text, image_to_text.T, [5, 6], [5, 5, 6])
    assert metrics["txt_r1"] == 50.0  # image 5 by its second text; image 6 prefers both others
    assert metrics["img_r1"] == pytest.approx(100 / 3)  # text 1 alone prefers its own image


def test_collapsed_model_finds_nothing():
    """Equal scores everywhere with matching pairs on the diagonal: a sort would score 100."""
    scores = np.zeros((30, 30))
    ids = np.arange(30)
    assert retrieval.recall_at_k(scores, query_ids=ids, gallery_ids=ids) == {1: 0, 5: 0, 10: 0}


def test_tie_between_right_items_costs_nothing():
    scores = np.array([[1.0, 1.0, 0.0]])
    positives = np.array([[True, True, False]])
    assert retrieval.recall_at_k(scores, positives, ks=(1,)) == {1: 100.0}


def test_chance_level():
    rng = np.random.default_rng(1)
    ids = np.arange(200)
    recalls = [
        retrieval.recall_at_k(rng.normal(size=(200, 200)), query_ids=ids, gallery_ids=ids)[10]
        for _ in range(20)
    ]
    assert np.mean(recalls) == pytest.approx(5.0, abs=1.5)


def test_nan_score_raises_with_its_place():
    scores = np.zeros((3, 4), np.float32)
    scores[1, 2] = np.nan
    ids = np.arange(3)
    with pytest.raises(ValueError, match="row 1, column 2"):
        retrieval.recall_at_k(scores, query_ids=ids, gallery_ids=[0, 1, 2, 2])
    with pytest.raises(ValueError, match="NaN"):
        retrieval.top_k_indices(scores, 2)


def test_query_without_right_item_raises():
    with pytest.raises(ValueError, match="row 1"):
        retrieval.recall_at_k(np.zeros((2, 2)), query_ids=[0, 9], gallery_ids=[0, 1])


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"positives": np.ones((2, 2), bool), "query_ids": [0, 1], "gallery_ids": [0, 1]},
        {"query_ids": [0, 1]},
        {"positives": np.ones((2, 3), bool)},
        {"query_ids": [0, 1, 2], "gallery_ids": [0, 1]},
    ],
)
def test_arguments_that_do_not_fit_raise(arguments):
    with pytest.raises(ValueError, match=r"give either|positives"):
        retrieval.recall_at_k(np.zeros((2, 2)), **arguments)


def test_empty_set_raises():
    with pytest.raises(ValueError, match="no query"):
        retrieval.recall_at_k(np.zeros((0, 3)), np.zeros((0, 3), bool))


def test_top_k_is_stable_and_sorted():
    scores = np.array([[1.0, 3.0, 3.0, 2.0], [0.0, 0.0, 0.0, 0.0]])
    np.testing.assert_array_equal(retrieval.top_k_indices(scores, 3), [[1, 2, 3], [0, 1, 2]])
    assert retrieval.top_k_indices(scores, 9).shape == (2, 4)
    long = np.random.default_rng(0).integers(0, 3, (1, 500))
    expected = sorted(range(500), key=lambda i: (-long[0, i], i))
    np.testing.assert_array_equal(retrieval.top_k_indices(long, 500), [expected])
    with pytest.raises(ValueError, match="at least 1"):
        retrieval.top_k_indices(scores, 0)


def test_rerank_by_perfect_match_scores():
    """Re-ranking the best k by an oracle finds just the queries whose right item is among them."""
    rng = np.random.default_rng(2)
    ids = np.arange(50)
    itc = rng.normal(size=(50, 50)) + 1.5 * np.eye(50)
    indices = retrieval.top_k_indices(itc, 8)
    matches = (indices == ids[:, None]).astype(np.float32)
    scores = retrieval.scatter_scores((50, 50), indices, matches)
    among = retrieval.recall_at_k(itc, query_ids=ids, gallery_ids=ids, ks=(8,))[8]
    reranked = retrieval.recall_at_k(scores, query_ids=ids, gallery_ids=ids, ks=(1, 10))
    assert 20 < among < 100
    assert reranked == {1: among, 10: among}
    assert np.count_nonzero(scores == -100.0) == 50 * 42


def test_what_was_not_reranked_keeps_its_order_behind():
    rng = np.random.default_rng(5)
    itc = 1000 * rng.normal(size=(40, 30)).astype(np.float32)
    indices = retrieval.top_k_indices(itc, 4)
    matches = rng.normal(size=indices.shape).astype(np.float32)
    ranked = retrieval.top_k_indices(retrieval.reranked_scores(itc, indices, matches), 30)
    for row, first, logits, order in zip(itc, indices, matches, ranked, strict=True):
        assert list(order[:4]) == list(first[np.argsort(-logits)])
        assert list(order[4:]) == list(np.argsort(-row)[4:])
    with pytest.raises(ValueError, match="NaN"):
        retrieval.reranked_scores(itc, indices, np.where(matches > 0, np.nan, matches))


def test_scatter_rejects_scores_that_fill_would_beat():
    indices = np.array([[0, 1]])
    for bad in (-100.0, np.nan):
        with pytest.raises(ValueError, match="fill"):
            retrieval.scatter_scores((1, 3), indices, np.array([[0.5, bad]]))
    with pytest.raises(ValueError, match="rows"):
        retrieval.scatter_scores((2, 3), indices, np.array([[0.5, 0.1]]))


def test_median_rank_counts_from_one():
    scores = np.array([[0.9, 0.1, 0.2], [0.5, 0.4, 0.6], [0.1, 0.2, 0.3], [0.3, 0.2, 0.1]])
    ids = {"query_ids": [0, 1, 2, 2], "gallery_ids": [0, 1, 2]}
    assert retrieval.median_rank(scores, **ids) == 2.0  # ranks 1, 3, 1, 3
    assert retrieval.median_rank(np.zeros((3, 3)), np.eye(3, dtype=bool)) == 3.0
    assert retrieval.median_rank(np.eye(3), np.eye(3, dtype=bool)) == 1.0


def test_median_rank_equals_official_evaluation_without_ties():
    rng = np.random.default_rng(3)
    scores = rng.normal(size=(31, 31)) + 1.2 * np.eye(31)
    ranks = [np.argsort(row)[::-1].tolist().index(i) for i, row in enumerate(scores)]
    expected = np.median(np.array(ranks) + 1)
    assert 1 < expected < 16
    assert retrieval.median_rank(scores, np.eye(31, dtype=bool)) == expected

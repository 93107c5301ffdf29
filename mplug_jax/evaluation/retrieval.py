"""Recall of image-text retrieval, and what re-ranking by another score needs.

The figures are those of the official `itm_eval` (X-PLUG/mPLUG `retrieval_vqa.py` and its
relatives): an image finds its text if any text of the same image is among the first k, a text
finds its image likewise; percentages over the queries.
"""

import numpy as np
from numpy.typing import ArrayLike

# What the official evaluation gives to a pair that was not re-ranked.
NOT_RERANKED = -100.0


def recall_at_k(
    scores: np.ndarray,
    positives: np.ndarray | None = None,
    *,
    query_ids: ArrayLike | None = None,
    gallery_ids: ArrayLike | None = None,
    ks: tuple[int, ...] = (1, 5, 10),
) -> dict[int, float]:
    """Percentage of queries with a right item among the k best of the gallery, for each k.

    A tie counts against the model: an item ranks behind every wrong item of the same score.
    Otherwise a collapsed model, which scores everything alike, would find whatever the sort
    happens to put first, and with the gallery in the queries' order that is the right item.

    Args:
      scores: [N queries, M gallery], higher is better.
      positives: [N, M] bool, True where the item is right for the query; or give
      query_ids, gallery_ids: [N] and [M], an item is right where the ids are equal.
      ks: cut-offs; one beyond M counts the whole gallery.

    Returns:
      {k: percentage}.

    Raises:
      ValueError: shapes that do not fit, a NaN score, no query, or a query with no right item.
    """
    scores = np.asarray(scores)
    positives = _positives(scores, positives, query_ids, gallery_ids)
    ranks = _ranks(scores, positives)
    return {k: 100.0 * float(np.mean(ranks < k)) for k in ks}


def median_rank(
    scores: np.ndarray,
    positives: np.ndarray | None = None,
    *,
    query_ids: ArrayLike | None = None,
    gallery_ids: ArrayLike | None = None,
) -> float:
    """Median over the queries of the rank of the best right item, 1 the best.

    The `mdR` of video retrieval (official `retrieval_vid_mplug.py`). Arguments, ties and errors as
    in `recall_at_k`.
    """
    scores = np.asarray(scores)
    positives = _positives(scores, positives, query_ids, gallery_ids)
    return float(np.median(_ranks(scores, positives) + 1))


def retrieval_metrics(
    image_to_text: np.ndarray,
    text_to_image: np.ndarray,
    image_ids: ArrayLike,
    text_image_ids: ArrayLike,
) -> dict[str, float]:
    """Recall in percent both ways, as the official `itm_eval` names it.

    Args:
      image_to_text: [N, M] scores of each text for an image.
      text_to_image: [M, N] scores of each image for a text. Not the transpose after re-ranking,
        which looks at the best of each row only.
      image_ids: [N], and text_image_ids: [M], the id of the image that a text belongs to.

    Returns:
      txt_r1, txt_r5, txt_r10 (an image looks for its texts), img_r1, img_r5, img_r10 (a text
      looks for its image), their means txt_r_mean and img_r_mean, and r_mean, the mean of these.
    """
    texts = recall_at_k(image_to_text, query_ids=image_ids, gallery_ids=text_image_ids)
    images = recall_at_k(text_to_image, query_ids=text_image_ids, gallery_ids=image_ids)
    metrics = {f"txt_r{k}": recall for k, recall in texts.items()}
    metrics |= {f"img_r{k}": recall for k, recall in images.items()}
    metrics["txt_r_mean"] = sum(texts.values()) / len(texts)
    metrics["img_r_mean"] = sum(images.values()) / len(images)
    metrics["r_mean"] = (metrics["txt_r_mean"] + metrics["img_r_mean"]) / 2
    return metrics


def top_k_indices(scores: np.ndarray, k: int) -> np.ndarray:
    """Columns [N, min(k, M)] of the best scores of each row of [N, M], best first.

    Of equal scores the lower column comes first, on every machine.

    Raises:
      ValueError: a NaN score, or k below 1.
    """
    scores = _checked(scores)
    if k < 1:
        raise ValueError(f"k has to be at least 1, not {k}")
    return np.argsort(-scores, axis=1, kind="stable")[:, :k]


def reranked_scores(similarity: np.ndarray, indices: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Scores [N, M] that rank by `values` [N, k] in the columns `indices` [N, k] of each row, and
    behind these by `similarity` [N, M].

    Recall at up to k is that of the official evaluation; beyond, and for the median rank, what was
    not re-ranked keeps its place instead of being last.

    Raises:
      ValueError: shapes that do not fit, a NaN, or an infinite value.
    """
    values = np.asarray(values)
    if not np.all(np.isfinite(values)):
        raise ValueError("a re-ranked score is NaN or infinite: the match logits are broken")
    # In place: of 5,000 pictures and 25,000 texts each copy takes a gigabyte.
    scores = _checked(similarity).astype(np.float64)
    scores += values.min() - 1.0 - scores.max()
    return _put(scores, indices, values)


def scatter_scores(
    shape: tuple[int, int], indices: np.ndarray, values: np.ndarray, fill: float = NOT_RERANKED
) -> np.ndarray:
    """Scores [N, M] with `values` [N, k] in the columns `indices` [N, k] of each row.

    The other entries are `fill`, below any sum of a match logit and a similarity, so that a pair
    which was not re-ranked stays behind those which were.

    Raises:
      ValueError: shapes that do not fit, or a value that is not above `fill`.
    """
    values = np.asarray(values)
    # Written so that a NaN fails too.
    if not np.all(values > fill):
        raise ValueError(f"a re-ranked score is NaN or not above the fill value {fill}")
    scores = np.full(shape, fill, dtype=np.result_type(values.dtype, np.float32))
    return _put(scores, indices, values)


def _put(scores: np.ndarray, indices: np.ndarray, values: np.ndarray) -> np.ndarray:
    indices = np.asarray(indices)
    if indices.shape != values.shape or len(indices) != len(scores):
        raise ValueError(
            f"indices {indices.shape} and values {values.shape} have to be alike and hold "
            f"{len(scores)} rows"
        )
    np.put_along_axis(scores, indices, values, axis=1)
    return scores


def _positives(
    scores: np.ndarray,
    positives: np.ndarray | None,
    query_ids: ArrayLike | None,
    gallery_ids: ArrayLike | None,
) -> np.ndarray:
    by_ids = query_ids is not None and gallery_ids is not None
    if (positives is None) != by_ids:
        raise ValueError("give either positives, or both query_ids and gallery_ids")
    if by_ids:
        positives = np.asarray(query_ids)[:, None] == np.asarray(gallery_ids)[None, :]
    positives = np.asarray(positives, dtype=bool)
    if positives.shape != scores.shape:
        raise ValueError(f"scores are {scores.shape}, but the ids or positives {positives.shape}")
    if len(positives) == 0:
        raise ValueError("there is no query to compute a recall of")
    without = np.flatnonzero(~positives.any(axis=1))
    if len(without):
        raise ValueError(
            f"{len(without)} queries have nothing right in the gallery, the first is row "
            f"{without[0]}; a recall over them would not mean what it says"
        )
    return positives


def _ranks(scores: np.ndarray, positives: np.ndarray) -> np.ndarray:
    """Wrong items [N] that score as high as the query's best right item, or higher."""
    best = np.where(positives, _checked(scores), -np.inf).max(axis=1, keepdims=True)
    return np.count_nonzero((scores >= best) & ~positives, axis=1)


def _checked(scores: np.ndarray) -> np.ndarray:
    scores = np.asarray(scores)
    if scores.ndim != 2:
        raise ValueError(f"scores have to be [queries, gallery], not {scores.shape}")
    bad = np.argwhere(np.isnan(scores))
    if len(bad):
        raise ValueError(
            f"{len(bad)} of {scores.size} scores are NaN, the first at row {bad[0][0]}, column "
            f"{bad[0][1]}: the embeddings or the match logits are broken"
        )
    return scores

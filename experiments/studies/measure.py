"""What the studies measure of embeddings: recall any to any and by every score, and how modalities lie."""

import functools
import itertools
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from gramjax import metrics, scores

CUTOFFS = (1, 5, 10)
ITEM_SCORES: dict[str, scores.Score] = {
    "volume": scores.Volume(),
    "residual": scores.Residual(),
    "cone": scores.Cone(),
    "leading direction": scores.LeadingDirection(),
    "mean cosine": scores.Cosine(),
    "area": scores.Triangle(),
    "product": scores.Multilinear(),
}


def mean_recall(ranks: Sequence[np.ndarray]) -> float:
    """Mean of recall@1, 5 and 10 over sets of ranks (0 is first), in [0, 1]: what the studies compare by."""
    return float(np.mean([np.mean(part < k) for part in ranks for k in CUTOFFS]))


def ranks(
    score: scores.Score, queries: np.ndarray, gallery: np.ndarray, where: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Ranks of the right item for every query, and of the right query for every item (0 is first).

    Args:
      score: by which is searched.
      queries: `[N, d]`.
      gallery: `[N, m, d]`, item i the right one for query i.
      where: `[N, m]` bool, which modalities the items have; default all.
    """
    where = np.ones(gallery.shape[:2], bool) if where is None else where
    forth, back = _ranks(score, jnp.asarray(queries), jnp.asarray(gallery), jnp.asarray(where))
    return np.asarray(forth), np.asarray(back)


@functools.partial(jax.jit, static_argnums=0)
def _ranks(score: scores.Score, queries: jax.Array, gallery: jax.Array, where: jax.Array):
    table = scores.score_matrix(score, queries, gallery, gallery_where=where)
    better = score.higher_is_better
    return tuple(metrics.retrieval_ranks(one_way, higher_is_better=better) for one_way in (table, table.T))


def any_to_any(embeddings: Mapping[str, np.ndarray]) -> dict[str, float]:
    """Mean recall, "a -> b" for every pair of modalities both ways, by cosine."""
    found = {}
    for a, b in itertools.combinations(embeddings, 2):
        forth, back = ranks(scores.Cosine(), embeddings[a], embeddings[b][:, None])
        found |= {f"{a} -> {b}": mean_recall([forth]), f"{b} -> {a}": mean_recall([back])}
    return found


def joint(embeddings: Mapping[str, np.ndarray], anchor: str, chosen: Sequence[str] = ()) -> dict[str, float]:
    """Mean recall of the anchor and the item made of all other modalities, over both ways, by score.

    Args:
      embeddings: modality to unit vectors `[N, d]`.
      anchor: a modality.
      chosen: names of scores; default all that make sense for this number of modalities.
    """
    gallery = np.stack([value for name, value in embeddings.items() if name != anchor], axis=1)
    names = chosen or [name for name in ITEM_SCORES if name != "area" or len(embeddings) == 3]
    return {name: mean_recall(ranks(ITEM_SCORES[name], embeddings[anchor], gallery)) for name in names}


def summary(embeddings: Mapping[str, np.ndarray], anchor: str) -> dict[str, float]:
    """All figures of one set of embeddings, each under a name of its own."""
    pairs = any_to_any(embeddings)
    by_score = joint(embeddings, anchor)
    return {
        **{f"recall {name}": value for name, value in pairs.items()},
        **{f"recall by {name}": value for name, value in by_score.items()},
        "recall of pairs": float(np.mean(list(pairs.values()))),
        **geometry(embeddings),
    }


def geometry(embeddings: Mapping[str, np.ndarray]) -> dict[str, float]:
    """How the modalities lie to each other."""
    z = jnp.stack([jnp.asarray(value) for value in embeddings.values()], axis=1)
    gaps = np.asarray(metrics.modality_gap(z))
    return {
        "gram alignment": float(metrics.gram_alignment(z)),
        "rank-one ratio": float(metrics.rank_one_ratio(z)),
        "modality gap": float(gaps[np.triu_indices(len(gaps), 1)].mean()),
        "effective rank": float(np.mean([metrics.effective_rank(z[:, number]) for number in range(z.shape[1])])),
        "matched cosine": float(np.mean([np.sum(z[:, a] * z[:, b], -1).mean() for a, b in _pairs(z.shape[1])])),
    }


def _pairs(number: int) -> list[tuple[int, int]]:
    return list(itertools.combinations(range(number), 2))

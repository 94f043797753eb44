"""Retrieval recall on what is held out, measured during training."""

import functools
import itertools
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from gramjax import evaluation, metrics, scores
from gramjax.streaming import streamed_ranks

RANKS = (1, 5, 10)
ITEM_SCORES: dict[str, scores.Score] = {
    "volume": scores.Volume(),
    "residual": scores.Residual(),
    "cone": scores.Cone(),
    "leading_direction": scores.LeadingDirection(),
}


def recalls(embeddings: Mapping[str, np.ndarray], *, anchor: str, select_by: str) -> dict[str, float]:
    """Mean of recall@1, 5 and 10 and over both directions, in [0, 1], by every way to retrieve.

    Args:
        embeddings: modality -> unit vectors [N, d], row i of each from the same item.
        anchor: modality whose single vectors retrieve, and are retrieved by, all other modalities together.
        select_by: which of the recalls is repeated as "validation/recall", by which the best checkpoint is chosen.

    Returns:
        "validation/a-b": of modalities a and b, by cosine; "validation/pairs": mean over these; "validation/volume",
        "validation/residual", "validation/cone", "validation/leading_direction": anchor against the others;
        "validation/recall_at_1": of the pairs, recall@1 alone; "validation/alignment": 1 - volume of all modalities;
        "validation/recall": the one `select_by` names.
    """
    ranks, alignment = _measure({name: jnp.asarray(value) for name, value in embeddings.items()}, anchor)
    results = {name: float(np.mean([np.mean(values < k) for k in RANKS])) for name, values in ranks.items()}
    results |= {"recall_at_1": float(np.mean(ranks["pairs"] < 1)), "alignment": float(alignment)}
    return {f"validation/{name}": value for name, value in {"recall": results[select_by], **results}.items()}


def clip_recalls(embeddings: Mapping[str, np.ndarray], where: Mapping[str, np.ndarray]) -> dict[str, float]:
    """Recall of clips by their captions and of captions by their clips, by volume, in [0, 1].

    Args:
        embeddings: modality -> unit vectors [N, d]; "caption" finds, and is found by, all others together.
        where: modality -> bool [N], which are present. Clips without a caption are left out; those with nothing else
            are never found.

    Returns:
        "validation/caption-clip/recall@1" (5, 10) and "validation/clip-caption/recall@1" (5, 10), and
        "validation/recall", the mean of recall@1 over both directions, by which the best checkpoint is chosen.
    """
    captioned = np.flatnonzero(where["caption"])
    if not captioned.size:
        raise ValueError("where must have a caption at least, got none")
    captions = jnp.asarray(embeddings["caption"][captioned])
    items = jnp.stack([value[captioned] for name, value in embeddings.items() if name != "caption"], axis=1)
    item_where = jnp.stack([value[captioned] for name, value in where.items() if name != "caption"], axis=1)
    own = jnp.arange(len(captioned), dtype=jnp.int32)
    ranks = {
        "caption-clip": streamed_ranks(
            scores.Volume(), captions, items, query_ids=own, gallery_ids=own, gallery_where=item_where
        ),
        "clip-caption": evaluation.zero_shot_ranks(items, captions, own, item_where=item_where),
    }
    recall = {f"{way}/recall@{k}": float(metrics.recall_at_k(ranks[way], k)) for way in ranks for k in RANKS}
    best = np.mean([recall[f"{way}/recall@1"] for way in ranks])
    return {f"validation/{name}": value for name, value in {"recall": float(best), **recall}.items()}


@functools.partial(jax.jit, static_argnames="anchor")
def _measure(embeddings: dict[str, jax.Array], anchor: str) -> tuple[dict[str, jax.Array], jax.Array]:
    """Ranks of all right answers by every way to retrieve, and the alignment."""
    queries = embeddings[anchor]
    gallery = jnp.stack([value for name, value in embeddings.items() if name != anchor], axis=1)
    pairs = {
        f"{a}-{b}": _ranks(scores.Cosine(), embeddings[a], embeddings[b][:, None])
        for a, b in itertools.combinations(embeddings, 2)
    }
    ranks = pairs | {"pairs": jnp.concatenate(list(pairs.values()))}
    ranks |= {name: _ranks(score, queries, gallery) for name, score in ITEM_SCORES.items()}
    return ranks, metrics.gram_alignment(jnp.stack(list(embeddings.values()), axis=1))


def _ranks(score: scores.Score, queries: jax.Array, gallery: jax.Array) -> jax.Array:
    """Ranks of the right answers, queries retrieving items and items retrieving queries."""
    table, better = scores.score_matrix(score, queries, gallery), score.higher_is_better
    return jnp.concatenate([metrics.retrieval_ranks(one_way, higher_is_better=better) for one_way in (table, table.T)])

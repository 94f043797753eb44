"""Retrieval recall on the validation split, measured during training."""

import itertools
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from gramjax import metrics, scores

RANKS = (1, 5, 10)


def recalls(embeddings: Mapping[str, np.ndarray], *, anchor: str, select_by: str) -> dict[str, float]:
    """Mean of recall@1, 5 and 10 and over both directions, in [0, 1], by every way to retrieve.

    Args:
        embeddings: modality -> unit vectors [N, d], row i of each from the same item.
        anchor: modality whose single vectors retrieve, and are retrieved by, all other modalities together.
        select_by: which of the recalls is repeated as "validation/recall", by which the best checkpoint is chosen.

    Returns:
        "validation/pairs": mean over pairs of single modalities, by cosine; "validation/volume", "validation/residual",
        "validation/leading_direction": anchor against the others; "validation/recall_at_1": of the pairs, recall@1
        alone; "validation/alignment": 1 - volume of all modalities; "validation/recall": the one `select_by` names.
    """
    vectors = {name: jnp.asarray(value) for name, value in embeddings.items()}
    pairs = [
        _ranks(scores.cosine_scores(vectors[a], vectors[b][:, None]), scores.Cosine())
        for a, b in itertools.combinations(vectors, 2)
    ]
    queries = vectors[anchor]
    gallery = jnp.stack([value for name, value in vectors.items() if name != anchor], axis=1)
    results = {
        "pairs": _mean_recall(np.concatenate(pairs)),
        "volume": _mean_recall(_ranks(scores.volume_scores(queries, gallery), scores.Volume())),
        "residual": _mean_recall(_ranks(scores.residual_scores(queries, gallery), scores.Residual())),
        "leading_direction": _mean_recall(
            _ranks(scores.leading_direction_scores(queries, gallery), scores.LeadingDirection())
        ),
        "recall_at_1": float(np.mean(np.concatenate(pairs) < 1)),
        "alignment": float(metrics.gram_alignment(jnp.stack(list(vectors.values()), axis=1))),
    }
    return {f"validation/{name}": value for name, value in {"recall": results[select_by], **results}.items()}


def _ranks(table: jax.Array, score: scores.Score) -> np.ndarray:
    """Ranks of the right answers, rows retrieving columns and columns retrieving rows."""
    both = [metrics.retrieval_ranks(x, higher_is_better=score.higher_is_better) for x in (table, table.T)]
    return np.concatenate([np.asarray(ranks) for ranks in both])


def _mean_recall(ranks: np.ndarray) -> float:
    return float(np.mean([np.mean(ranks < k) for k in RANKS]))

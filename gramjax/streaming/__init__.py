"""How scores are reduced: to losses over a batch, to the best items, to ranks and to draws, for any score."""

from gramjax.streaming.nll import contrastive_nll, sigmoid_nll
from gramjax.streaming.sampling import sample_hard_negatives
from gramjax.streaming.search import streamed_ranks, streamed_top_k

__all__ = [
    "contrastive_nll",
    "sample_hard_negatives",
    "sigmoid_nll",
    "streamed_ranks",
    "streamed_top_k",
]

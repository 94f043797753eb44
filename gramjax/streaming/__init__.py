"""How scores are reduced: to losses over a batch, for any score."""

from gramjax.streaming.nll import contrastive_nll, sigmoid_nll, softmax_nll

__all__ = ["contrastive_nll", "sigmoid_nll", "softmax_nll"]

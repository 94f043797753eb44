"""Losses that align modalities, as pure functions of their embeddings.

Every n-modal loss takes `embeddings` `[batch, modality, dim]`, unit vectors (`gramjax.stack_modalities` builds them
from a dictionary), and `where` `[batch, modality]`: which are present. The options mean the same everywhere:

- `temperature` divides the score; smaller is sharper. It may be a traced, learnable scalar.
- `label_smoothing`: share of the target spread over the candidates.
- `where`: what is absent is left out exactly; its value may be anything.
- `weights` `[batch]`: the mean is `sum(w * loss) / sum(w)` over the examples that have a loss; over none it is 0.
- `ids` `[batch]`: examples with equal ids are never each other's negatives.
- `reduction`: `"mean"`, `"sum"`, or `None` for the weighted loss of each example, 0 where it has none.
- `block_size`: rows and columns of the batch-by-batch score matrix that are computed at a time. None takes the whole
  matrix of a small batch, and tiles of a large one: memory then grows with the batch, not with its square. (If all
  matrix products of a loss take at most 256 MiB, they are kept for its gradient, which is faster; with a `block_size`
  or across devices never.) Values and gradients agree to rounding. Tiles, and devices, have derivatives in reverse
  mode only (of any order); the whole matrix of a small batch on one device has those in forward mode as well.
- `axis_name`: the batch is divided over devices along this axis of a mesh. Inside `jax.shard_map` each device passes
  its own examples and gets the loss of the whole batch and the gradient of that; with `mesh` besides, the loss takes
  global arrays under plain `jit`. `gramjax.streaming.nll` tells how gradients are taken in each case.
- `precision` of the batch-by-batch matrix products (see `gramjax.scores`).

Unit norm is expected, not enforced. Longer vectors act like a smaller temperature in the cosine losses, and volumes
grow with the product of the lengths: a model that is free to shrink its embeddings will minimise volumes that way.
Normalise.
"""

from gramjax.losses.cone import cone_loss
from gramjax.losses.gram import gram_loss
from gramjax.losses.matching import matching_loss
from gramjax.losses.pairwise import anchored_infonce_loss, infonce_loss, pairwise_infonce_loss, sigmoid_loss
from gramjax.losses.pmrl import alignment_loss, direction_regularization, pmrl_loss
from gramjax.losses.symile import symile_loss
from gramjax.losses.triangle import triangle_loss

__all__ = [
    "alignment_loss",
    "anchored_infonce_loss",
    "cone_loss",
    "direction_regularization",
    "gram_loss",
    "infonce_loss",
    "matching_loss",
    "pairwise_infonce_loss",
    "pmrl_loss",
    "sigmoid_loss",
    "symile_loss",
    "triangle_loss",
]

"""The optimizer of the papers, with weight decay where it belongs."""

from typing import Any

import jax
import optax


def decayed(params: Any) -> Any:
    """Which parameters weight decay acts on: the kernels of linear maps and convolutions, and nothing else.

    Biases, normalisation scales, embedding tables (words, positions, relative positions, class and type tokens), the
    temperature and the sigmoid bias of the loss are left alone: decay would pull them to values that mean something
    else than "small function".

    Returns:
        Tree of bools with the structure of `params`.
    """

    def is_kernel(path: tuple, leaf: Any) -> bool:
        names = [name for part in path if isinstance(name := getattr(part, "key", getattr(part, "name", None)), str)]
        names = [name for name in names if name != "value"]  # nnx.Variable's own level
        return bool(names) and names[-1] == "kernel"

    return jax.tree_util.tree_map_with_path(is_kernel, params)


def adamw(
    learning_rate: optax.ScalarOrSchedule,
    *,
    weight_decay: float = 0.01,
    b1: float = 0.9,
    b2: float = 0.98,
    eps: float = 1e-6,
    max_grad_norm: float | None = 1.0,
) -> optax.GradientTransformation:
    """AdamW with decoupled decay of the kernels alone (`decayed`), after clipping the gradient's global norm.

    Defaults of b1, b2, eps are those of the GRAM and PMRL papers' code.

    Args:
        learning_rate: number, or function of the step such as `optax.warmup_cosine_decay_schedule(...)`.
        weight_decay: multiplied by the learning rate.
        b1: decay of the gradient's running mean, in [0, 1).
        b2: decay of its running square, in [0, 1).
        eps: added to the root of the running square.
        max_grad_norm: the gradient is scaled down to this global norm if above; None leaves it.

    Raises:
        ValueError: `max_grad_norm` is not positive, or `weight_decay` is negative.
    """
    if max_grad_norm is not None and not max_grad_norm > 0:
        raise ValueError(f"max_grad_norm must be positive or None, got {max_grad_norm}")
    if weight_decay < 0:
        raise ValueError(f"weight_decay must be at least 0, got {weight_decay}")
    clip = optax.identity() if max_grad_norm is None else optax.clip_by_global_norm(max_grad_norm)
    return optax.chain(clip, optax.adamw(learning_rate, b1=b1, b2=b2, eps=eps, weight_decay=weight_decay, mask=decayed))

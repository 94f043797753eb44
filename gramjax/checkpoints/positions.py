"""Position embeddings of pictures of another size than those in a file."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np
from einops import rearrange

from gramjax.encoders import VisionConfig
from gramjax.encoders.conversion import Tensor
from gramjax.models import GramConfig

_Kernel = Callable[[np.ndarray], np.ndarray]


def resize_positions(state_dict: Mapping[str, Tensor], config: Any) -> Mapping[str, Tensor]:
    """The same state dict with the vision tower's position embeddings as `config` needs them.

    The class token keeps its embedding; those of the patches, a square, are interpolated as the published codes do when
    they load a file: EVA-CLIP's bicubically, GRAM's bilinearly, neither with antialiasing.

    Args:
        state_dict: of a vision tower or a whole model, by the names of its table.
        config: of the model. Without a vision tower there is nothing to resize.

    Returns:
        Position embeddings that already fit, or are none of a class token and a square, are as they were.
    """
    match config:
        case VisionConfig():
            tower, key, kernel = config, "pos_embed", _cubic
        case GramConfig(towers={"vision": VisionConfig() as tower}):
            key, kernel = "vision_encoder.visual.pos_embed", _linear
        case _:
            return state_dict
    tensor = state_dict.get(key)
    if tensor is None or len(tensor.shape) != 3 or tensor.shape[1] in (1, tower.num_tokens):
        return state_dict
    # What is no table of a class token and a square is left to be refused by its name.
    if math.isqrt(tensor.shape[1] - 1) ** 2 != tensor.shape[1] - 1 or not jnp.issubdtype(tensor.dtype, jnp.floating):
        return state_dict
    return {**state_dict, key: _Resized(tensor, tower.image_size // tower.patch_size, kernel)}


@dataclass(frozen=True, eq=False)
class _Resized:
    """Position embeddings `[1, 1 + side * side, width]`, made when they are asked for."""

    tensor: Tensor
    side: int
    kernel: _Kernel
    dtype = np.dtype(np.float32)

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.tensor.shape[0], 1 + self.side**2, self.tensor.shape[2])

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        table = np.asarray(self.tensor).astype(np.float64)
        side = math.isqrt(table.shape[1] - 1)
        weights = _weights(side, self.side, self.kernel)
        grid = rearrange(table[:, 1:], "n (h w) d -> n h w d", h=side)
        grid = np.einsum("yh, xw, nhwd -> nyxd", weights, weights, grid, optimize=True)
        resized = np.concatenate([table[:, :1], rearrange(grid, "n y x d -> n (y x) d")], axis=1)
        return resized.astype(self.dtype if dtype is None else dtype)


def _weights(source: int, target: int, kernel: _Kernel) -> np.ndarray:
    """How much of each source point is in each target point `[target, source]`, sampled in the middle of both."""
    position = (np.arange(target) + 0.5) * source / target - 0.5
    taps = np.floor(position)[:, None] + np.arange(-1, 3)
    weights = np.zeros((target, source))
    # What lies beyond the border is the border's.
    columns = np.clip(taps, 0, source - 1).astype(int)
    np.add.at(weights, (np.arange(target)[:, None], columns), kernel(np.abs(position[:, None] - taps)))
    return weights


def _linear(distance: np.ndarray) -> np.ndarray:
    return np.maximum(1 - distance, 0)


def _cubic(distance: np.ndarray) -> np.ndarray:
    """Keys' cubic convolution with PyTorch's slope of -0.75."""
    near = (1.25 * distance - 2.25) * distance**2 + 1
    far = -0.75 * (((distance - 5) * distance + 8) * distance - 4)
    return np.where(distance <= 1, near, np.where(distance < 2, far, 0))

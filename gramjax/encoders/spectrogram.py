"""What stands before an audio encoder: which of its tokens are padding, and a convolutional stem for small models."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import jax.numpy as jnp
from einops import rearrange, reduce, repeat
from flax import nnx
from jaxtyping import Array, Bool, Float

from gramjax.encoders.layers import LayerNorm, gelu


def token_mask(mask: Bool[Array, "*batch time"], patch_size: int, tokens: int) -> Bool[Array, "*batch tokens"]:
    """Which of the tokens of masked frames have a frame of the recording.

    Args:
        mask: True for frames of the recording, False for padding.
        patch_size: frames of a token.
        tokens: how many an encoder makes of these frames: time-major, one or more for every `patch_size` frames.
    """
    in_time = reduce(mask, "... (t p) -> ... t", "any", p=patch_size)
    return repeat(in_time, "... t -> ... (t f)", f=tokens // in_time.shape[-1])


def zero_unless(mask: Bool[Array, "batch time"], x: Float[Array, "batch time dim"]) -> Float[Array, "batch time dim"]:
    """`x` with zeros where `mask` is False, and no gradient from there."""
    return jnp.where(rearrange(mask, "n t -> n t 1"), x, jnp.zeros((), x.dtype))


class SpectrogramStem(nnx.Module):
    """Convolutions over time of width 5 and stride 2, each with LayerNorm over channels and GELU, then a linear map.

    Args:
        mel_bins: of the spectrograms.
        channels: of every convolution.
        out_dim: size of a token.
        epsilon: of LayerNorm.
        rngs: stream `params` initialises the parameters.
        dtype: of the computation.
        param_dtype: of the parameters.
    """

    def __init__(
        self,
        mel_bins: int,
        channels: Sequence[int],
        out_dim: int,
        *,
        epsilon: float,
        rngs: nnx.Rngs,
        dtype: Any,
        param_dtype: Any,
    ):
        dtypes = {"dtype": dtype, "param_dtype": param_dtype}
        sizes = (mel_bins, *channels)
        self.convolutions = nnx.List(
            [
                nnx.Conv(i, o, (5,), strides=2, padding=2, use_bias=False, rngs=rngs, **dtypes)
                for i, o in pairwise(sizes)
            ]
        )
        self.norms = nnx.List([LayerNorm(o, epsilon, rngs=rngs, **dtypes) for o in sizes[1:]])
        self.projection = nnx.Linear(sizes[-1], out_dim, rngs=rngs, **dtypes)

    def __call__(
        self, fbank: Float[Array, "batch time mel"], mask: Bool[Array, "batch time"] | None = None
    ) -> Float[Array, "batch tokens features"]:
        """Embeds spectrograms; if masked, padding is 0 before every convolution."""
        for convolution, norm in zip(self.convolutions, self.norms):
            if mask is not None:
                fbank = zero_unless(mask, fbank)
                mask = token_mask(mask, 2, mask.shape[1] // 2)
            fbank = gelu(norm(convolution(fbank)))
        return self.projection(fbank)

"""Vision transformer with the block structure of EVA-CLIP (arXiv 2303.15389), pictures to tokens."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import jax.numpy as jnp
import numpy as np
from einops import rearrange, repeat
from flax import nnx
from jaxtyping import Array, Float, Key

from gramjax.encoders.conversion import CONV_2D, LINEAR, Rule, linear_rules, norm_rules, prefixed, rule
from gramjax.encoders.layers import (
    MLP,
    Attention,
    Initializer,
    LayerNorm,
    PatchEmbedding,
    apply_layer,
    drop_path,
    dropout,
    gelu,
    layer_keys,
    normal_02,
    require_multiple,
    require_positive,
    require_rate,
    require_stem,
    split_key,
)


@dataclass(frozen=True)
class VisionConfig:
    """Sizes of a `VisionTransformer`; the defaults are EVA01-CLIP g/14, the vision tower of GRAM and PMRL.

    Attributes:
        image_size: height and width of the pictures in pixels.
        patch_size: height and width of a patch in pixels; divides `image_size`.
        channels: colour channels.
        width: size of a token.
        depth: number of blocks.
        num_heads: attention heads a block; divides `width`.
        mlp_dim: hidden size of the perceptrons.
        drop_path_rate: probability, in [0, 1), that the last block's residual branches are skipped for an example;
            from the first block to the last it rises linearly from 0.
        dropout_rate: dropout, in [0, 1), after the position embedding and of every residual branch.
        layer_norm_epsilon: added to the variance in LayerNorm.
        stem_channels: if not empty, patches come from a stem of 3x3 convolutions with stride 2 and these many channels
            (each with LayerNorm and GELU), then a 1x1 convolution, instead of one patch-sized convolution. It learns
            faster from few pictures (arXiv 2106.14881). `patch_size` must be 2 to the number of convolutions.

    Raises:
        ValueError: if a value is out of range or sizes do not fit each other.
    """

    image_size: int = 224
    patch_size: int = 14
    channels: int = 3
    width: int = 1408
    depth: int = 40
    num_heads: int = 16
    mlp_dim: int = 6144
    drop_path_rate: float = 0.4
    dropout_rate: float = 0.0
    layer_norm_epsilon: float = 1e-6
    stem_channels: tuple[int, ...] = ()

    def __post_init__(self):
        require_positive(self, "image_size", "patch_size", "channels", "width", "depth", "num_heads", "mlp_dim")
        require_multiple(self, "image_size", "patch_size")
        require_multiple(self, "width", "num_heads")
        require_rate(self, "drop_path_rate", "dropout_rate")
        require_stem(self)

    @property
    def num_tokens(self) -> int:
        """Tokens of a picture: the patches and the class token."""
        return 1 + (self.image_size // self.patch_size) ** 2


class VisionTransformer(nnx.Module):
    """Pictures to tokens: patches, class token, position embedding, pre-norm blocks, LayerNorm over all tokens.

    Args:
        config: the sizes.
        rngs: stream `params` initialises the parameters.
        dtype: of the computation and the result.
        param_dtype: of the parameters.
        remat: recompute each block's activations in the backward pass instead of storing them.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> config = VisionConfig(image_size=32, patch_size=4, width=64, depth=2, num_heads=4, mlp_dim=128)
        >>> encoder = VisionTransformer(config, rngs=nnx.Rngs(0))
        >>> encoder(jnp.zeros((2, 32, 32, 3))).shape
        (2, 65, 64)
    """

    def __init__(
        self,
        config: VisionConfig,
        *,
        rngs: nnx.Rngs,
        dtype: Any = jnp.float32,
        param_dtype: Any = jnp.float32,
        remat: bool = False,
    ):
        c = config
        dtypes = {"dtype": dtype, "param_dtype": param_dtype}
        if c.stem_channels:
            self.patch_embedding = ConvolutionalStem(c, rngs=rngs, **dtypes)
        else:
            self.patch_embedding = PatchEmbedding(c.patch_size, c.channels, c.width, rngs=rngs, **dtypes)
        self.class_token = nnx.Param(normal_02(rngs.params(), (c.width,), param_dtype))
        self.position_embedding = nnx.Param(normal_02(rngs.params(), (c.num_tokens, c.width), param_dtype))
        rates = np.linspace(0, c.drop_path_rate, c.depth).tolist()
        self.blocks = nnx.List(
            [Block(c, index=i, drop_path_rate=rate, rngs=rngs, **dtypes) for i, rate in enumerate(rates)]
        )
        self.norm = LayerNorm(c.width, c.layer_norm_epsilon, rngs=rngs, **dtypes)
        self.config = config
        self.dtype = dtype
        self.remat = remat

    def __call__(
        self, pixels: Float[Array, "batch height width channels"], *, rngs: nnx.Rngs | None = None
    ) -> Float[Array, "batch tokens features"]:
        """Encodes pictures.

        Args:
            pixels: pictures, channels last, normalised (roughly zero mean and unit variance a channel).
            rngs: stream `dropout` drives dropout and stochastic depth; `None` switches them off.

        Returns:
            All tokens after the final LayerNorm: the class token, then the patches row by row.

        Raises:
            ValueError: if the shape is not `[batch, image_size, image_size, channels]`.
            TypeError: if `pixels` is not floating point.
        """
        self._check(pixels)
        embed_key, *keys = layer_keys(rngs, 1 + len(self.blocks))
        x = dropout(self.embed(pixels), self.config.dropout_rate, embed_key)
        for block, key in zip(self.blocks, keys):
            x = apply_layer(block, x, key, remat=self.remat)
        return self.norm(x)

    def embed(self, pixels: Float[Array, "batch height width channels"]) -> Float[Array, "batch tokens features"]:
        """The tokens that enter the first block."""
        patches = self.patch_embedding(pixels)
        first = repeat(self.class_token[...].astype(self.dtype), "d -> n 1 d", n=pixels.shape[0])
        position = rearrange(self.position_embedding[...].astype(self.dtype), "l d -> 1 l d")
        return jnp.concatenate([first, patches], axis=1) + position

    @staticmethod
    def torch_rules(config: VisionConfig) -> tuple[Rule, ...]:
        """Names in the vision part of EVA-CLIP files (without the prefix `visual.`).

        Raises:
            ValueError: if the configuration has a convolutional stem, which no released file has.
        """
        if config.stem_channels:
            raise ValueError(f"released vision towers have no convolutional stem, got {config.stem_channels=}")
        return (
            rule("cls_token", "class_token", layout="1 1 d -> d"),
            rule("pos_embed", "position_embedding", layout="1 l d -> l d"),
            rule("patch_embed.proj.weight", "patch_embedding.kernel", layout=CONV_2D),
            rule("patch_embed.proj.bias", "patch_embedding.bias"),
            *(
                r
                for i in range(config.depth)
                for r in prefixed(Block.torch_rules(), key=f"blocks.{i}.", path=f"blocks.{i}.")
            ),
            *norm_rules("norm", "norm"),
            rule("head.weight"),  # CLIP's projection; GRAM and PMRL train their own
            rule("head.bias"),
        )

    def _check(self, pixels: Array) -> None:
        size, channels = self.config.image_size, self.config.channels
        if pixels.ndim != 4 or pixels.shape[1:] != (size, size, channels):
            raise ValueError(
                f"pixels must have shape [batch, {size}, {size}, {channels}] (channels last), got {pixels.shape}"
            )
        if not jnp.issubdtype(pixels.dtype, jnp.floating):
            raise TypeError(f"pixels must be floating point and normalised, got dtype {pixels.dtype}")


class Block(nnx.Module):
    """Pre-norm transformer block; the keys' projection has no bias."""

    def __init__(
        self,
        config: VisionConfig,
        *,
        index: int,
        drop_path_rate: float,
        rngs: nnx.Rngs,
        dtype: Any,
        param_dtype: Any,
    ):
        c = config
        dtypes = {"dtype": dtype, "param_dtype": param_dtype}
        # Branches of deeper blocks start smaller, so that the sum keeps its scale (BEiT, arXiv 2106.08254).
        branch_init: Initializer = nnx.initializers.truncated_normal(0.02 / (2 * (index + 1)) ** 0.5)
        self.norm1 = LayerNorm(c.width, c.layer_norm_epsilon, rngs=rngs, **dtypes)
        self.attention = Attention(c.width, c.num_heads, key_bias=False, out_init=branch_init, rngs=rngs, **dtypes)
        self.norm2 = LayerNorm(c.width, c.layer_norm_epsilon, rngs=rngs, **dtypes)
        self.mlp = MLP(c.width, c.mlp_dim, out_init=branch_init, rngs=rngs, **dtypes)
        self.dropout_rate = c.dropout_rate
        self.drop_path_rate = drop_path_rate

    def __call__(
        self, x: Float[Array, "batch tokens width"], dropout_key: Key[Array, ""] | None = None
    ) -> Float[Array, "batch tokens width"]:
        """One block."""
        keys = split_key(dropout_key, 4)
        x = x + self._drop(self.attention(self.norm1(x)), keys[:2])
        return x + self._drop(self.mlp(self.norm2(x)), keys[2:])

    def _drop(self, branch: Array, keys: Sequence[Array | None]) -> Array:
        return drop_path(dropout(branch, self.dropout_rate, keys[0]), self.drop_path_rate, keys[1])

    @staticmethod
    def torch_rules() -> tuple[Rule, ...]:
        """Names within a block of EVA-CLIP."""
        parts = ("query", "key", "value")
        return (
            *norm_rules("norm1", "norm1"),
            rule("attn.qkv.weight", *(f"attention.{part}.kernel" for part in parts), layout=LINEAR),
            rule("attn.q_bias", "attention.query.bias"),
            rule("attn.v_bias", "attention.value.bias"),
            *linear_rules("attn.proj", "attention.out"),
            *norm_rules("norm2", "norm2"),
            *linear_rules("mlp.fc1", "mlp.fc1"),
            *linear_rules("mlp.fc2", "mlp.fc2"),
        )


class ConvolutionalStem(nnx.Module):
    """3x3 convolutions with stride 2, each with LayerNorm over channels and GELU, then a projection to the width."""

    def __init__(self, config: VisionConfig, *, rngs: nnx.Rngs, dtype: Any, param_dtype: Any):
        dtypes = {"dtype": dtype, "param_dtype": param_dtype}
        sizes = (config.channels, *config.stem_channels)
        self.convolutions = nnx.List(
            [
                # No bias: the LayerNorm that follows has one.
                nnx.Conv(i, o, (3, 3), strides=2, padding=1, use_bias=False, rngs=rngs, **dtypes)
                for i, o in pairwise(sizes)
            ]
        )
        self.norms = nnx.List([LayerNorm(o, config.layer_norm_epsilon, rngs=rngs, **dtypes) for o in sizes[1:]])
        self.projection = nnx.Linear(sizes[-1], config.width, rngs=rngs, **dtypes)

    def __call__(self, images: Float[Array, "batch height width channels"]) -> Float[Array, "batch patches features"]:
        """Embeds `images`."""
        x = images
        for convolution, norm in zip(self.convolutions, self.norms):
            x = gelu(norm(convolution(x)))
        return self.projection(rearrange(x, "n h w c -> n (h w) c"))

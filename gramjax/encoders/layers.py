"""Pieces shared by the transformers: attention, perceptron, normalisation, dropout, patches.

Randomness is explicit. A layer takes a `dropout_key`; `None` switches every random part off. Encoders turn the
`rngs` they are called with into one key a layer (`layer_keys`), so no module stores random state, and parameters are
all there is to save.

Computation runs in `dtype` (parameters are cast on use), softmax and normalisation statistics in at least float32.
Matrix products use JAX's default precision. On TPUs, and on GPUs with TF32, that rounds float32 products to fewer bits;
`jax.default_matmul_precision("highest")` around the call gives full float32.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jaxtyping import Array, Bool, Float, Key

Initializer = Callable[..., Array]

# U(-1/sqrt(fan_in), 1/sqrt(fan_in)), what PyTorch's Linear and Conv start from.
fan_in_uniform: Initializer = nnx.initializers.variance_scaling(1 / 3, "fan_in", "uniform")
normal_02: Initializer = nnx.initializers.truncated_normal(0.02)

# Added to the logits of padding, as BERT does: float16 holds it, and a row of padding alone stays finite.
MASKED_LOGIT = -10000.0


def layer_keys(rngs: nnx.Rngs | None, count: int) -> Sequence[Array | None]:
    """Splits one key of the `dropout` stream into `count` keys; all `None` without `rngs`."""
    return split_key(None if rngs is None else rngs.dropout(), count)


def split_key(key: Array | None, count: int) -> Sequence[Array | None]:
    """`jax.random.split` that hands on `None`."""
    return (None,) * count if key is None else tuple(jax.random.split(key, count))


def dropout(x: Float[Array, "..."], rate: float, key: Key[Array, ""] | None) -> Float[Array, "..."]:
    """Zeroes elements with probability `rate`, scales the rest by `1 / (1 - rate)`; identity if `key` is None."""
    return _drop(x, rate, key, x.shape)


def drop_path(x: Float[Array, "batch ..."], rate: float, key: Key[Array, ""] | None) -> Float[Array, "batch ..."]:
    """Stochastic depth: like `dropout`, but for whole examples (a residual branch is skipped or kept)."""
    return _drop(x, rate, key, (x.shape[0],) + (1,) * (x.ndim - 1))


def _drop(x: Array, rate: float, key: Array | None, mask_shape: tuple[int, ...]) -> Array:
    if key is None or rate == 0:
        return x
    keep = jax.random.bernoulli(key, 1 - rate, mask_shape)
    return jnp.where(keep, x / (1 - rate), jnp.zeros((), x.dtype))


def gelu(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """Exact (erf) GELU, as in PyTorch; `jax.nn.gelu` defaults to the tanh approximation."""
    return jax.nn.gelu(x, approximate=False)


def at_least_float32(dtype: Any) -> Any:
    """`dtype`, or float32 for the half precisions."""
    return dtype if jnp.finfo(dtype).bits >= 32 else jnp.float32


class LayerNorm(nnx.Module):
    """Normalisation over the last axis, in at least float32.

    Unlike `nnx.LayerNorm`, scale and bias are not rounded to the dtype of the computation first.

    Args:
        width: size of the last axis.
        epsilon: added to the variance.
        rngs: not used: scale starts at 1, bias at 0.
        dtype: of the result.
        param_dtype: of the parameters.
    """

    def __init__(
        self,
        width: int,
        epsilon: float,
        *,
        rngs: nnx.Rngs,
        dtype: Any = jnp.float32,
        param_dtype: Any = jnp.float32,
    ):
        self.scale = nnx.Param(jnp.ones(width, param_dtype))
        self.bias = nnx.Param(jnp.zeros(width, param_dtype))
        self.epsilon = epsilon
        self.dtype = dtype

    def __call__(self, x: Float[Array, "*batch width"]) -> Float[Array, "*batch width"]:
        """Zero mean and unit variance (the biased one), then scale and bias."""
        dtype = at_least_float32(x.dtype)
        x = x.astype(dtype)
        x = x - x.mean(axis=-1, keepdims=True)
        # A second pass: E[x^2] - E[x]^2 would lose the variance of activations with a large mean.
        x = x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + self.epsilon)
        leading = (1,) * (x.ndim - 1)
        scale, bias = (p[...].astype(dtype).reshape(*leading, -1) for p in (self.scale, self.bias))
        return (x * scale + bias).astype(self.dtype)


def mask_bias(
    mask: Bool[Array, "batch keys"] | Bool[Array, "batch queries keys"],
) -> Float[Array, "batch 1 #queries keys"]:
    """The attention bias that lets every query, or each its own, attend where `mask` is True."""
    bias = jnp.where(mask, 0.0, MASKED_LOGIT)
    return rearrange(bias, "n k -> n 1 1 k" if mask.ndim == 2 else "n q k -> n 1 q k")


def dot_product_attention(
    query: Float[Array, "batch queries heads head_dim"],
    key: Float[Array, "batch keys heads head_dim"],
    value: Float[Array, "batch keys heads head_dim"],
    *,
    bias: Float[Array, "#batch #heads #queries keys"] | None = None,
    dropout_rate: float = 0.0,
    dropout_key: Key[Array, ""] | None = None,
) -> Float[Array, "batch queries heads head_dim"]:
    """softmax(query key^T / sqrt(head_dim) + bias) value, the softmax in at least float32."""
    accumulate = at_least_float32(query.dtype)
    query = query * query.shape[-1] ** -0.5
    logits = jnp.einsum("nqhd,nkhd->nhqk", query, key, preferred_element_type=accumulate)
    if bias is not None:
        logits = logits + bias.astype(accumulate)
    weights = jax.nn.softmax(logits, axis=-1).astype(value.dtype)
    weights = dropout(weights, dropout_rate, dropout_key)
    return jnp.einsum("nhqk,nkhd->nqhd", weights, value)


class Attention(nnx.Module):
    """Multi-head attention, to itself or to a context, with an additive bias on the logits.

    Args:
        width: size of input, output and of all heads together.
        num_heads: number of heads; must divide `width`.
        key_bias: whether the key projection has a bias.
        query_key_init, value_init, out_init: initialisers of the kernels.
        dropout_rate: dropout of the attention weights.
        rngs: stream `params` initialises the parameters.
        dtype: of the computation.
        param_dtype: of the parameters.
    """

    def __init__(
        self,
        width: int,
        num_heads: int,
        *,
        rngs: nnx.Rngs,
        key_bias: bool = True,
        query_key_init: Initializer = normal_02,
        value_init: Initializer = normal_02,
        out_init: Initializer = normal_02,
        dropout_rate: float = 0.0,
        dtype: Any = jnp.float32,
        param_dtype: Any = jnp.float32,
    ):
        def linear(kernel_init: Initializer, use_bias: bool = True) -> nnx.Linear:
            return nnx.Linear(
                width,
                width,
                use_bias=use_bias,
                kernel_init=kernel_init,
                dtype=dtype,
                param_dtype=param_dtype,
                rngs=rngs,
            )

        self.query = linear(query_key_init)
        self.key = linear(query_key_init, key_bias)
        self.value = linear(value_init)
        self.out = linear(out_init)
        self.num_heads = num_heads
        self.dropout_rate = dropout_rate

    def queries(self, x: Float[Array, "batch queries width"]) -> Float[Array, "batch queries heads head_dim"]:
        """Queries of all heads, not scaled."""
        return self._split_heads(self.query(x))

    def keys_values(
        self, context: Float[Array, "batch keys width"]
    ) -> tuple[Float[Array, "batch keys heads head_dim"], Float[Array, "batch keys heads head_dim"]]:
        """Keys and values of all heads."""
        return self._split_heads(self.key(context)), self._split_heads(self.value(context))

    def attend(
        self,
        query: Float[Array, "batch queries heads head_dim"],
        key: Float[Array, "batch keys heads head_dim"],
        value: Float[Array, "batch keys heads head_dim"],
        *,
        bias: Float[Array, "#batch #heads #queries keys"] | None = None,
        dropout_key: Key[Array, ""] | None = None,
    ) -> Float[Array, "batch queries width"]:
        """Attention among projected heads, followed by the output projection."""
        mixed = dot_product_attention(
            query, key, value, bias=bias, dropout_rate=self.dropout_rate, dropout_key=dropout_key
        )
        return self.out(rearrange(mixed, "n q h d -> n q (h d)"))

    def __call__(
        self,
        x: Float[Array, "batch queries width"],
        context: Float[Array, "batch keys width"] | None = None,
        *,
        bias: Float[Array, "#batch #heads #queries keys"] | None = None,
        dropout_key: Key[Array, ""] | None = None,
    ) -> Float[Array, "batch queries width"]:
        """Lets `x` attend to `context` (to itself if None)."""
        key, value = self.keys_values(x if context is None else context)
        return self.attend(self.queries(x), key, value, bias=bias, dropout_key=dropout_key)

    def _split_heads(self, x: Array) -> Array:
        return rearrange(x, "n l (h d) -> n l h d", h=self.num_heads)


class MLP(nnx.Module):
    """Linear, GELU, dropout, linear."""

    def __init__(
        self,
        width: int,
        hidden: int,
        *,
        rngs: nnx.Rngs,
        in_init: Initializer = normal_02,
        out_init: Initializer = normal_02,
        dropout_rate: float = 0.0,
        dtype: Any = jnp.float32,
        param_dtype: Any = jnp.float32,
    ):
        self.fc1 = nnx.Linear(width, hidden, kernel_init=in_init, dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        self.fc2 = nnx.Linear(hidden, width, kernel_init=out_init, dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        self.dropout_rate = dropout_rate

    def __call__(
        self, x: Float[Array, "... width"], *, dropout_key: Key[Array, ""] | None = None
    ) -> Float[Array, "... width"]:
        """Applies the perceptron to every token."""
        return self.fc2(dropout(gelu(self.fc1(x)), self.dropout_rate, dropout_key))


class PatchEmbedding(nnx.Module):
    """Cuts images into square patches, row by row, and projects each one.

    The same as a convolution whose stride is its kernel size, as one matrix product: XLA's convolution gradients are
    slow on CPUs. `kernel` has a convolution's layout, `[patch, patch, channels, width]`.
    """

    def __init__(
        self,
        patch_size: int,
        channels: int,
        width: int,
        *,
        rngs: nnx.Rngs,
        use_bias: bool = True,
        dtype: Any = jnp.float32,
        param_dtype: Any = jnp.float32,
    ):
        shape = (patch_size, patch_size, channels, width)
        self.kernel = nnx.Param(fan_in_uniform(rngs.params(), shape, param_dtype))
        self.bias = nnx.Param(jnp.zeros(width, param_dtype)) if use_bias else nnx.data(None)
        self.patch_size = patch_size
        self.dtype = dtype

    def __call__(self, images: Float[Array, "batch height width channels"]) -> Float[Array, "batch patches features"]:
        """Embeds `images`, whose height and width must be multiples of the patch size."""
        p = self.patch_size
        patches = rearrange(images.astype(self.dtype), "n (h p) (w q) c -> n (h w) (p q c)", p=p, q=p)
        x = patches @ rearrange(self.kernel[...].astype(self.dtype), "p q c d -> (p q c) d")
        return x if self.bias is None else x + rearrange(self.bias[...].astype(self.dtype), "d -> 1 1 d")


def apply_layer(layer: Callable[..., Array], *arguments: Any, remat: bool) -> Array:
    """Calls `layer`; with `remat` its activations are recomputed in the backward pass instead of stored."""
    if not remat:
        return layer(*arguments)
    # By hand: `nnx.remat` writes parameters back, which fails for a model that a traced function has captured.
    graph, params = nnx.split(layer)
    return jax.checkpoint(lambda params, *arguments: nnx.merge(graph, params)(*arguments))(params, *arguments)


def require_positive(config: Any, *names: str) -> None:
    """Raises ValueError unless the named fields of a configuration are integers >= 1."""
    for name in names:
        value = getattr(config, name)
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{type(config).__name__}.{name} must be an integer >= 1, got {value!r}")


def require_rate(config: Any, *names: str) -> None:
    """Raises ValueError unless the named fields of a configuration lie in [0, 1)."""
    for name in names:
        value = getattr(config, name)
        if not 0 <= value < 1:
            raise ValueError(f"{type(config).__name__}.{name} must lie in [0, 1), got {value!r}")


def require_stem(config: Any) -> None:
    """Raises ValueError unless the strides of the convolutional stem of a configuration make up its `patch_size`."""
    name, channels = type(config).__name__, config.stem_channels
    if not all(isinstance(count, int) and count >= 1 for count in channels):
        raise ValueError(f"{name}.stem_channels must be integers >= 1, got {channels}")
    if channels and config.patch_size != 2 ** len(channels):
        raise ValueError(
            f"{name}.stem_channels={channels} reduces the input {2 ** len(channels)} times, so patch_size must be "
            f"that, got {config.patch_size}"
        )


def require_multiple(config: Any, name: str, divisor_name: str) -> None:
    """Raises ValueError unless field `name` of a configuration is a multiple of field `divisor_name`."""
    value, divisor = getattr(config, name), getattr(config, divisor_name)
    if value % divisor:
        raise ValueError(f"{type(config).__name__}.{name} must be a multiple of {divisor_name}={divisor}, got {value}")

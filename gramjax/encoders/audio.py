"""BEATs (arXiv 2212.09058): log-mel spectrograms to tokens."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange, reduce
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Key

from gramjax.encoders.conversion import CONV_1D, CONV_2D, Rule, linear_rules, norm_rules, prefixed, rule
from gramjax.encoders.layers import (
    MLP,
    Attention,
    Initializer,
    LayerNorm,
    PatchEmbedding,
    apply_layer,
    at_least_float32,
    dropout,
    fan_in_uniform,
    gelu,
    layer_keys,
    mask_bias,
    normal_02,
    require_multiple,
    require_positive,
    require_rate,
    require_stem,
    split_key,
)
from gramjax.encoders.spectrogram import SpectrogramStem, token_mask, zero_unless

# What the dictionary `cfg` of released files says of every encoder known here, and its names for our fields.
_RELEASED = {
    "layer_norm_first": False,
    "conv_bias": False,
    "activation_fn": "gelu",
    "relative_position_embedding": True,
    "gru_rel_pos": True,
}
_SIZES = {
    "input_patch_size": "patch_size",
    "embed_dim": "patch_dim",
    "encoder_embed_dim": "width",
    "encoder_layers": "depth",
    "encoder_attention_heads": "num_heads",
    "encoder_ffn_embed_dim": "mlp_dim",
    "conv_pos": "position_kernel",
    "conv_pos_groups": "position_groups",
    "num_buckets": "num_buckets",
    "max_distance": "max_distance",
    "deep_norm": "deep_norm",
}
_RATES = {
    "dropout": "dropout_rate",
    "attention_dropout": "attention_dropout_rate",
    "activation_dropout": "activation_dropout_rate",
    "dropout_input": "input_dropout_rate",
    "encoder_layerdrop": "layer_drop_rate",
}


@dataclass(frozen=True)
class BEATsConfig:
    """Sizes of a `BEATs` encoder; the defaults are BEATs iter3+ (AudioSet-2M), the audio tower of GRAM and PMRL.

    Attributes:
        patch_size: frames, and mel bins, of a patch (with a stem: frames alone).
        patch_dim: size of a patch's embedding before it is projected to `width`.
        width: size of a token.
        depth: number of layers.
        num_heads: attention heads a layer; divides `width`.
        mlp_dim: hidden size of the perceptrons.
        position_kernel: tokens that the positional convolution spans.
        position_groups: groups of the positional convolution; divides `width`.
        num_buckets: relative positions told apart, both signs together; even, at least 4.
        max_distance: distance in tokens from which on all share a bucket; more than `num_buckets / 4`.
        deep_norm: scale residuals by (2 depth)^(1/4) and initialise to match (DeepNet, arXiv 2203.00555).
        dropout_rate: dropout, in [0, 1), of every residual branch and after the positional convolution.
        attention_dropout_rate: of the attention weights.
        activation_dropout_rate: inside the perceptrons.
        input_dropout_rate: of the projected patches.
        layer_drop_rate: probability that a layer is skipped for a whole batch.
        layer_norm_epsilon: added to the variance in LayerNorm.
        stem_channels: if given, patches are embedded by convolutions over time, of width 5 and stride 2, with all mel
            bins as channels, instead of one linear map a patch: better for small models trained from scratch on
            speech. `patch_size` must then be 2 ** len(stem_channels).
        mel_bins: mel bins of the input; only the stem asks for it.

    Raises:
        ValueError: if a value is out of range or sizes do not fit each other.
    """

    patch_size: int = 16
    patch_dim: int = 512
    width: int = 768
    depth: int = 12
    num_heads: int = 12
    mlp_dim: int = 3072
    position_kernel: int = 128
    position_groups: int = 16
    num_buckets: int = 320
    max_distance: int = 800
    deep_norm: bool = True
    dropout_rate: float = 0.1
    attention_dropout_rate: float = 0.1
    activation_dropout_rate: float = 0.0
    input_dropout_rate: float = 0.1
    layer_drop_rate: float = 0.05
    layer_norm_epsilon: float = 1e-5
    stem_channels: tuple[int, ...] = ()
    mel_bins: int = 128

    def __post_init__(self):
        require_positive(self, "patch_size", "patch_dim", "width", "depth", "num_heads", "mlp_dim")
        require_positive(self, "position_kernel", "position_groups", "num_buckets", "max_distance", "mel_bins")
        require_stem(self)
        require_multiple(self, "width", "num_heads")
        require_multiple(self, "width", "position_groups")
        require_rate(self, "dropout_rate", "attention_dropout_rate", "activation_dropout_rate")
        require_rate(self, "input_dropout_rate", "layer_drop_rate")
        if self.num_buckets % 2 or self.num_buckets < 4:
            raise ValueError(f"BEATsConfig.num_buckets must be even and at least 4, got {self.num_buckets}")
        if self.max_distance <= self.num_buckets // 4:
            raise ValueError(
                f"BEATsConfig.max_distance must exceed num_buckets / 4 = {self.num_buckets // 4}, "
                f"got {self.max_distance}"
            )

    @classmethod
    def from_torch(cls, cfg: Mapping[str, Any]) -> "BEATsConfig":
        """Reads the dictionary `cfg` of a released BEATs file.

        Raises:
            ValueError: if an entry that fixes the architecture is absent, or asks for something else than the
                post-norm model with gated relative positions that was released.
        """
        problems = [f"missing: {name}" for name in (*_RELEASED, *_SIZES) if name not in cfg]
        problems += [
            f"unsupported: {name}={cfg[name]!r}, needed {value!r}"
            for name, value in _RELEASED.items()
            if name in cfg and cfg[name] != value
        ]
        if problems:
            raise ValueError("cfg does not describe a BEATs encoder known here:\n  " + "\n  ".join(problems))
        present = {theirs: ours for theirs, ours in (_SIZES | _RATES).items() if theirs in cfg}
        return cls(**{ours: cfg[theirs] for theirs, ours in present.items()})

    def to_torch(self) -> dict[str, Any]:
        """The dictionary `cfg` of a file with this encoder; `from_torch` reads it back."""
        return _RELEASED | {theirs: getattr(self, ours) for theirs, ours in (_SIZES | _RATES).items()}


class BEATs(nnx.Module):
    """Log-mel spectrograms to tokens: patches, positional convolution, post-norm layers with gated relative positions.

    Args:
        config: the sizes.
        rngs: stream `params` initialises the parameters.
        dtype: of the computation and the result.
        param_dtype: of the parameters.
        remat: recompute each layer's activations in the backward pass instead of storing them.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> config = BEATsConfig(patch_dim=32, width=64, depth=2, num_heads=4, mlp_dim=128, position_kernel=16)
        >>> encoder = BEATs(config, rngs=nnx.Rngs(0))
        >>> encoder(jnp.zeros((2, 208, 64))).shape  # 13 patches in time, 4 in frequency
        (2, 52, 64)
    """

    def __init__(
        self,
        config: BEATsConfig,
        *,
        rngs: nnx.Rngs,
        dtype: Any = jnp.float32,
        param_dtype: Any = jnp.float32,
        remat: bool = False,
    ):
        c = config
        dtypes = {"dtype": dtype, "param_dtype": param_dtype}
        if c.stem_channels:
            self.patch_embedding = SpectrogramStem(
                c.mel_bins, c.stem_channels, c.patch_dim, epsilon=c.layer_norm_epsilon, rngs=rngs, **dtypes
            )
        else:
            self.patch_embedding = PatchEmbedding(c.patch_size, 1, c.patch_dim, use_bias=False, rngs=rngs, **dtypes)
        self.patch_norm = LayerNorm(c.patch_dim, c.layer_norm_epsilon, rngs=rngs, **dtypes)
        self.projection = nnx.Linear(c.patch_dim, c.width, kernel_init=fan_in_uniform, rngs=rngs, **dtypes)
        self.position_convolution = PositionConvolution(c, rngs=rngs, **dtypes)
        self.norm = LayerNorm(c.width, c.layer_norm_epsilon, rngs=rngs, **dtypes)
        # One table for all layers.
        self.relative_position_table = nnx.Param(normal_02(rngs.params(), (c.num_buckets, c.num_heads), param_dtype))
        self.layers = nnx.List([BEATsLayer(c, rngs=rngs, **dtypes) for _ in range(c.depth)])
        self.config = config
        self.dtype = dtype
        self.remat = remat

    def __call__(
        self,
        fbank: Float[Array, "batch time mel"],
        mask: Bool[Array, "batch time"] | None = None,
        *,
        rngs: nnx.Rngs | None = None,
    ) -> Float[Array, "batch tokens width"]:
        """Encodes spectrograms.

        Args:
            fbank: normalised log-mel spectrograms; time (in frames) and mel are multiples of `patch_size`. Pad or crop
                others first: PyTorch's convolution would drop the remainder without a word.
            mask: True for frames of the recording, False for padding, of which the result is then independent, whatever
                it holds and however much of it there is; what comes out for tokens of padding alone (`token_mask`)
                means nothing. None: all frames, as GRAM and PMRL use this encoder, silence at the end included.
            rngs: stream `dropout` drives dropout and layer drop; `None` switches them off.

        Returns:
            One token a patch, time-major: all patches of the first `patch_size` frames, then the next. With a stem one
            token for every `patch_size` frames.

        Raises:
            ValueError: if the rank is not 3, time or mel is no multiple of the patch size, or `mask` is not of the
                spectrograms' batch and time.
            TypeError: if `fbank` is not floating point or `mask` is not bool.
        """
        self._check(fbank, mask)
        c = self.config
        input_key, position_key, *keys = layer_keys(rngs, 2 + c.depth)
        x = dropout(self.embed(fbank, mask), c.input_dropout_rate, input_key)
        there = None
        if mask is not None:
            present = token_mask(mask, c.patch_size, x.shape[1])
            x, there = zero_unless(present, x), mask_bias(present)
        x = self.norm(x + self.position_convolution(x))
        x = dropout(x, c.dropout_rate, position_key)
        bias = self.position_bias(x.shape[1])
        for layer, key in zip(self.layers, keys):
            drop_key, layer_key = split_key(key, 2)
            y = apply_layer(layer, x, bias, there, layer_key, remat=self.remat)
            if drop_key is not None and c.layer_drop_rate > 0:
                y = jnp.where(jax.random.bernoulli(drop_key, c.layer_drop_rate), x, y)
            x = y
        return x

    def embed(
        self, fbank: Float[Array, "batch time mel"], mask: Bool[Array, "batch time"] | None = None
    ) -> Float[Array, "batch tokens width"]:
        """Projected patches."""
        if mask is not None:
            fbank = zero_unless(mask, fbank)
        if isinstance(self.patch_embedding, SpectrogramStem):
            patches = self.patch_embedding(fbank, mask)
        else:
            patches = self.patch_embedding(rearrange(fbank, "n t m -> n t m 1"))
        return self.projection(self.patch_norm(patches))

    def position_bias(self, length: int) -> Float[Array, "heads length length"]:
        """Attention bias of each head for every pair (query, key) of positions, before the layers' gates."""
        # A Toeplitz matrix: row i is row 0 moved right by i. The entries of all 2 length distances are looked up once,
        # written one after the other with a period one longer than the rows, and cut into rows: cheap, and so is its
        # gradient, where a look-up of length^2 entries would be scattered back.
        distances = np.concatenate([np.arange(length), np.arange(-length, 0)])
        buckets = relative_position_buckets(distances, self.config.num_buckets, self.config.max_distance)
        entries = rearrange(self.relative_position_table[...][buckets], "d h -> h d")
        rows = jnp.tile(entries, (1, length))[:, : length * (2 * length - 1)]
        return rearrange(rows, "h (q d) -> h q d", q=length)[:, :, :length]

    @staticmethod
    def torch_rules(config: BEATsConfig) -> tuple[Rule, ...]:
        """Names in BEATs files (dictionary `model`).

        Raises:
            ValueError: if the configuration has a convolutional stem, which no released file has.
        """
        if config.stem_channels:
            raise ValueError(f"released audio towers have no convolutional stem, got {config.stem_channels=}")
        layers = [f"encoder.layers.{i}." for i in range(config.depth)]
        return (
            rule("patch_embedding.weight", "patch_embedding.kernel", layout=CONV_2D),
            *norm_rules("layer_norm", "patch_norm"),
            *linear_rules("post_extract_proj", "projection"),
            *PositionConvolution.torch_rules(),
            *norm_rules("encoder.layer_norm", "norm"),
            # The files hold a copy of the table for every layer.
            Rule(
                tuple(f"{layer}self_attn.relative_attention_bias.weight" for layer in layers),
                ("relative_position_table",),
            ),
            *(
                r
                for i, layer in enumerate(layers)
                for r in prefixed(BEATsLayer.torch_rules(), key=layer, path=f"layers.{i}.")
            ),
        )

    def _check(self, fbank: Array, mask: Array | None) -> None:
        p, bins = self.config.patch_size, self.config.mel_bins
        if self.config.stem_channels:
            if fbank.ndim != 3 or not fbank.shape[1] or fbank.shape[1] % p or fbank.shape[2] != bins:
                raise ValueError(
                    f"fbank must have shape [batch, time, {bins}] with time a multiple of {p}, got {fbank.shape}"
                )
        elif fbank.ndim != 3 or 0 in fbank.shape[1:] or fbank.shape[1] % p or fbank.shape[2] % p:
            raise ValueError(
                f"fbank must have shape [batch, time, mel] with time and mel multiples of {p}, got {fbank.shape}"
            )
        if not jnp.issubdtype(fbank.dtype, jnp.floating):
            raise TypeError(f"fbank must be floating point, got dtype {fbank.dtype}")
        if mask is not None and mask.shape != fbank.shape[:2]:
            raise ValueError(f"mask must have the batch and time of fbank, {fbank.shape[:2]}, got {mask.shape}")
        if mask is not None and mask.dtype != jnp.bool_:
            raise TypeError(f"mask must be bool (True for frames of the recording), got dtype {mask.dtype}")


def relative_position_buckets(
    distances: Int[np.ndarray, "..."], num_buckets: int, max_distance: int
) -> Int[np.ndarray, "..."]:
    """Bucket of each relative position (key minus query), as in T5 (arXiv 1910.10683), bidirectional.

    Positive distances take the upper half of the buckets. Of a half, the first half are exact distances, the rest grow
    logarithmically up to `max_distance` and beyond it all share the last.
    """
    half = num_buckets // 2
    exact = half // 2
    size = np.abs(distances)
    growth = np.log(np.maximum(size, exact) / exact) / np.log(max_distance / exact)
    far = np.minimum(exact + (growth * (half - exact)).astype(int), half - 1)
    return np.where(distances > 0, half, 0) + np.where(size < exact, size, far)


class PositionConvolution(nnx.Module):
    """Grouped convolution over tokens, then GELU: adds a position to each token (wav2vec 2.0, arXiv 2006.11477).

    The kernel is weight-normalised, one length for each tap: kernel[t] = scale[t] direction[t] / |direction[t]|. Both
    are parameters, as in the released model, so that finetuning follows the same path.
    """

    def __init__(self, config: BEATsConfig, *, rngs: nnx.Rngs, dtype: Any, param_dtype: Any):
        c = config
        shape = (c.position_kernel, c.width // c.position_groups, c.width)
        direction = (4 / (c.position_kernel * c.width)) ** 0.5 * jax.random.normal(rngs.params(), shape, param_dtype)
        self.direction = nnx.Param(direction)
        self.scale = nnx.Param(_tap_lengths(direction))
        self.bias = nnx.Param(jnp.zeros(c.width, param_dtype))
        self.groups = c.position_groups
        self.dtype = dtype

    def __call__(self, x: Float[Array, "batch tokens width"]) -> Float[Array, "batch tokens width"]:
        """What is to be added to `x`."""
        direction = self.direction[...].astype(at_least_float32(self.dtype))
        kernel = self.scale[...].astype(direction.dtype) / _tap_lengths(direction) * direction
        taps = kernel.shape[0]
        x = jax.lax.conv_general_dilated(
            x,
            kernel.astype(self.dtype),
            window_strides=(1,),
            padding=[(taps // 2, (taps - 1) // 2)],
            dimension_numbers=("NWC", "WIO", "NWC"),
            feature_group_count=self.groups,
        )
        return gelu(x + rearrange(self.bias[...].astype(self.dtype), "d -> 1 1 d"))

    @staticmethod
    def torch_rules() -> tuple[Rule, ...]:
        """Names in BEATs files: of PyTorch's old and of its new weight normalisation."""
        key = "encoder.pos_conv.0."
        path = "position_convolution."
        return (
            Rule((f"{key}weight_g",), (f"{path}scale",), CONV_1D, (f"{key}parametrizations.weight.original0",)),
            Rule((f"{key}weight_v",), (f"{path}direction",), CONV_1D, (f"{key}parametrizations.weight.original1",)),
            rule(key + "bias", path + "bias"),
        )


def _tap_lengths(kernel: Float[Array, "taps inputs outputs"]) -> Float[Array, "taps 1 1"]:
    return jnp.sqrt(reduce(kernel * kernel, "t i o -> t 1 1", "sum"))


class GatedAttention(Attention):
    """Self-attention whose position bias is scaled by a gate of each query: gated relative positions of WavLM.

    gate = a (b s - 1) + 2, with a and b sigmoids of linear maps of the query and s a parameter of the head
    (arXiv 2110.13900, section 3.1).
    """

    def __init__(self, width: int, num_heads: int, *, rngs: nnx.Rngs, dtype: Any, param_dtype: Any, **options: Any):
        super().__init__(width, num_heads, rngs=rngs, dtype=dtype, param_dtype=param_dtype, **options)
        dtypes = {"dtype": dtype, "param_dtype": param_dtype}
        self.gate = nnx.Linear(width // num_heads, 8, kernel_init=normal_02, rngs=rngs, **dtypes)
        self.gate_scale = nnx.Param(jnp.ones(num_heads, param_dtype))

    def __call__(
        self,
        x: Float[Array, "batch tokens width"],
        position_bias: Float[Array, "heads tokens tokens"],
        mask_bias: Float[Array, "batch 1 1 tokens"] | None = None,
        *,
        dropout_key: Key[Array, ""] | None = None,
    ) -> Float[Array, "batch tokens width"]:
        """Lets the tokens attend to each other."""
        query = self.queries(x)
        key, value = self.keys_values(x)
        # Four outputs are summed for a, four for b.
        logits = reduce(self.gate(query), "n q h (gate four) -> gate n h q 1", "sum", gate=2)
        a, b = jax.nn.sigmoid(logits)
        scale = rearrange(self.gate_scale[...].astype(a.dtype), "h -> 1 h 1 1")
        gate = (a * (b * scale - 1) + 2).astype(position_bias.dtype)
        bias = gate * rearrange(position_bias, "h q k -> 1 h q k")
        if mask_bias is not None:
            bias = bias + mask_bias.astype(bias.dtype)
        return self.attend(query, key, value, bias=bias, dropout_key=dropout_key)


class BEATsLayer(nnx.Module):
    """Post-norm transformer layer with scaled residuals."""

    def __init__(self, config: BEATsConfig, *, rngs: nnx.Rngs, dtype: Any, param_dtype: Any):
        c = config
        dtypes = {"dtype": dtype, "param_dtype": param_dtype}
        self.residual_scale = (2 * c.depth) ** 0.25 if c.deep_norm else 1.0
        query_key_init: Initializer = normal_02
        other_init: Initializer = normal_02
        if c.deep_norm:
            query_key_init = nnx.initializers.glorot_normal()
            # Gain (8 depth)^(-1/4), and a variance is a gain squared.
            other_init = nnx.initializers.variance_scaling((8 * c.depth) ** -0.5, "fan_avg", "truncated_normal")
        self.attention = GatedAttention(
            c.width,
            c.num_heads,
            query_key_init=query_key_init,
            value_init=other_init,
            out_init=other_init,
            dropout_rate=c.attention_dropout_rate,
            rngs=rngs,
            **dtypes,
        )
        self.norm1 = LayerNorm(c.width, c.layer_norm_epsilon, rngs=rngs, **dtypes)
        self.mlp = MLP(
            c.width,
            c.mlp_dim,
            in_init=other_init,
            out_init=other_init,
            dropout_rate=c.activation_dropout_rate,
            rngs=rngs,
            **dtypes,
        )
        self.norm2 = LayerNorm(c.width, c.layer_norm_epsilon, rngs=rngs, **dtypes)
        self.dropout_rate = c.dropout_rate

    def __call__(
        self,
        x: Float[Array, "batch tokens width"],
        position_bias: Float[Array, "heads tokens tokens"],
        mask_bias: Float[Array, "batch 1 1 tokens"] | None = None,
        dropout_key: Key[Array, ""] | None = None,
    ) -> Float[Array, "batch tokens width"]:
        """One layer."""
        keys = split_key(dropout_key, 4)
        branch = dropout(self.attention(x, position_bias, mask_bias, dropout_key=keys[0]), self.dropout_rate, keys[1])
        x = self.norm1(self.residual_scale * x + branch)
        branch = dropout(self.mlp(x, dropout_key=keys[2]), self.dropout_rate, keys[3])
        return self.norm2(self.residual_scale * x + branch)

    @staticmethod
    def torch_rules() -> tuple[Rule, ...]:
        """Names within a layer of BEATs."""
        return (
            *linear_rules("self_attn.q_proj", "attention.query"),
            *linear_rules("self_attn.k_proj", "attention.key"),
            *linear_rules("self_attn.v_proj", "attention.value"),
            *linear_rules("self_attn.out_proj", "attention.out"),
            *linear_rules("self_attn.grep_linear", "attention.gate"),
            rule("self_attn.grep_a", "attention.gate_scale", layout="1 h 1 1 -> h"),
            *norm_rules("self_attn_layer_norm", "norm1"),
            *linear_rules("fc1", "mlp.fc1"),
            *linear_rules("fc2", "mlp.fc2"),
            *norm_rules("final_layer_norm", "norm2"),
        )

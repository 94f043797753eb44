"""BERT (arXiv 1810.04805): token ids to tokens, optionally reading a condition on the way."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import nnx
from jax.core import Tracer
from jaxtyping import Array, Bool, Float, Int, Key

from gramjax.encoders.conversion import Rule, linear_rules, norm_rules, prefixed, rule, unused
from gramjax.encoders.layers import (
    MLP,
    Attention,
    LayerNorm,
    apply_layer,
    dropout,
    layer_keys,
    mask_bias,
    normal_02,
    require_multiple,
    require_positive,
    require_rate,
    split_key,
)

# Keys and values that one layer makes of a condition.
KeysValues = tuple[Float[Array, "conditions keys heads head_dim"], Float[Array, "conditions keys heads head_dim"]]


@dataclass(frozen=True)
class BERTConfig:
    """Sizes of a `BERT` encoder; the defaults are bert-base-uncased, the text tower of GRAM and PMRL.

    Attributes:
        vocab_size: entries of the vocabulary.
        max_length: longest sequence in tokens.
        type_vocab_size: segment types in the parameters; all tokens are of type 0.
        width: size of a token.
        depth: number of layers.
        num_heads: attention heads a layer; divides `width`.
        mlp_dim: hidden size of the perceptrons.
        dropout_rate: dropout, in [0, 1), of the embeddings and of every residual branch.
        attention_dropout_rate: of the attention weights.
        layer_norm_epsilon: added to the variance in LayerNorm.
        cross_attention: whether every layer can also attend to a condition (the fusion encoder of GRAM and PMRL).

    Raises:
        ValueError: if a value is out of range or `num_heads` does not divide `width`.
    """

    vocab_size: int = 30522
    max_length: int = 512
    type_vocab_size: int = 2
    width: int = 768
    depth: int = 12
    num_heads: int = 12
    mlp_dim: int = 3072
    dropout_rate: float = 0.1
    attention_dropout_rate: float = 0.1
    layer_norm_epsilon: float = 1e-12
    cross_attention: bool = False

    def __post_init__(self):
        require_positive(self, "vocab_size", "max_length", "type_vocab_size", "width", "depth", "num_heads", "mlp_dim")
        require_multiple(self, "width", "num_heads")
        require_rate(self, "dropout_rate", "attention_dropout_rate")


class BERT(nnx.Module):
    """Token ids to tokens: word, position and type embeddings, then post-norm layers.

    With `config.cross_attention` the same parameters encode texts alone and texts together with a condition: tokens of
    other modalities, to which every layer attends after the text itself. What the layers need of a condition, its keys
    and values, can be made once (`keys_values`) and used for many texts.

    Args:
        config: the sizes.
        rngs: stream `params` initialises the parameters.
        dtype: of the computation and the result.
        param_dtype: of the parameters.
        remat: recompute each layer's activations in the backward pass instead of storing them.

    Example:
        >>> import dataclasses
        >>> import jax, jax.numpy as jnp
        >>> from flax import nnx
        >>> config = BERTConfig(vocab_size=100, max_length=16, width=64, depth=2, num_heads=4, mlp_dim=128)
        >>> encoder = BERT(config, rngs=nnx.Rngs(0))
        >>> ids = jnp.array([[1, 7, 8, 2, 0, 0]])
        >>> encoder(ids, ids != 0).shape
        (1, 6, 64)

        Two texts about each of two clips, whose keys and values are made once:

        >>> def read(ids, clips):
        ...     encoder = BERT(dataclasses.replace(config, cross_attention=True), rngs=nnx.Rngs(0))
        ...     return encoder(ids, ids != 0, encoder.keys_values(clips))
        >>> jax.eval_shape(read, jnp.full((4, 6), 7), jnp.zeros((2, 30, 64))).shape
        (4, 6, 64)
    """

    def __init__(
        self,
        config: BERTConfig,
        *,
        rngs: nnx.Rngs,
        dtype: Any = jnp.float32,
        param_dtype: Any = jnp.float32,
        remat: bool = False,
    ):
        c = config
        dtypes = {"dtype": dtype, "param_dtype": param_dtype}

        def table(entries: int) -> nnx.Param:
            return nnx.Param(normal_02(rngs.params(), (entries, c.width), param_dtype))

        self.word_embedding = table(c.vocab_size)
        self.position_embedding = table(c.max_length)
        self.type_embedding = table(c.type_vocab_size)
        self.norm = LayerNorm(c.width, c.layer_norm_epsilon, rngs=rngs, **dtypes)
        self.layers = nnx.List([BERTLayer(c, rngs=rngs, **dtypes) for _ in range(c.depth)])
        self.config = config
        self.dtype = dtype
        self.remat = remat

    def __call__(
        self,
        ids: Int[Array, "batch length"],
        mask: Bool[Array, "batch length"] | Bool[Array, "batch length length"],
        condition: Float[Array, "conditions keys width"] | Sequence[KeysValues] | None = None,
        *,
        rngs: nnx.Rngs | None = None,
    ) -> Float[Array, "batch length width"]:
        """Encodes texts.

        Args:
            ids: token ids, 0 <= id < vocab_size. (Under jit an id beyond that cannot raise: its text becomes NaN.)
            mask: True for tokens, False for padding, to which nothing attends. Outputs at padding mean nothing. Or
                [query, key] for every text: which token may attend to which.
            condition: tokens to attend to, all of them, or what `keys_values` made of them. The batch of texts is a
                multiple of the batch of conditions: the first texts read the first condition, the next ones the second.
                None: texts alone.
            rngs: stream `dropout` drives dropout; `None` switches it off.

        Returns:
            All tokens after the last layer; the first stands for the text.

        Raises:
            ValueError: if shapes do not agree, the text is longer than `max_length`, a concrete id is out of range, or
                there is a condition but no cross-attention.
            TypeError: if `ids` are not integers or `mask` is not bool.
        """
        self._check(ids, mask)
        conditions = self._conditions(condition, ids.shape[0])
        embed_key, *keys = layer_keys(rngs, 1 + self.config.depth)
        x = dropout(self.embed(ids), self.config.dropout_rate, embed_key)
        bias = mask_bias(mask)
        for layer, read, key in zip(self.layers, conditions, keys):
            x = apply_layer(layer, x, bias, read, key, remat=self.remat)
        return x

    def keys_values(self, condition: Float[Array, "conditions keys width"]) -> tuple[KeysValues, ...]:
        """What every layer needs of a condition, to use for many texts.

        It takes 2 depth times the memory of the condition, and saves projecting it again: most of the work of matching
        a text with a clip. In training with `remat` hand over the condition itself: layers then recompute these.

        Raises:
            ValueError: if the shape is not `[conditions, keys, width]`, or there is no cross-attention.
        """
        self._conditions(condition, condition.shape[0])
        return tuple(layer.reader.attention.keys_values(condition) for layer in self.layers if layer.reader)

    def embed(self, ids: Int[Array, "batch length"]) -> Float[Array, "batch length width"]:
        """The tokens that enter the first layer."""
        words = jnp.take(self.word_embedding[...], ids, axis=0).astype(self.dtype)
        place = self.position_embedding[: ids.shape[1]] + self.type_embedding[:1]
        return self.norm(words + rearrange(place.astype(self.dtype), "l d -> 1 l d"))

    @staticmethod
    def torch_rules(config: BERTConfig) -> tuple[Rule, ...]:
        """Names in BERT files (without the prefix `bert.`)."""
        return (
            rule("embeddings.word_embeddings.weight", "word_embedding"),
            rule("embeddings.position_embeddings.weight", "position_embedding"),
            rule("embeddings.token_type_embeddings.weight", "type_embedding"),
            *norm_rules("embeddings.LayerNorm", "norm"),
            rule("embeddings.position_ids"),  # 0, 1, 2, ...
            rule("pooler.dense.weight"),  # of next-sentence prediction; the first token is used as it is
            rule("pooler.dense.bias"),
            *(
                r
                for i in range(config.depth)
                for r in prefixed(BERTLayer.torch_rules(config), key=f"encoder.layer.{i}.", path=f"layers.{i}.")
            ),
        )

    def _check(self, ids: Array, mask: Array) -> None:
        c = self.config
        if ids.ndim != 2 or ids.shape[1] == 0:
            raise ValueError(f"ids must have shape [batch, length], got {ids.shape}")
        if ids.shape[1] > c.max_length:
            raise ValueError(f"ids hold {ids.shape[1]} tokens a text, more than max_length={c.max_length}")
        if mask.shape not in (ids.shape, (*ids.shape, ids.shape[1])):
            raise ValueError(f"mask must have the shape of ids, {ids.shape}, or one more axis, got {mask.shape}")
        if not jnp.issubdtype(ids.dtype, jnp.integer):
            raise TypeError(f"ids must be integers, got dtype {ids.dtype}")
        if mask.dtype != jnp.bool_:
            raise TypeError(f"mask must be bool (True for tokens), got dtype {mask.dtype}")
        if not isinstance(ids, Tracer) and ids.is_fully_addressable and ids.size:
            concrete = np.asarray(ids)  # under jit, jnp would trace even this
            low, high = concrete.min(), concrete.max()
            if low < 0 or high >= c.vocab_size:
                raise ValueError(f"ids must lie in [0, vocab_size={c.vocab_size}), got {low} to {high}")

    def _conditions(self, condition: Any, texts: int) -> Sequence[Any]:
        """What each layer reads."""
        c = self.config
        if condition is None:
            return (None,) * c.depth
        if not c.cross_attention:
            raise ValueError("condition must be None without cross-attention (BERTConfig.cross_attention is False)")
        if isinstance(condition, (tuple, list)):
            if len(condition) != c.depth:
                raise ValueError(f"condition must hold keys and values of {c.depth} layers, got {len(condition)}")
            count, layers = condition[0][0].shape[0], condition
        else:
            if condition.ndim != 3 or condition.shape[2] != c.width:
                raise ValueError(f"condition must have shape [conditions, keys, {c.width}], got {condition.shape}")
            count, layers = condition.shape[0], (condition,) * c.depth
        if not count or texts % count:
            raise ValueError(f"condition must be of a batch that divides the {texts} texts, got {count}")
        return layers


class BERTLayer(nnx.Module):
    """Post-norm transformer layer."""

    def __init__(self, config: BERTConfig, *, rngs: nnx.Rngs, dtype: Any, param_dtype: Any):
        c = config
        dtypes = {"dtype": dtype, "param_dtype": param_dtype}

        self.attention = Attention(c.width, c.num_heads, dropout_rate=c.attention_dropout_rate, rngs=rngs, **dtypes)
        self.norm1 = LayerNorm(c.width, c.layer_norm_epsilon, rngs=rngs, **dtypes)
        self.mlp = MLP(c.width, c.mlp_dim, rngs=rngs, **dtypes)
        self.norm2 = LayerNorm(c.width, c.layer_norm_epsilon, rngs=rngs, **dtypes)
        self.reader = Reader(c, rngs=rngs, **dtypes) if c.cross_attention else nnx.data(None)
        self.dropout_rate = c.dropout_rate

    def __call__(
        self,
        x: Float[Array, "batch length width"],
        bias: Float[Array, "#batch 1 #length length"],
        condition: Float[Array, "conditions keys width"] | KeysValues | None = None,
        dropout_key: Key[Array, ""] | None = None,
    ) -> Float[Array, "batch length width"]:
        """One layer; `bias` is added to the logits of self-attention, all of `condition` is attended to."""
        keys = split_key(dropout_key, 3 if condition is None else 5)
        branch = self.attention(x, bias=bias, dropout_key=keys[0])
        x = self.norm1(x + dropout(branch, self.dropout_rate, keys[1]))
        if self.reader and condition is not None:
            x = self.reader(x, condition, keys[3:])
        return self.norm2(x + dropout(self.mlp(x), self.dropout_rate, keys[2]))

    @staticmethod
    def torch_rules(config: BERTConfig) -> tuple[Rule, ...]:
        """Names within a layer of BERT."""
        rules = (
            *linear_rules("attention.self.query", "attention.query"),
            *linear_rules("attention.self.key", "attention.key"),
            *linear_rules("attention.self.value", "attention.value"),
            *linear_rules("attention.output.dense", "attention.out"),
            *norm_rules("attention.output.LayerNorm", "norm1"),
            *linear_rules("intermediate.dense", "mlp.fc1"),
            *linear_rules("output.dense", "mlp.fc2"),
            *norm_rules("output.LayerNorm", "norm2"),
        )
        reader = prefixed(Reader.torch_rules(), key="crossattention.", path="reader.")
        return (*rules, *(reader if config.cross_attention else unused(reader)))


class Reader(nnx.Module):
    """Attention to a condition, added to the text and normalised."""

    def __init__(self, config: BERTConfig, *, rngs: nnx.Rngs, dtype: Any, param_dtype: Any):
        c = config
        dtypes = {"dtype": dtype, "param_dtype": param_dtype}
        self.attention = Attention(c.width, c.num_heads, dropout_rate=c.attention_dropout_rate, rngs=rngs, **dtypes)
        self.norm = LayerNorm(c.width, c.layer_norm_epsilon, rngs=rngs, **dtypes)
        self.dropout_rate = c.dropout_rate

    def __call__(
        self,
        x: Float[Array, "batch length width"],
        condition: Float[Array, "conditions keys width"] | KeysValues,
        dropout_keys: Sequence[Key[Array, ""] | None],
    ) -> Float[Array, "batch length width"]:
        """Lets each text attend to all of its condition; dropout takes two keys."""
        key, value = condition if isinstance(condition, tuple) else self.attention.keys_values(condition)
        # Texts of one condition become one long row of queries: its keys and values are not copied for each text.
        query = rearrange(self.attention.queries(x), "(c p) q h d -> c (p q) h d", c=key.shape[0])
        branch = self.attention.attend(query, key, value, dropout_key=dropout_keys[0])
        branch = rearrange(branch, "c (p q) w -> (c p) q w", q=x.shape[1])
        return self.norm(x + dropout(branch, self.dropout_rate, dropout_keys[1]))

    @staticmethod
    def torch_rules() -> tuple[Rule, ...]:
        """Names within `crossattention` of a layer."""
        return (
            *linear_rules("self.query", "attention.query"),
            *linear_rules("self.key", "attention.key"),
            *linear_rules("self.value", "attention.value"),
            *linear_rules("output.dense", "attention.out"),
            *norm_rules("output.LayerNorm", "norm"),
        )

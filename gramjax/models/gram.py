"""The model: towers, pooling, projection to the common space, and matching by reading."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jaxtyping import Array, Float

from gramjax.encoders.audio import BEATs, BEATsConfig
from gramjax.encoders.conversion import Rule
from gramjax.encoders.heads import ProjectionHead, cls_pool, mean_pool
from gramjax.encoders.spectrogram import token_mask
from gramjax.encoders.text import BERT, BERTConfig, KeysValues
from gramjax.encoders.vector import VectorConfig, VectorEncoder
from gramjax.encoders.vision import VisionConfig, VisionTransformer
from gramjax.models.config import GramConfig, TowerConfig
from gramjax.models.fusion import Fusion
from gramjax.models.released import released_rules

# Of one frame, by the kind of tower; texts are mappings.
_AXES = {VisionConfig: "height, width, channels", BEATsConfig: "time, mel", VectorConfig: "features"}


class GramModel(nnx.Module):
    """Embeds every modality in one space (GRAM, arXiv 2412.11959, section 3), and tells whether a text matches a clip.

    Each modality goes through its tower, is pooled to one vector (`GramConfig.pooling`; over all frames or slices of a
    clip), and is projected by a linear head of its own to the unit sphere. With a fusion tower the model also matches:
    the tower reads a text while attending to a condition, the tokens of other modalities. The released models of GRAM,
    PMRL (arXiv 2507.17343) and VAST (arXiv 2305.18500) are this class with different heads (`gram_large`,
    `pmrl_large`, `vast_large`).

    Args:
        config: towers and modalities.
        rngs: stream "params" gives the initial values.
        dtype: of the towers' computations; projection, normalisation and the matching head are in float32.
        param_dtype: of the parameters.
        remat: recompute the activations of every block of every tower in the backward pass instead of storing them.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from gramjax.models import gram_tiny
        >>> def search_and_match(batch):
        ...     model = GramModel(gram_tiny(), rngs=nnx.Rngs(0))
        ...     tokens = model.encode(batch)
        ...     clips = model.cache_condition(model.condition(tokens, ("vision", "audio")))
        ...     return model.project(tokens, batch), model.match(batch["caption"], clips)
        >>> batch = {
        ...     "caption": {"ids": jnp.ones((2, 9), int), "mask": jnp.ones((2, 9), bool)},
        ...     "vision": jnp.zeros((2, 8, 42, 42, 3)),  # 8 frames
        ...     "audio": jnp.zeros((2, 1, 64, 32)),  # one slice
        ... }
        >>> embeddings, logits = jax.eval_shape(search_and_match, batch)
        >>> embeddings["vision"].shape, logits.shape
        ((2, 20), (2, 2))
    """

    def __init__(
        self,
        config: GramConfig,
        *,
        rngs: nnx.Rngs,
        dtype: Any = jnp.float32,
        param_dtype: Any = jnp.float32,
        remat: bool = False,
    ):
        self.config = config
        self.towers = nnx.Dict(
            {name: _tower(tower, rngs, dtype, param_dtype, remat) for name, tower in config.towers.items()}
        )
        self.heads = nnx.Dict(
            {
                modality: ProjectionHead(
                    config.towers[tower].width, config.embed_dim, rngs=rngs, param_dtype=param_dtype
                )
                for modality, tower in config.modalities.items()
            }
        )
        self.joint_heads = nnx.Dict(
            {
                name: ProjectionHead(
                    sum(config.towers[config.modalities[modality]].width for modality in joined),
                    config.embed_dim,
                    use_bias=True,
                    rngs=rngs,
                    param_dtype=param_dtype,
                )
                for name, joined in config.joint_heads.items()
            }
        )
        has_fusion = config.fusion_tower is not None
        self.fusion = Fusion(config, rngs=rngs, dtype=dtype, param_dtype=param_dtype) if has_fusion else nnx.data(None)

    def encode(self, batch: Mapping[str, Any], *, rngs: nnx.Rngs | None = None) -> dict[str, Float[Array, "batch ..."]]:
        """The towers' outputs before pooling.

        Args:
            batch: as for `embed`.
            rngs: as for `embed`.

        Returns:
            modality -> tokens [batch, tokens, width of its tower], or [batch, frames, tokens, width] for clips.

        Raises:
            ValueError: as `embed`.
        """
        present = [modality for modality in self.config.modalities if modality in batch]
        if not present:
            raise ValueError(f"batch must have at least one of {list(self.config.modalities)}, got {list(batch)}")
        return {modality: self._encode(modality, batch[modality], rngs) for modality in present}

    def project(
        self, tokens: Mapping[str, Float[Array, "batch ..."]], batch: Mapping[str, Any]
    ) -> dict[str, Float[Array, "batch embed_dim"]]:
        """Pool and project what `encode` made of `batch`: modality -> unit vectors [batch, embed_dim], float32."""
        return {name: self.heads[name](self._pool(name, values, batch[name])) for name, values in tokens.items()}

    def project_joint(
        self, tokens: Mapping[str, Float[Array, "batch ..."]], batch: Mapping[str, Any]
    ) -> dict[str, Float[Array, "batch embed_dim"]]:
        """Like `project`, by the joint heads: name -> unit vectors; without those whose modalities `tokens` lacks."""
        pooled = {name: self._pool(name, values, batch[name]) for name, values in tokens.items()}
        return {
            name: self.joint_heads[name](jnp.concatenate([pooled[modality] for modality in joined], axis=-1))
            for name, joined in self.config.joint_heads.items()
            if set(joined) <= set(pooled)
        }

    def embed(
        self, batch: Mapping[str, Any], *, rngs: nnx.Rngs | None = None
    ) -> dict[str, Float[Array, "batch embed_dim"]]:
        """Embed the modalities of a batch.

        Args:
            batch: modality -> pixels [batch, height, width, 3] or, for clips, [batch, frames, height, width, 3];
                log-mel frames [batch, time, mel] or [batch, slices, time, mel], or, where some are padding,
                `{"fbank": frames, "mask": bool [batch, time] or [batch, slices, time]}`; vectors [batch, features]; or
                text `{"ids": [batch, length], "mask": [batch, length]}`. Modalities that the batch lacks are left out,
                and entries that are no modality of this model are ignored.
            rngs: source of dropout masks; None: no dropout.

        Returns:
            modality -> unit vectors [batch, embed_dim], float32, in the order of `config.modalities`. A clip's is that
            of the mean over its frames or slices, without slices that are padding alone.

        Raises:
            ValueError: the batch has none of the model's modalities, or an entry is not of the kind its tower reads.
        """
        return self.project(self.encode(batch, rngs=rngs), batch)

    def condition(
        self, tokens: Mapping[str, Float[Array, "batch ..."]], modalities: Sequence[str]
    ) -> Float[Array, "batch condition width"]:
        """What a text is matched with: the tokens of several modalities, one modality after the other.

        Args:
            tokens: from `encode`.
            modalities: which, in this order; the released models order them vision, audio, subtitle, depth.

        Returns:
            One token of the fusion tower's width for every token of every frame. All are attended to, padding of
            subtitles and sound included, as in the released models.

        Raises:
            ValueError: a modality is not in `tokens` or cannot be a condition, or the model has no fusion tower.
        """
        return self._fusion()[1].condition(tokens, modalities)

    def cache_condition(self, condition: Float[Array, "batch condition width"]) -> tuple[KeysValues, ...]:
        """Keys and values that every layer of the fusion tower makes of a condition.

        To match one clip with many texts, make them once: at the released size and 8 frames with sound, a pair then
        takes 5.7 instead of 38.4 billion multiplications. They take 24 times the memory of the condition (170 MB a
        clip in float32), so keep those of the clips at hand alone.
        """
        return self._fusion()[0].keys_values(condition)

    def match(
        self,
        text: Mapping[str, Any],
        condition: Float[Array, "clips condition width"] | Sequence[KeysValues],
        *,
        rngs: nnx.Rngs | None = None,
    ) -> Float[Array, "batch 2"]:
        """Does each text match its clip? (GRAM, section 3.3: data-anchor matching.)

        Args:
            text: `{"ids": [batch, length], "mask": [batch, length]}`.
            condition: of each clip, from `condition` or `cache_condition`. The number of texts is a multiple of the
                number of clips: with p times as many, texts 0 to p - 1 are matched with clip 0, the next p with
                clip 1. Nothing of a clip is copied for each of its texts.
            rngs: source of dropout masks; None: no dropout.

        Returns:
            Logits of (no, yes), float32, for `gramjax.losses.matching_loss`; `jax.nn.softmax(logits)[:, 1]` is the
            matching score.

        Raises:
            ValueError: shapes do not fit, or the model has no fusion tower.
        """
        tower, fusion = self._fusion()
        tokens = tower(*_text("text", text), condition, rngs=rngs)
        return fusion.matching_head(cls_pool(tokens).astype(jnp.float32))

    @staticmethod
    def torch_rules(config: GramConfig) -> tuple[Rule, ...]:
        """Names in the files of GRAM, PMRL and VAST (without the prefix `module.`).

        A part that the files have and `config` lacks (the head for depth, joint heads, the whole fusion) is known and
        not used. CLIP's text tower and projection are never used and not kept. The temperature, `contra_temp`, is
        `LossParameters.from_torch`'s.

        Raises:
            ValueError: `config` has towers, modalities or joint heads that no released file has; they must be named
                as in `gram_large`.
        """
        return released_rules(config)

    def _fusion(self) -> tuple[BERT, Fusion]:
        if self.fusion is None:
            raise ValueError("the model must have a fusion tower (GramConfig.fusion_tower), got None")
        return self.towers[self.config.fusion_tower], self.fusion  # type: ignore[return-value]

    def _encode(self, modality: str, inputs: Any, rngs: nnx.Rngs | None) -> Array:
        name = self.config.modalities[modality]
        argument = f"batch[{modality!r}]"
        config, tower = self.config.towers[name], self.towers[name]
        if isinstance(config, BERTConfig):
            return tower(*_text(argument, inputs), rngs=rngs)
        axes = _AXES[type(config)]
        rank = 2 + axes.count(",")
        needed = f"{argument} must be an array [batch, {axes}], or [batch, frames, {axes}] with a frame at least"
        masked = isinstance(config, BEATsConfig) and isinstance(inputs, Mapping) and {"fbank", "mask"} <= set(inputs)
        if isinstance(inputs, Mapping) and not masked:
            needed += ', or a mapping with that as "fbank" and a "mask"' if isinstance(config, BEATsConfig) else ""
            raise ValueError(f"{needed}, got keys {list(inputs)}")
        arrays = [jnp.asarray(inputs[key]) for key in ("fbank", "mask")] if masked else [jnp.asarray(inputs)]
        shape = arrays[0].shape
        if len(shape) == rank:
            return tower(*arrays, rngs=rngs)
        if len(shape) != rank + 1 or not shape[1]:
            raise ValueError(f"{needed}, got shape {shape}")
        if masked and arrays[1].shape != shape[:-1]:
            raise ValueError(f'{argument}["mask"] must have shape {shape[:-1]}, got {arrays[1].shape}')
        tokens = tower(*(rearrange(array, "b n ... -> (b n) ...") for array in arrays), rngs=rngs)
        return rearrange(tokens, "(b n) t d -> b n t d", n=shape[1])

    def _pool(self, modality: str, tokens: Array, inputs: Any) -> Array:
        """One vector [batch, width], at least float32: of every frame, then the mean over frames."""
        tower = self.config.modalities[modality]
        frames = None
        match self.config.towers[tower], self.config.pooling.get(tower):
            case BEATsConfig() as config, _:
                where = None
                if isinstance(inputs, Mapping):
                    where = token_mask(jnp.asarray(inputs["mask"]), config.patch_size, tokens.shape[-2])
                    frames = jnp.any(where, axis=-1)
                pooled = mean_pool(tokens, where)
            case _, "first" | None:
                pooled = cls_pool(tokens)
            case BERTConfig(), _:
                pooled = mean_pool(tokens[:, 1:], jnp.asarray(inputs["mask"])[:, 1:])
            case _:
                pooled = mean_pool(tokens[..., 1:, :])
        pooled = pooled.astype(jnp.float32)
        return mean_pool(pooled, frames) if pooled.ndim == 3 else pooled


def _text(argument: str, inputs: Any) -> tuple[Array, Array]:
    if not isinstance(inputs, Mapping) or not {"ids", "mask"} <= set(inputs):
        seen = f"keys {list(inputs)}" if isinstance(inputs, Mapping) else f"an array of shape {jnp.shape(inputs)}"
        raise ValueError(f'{argument} must be a mapping with "ids" and "mask", got {seen}')
    return jnp.asarray(inputs["ids"]), jnp.asarray(inputs["mask"])


def _tower(config: TowerConfig, rngs: nnx.Rngs, dtype: Any, param_dtype: Any, remat: bool) -> nnx.Module:
    options = {"rngs": rngs, "dtype": dtype, "param_dtype": param_dtype, "remat": remat}
    match config:
        case VisionConfig():
            return VisionTransformer(config, **options)
        case BEATsConfig():
            return BEATs(config, **options)
        case BERTConfig():
            return BERT(config, **options)
        case VectorConfig():
            return VectorEncoder(config, **options)

"""The model: towers, pooling, projection to the common space."""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from gramjax.encoders.audio import BEATs, BEATsConfig
from gramjax.encoders.heads import ProjectionHead, cls_pool, mean_pool
from gramjax.encoders.text import BERT, BERTConfig
from gramjax.encoders.vision import VisionConfig, VisionTransformer
from gramjax.models.config import GramConfig, TowerConfig


class GramModel(nnx.Module):
    """Embeds every modality in one space (GRAM, arXiv 2412.11959, section 3).

    Each modality goes through its tower, is pooled to one vector (`GramConfig.pooling`), and is projected by a linear
    head of its own to the unit sphere.

    Args:
        config: towers and modalities.
        rngs: stream "params" gives the initial values.
        dtype: of the towers' computations; projection and normalisation are in float32.
        param_dtype: of the parameters.
    """

    def __init__(self, config: GramConfig, *, rngs: nnx.Rngs, dtype: Any = jnp.float32, param_dtype: Any = jnp.float32):
        self.config = config
        self.towers = nnx.Dict({name: _tower(tower, rngs, dtype, param_dtype) for name, tower in config.towers.items()})
        self.heads = nnx.Dict(
            {
                modality: ProjectionHead(
                    config.towers[tower].width, config.embed_dim, rngs=rngs, param_dtype=param_dtype
                )
                for modality, tower in config.modalities.items()
            }
        )

    def encode(self, batch: Mapping[str, Any], *, rngs: nnx.Rngs | None = None) -> dict[str, Float[Array, "batch _ _"]]:
        """The towers' outputs before pooling: modality -> tokens [batch, tokens, width of its tower].

        Args:
            batch: as for `embed`.
            rngs: as for `embed`.
        """
        present = [modality for modality in self.config.modalities if modality in batch]
        if not present:
            raise ValueError(f"batch must have at least one of {list(self.config.modalities)}, got {list(batch)}")
        return {
            modality: self.towers[self.config.modalities[modality]](*self._inputs(modality, batch[modality]), rngs=rngs)
            for modality in present
        }

    def project(
        self, tokens: Mapping[str, Float[Array, "batch _ _"]], batch: Mapping[str, Any]
    ) -> dict[str, Float[Array, "batch embed_dim"]]:
        """Pool and project what `encode` made of `batch`: modality -> unit vectors [batch, embed_dim], float32."""
        return {
            modality: self.heads[modality](self._pool(modality, values, batch[modality]).astype(jnp.float32))
            for modality, values in tokens.items()
        }

    def embed(
        self, batch: Mapping[str, Any], *, rngs: nnx.Rngs | None = None
    ) -> dict[str, Float[Array, "batch embed_dim"]]:
        """Embed the modalities of a batch.

        Args:
            batch: modality -> pixels [batch, height, width, 3], log-mel frames [batch, time, mel], or text
                `{"ids": [batch, length], "mask": [batch, length]}`. Modalities that the batch lacks are left out, and
                entries that are no modality of this model are ignored.
            rngs: source of dropout masks; None: no dropout.

        Returns:
            modality -> unit vectors [batch, embed_dim], float32, in the order of `config.modalities`.

        Raises:
            ValueError: the batch has none of the model's modalities, or an entry is not of the kind its tower reads.
        """
        return self.project(self.encode(batch, rngs=rngs), batch)

    def _pool(self, modality: str, tokens: Array, inputs: Any) -> Array:
        tower = self.config.modalities[modality]
        match self.config.towers[tower], self.config.pooling.get(tower):
            case BEATsConfig(), _:
                return mean_pool(tokens)
            case _, "first" | None:
                return cls_pool(tokens)
            case BERTConfig(), _:
                return mean_pool(tokens[:, 1:], jnp.asarray(inputs["mask"])[:, 1:])
            case _:
                return mean_pool(tokens[:, 1:])

    def _inputs(self, modality: str, inputs: Any) -> tuple:
        """The arguments of the modality's tower."""
        is_text = isinstance(self.config.towers[self.config.modalities[modality]], BERTConfig)
        if is_text and isinstance(inputs, Mapping) and {"ids", "mask"} <= set(inputs):
            return jnp.asarray(inputs["ids"]), jnp.asarray(inputs["mask"])
        if is_text or isinstance(inputs, Mapping):
            needed = 'a mapping with "ids" and "mask"' if is_text else "an array"
            seen = f"keys {list(inputs)}" if isinstance(inputs, Mapping) else f"an array of shape {jnp.shape(inputs)}"
            raise ValueError(f"batch[{modality!r}] must be {needed}, got {seen}")
        return (jnp.asarray(inputs),)


def _tower(config: TowerConfig, rngs: nnx.Rngs, dtype: Any, param_dtype: Any) -> nnx.Module:
    match config:
        case VisionConfig():
            return VisionTransformer(config, rngs=rngs, dtype=dtype, param_dtype=param_dtype)
        case BEATsConfig():
            return BEATs(config, rngs=rngs, dtype=dtype, param_dtype=param_dtype)
        case BERTConfig():
            return BERT(config, rngs=rngs, dtype=dtype, param_dtype=param_dtype)

"""What a model makes of items: embeddings for a first stage, and conditions and matching scores for a second."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from gramjax.data.wordpiece import WordPieceTokenizer
from gramjax.encoders import BERTConfig
from gramjax.models import GramConfig, GramModel
from gramjax.training import data_mesh, shard_batch

# By which the published models learn to match, in this order.
MATCHED = ("vision", "audio")
# A batch, and for each modality which of its rows have it; the batch may have more rows, which stand for nothing.
Loaded = tuple[Mapping[str, Any], Mapping[str, np.ndarray]]


def embed_items(
    model: GramModel,
    batches: Iterable[Loaded],
    modalities: Sequence[str],
    *,
    match_with: Sequence[str] = (),
    conditions: Path | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Embeds all items, and perhaps keeps what texts are matched with, for `Matcher`.

    Each of the devices that hold the model (`everywhere`) embeds a part of every batch.

    Args:
      model: with a fusion tower, if anything is matched.
      batches: of items, which hold all modalities named.
      modalities: that are embedded.
      match_with: modalities that texts are matched with, in the order of the condition.
      conditions: folder for a file an item: at the released size, 8 frames and sound take 7 MB.

    Returns:
      Embeddings `[items, modalities, dim]`, and which are present `[items, modalities]`.

    Raises:
      ValueError: if an embedding of what is present is not finite: the model is no good.
    """
    graphdef, variables = nnx.split(model)

    @jax.jit
    def run(variables: Any, batch: Mapping[str, Any]) -> tuple[dict, dict]:
        model = nnx.merge(graphdef, variables)
        tokens = model.encode({name: batch[name] for name in {*modalities, *match_with}})
        embedded = model.project({name: tokens[name] for name in modalities}, batch)
        return embedded, {name: model.condition(tokens, (name,)) for name in match_with}

    mesh = _mesh(variables)
    embeddings, present, done = [], [], 0
    for batch, where in batches:
        present.append(np.stack([where[name] for name in modalities], axis=1))
        embedded, parts = jax.device_get(run(variables, _divided(batch, mesh)))
        embeddings.append(np.stack([embedded[name] for name in modalities], axis=1)[: len(present[-1])])
        if (strange := present[-1] & ~np.isfinite(embeddings[-1]).all(axis=-1)).any():
            names = " and ".join(name for name, found in zip(modalities, strange.any(axis=0)) if found)
            raise ValueError(f"model must embed in finite numbers, got NaN or infinite embeddings of {names}")
        for row in range(len(present[-1])):
            if there := [parts[name][row] for name in match_with if where[name][row]]:
                assert conditions is not None
                np.save(_file(conditions, done + row), np.concatenate(there))
        done += len(present[-1])
    return np.concatenate(embeddings), np.concatenate(present)


class Matcher:
    """How well texts match items, by the model's fusion tower and matching head: for `gramjax.reranking.match_pairs`.

    An item is matched by what it has; one that has nothing of what is matched comes last. Each of the devices that hold
    the model matches a part of the texts.
    """

    def __init__(self, model: GramModel, conditions: Path):
        """Args: the model, and the folder that `embed_items` filled."""
        graphdef, self._variables = nnx.split(model)
        self._mesh = _mesh(self._variables)
        self._conditions = conditions
        self._cache = jax.jit(lambda variables, condition: nnx.merge(graphdef, variables).cache_condition(condition))
        # yes - no: the order of the published softmax(logits)[:, 1], which rounds to 1 for all good ones
        self._match = jax.jit(
            lambda variables, texts, item: jnp.diff(nnx.merge(graphdef, variables).match(texts, item))[:, 0]
        )

    def condition_of(self, item: int) -> Any:
        """Keys and values of an item, or None if there is nothing to match."""
        file = _file(self._conditions, item)
        return self._cache(self._variables, np.load(file)[None]) if file.exists() else None

    def match(self, texts: Mapping[str, np.ndarray], condition: Any) -> Any:
        """Difference of the matching head's logits, one for each text."""
        count = len(texts["ids"])
        if condition is None:
            return np.full(count, -np.inf)
        return self._match(self._variables, _divided(texts, self._mesh), condition)[:count]


def matched_modalities(config: GramConfig, able: Sequence[str], wanted: Sequence[str]) -> tuple[str, ...]:
    """Those of the wanted modalities that items have, in the wanted order.

    Raises:
      ValueError: if the model cannot match, or by none of them.
    """
    if config.fusion_tower is None:
        raise ValueError("model must have a fusion tower, to match texts and clips")
    found = tuple(name for name in wanted if name in able and config.modalities[name] in config.condition_frames)
    if not found:
        raise ValueError(f"clips must have one of {', '.join(wanted)}, to be matched with texts; got {', '.join(able)}")
    return found


def read_tokenizer(vocabulary: Path, config: GramConfig) -> WordPieceTokenizer:
    """The tokenizer of a model's text towers.

    Raises:
      ValueError: if there is none, or it cannot be the model's: it has fewer words, or more.
    """
    tokenizer = WordPieceTokenizer(vocabulary)
    for name in dict.fromkeys(config.modalities.values()):
        tower = config.towers[name]
        if isinstance(tower, BERTConfig) and tower.vocab_size != tokenizer.vocabulary_size:
            raise ValueError(
                f"vocabulary must have the {tower.vocab_size} tokens of the model, "
                f"got {tokenizer.vocabulary_size} in {vocabulary}"
            )
    return tokenizer


def everywhere(tree: Any) -> Any:
    """Places for `load_model`: a copy on every device."""
    whole = NamedSharding(data_mesh(), PartitionSpec())
    return jax.tree.map(lambda _: whole, tree)


def _mesh(variables: Any) -> Mesh:
    """The devices that hold a model."""
    devices = jax.tree.leaves(variables)[0].sharding.device_set
    return data_mesh(sorted(devices, key=lambda device: device.id))


def _divided(batch: Any, mesh: Mesh) -> Any:
    """A batch over the devices of a mesh, filled up with its last row so that each has as many rows."""

    def fill(rows: np.ndarray) -> np.ndarray:
        missing = -len(rows) % mesh.size
        return np.concatenate([rows, np.repeat(rows[-1:], missing, axis=0)]) if missing else rows

    return shard_batch(jax.tree.map(fill, batch), mesh)


def _file(folder: Path, item: int) -> Path:
    return folder / f"{item}.npy"

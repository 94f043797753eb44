"""What the studies minimise: sums of terms, each a loss of `gramjax.losses` or a candidate for one.

A term is a small frozen dataclass that is called with the batch; an objective is a tuple of terms.
"""

import dataclasses
import itertools
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from gramjax import linalg, losses, scores, streaming
from gramjax.models import LossParameters


class TermBatch(NamedTuple):
    """What a term sees: `z` `[batch, modality, dim]`, which vectors are there, which modality is the anchor."""

    z: Float[Array, "batch modality dim"]
    where: Bool[Array, "batch modality"]
    anchor: int
    ids: Int[Array, " batch"]
    key: Array


class Term(Protocol):
    """A loss with its weight and its options."""

    @property
    def weight(self) -> float:
        """Its factor in the objective."""
        ...

    @property
    def temperature(self) -> float:
        """What its scores are divided by."""
        ...

    def learned(self, modalities: int, dim: int, rngs: nnx.Rngs) -> nnx.Module | None:
        """What is learned with it, if anything is."""
        ...

    def __call__(self, batch: TermBatch, learned: Any) -> Float[Array, ""]:
        """Its value."""
        ...


Objective = tuple[Term, ...]


@dataclasses.dataclass(frozen=True)
class _Fixed:
    """A term that learns nothing of its own: temperatures are chosen on validation, and fixed."""

    temperature: float
    weight: float = 1.0

    def learned(self, modalities: int, dim: int, rngs: nnx.Rngs) -> None:
        """Nothing."""
        del modalities, dim, rngs


class _OfAnchor(_Fixed):
    """A loss that compares the anchor with the other modalities."""

    loss: ClassVar[Callable[..., Float[Array, ""]]]

    def __call__(self, batch: TermBatch, learned: Any) -> Float[Array, ""]:
        """Its value."""
        z, where, anchor, ids, _ = batch
        return self.loss(z, anchor=anchor, temperature=self.temperature, where=where, ids=ids)


class Gram(_OfAnchor):
    """Volumes (GRAM)."""

    loss = staticmethod(losses.gram_loss)


class Cone(_OfAnchor):
    """Cosines to cones."""

    loss = staticmethod(losses.cone_loss)


class Anchored(_OfAnchor):
    """The anchor against each other modality (ImageBind)."""

    loss = staticmethod(losses.anchored_infonce_loss)


class Triangle(_OfAnchor):
    """Areas of triangles (TRIANGLE), of exactly three modalities."""

    loss = staticmethod(losses.triangle_loss)


class _OfAll(_Fixed):
    """A loss that treats all modalities alike."""

    loss: ClassVar[Callable[..., Float[Array, ""]]]

    def __call__(self, batch: TermBatch, learned: Any) -> Float[Array, ""]:
        """Its value."""
        return self.loss(batch.z, temperature=self.temperature, where=batch.where, ids=batch.ids)


class Pairwise(_OfAll):
    """Every modality against every other."""

    loss = staticmethod(losses.pairwise_infonce_loss)


class Directions(_OfAll):
    """Leading directions of different items kept apart (PMRL)."""

    loss = staticmethod(losses.direction_regularization)


@dataclasses.dataclass(frozen=True)
class Alignment(_Fixed):
    """Leading singular values (PMRL)."""

    def __call__(self, batch: TermBatch, learned: Any) -> Float[Array, ""]:
        """`gramjax.losses.alignment_loss`."""
        return losses.alignment_loss(batch.z, temperature=self.temperature, where=batch.where)


@dataclasses.dataclass(frozen=True)
class Symile(_Fixed):
    """Products of all modalities (Symile), with shuffled negatives."""

    def __call__(self, batch: TermBatch, learned: Any) -> Float[Array, ""]:
        """`gramjax.losses.symile_loss`."""
        z, where, _, ids, key = batch
        return losses.symile_loss(z, temperature=self.temperature, where=where, ids=ids, key=key)


@dataclasses.dataclass(frozen=True)
class Sigmoid:
    """Binary questions (SigLIP), averaged over all pairs of modalities; temperature and bias are learned."""

    temperature: float
    """Initial."""
    bias: float = -10.0
    """Initial."""
    weight: float = 1.0

    def learned(self, modalities: int, dim: int, rngs: nnx.Rngs) -> LossParameters:
        """Temperature and bias."""
        del modalities, dim, rngs
        return LossParameters(temperature=self.temperature, bias=self.bias)

    def __call__(self, batch: TermBatch, learned: LossParameters) -> Float[Array, ""]:
        """Mean of `gramjax.losses.sigmoid_loss`."""
        z, where, _, ids, _ = batch
        assert learned.bias is not None
        values = [
            losses.sigmoid_loss(
                z[:, a], z[:, b], temperature=learned.temperature, bias=learned.bias[...],
                where=where[:, a] & where[:, b], ids=ids,
            )
            for a, b in itertools.combinations(range(z.shape[1]), 2)
        ]  # fmt: skip
        return jnp.mean(jnp.stack(values))


class MatchingHead(nnx.Module):
    """Do an anchor and an item's other vectors belong together? A hidden layer over all of them."""

    def __init__(self, modalities: int, dim: int, *, rngs: nnx.Rngs):
        self.hidden = nnx.Linear(modalities * dim, 256, rngs=rngs)
        self.out = nnx.Linear(256, 2, rngs=rngs)

    def __call__(self, z: Float[Array, "batch modality dim"]) -> Float[Array, "batch 2"]:
        """Logits; absent vectors are 0."""
        return self.out(jax.nn.gelu(self.hidden(z.reshape(len(z), -1))))


@dataclasses.dataclass(frozen=True)
class Matching:
    """Binary matching of the anchor and hard negatives, drawn by volume, with a small fusion head."""

    temperature: float = 0.07
    """Of the draw."""
    weight: float = 0.1

    def learned(self, modalities: int, dim: int, rngs: nnx.Rngs) -> MatchingHead:
        """The head."""
        return MatchingHead(modalities, dim, rngs=rngs)

    def __call__(self, batch: TermBatch, learned: MatchingHead) -> Float[Array, ""]:
        """`gramjax.losses.matching_loss` of own pairs, hard items and hard anchors."""
        z, where, anchor, ids, key = batch
        z = jnp.where(where[..., None], z, 0.0)
        others = [number for number in range(z.shape[1]) if number != anchor]
        text, items = z[:, anchor], z[:, jnp.array(others)]
        own, there = jnp.arange(len(z)), where[:, jnp.array(others)]
        options: dict[str, Any] = {"temperature": self.temperature, "query_where": where[:, anchor]}
        options |= {"gallery_where": there, "ids": ids}
        keys = jax.random.split(key)
        hard_items = streaming.sample_hard_negatives(keys[0], scores.Volume(), text, items, **options)
        hard_texts = streaming.sample_hard_negatives(keys[1], scores.Volume(), text, items, draw="queries", **options)
        texts = jnp.concatenate([own, own, hard_texts])
        matches = jnp.concatenate([own, hard_items, own])
        fused = learned(jnp.concatenate([text[texts][:, None], items[matches]], axis=1))
        labels = jnp.repeat(jnp.array([1, 0, 0]), len(z))
        valid = (texts >= 0) & (matches >= 0) & where[texts, anchor] & jnp.any(there[matches], axis=1)
        return losses.matching_loss(fused, labels, where=valid)


@dataclasses.dataclass(frozen=True)
class Contrast(_Fixed):
    """Any score contrasted over the batch, from the anchor alone or from every modality in turn."""

    score: scores.Score = dataclasses.field(default_factory=scores.Residual)
    every_anchor: bool = False

    def __call__(self, batch: TermBatch, learned: Any) -> Float[Array, ""]:
        """Mean over anchors of `gramjax.streaming.contrastive_nll`."""
        z, where, anchor, ids, _ = batch
        sign = 1.0 if self.score.higher_is_better else -1.0
        values = []
        for first in range(z.shape[1]) if self.every_anchor else (anchor,):
            others = jnp.array([number for number in range(z.shape[1]) if number != first])
            values.append(
                streaming.contrastive_nll(
                    self.score, z[:, first], z[:, others], scale=sign / self.temperature, query_where=where[:, first],
                    gallery_where=where[:, others], ids=ids,
                )
            )  # fmt: skip
        return jnp.mean(jnp.stack(values))


# Of a distance from a span: below, it is cancellation in float32.
SMALLEST = 1e-3


@dataclasses.dataclass(frozen=True)
class LogVolume(scores.Residual):
    """Logarithm of the volume with a bias for each item: `log Vol_ij - bias log Vol_j`, `Vol_j` of the item alone.

    With a bias of 1 the logarithm of the residual remains. Detached, the bias is a constant to the derivative: all of
    `log Vol_ij` is learned, but no item gains in the comparison by its own volume.
    """

    bias: float = 0.0
    detached: bool = False

    def prepare(self, gallery, where):
        """The span, and the logarithm of the volume in its place."""
        return super().prepare(gallery, where)._replace(volume=linalg.log_volume(gallery, where))

    def tile(self, queries, prepared):
        """`[q, n]`."""
        return self._log(super().tile(queries, prepared)) + self._own(prepared)[None, :]

    def pairs(self, queries, prepared):
        """`[n]`."""
        return self._log(super().pairs(queries, prepared)) + self._own(prepared)

    def _log(self, distance: Array) -> Array:
        return jnp.log(jnp.maximum(distance, SMALLEST))

    def _own(self, prepared: scores.Span) -> Array:
        bias = self.bias * prepared.volume
        return prepared.volume - (jax.lax.stop_gradient(bias) if self.detached else bias)


@dataclasses.dataclass(frozen=True)
class OwnVolume(_Fixed):
    """The mean volume of the modalities of an item but the anchor: the `D_j` of `gramjax.scores`.

    The temperature divides it.
    """

    def __call__(self, batch: TermBatch, learned: Any) -> Float[Array, ""]:
        """Mean over the items with two or more such modalities."""
        z, where, anchor, _, _ = batch
        others = jnp.array([number for number in range(z.shape[1]) if number != anchor])
        volumes = linalg.volume(z[:, others], where[:, others])
        there = jnp.sum(where[:, others], axis=1) >= 2
        number = jnp.maximum(jnp.sum(there), 1).astype(volumes.dtype)
        return jnp.sum(jnp.where(there, volumes, 0.0)) / number / self.temperature


def parameters(objective: Objective, *, modalities: int, dim: int, rngs: nnx.Rngs) -> nnx.Dict:
    """What the terms learn, by the term's number."""
    learned = {str(number): term.learned(modalities, dim, rngs) for number, term in enumerate(objective)}
    return nnx.Dict({name: module for name, module in learned.items() if module is not None})


def loss(
    objective: Objective,
    embeddings: Mapping[str, Float[Array, "batch dim"]],
    learned: Mapping[str, Any],
    *,
    anchor: str,
    where: Bool[Array, "batch modality"],
    ids: Int[Array, " batch"],
    key: Array,
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """The weighted sum, and the value of every term."""
    names = list(embeddings)
    batch = TermBatch(jnp.stack(list(embeddings.values()), axis=1), where, names.index(anchor), ids, key)
    values = {
        f"{number}/{type(term).__name__}": term.weight * term(batch, learned.get(str(number)))
        for number, term in enumerate(objective)
    }
    return jnp.sum(jnp.stack(list(values.values()))), values


def describe(objective: Objective) -> str:
    """The terms with their options, in a line."""
    return " + ".join(f"{term.weight:g} {_described(term)}" for term in objective)


def _described(value: Any) -> str:
    """A dataclass with those fields that are not as by default, less the weight, which stands before a term."""
    if not dataclasses.is_dataclass(value):
        return f"{value:g}" if isinstance(value, float) else str(value)
    fields = [(field, getattr(value, field.name)) for field in dataclasses.fields(value) if field.name != "weight"]
    chosen = [f"{field.name}={_described(given)}" for field, given in fields if given != field.default]
    return f"{type(value).__name__}({', '.join(chosen)})"

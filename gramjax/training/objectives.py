"""The published objectives of GRAM and PMRL, of a whole model and a batch of clips: for `make_train_step`.

Both add a tenth of a matching loss to a loss of the embeddings: the fusion tower reads each caption with its own clip
(a match), with a hard negative clip, and reads a hard negative caption with the clip (no matches).
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int

from gramjax import losses, stack_modalities
from gramjax.losses.pmrl import pmrl_terms
from gramjax.models import GramModel, LossParameters
from gramjax.scores import Cosine, Score, Volume
from gramjax.streaming import sample_hard_negatives

# What the published code adds to each probability of a hard negative.
FLOOR = 1e-4


def gram_objective(
    model: GramModel,
    loss_parameters: LossParameters,
    batch: Mapping[str, Any],
    rngs: nnx.Rngs | None,
    *,
    anchor: str = "caption",
    condition: Sequence[str] = ("vision", "audio"),
    label_smoothing: float = 0.1,
    matching_weight: float = 0.1,
    key: jax.Array | None = None,
    mesh: Mesh | None = None,
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """`1/2 (L_D2A + L_A2D) + 0.1 L_DAM` (GRAM, arXiv 2412.11959, equation 9): volumes, and matching.

    Hard negatives are drawn from the softmax of the negative volumes over the temperature, by the published rule
    (`sample_hard_negatives(floor=1e-4)`). The published code gathers candidates from all devices without their
    gradient; here volumes have the exact gradient of the loss of the whole batch.

    Args:
        model: with a fusion tower, unless `matching_weight` is 0.
        loss_parameters: whose temperature divides the volumes.
        batch: modalities as `GramModel.embed` reads them, `where` (modality -> bool [batch]: which rows have it;
            default all) and perhaps `index` ([batch] integers: rows with the same one are never each other's
            negatives), as `gramjax.data.clips.make_loader` makes it. What is absent is left out exactly, but for
            conditions: of those a clip is read with all tokens, also those of silence or black frames in the place
            of what it lacks, as in the published code. A clip without any of `condition` is matched with nothing.
        rngs: streams "dropout" and "negatives"; None for no dropout.
        anchor: the modality that the others are compared with: texts.
        condition: the modalities with which texts are matched, of those that the batch has.
        label_smoothing: of the contrastive loss.
        matching_weight: factor of the matching loss; 0 leaves it out.
        key: of the hard negatives; None: from `rngs`.
        mesh: over which the batch is divided, if it is. Negatives are then of the whole batch.

    Returns:
        The loss, and to log "loss/volume", "loss/matching", "accuracy/matching" and "temperature".

    Raises:
        ValueError: the batch lacks the anchor or all others, or nothing of `condition`; or as `GramModel.match`.

    >>> from gramjax.models import gram_tiny
    >>> def loss(batch):
    ...     model = GramModel(gram_tiny(), rngs=nnx.Rngs(0))
    ...     return gram_objective(model, LossParameters(), batch, nnx.Rngs(1))[0]
    >>> batch = {
    ...     "caption": {"ids": jnp.ones((2, 9), int), "mask": jnp.ones((2, 9), bool)},
    ...     "vision": jnp.zeros((2, 4, 42, 42, 3)),
    ...     "audio": jnp.zeros((2, 1, 64, 32)),
    ... }
    >>> jax.eval_shape(loss, batch).shape
    ()
    """
    encoded = _encode(model, batch, rngs, anchor, condition if matching_weight else ())
    temperature = jnp.asarray(loss_parameters.temperature)
    ids = _ids(batch)
    volume = losses.gram_loss(
        encoded.embeddings,
        temperature=temperature,
        label_smoothing=label_smoothing,
        where=encoded.where,
        ids=ids,
        mesh=mesh,
    )
    metrics = {"loss/volume": volume, "temperature": temperature}
    if not matching_weight:
        return volume, metrics
    negatives = _draw(
        _key(key, rngs),
        Volume(),
        encoded.embeddings[:, 0],
        encoded.embeddings[:, 1:],
        temperature=temperature,
        query_where=encoded.where[:, 0],
        # A clip that cannot be read is no negative either.
        gallery_where=encoded.where[:, 1:] & encoded.readable[:, None],
        ids=ids,
        mesh=mesh,
    )
    matching, accuracy = _match(model, batch[anchor], encoded, negatives, rngs)
    return volume + matching_weight * matching, metrics | {"loss/matching": matching, "accuracy/matching": accuracy}


def pmrl_objective(
    model: GramModel,
    loss_parameters: LossParameters,
    batch: Mapping[str, Any],
    rngs: nnx.Rngs | None,
    *,
    anchor: str = "caption",
    condition: Sequence[str] = ("vision", "audio"),
    alignment_temperature: float = 0.05,
    regularization_temperature: float = 0.1,
    regularization_weight: float = 1.0,
    matching_weight: float = 0.1,
    key: jax.Array | None = None,
    mesh: Mesh | None = None,
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """`L_M + L_M' + 0.1 L_IM` (PMRL, arXiv 2507.17343): alignment, regularisation and instance matching.

    The regularisation compares the instances of the whole batch, where the published code compares those of a device.
    Hard negatives are drawn, as there, by the cosine of the caption and the joint embedding of the condition (its
    own, if it is of one modality), through which no gradient goes: joint heads stay as they are, and so does the
    temperature, which this objective has no other use for.

    Args:
        model: with a fusion tower and a joint head for `condition`, unless `matching_weight` is 0.
        loss_parameters: whose temperature divides the cosines.
        batch: as for `gram_objective`.
        rngs: as for `gram_objective`.
        anchor: the modality that is matched with the others: texts.
        condition: the modalities with which texts are matched, of those that the batch has.
        alignment_temperature: of the softmax over singular values; 0.01 in pretraining, 0.05 in finetuning.
        regularization_temperature: of the softmax over instances.
        regularization_weight: factor of the regularisation.
        matching_weight: factor of the matching loss; 0 leaves it out.
        key: of the hard negatives; None: from `rngs`.
        mesh: over which the batch is divided, if it is. Negatives are then of the whole batch.

    Returns:
        The loss, and to log "loss/alignment", "loss/regularization", "loss/matching", "accuracy/matching" and
        "temperature".

    Raises:
        ValueError: as `gram_objective`, or the model has no joint head for the condition.
    """
    encoded = _encode(model, batch, rngs, anchor, condition if matching_weight else ())
    temperature = jnp.asarray(loss_parameters.temperature)
    ids = _ids(batch)
    alignment, regularization = pmrl_terms(
        encoded.embeddings,
        alignment_temperature=alignment_temperature,
        regularization_temperature=regularization_temperature,
        where=encoded.where,
        ids=ids,
        mesh=mesh,
    )
    loss = alignment + regularization_weight * regularization
    metrics = {"loss/alignment": alignment, "loss/regularization": regularization, "temperature": temperature}
    if not matching_weight:
        return loss, metrics
    negatives = _draw(
        _key(key, rngs),
        Cosine(),
        encoded.embeddings[:, 0],
        _joint(model, batch, encoded)[:, None],
        temperature=temperature,
        query_where=encoded.where[:, 0],
        gallery_where=encoded.readable[:, None],
        ids=ids,
        mesh=mesh,
    )
    matching, accuracy = _match(model, batch[anchor], encoded, negatives, rngs)
    return loss + matching_weight * matching, metrics | {"loss/matching": matching, "accuracy/matching": accuracy}


class _Encoded(NamedTuple):
    tokens: dict[str, Array]
    embeddings: Float[Array, "batch modality dim"]  # the anchor first
    where: Bool[Array, "batch modality"]
    condition: tuple[str, ...]
    readable: Bool[Array, " batch"]  # rows with something to read of the condition


class _Negatives(NamedTuple):
    """Indices into the whole batch, -1 for none."""

    items: Int[Array, " batch"]
    texts: Int[Array, " batch"]


def _encode(
    model: GramModel, batch: Mapping[str, Any], rngs: nnx.Rngs | None, anchor: str, condition: Sequence[str]
) -> _Encoded:
    tokens = model.encode(batch, rngs=rngs)
    if anchor not in tokens or len(tokens) < 2:
        raise ValueError(f"batch must have the anchor {anchor!r} and another modality, got {list(tokens)}")
    present = tuple(name for name in condition if name in tokens)
    if condition and not present:
        raise ValueError(f"batch must have something of condition {tuple(condition)}, got {list(tokens)}")
    masks = {name: jnp.asarray(mask) for name, mask in batch.get("where", {}).items() if name in tokens}
    order = [anchor, *(name for name in tokens if name != anchor)]
    embeddings, where = stack_modalities(model.project(tokens, batch), order=order, where=masks)
    readable = jnp.zeros(where.shape[:1], bool)
    for name in present:
        readable |= where[:, order.index(name)]
    return _Encoded(tokens, embeddings, where, present, readable)


def _ids(batch: Mapping[str, Any]) -> Array | None:
    return jnp.asarray(batch["index"]) if "index" in batch else None


def _joint(model: GramModel, batch: Mapping[str, Any], encoded: _Encoded) -> Float[Array, "batch dim"]:
    """The embedding of all that a clip is read with, for drawing negatives alone."""
    tokens = jax.lax.stop_gradient(encoded.tokens)
    if len(encoded.condition) == 1:
        return model.project({name: tokens[name] for name in encoded.condition}, batch)[encoded.condition[0]]
    name = next((name for name, joined in model.config.joint_heads.items() if joined == encoded.condition), None)
    if name is None:
        raise ValueError(
            f"condition must be one modality, or what a joint head of the model joins ({model.config.joint_heads}), "
            f"got {encoded.condition}"
        )
    return model.project_joint(tokens, batch)[name]


def _key(key: jax.Array | None, rngs: nnx.Rngs | None) -> jax.Array:
    if key is not None:
        return key
    if rngs is None:
        raise ValueError("key must be given if rngs is None: hard negatives are drawn at random")
    return rngs.negatives()


def _draw(key: jax.Array, score: Score, queries: Array, gallery: Array, **options: Any) -> _Negatives:
    """A hard negative clip for each text, and a hard negative text for each clip."""
    keys = jax.random.split(key)
    return _Negatives(
        items=sample_hard_negatives(keys[0], score, queries, gallery, draw="items", floor=FLOOR, **options),
        texts=sample_hard_negatives(keys[1], score, queries, gallery, draw="queries", floor=FLOOR, **options),
    )


def _match(
    model: GramModel, texts: Mapping[str, Any], encoded: _Encoded, negatives: _Negatives, rngs: nnx.Rngs | None
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """The matching loss, and the share of pairs that are told right."""
    condition = model.condition(encoded.tokens, encoded.condition)
    texts = {name: jnp.asarray(texts[name]) for name in ("ids", "mask")}
    other_texts = {name: _rows(values, negatives.texts) for name, values in texts.items()}
    # A clip's own text and its negative one side by side: keys and values of the clip are made once for both.
    both = {
        name: rearrange(jnp.stack([values, other_texts[name]], axis=1), "b two l -> (b two) l")
        for name, values in texts.items()
    }
    own = rearrange(model.match(both, condition, rngs=rngs), "(b two) c -> two b c", two=2)
    other = model.match(texts, _rows(condition, negatives.items), rngs=rngs)
    logits = jnp.concatenate([own[0], other, own[1]])
    paired = encoded.where[:, 0] & encoded.readable
    where = jnp.concatenate([paired, negatives.items >= 0, negatives.texts >= 0])
    labels = (jnp.arange(len(where)) < len(paired)).astype(jnp.int32)
    right = (jnp.argmax(logits, axis=1) == labels) & where
    accuracy = jnp.sum(right).astype(jnp.float32) / jnp.maximum(jnp.sum(where), 1).astype(jnp.float32)
    return losses.matching_loss(logits, labels, where=where), accuracy


def _rows(array: Array, indices: Int[Array, " batch"]) -> Array:
    """Rows of the whole batch, from whichever device; some row in the place of none."""
    return jnp.take(array, jnp.maximum(indices, 0), axis=0, mode="clip")

"""The objective of a run against the losses it is the sum of."""

import functools

import jax
import numpy as np
from flax import nnx

from experiments import objective
from experiments.config import PMRL, Contrastive, Objective, Sigmoid
from gramjax import losses

EVERY_TERM = Objective(
    gram=Contrastive(0.5, temperature=0.3, label_smoothing=0.1),
    cone=Contrastive(0.8, temperature=0.35, label_smoothing=0.12),
    pmrl=PMRL(0.3, alignment_temperature=0.2, regularization_temperature=0.4, regularization_weight=0.7),
    anchored_infonce=Contrastive(0.2, temperature=0.2, learn_temperature=False, label_smoothing=0.2),
    pairwise_infonce=Contrastive(0.7, temperature=0.6, label_smoothing=0.15),
    sigmoid=Sigmoid(0.4, temperature=0.25, bias=-3.0),
    triangle=Contrastive(0.6, temperature=0.5, label_smoothing=0.05),
    symile=Contrastive(0.9, temperature=0.7, label_smoothing=0.25),
)


def direct_terms(a, b, c, where, ids, key):
    """What `EVERY_TERM` says, in words of the losses; the second modality is the anchor."""
    z = jax.numpy.stack([a, b, c], axis=1)
    rows = {"where": where, "ids": ids}
    sigmoid = [
        losses.sigmoid_loss(z[:, i], z[:, j], temperature=0.25, bias=-3.0, where=where[:, i] & where[:, j], ids=ids)
        for i, j in ((0, 1), (0, 2), (1, 2))
    ]
    return {
        "gram": losses.gram_loss(z, anchor=1, temperature=0.3, label_smoothing=0.1, **rows),
        "cone": losses.cone_loss(z, anchor=1, temperature=0.35, label_smoothing=0.12, **rows),
        "pmrl": losses.alignment_loss(z, temperature=0.2, where=where)
        + 0.7 * losses.direction_regularization(z, temperature=0.4, **rows),
        "anchored_infonce": losses.anchored_infonce_loss(z, anchor=1, temperature=0.2, label_smoothing=0.2, **rows),
        "pairwise_infonce": losses.pairwise_infonce_loss(z, temperature=0.6, label_smoothing=0.15, **rows),
        "sigmoid": sum(sigmoid) / 3,
        "triangle": losses.triangle_loss(z, anchor=1, temperature=0.5, label_smoothing=0.05, **rows),
        "symile": losses.symile_loss(z, temperature=0.7, label_smoothing=0.25, key=key, **rows),
    }


def test_every_term_is_its_loss_with_its_options():
    vectors = np.random.default_rng(0).normal(size=(3, 6, 8)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=-1, keepdims=True)
    a, b, c = map(jax.numpy.asarray, vectors)
    ids, key = jax.numpy.array([0, 1, 2, 0, 3, 1]), jax.random.key(0)
    embeddings = {"english": a, "twitter": b, "speech": c}
    where = np.ones((6, 3), bool)
    where[4, 0] = where[2, 2] = False
    masks = {name: jax.numpy.asarray(column) for name, column in zip(embeddings, where.T) if not column.all()}
    graphdef, scalars = nnx.split(objective.parameters(EVERY_TERM))

    @functools.partial(jax.value_and_grad, has_aux=True)
    def total_loss(scalars):
        learned = nnx.merge(graphdef, scalars)
        return objective.loss(EVERY_TERM, embeddings, learned, anchor="twitter", ids=ids, key=key, where=masks)

    (total, logged), gradient = jax.jit(total_loss)(scalars)
    expected = jax.jit(direct_terms)(a, b, c, where, ids, key)
    assert {name.removeprefix("loss/") for name in logged if name.startswith("loss/")} == set(expected)
    for name, value in expected.items():
        np.testing.assert_allclose(logged[f"loss/{name}"], value, rtol=1e-5, err_msg=name)
    weights = {"gram": 0.5, "pmrl": 0.3, "anchored_infonce": 0.2, "pairwise_infonce": 0.7, "sigmoid": 0.4}
    weights |= {"triangle": 0.6, "symile": 0.9, "cone": 0.8}
    np.testing.assert_allclose(total, sum(weights[name] * value for name, value in expected.items()), rtol=1e-5)
    assert logged["temperature/anchored_infonce"] == np.float32(0.2)
    # Every scalar that is learned moves; what PMRL and the anchored term compare with is constant.
    learned = {path for path, value in nnx.to_flat_state(gradient) if value[...] != 0}
    assert learned == {
        *((name, "log_temperature") for name in ("gram", "cone", "pairwise_infonce", "sigmoid", "triangle", "symile")),
        ("sigmoid", "bias"),
    }

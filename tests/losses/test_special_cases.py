"""What is particular to one loss: hand-computed values, limits, options."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gramjax import losses
from tests import reference


def _unit(seed=0, *, batch=6, k=3, d=8):
    return reference.unit(np.random.default_rng(seed), batch, k, d)


def _jitted(loss, **options):
    return jax.jit(functools.partial(loss, **options))


def test_gram_by_hand():
    """Two fully aligned items along orthogonal axes, with two and with three modalities."""
    z = jnp.tile(jnp.eye(2)[:, None], (1, 2, 1))  # volume 0 on the diagonal, 1 off it
    loss = _jitted(losses.gram_loss, temperature=0.5)
    np.testing.assert_allclose(loss(z), math.log1p(math.exp(-2)), rtol=1e-6)
    z = jnp.tile(jnp.eye(2)[:, None], (1, 3, 1))  # an item whose own volume is 0 has volume 0 with every query
    np.testing.assert_allclose(loss(z), math.log(2), rtol=1e-6)


def test_alignment_saturates_without_vanishing(x64):
    """Its value falls as exp(-gap / temperature), far below the rounding of 1."""
    a, b = np.cos(0.5), np.sin(0.5)
    z = jnp.asarray([[[1.0, 0.0], [a, b]]])
    values = np.linalg.svd(np.asarray(z[0]), compute_uv=False)
    expected = math.exp(-(values[0] - values[1]) / 0.01)
    assert expected < 1e-30
    value, gradient = jax.jit(jax.value_and_grad(losses.alignment_loss))(z, temperature=0.01)
    np.testing.assert_allclose(value, expected, rtol=1e-9)
    assert np.any(gradient)


def test_alignment_gradient_drives_towards_rank_one(x64):
    z = jnp.asarray(_unit())
    loss = jax.jit(jax.value_and_grad(losses.alignment_loss))
    value, gradient = loss(z, temperature=0.5)
    assert loss(z - 0.01 * gradient, temperature=0.5)[0] < value


def test_pmrl_is_the_weighted_sum_of_its_terms(x64):
    z = jnp.asarray(_unit())
    where = jnp.asarray(np.random.default_rng(2).random((6, 3)) < 0.6)
    for reduction in ("mean", "sum", None):
        total = _jitted(
            losses.pmrl_loss, alignment_temperature=0.3, regularization_temperature=0.2, regularization_weight=0.7,
            where=where, reduction=reduction,
        )(z)  # fmt: skip
        aligned = _jitted(losses.alignment_loss, temperature=0.3, where=where, reduction=reduction)(z)
        apart = _jitted(losses.direction_regularization, temperature=0.2, where=where, reduction=reduction)(z)
        np.testing.assert_allclose(total, aligned + 0.7 * apart, rtol=1e-12)


def test_ids_remove_false_negatives(x64):
    """Two copies of every example with the ids said: each copy's loss is that of the batch without copies."""
    z = _unit()
    twice, ids = jnp.asarray(np.concatenate([z, z])), jnp.tile(jnp.arange(6), 2)
    loss = _jitted(losses.infonce_loss, reduction=None)
    alone = loss(jnp.asarray(z[:, 0]), jnp.asarray(z[:, 1]))
    copied = loss(twice[:, 0], twice[:, 1], ids=ids)
    assert not np.allclose(copied[:6], alone)  # The other five examples are there twice.
    logits = z[:, 0] @ z[:, 1].T / 0.07
    for i in range(6):
        others = [logits[i, j] for j in range(6) if j != i]
        back = [logits[j, i] for j in range(6) if j != i]
        expected = (reference.softmax_nll(logits[i, i], others * 2) + reference.softmax_nll(logits[i, i], back * 2)) / 2
        np.testing.assert_allclose(copied[i], expected, rtol=1e-9)


def test_symile_shuffled_negatives_are_drawn_from_the_batch(x64):
    z = _unit(batch=5)
    key = jax.random.key(3)
    shuffled = _jitted(losses.symile_loss, reduction=None)
    loss = shuffled(jnp.asarray(z), key=key)
    terms = []
    for anchor in range(3):
        others = [l for l in range(3) if l != anchor]
        keys = jax.random.split(jax.random.fold_in(key, anchor), 2)
        rows = np.stack([np.asarray(jax.random.permutation(k, 5)) for k in keys], axis=1)
        for column in rows.T:
            assert sorted(column) == list(range(5))
        term = []
        for i in range(5):
            own = z[i, anchor] @ (z[i, others[0]] * z[i, others[1]]) / 0.1
            negatives = [
                z[i, anchor] @ (z[a, others[0]] * z[b, others[1]]) / 0.1 for a, b in rows if not (a == i and b == i)
            ]
            term.append(reference.softmax_nll(own, negatives))
        terms.append(term)
    np.testing.assert_allclose(loss, np.mean(terms, axis=0), rtol=1e-9)
    assert not np.allclose(loss, shuffled(jnp.asarray(z), key=jax.random.key(4)))


def test_triangle_without_the_square_root(x64):
    z = _unit()
    everything, ids = np.ones((6, 3), bool), np.arange(6)

    def twice_the_square(query, item):
        return -2 * reference.triangle_area(query, *item) ** 2

    expected = reference.anchored(twice_the_square, z, everything, 0, 0.07, ids, 0.0, complete=True)
    np.testing.assert_allclose(
        losses.triangle_loss(jnp.asarray(z), square_root=False, reduction=None), expected, rtol=1e-9
    )


@pytest.mark.parametrize("weights", [None, [1.0, 2.0, 0.0]])
def test_matching(weights, x64):
    logits = np.random.default_rng(0).normal(size=(3, 2))
    labels, where = np.array([1, 0, 1]), np.array([True, True, False])
    expected = np.array([np.logaddexp(*logits[i]) - logits[i, labels[i]] for i in range(3)])
    expected[2] = np.nan
    weight = None if weights is None else jnp.asarray(weights)
    result = losses.matching_loss(jnp.asarray(logits), jnp.asarray(labels), where=jnp.asarray(where), weights=weight)
    np.testing.assert_allclose(result, reference.reduce_mean(expected, weights), rtol=1e-12)
    nothing = losses.matching_loss(jnp.asarray(logits), jnp.asarray(labels), where=jnp.zeros(3, bool))
    assert nothing == 0


def test_learnable_temperature_and_bias_have_gradients(x64):
    a, b = jnp.asarray(_unit(0, k=1)[:, 0]), jnp.asarray(_unit(1, k=1)[:, 0])

    def loss(temperature, bias):
        return losses.sigmoid_loss(a, b, temperature=temperature, bias=bias)

    gradients = jax.grad(loss, argnums=(0, 1))(0.3, -1.0)
    step = 1e-6
    numeric = (
        (loss(0.3 + step, -1.0) - loss(0.3 - step, -1.0)) / (2 * step),
        (loss(0.3, -1.0 + step) - loss(0.3, -1.0 - step)) / (2 * step),
    )
    np.testing.assert_allclose(gradients, numeric, rtol=1e-6)


def test_detached_candidates_leave_the_value_and_halve_the_paths(x64):
    z = jnp.asarray(_unit())
    value, gradient = jax.jit(jax.value_and_grad(losses.gram_loss))(z)
    cut_value, cut = jax.jit(jax.value_and_grad(lambda z: losses.gram_loss(z, detach_candidates=True)))(z)
    np.testing.assert_allclose(cut_value, value, rtol=1e-12)
    assert not np.allclose(cut, gradient)


def test_gradients_of_tiles_have_gradients(x64):
    """A penalty on the gradient, as meta-learning has it: by tiles what it is by the whole matrix."""

    def penalty(z, block_size):
        gradient = jax.grad(lambda z: losses.gram_loss(z, temperature=0.3, block_size=block_size))(z)
        return jnp.sum(jnp.square(gradient))

    gradient = jax.jit(jax.grad(penalty), static_argnums=1)
    z = jnp.asarray(_unit())
    np.testing.assert_allclose(gradient(z, 4), gradient(z, None), rtol=1e-9, atol=1e-12)

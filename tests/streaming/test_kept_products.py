"""Matrix products kept for the gradient of a loss: faster, and otherwise as if there were none."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from gramjax import losses, scores
from gramjax.streaming import contrastive_nll, nll
from tests import jaxprs
from tests.streaming.batches import assert_close, cast, random_batch, value_and_gradients

PRODUCT_SCORES = (
    scores.Cosine(), scores.LeadingDirection(), scores.Multilinear(), scores.Residual(), scores.Volume(),
    scores.Triangle(), scores.Cone(),
)  # fmt: skip


@pytest.fixture
def always_tiled(monkeypatch):
    """Tiles of 5 x 7 of every batch, chosen by the loss itself, which then may keep their products."""
    monkeypatch.setattr(nll, "_WHOLE", 0)
    monkeypatch.setattr(nll, "_TILE", (5, 7))


def _chosen(score, detach=False):
    """Compiled anew, with what the fixture has set."""
    return jax.jit(functools.partial(value_and_gradients.__wrapped__, score=score, block_size=None, detach=detach))


@pytest.mark.usefixtures("always_tiled")
@pytest.mark.parametrize("score", PRODUCT_SCORES, ids=repr)
@pytest.mark.parametrize("items", [31, pytest.param(24, marks=pytest.mark.slow)])
def test_kept_products_change_nothing(score, items, x64):
    batch = random_batch(items=items)
    scale = 10.0 if score.higher_is_better else -10.0
    tiled = value_and_gradients(batch, scale, score, 5)
    assert_close(_chosen(score)(batch, scale), tiled, 1e-12)


class _Doubled(scores.Volume):
    """A score that changes the tile of another, which products know nothing of."""

    def tile(self, queries, prepared):
        return 2.0 * super().tile(queries, prepared)

    def pairs(self, queries, prepared):
        return 2.0 * super().pairs(queries, prepared)


@pytest.mark.usefixtures("always_tiled")
def test_a_tile_of_ones_own_is_used(x64):
    batch = random_batch()
    expected, *_ = _chosen(scores.Volume())(batch, -20.0)
    assert_close(_chosen(_Doubled())(batch, -10.0)[0], expected, 1e-12)


@pytest.mark.usefixtures("always_tiled")
def test_kept_products_with_detached_candidates(x64):
    batch = random_batch()
    tiled = value_and_gradients(batch, -10.0, scores.Volume(), 5, detach=True)
    assert_close(_chosen(scores.Volume(), detach=True)(batch, -10.0), tiled, 1e-12)


@pytest.mark.usefixtures("always_tiled")
def test_kept_products_under_vmap():
    batch = cast(random_batch(m=1), jnp.float32)
    loss = functools.partial(contrastive_nll, scores.Cosine(), scale=5.0)
    pair = jnp.stack([batch["queries"], batch["queries"][::-1]])
    mapped = jax.jit(jax.vmap(jax.value_and_grad(loss), (0, None)))(pair, batch["gallery"])
    single = [jax.jit(jax.value_and_grad(loss))(queries, batch["gallery"]) for queries in pair]
    assert_close(mapped, jax.tree.map(lambda *x: jnp.stack(x), *single), 1e-6)


@pytest.mark.parametrize("order", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_higher_derivatives_in_tiles(order, x64, monkeypatch):
    """Of a score that is not linear in its products; the losses are in `tests/losses/test_tiles_and_devices.py`."""
    score, batch = scores.Volume(), random_batch()
    rng = np.random.default_rng(1)
    directions = [jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape)), batch) for _ in range(order - 1)]

    def derivatives(block_size):
        def function(queries, gallery, scale):
            return contrastive_nll(score, queries, gallery, scale=scale, block_size=block_size)

        for along in directions:
            function = functools.partial(
                lambda inner, along, queries, gallery, scale: sum(
                    jnp.vdot(along[name], gradient)
                    for name, gradient in zip(
                        ("queries", "gallery"), jax.grad(inner, (0, 1))(queries, gallery, scale), strict=True
                    )
                ),
                function,
                along,
            )
        return jax.jit(jax.grad(function, (0, 1, 2)))(batch["queries"], batch["gallery"], -10.0)

    whole = derivatives(None)
    assert_close(derivatives(5), whole, 1e-11)
    monkeypatch.setattr(nll, "_WHOLE", 0)
    monkeypatch.setattr(nll, "_TILE", (5, 7))
    assert_close(derivatives(None), whole, 1e-11)


@pytest.mark.usefixtures("always_tiled")
def test_kept_products_of_arrays_that_are_the_same_on_an_explicit_mesh():
    batch = cast(random_batch(m=1), jnp.float32)

    def gradient():
        # Traced anew under each mesh.
        return jax.jit(jax.grad(lambda queries, gallery: contrastive_nll(scores.Cosine(), queries, gallery, scale=5.0)))

    expected = gradient()(batch["queries"], batch["gallery"])
    mesh = jax.make_mesh((4,), ("rows",), axis_types=(AxisType.Explicit,))
    with jax.set_mesh(mesh):
        inputs = jax.device_put((batch["queries"], batch["gallery"]), NamedSharding(mesh, PartitionSpec()))
        assert_close(gradient()(*inputs), expected, 1e-6)


@pytest.mark.usefixtures("always_tiled")
def test_products_are_kept_on_one_device_only():
    def tiles(**options):
        gradient = jax.grad(functools.partial(losses.gram_loss, **options))
        shapes = jaxprs.shapes(gradient, jax.ShapeDtypeStruct((60, 3, 8), jnp.float32))
        return [shape for shape in shapes if len(shape) == 3 and shape[1:] == (5, 7) and shape[0] > 1]

    assert tiles()
    assert not tiles(mesh=jax.make_mesh((4,), ("rows",)))
    assert not tiles(block_size=7)


@pytest.mark.parametrize(("block_size", "products"), [(None, 3), (10, 4)])
def test_kept_products_are_not_computed_again(block_size, products, monkeypatch):
    monkeypatch.setattr(nll, "_WHOLE", 0)
    monkeypatch.setattr(nll, "_TILE", (10, 10))
    z = jnp.zeros((30, 3, 8))

    def loss(z):
        return contrastive_nll(scores.Volume(), z[:, 0], z[:, 1:], scale=-10.0, block_size=block_size)

    compiled = jax.jit(jax.value_and_grad(loss)).lower(z).compile().as_text()
    tiles = re.findall(r"= f32\[10,(?:10|8)\]\S* (?:dot|custom-call)\(", compiled)
    assert len(tiles) == 2 * products


def _kept_bytes(loss, batch, k):
    pull = jax.eval_shape(lambda z: jax.vjp(loss, z)[1], jax.ShapeDtypeStruct((batch, k, 8), jnp.float32))
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(pull))


@pytest.mark.parametrize(
    ("loss", "k", "most"),
    [(losses.gram_loss, 5, 4096), (losses.gram_loss, 3, 5120), (losses.pairwise_infonce_loss, 3, 4608)],
)
def test_products_are_kept_up_to_a_limit(loss, k, most):
    few = _kept_bytes(functools.partial(loss, block_size=512), most, k)
    kept = _kept_bytes(loss, most, k) - few
    assert nll.KEPT / 2 < kept <= nll.KEPT
    assert _kept_bytes(loss, most + 1024, k) < 2 * few

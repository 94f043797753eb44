"""Bad input fails before any work, with a message that names the argument, what came and what was needed."""

import fractions
import functools
import inspect
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from gramjax import linalg, losses, scores, stack_modalities
from gramjax.streaming import _tiles, contrastive_nll, sigmoid_nll

STACKED = [
    losses.gram_loss,
    losses.cone_loss,
    losses.triangle_loss,
    losses.anchored_infonce_loss,
    losses.pairwise_infonce_loss,
    losses.symile_loss,
    losses.alignment_loss,
    losses.direction_regularization,
    losses.pmrl_loss,
]
TOWERS = [losses.infonce_loss, losses.sigmoid_loss]
EVERY = [*STACKED, *TOWERS]

pytestmark = pytest.mark.usefixtures("unchecked_signatures")


def _inputs(loss):
    return (jnp.ones((4, 3, 8)),) if loss in STACKED else (jnp.ones((4, 8)), jnp.ones((4, 8)))


def _with(option):
    return [loss for loss in EVERY if option in inspect.signature(loss).parameters]


def _name(loss):
    return loss.__name__


@pytest.mark.parametrize("loss", STACKED, ids=_name)
def test_shape_and_dtype_of_embeddings(loss):
    with pytest.raises(ValueError, match=r"embeddings must have shape \[batch, modality, dim\], got shape \(4, 8\)"):
        loss(jnp.ones((4, 8)))
    with pytest.raises(TypeError, match=r"embeddings must have a floating-point dtype, got int32 of shape \(4, 3, 8\)"):
        loss(jnp.ones((4, 3, 8), jnp.int32))
    with pytest.raises(TypeError, match="embeddings must have a floating-point dtype, got complex64"):
        loss(jnp.ones((4, 3, 8), jnp.complex64))
    with pytest.raises(
        TypeError, match=r"embeddings must be one array, got a mapping of \['text'\]; .*stack_modalities"
    ):
        loss({"text": jnp.ones((4, 8))})
    with pytest.raises(TypeError, match="embeddings must be an array, got NoneType"):
        loss(None)


@pytest.mark.parametrize("loss", [l for l in STACKED if l is not losses.direction_regularization], ids=_name)
def test_too_few_modalities(loss):
    with pytest.raises(ValueError, match=r"embeddings must have at least [23] modalities.*got shape \(4, 1, 8\)"):
        loss(jnp.ones((4, 1, 8)))


@pytest.mark.parametrize("loss", EVERY, ids=_name)
def test_nothing_is_computed_before_the_options_are_checked(loss, monkeypatch):
    def compute(*_):
        raise AssertionError("too early")

    monkeypatch.setattr(linalg, "spectrum", compute)
    monkeypatch.setattr(_tiles, "item_by_item", compute)
    monkeypatch.setattr(scores.Multilinear, "prepare", compute)
    wrong = {
        "where": 3.0, "weights": jnp.ones(3), "ids": jnp.ones(3, jnp.int32), "reduction": "average", "block_size": 0,
        "axis_name": "data", "mesh": 3, "label_smoothing": 2.0, "temperature": 0.0, "regularization_temperature": 0.0,
        "alignment_temperature": 0.0, "regularization_weight": "1", "bias": "1", "anchor": 9, "key": 3,
    }  # fmt: skip
    known = inspect.signature(loss).parameters
    for name, value in wrong.items():
        if name in known:
            with pytest.raises((TypeError, ValueError), match=rf"^{name} must"):
                loss(*_inputs(loss), **{name: value})
    others = set(known) - set(wrong)
    assert others <= {"embeddings", "a", "b", "square_root", "precision", "detach_candidates"}
    with pytest.raises(AssertionError, match="too early"):
        loss(*_inputs(loss))


def test_cones_of_too_many():
    with pytest.raises(ValueError, match=r"embeddings must have at most 7 modalities .*got shape \(4, 8, 8\)"):
        losses.cone_loss(jnp.ones((4, 8, 8)))


def test_triangle_needs_exactly_three():
    with pytest.raises(ValueError, match=r"exactly 3 modalities .*got shape \(4, 4, 8\)"):
        losses.triangle_loss(jnp.ones((4, 4, 8)))


@pytest.mark.parametrize("loss", TOWERS, ids=_name)
def test_shape_and_dtype_of_towers(loss):
    with pytest.raises(ValueError, match=r"a must have shape \[batch, dim\], got shape \(4, 3, 8\)"):
        loss(jnp.ones((4, 3, 8)), jnp.ones((4, 8)))
    with pytest.raises(ValueError, match=r"a and b must have the same shape.*\(4, 8\) and \(5, 8\)"):
        loss(jnp.ones((4, 8)), jnp.ones((5, 8)))
    with pytest.raises(TypeError, match="b must have a floating-point dtype, got int32"):
        loss(jnp.ones((4, 8)), jnp.ones((4, 8), jnp.int32))


@pytest.mark.parametrize("loss", EVERY, ids=_name)
def test_masks_weights_and_reduction(loss):
    inputs = _inputs(loss)
    needed = r"\(4, 3\)" if loss in STACKED else r"\(4,\)"
    with pytest.raises(ValueError, match=rf"where must have shape .* = {needed}, got shape \(4, 9\)"):
        loss(*inputs, where=jnp.ones((4, 9), bool))
    with pytest.raises(TypeError, match=rf"where must be a bool array of shape .* = {needed}, got dtype float32"):
        loss(*inputs, where=jnp.ones((4, 3)))
    with pytest.raises(ValueError, match=r"weights must have shape \[batch\] = \(4,\), got shape \(3,\)"):
        loss(*inputs, weights=jnp.ones(3))
    with pytest.raises(TypeError, match=r"weights must be real numbers.*got dtype bool"):
        loss(*inputs, weights=jnp.ones(4, bool))
    with pytest.raises(ValueError, match='reduction must be "mean", "sum" or None, got \'average\''):
        loss(*inputs, reduction="average")


@pytest.mark.parametrize("loss", _with("ids"), ids=_name)
def test_ids(loss):
    unsigned = np.array([2**32 - 1, 1, 2, 3], np.uint32)  # JAX compares it with signed ones as if it were -1
    with pytest.raises(ValueError, match=r"ids must fit int32, got 4294967295"):
        loss(*_inputs(loss), ids=unsigned)
    known = jax.jit(lambda *inputs: loss(*inputs, ids=np.arange(4, dtype=np.uint32)))  # and constant
    assert jnp.isfinite(known(*_inputs(loss)))
    with pytest.raises(TypeError, match=r"ids must be an array of integers, got list"):
        loss(*_inputs(loss), ids=[{}, {}, {}, {}])
    large = 2**32 + np.arange(4)  # JAX itself would take them for 0, 1, 2, 3
    with pytest.raises(ValueError, match=r"ids must fit int32 unless jax_enable_x64 is on, got 4294967296"):
        loss(*_inputs(loss), ids=large)
    with jax.enable_x64(True):
        assert jnp.isfinite(jax.jit(functools.partial(loss, ids=large))(*_inputs(loss)))
    with pytest.raises(ValueError, match=r"ids must have shape \[batch\] = \(4,\), got shape \(4, 1\)"):
        loss(*_inputs(loss), ids=jnp.ones((4, 1), jnp.int32))


@pytest.mark.parametrize(
    ("loss", "name"),
    [
        (loss, name)
        for name in ("temperature", "alignment_temperature", "regularization_temperature")
        for loss in _with(name)
    ],
    ids=lambda value: value if isinstance(value, str) else _name(value),
)
def test_temperature(loss, name):
    for value in (0, 0.0, -1.0, float("nan"), float("inf"), jnp.float32(0.0), 1e-39, 1e39):
        with pytest.raises(
            ValueError, match=rf"{name} must be positive and finite, got {re.escape(str(float(value)))}"
        ):
            loss(*_inputs(loss), **{name: value})
    with pytest.raises(TypeError, match=rf"{name} must be a real scalar, got str"):
        loss(*_inputs(loss), **{name: "0.1"})
    with pytest.raises(ValueError, match=rf"{name} must be a scalar, got shape \(2,\)"):
        loss(*_inputs(loss), **{name: jnp.ones(2)})
    traced = jax.jit(lambda t: loss(*_inputs(loss), **{name: t}))
    assert jnp.isfinite(traced(0.3))


@pytest.mark.parametrize("loss", _with("label_smoothing"), ids=_name)
def test_label_smoothing(loss):
    for value in (1.0, -0.1, float("nan")):
        with pytest.raises(ValueError, match=rf"label_smoothing must be in \[0, 1\), got {value}"):
            loss(*_inputs(loss), label_smoothing=value)
    for value, kind in (("0.1", "str"), (None, "NoneType"), (jnp.float32(0.1), "ArrayImpl")):
        with pytest.raises(TypeError, match=rf"label_smoothing must be a Python number in \[0, 1\), got {kind}"):
            loss(*_inputs(loss), label_smoothing=value)


@pytest.mark.parametrize("loss", _with("anchor"), ids=_name)
def test_anchor(loss):
    for value in (3, -4):
        with pytest.raises(ValueError, match=rf"anchor must index the modality axis of size 3, got {value}"):
            loss(*_inputs(loss), anchor=value)
    with pytest.raises(TypeError, match="anchor must be an integer, got float"):
        loss(*_inputs(loss), anchor=1.0)
    with pytest.raises(TypeError, match=r"anchor must be an integer, got a traced value \(see static_argnames\)"):
        jax.jit(loss)(*_inputs(loss), anchor=1)


@pytest.mark.parametrize("loss", _with("weights"), ids=_name)
def test_weights_are_finite_and_not_negative(loss):
    meshes = [{}, {"mesh": jax.make_mesh((2,), ("data",))}] if loss in _with("mesh") else [{}]
    for wrong, mesh in itertools.product((-1.0, float("nan"), float("inf")), meshes):
        with pytest.raises(ValueError, match=rf"weights must be finite and not negative, got {wrong} among them"):
            loss(*_inputs(loss), weights=jnp.array([1.0, wrong, 0.0, 2.0]), **mesh)


@pytest.mark.parametrize("loss", _with("mesh"), ids=_name)
def test_what_cannot_be_an_axis_or_a_block(loss):
    with pytest.raises(TypeError, match="axis_name must be the name of a mesh axis or a tuple of names, got 3"):
        loss(*_inputs(loss), axis_name=3)
    if loss in _with("block_size"):
        with pytest.raises(
            TypeError, match=r"block_size must be an integer of at least 1, or None, got a traced value"
        ):
            jax.jit(loss)(*_inputs(loss), block_size=2)
    if loss in _with("ids"):
        with pytest.raises(TypeError, match=r"ids must be an array, got list"):
            loss(*_inputs(loss), ids=["dog", "cat", "owl", "ant"], mesh=jax.make_mesh((2,), ("data",)))


def test_arrays_divided_over_explicit_axes_need_the_mesh():
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Explicit,))
    with jax.set_mesh(mesh):
        z = jax.device_put(jnp.ones((4, 3, 8)), NamedSharding(mesh, PartitionSpec("data")))
        with pytest.raises(ValueError, match=r"mesh must be given .* shape \(4, 8\) divided over \['data'\]"):
            losses.gram_loss(z)
        assert jnp.isfinite(jax.jit(functools.partial(losses.gram_loss, mesh=mesh))(z))


@pytest.mark.parametrize("loss", _with("mesh"), ids=_name)
def test_known_temperatures_are_checked_over_a_mesh_too(loss):
    names = [name for name in inspect.signature(loss).parameters if name.endswith("temperature")]
    for name in names:
        with pytest.raises(ValueError, match=rf"{name} must be positive and finite, got -1.0"):
            loss(*_inputs(loss), mesh=jax.make_mesh((2,), ("data",)), **{name: jnp.float32(-1)})


@pytest.mark.parametrize("loss", _with("block_size"), ids=_name)
def test_whatever_counts_as_a_number_is_taken(loss, x64):
    given = [{"block_size": jnp.int32(2)}, {"block_size": np.int64(2)}]
    if "label_smoothing" in inspect.signature(loss).parameters:
        given += [{"label_smoothing": np.float64(0.1)}, {"label_smoothing": fractions.Fraction(1, 10)}]
    inputs = tuple(x.astype(jnp.float32) for x in _inputs(loss))
    for options in given:
        result = jax.eval_shape(functools.partial(loss, **options), *inputs)
        assert result.dtype == jnp.float32


@pytest.mark.parametrize("loss", _with("mesh"), ids=_name)
def test_lengths_are_those_of_the_whole_batch(loss):
    mesh = jax.make_mesh((2,), ("data",))
    with pytest.raises(ValueError, match=r"weights must have the first axis of \w+, of size 4, got shape \(2,\)"):
        loss(*_inputs(loss), weights=jnp.ones(2), mesh=mesh)
    with pytest.raises(ValueError, match=r"(embeddings|a) must have shape .*, got shape \((2|4),\)") as caught:
        loss(*(x[:, 0] if x.ndim == 2 else x[:, 0, 0] for x in _inputs(loss)), mesh=mesh)
    note = "Shapes in it are those on one of the 2 devices that divide the batch."
    said = note in getattr(caught.value, "__notes__", [])
    assert said == ("got shape (2,)" in str(caught.value))
    with pytest.raises(
        TypeError, match=r"axis_name must be the name of a mesh axis or a tuple of names, got \['data'\]"
    ):
        loss(*_inputs(loss), mesh=mesh, axis_name=["data"])


def test_lengths_of_a_longer_gallery():
    queries, gallery, mesh = jnp.ones((4, 8)), jnp.ones((8, 2, 8)), jax.make_mesh((2,), ("data",))
    call = functools.partial(contrastive_nll, scores.Cosine(), queries, gallery, scale=1.0, mesh=mesh)
    for wrong, message in (
        ({"gallery_where": jnp.ones((4, 2), bool)}, r"gallery_where must have the first axis of gallery, of size 8"),
        ({"ids": jnp.arange(4)}, r"ids must have the first axis of gallery, of size 8, got shape \(4,\)"),
        ({"query_where": jnp.ones(8, bool)}, r"query_where must have the first axis of queries, of size 4"),
    ):
        with pytest.raises(ValueError, match=message):
            call(**wrong)


def test_random_key():
    with pytest.raises(TypeError, match=r"key must be a random key from jax.random.key, got int"):
        losses.symile_loss(jnp.ones((4, 3, 8)), key=3)


@pytest.mark.parametrize("nll", [contrastive_nll, functools.partial(sigmoid_nll, bias=0.0)])
def test_scores_and_scales(nll):
    a = jnp.eye(3)
    unfinished = type("Mine", (), {"higher_is_better": True, "prepare": max, "tile": max})()
    lacks = "Mine, which lacks usable, pairs"
    for score, got in ((scores.Volume, "the class Volume"), ("volume", "str"), (unfinished, lacks)):
        with pytest.raises(TypeError, match=rf"score must be a score object, such as .*, got {got}"):
            nll(score, a, a[:, None], scale=1.0)
    with pytest.raises(ValueError, match=r"scale must be finite in float32, got nan"):
        nll(scores.Cosine(), a, a[:, None], scale=float("nan"))


def test_sigmoid_bias():
    with pytest.raises(ValueError, match=r"bias must be finite in float32, got inf"):
        losses.sigmoid_loss(jnp.ones((4, 8)), jnp.ones((4, 8)), bias=jnp.inf)
    with pytest.raises(ValueError, match=r"bias must be a scalar, got shape \(4,\)"):
        losses.sigmoid_loss(jnp.ones((4, 8)), jnp.ones((4, 8)), bias=jnp.ones(4))


def test_matching():
    with pytest.raises(ValueError, match=r"logits must have shape \[batch, 2\], got shape \(4, 3\)"):
        losses.matching_loss(jnp.ones((4, 3)), jnp.ones(4, jnp.int32))
    with pytest.raises(ValueError, match=r"labels must have shape \[batch\] = \(4,\), got shape \(3,\)"):
        losses.matching_loss(jnp.ones((4, 2)), jnp.ones(3, jnp.int32))
    with pytest.raises(ValueError, match=r"labels must be 0 or 1, got \[0, 1, 7\]"):
        losses.matching_loss(jnp.ones((4, 2)), jnp.array([1, 0, 7, 1]))
    with pytest.raises(TypeError, match=r"labels must be integers.*float32"):
        losses.matching_loss(jnp.ones((4, 2)), jnp.ones(4))


def test_symile_without_a_key_says_when_combinations_are_too_many():
    z = jnp.zeros((16, 8, 4))
    with pytest.raises(ValueError, match=r"key must be given for embeddings of shape \(16, 8, 4\).*16\^7 .* 4\.3e\+09"):
        losses.symile_loss(z)
    assert jax.eval_shape(lambda: losses.symile_loss(z, key=jax.random.key(0))).shape == ()


def test_what_is_stacked_must_be_arrays():
    with pytest.raises(TypeError, match=r"embeddings\['sound'\] must be an array, got NoneType"):
        stack_modalities({"text": jnp.zeros((2, 3)), "sound": None})

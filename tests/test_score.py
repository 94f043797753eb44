"""Score objects of one's own: what they must be is checked before anything is computed."""

import dataclasses
import gc
import re
import weakref
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gramjax import retrieval, scores
from gramjax.streaming import contrastive_nll, sample_hard_negatives, sigmoid_nll, streamed_ranks, streamed_top_k

pytestmark = pytest.mark.usefixtures("unchecked_signatures")


@dataclasses.dataclass(frozen=True)
class _Sum(scores.ProductScore):
    """Inner product with the sum of the modalities, as someone would write it."""

    higher_is_better = True

    def usable(self, where):
        return jnp.any(where, axis=-1)

    def prepare(self, gallery, where):
        return {"sum": jnp.sum(gallery, axis=1), "number": jnp.sum(where, axis=1)}

    def products(self, queries, prepared):
        return queries @ prepared["sum"].T

    def from_products(self, products, queries, prepared):
        return products

    def pairs(self, queries, prepared):
        return jnp.sum(queries * prepared["sum"], axis=-1)

    def tile_sets(self, queries, where, prepared):
        return self.tile(jnp.sum(queries, axis=1), prepared)


def _altered(**members):
    return dataclasses.dataclass(frozen=True)(type("Mine", (_Sum,), members))()


def _nll(score, queries, gallery):
    return contrastive_nll(score, queries, gallery, scale=1.0)


def _sigmoid(score, queries, gallery):
    return sigmoid_nll(score, queries, gallery, scale=1.0, bias=0.0)


def _top_k(score, queries, gallery):
    return streamed_top_k(score, queries, gallery, 2)


def _sample(score, queries, gallery):
    return sample_hard_negatives(jax.random.key(0), score, queries, gallery)


def _index(score, queries, gallery):
    return retrieval.search(retrieval.build_index(gallery, score=score), queries, 2)


CALLS = [_nll, _sigmoid, scores.score_matrix, _top_k, streamed_ranks, _sample, _index]
every_call = pytest.mark.parametrize("call", CALLS, ids=lambda call: call.__name__.strip("_"))


def _inputs():
    rng = np.random.default_rng(0)
    return jnp.asarray(rng.normal(size=(6, 8)), jnp.float32), jnp.asarray(rng.normal(size=(6, 2, 8)), jnp.float32)


@every_call
def test_a_right_one_is_taken(call):
    call(_Sum(), *_inputs())


@every_call
@pytest.mark.parametrize(
    ("members", "message"),
    [
        # Most of these would be broadcast, to a result that looks like one.
        (
            {"tile": lambda self, queries, prepared: prepared["sum"] @ queries.T},
            r"Mine\.tile must return float32 \[queries, items\] = \(4, 3\) .*\(4, 8\), got float32 of shape \(3, 4\)",
        ),
        (
            {"tile": lambda self, queries, prepared: jnp.sum(queries @ prepared["sum"].T, axis=1)},
            r"Mine\.tile must return .*, got float32 of shape \(4,\)",
        ),
        ({"tile": lambda self, queries, prepared: None}, r"Mine\.tile must return .*, got NoneType"),
        (
            {"tile": lambda self, queries, prepared: (queries @ prepared["sum"].T) > 0},
            r"Mine\.tile must return .*, got bool of shape \(4, 3\)",
        ),
        (
            {"products": lambda self, queries, prepared: (queries @ prepared["sum"].T, jnp.zeros(()))},
            r"Mine\.products must return .*, got float32 of shape \(\)",
        ),
        (
            {"pairs": lambda self, queries, prepared: queries @ prepared["sum"].T},
            r"Mine\.pairs must return float32 \[items\] = \(3,\) .*, got float32 of shape \(3, 3\)",
        ),
        (
            {"pairs": lambda self, queries, prepared: jnp.sum(queries * prepared["sum"])},
            r"Mine\.pairs must return .*, got float32 of shape \(\)",
        ),
        (
            {"usable": lambda self, where: where},
            r"Mine\.usable must return bool \[items\] = \(3,\) .*, got bool of shape \(3, 2\)",
        ),
        (
            {"usable": lambda self, where: jnp.sum(where, axis=-1)},
            r"Mine\.usable must return .*, got int32 of shape \(3,\)",
        ),
        (
            {"prepare": lambda self, gallery, where: {"sum": jnp.sum(gallery, axis=1).T, "number": None}},
            r"Mine\.prepare must return arrays with the items as leading axis.*\(3, 2, 8\); got one of shape \(8, 3\)",
        ),
        (
            {"prepare": lambda self, gallery, where: None},
            r"Mine\.prepare must return arrays with the items as leading axis.*; got none",
        ),
        ({"higher_is_better": lambda self: False}, r"higher_is_better of Mine must be .*, got one of type method"),
    ],
    ids=["transposed", "reduced", "nothing", "bool", "products", "all_pairs", "scalar", "mask", "count", "prepared",
         "unprepared", "method"],
)  # fmt: skip
def test_what_a_method_returns_is_checked(call, members, message):
    if "pairs" in members and call not in (_nll, _sigmoid):
        call(_altered(**members), *_inputs())  # which does without
        return
    with pytest.raises((TypeError, ValueError), match=message):
        call(_altered(**members), *_inputs())


@every_call
def test_errors_in_a_method_tell_what_it_was_tried_on(call):
    def tile(self, queries, prepared):
        raise RuntimeError("of one's own")

    with pytest.raises(RuntimeError, match="of one's own") as caught:
        call(_altered(tile=tile), *_inputs())
    assert "So far, Mine.tile is only tried on an argument of shape (4, 8)." in caught.value.__notes__


@pytest.mark.parametrize("call", [_top_k, streamed_ranks])
def test_what_queries_of_several_modalities_get_is_checked(call):
    queries, gallery = _inputs()
    sets = jnp.stack([queries, queries], axis=1)
    call(_Sum(), sets, gallery)
    wrong = _altered(tile_sets=lambda self, queries, where, prepared: jnp.sum(queries, axis=2))
    with pytest.raises(ValueError, match=r"Mine\.tile_sets must return .*= \(4, 3\) .*, got float32 of shape \(4, 2\)"):
        call(wrong, sets, gallery)
    index = retrieval.build_index(gallery, score=wrong)
    with pytest.raises(ValueError, match=r"Mine\.tile_sets must return"):
        retrieval.search(index, sets, 1)


def test_double_precision_from_single_is_refused(x64):
    wide = _altered(pairs=lambda self, queries, prepared: jnp.sum(queries * prepared["sum"], axis=-1).astype("float64"))
    with pytest.raises(ValueError, match=r"Mine\.pairs must return float32 .*, got float64"):
        _nll(wide, *_inputs())


@every_call
@pytest.mark.parametrize("shape", [(6, 0, 8), (6, 2, 0)])
def test_items_of_nothing(call, shape):
    message = r"gallery must hold .*(at least|item of) one modality.*" + re.escape(str(shape))
    with pytest.raises(ValueError, match=message):
        call(_Sum(), jnp.ones((6, shape[2])), jnp.ones(shape))


@every_call
def test_arrays_in_a_score(call):
    @dataclasses.dataclass(frozen=True)
    class Weighted(_Sum):
        weight: object = None

    message = r"score must be hashable, as a frozen dataclass without arrays is; Weighted: unhashable type"
    with pytest.raises(TypeError, match=message):
        call(Weighted(jnp.ones(8)), *_inputs())

    class Scaled(_Sum):
        __hash__ = object.__hash__
        __eq__ = object.__eq__

        def __init__(self, weight):
            object.__setattr__(self, "hidden", lambda: weight)

        def products(self, queries, prepared):
            return self.hidden() * super().products(queries, prepared)

        def pairs(self, queries, prepared):
            return self.hidden() * super().pairs(queries, prepared)

    call(Scaled(np.float32(2.0)), *_inputs())
    call(Scaled(jnp.float32(2.0)), *_inputs())
    with pytest.raises(TypeError, match=r"score must not hold traced arrays, but Scaled.products uses one"):
        jax.jit(lambda weight: call(Scaled(weight), *_inputs()))(1.0)


@pytest.mark.parametrize("shape", [(3, 2, 4), (5, 4, 3), (4, 3, 5), (1, 1, 1), (2, 6, 7), (7, 3, 3)])
def test_sizes_like_those_it_is_tried_on(shape):
    """Whatever the sizes, a score that is right is taken, and one that mistakes one axis for another is not."""
    queries, gallery = jnp.ones((shape[0], shape[2])), jnp.ones(shape)
    _nll(_Sum(), queries, gallery)
    for tile in (
        lambda self, queries, prepared: prepared["sum"] @ queries.T,
        lambda self, queries, prepared: queries,
        lambda self, queries, prepared: jnp.ones((len(queries), shape[1])),
        lambda self, queries, prepared: jnp.ones(queries.shape[::-1]),
    ):
        with pytest.raises(ValueError, match=r"Mine\.tile must return"):
            _nll(_altered(tile=tile), queries, gallery)


def test_what_is_known_of_a_score_goes_with_it():
    class Constants(_Sum):
        __hash__ = object.__hash__
        __eq__ = object.__eq__

    score = Constants()
    _nll(score, *_inputs())
    gone = weakref.ref(score)
    del score
    jax.clear_caches()
    gc.collect()
    assert gone() is None


def test_equal_scores_of_two_classes_are_two_scores():
    right = type("Right", (_Tuple,), {})
    wrong = type("Wrong", (_Tuple,), {"tile": lambda self, queries, prepared: prepared["sum"] @ queries.T})
    assert right() == wrong()
    assert hash(right()) == hash(wrong())
    _nll(right(), *_inputs())
    with pytest.raises(ValueError, match=r"Wrong\.tile must return"):
        _nll(wrong(), *_inputs())


class _Tuple(NamedTuple):
    number: int = 1
    higher_is_better: bool = True
    usable = _Sum.usable
    prepare = _Sum.prepare
    pairs = _Sum.pairs

    def tile(self, queries, prepared):
        return queries @ prepared["sum"].T


def test_double_precision_is_looked_for_again_once_it_is_on():
    def pairs(self, queries, prepared):
        return jnp.sum(queries * prepared["sum"], axis=-1).astype(jax.dtypes.canonicalize_dtype(np.float64))

    score = _altered(pairs=pairs)
    _nll(score, *_inputs())
    with jax.enable_x64(True), pytest.raises(ValueError, match=r"Mine\.pairs must return float32 .*, got float64"):
        _nll(score, *_inputs())

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from gramjax.encoders import BEATs, BEATsConfig, VisionConfig, VisionTransformer
from gramjax.encoders.conversion import (
    LINEAR,
    Rule,
    from_torch,
    linear_rules,
    params_from_torch,
    prefixed,
    rule,
    strip_prefix,
)


class Pair(nnx.Module):
    def __init__(self, rngs):
        self.left = nnx.Linear(2, 3, rngs=rngs)
        self.right = nnx.Linear(2, 3, rngs=rngs)


SEPARATE = (*linear_rules("a", "left"), *linear_rules("b", "right"))


def tensors():
    rng = np.random.default_rng(0)
    shapes = {"a.weight": (3, 2), "a.bias": (3,), "b.weight": (3, 2), "b.bias": (3,)}
    return {key: rng.normal(size=shape).astype(np.float32) for key, shape in shapes.items()}


@pytest.fixture
def pair():
    return Pair(nnx.Rngs(0))


def test_linear_layout(pair):
    state_dict = tensors()
    before = np.asarray(pair.left.kernel[...])
    state = params_from_torch(pair, SEPARATE, state_dict)
    np.testing.assert_array_equal(pair.left.kernel[...], before)
    nnx.update(pair, state)
    x = np.array([[1.0, -2.0]], np.float32)
    expected = x @ state_dict["a.weight"].T + state_dict["a.bias"]
    np.testing.assert_allclose(pair.left(jnp.asarray(x)), expected, rtol=1e-6)


def test_fused_tensor_is_cut_in_order(pair):
    t = tensors()
    fused = np.concatenate([t["a.weight"], t["b.weight"]])
    rules = (
        rule("ab.weight", "left.kernel", "right.kernel", layout=LINEAR),
        rule("a.bias", "left.bias"),
        rule("b.bias", "right.bias"),
    )
    state = params_from_torch(pair, rules, {"ab.weight": fused, "a.bias": t["a.bias"], "b.bias": t["b.bias"]})
    np.testing.assert_array_equal(state["left"]["kernel"][...], t["a.weight"].T)
    np.testing.assert_array_equal(state["right"]["kernel"][...], t["b.weight"].T)


def test_all_problems_are_reported_by_name_and_nothing_is_written(pair):
    t = tensors()
    rules = (
        Rule(("a.weight", "old.weight"), ("left.kernel",), LINEAR),
        *SEPARATE[1:],
        rule("ignored.by.table"),
    )
    t["old.weight"] = t["a.weight"] + 1
    t["a.bias"] = t["a.bias"].astype(np.int64)
    t["b.weight"] = t["b.weight"].T
    del t["b.bias"]
    t["stranger"] = np.zeros(2, np.float32)
    t["ignored.by.table"] = np.zeros(2, np.int32)
    before = np.asarray(pair.left.kernel[...])
    with pytest.raises(ValueError, match="does not fit Pair") as error:
        params_from_torch(pair, rules, t)
    lines = [line.strip() for line in str(error.value).splitlines()[1:]]
    assert len(lines) == 5
    for expected in (
        "not equal: old.weight and a.weight",
        "wrong dtype: a.bias is int64",
        "wrong shape: b.weight (2, 3) cannot become right.kernel (2, 3)",
        "missing: b.bias",
        "unexpected: stranger",
    ):
        assert any(line.startswith(expected) for line in lines), (expected, lines)
    np.testing.assert_array_equal(pair.left.kernel[...], before)


def test_every_problem_is_listed_however_many(pair):
    strangers = {f"stranger.{number}": np.zeros(2, np.float32) for number in range(200)}
    with pytest.raises(ValueError, match="does not fit Pair") as error:
        params_from_torch(pair, SEPARATE, tensors() | strangers)
    assert [line.strip() for line in str(error.value).splitlines()[1:]] == [f"unexpected: {name}" for name in strangers]


@pytest.mark.parametrize("shape", [(3,), (3, 2, 1), (5, 2), ()])
def test_wrong_ranks_and_uneven_cuts_are_shape_errors(pair, shape):
    rules = (rule("w", "left.kernel", "right.kernel", layout=LINEAR), *SEPARATE[1::2])
    state_dict = {"w": np.zeros(shape, np.float32), "a.bias": tensors()["a.bias"], "b.bias": tensors()["b.bias"]}
    with pytest.raises(ValueError, match="wrong shape: w"):
        params_from_torch(pair, rules, state_dict)


@pytest.mark.parametrize(
    ("rules", "name"),
    [
        (SEPARATE[:-1], "right.bias"),
        ((*SEPARATE, rule("c", "left.bias")), "left.bias"),
        ((*SEPARATE, rule("c", "middle")), "middle"),
    ],
)
def test_a_table_must_cover_the_module_once(pair, rules, name):
    with pytest.raises(ValueError, match=rf"rules must name every parameter .*'{name}'"):
        params_from_torch(pair, rules, tensors())


def test_tables_of_parts_join(pair):
    class Model(nnx.Module):
        def __init__(self):
            self.towers = nnx.List([Pair(nnx.Rngs(0)), Pair(nnx.Rngs(1))])

    t = tensors()
    state_dict = {f"module.{i}.{key}": value + i for i in range(2) for key, value in t.items()}
    rules = [r for i in range(2) for r in prefixed(SEPARATE, key=f"{i}.", path=f"towers.{i}.")]
    state = params_from_torch(Model(), rules, strip_prefix(state_dict, "module."))
    np.testing.assert_array_equal(state["towers"][1]["right"]["bias"][...], t["b.bias"] + 1)


def test_parameter_dtype_is_the_modules(golden):
    _, _, _, state_dict = golden("eva_tiny")
    config = VisionConfig(image_size=42, patch_size=14, width=48, depth=3, num_heads=3, mlp_dim=209)
    model = from_torch(
        VisionTransformer, config, strip_prefix(state_dict, "visual."), dtype=jnp.bfloat16, param_dtype=jnp.bfloat16
    )
    assert {variable.dtype for _, variable in nnx.to_flat_state(nnx.state(model))} == {jnp.dtype(jnp.bfloat16)}


def test_no_released_tower_has_a_stem():
    config = VisionConfig(image_size=8, patch_size=4, width=8, depth=1, num_heads=1, mlp_dim=8, stem_channels=(4, 4))
    with pytest.raises(ValueError, match="no convolutional stem"):
        VisionTransformer.torch_rules(config)
    with pytest.raises(ValueError, match="no convolutional stem"):
        BEATs.torch_rules(BEATsConfig(patch_size=4, stem_channels=(4, 4)))

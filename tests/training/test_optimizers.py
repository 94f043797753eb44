"""Parameter groups, clipping, checks."""

import jax
import numpy as np
import pytest
from flax import nnx

from gramjax.encoders import BERT, BEATs, BEATsConfig, BERTConfig, VisionConfig, VisionTransformer
from gramjax.models import LossParameters
from gramjax.training import adamw, decayed


def parameter_names(tree):
    return {
        ".".join(str(getattr(part, "key", getattr(part, "name", part))) for part in path).removesuffix(".value"): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


@pytest.mark.parametrize(
    "module",
    [
        lambda rngs: VisionTransformer(
            VisionConfig(image_size=8, patch_size=4, width=8, depth=1, num_heads=2, mlp_dim=8, stem_channels=(4, 4)),
            rngs=rngs,
        ),
        lambda rngs: VisionTransformer(
            VisionConfig(image_size=8, patch_size=4, width=8, depth=1, num_heads=2, mlp_dim=8), rngs=rngs
        ),
        lambda rngs: BEATs(
            BEATsConfig(patch_dim=8, width=8, depth=1, num_heads=2, mlp_dim=8, position_groups=2), rngs=rngs
        ),
        lambda rngs: BERT(BERTConfig(vocab_size=9, max_length=4, width=8, depth=1, num_heads=2, mlp_dim=8), rngs=rngs),
    ],
    ids=["vision with stem", "vision", "audio", "text"],
)
def test_kernels_of_the_encoders_are_decayed_and_nothing_else(module):
    params = nnx.state(module(nnx.Rngs(0)), nnx.Param)
    mask = parameter_names(decayed(params))
    assert any(mask.values())
    for name, leaf in parameter_names(params).items():
        one_dimensional = leaf.ndim < 2
        table = any(word in name for word in ("embedding", "token", "table")) and "kernel" not in name
        weight_normalised = name.endswith(("direction", "scale"))  # its length is another parameter
        assert mask[name] == (not (one_dimensional or table or weight_normalised)), name


def test_scalars_of_the_loss_are_not_decayed():
    params = nnx.state(LossParameters(bias=-10.0), nnx.Param)
    assert parameter_names(decayed(params)) == {"log_temperature": False, "bias": False}


@pytest.fixture
def standard_promotion():
    """For optax, whose Adam raises a Python float to an integer power; `make_train_step` does the same."""
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.mark.usefixtures("standard_promotion")
def test_without_gradient_only_kernels_shrink():
    params = nnx.state(nnx.Dict(layer=nnx.Linear(2, 2, rngs=nnx.Rngs(0)), norm=nnx.LayerNorm(2, rngs=nnx.Rngs(0))))
    optimizer = adamw(0.5, weight_decay=0.2)
    zeros = jax.tree.map(np.zeros_like, params)
    updates, _ = optimizer.update(zeros, optimizer.init(params), params)
    updates, params = parameter_names(updates), parameter_names(params)
    np.testing.assert_allclose(updates["layer.kernel"], -0.1 * np.asarray(params["layer.kernel"]), rtol=1e-6)
    for name in ("layer.bias", "norm.scale", "norm.bias"):
        np.testing.assert_array_equal(updates[name], 0)


@pytest.mark.usefixtures("standard_promotion")
@pytest.mark.parametrize("scale", [1.0, 1e6])
def test_gradients_above_the_limit_count_the_same_whatever_their_length(scale):
    params = {"kernel": np.ones((2, 2), np.float32)}
    gradient = {"kernel": np.array([[3.0, -4.0], [0.5, 2.0]], np.float32) * np.float32(scale)}
    # A large eps makes AdamW's step depend on the gradient's length.
    optimizer = adamw(1.0, weight_decay=0.0, eps=1.0, max_grad_norm=0.1)
    updates, _ = optimizer.update(gradient, optimizer.init(params), params)
    clipped = gradient["kernel"].astype(np.float64)
    clipped *= 0.1 / np.linalg.norm(clipped)
    np.testing.assert_allclose(updates["kernel"], -clipped / (np.abs(clipped) + 1.0), rtol=1e-5)


@pytest.mark.usefixtures("standard_promotion")
def test_no_clipping_when_not_asked_for():
    params = {"kernel": np.ones((1, 1), np.float32)}
    optimizer = adamw(1.0, weight_decay=0.0, eps=1.0, max_grad_norm=None)
    updates, _ = optimizer.update({"kernel": np.full((1, 1), 3.0, np.float32)}, optimizer.init(params), params)
    np.testing.assert_allclose(updates["kernel"], -3.0 / 4.0, rtol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"max_grad_norm": 0.0}, "max_grad_norm must be positive or None, got 0.0"),
        ({"max_grad_norm": float("nan")}, "max_grad_norm must be positive"),
        ({"weight_decay": -1.0}, "weight_decay must be at least 0, got -1.0"),
    ],
)
def test_bad_settings_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        adamw(0.1, **arguments)

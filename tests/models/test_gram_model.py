"""The model: what it computes from its parts, and how dropout is drawn."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from gramjax.models import GramModel
from tests.models.test_model_config import CONFIG

BATCH = {
    "caption": {"ids": np.array([[1, 5, 6, 2, 0, 0], [1, 9, 2, 0, 0, 0]], np.int32)},
    "frames": np.random.default_rng(0).normal(size=(2, 8, 8, 3)).astype(np.float32),
    "depth": np.random.default_rng(1).normal(size=(2, 8, 8, 3)).astype(np.float32),
    "sound": np.random.default_rng(2).normal(size=(2, 32, 32)).astype(np.float32),
    "label": np.array([3, 4], np.int32),
}
BATCH["caption"]["mask"] = BATCH["caption"]["ids"] != 0


@pytest.fixture(scope="module")
def model():
    return GramModel(CONFIG, rngs=nnx.Rngs(0))


def test_embeddings_are_the_projected_class_token_or_mean_token(model):
    arrays = jax.tree.map(jnp.asarray, BATCH)
    tokens = {
        "frames": model.towers["vision"](arrays["frames"])[:, 0],
        "depth": model.towers["vision"](arrays["depth"])[:, 0],
        "caption": model.towers["text"](arrays["caption"]["ids"], arrays["caption"]["mask"])[:, 0],
        "sound": np.asarray(model.towers["audio"](arrays["sound"]), np.float64).mean(axis=1),
    }
    embeddings = model.embed(BATCH)
    assert list(embeddings) == list(CONFIG.modalities)
    for name, pooled in tokens.items():
        kernel = np.asarray(model.heads[name].linear.kernel[...], np.float64)
        projected = np.asarray(pooled, np.float64) @ kernel
        expected = projected / np.linalg.norm(projected, axis=-1, keepdims=True)
        np.testing.assert_allclose(embeddings[name], expected, atol=1e-5)


def test_mean_pooling_leaves_out_the_class_token_and_padding():
    config = dataclasses.replace(CONFIG, pooling={"vision": "mean", "text": "mean"})
    model = GramModel(config, rngs=nnx.Rngs(0))
    arrays = jax.tree.map(jnp.asarray, BATCH)
    frames = np.asarray(model.towers["vision"](arrays["frames"]), np.float64)[:, 1:].mean(axis=1)
    text = np.asarray(model.towers["text"](arrays["caption"]["ids"], arrays["caption"]["mask"]), np.float64)
    caption = np.stack([text[0, 1:4].mean(axis=0), text[1, 1:3].mean(axis=0)])
    embeddings = model.embed(BATCH)
    for name, pooled in (("frames", frames), ("caption", caption)):
        projected = pooled @ np.asarray(model.heads[name].linear.kernel[...], np.float64)
        expected = projected / np.linalg.norm(projected, axis=-1, keepdims=True)
        np.testing.assert_allclose(embeddings[name], expected, atol=1e-5)


def test_padding_of_sound_is_left_out(model):
    """Of a spectrogram, and of the mean over slices a slice that is padding alone."""
    sound = BATCH["sound"]
    mask = np.arange(32) < np.array([[16], [32]])
    alone = [model.embed({"sound": sound[:1, :16]})["sound"][0], model.embed({"sound": sound[1:]})["sound"][0]]
    masked = model.embed({"sound": {"fbank": sound, "mask": mask}})["sound"]
    np.testing.assert_allclose(masked, jnp.stack(alone), atol=1e-5)
    slices = {
        "fbank": np.stack([sound, sound[::-1]], axis=1),
        "mask": np.stack([np.ones_like(mask), np.zeros_like(mask)], axis=1),
    }
    np.testing.assert_allclose(
        model.embed({"sound": slices})["sound"], model.embed({"sound": sound})["sound"], atol=1e-5
    )


def test_padding_slices_do_not_shrink_what_is_joined():
    """A joint head has a bias and sees several modalities: there the length of a mean counts."""
    model = GramModel(dataclasses.replace(CONFIG, joint_heads={"clip": ("frames", "sound")}), rngs=nnx.Rngs(0))
    sound, mask = BATCH["sound"], np.ones((2, 32), bool)
    slices = {"fbank": np.stack([sound, sound], axis=1), "mask": np.stack([mask, np.zeros_like(mask)], axis=1)}
    clips = {"frames": BATCH["frames"], "sound": slices}, {"frames": BATCH["frames"], "sound": sound}
    padded, alone = (model.project_joint(model.encode(clip), clip)["clip"] for clip in clips)
    np.testing.assert_allclose(padded, alone, atol=1e-5)


def test_any_subset_of_modalities(model):
    whole = model.embed(BATCH)
    part = model.embed({name: BATCH[name] for name in ("sound", "caption")})
    assert list(part) == ["caption", "sound"]
    chex.assert_trees_all_equal(part, {name: whole[name] for name in part})


def test_a_batch_without_modalities_is_refused(model):
    with pytest.raises(ValueError, match=r"batch must have at least one of .*, got \['label'\]"):
        model.embed({"label": BATCH["label"]})


def test_a_text_must_be_ids_and_mask(model):
    with pytest.raises(ValueError, match=r"batch\['caption'\] must be .* got"):
        model.embed({"caption": BATCH["caption"]["ids"]})
    with pytest.raises(ValueError, match=r"batch\['frames'\] must be .* got"):
        model.embed({"frames": BATCH["caption"]})
    with pytest.raises(ValueError, match=r"batch\['sound'\] must be .*, or a mapping with that as .* got keys \['ids'"):
        model.embed({"sound": BATCH["caption"]})
    slices = {"fbank": BATCH["sound"][:, None], "mask": np.ones((2, 32), bool)}
    with pytest.raises(ValueError, match=r"\['sound'\]\[\"mask\"\] must have shape \(2, 1, 32\), got \(2, 32\)"):
        model.embed({"sound": slices})


def test_dropout_only_with_rngs_and_the_same_for_the_same_key(model):
    without = model.embed(BATCH)
    first, again, other = (model.embed(BATCH, rngs=nnx.Rngs(seed)) for seed in (1, 1, 2))
    chex.assert_trees_all_equal(first, again)
    for name in ("caption", "sound"):
        assert np.abs(first[name] - without[name]).max() > 1e-3
        assert np.abs(first[name] - other[name]).max() > 1e-3


def test_bfloat16_towers_give_float32_embeddings_close_to_float32_ones(model):
    low = GramModel(CONFIG, rngs=nnx.Rngs(0), dtype=jnp.bfloat16)
    for name, value in low.embed(BATCH).items():
        assert value.dtype == jnp.float32
        np.testing.assert_allclose(np.linalg.norm(value, axis=-1), 1, atol=1e-6)
        np.testing.assert_allclose(value, model.embed(BATCH)[name], atol=0.05)
    chex.assert_trees_all_equal(nnx.state(low, nnx.Param), nnx.state(model, nnx.Param))


@pytest.mark.slow
def test_every_parameter_of_the_model_gets_a_gradient(model):
    graphdef, params = nnx.split(model, nnx.Param)
    target = {name: jax.random.normal(jax.random.key(i), (2, 8)) for i, name in enumerate(CONFIG.modalities)}

    def loss(params):
        embeddings = nnx.merge(graphdef, params).embed(BATCH)
        return sum(jnp.sum(embeddings[name] * target[name]) for name in embeddings)

    for path, gradient in jax.tree_util.tree_leaves_with_path(jax.grad(loss)(params)):
        name = jax.tree_util.keystr(path)
        # A key bias shifts all logits of a query alike, which softmax does not see.
        assert "key']['bias" in name or np.abs(gradient).max() > 0, name

"""Items and matching scores over several devices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from experiments.encoding import Matcher, _divided, embed_items, everywhere
from gramjax.checkpoints import load_torch
from gramjax.models import gram_tiny
from gramjax.training import data_mesh, replicate
from tests.experiments.conftest import GOLDEN, shallow

ROWS = (5, 3)  # of two batches; eight devices share neither evenly
TEXTS = 6


@pytest.fixture(scope="module")
def encoded(tmp_path_factory):
    """Embeddings, which are present, and matching scores of the first and the last item, by the number of devices."""
    rng = np.random.default_rng(0)
    vision = [rng.normal(size=(rows, 2, 42, 42, 3)).astype(np.float32) for rows in ROWS]
    ids = rng.integers(4, 97, (TEXTS, 5)).astype(np.int32)
    batches = [({"vision": frames}, {"vision": np.arange(len(frames)) != 1}) for frames in vision]
    found = {}
    for count in (1, 8):
        model = shallow(load_torch(GOLDEN / "gram_tiny_ddp.pt", gram_tiny()))
        nnx.update(model, replicate(nnx.state(model), data_mesh(jax.devices()[:count])))
        folder = tmp_path_factory.mktemp("conditions")
        embedded = embed_items(model, batches, ("vision",), match_with=("vision",), conditions=folder)
        matcher = Matcher(model, folder)
        texts = {"ids": ids, "mask": np.ones_like(ids, bool)}
        matches = [np.asarray(matcher.match(texts, matcher.condition_of(item))) for item in (0, 7)]
        assert matcher.condition_of(1) is None
        found[count] = (*embedded, matches)
    return found


def test_several_devices_make_the_same_of_items_and_texts(encoded):
    for ours, theirs in zip(encoded[8], encoded[1], strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)
    embeddings, where, matches = encoded[8]
    assert embeddings.shape == (sum(ROWS), 1, gram_tiny().embed_dim)
    assert where[:, 0].tolist() == [True, False, True, True, True, True, False, True]
    assert np.shape(matches) == (2, TEXTS)
    assert len(np.unique(matches)) == 2 * TEXTS


class Doubling(nnx.Module):
    """Embeds numbers as themselves, twice."""

    def __init__(self):
        self.factor = nnx.Param(jnp.float32(2))

    def encode(self, batch):
        return {name: values * self.factor[...] for name, values in batch.items()}

    def project(self, tokens, batch):
        return tokens


@pytest.mark.parametrize("strange", [np.nan, np.inf, -np.inf])
def test_a_model_that_embeds_in_no_numbers_is_refused(strange):
    numbers = {"vision": np.ones((2, 3), np.float32), "audio": np.ones((2, 3), np.float32)}
    numbers["audio"][1, 2] = strange
    where = {"vision": np.array([True, True]), "audio": np.array([True, False])}
    found, _ = embed_items(Doubling(), [(numbers, where)], ("vision", "audio"))
    np.testing.assert_array_equal(found[:, 0], 2)
    there = [(numbers, where | {"audio": np.ones(2, bool)})]
    with pytest.raises(ValueError, match=r"model must embed in finite numbers, got NaN or .* embeddings of audio$"):
        embed_items(Doubling(), there, ("vision", "audio"))


def test_every_device_has_a_part_of_a_batch():
    frames = np.arange(10.0).reshape(5, 2)
    divided = _divided({"vision": frames}, data_mesh())["vision"]
    parts = {shard.device: shard.data for shard in divided.addressable_shards}
    assert [part.shape for part in parts.values()] == [(1, 2)] * 8
    np.testing.assert_array_equal(divided, np.concatenate([frames, *[frames[-1:]] * 3]))


def test_a_model_is_on_every_device():
    places = everywhere({"kernel": np.zeros((8, 8))})
    assert places["kernel"].is_fully_replicated
    assert places["kernel"].device_set == set(jax.devices())

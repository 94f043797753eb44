"""Items and matching scores over several devices."""

import jax
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

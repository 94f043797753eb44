"""The model that comes with the package."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from gramjax.checkpoints import load_emoji, pretrained
from gramjax.data import queries


def test_it_is_small_and_has_heard_of_things():
    assert pretrained.EMOJI.stat().st_size < 3e6
    model = load_emoji()
    assert {leaf.dtype for leaf in jax.tree.leaves(nnx.state(model, nnx.Param))} == {jnp.dtype("float32")}
    texts = [queries.encode_words(text) for text in ("smiling cat", "smiling face", "police car")]
    words = jax.tree.map(lambda *rows: np.concatenate(rows), *texts)
    cat, face, car = nnx.jit(lambda model, words: model.embed({"english": words}))(model, words)["english"]
    assert cat @ face > 0.5 > cat @ car


def test_the_same_model_gives_the_same_file(tmp_path):
    pretrained.write_emoji(load_emoji(), tmp_path / "again.npz")
    assert (tmp_path / "again.npz").read_bytes() == pretrained.EMOJI.read_bytes()

"""The published objectives against the published computation: dense, all pairs stored, three texts read a clip."""

import functools
from dataclasses import replace
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from gramjax import linalg
from gramjax.checkpoints import load_torch
from gramjax.encoders.heads import ProjectionHead
from gramjax.models import GramModel, LossParameters, gram_tiny
from gramjax.models.released import without_depth
from gramjax.scores import Cosine, Volume
from gramjax.streaming import sample_hard_negatives
from gramjax.training import by_name, data_mesh, gram_objective, is_trained, pmrl_objective, shard_batch

GOLDEN = Path(__file__).parents[1] / "golden" / "gram_tiny_ddp.pt"
ROWS = 8
KEY = jax.random.key(5)
CONDITION = ("vision", "audio")
NAMES = ("caption", "vision", "audio", "subtitle")
OBJECTIVES = {"gram": gram_objective, "pmrl": pmrl_objective}


class SmallModel(GramModel):
    """Pictures, sounds and texts are single vectors; a text is matched with a condition by a bilinear form."""

    def __init__(self, rngs):
        self.config = without_depth(gram_tiny())
        self.heads = nnx.Dict({name: ProjectionHead(6, 5, rngs=rngs) for name in NAMES})
        self.joint_heads = nnx.Dict(
            {name: ProjectionHead(6 * len(joined), 5, rngs=rngs) for name, joined in self.config.joint_heads.items()}
        )
        self.form = nnx.Param(rngs.normal((6, 6, 2)))

    def encode(self, batch, *, rngs=None):
        tokens = {name: batch[name] for name in NAMES if name in batch}
        return {name: jnp.asarray(x["ids"] if isinstance(x, dict) else x) for name, x in tokens.items()}

    def _pool(self, name, tokens, inputs):
        return tokens

    def condition(self, tokens, modalities):
        return jnp.stack([tokens[name] for name in modalities], axis=1)

    def match(self, text, condition, *, rngs=None):
        clips = jnp.repeat(condition, len(text["ids"]) // len(condition), axis=0)
        return jnp.einsum("bi,bkj,ijc->bc", jnp.where(text["mask"], text["ids"], 0.0), jnp.tanh(clips), self.form[...])


def vectors(batch_rows=ROWS):
    """Rows without sound, without subtitle, without caption, with subtitles alone; and two of one clip."""
    rng = np.random.default_rng(0)
    where = {name: np.ones(batch_rows, bool) for name in NAMES}
    where["audio"][1] = where["subtitle"][2] = where["caption"][3] = False
    where["vision"][4] = where["audio"][4] = False
    batch = {name: rng.normal(size=(batch_rows, 6)).astype(np.float32) for name in NAMES}
    for name in ("caption", "subtitle"):
        batch[name] = {"ids": batch[name], "mask": rng.random((batch_rows, 6)) < 0.7}
    return {**batch, "where": where, "index": np.array([0, 1, 2, 3, 4, 5, 5, 6], np.int32)}


# Rows that texts are matched with: those with a caption and something to look at or listen to.
PAIRED = np.array([1, 1, 1, 0, 0, 1, 1, 1], bool)


@pytest.fixture(scope="module")
def small():
    """Model, scalars, and value and gradients of either objective, on one device and divided over eight."""
    model, scalars = SmallModel(nnx.Rngs(0)), LossParameters(temperature=0.2)
    graph, state = nnx.split((model, scalars))

    @functools.partial(jax.jit, static_argnums=(2, 3))
    def value_and_gradient(state, batch, name, mesh=None):
        def loss(state):
            return OBJECTIVES[name](*nnx.merge(graph, state), batch, None, key=KEY, mesh=mesh)

        return jax.value_and_grad(loss, has_aux=True)(state)

    return model, scalars, functools.partial(value_and_gradient, state)


def draws(score, z, gallery, gallery_where, temperature=0.2):
    """The negatives that an objective draws; what they are is tested where they are drawn."""
    options = {
        "temperature": temperature,
        "floor": 1e-4,
        "query_where": jnp.asarray(vectors()["where"]["caption"]),
        "gallery_where": jnp.asarray(gallery_where),
        "ids": jnp.asarray(vectors()["index"]),
    }
    keys = jax.random.split(KEY)
    return tuple(
        np.asarray(sample_hard_negatives(key, score, z, gallery, draw=draw, **options))
        for key, draw in zip(keys, ("items", "queries"))
    )


def published_matching(match, text, condition, items, texts):
    """Cross-entropy over [texts, texts, other texts] with [clips, other clips, clips]."""
    rows = np.arange(ROWS)
    reads = np.concatenate([rows, rows, np.maximum(texts, 0)])
    clips = np.concatenate([rows, np.maximum(items, 0), rows])
    logits = match(jax.tree.map(lambda x: jnp.asarray(x)[reads], text), condition[clips])
    labels = jnp.asarray(np.repeat([1, 0, 0], ROWS))
    counts = jnp.asarray(np.concatenate([PAIRED, items >= 0, texts >= 0]))
    losses = -jnp.take_along_axis(jax.nn.log_softmax(logits), labels[:, None], axis=1)[:, 0]
    right = (jnp.argmax(logits, axis=1) == labels) & counts
    total = jnp.sum(counts)
    return jnp.sum(jnp.where(counts, losses, 0.0)) / total, jnp.sum(right) / total


def dense_volumes(queries, gallery, where):
    """`[batch, batch]`, from determinants of all Gram matrices; what is absent has a row of the identity."""
    k = gallery.shape[1] + 1
    z = jnp.stack([jnp.concatenate([jnp.stack([q] * ROWS)[:, None], gallery], axis=1) for q in queries])
    z = z * jnp.concatenate([jnp.ones((1, ROWS, 1)), where[None]], axis=2)[..., None]
    gram = jnp.einsum("qnkd,qnld->qnkl", z, z, precision="highest")
    absent = 1.0 - jnp.concatenate([jnp.ones((1, ROWS, 1)), where[None]], axis=2)
    return jnp.sqrt(jnp.abs(jnp.linalg.det(gram + absent[..., None] * jnp.eye(k)[None, None])))


def published_contrast(logits, query_where, item_where, ids, smoothing=0.1):
    """Cross-entropy with label smoothing in both directions, over those that are there."""
    pairs = query_where & item_where
    same = (ids[:, None] == ids[None, :]) & ~np.eye(ROWS, dtype=bool)

    def one_way(logits, candidates):
        allowed = jnp.asarray(candidates[None, :] & ~same)
        log_p = jax.nn.log_softmax(jnp.where(allowed, logits, -jnp.inf), axis=1)
        spread = jnp.sum(jnp.where(allowed, log_p, 0.0), axis=1) / jnp.sum(allowed, axis=1)
        losses = -(1 - smoothing) * jnp.diagonal(log_p) - smoothing * spread
        return jnp.sum(jnp.where(pairs, losses, 0.0)) / pairs.sum()

    return (one_way(logits, item_where) + one_way(logits.T, query_where)) / 2


def published_gram(model, scalars, batch):
    with jax.numpy_dtype_promotion("standard"):
        z = model.project(model.encode(batch), batch)
        where = np.stack([batch["where"][name] for name in NAMES[1:]], axis=1)
        gallery = jnp.stack([z[name] for name in NAMES[1:]], axis=1)
        readable = where[:, 0] | where[:, 1]
        items, texts = draws(Volume(), *jax.lax.stop_gradient((z["caption"], gallery)), where & readable[:, None])
        matching, accuracy = published_matching(
            model.match, batch["caption"], model.condition(model.encode(batch), CONDITION), items, texts
        )
        volumes = dense_volumes(z["caption"], gallery, where) / scalars.temperature
        contrast = published_contrast(-volumes, batch["where"]["caption"], where.any(axis=1), batch["index"])
        return contrast + 0.1 * matching, {"volume": contrast, "matching": matching, "accuracy": accuracy}


def published_pmrl(model, scalars, batch):
    with jax.numpy_dtype_promotion("standard"):
        tokens = model.encode(batch)
        z = jnp.stack([model.project(tokens, batch)[name] for name in NAMES], axis=1)
        where = np.stack([batch["where"][name] for name in NAMES], axis=1)
        joint = jax.lax.stop_gradient(model.project_joint(tokens, batch)["va"][:, None])
        readable = where[:, 1] | where[:, 2]
        items, texts = draws(Cosine(), jax.lax.stop_gradient(z[:, 0]), joint, readable[:, None])
        matching, accuracy = published_matching(
            model.match, batch["caption"], model.condition(tokens, CONDITION), items, texts
        )
        aligned, directions = [], []
        for row in range(ROWS):
            present = z[row][where[row]]
            u, s, _ = jnp.linalg.svd(present.T, full_matrices=False)
            if len(present) > 1:
                aligned.append(-jax.nn.log_softmax(s / 0.05)[0])
            directions.append(u[:, 0] * jnp.sign(jnp.sum(present, axis=0) @ u[:, 0]))
        u = jnp.stack(directions)
        logits = jnp.matmul(u, u.T, precision="highest") / 0.1
        everything = np.ones(ROWS, bool)
        apart = published_contrast(logits, everything, everything, batch["index"], smoothing=0.0)
        alignment = jnp.mean(jnp.stack(aligned))
        parts = {"alignment": alignment, "regularization": apart, "matching": matching, "accuracy": accuracy}
        return alignment + apart + 0.1 * matching, parts


@pytest.mark.parametrize(("name", "published"), [("gram", published_gram), ("pmrl", published_pmrl)])
def test_equal_to_the_published_computation(small, name, published):
    model, scalars, ours = small
    batch = vectors()
    (value, metrics), gradient = ours(batch, name)
    graph, state = nnx.split((model, scalars))
    (expected, parts), expected_gradient = jax.value_and_grad(
        lambda state: published(*nnx.merge(graph, state), batch), has_aux=True
    )(state)
    np.testing.assert_allclose(value, expected, rtol=2e-5)
    for part, number in parts.items():
        logged = metrics["accuracy/matching" if part == "accuracy" else f"loss/{part}"]
        np.testing.assert_allclose(logged, number, rtol=2e-5)
    chex.assert_trees_all_close(gradient, expected_gradient, atol=3e-5, rtol=1e-3)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_divided_over_devices_it_is_the_same(small, name):
    """Negatives come from all of them."""
    _, _, ours = small
    mesh = data_mesh()
    chex.assert_trees_all_close(ours(shard_batch(vectors(), mesh), name, mesh), ours(vectors(), name), atol=2e-5)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_what_is_absent_does_not_matter(small, name):
    """But for tokens of a clip that is read for something else that it has."""
    _, _, ours = small
    batch, changed = vectors(), vectors()
    for row, modality in ((2, "subtitle"), (3, "caption"), (4, "vision"), (4, "audio")):
        values = changed[modality]
        (values["ids"] if isinstance(values, dict) else values)[row] = 100.0
    chex.assert_trees_all_close(ours(changed, name), ours(batch, name), rtol=1e-6)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_without_negatives_only_matches_count(small, name):
    """All rows are of one clip."""
    _, _, ours = small
    (_, metrics), gradient = ours({**vectors(), "index": np.zeros(ROWS, np.int32)}, name)
    model, _, _ = small
    text, condition = vectors()["caption"], model.condition(model.encode(vectors()), CONDITION)
    logits = np.asarray(model.match(text, condition), np.float64)[PAIRED]
    np.testing.assert_allclose(
        metrics["loss/matching"], np.mean(np.log1p(np.exp(logits[:, 0] - logits[:, 1]))), rtol=1e-5
    )
    chex.assert_tree_all_finite(gradient)


def test_one_spectrum_serves_both_terms_of_pmrl(monkeypatch):
    spectrum, calls = linalg.spectrum, []
    monkeypatch.setattr(linalg, "spectrum", lambda z: calls.append(z.shape) or spectrum(z))

    def loss():
        model = SmallModel(nnx.Rngs(0))
        return pmrl_objective(model, LossParameters(), vectors(), None, key=KEY, matching_weight=0.0)

    jax.eval_shape(loss)
    assert calls == [(ROWS, 4, 5)]


def test_matching_may_be_left_out_or_read_what_there_is(small):
    model, scalars, _ = small
    batch = {name: value for name, value in vectors().items() if name != "audio"}
    batch["where"] = {name: value for name, value in batch["where"].items() if name != "audio"}
    _, metrics = gram_objective(model, scalars, batch, None, matching_weight=0.0)
    assert set(metrics) == {"loss/volume", "temperature"}
    for objective in OBJECTIVES.values():
        assert np.isfinite(objective(model, scalars, batch, None, key=KEY)[0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"anchor": "text"}, r"batch must have the anchor 'text' and another modality, got \['caption', 'vision'"),
        ({"condition": ("depth",)}, r"batch must have something of condition \('depth',\), got \['caption', 'vision'"),
        ({"condition": ("subtitle", "audio")}, "condition must be one modality, or what a joint head"),
        ({"key": None}, "key must be given if rngs is None"),
    ],
)
def test_what_does_not_fit_is_refused(small, change, message):
    model, scalars, _ = small
    with pytest.raises(ValueError, match=message):
        pmrl_objective(model, scalars, vectors(), None, **{"key": KEY, **change})


class NoisyModel(SmallModel):
    """Random where `rngs` are: in what is encoded, in texts of their own clips, and in those of others."""

    def __init__(self, rngs):
        super().__init__(rngs)
        self.noise = nnx.Param(jnp.zeros(3))

    def encode(self, batch, *, rngs=None):
        return {name: self._shaken(x, 0, rngs) for name, x in super().encode(batch).items()}

    def match(self, text, condition, *, rngs=None):
        return self._shaken(super().match(text, condition), 1 if len(text["ids"]) > len(condition) else 2, rngs)

    def _shaken(self, x, kind, rngs):
        return x if rngs is None else x + self.noise[...][kind] * jax.random.normal(rngs.dropout(), x.shape)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_all_parts_of_the_model_get_the_random_streams(name):
    graph, state = nnx.split(NoisyModel(nnx.Rngs(0)))

    @jax.jit
    def compute(state, noise, key):
        model = nnx.merge(graph, state)
        model.noise[...] = noise
        return OBJECTIVES[name](model, LossParameters(), vectors(), nnx.Rngs(dropout=key), key=KEY)[0]

    loss = functools.partial(compute, state)
    for noise in jnp.eye(3):
        first, again, other = (loss(noise, jax.random.key(seed)) for seed in (1, 1, 2))
        assert first == again
        assert abs(first - other) > 1e-4
    assert loss(jnp.zeros(3), jax.random.key(1)) == loss(jnp.zeros(3), jax.random.key(2))


def clips(rng):
    ids, lengths = rng.integers(1, 97, (ROWS, 5)).astype(np.int32), rng.integers(2, 6, (ROWS, 1))
    return {
        "caption": {"ids": ids, "mask": np.arange(5) < lengths},
        "vision": rng.normal(size=(ROWS, 2, 42, 42, 3)).astype(np.float32),
        "audio": rng.normal(size=(ROWS, 1, 32, 32)).astype(np.float32),
    }


def test_of_the_released_model():
    """Parts by the model's own functions, put together in float64 NumPy as published."""
    model = load_torch(GOLDEN, gram_tiny())
    batch = clips(np.random.default_rng(1))
    graph, state = nnx.split(model)
    names = ("caption", "vision", "audio")

    @jax.jit
    def compute(state, batch):
        model = nnx.merge(graph, state)
        value, metrics = gram_objective(model, LossParameters(temperature=0.2), batch, None, key=KEY)
        tokens = model.encode(batch)
        z = model.project(tokens, batch)
        gallery = jnp.stack([z["vision"], z["audio"]], axis=1)
        items, texts = (
            sample_hard_negatives(key, Volume(), z["caption"], gallery, draw=draw, temperature=0.2, floor=1e-4)
            for key, draw in zip(jax.random.split(KEY), ("items", "queries"))
        )
        rows = jnp.arange(ROWS)
        text = jax.tree.map(lambda x: x[jnp.concatenate([rows, rows, texts])], batch["caption"])
        condition = model.condition(tokens, CONDITION)[jnp.concatenate([rows, items, rows])]
        return value, metrics, z, model.match(text, condition)

    value, metrics, z, logits = compute(state, batch)
    z = np.stack([np.asarray(z[name], np.float64) for name in names], axis=1)
    pairs = np.stack([np.concatenate([np.stack([q] * ROWS)[:, None], z[:, 1:]], axis=1) for q in z[:, 0]])
    volumes = np.sqrt(np.abs(np.linalg.det(pairs @ np.swapaxes(pairs, 2, 3))))
    contrast = 0.0
    for table in (-volumes / 0.2, -volumes.T / 0.2):
        log_p = table - np.log(np.exp(table).sum(axis=1, keepdims=True))
        contrast += -np.mean(0.9 * np.diagonal(log_p) + 0.1 * log_p.mean(axis=1)) / 2
    logits = np.asarray(logits, np.float64)
    matching = np.mean(np.log(np.exp(logits).sum(axis=1)) - np.where(np.arange(24) < 8, logits[:, 1], logits[:, 0]))
    np.testing.assert_allclose(metrics["loss/volume"], contrast, rtol=1e-5)
    np.testing.assert_allclose(metrics["loss/matching"], matching, rtol=1e-4)
    np.testing.assert_allclose(value, contrast + 0.1 * matching, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", OBJECTIVES)
def test_gradients_reach_what_is_said_to_be_trained(filled, name):
    """And nothing else; a key's bias shifts all logits of a query alike."""
    config = without_depth(gram_tiny())
    config = replace(config, towers={name: replace(tower, depth=1) for name, tower in config.towers.items()})
    model = filled(lambda: GramModel(config, rngs=nnx.Rngs(0)))
    graph, state = nnx.split(model)
    batch = clips(np.random.default_rng(1))

    @jax.jit
    def gradient(state, batch):
        def loss(state):
            return OBJECTIVES[name](nnx.merge(graph, state), LossParameters(), batch, None, key=KEY)[0]

        return jax.grad(loss)(state)

    names = jax.tree.leaves(by_name(state, str))
    for path, value in zip(names, jax.tree.leaves(gradient(state, batch)), strict=True):
        reached = is_trained(path, config, modalities=("caption", "vision", "audio"), condition=CONDITION)
        if not path.endswith("key.bias"):
            assert (np.abs(value).max() > 0) == reached, path

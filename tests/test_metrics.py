import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gramjax import metrics
from tests import reference

GOLDEN = Path(__file__).parent / "golden"


def _masked(seed=0):
    rng = np.random.default_rng(seed)
    z, where = reference.unit(rng, 8, 3, 6), rng.random((8, 3)) < 0.7
    where[0], where[1] = True, False
    return z, where


def test_gram_alignment_and_rank_one_ratio(x64):
    z, where = _masked()
    several = [i for i in range(8) if where[i].sum() >= 2]
    expected = np.mean([1 - reference.volume(z[i, where[i]]) for i in several])
    np.testing.assert_allclose(metrics.gram_alignment(jnp.asarray(z), where=jnp.asarray(where)), expected, rtol=1e-12)
    values = [np.linalg.svd(z[i, where[i]], compute_uv=False) ** 2 for i in several]
    expected = np.mean([v[0] / v.sum() for v in values])
    np.testing.assert_allclose(metrics.rank_one_ratio(jnp.asarray(z), where=jnp.asarray(where)), expected, rtol=1e-12)


@pytest.mark.parametrize("metric", [metrics.gram_alignment, metrics.rank_one_ratio])
def test_nothing_to_align_is_zero(metric):
    assert metric(jnp.ones((4, 3, 8)), where=jnp.zeros((4, 3), bool)) == 0


def test_modality_gap(x64):
    z, where = _masked(1)
    centroids = [z[where[:, l], l].mean(0) for l in range(3)]
    expected = [[np.linalg.norm(a - b) for b in centroids] for a in centroids]
    np.testing.assert_allclose(metrics.modality_gap(jnp.asarray(z), where=jnp.asarray(where)), expected, atol=1e-12)
    gradient = jax.grad(lambda z: jnp.sum(metrics.modality_gap(z)))(jnp.ones((4, 3, 8)))
    assert np.all(np.isfinite(gradient))


def test_uniformity(x64):
    x = reference.unit(np.random.default_rng(0), 9, 5)
    terms = [np.exp(-3 * np.sum((x[i] - x[j]) ** 2)) for i in range(9) for j in range(9) if i != j]
    np.testing.assert_allclose(metrics.uniformity(jnp.asarray(x), scale=3.0), np.log(np.mean(terms)), rtol=1e-12)


def test_effective_rank(x64):
    x = np.random.default_rng(0).normal(size=(9, 5)) * np.array([3.0, 1.0, 0.5, 0.1, 0.0])
    shares = np.linalg.svd(x, compute_uv=False)
    shares = shares[shares > 1e-12] / shares.sum()
    np.testing.assert_allclose(metrics.effective_rank(jnp.asarray(x)), np.prod(shares**-shares), rtol=1e-12)
    assert metrics.effective_rank(jnp.zeros((3, 4))) == 0
    np.testing.assert_allclose(metrics.effective_rank(jnp.ones((3, 4))), 1, rtol=1e-6)


@pytest.mark.parametrize("higher", [True, False])
def test_hubness(x64, higher):
    scores = np.random.default_rng(0).normal(size=(40, 12)) + np.linspace(0, 2, 12)
    first = np.argsort(-scores if higher else scores, axis=1)[:, :3]
    counts = np.bincount(first.reshape(-1), minlength=12)
    expected = np.mean((counts - counts.mean()) ** 3) / counts.std() ** 3
    np.testing.assert_allclose(metrics.hubness(jnp.asarray(scores), 3, higher_is_better=higher), expected, rtol=1e-10)
    assert metrics.hubness(jnp.eye(4), 1, higher_is_better=True) == 0
    with pytest.raises(ValueError, match=r"k must be at most the number of items, 4, got 5"):
        metrics.hubness(jnp.eye(4), 5, higher_is_better=True)


@pytest.mark.parametrize("file", ["losses", "losses_aligned"])
@pytest.mark.parametrize("score", ["similarity", "volume"])
def test_recalls_of_the_published_evaluation(file, score):
    """Several captions for each clip, in both directions; in the figures a volume ranks upwards."""
    with np.load(GOLDEN / f"{file}.npz") as golden:
        scores = jnp.asarray(golden["in/retrieval/score"], jnp.float32)
        names, captions = golden["in/retrieval/ids"].tolist(), golden["in/retrieval/ids_txt"].tolist()
        expected = {d: json.loads(str(golden[f"out/retrieval/{score}_{d}"])) for d in ("forward", "backward")}
    clips, texts = jnp.arange(12), jnp.array([names.index(caption) for caption in captions])
    higher = score == "similarity"
    forward = metrics.retrieval_ranks(scores, query_ids=texts, gallery_ids=clips, higher_is_better=higher)
    backward = metrics.retrieval_ranks(scores.T, query_ids=clips, gallery_ids=texts, higher_is_better=higher)
    for direction, ranks in (("forward", forward), ("backward", backward)):
        recalls = [100 * float(metrics.recall_at_k(ranks, k)) for k in (1, 5, 10)]
        assert "/".join(f"{recall:.1f}" for recall in recalls) == expected[direction][f"{direction}_recall"]


@settings(max_examples=80, deadline=None)
@given(st.data())
def test_ranks_against_a_loop(data):
    """Ties and NaN count against the query; a query without a right item is never found."""
    value = st.sampled_from([0.0, 1.0, 2.0, -1.0, float("nan"), float("inf"), -float("inf")])
    scores = np.array(data.draw(st.lists(value, min_size=20, max_size=20)), np.float32).reshape(4, 5)
    query_ids = np.array(data.draw(st.lists(st.integers(0, 3), min_size=4, max_size=4)))
    gallery_ids = np.array(data.draw(st.lists(st.integers(0, 3), min_size=5, max_size=5)))
    higher = data.draw(st.booleans())
    expected = []
    for i in range(4):
        worth = [-np.inf if np.isnan(s) else (s if higher else -s) for s in scores[i]]
        right = [w for w, g in zip(worth, gallery_ids) if g == query_ids[i]]
        wrong = [w for w, g in zip(worth, gallery_ids) if g != query_ids[i]]
        expected.append(sum(w >= max(right) for w in wrong) if right else 5)
    ranks = metrics.retrieval_ranks(
        jnp.asarray(scores),
        query_ids=jnp.asarray(query_ids),
        gallery_ids=jnp.asarray(gallery_ids),
        higher_is_better=higher,
    )
    np.testing.assert_array_equal(ranks, expected)


def test_recall_and_median():
    ranks = jnp.array([0, 3, 4, 5, 99])
    assert [float(metrics.recall_at_k(ranks, k)) for k in (1, 5, 6)] == pytest.approx([0.2, 0.6, 0.8])
    assert metrics.median_rank(ranks) == 5
    assert metrics.median_rank(ranks[:4]) == 4.5


@pytest.mark.parametrize("metric", [metrics.gram_alignment, metrics.rank_one_ratio, metrics.modality_gap])
def test_a_vector_that_is_not_a_number_shows(metric):
    z = reference.unit(np.random.default_rng(0), 6, 3, 8)
    z[2, 1] = np.nan
    assert np.isnan(metric(jnp.asarray(z, jnp.float32))).any()
    where = np.ones((6, 3), bool)
    where[2, 1] = False
    assert np.isfinite(metric(jnp.asarray(z, jnp.float32), where=jnp.asarray(where))).all()


def test_bad_input(unchecked_signatures):
    with pytest.raises(ValueError, match="k must be at least 1, got 0"):
        metrics.recall_at_k(jnp.array([0]), 0)
    with pytest.raises(TypeError, match="k must be an integer of at least 1, got float"):
        metrics.recall_at_k(jnp.array([0]), 1.5)
    with pytest.raises(ValueError, match="scale must be positive, got -1"):
        metrics.uniformity(jnp.ones((2, 4)), scale=-1)
    with pytest.raises(TypeError, match=r"gallery_ids must be integers of shape \[items\] = \(5,\), got dtype float32"):
        metrics.retrieval_ranks(jnp.ones((4, 5)), gallery_ids=jnp.arange(5.0), higher_is_better=True)
    with pytest.raises(ValueError, match=r"at least one query, got shape \(0,\)"):
        metrics.recall_at_k(jnp.array([], jnp.int32), 1)
    with pytest.raises(ValueError, match=r"query_ids must have shape \[queries\] = \(4,\), got shape \(5,\)"):
        metrics.retrieval_ranks(jnp.ones((4, 5)), query_ids=jnp.arange(5), higher_is_better=True)
    with pytest.raises(ValueError, match=r"x must hold at least 2 vectors .*\(1, 4\)"):
        metrics.uniformity(jnp.ones((1, 4)))
    with pytest.raises(ValueError, match=r"embeddings must have at least 2 modalities.*\(4, 1, 8\)"):
        metrics.gram_alignment(jnp.ones((4, 1, 8)))

"""Two stages and zero-shot classification against plain loops, published recalls, and pairs matched one by one."""

import functools
import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from gramjax import metrics, scores
from gramjax.checkpoints import load_torch
from gramjax.evaluation import StagedRanks, TwoStageRetrieval, two_stage_retrieval, zero_shot_ranks
from gramjax.models import GramModel, gram_tiny
from tests import reference

GOLDEN = Path(__file__).parent / "golden"
CANDIDATES = 3
DIRECTIONS = ("text_to_item", "item_to_text")


def _worth(score):
    return -np.inf if np.isnan(score) else score


def _rank(goodness, right):
    """Wrong ones that are at least as good as the best right one; all there are, if none is right."""
    best = [_worth(g) for g, r in zip(goodness, right) if r]
    return sum(_worth(g) >= max(best) for g, r in zip(goodness, right) if not r) if best else len(goodness)


def _both_stages(goodness, matching, right, k):
    """`[Q]` ranks by `goodness` `[Q, N]` and with the best `k` in the order of `matching`, by loops."""
    first, second = [], []
    for query in range(len(goodness)):
        first.append(_rank(goodness[query], right[query]))
        order = sorted(range(len(goodness[query])), key=lambda j, row=goodness[query]: (-_worth(row[j]), j))
        found = [j for j in order if _worth(goodness[query][j]) > -np.inf][:k]
        if any(right[query][j] for j in found):
            second.append(_rank([matching[query][j] for j in found], [right[query][j] for j in found]))
        else:
            second.append(first[-1])
    return first, second


def _assert_ranks(result, goodness, matching, right, k):
    for direction, table, match, pairs in (
        (result.text_to_item, goodness, matching, right),
        (result.item_to_text, goodness.T, matching.T, right.T),
    ):
        first, second = _both_stages(table, match, pairs, k)
        np.testing.assert_array_equal(direction.first, first)
        np.testing.assert_array_equal(direction.second, second)


def _look_up(table):
    """Arguments for a matching function that looks pairs up."""
    return lambda texts, item: table[texts, item], np.arange(len(table)), lambda item: item


def _whole(score, right, matching, k=CANDIDATES, **options):
    """Two stages for scores given as a matrix: texts are its rows, and the inner product with item j its column j."""
    score = jnp.asarray(score, jnp.float32)
    return two_stage_retrieval(
        score, jnp.eye(score.shape[1])[:, None], *_look_up(matching), score=scores.Cosine(), k=k, **right, **options,
    )  # fmt: skip


@pytest.mark.parametrize("file", ["losses", "losses_aligned"])
def test_recalls_of_the_published_evaluation(file):
    """Both directions of a matrix with several captions a clip; in the figures a volume ranks upwards."""
    with np.load(GOLDEN / f"{file}.npz") as golden:
        score = golden["in/retrieval/score"]
        names, captions = golden["in/retrieval/ids"].tolist(), golden["in/retrieval/ids_txt"].tolist()
        published = {
            (kind, direction): json.loads(str(golden[f"out/retrieval/{kind}_{direction}"]))[f"{direction}_recall"]
            for kind in ("similarity", "volume")
            for direction in ("forward", "backward")
        }
    right = {"text_ids": jnp.array([names.index(caption) for caption in captions]), "item_ids": jnp.arange(12)}
    for kind, sign in (("similarity", 1), ("volume", -1)):
        # Matched by the score itself, the second stage changes nothing.
        figures = _whole(sign * score, right, sign * score).figures()
        for direction, theirs in zip(DIRECTIONS, ("forward", "backward")):
            for stage in ("first stage", "second stage"):
                recalls = [100 * figures[direction][stage][f"recall@{k}"] for k in (1, 5, 10)]
                assert "/".join(f"{recall:.1f}" for recall in recalls) == published[kind, theirs]


def test_against_loops():
    """Several captions, items and texts without a partner, ties in either stage, NaN in the second."""
    rng = np.random.default_rng(0)
    for batch_size in (1, 4, 25):
        goodness = rng.integers(-3, 4, (30, 12)).astype(np.float32)
        matching = rng.choice([0.0, 1.0, 2.0, 3.0, np.nan], (30, 12))
        text_ids, item_ids = rng.integers(0, 12, 30), rng.integers(0, 12, 12)
        right = {"text_ids": jnp.asarray(text_ids), "item_ids": jnp.asarray(item_ids)}
        result = _whole(goodness, right, matching, batch_size=batch_size)
        _assert_ranks(result, goodness, matching, text_ids[:, None] == item_ids[None, :], CANDIDATES)


@pytest.mark.parametrize("k", [20, 50])
def test_more_candidates_than_one_side_or_both_have(k):
    """Either direction re-ranks as many as there are of its own gallery."""
    rng = np.random.default_rng(1)
    goodness, matching = rng.normal(size=(2, 30, 12)).astype(np.float32)
    right = {"text_ids": jnp.arange(30) % 12, "item_ids": jnp.arange(12)}
    result = _whole(goodness, right, matching, k=k)
    _assert_ranks(result, goodness, matching, np.arange(30)[:, None] % 12 == np.arange(12), k)


def test_figures():
    ranks = StagedRanks(jnp.array([0, 7, 12, 2]), jnp.array([0, 0, 12, 0]))
    stages = {
        "first stage": {"recall@1": 0.25, "recall@5": 0.5, "recall@10": 0.75, "median rank": 5.5},
        "second stage": {"recall@1": 0.75, "recall@5": 0.75, "recall@10": 0.75, "median rank": 1.0},
    }
    assert TwoStageRetrieval(ranks, ranks).figures() == {"text_to_item": stages, "item_to_text": stages}


@pytest.mark.parametrize("score", [scores.Cosine(), scores.Triangle()], ids=lambda s: type(s).__name__)
def test_missing_modalities(score):
    """The same scores serve both directions; what a score cannot use is not found, finds nothing, is not asked for."""
    rng = np.random.default_rng(3)
    z = reference.unit(rng, 9, 3, 8).astype(np.float32)
    where = np.ones((9, 2), bool)
    where[1, 0] = where[4, 1] = False
    where[6] = False
    text_where = np.arange(9) != 2
    z[:, 1:][~where] = np.nan
    z[2, 0] = np.nan
    matching = rng.normal(size=(9, 9))
    clean = np.nan_to_num(z)
    queries, gallery = jnp.asarray(clean[:, 0]), jnp.asarray(clean[:, 1:])
    goodness = np.array(scores.score_matrix(score, queries, gallery, gallery_where=jnp.asarray(where)))
    goodness = goodness if score.higher_is_better else -goodness
    goodness[2] = -np.inf
    asked = set()
    match, texts, _ = _look_up(matching)
    result = two_stage_retrieval(
        jnp.asarray(z[:, 0]), jnp.asarray(z[:, 1:]), match, texts, lambda i: asked.add(i) or i, score=score, k=4,
        text_where=jnp.asarray(text_where), item_where=jnp.asarray(where), block_size=4,
    )  # fmt: skip
    usable = np.isfinite(goodness).any(axis=0)
    assert asked == set(np.flatnonzero(usable))
    forward = _both_stages(goodness, matching, np.eye(9, dtype=bool), 4)
    backward = _both_stages(goodness.T, matching.T, np.eye(9, dtype=bool), 4)
    for (first, second), ranks, queries in (
        (forward, result.text_to_item, text_where),
        (backward, result.item_to_text, usable),
    ):
        np.testing.assert_array_equal(ranks.first[queries], np.array(first)[queries])
        np.testing.assert_array_equal(ranks.second[queries], np.array(second)[queries])
        assert np.all(np.asarray(ranks.first)[~queries] == 9)
        assert np.all(np.asarray(ranks.second)[~queries] == 9)


def test_a_released_model():
    """Cached conditions, re-ranked in batches, against every pair matched by itself with nothing cached."""
    model = load_torch(GOLDEN / "gram_tiny_ddp.pt", gram_tiny())
    assert isinstance(model, GramModel)
    rng = np.random.default_rng(0)
    # The published clips and captions, and further ones near them: seven captions of four clips.
    clips, captions, k = [0, 1, 2, 0], [0, 1, 1, 2, 0, 0, 0], 3
    text_ids = np.array([0, 1, 1, 2, 3, 3, 0])
    with np.load(GOLDEN / "gram_tiny.npz") as golden:
        conditions = golden["out/condition_feats_va"][clips]
        ids, mask = golden["in/caption_input_ids"][captions], golden["in/caption_attention_mask"][captions] == 1
        text_embeddings = golden["out/feat_t"][captions]
        items = np.stack([golden["out/feat_v"], golden["out/feat_a"]], axis=1)[clips]
    conditions = conditions + 0.5 * rng.normal(size=conditions.shape).astype(np.float32)
    ids[2:, 1:] = rng.integers(1, 97, ids[2:, 1:].shape)
    text_embeddings, items = (
        x + rng.normal(size=x.shape).astype(np.float32) * 0.5 / x.shape[-1] ** 0.5 for x in (text_embeddings, items)
    )
    texts = {"ids": ids.astype(np.int32), "mask": mask}

    cache = nnx.jit(lambda model, condition: model.cache_condition(condition))
    match = nnx.jit(lambda model, texts, clip: jnp.diff(model.match(texts, clip))[:, 0])
    result = two_stage_retrieval(
        jnp.asarray(text_embeddings), jnp.asarray(items), functools.partial(match, model), texts,
        lambda clip: cache(model, conditions[clip : clip + 1]), text_ids=jnp.asarray(text_ids),
        item_ids=jnp.arange(len(clips)), k=k, batch_size=3,
    )  # fmt: skip

    pairs = {name: jnp.tile(value, (len(clips), 1)) for name, value in texts.items()}
    matching = match(model, pairs, jnp.asarray(np.repeat(conditions, len(captions), axis=0)))
    matching = np.array(matching).reshape(len(clips), len(captions)).T
    volumes = np.array(
        [
            [reference.volume([t, *item]) for item in items.astype(np.float64)]
            for t in text_embeddings.astype(np.float64)
        ]
    )
    for table in (matching, volumes):  # neither order depends on rounding
        assert min(np.diff(np.sort(table, axis=axis), axis=axis).min() for axis in (0, 1)) > 1e-5
    _assert_ranks(result, -volumes, matching, text_ids[:, None] == np.arange(len(clips))[None, :], k)
    for ranks in (result.text_to_item, result.item_to_text):
        assert not np.array_equal(ranks.first, ranks.second)


def test_zero_shot():
    """Templates are averaged, absent ones left out; a class without any, and an item without anything, never found."""
    rng = np.random.default_rng(0)
    classes, templates, d, n = 6, 3, 8, 20
    centres = reference.unit(rng, classes, d)
    texts = centres[:, None] + 0.7 * reference.unit(rng, classes, templates, d)
    texts /= np.linalg.norm(texts, axis=-1, keepdims=True)
    labels = rng.integers(0, classes, n)
    items = centres[labels][:, None] + 0.7 * reference.unit(rng, n, 2, d)
    items /= np.linalg.norm(items, axis=-1, keepdims=True)
    item_where, class_where = rng.random((n, 2)) < 0.8, rng.random((classes, templates)) < 0.7
    item_where[0], class_where[:, 0], class_where[3] = False, True, False
    expected = []
    for item, there, label in zip(items, item_where, labels):
        distances = [
            -reference.volume([mean / np.linalg.norm(mean), *item[there]]) if there.any() and present.any() else -np.inf
            for mean, present in zip((texts * class_where[..., None]).sum(axis=1) + 1e-30, class_where)
        ]
        expected.append(_rank(distances, np.arange(classes) == label) if there.any() else classes)
    texts[~class_where], items[~item_where] = np.nan, np.nan
    ranks = zero_shot_ranks(
        jnp.asarray(items, jnp.float32), jnp.asarray(texts, jnp.float32), jnp.asarray(labels),
        item_where=jnp.asarray(item_where), class_where=jnp.asarray(class_where), block_size=4,
    )  # fmt: skip
    np.testing.assert_array_equal(ranks, expected)
    for k in (1, 5):
        assert float(metrics.recall_at_k(ranks, k)) == pytest.approx(np.mean(np.array(expected) < k))


def test_one_name_for_a_class_is_a_single_template():
    rng = np.random.default_rng(4)
    names = jnp.asarray(reference.unit(rng, 6, 8), jnp.float32)
    items = jnp.asarray(reference.unit(rng, 20, 2, 8), jnp.float32)
    labels = jnp.arange(20) % 6
    by_name = zero_shot_ranks(items, names, labels, block_size=4)
    np.testing.assert_array_equal(zero_shot_ranks(items, names[:, None], labels, block_size=4), by_name)
    # Two templates that cancel leave the class without a direction, not nearest to everything.
    templates = np.stack([names, names], axis=1)
    templates[0, 1] *= -1
    cancelled = zero_shot_ranks(items, jnp.asarray(templates), labels, block_size=4)
    assert np.all(np.asarray(cancelled)[::6] >= 5)


def test_errors(unchecked_signatures):
    x, matching = jnp.eye(3), np.eye(3)
    call = functools.partial(two_stage_retrieval, x, x[:, None], *_look_up(matching))
    with pytest.raises(ValueError, match="there must be texts and items, got 3 texts and 0 items"):
        two_stage_retrieval(x, x[:0, None], *_look_up(matching), item_ids=jnp.zeros(0, int))
    with pytest.raises(ValueError, match="k must be at least 1, got 0"):
        call(k=0)
    with pytest.raises(ValueError, match="text_ids must say which of the 3 items each of the 2 texts belongs to"):
        two_stage_retrieval(x[:2], x[:, None], *_look_up(matching), k=2)
    with pytest.raises(ValueError, match=r"item_ids must have shape \[items\] = \(3,\)"):
        call(k=2, item_ids=jnp.arange(4))
    with pytest.raises(ValueError, match=r"item_where must have shape \[items, modality\] = \(3, 1\)"):
        call(k=2, item_where=jnp.ones((3, 2), bool))
    with pytest.raises(ValueError, match="labels must be from 0 to 2, as there are 3 classes; got 0 to 3"):
        zero_shot_ranks(x[:, None], x, jnp.array([0, 1, 3]))
    with pytest.raises(ValueError, match=r"class_where must have shape \[classes, templates\] = \(3, 1\)"):
        zero_shot_ranks(x[:, None], x[:, None], jnp.arange(3), class_where=jnp.ones(3, bool))

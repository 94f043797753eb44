"""Retrieval between texts and items of several modalities as it is reported: two stages, both directions, zero-shot.

Three captions of two clips (the first two belong to clip 0), embeddings of the clips' single modality, and a matching
function that looks at the texts themselves:

>>> captions = jnp.array([[1.0, 0.0], [0.6, 0.8], [0.0, 1.0]])
>>> clips = jnp.array([[[0.6, 0.8]], [[1.0, 0.0]]])
>>> words, clip_words = np.array([4.0, 5.0, 9.0]), np.array([4.5, 9.5])
>>> result = two_stage_retrieval(
...     captions, clips, lambda words, clip: -abs(words - clip), words, lambda i: clip_words[i],
...     text_ids=jnp.array([0, 0, 1]), item_ids=jnp.array([0, 1]), k=2,
... )
>>> result.text_to_item.first.tolist(), result.text_to_item.second.tolist()
([1, 0, 1], [0, 0, 0])
>>> result.figures()["text_to_item"]["second stage"]["recall@1"]
1.0

How a `gramjax.models.GramModel` becomes a matching function is shown in `gramjax.reranking`.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from gramjax import _checks, linalg, metrics
from gramjax.reranking import Match, match_pairs, reranked_ranks
from gramjax.scores import Score, Volume
from gramjax.streaming import streamed_ranks, streamed_top_k


@dataclasses.dataclass(frozen=True)
class StagedRanks:
    """Ranks of each query's best right answer, 0 is first: by the score, and after re-ranking the best."""

    first: Int[Array, " queries"]
    second: Int[Array, " queries"]

    def figures(self) -> dict[str, dict[str, float]]:
        """For either stage recall@1, @5 and @10, shares in [0, 1], and the median rank, counted from 1."""
        stages = {"first stage": self.first, "second stage": self.second}
        return {
            stage: {f"recall@{k}": float(metrics.recall_at_k(ranks, k)) for k in (1, 5, 10)}
            | {"median rank": float(metrics.median_rank(ranks))}
            for stage, ranks in stages.items()
        }


@dataclasses.dataclass(frozen=True)
class TwoStageRetrieval:
    """Both directions of a retrieval in two stages."""

    text_to_item: StagedRanks
    item_to_text: StagedRanks

    def figures(self) -> dict[str, dict[str, dict[str, float]]]:
        """`StagedRanks.figures` of either direction."""
        return {"text_to_item": self.text_to_item.figures(), "item_to_text": self.item_to_text.figures()}


def two_stage_retrieval(
    text_embeddings: Float[Array, "texts dim"],
    item_embeddings: Float[Array, "items modality dim"],
    match: Match,
    texts: Any,
    condition_of: Callable[[int], Any],
    *,
    text_ids: Int[Array, " texts"] | None = None,
    item_ids: Int[Array, " items"] | None = None,
    text_where: Bool[Array, " texts"] | None = None,
    item_where: Bool[Array, "items modality"] | None = None,
    score: Score = Volume(),  # noqa: B008 (a score is an immutable value)
    k: int = 50,
    batch_size: int = 25,
    block_size: int | None = None,
) -> TwoStageRetrieval:
    """Searches items by text and texts by item: first by a score, then the best `k` again by a matching function.

    The evaluation of GRAM and PMRL, with one difference: ties and NaN count against the query in either stage, where
    the published code leaves them to the order of sorting. The same score of a pair serves both directions; it is
    streamed (`gramjax.streaming`), and never held for all pairs.

    Args:
      text_embeddings: `[T, d]`, unit vectors.
      item_embeddings: `[N, m, d]`, unit vectors.
      match: takes a batch of texts and the condition of an item, and returns one score for each text, higher is
        better; see `gramjax.reranking.match_pairs`.
      texts: what `match` reads of texts: a pytree of arrays with the T texts as leading axis.
      condition_of: what `match` reads of an item, by the item's number. It is called once for each item in a direction.
      text_ids: `[T]` integers. A text is right for the items with the same id: several captions for an item are
        several texts with its id. Default `0 .. T-1`, if there are as many items.
      item_ids: `[N]` integers; default `0 .. N-1`.
      text_where: `[T]` bool, which texts are present; default all. An absent one is never found and finds nothing.
      item_where: `[N, m]` bool, which modalities are present; default all. An item that the score cannot use is never
        found and finds nothing, and its condition is not asked for.
      score: of the first stage.
      k: candidates of the second stage, at least 1; in a gallery with fewer, all of them.
      batch_size: texts that are matched with an item at a time.
      block_size: columns of a tile of the first stage; default from the platform.

    Returns:
      Ranks in both directions after either stage. A query without a right answer has the size of the gallery as rank.

    Raises:
      TypeError: if a dtype is wrong.
      ValueError: if a shape does not fit, there are no texts or items, `text_ids` are left out with other numbers of
        texts than items, `k`, `batch_size` or `block_size` is out of range, or `match` returns another shape than one
        score for each text.

    >>> same = jnp.eye(3)
    >>> by_score = two_stage_retrieval(same, same[:, None], lambda t, i: t == i, np.arange(3.0), float, k=2)
    >>> by_score.item_to_text.second
    Array([0, 0, 0], dtype=int32)
    """
    text_embeddings = _checks.floating("text_embeddings", text_embeddings, ("texts", "dim"))
    item_embeddings = _checks.floating("item_embeddings", item_embeddings, ("items", "modality", "dim"))
    number_of_texts, number_of_items = len(text_embeddings), len(item_embeddings)
    if text_ids is None and item_ids is None and number_of_texts != number_of_items:
        raise ValueError(
            f"text_ids must say which of the {number_of_items} items each of the {number_of_texts} texts belongs to, "
            "got None."
        )
    text_ids = _ids("text_ids", text_ids, number_of_texts, "texts")
    item_ids = _ids("item_ids", item_ids, number_of_items, "items")
    text_where = _checks.mask("text_where", text_where, (number_of_texts,), "[texts]")
    item_where = _checks.mask("item_where", item_where, item_embeddings.shape[:2], "[items, modality]")
    k = _checks.size("k", k, or_none=False)
    if not (number_of_texts and number_of_items):
        raise ValueError(f"there must be texts and items, got {number_of_texts} texts and {number_of_items} items.")

    def one_way(score, queries, gallery, query_ids, gallery_ids, query_where, gallery_where, pairs):
        options = {"query_where": query_where, "gallery_where": gallery_where, "block_size": block_size}
        _, candidates = streamed_top_k(score, queries, gallery, min(k, len(gallery)), **options)
        first = streamed_ranks(score, queries, gallery, query_ids=query_ids, gallery_ids=gallery_ids, **options)
        candidates = np.asarray(candidates)
        matches = match_pairs(
            match, texts, condition_of, *pairs(np.arange(len(queries))[:, None], candidates), batch_size=batch_size
        )
        second = reranked_ranks(first, candidates, matches, query_ids=query_ids, gallery_ids=gallery_ids)
        return StagedRanks(first, jnp.asarray(second))

    return TwoStageRetrieval(
        one_way(score, text_embeddings, item_embeddings, text_ids, item_ids, text_where, item_where,
                lambda query, found: (query, found)),
        one_way(_FromItems(score), item_embeddings, text_embeddings[:, None], item_ids, text_ids,
                _of_usable(score, item_where), text_where[:, None], lambda query, found: (found, query)),
    )  # fmt: skip


def zero_shot_ranks(
    item_embeddings: Float[Array, "items modality dim"],
    class_texts: Float[Array, "classes dim"] | Float[Array, "classes templates dim"],
    labels: Int[Array, " items"],
    *,
    item_where: Bool[Array, "items modality"] | None = None,
    class_where: Bool[Array, " classes"] | Bool[Array, "classes templates"] | None = None,
    score: Score = Volume(),  # noqa: B008 (a score is an immutable value)
    block_size: int | None = None,
) -> Int[Array, " items"]:
    """Classifies items by the texts of the classes: how many wrong classes come before each item's own.

    `gramjax.metrics.recall_at_k` of the result is the top-k accuracy. To classify in two stages, pass the texts of the
    classes to `two_stage_retrieval`, with `0 .. C-1` as `text_ids` and labels as `item_ids`.

    Args:
      item_embeddings: `[N, m, d]`, unit vectors.
      class_texts: `[C, d]`, unit vectors of the names of the classes; or `[C, t, d]`, of several templates ("a photo
        of a cat", "a drawing of a cat"), whose mean, of unit length again, stands for the class.
      labels: `[N]` integers from 0 to C - 1.
      item_where: `[N, m]` bool, which modalities are present; default all. Of an item that the score cannot use, the
        class is never found.
      class_where: which texts are present, of the shape `[C]` or `[C, t]`; default all. A class without any is never
        found.
      score: what is compared.
      block_size: classes of a tile; default from the platform.

    Returns:
      `[N]` int32, 0 is classified correctly. Ties and NaN count against the item.

    Raises:
      TypeError: if a dtype is wrong.
      ValueError: if a shape does not fit, there are no items or classes, a label is out of range, or `block_size` is.

    >>> names = jnp.array([[[1.0, 0.0], [0.8, 0.6]], [[0.0, 1.0], [0.6, 0.8]]])
    >>> ranks = zero_shot_ranks(jnp.array([[[0.6, 0.8]], [[0.8, 0.6]]]), names, jnp.array([1, 0]))
    >>> float(metrics.recall_at_k(ranks, 1))
    1.0
    """
    items = _checks.floating("item_embeddings", item_embeddings, ("items", "modality", "dim"))
    class_texts = _checks.as_array("class_texts", class_texts)
    templates = class_texts.ndim == 3
    axes = ("classes", "templates", "dim") if templates else ("classes", "dim")
    class_texts = _checks.floating("class_texts", class_texts, axes)
    where = _checks.mask("class_where", class_where, class_texts.shape[:-1], f"[{', '.join(axes[:-1])}]")
    item_where = _checks.mask("item_where", item_where, items.shape[:2], "[items, modality]")
    labels = _checks.ids("labels", labels, len(items), "items").astype(jnp.int32)
    if _checks.is_concrete(labels) and labels.size and not (labels.min() >= 0 and labels.max() < len(class_texts)):
        raise ValueError(
            f"labels must be from 0 to {len(class_texts) - 1}, as there are {len(class_texts)} classes; got "
            f"{int(labels.min())} to {int(labels.max())}."
        )
    if templates:
        # The sum points the way of the mean. Without a direction there is nothing to compare.
        total = jnp.sum(jnp.where(where[..., None], class_texts, 0.0), axis=1)
        length = linalg.safe_norm(total)
        where = jnp.any(where, axis=1) & (length != 0)
        class_texts = total / jnp.where(length == 0, 1.0, length)[:, None]
    return streamed_ranks(
        _FromItems(score), items, class_texts[:, None], query_ids=labels, query_where=_of_usable(score, item_where),
        gallery_where=where[:, None], block_size=block_size,
    )  # fmt: skip


@dataclasses.dataclass(frozen=True)
class _FromItems:
    """A score with its sides exchanged: items, `[q, m, d]`, search texts, `[n, 1, d]`; a pair's score is the same.

    Not what a score makes of queries of several modalities: by `LeadingDirection` those would find other texts first.
    Items that the score cannot use must not be among the queries (`_of_usable`).
    """

    score: Score

    @property
    def higher_is_better(self):
        return self.score.higher_is_better

    def usable(self, where):
        """Texts that are there."""
        return where[:, 0]

    def prepare(self, gallery, where):
        """The texts themselves, `[n, d]`."""
        del where
        return gallery[:, 0]

    def tile_sets(self, queries, where, prepared):
        """`[q, m, d], [n, d] -> [q, n]`."""
        return self.score.tile(prepared, self.score.prepare(queries, where)).T

    def tile(self, queries, prepared):
        """The same for items of one modality."""
        return self.tile_sets(queries[:, None], jnp.ones((len(queries), 1), bool), prepared)

    def pairs(self, queries, prepared):
        """Matched pairs of items of one modality and texts."""
        where = jnp.ones((len(queries), 1), bool)
        return self.score.pairs(prepared, self.score.prepare(queries[:, None], where))


def _of_usable(score: Score, item_where: Array) -> Array:
    """`item_where` without the items that the score cannot use: a query of which nothing is present finds nothing."""
    return item_where & score.usable(item_where)[:, None]


def _ids(name: str, ids: Any, count: int, axis: str) -> Array:
    return jnp.arange(count, dtype=jnp.int32) if ids is None else _checks.ids(name, ids, count, axis)

"""Searches an index that `experiments.embed` wrote, by a sentence, a sound file, or a clip.

`python -m experiments.search index "a dog runs on the beach"`
`python -m experiments.search index bark.wav`
`python -m experiments.search index videos/dog.mp4 --k 20 --picture dog.png`
`python -m experiments.search index "a dog runs on the beach" --rerank 50`
"""

import dataclasses
import logging
import tempfile
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import tyro

from experiments import figures
from experiments.cli import interrupts_end_at_once, one_line_errors, removed_if_interrupted
from experiments.embed import SCORES, Contents, model_digest, read_index
from experiments.encoding import Matcher, embed_items, matched_modalities
from experiments.galleries import ClipGallery, Item
from experiments.usage import read_usage
from gramjax import reranking, retrieval
from gramjax.data import clips
from gramjax.models import GramModel


@dataclasses.dataclass(frozen=True)
class Search:
    """Search an index."""

    index: tyro.conf.Positional[Path]
    """Folder that `experiments.embed` wrote."""
    query: tyro.conf.Positional[str]
    """A sentence, or the path of a video or a sound file (of an emoji index: of a picture or a sound file)."""
    k: int = 10
    """How many items."""
    rerank: int = 0
    """How many of the best clips for a sentence are read again, and put in the order of the model's matching head."""
    picture: Path | None = None
    """The contact sheet to draw; default: search.png in the folder of the index."""
    model: Path | None = None
    """Where the model is, if no longer where it was; it must be the same."""
    vocabulary: Path | None = None
    """Where the model's vocabulary is, if no longer where it was."""


@dataclasses.dataclass(frozen=True)
class Found:
    """One item that came back.

    Attributes:
      item: itself.
      position: in the index.
      score: by which it was found.
      match: probability that it belongs to the sentence, if it was read again.
    """

    item: Item
    position: int
    score: float
    match: float | None = None


def find(
    index: retrieval.Index, contents: Contents, query: str, k: int, model_path: Path | None = None, *, rerank: int = 0
) -> list[Found]:
    """The `k` best items for a sentence or a file, best first, or all if there are fewer.

    Raises:
      ValueError: if the query cannot be read or the index has nothing to compare it with, the model is another one,
        k is not positive, or what is asked for cannot be read again.
    """
    if k < 1:
        raise ValueError(f"k must be positive, got {k}")
    if rerank < 0:
        raise ValueError(f"rerank must not be negative, got {rerank}")
    path = Path(contents.model) if model_path is None else model_path
    if not path.is_dir():
        raise ValueError(f"model must be where the index was made with it; say where it is now (--model), got {path}")
    batch = contents.gallery.query(query)
    if rerank and (not isinstance(contents.gallery, ClipGallery) or "caption" not in batch):
        raise ValueError("rerank is for a sentence and an index of clips")
    model = contents.gallery.load(path)
    if model_digest(model) != contents.digest:
        raise ValueError(f"model must be the one that the index was made with, got another in {path}")
    if strange := sorted(set(batch) - set(model.config.modalities)):
        raise ValueError(f"query must be of the model's {', '.join(model.config.modalities)}, got {', '.join(strange)}")
    present = {name: np.ones(1, bool) for name in batch}
    embeddings, _ = embed_items(model, [(batch, present)], list(batch))
    # A query of one modality may be compared by any score.
    queries = jnp.asarray(embeddings[:, 0] if len(batch) == 1 else embeddings)
    values, positions = retrieval.search(index, queries, min(max(k, rerank), len(index)))
    found = [
        Found(contents.items[position], position, value)
        for position, value in zip(np.asarray(positions[0]).tolist(), np.asarray(values[0]).tolist())
        if position >= 0
    ]
    if rerank and isinstance(contents.gallery, ClipGallery):
        modalities = matched_modalities(model.config, contents.gallery.modalities, read_usage(path).condition)
        found[:rerank] = _reranked(contents.gallery, model, modalities, batch["caption"], found[:rerank])
    return found[:k]


def _reranked(
    gallery: ClipGallery, model: GramModel, modalities: tuple[str, ...], text: Any, found: list[Found]
) -> list[Found]:
    """The same in the order of the matching head, which reads the modalities."""
    gallery = dataclasses.replace(gallery, config=dataclasses.replace(gallery.config, modalities=modalities))
    folder = clips.ClipFolder.of([one.item.clip() for one in found])
    numbers = np.arange(len(found))
    with tempfile.TemporaryDirectory() as conditions, removed_if_interrupted(Path(conditions)):
        # Few at a time: a machine that searches may be smaller than the one that embedded.
        batches = gallery.batches(folder, min(len(found), 4))
        embed_items(model, batches, modalities, match_with=modalities, conditions=Path(conditions))
        matcher = Matcher(model, Path(conditions))
        matches = reranking.match_pairs(matcher.match, text, matcher.condition_of, np.zeros_like(numbers), numbers)
    matches, order = (rows[0] for rows in reranking.rerank(numbers[None], matches[None]))
    # The difference of two logits as the softmax's share.
    return [
        dataclasses.replace(found[number], match=float(1 / (1 + np.exp(-match))))
        for number, match in zip(order, matches)
    ]


def _with_vocabulary(contents: Contents, vocabulary: Path | None) -> Contents:
    """The same, of which sentences are read with a vocabulary that lies elsewhere now."""
    gallery = contents.gallery
    if not isinstance(gallery, ClipGallery) or gallery.vocabulary is None:
        if vocabulary is not None:
            raise ValueError("vocabulary is for an index of clips that was made with one")
        return contents
    path = Path(gallery.vocabulary) if vocabulary is None else vocabulary
    if not path.exists():
        raise ValueError(f"vocabulary must be where it was; say where it is now (--vocabulary), got {path}")
    return dataclasses.replace(contents, gallery=dataclasses.replace(gallery, vocabulary=str(path)))


def table(found: list[Found], score: str) -> str:
    """What came back, one line each."""
    better = "higher" if SCORES[score].higher_is_better else "lower"
    width = max(len(one.item.name) for one in found)
    read_again = any(one.match is not None for one in found)
    title = f"{score} ({better} is better)"
    lines = [f"rank  {'match  ' if read_again else ''}{title}  {'name':{width}}  file or caption"]
    for rank, one in enumerate(found, 1):
        what = one.item.text or one.item.video or one.item.audio or ""
        match = "" if not read_again else " " * 7 if one.match is None else f"{one.match:.3f}  "
        lines.append(f"{rank:4}  {match}{one.score:{len(title)}.4f}  {one.item.name:{width}}  {what}".rstrip())
    return "\n".join(lines)


def main(options: Search) -> None:
    # What cannot be read of a query is said below, and no reason to speak of "1 of 1 clips".
    logging.getLogger("gramjax.data.clips").setLevel(logging.ERROR)
    index, contents = read_index(options.index)
    contents = _with_vocabulary(contents, options.vocabulary)
    found = find(index, contents, options.query, options.k, options.model, rerank=options.rerank)
    print(table(found, contents.score))
    looks = contents.gallery.pictures([(one.position, one.item) for one in found])
    cells = [
        figures.Cell(look, one.item.name, f"{rank}.  {one.score:.3f}")
        for rank, (one, look) in enumerate(zip(found, looks), 1)
    ]
    path = options.picture or options.index / "search.png"
    print("\nDrawn:", figures.contact_sheet(cells, path, title=options.query))


if __name__ == "__main__":
    with interrupts_end_at_once("interrupted"), one_line_errors():
        main(tyro.cli(Search, description=__doc__))

"""Embeds a folder of clips, or the emoji test split, and writes an index that `experiments.search` searches.

`python -m experiments.embed converted index --clips videos --vocabulary bert-base-uncased/vocab.txt`
`python -m experiments.embed runs/default runs/index --emoji`
"""

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import jax.numpy as jnp
import numpy as np
import tyro
from flax import nnx
from tqdm import tqdm

from experiments.cli import interrupts_end_at_once, one_line_errors, removed_if_interrupted
from experiments.encoding import embed_items, everywhere
from experiments.galleries import (
    ClipGallery,
    EmojiGallery,
    Item,
    clip_gallery,
    emoji_gallery,
    read_gram_config,
)
from experiments.runs import load_run
from experiments.usage import read_usage
from gramjax import retrieval, scores
from gramjax.checkpoints.folders import check_destination, whole_folder
from gramjax.data import clips, emoji
from gramjax.models import GramModel, from_json, to_json

SCORES: dict[str, scores.Score] = {
    "residual": scores.Residual(),
    "volume": scores.Volume(),
    "cone": scores.Cone(),
    "leading_direction": scores.LeadingDirection(),
    "cosine": scores.Cosine(),
}
INDEX, CONTENTS, REPORT = "index.npz", "contents.json", "report.json"


@dataclasses.dataclass(frozen=True)
class Embed:
    """Embed clips and write an index of them."""

    model: tyro.conf.Positional[Path]
    """Folder that `experiments.convert` wrote or, with --emoji, `experiments.train`."""
    index: tyro.conf.Positional[Path]
    """Folder to make. It appears only once everything is in it."""
    clips: Path | None = None
    """Folder of videos and sound files."""
    emoji: bool = False
    """Embed the test split of the model's emoji set instead of clips."""
    annotations: Path | None = None
    """JSON file that says which clips there are, and what is said in them; default: every file is a clip."""
    audios: Path | None = None
    """With annotations: folder of sound files; default: the sound of the videos."""
    depths: Path | None = None
    """Folder of depth maps."""
    vocabulary: Path | None = None
    """The model's vocab.txt or tokenizer.json, or a folder with one. Without it, no sentence can be searched for."""
    score: Literal["residual", "volume", "cone", "leading_direction", "cosine"] = "residual"
    """What is compared. By volume, clips that lack a modality are found late or never."""
    frames: int | None = None
    """Frames of a clip; one with fewer has no picture. Default, as of the next three: the model's, or as published."""
    slices: int | None = None
    """Slices of sound of a clip."""
    slice_frames: int | None = None
    """Length of a slice, in frames of 10 ms."""
    mel_bins: int | None = None
    """Of sound."""
    batch_size: int = 16
    """Clips that all devices together embed at a time."""
    overwrite: bool = False
    """Replace the index that is there."""

    def __post_init__(self):
        if self.emoji == (self.clips is not None):
            raise ValueError("give either --clips FOLDER or --emoji")
        if self.emoji and any((self.annotations, self.audios, self.depths, self.vocabulary)):
            raise ValueError("--annotations, --audios, --depths and --vocabulary are of clips, not of --emoji")
        if self.audios is not None and self.annotations is None:
            raise ValueError("--audios needs --annotations; without them, sound files lie beside the videos")
        if self.batch_size < 1:
            raise ValueError(f"batch_size must be positive, got {self.batch_size}")


@dataclasses.dataclass(frozen=True)
class Contents:
    """What an index is of.

    Attributes:
      model: folder of the model.
      digest: of the model, see `model_digest`.
      score: name of the score that the index was built for.
      gallery: how items were read.
      items: in the order of the index.
      unreadable: modality -> clip -> why it could not be read; the clip has what else it has.
      left_out: clips of which nothing could be read, which are not in the index.
    """

    model: str
    digest: str
    score: str
    gallery: ClipGallery | EmojiGallery
    items: tuple[Item, ...]
    unreadable: Mapping[str, Mapping[str, str]]
    left_out: tuple[str, ...]


def main(options: Embed) -> None:
    # First, as clips take long.
    check_destination(options.index, (CONTENTS,), overwrite=options.overwrite, name="index", option="--overwrite")
    if options.emoji:
        config, model, _ = load_run(options.model)
        gallery = emoji_gallery(config)
        split = emoji.load_split(config.data_dir, "test")
        items = [Item(split[number]["english"]["name"]) for number in range(len(split))]
        batches, report = gallery.batches(split, options.batch_size), clips.Report()
    else:
        folder = _folder(options)
        gallery = clip_gallery(read_gram_config(options.model), folder, _wanted(options), vocabulary=options.vocabulary)
        items = [_item(clip) for clip in folder.annotations]
        batches, report = gallery.batches(folder, options.batch_size), folder.report
        # Last, as it may be large and what was asked for impossible.
        model = gallery.load(options.model, shardings=everywhere)
    progress = tqdm(batches, total=-(-len(items) // options.batch_size), unit="batch", disable=None)
    embeddings, where = embed_items(model, progress, gallery.modalities)
    unreadable = report.unreadable
    kept: np.ndarray = np.any(where, axis=1)
    if not kept.any():
        reasons = [reason for found in unreadable.values() for reason in found.values()]
        raise ValueError(f"none of {len(items)} clips can be read; the first: {reasons[0]}")
    contents = Contents(
        model=str(options.model.absolute()),
        digest=model_digest(model),
        score=options.score,
        gallery=gallery,
        items=tuple(item for item, keep in zip(items, kept) if keep),
        unreadable=unreadable,
        left_out=tuple(item.name for item, keep in zip(items, kept) if not keep),
    )
    index = retrieval.build_index(jnp.asarray(embeddings[kept]), jnp.asarray(where[kept]), SCORES[options.score])
    write_index(options.index, index, contents, None if options.emoji else report)
    print(f"{options.index}: {len(contents.items)} of {len(items)} items, by {options.score}")
    for name, present in zip(gallery.modalities, where.T):
        print(f"  {name}: {present.sum()}, {len(unreadable.get(name, {}))} unreadable")
    if contents.left_out:
        print(f"  nothing could be read of {', '.join(contents.left_out)}")
    if not options.emoji:
        print(f"  {report.summary()}; named in {options.index / REPORT}")


def model_digest(model: GramModel) -> str:
    """Tells models apart: of the configuration and the projection heads, which any training changes."""
    digest = hashlib.sha256(json.dumps(to_json(model.config), sort_keys=True).encode())
    for path, head in sorted(nnx.to_flat_state(nnx.state(model.heads, nnx.Param))):
        digest.update(repr(path).encode())
        digest.update(np.asarray(head[...], np.float32).tobytes())
    return digest.hexdigest()


def write_index(path: Path, index: retrieval.Index, contents: Contents, report: clips.Report | None = None) -> None:
    """Writes the folder of an index, which appears only once everything is in it, and replaces what was there.

    Args:
      path: the folder.
      index: of the items.
      contents: what the index is of.
      report: what was found of the clips, and what was not; None: nothing is said of that.
    """
    with whole_folder(path) as folder, removed_if_interrupted(folder):
        retrieval.save_index(index, folder / INDEX)
        text = json.dumps(to_json(contents), indent=1, ensure_ascii=False)
        (folder / CONTENTS).write_text(text + "\n", encoding="utf-8")
        if report is not None:
            report.write(folder / REPORT)


def read_index(path: Path) -> tuple[retrieval.Index, Contents]:
    """Reads the folder of an index.

    Raises:
      ValueError: if it is none, or its parts do not belong together.
    """
    if not (path / CONTENTS).is_file():
        raise ValueError(f"index must be a folder that experiments.embed wrote, got {path}")
    try:
        contents = from_json(Contents, json.loads((path / CONTENTS).read_text(encoding="utf-8")))
    except ValueError as error:
        raise ValueError(f"{path / CONTENTS} is damaged: {error}") from error
    index = retrieval.load_index(path / INDEX)
    if (len(index), index.modalities) != (len(contents.items), len(contents.gallery.modalities)):
        raise ValueError(f"{path / INDEX} and {path / CONTENTS} are not of the same items")
    return index, contents


def _wanted(options: Embed) -> clips.ClipConfig:
    asked = {
        "eval_frames": options.frames,
        "audio_slices": options.slices,
        "slice_frames": options.slice_frames,
        "mel_bins": options.mel_bins,
    }
    return dataclasses.replace(
        read_usage(options.model).clips,
        name="index",
        modalities=clips.MODALITIES,
        **{name: value for name, value in asked.items() if value is not None},
    )


def _folder(options: Embed) -> clips.ClipFolder:
    assert options.clips is not None
    if options.annotations is None:
        return clips.ClipFolder.of(clips.find_clips(options.clips, depths=options.depths))
    return clips.ClipFolder(options.annotations, videos=options.clips, audios=options.audios, depths=options.depths)


def _item(clip: clips.Clip) -> Item:
    files = {name: None if (file := getattr(clip, name)) is None else str(file) for name in ("video", "audio", "depth")}
    return Item(clip.id, clip.captions[0] if clip.captions else "", **files)


if __name__ == "__main__":
    with interrupts_end_at_once("interrupted"), one_line_errors():
        main(tyro.cli(Embed, description=__doc__))

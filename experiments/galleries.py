"""What can be indexed: folders of clips, or the emoji test split. How items and queries become what a model reads.

A gallery is a value that is kept with its index, so that queries are treated as the items were.
"""

import contextlib
import dataclasses
import os
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError

from experiments.config import TrainConfig
from experiments.encoding import Loaded, read_tokenizer
from experiments.runs import load_run
from gramjax.checkpoints import load_model, read_config
from gramjax.data import clips, emoji, media, pipeline, queries
from gramjax.data.clips import ClipConfig, ClipFolder
from gramjax.data.clips.folder import AUDIO_EXTENSIONS, VIDEO_EXTENSIONS
from gramjax.data.wordpiece import WordPieceTokenizer
from gramjax.encoders import BEATsConfig, BERTConfig, VisionConfig
from gramjax.models import GramConfig, GramModel

PICTURE_EXTENSIONS = (".png", ".jpg", ".jpeg", ".webp", ".gif")
Batch = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Item:
    """An item of a gallery: its name, what is known of it in words, and its files."""

    name: str
    text: str = ""
    video: str | None = None
    audio: str | None = None
    depth: str | None = None

    def clip(self) -> clips.Clip:
        """The clip of its files."""
        return clips.Clip(self.name, video=self.video, audio=self.audio, depth=self.depth)


@dataclasses.dataclass(frozen=True)
class ClipGallery:
    """Clips in files.

    Attributes:
      config: the modalities of items, and how they are read.
      vocabulary: file or folder of the tokenizer; without one there are no texts.
    """

    config: ClipConfig
    vocabulary: str | None = None

    @staticmethod
    def load(path: Path, *, shardings: Callable[[Any], Any] | None = None) -> GramModel:
        """The model of a folder that `experiments.convert` wrote, on one device or as `load_model` places it."""
        read_gram_config(path)
        return load_model(path, shardings=shardings)

    @property
    def modalities(self) -> tuple[str, ...]:
        return self.config.modalities

    def batches(self, folder: ClipFolder, batch_size: int) -> Iterator[Loaded]:
        """All items in order; `folder.report` says what could not be read."""
        loader = clips.make_loader(
            folder, self.config, tokenizer=self._tokenizer(), batch_size=batch_size, seed=0, train=False
        )
        for batch in loader:
            valid = batch["valid"]
            yield (
                {name: batch[name] for name in self.modalities},
                {name: where[valid] for name, where in batch["where"].items()},
            )

    def query(self, query: str) -> Batch:
        """What is asked by a sentence or a file: one row of everything that it has."""
        file = query_file(query, (*VIDEO_EXTENSIONS, *AUDIO_EXTENSIONS))
        if file is None:
            if self.vocabulary is None:
                raise ValueError("query must be a file: the index was made without --vocabulary")
            clip, modalities = clips.Clip("query", captions=(query,)), ("caption",)
        elif file.suffix.lower() in AUDIO_EXTENSIONS:
            clip, modalities = clips.Clip(file.name, audio=str(file)), ("audio",)
        else:
            clip, modalities = clips.Clip(file.name, video=str(file)), ("vision", "audio")
        # Like is compared with like where there is any.
        modalities = tuple(name for name in modalities if name in self.modalities) or modalities
        folder = ClipFolder.of([clip])
        gallery = dataclasses.replace(self, config=dataclasses.replace(self.config, modalities=modalities))
        ((batch, where),) = gallery.batches(folder, 1)
        if present := {name: batch[name] for name in modalities if where[name].all()}:
            return present
        reasons = {reason for found in folder.report.unreadable.values() for reason in found.values()}
        raise ValueError(f"query cannot be read: {'; '.join(sorted(reasons))}")

    def pictures(self, items: Sequence[tuple[int, Item]]) -> list[np.ndarray | None]:
        """What each item looks or sounds like: the frame in its middle, or its waveform; None if there is neither."""
        return [_look(item) for _, item in items]

    def _tokenizer(self) -> WordPieceTokenizer | None:
        return None if self.vocabulary is None else WordPieceTokenizer(self.vocabulary)


def read_gram_config(path: Path) -> GramConfig:
    """The configuration of a folder that `experiments.convert` wrote, without its parameters."""
    if not (path / "config.json").is_file():
        raise ValueError(f"model must be a folder that experiments.convert wrote, got {path}, which has no config.json")
    config = read_config(path / "config.json")
    if not isinstance(config, GramConfig):
        raise ValueError(f"model must be a whole model with a GramConfig, got {type(config).__name__} in {path}")
    return config


def clip_gallery(
    config: GramConfig,
    folder: ClipFolder,
    wanted: ClipConfig,
    *,
    vocabulary: Path | None,
    always: Collection[str] = (),
) -> ClipGallery:
    """The gallery of a folder for a model: what both have of the modalities wanted, in the sizes of the model's towers.

    Captions are no modality of items, but what asks for them. What is in `always` is one even if no clip has it.

    Raises:
      ValueError: if they have nothing in common, or the tokenizer is not the model's.
    """
    able = tuple(
        name
        for name in config.modalities
        if name in wanted.modalities and name != "caption" and (vocabulary is not None or name != "subtitle")
    )
    found = {name for name in able if any(clip.has(name) for clip in folder.annotations)}
    if not found:
        raise ValueError(f"the clips have none of the model's modalities ({', '.join(config.modalities)})")
    modalities = tuple(name for name in able if name in found or name in always)
    if vocabulary is not None:
        read_tokenizer(vocabulary, config)
    towers = {name: config.towers[tower] for name, tower in config.modalities.items()}
    sizes: dict[str, Any] = {}
    for name in ("caption", "subtitle"):
        if vocabulary is not None and isinstance(tower := towers.get(name), BERTConfig):
            sizes[f"{name}_length"] = min(getattr(wanted, f"{name}_length"), tower.max_length)
    for tower in towers.values():
        if isinstance(tower, VisionConfig):
            sizes["image_size"] = tower.image_size
        if isinstance(tower, BEATsConfig) and tower.stem_channels:
            sizes["mel_bins"] = tower.mel_bins
    return ClipGallery(
        dataclasses.replace(wanted, modalities=modalities, **sizes),
        None if vocabulary is None else str(vocabulary.absolute()),
    )


@dataclasses.dataclass(frozen=True)
class EmojiGallery:
    """The pictographs of the emoji test split.

    Attributes:
      data_dir: where the prepared data set is.
      language: in which sentences are; None if the model has none.
      modalities: of the items: all others of the model.
    """

    data_dir: str
    language: str | None
    modalities: tuple[str, ...]

    @staticmethod
    def load(path: Path) -> GramModel:
        """The model of a folder that `experiments.train` wrote."""
        return load_run(path)[1]

    def batches(self, split: emoji.EmojiSplit, batch_size: int) -> Iterator[Loaded]:
        """All items in order."""
        for batch in pipeline.make_loader(
            split, modalities=self.modalities, batch_size=batch_size, seed=0, train=False
        ):
            present = np.ones(int(batch["valid"].sum()), bool)
            yield {name: batch[name] for name in self.modalities}, dict.fromkeys(self.modalities, present)

    def query(self, query: str) -> Batch:
        """What is asked by a sentence, a sound file or a picture: one row."""
        file = query_file(query, (*PICTURE_EXTENSIONS, *AUDIO_EXTENSIONS))
        if file is None:
            if self.language is None:
                raise ValueError("query must be a file: the model reads no language")
            return {self.language: queries.encode_words(query)}
        is_sound = file.suffix.lower() in AUDIO_EXTENSIONS
        wanted = ("speech",) if is_sound else emoji.PICTURES
        name = next((name for name in wanted if name in self.modalities), None)
        if name is None:
            raise ValueError(f"query must be of what the index holds ({', '.join(self.modalities)}), got {query}")
        return {name: _utterance(file) if is_sound else _drawing(file)}

    def pictures(self, items: Sequence[tuple[int, Item]]) -> list[np.ndarray | None]:
        """The drawing of each item."""
        split = emoji.load_split(self.data_dir, "test")
        artist = next((name for name in emoji.PICTURES if name in self.modalities), emoji.PICTURES[0])
        return [emoji.decode_picture(split[number][artist]) / 255 for number, _ in items]


def emoji_gallery(config: TrainConfig) -> EmojiGallery:
    """The gallery of a run's data set for its model."""
    language = next((name for name in config.modalities if name in emoji.LANGUAGES), None)
    items = tuple(name for name in config.modalities if name != language)
    return EmojiGallery(str(config.data_dir.absolute()), language, items)


def query_file(query: str, extensions: Sequence[str]) -> Path | None:
    """The file that a query names, or None if it is a sentence.

    Raises:
      ValueError: if it is empty, looks like a file and there is none, or is a file of another kind.
    """
    if not query.strip():
        raise ValueError(f"query must be a sentence or a file, got {query!r}")
    path = Path(query)
    is_file = os.path.isfile(query)  # False for sentences longer than file names may be, unlike `Path.is_file`.
    if path.suffix.lower() in extensions:
        if not is_file:
            raise ValueError(f"query must be a sentence or a file, got {query}, which does not exist")
        return path
    if path.suffix and is_file:
        raise ValueError(f"query must be a sentence or a file of {', '.join(extensions)}, got {query}")
    return None


def _look(item: Item) -> np.ndarray | None:
    with contextlib.suppress(media.MediaError):
        if item.video is not None:
            return media.read_frames(item.video, 1)[0] / 255
    # A sound file, or a video of which the sound alone can be read.
    with contextlib.suppress(media.MediaError):
        if sound := item.audio or item.video:
            return media.read_audio(sound)[0]
    return None


def _utterance(file: Path) -> Mapping[str, np.ndarray]:
    """A sound file as utterances are for evaluation; what is longer than any of theirs loses its end."""
    try:
        return queries.encode_speech(*media.read_audio(file))
    except media.MediaError as error:
        raise ValueError(f"query cannot be read: {error}") from error


def _drawing(file: Path) -> np.ndarray:
    """A picture file as drawings are for evaluation."""
    try:
        with Image.open(file) as picture:
            return queries.encode_picture(picture)
    except (UnidentifiedImageError, OSError) as error:
        raise ValueError(f"query cannot be read: {error}") from error

"""Clips as people have them: an annotation file, and folders of media."""

import bisect
import collections
import dataclasses
import itertools
import json
import logging
import os
import unicodedata
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

from gramjax.data.clips.config import MODALITIES
from gramjax.data.media import Media

# The first of these that a row has is its id, and its caption.
ID_FIELDS = ("clip_id", "video_id", "image_id", "image", "id")
CAPTION_FIELDS = ("desc", "caption", "vast_cap")
OTHER_FIELDS = ("subtitle", "audio_caption", "label")
# If a clip has several files, the first kind is taken.
VIDEO_EXTENSIONS = (".mp4", ".mkv", ".webm", ".avi", ".mov", ".m4v")
AUDIO_EXTENSIONS = (".wav", ".flac", ".mp3", ".m4a", ".ogg", ".opus")
DEPTH_EXTENSIONS = (".npy",)


@dataclasses.dataclass(frozen=True)
class Clip:
    """One clip: what is said of it, and where its media are.

    Attributes:
      id: as the annotations have it.
      captions: any number of descriptions.
      subtitle: what is said in it; empty if nothing is known.
      audio_caption: description of the sound; may be empty.
      label: name of its class; may be empty.
      video: path or contents of its video, or None.
      audio: path or contents of a sound file of its own, or None. Its sound is then the video's.
      depth: path or contents of its depth maps, or None.
    """

    id: str
    captions: tuple[str, ...] = ()
    subtitle: str = ""
    audio_caption: str = ""
    label: str = ""
    video: Media | None = None
    audio: Media | None = None
    depth: Media | None = None

    def file(self, modality: str) -> Media | None:
        """What "vision", "audio" or "depth" is read from, if there is anything; it may yet prove unreadable."""
        sound = self.video if self.audio is None else self.audio
        return {"vision": self.video, "audio": sound, "depth": self.depth}[modality]

    def has(self, modality: str) -> bool:
        """Whether there is anything to read a modality of `MODALITIES` from."""
        texts = {"caption": self.captions, "subtitle": self.subtitle}
        return bool(texts[modality]) if modality in texts else self.file(modality) is not None


@dataclasses.dataclass
class Report:
    """What was found of a data set, and what was not.

    Attributes:
      rows: of the annotations.
      clips: that remain.
      missing: for each modality, the ids of clips that have nothing of it.
      dropped: ids of clips left out on request.
      duplicates: ids of several rows, which were put together.
      unknown_fields: fields of rows that nothing is read from, and in how many rows they are.
      unreadable: for each modality, the ids of clips whose file proved broken, too short or without the track wanted,
        and why; grows while clips are read.
    """

    rows: int = 0
    clips: int = 0
    missing: dict[str, list[str]] = dataclasses.field(default_factory=dict)
    dropped: list[str] = dataclasses.field(default_factory=list)
    duplicates: list[str] = dataclasses.field(default_factory=list)
    unknown_fields: dict[str, int] = dataclasses.field(default_factory=dict)
    unreadable: dict[str, dict[str, str]] = dataclasses.field(default_factory=dict)

    def add_unreadable(self, modality: str, clip_id: str, reason: str) -> None:
        """Notes a file that could not be read, and logs a warning the first time."""
        known = self.unreadable.setdefault(modality, {})
        if clip_id not in known:
            known[clip_id] = reason
            logging.getLogger(__name__).warning(
                "%s of clip %s counts as absent, as of %d of %d clips so far: %s",
                modality,
                clip_id,
                len(known),
                self.clips,
                reason,
            )

    def summary(self) -> str:
        """One line of counts."""
        parts = [f"{self.clips} clips of {self.rows} rows"]
        parts += [f"{len(ids)} without {modality}" for modality, ids in self.missing.items() if ids]
        parts += [f"{len(found)} with unreadable {modality}" for modality, found in self.unreadable.items() if found]
        parts += [f"{len(ids)} {what}" for what, ids in (("dropped", self.dropped), ("merged", self.duplicates)) if ids]
        if self.unknown_fields:
            parts.append(f"fields not used: {', '.join(sorted(self.unknown_fields))}")
        return "; ".join(parts)

    def write(self, path: str | os.PathLike[str]) -> None:
        """Writes everything as JSON."""
        text = json.dumps(dataclasses.asdict(self), indent=1, ensure_ascii=False)
        Path(path).write_text(text + "\n", encoding="utf-8")


@runtime_checkable
class ClipSource(Protocol):
    """Random access to clips, for `make_loader`."""

    report: Report

    @property
    def annotations(self) -> Sequence[Clip]:
        """All clips, perhaps without media: costs nothing."""
        ...

    def __len__(self) -> int: ...

    def __getitem__(self, position: int) -> Clip: ...


class ClipFolder:
    """Random access to clips whose media stay where they are: `len(folder)`, `folder[i]` (a `Clip`).

    The annotations are a JSON list of rows. A row is an object with an id under the first present of `clip_id`,
    `video_id`, `image_id`, `image`, `id`; one caption or a list under the first present of `desc`, `caption`,
    `vast_cap`; and perhaps `subtitle`, `audio_caption`, `label`. A clip with a label but no caption is captioned with
    its label. Rows of the same id become one clip with all their captions, so that no batch holds a clip twice.

    Media are files named by the id: `<videos>/<id>.mp4` (or .mkv, .webm, .avi, .mov, .m4v), `<audios>/<id>.wav` (or
    .flac, .mp3, .m4a, .ogg, .opus), `<depths>/<id>*.npy`. Ids may contain dots; an id with an extension of its own
    also names the file without it, and if there is no file of the whole id, one named by the part before its first
    dot is taken (the published code cuts there). Accents count as the same, composed or not.

    A clip that lacks a file is kept: it lacks that modality. `report` names them all.

    Attributes:
      annotations: the clips.
      report: a `Report`.
    """

    def __init__(
        self,
        annotations: str | os.PathLike[str],
        *,
        videos: str | os.PathLike[str] | None = None,
        audios: str | os.PathLike[str] | None = None,
        depths: str | os.PathLike[str] | None = None,
        captions: Literal["all", "first"] = "all",
        require: Collection[str] = (),
    ):
        """Reads the annotations and lists the folders; no media file is opened.

        Args:
          annotations: JSON file.
          videos: folder of videos, or None for none.
          audios: folder of sound files, or None for none: sound is then the videos'.
          depths: folder of depth maps, or None for none.
          captions: keep them all, or only the first of each clip as the published loader does.
          require: modalities (of `MODALITIES`) without which a clip is dropped; the published loader drops clips
            without "vision" and those without "audio".

        Raises:
          ValueError: if a file or folder does not exist, a row is not as described (it says which), no clip has a
            file in a folder (then it is the wrong folder), or nothing is left.
        """
        if captions not in ("all", "first"):
            raise ValueError(f"captions must be 'all' or 'first', got {captions!r}")
        if isinstance(require, str) or not set(require) <= set(MODALITIES):
            raise ValueError(f"require must be names out of {MODALITIES}, got {require!r}")
        folders = {
            "videos": (videos, VIDEO_EXTENSIONS),
            "audios": (audios, AUDIO_EXTENSIONS),
            "depths": (depths, DEPTH_EXTENSIONS),
        }
        files = {name: _MediaFiles(name, *folder) for name, folder in folders.items()}
        self.report = Report()
        clips = _merged(_read_rows(annotations, self.report), self.report)
        if captions == "first":
            clips = [dataclasses.replace(clip, captions=clip.captions[:1]) for clip in clips]
        found = [
            dataclasses.replace(
                clip,
                video=files["videos"].find(clip.id),
                audio=files["audios"].find(clip.id),
                depth=files["depths"].find(clip.id, prefix=True),
            )
            for clip in clips
        ]
        for listing in files.values():
            listing.check_used(clips[0].id)
        self.report.dropped = [clip.id for clip in found if not all(map(clip.has, require))]
        self._set([clip for clip in found if all(map(clip.has, require))])

    @classmethod
    def of(cls, clips: Sequence[Clip]) -> "ClipFolder":
        """Clips that are described otherwise than by annotations, such as those `find_clips` finds.

        Raises:
          ValueError: if there is none.
        """
        folder = object.__new__(cls)
        folder.report = Report(rows=len(clips))
        folder._set(clips)
        return folder

    def _set(self, clips: Sequence[Clip]) -> None:
        if not clips:
            raise ValueError(f"no clip is left of {self.report.rows} rows: {len(self.report.dropped)} were dropped")
        self.annotations: Sequence[Clip] = tuple(clips)
        self.report.clips = len(clips)
        self.report.missing = {
            modality: [clip.id for clip in clips if not clip.has(modality)] for modality in MODALITIES
        }

    def without(self, ids: Iterable[str]) -> "ClipFolder":
        """The same without some clips (as `find_unreadable` names them), which its report calls dropped.

        Raises:
          ValueError: if an id is unknown, or nothing is left.
        """
        left_out = set(ids)
        unknown = left_out - {clip.id for clip in self.annotations}
        if unknown:
            raise ValueError(f"ids must be of clips in the folder, got {sorted(unknown)}")
        rest = object.__new__(ClipFolder)
        rest.report = dataclasses.replace(
            self.report,
            dropped=[*self.report.dropped, *sorted(left_out)],
            unreadable={
                modality: {clip_id: reason for clip_id, reason in found.items() if clip_id not in left_out}
                for modality, found in self.report.unreadable.items()
            },
        )
        rest._set([clip for clip in self.annotations if clip.id not in left_out])
        return rest

    def __len__(self) -> int:
        return len(self.annotations)

    def __getitem__(self, position: int) -> Clip:
        return self.annotations[position]


def find_clips(media: str | os.PathLike[str], *, depths: str | os.PathLike[str] | None = None) -> list[Clip]:
    """The clips of a folder without annotations: every video and sound file in it, sorted; of the same name, one clip.

    Args:
      media: folder; what lies in folders within it is not looked at.
      depths: folder of depth maps, `<depths>/<id>*.npy`, or None for none.

    Raises:
      ValueError: if `media` or `depths` is no folder, or `media` holds no video or sound file.
    """
    videos, audios = _MediaFiles("media", media, VIDEO_EXTENSIONS), _MediaFiles("media", media, AUDIO_EXTENSIONS)
    maps = _MediaFiles("depths", depths, DEPTH_EXTENSIONS)
    ids = sorted({*videos.paths, *audios.paths})
    if not ids:
        kinds = ", ".join((*VIDEO_EXTENSIONS, *AUDIO_EXTENSIONS))
        raise ValueError(f"media must be a folder of {kinds} files, got {media}, which holds none")
    return [
        Clip(id=name, video=videos.paths.get(name), audio=audios.paths.get(name), depth=maps.find(name, prefix=True))
        for name in ids
    ]


def class_names(source: ClipSource) -> tuple[str, ...]:
    """The labels of a source's clips, sorted, each once; empty if none has one."""
    return tuple(sorted({clip.label for clip in source.annotations} - {""}))


def _read_rows(annotations: str | os.PathLike[str], report: Report) -> list[Clip]:
    """Rows as clips without media."""
    path = Path(annotations)
    if not path.is_file():
        raise ValueError(f"annotations must be a JSON file, got {path}, which does not exist")
    try:
        rows = json.loads(path.read_text(encoding="utf-8-sig"))
    except ValueError as error:
        raise ValueError(f"annotations must be a JSON file, got {path}: {error}") from error
    if not isinstance(rows, list) or not rows:
        got = "an empty list" if rows == [] else type(rows).__name__
        raise ValueError(f"annotations must be a JSON list of rows, at least one, got {got} in {path}")
    clips, fields = [], collections.Counter()
    for number, row in enumerate(rows):
        if not isinstance(row, dict):
            raise ValueError(f"row {number} of {path} must be an object with named fields, got {row!r:.80}")
        clips.append(_read_row(row, f"row {number} of {path}"))
        fields.update(row.keys())
    report.rows = len(rows)
    known = {*ID_FIELDS, *CAPTION_FIELDS, *OTHER_FIELDS}
    report.unknown_fields = {field: count for field, count in fields.items() if field not in known}
    return clips


def _read_row(row: Mapping[str, Any], where: str) -> Clip:
    def text(field: str) -> str:
        value = row.get(field)
        if value is None:
            return ""
        if isinstance(value, bool) or not isinstance(value, str | int):
            raise ValueError(f"{where}: {field} must be a string, got {value!r:.80}")
        return str(value).strip()

    clip_id = next((text(field) for field in ID_FIELDS if field in row), "")
    if not clip_id or "/" in clip_id or "\\" in clip_id or "\0" in clip_id:
        raise ValueError(f"{where}: needs a file name as id under one of {', '.join(ID_FIELDS)}, got {clip_id!r}")
    captions = next((row[field] for field in CAPTION_FIELDS if row.get(field)), [])
    captions = [captions] if isinstance(captions, str) else captions
    if not isinstance(captions, list) or not all(isinstance(caption, str) for caption in captions):
        raise ValueError(f"{where}: captions must be a string or a list of strings, got {captions!r:.80}")
    captions = [caption.strip() for caption in captions if caption.strip()]
    label = text("label")
    return Clip(
        id=clip_id,
        captions=tuple(captions or filter(None, [label])),
        subtitle=text("subtitle"),
        audio_caption=text("audio_caption"),
        label=label,
    )


def _merged(rows: Sequence[Clip], report: Report) -> list[Clip]:
    """One clip an id, in the order of first rows; of fields that hold one value, the first row that has it counts."""
    groups: dict[str, list[Clip]] = {}
    for row in rows:
        groups.setdefault(row.id, []).append(row)
    report.duplicates = [clip_id for clip_id, group in groups.items() if len(group) > 1]
    return [
        group[0]
        if len(group) == 1
        else Clip(
            id=clip_id,
            captions=tuple(dict.fromkeys(caption for row in group for caption in row.captions)),
            **{field: next((v for row in group if (v := getattr(row, field))), "") for field in OTHER_FIELDS},
        )
        for clip_id, group in groups.items()
    ]


def _composed(name: str) -> str:
    """A name with its accents as Unicode composes them: some systems store the names of files decomposed."""
    return unicodedata.normalize("NFC", name)


class _MediaFiles:
    """The files of one folder by the id they belong to."""

    def __init__(self, name: str, folder: str | os.PathLike[str] | None, extensions: Sequence[str]):
        self._name, self._folder, self._extensions = name, folder, extensions
        self._used = False
        self.paths = {} if folder is None else self._list(folder)
        self._stems = sorted(self.paths)

    def _list(self, folder: str | os.PathLike[str]) -> dict[str, str]:
        if not Path(folder).is_dir():
            raise ValueError(f"{self._name} must be a folder, got {folder}, which is none")
        with os.scandir(folder) as entries:
            names = [os.path.splitext(entry.name) for entry in entries if entry.is_file()]
        kinds = {extension: number for number, extension in enumerate(self._extensions)}
        files = [(stem, suffix) for stem, suffix in names if suffix.lower() in kinds]
        # The best kind comes last, and so replaces the others.
        files.sort(key=lambda file: (-kinds[file[1].lower()], file))
        return {_composed(stem): os.path.join(os.path.abspath(folder), stem + suffix) for stem, suffix in files}

    def find(self, clip_id: str, prefix: bool = False) -> str | None:
        """The path of a clip's file; with `prefix`, its name may go on after the id."""
        clip_id = _composed(clip_id)
        stem, suffix = os.path.splitext(clip_id)
        own = stem if suffix.lower() in (*VIDEO_EXTENSIONS, *AUDIO_EXTENSIONS) else clip_id
        path = next((self.paths[name] for name in (clip_id, own) if name in self.paths), None)
        if path is None and prefix and self.paths:
            # "video1_depth" belongs to video1, "video10" does not.
            following = itertools.islice(self._stems, bisect.bisect_left(self._stems, own), None)
            longer = itertools.takewhile(lambda name: name.startswith(own), following)
            path = next((self.paths[name] for name in longer if not name[len(own)].isalnum()), None)
        if path is None:
            path = self.paths.get(own.split(".")[0])
        self._used |= path is not None
        return path

    def check_used(self, example: str) -> None:
        if self._folder is not None and not self._used:
            file = next(iter(sorted(self.paths.values())), None)
            holds = f"holds {os.path.basename(file)}, say" if file else f"has no {', '.join(self._extensions)} files"
            raise ValueError(
                f"{self._name} must hold files of the annotated clips, such as {example}{self._extensions[0]}; "
                f"got {self._folder}, which {holds}"
            )

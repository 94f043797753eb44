"""What the studies train on: frozen features of every modality, of the emoji set or of yours.

The emoji set's are the fixed baseline's (`experiments.features`): gradient histograms and colours of a picture,
character n-grams of a text, log-mel energies of speech pooled over time. Training items have several copies of each,
from augmented pictures, parts of the words, and other voices.

Features of your own come as one `.npz` file: for each of the splits train, validation and test, and each modality, an
array `SPLIT/MODALITY` of `[items, width]` (`[items, copies, width]` in training, if there are several views of an
item), row i of every modality from the same item; if items have classes, `SPLIT/label` `[items]` of integers; and, for
zero-shot classification, `classes/MODALITY` `[classes, width]`, the features of the classes' names.
"""

import dataclasses
import hashlib
import os
import sys
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import scipy.linalg

from experiments import baseline, features
from experiments.config import TOWER_OF, ConfigError
from gramjax.data import audio, augment, emoji

SPLITS = ("train", "validation", "test")
CLASSES = "classes"
COPIES = 8
# Principal axes kept, and the ridge added to their variances, in units of their mean, before they are evened out: ten
# times what validation chose for the baseline, whose covariances are exact where towers take steps.
AXES = {"vision": 400, "text": 800, "audio": 400}
RIDGES = {"vision": 30.0, "text": 10.0, "audio": 3.0}
# Of the name beside the whole text: speech says the name alone.
NAME_WEIGHT = 3.0


@dataclasses.dataclass(frozen=True)
class FeatureSet:
    """Frozen features of a data set.

    Attributes:
      train: modality to float32 `[items, copies, width]`.
      validation: modality to float32 `[items, width]`.
      test: the same.
      labels: split to int32 `[items]`, or nothing.
      classes: modality to float32 `[classes, width]`, or nothing.
      fingerprint: of all that is in it.
    """

    train: Mapping[str, np.ndarray]
    validation: Mapping[str, np.ndarray]
    test: Mapping[str, np.ndarray]
    labels: Mapping[str, np.ndarray]
    classes: Mapping[str, np.ndarray]
    fingerprint: str

    @property
    def modalities(self) -> tuple[str, ...]:
        """Names of the modalities."""
        return tuple(self.train)


def load(path: Path | None, data_dir: Path) -> FeatureSet:
    """Features of a file, or those of the emoji set, which are computed once and kept in `data_dir/features`.

    Raises:
      ConfigError: the file is not as this module's docstring says.
    """
    if path is not None:
        return read(path)
    code = b"".join(Path(module.__file__ or "").read_bytes() for module in (features, audio, augment))
    code += Path(__file__).read_bytes()
    name = f"{emoji.EmojiBuilder.VERSION}-{hashlib.sha256(code).hexdigest()[:12]}.npz"
    kept = data_dir / "features" / name
    if not kept.exists():
        _say(f"making features of the emoji set, once: this takes minutes; they are kept in {kept}")
        arrays = emoji_features(data_dir)
        kept.parent.mkdir(parents=True, exist_ok=True)
        partial = kept.with_suffix(f".{os.getpid()}.npz")
        np.savez(partial, allow_pickle=False, **arrays)
        partial.replace(kept)  # so that a killed process leaves no half of a file
    return read(kept)


def read(path: Path) -> FeatureSet:
    """Features of a file, checked."""
    try:
        with open(path, "rb") as opened, np.load(opened) as file:
            arrays = {name: file[name] for name in file.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise ConfigError(f"features must be an .npz file of arrays, got {path}: {error}") from error
    parts: dict[str, dict[str, np.ndarray]] = {split: {} for split in (*SPLITS, CLASSES)}
    labels = {}
    for name, array in arrays.items():
        split, _, modality = name.partition("/")
        if split not in parts or not modality:
            raise ConfigError(f"features must be named SPLIT/MODALITY with a split among {[*parts]}, got {name!r}")
        if modality == "label":
            if array.ndim != 1 or not np.issubdtype(array.dtype, np.integer):
                raise ConfigError(f"{name} must be integers [items], got {array.dtype} of shape {array.shape}")
            labels[split] = array.astype(np.int32)
        else:
            parts[split][modality] = _vectors(name, array, (2, 3) if split == "train" else (2,))
    for split in (*SPLITS, CLASSES):
        if split != CLASSES and (missing := sorted(set(parts["train"]) ^ set(parts[split]))):
            raise ConfigError(f"features of every modality must be in train and in {split}, got one alone of {missing}")
        for name, array in parts[split].items():
            if name in parts["train"] and array.shape[-1] != (width := parts["train"][name].shape[-1]):
                raise ConfigError(f"{split}/{name} must be as wide as train/{name}, {width}, got {array.shape[-1]}")
    for split in SPLITS:
        lengths = {name: len(array) for name, array in parts[split].items()}
        lengths |= {"label": len(labels[split])} if split in labels else {}
        if len(set(lengths.values())) > 1:
            raise ConfigError(f"features of {split} must be of the same items, got numbers of items {lengths}")
    if len(parts["train"]) < 2:
        raise ConfigError(f"features must be of two or more modalities, got {sorted(parts['train'])}")
    train = {name: array if array.ndim == 3 else array[:, None] for name, array in parts["train"].items()}
    digest = hashlib.sha256()
    for name in sorted(arrays):
        digest.update(name.encode() + np.ascontiguousarray(arrays[name]).tobytes())
    return FeatureSet(train, parts["validation"], parts["test"], labels, parts[CLASSES], digest.hexdigest()[:16])


def _vectors(name: str, array: np.ndarray, ranks: tuple[int, ...]) -> np.ndarray:
    """Finite numbers, float32."""
    axes = "[items, width] or, of train, [items, copies, width]"
    real = np.issubdtype(array.dtype, np.floating) or np.issubdtype(array.dtype, np.integer)
    if not real or array.ndim not in ranks or not array.size:
        raise ConfigError(f"{name} must be numbers {axes}, none of them 0, got {array.dtype} of shape {array.shape}")
    array = array.astype(np.float32)
    if not (finite := np.isfinite(array)).all():
        raise ConfigError(f"{name} must be finite in float32, got {np.count_nonzero(~finite)} entries that are not")
    return array


def emoji_features(data_dir: Path) -> dict[str, np.ndarray]:
    """The emoji set as `read` expects it."""
    arrays: dict[str, np.ndarray] = {}
    splits = {split: emoji.load_split(data_dir, split) for split in SPLITS}
    for split, source in splits.items():
        arrays[f"{split}/label"] = np.array([source[row]["label"] for row in range(len(source))], np.int32)
    for number, modality in enumerate(TOWER_OF):
        _say(f"features of {modality}, modality {number + 1} of {len(TOWER_OF)}")
        of = {"vision": _pictures, "text": _words, "audio": _speech}[TOWER_OF[modality]]
        rows = {split: of(source, modality, split) for split, source in splits.items()}
        if TOWER_OF[modality] == "text":
            rows["classes"] = [[(name, name)] for name in emoji.CATEGORIES]
            rows = _tf_idf(rows)
        whitened = whiten(rows, axes=AXES[TOWER_OF[modality]], ridge=RIDGES[TOWER_OF[modality]])
        arrays |= {f"{split}/{modality}": part for split, part in whitened.items()}
    return arrays


def _say(what: str) -> None:
    print(what, file=sys.stderr, flush=True)


def whiten(rows: Mapping[str, np.ndarray], *, axes: int, ridge: float) -> dict[str, np.ndarray]:
    """Principal axes of the training rows, their variances evened out.

    Args:
      rows: split to `[items, copies, features]`.
      axes: how many are kept, at most.
      ridge: added to the variances, in units of their mean.

    Returns:
      Split to float32 `[items, copies, axes]`, of the held-out splits the one copy alone. Training rows have mean
      square 1.
    """
    train = rows["train"].reshape(-1, rows["train"].shape[-1]).astype(np.float64)
    mean = train.mean(axis=0)
    width = train.shape[1]
    kept = min(axes, width)
    variance, directions = scipy.linalg.eigh(
        (train - mean).T @ (train - mean) / len(train), subset_by_index=(width - kept, width - 1)
    )
    scaled = directions[:, ::-1] / np.sqrt(np.maximum(variance[::-1], 0.0) + ridge * np.mean(np.maximum(variance, 0.0)))
    scaled /= np.sqrt(np.mean(np.square((train - mean) @ scaled)))
    projected = {split: ((part - mean) @ scaled).astype(np.float32) for split, part in rows.items()}
    return {split: part if split == "train" else part[:, 0] for split, part in projected.items()}


def _tf_idf(rows: Mapping[str, Sequence[Sequence[tuple[str, str]]]]) -> dict[str, np.ndarray]:
    """Character n-grams of the whole text and, with more weight, of the name; `rows` has pairs of both."""
    of_text, of_name = (
        features.TfIdf.fit([item[0][part] for item in rows["train"]], shortest=1, longest=3) for part in (1, 0)
    )
    return {
        split: np.stack(
            [
                np.concatenate(
                    [of_text([text for _, text in item]), NAME_WEIGHT * of_name([name for name, _ in item])], axis=1
                )
                for item in part
            ]
        )
        for split, part in rows.items()
    }


def _pictures(source: emoji.EmojiSplit, modality: str, split: str) -> np.ndarray:
    raw = [source[row] for row in range(len(source))]
    plain = np.stack([emoji.decode_picture(item[modality]) for item in raw]).astype(np.float32) / 255
    views = [plain]
    if split == "train":
        rng = np.random.default_rng(0)
        flip = np.array([item["flip"] for item in raw])
        for _ in range(COPIES - 1):
            views.append(1 - augment.affine_ink(1 - plain, flip, rng.random((len(raw), augment.PICTURE_DRAWS))))
    settings = baseline.PICTURES["HOG, colour x 0.75"]
    return np.stack([features.picture_features(view, **settings) for view in views], axis=1)


def _words(source: emoji.EmojiSplit, modality: str, split: str) -> list[list[tuple[str, str]]]:
    """Of each item the name, and the name with all keywords; in training also with random keywords."""
    rng = np.random.default_rng(0)
    texts = []
    for row in range(len(source)):
        name, keywords = source[row][modality]["name"], list(source[row][modality]["keywords"])
        texts.append([(name, " ".join([name, *keywords]))])
        if split == "train":
            for _ in range(COPIES - 1):
                chosen = rng.permutation(len(keywords))[: rng.integers(len(keywords) + 1)]
                texts[-1].append((name, " ".join([name, *(keywords[number] for number in chosen)])))
    return texts


def _speech(source: emoji.EmojiSplit, modality: str, split: str) -> np.ndarray:
    voices: Sequence[str] = emoji.TRAIN_VOICES
    if split != "train":
        voices = [emoji.VALIDATION_VOICE if split == "validation" else emoji.TEST_VOICE]
    return np.array(
        [
            [
                features.pooled_log_mel(audio.kaldi_fbank(source[row][modality][voice]), segments=(1, 2, 4, 8))
                for voice in voices
            ]
            for row in range(len(source))
        ]
    )

"""Batches of the emoji set for training and evaluation, by grain.

Indices are shuffled and batched first, and one vectorised step then builds each batch from arrays that are decoded
once a process: no example is touched alone, except for the words.
"""

import dataclasses
import functools
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Float32, Int, Int32

from gramjax._extras import needs_extra

with needs_extra("train"):
    import grain

    from gramjax.data import audio, augment, emoji, tokenizer
    from gramjax.data._rows import check_rows
    from gramjax.data.emoji import assets

MODALITIES = (*emoji.PICTURES, *emoji.LANGUAGES, "speech")
PICTURE_SIZE = assets.PICTURE_SIZE
# Longest text in tokens. All but one in a hundred fit whole; of those the last keywords are cut.
TEXT_LENGTH = 48
# Longest utterance in frames of 10 ms: the longest name takes 202, and audio patches are 16 frames long.
SPEECH_FRAMES = 208
MEL_BINS = 64
# Of the training split's pixels on white, over both artists and all channels.
PICTURE_MEAN, PICTURE_STD = 0.76, 0.29
# Training utterances begin up to this many frames late.
LATEST_START = 16

Batch = dict[str, Any]


def make_loader(
    source: emoji.EmojiSplit,
    *,
    modalities: Sequence[str],
    batch_size: int,
    seed: int,
    train: bool,
    process_index: int = 0,
    process_count: int = 1,
) -> grain.IterDataset[Batch]:
    """Batches of a split, as NumPy arrays.

    With B rows a process (`batch_size / process_count`), a batch holds for each modality named:
      twitter, google: float32 `[B, 32, 32, 3]`, on white, about zero mean and unit variance.
      english, spanish, chinese: `{"ids": int32 [B, 48], "mask": bool [B, 48]}`: `[CLS]`, the name with each word spelt
        (`tokenizer.spelt_words`), and those words of the keywords that the tokenizer knows; padded with 0.
      speech: `{"fbank": float32 [B, 208, 64], "mask": bool [B, 208]}`: normalised log-mel energies
        (`audio.kaldi_fbank`), and which frames are of the utterance; the others are 0.
    and `label` int32 `[B]` (index into `emoji.CATEGORIES`) and `index` int32 `[B]` (position in the whole set).

    In training, each epoch is a new shuffle and no pictograph comes twice in a batch; what does not fill a last batch
    is dropped, other pictographs each epoch. Pictures are shifted, zoomed, tinted, and mirrored where that keeps their
    meaning. Texts are the name (four times in five) and a random choice of keywords, with one word in ten dropped (in
    Chinese, one character in ten). Speech is one of `emoji.TRAIN_VOICES`, with noise, a late start, and bands masked.

    In evaluation, the split comes once, in order and unchanged: texts are the name, then all keywords; speech
    is a voice never heard in training (`emoji.TEST_VOICE` for the test split, `emoji.VALIDATION_VOICE`
    otherwise). The last batch is filled up with repeated rows, which `valid` bool `[B]` marks False.

    Process p of P gets rows `p * B` to `(p + 1) * B` of the same global batches, whatever P. `iter(loader)` has
    `get_state` and `set_state` (and so can be checkpointed by Orbax) and continues exactly.

    Args:
      source: a split, as `emoji.load_split` opens it.
      modalities: any of "twitter", "google", "english", "spanish", "chinese", "speech". What is drawn for one does not
        depend on the others named.
      batch_size: rows of a batch over all processes.
      seed: of shuffling and augmentation; the same seed gives the same batches.
      train: shuffle and augment, or go through the split once.
      process_index: which rows of each batch to build.
      process_count: number of processes the batch is divided among.

    Raises:
      ValueError: if an argument is out of range, with its name and what was expected.
    """
    if isinstance(modalities, str):
        raise ValueError(f"modalities must be a sequence of names, got the string {modalities!r}")
    if not modalities or len(set(modalities)) != len(modalities) or not set(modalities) <= set(MODALITIES):
        raise ValueError(
            f"modalities must be different names out of {MODALITIES}, at least one, got {tuple(modalities)}"
        )
    check_rows(
        len(source),
        "pictographs of the split",
        batch_size=batch_size,
        process_index=process_index,
        process_count=process_count,
        seed=seed,
        train=train,
    )
    rows = batch_size // process_count
    decoded = _decoded(source, (*modalities, "common"), train)
    build = _BatchBuilder(
        common=decoded.pop("common"),
        decoded=decoded,
        rows=slice(process_index * rows, (process_index + 1) * rows),
    )
    if train:
        batches = (
            grain.MapDataset.range(len(source))
            .seed(seed)
            .shuffle()
            .batch(batch_size, drop_remainder=True, batch_fn=np.asarray)
            .random_map(build.augmented)
            .repeat()
        )
    else:
        batches = grain.MapDataset.range(-(-len(source) // batch_size)).map(
            functools.partial(build.plain, batch_size=batch_size)
        )
    # One background thread is enough: batches take less time than steps.
    return batches.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=2))


# Decoded splits.


@dataclasses.dataclass(frozen=True)
class _Common:
    """What every batch holds."""

    label: Int32[np.ndarray, " example"]
    index: Int32[np.ndarray, " example"]

    def plain(self, rows: Int[np.ndarray, " batch"]) -> Batch:
        return {"label": self.label[rows], "index": self.index[rows]}


@dataclasses.dataclass(frozen=True)
class _Pictures:
    """One artist's drawings as ink: 1 - intensity."""

    ink: Float32[np.ndarray, "example 32 32 3"]
    flip: Bool[np.ndarray, " example"]

    @property
    def draws(self) -> int:
        return augment.PICTURE_DRAWS

    def plain(self, rows: Int[np.ndarray, " batch"]) -> Float32[np.ndarray, "batch 32 32 3"]:
        return self._normalize(self.ink[rows])

    def augmented(self, rows: Int[np.ndarray, " batch"], uniform: np.ndarray) -> Float32[np.ndarray, "batch 32 32 3"]:
        return self._normalize(augment.affine_ink(self.ink[rows], self.flip[rows], uniform))

    def _normalize(self, ink: np.ndarray) -> np.ndarray:
        return (np.float32(1.0 - PICTURE_MEAN) - ink) / np.float32(PICTURE_STD)


@dataclasses.dataclass(frozen=True)
class _Words:
    """Names and keywords in one language."""

    phrases: tuple[augment.Phrases, ...]

    @functools.cached_property
    def draws(self) -> int:
        return max(phrases.draws for phrases in self.phrases)

    def plain(self, rows: Int[np.ndarray, " batch"]) -> Mapping[str, np.ndarray]:
        return self._pad([[self.phrases[row].name, *self.phrases[row].keywords] for row in rows])

    def augmented(self, rows: Int[np.ndarray, " batch"], uniform: np.ndarray) -> Mapping[str, np.ndarray]:
        return self._pad([augment.sample_phrases(self.phrases[row], draws) for row, draws in zip(rows, uniform)])

    def _pad(self, texts: Sequence[Sequence[Sequence[tuple[int, ...]]]]) -> Mapping[str, np.ndarray]:
        ids = np.full((len(texts), TEXT_LENGTH), tokenizer.PAD, np.int32)
        lengths = np.empty(len(texts), np.int64)
        for row, text in enumerate(texts):
            words = [token for phrase in text for word in phrase for token in word]
            tokens = [tokenizer.CLS, *(words or [tokenizer.UNK])][:TEXT_LENGTH]
            ids[row, : len(tokens)] = tokens
            lengths[row] = len(tokens)
        return {"ids": ids, "mask": np.arange(TEXT_LENGTH) < lengths[:, None]}


@dataclasses.dataclass(frozen=True)
class _Speech:
    """Mel energies of utterances, one after the other; an example has one utterance a voice."""

    energies: Float32[np.ndarray, "frame mel"]
    start: Int[np.ndarray, "example voice"]
    length: Int[np.ndarray, "example voice"]
    noise: Float32[np.ndarray, "noise_frame mel"]

    @property
    def draws(self) -> int:
        return augment.SPEECH_DRAWS + 2

    def plain(self, rows: Int[np.ndarray, " batch"]) -> Mapping[str, np.ndarray]:
        start, length = self.start[rows, 0], self.length[rows, 0]
        frames = np.arange(SPEECH_FRAMES)
        energies = self.energies[self._within(start, frames)]
        mask = frames < length[:, None]
        return {"fbank": self._normalize(energies) * mask[..., None], "mask": mask}

    def augmented(self, rows: Int[np.ndarray, " batch"], uniform: np.ndarray) -> Mapping[str, np.ndarray]:
        voice = (uniform[:, -2] * self.start.shape[1]).astype(np.int64)
        start, length = self.start[rows, voice], self.length[rows, voice]
        longest = int(length.max())
        energies = self.energies[self._within(start, np.arange(longest))]
        energies = augment.degrade_speech(energies, length, self.noise, uniform)
        fbank = augment.mask_spectrum(self._normalize(energies), length, uniform)
        fbank *= (np.arange(longest) < length[:, None])[..., None]
        late = (uniform[:, -1] * (np.minimum(LATEST_START, SPEECH_FRAMES - length) + 1)).astype(np.int64)
        padded = np.zeros((len(rows), SPEECH_FRAMES + longest, MEL_BINS), np.float32)
        padded[np.arange(len(rows))[:, None], late[:, None] + np.arange(longest)] = fbank
        since = np.arange(SPEECH_FRAMES) - late[:, None]
        return {"fbank": padded[:, :SPEECH_FRAMES], "mask": (since >= 0) & (since < length[:, None])}

    def _within(self, start: np.ndarray, frames: np.ndarray) -> np.ndarray:
        return np.minimum(start[:, None] + frames, len(self.energies) - 1)

    def _normalize(self, energies: np.ndarray) -> np.ndarray:
        return audio.normalize_fbank(np.log(energies))


_CACHE: weakref.WeakKeyDictionary[emoji.EmojiSplit, dict[Any, Any]] = weakref.WeakKeyDictionary()


def _decoded(source: emoji.EmojiSplit, names: Sequence[str], train: bool) -> dict[str, Any]:
    """Modalities of a whole split in memory, each decoded once for as long as `source` lives."""
    evaluated = emoji.TEST_VOICE if source.name == "test" else emoji.VALIDATION_VOICE
    voices = emoji.TRAIN_VOICES if train else (evaluated,)
    keys = {name: (name, voices if name == "speech" else ()) for name in names}
    cache = _CACHE.setdefault(source, {})
    missing = {name: key for name, key in keys.items() if key not in cache}
    if missing:
        examples = [source[position] for position in range(len(source))]
        for name, key in missing.items():
            cache[key] = _decode(examples, name, voices)
    return {name: cache[key] for name, key in keys.items()}


def _decode(examples: Sequence[Mapping[str, Any]], name: str, voices: Sequence[str]) -> Any:
    if name in emoji.PICTURES:
        pixels = np.stack([emoji.decode_picture(example[name]) for example in examples])
        return _Pictures(
            ink=1.0 - pixels.astype(np.float32) / 255.0, flip=np.array([example["flip"] for example in examples])
        )
    if name in emoji.LANGUAGES:
        name_word, keyword_word = functools.cache(tokenizer.spelt_words), functools.cache(tokenizer.known_words)

        def words(text: str, tokens: Callable[[str], tuple[int, ...]]) -> tuple[tuple[int, ...], ...]:
            found = tuple(filter(None, map(tokens, text.split())))
            # Chinese does not set words apart: there, each character is one.
            return tuple((token,) for word in found for token in word) if name == "chinese" else found

        return _Words(
            phrases=tuple(
                augment.Phrases(
                    words(example[name]["name"], name_word),
                    tuple(filter(None, (words(keyword, keyword_word) for keyword in example[name]["keywords"]))),
                )
                for example in examples
            ),
        )
    if name == "speech":
        return _decode_speech([[example["speech"][voice] for voice in voices] for example in examples])
    return _Common(
        label=np.array([example["label"] for example in examples], np.int32),
        index=np.array([example["index"] for example in examples], np.int32),
    )


def _decode_speech(waveforms: Sequence[Sequence[np.ndarray]]) -> _Speech:
    energies = []
    for start in range(0, len(waveforms), 64):
        energies += audio.mel_energies([wave for voices in waveforms[start : start + 64] for wave in voices])
    length = np.array([len(rows) for rows in energies]).reshape(len(waveforms), -1)
    if length.max() > SPEECH_FRAMES:
        raise ValueError(f"an utterance has {length.max()} frames; at most {SPEECH_FRAMES} are allowed")
    start = (np.cumsum(length) - length.ravel()).reshape(length.shape)
    return _Speech(np.concatenate(energies), start, length, _noise_energies())


@functools.cache
def _noise_energies() -> Float32[np.ndarray, "frame mel"]:
    """Mel energies of white, pink and brown noise, each of mean 1, 10 s of each."""
    rng = np.random.default_rng(0)
    white = np.fft.rfft(rng.normal(size=160_000))
    frequency = np.maximum(np.arange(len(white)), 1)
    bank = []
    for power in (0.0, 0.5, 1.0):
        wave = np.fft.irfft(white / frequency**power)
        (energies,) = audio.mel_energies([wave / wave.std() * 1000.0])
        bank.append(energies / energies.mean())
    return np.concatenate(bank).astype(np.float32)


@dataclasses.dataclass(frozen=True)
class _BatchBuilder:
    """Builds this process's rows of a global batch of positions."""

    decoded: Mapping[str, Any]
    common: _Common
    rows: slice

    def augmented(self, positions: Int[np.ndarray, " batch"], rng: np.random.Generator) -> Batch:
        # Numbers are drawn for the whole batch, so that rows do not depend on how processes divide it, and from one
        # stream a modality, so that they do not depend on the other modalities either.
        root = int(rng.integers(2**63))
        batch = self.common.plain(positions[self.rows])
        for name, arrays in self.decoded.items():
            stream = np.random.default_rng([root, MODALITIES.index(name)])
            uniform = stream.random((len(positions), arrays.draws))
            batch[name] = arrays.augmented(positions[self.rows], uniform[self.rows])
        return batch

    def plain(self, number: int, *, batch_size: int) -> Batch:
        total = len(self.common.label)
        positions = (number * batch_size + np.arange(batch_size))[self.rows]
        rows = positions % total
        return {
            **self.common.plain(rows),
            **{name: arrays.plain(rows) for name, arrays in self.decoded.items()},
            "valid": positions < total,
        }

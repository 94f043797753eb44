"""Random changes that keep the meaning of a picture, an utterance or a phrase, on whole batches, in NumPy.

Every function takes its randomness as an array `uniform` `[batch, n]` of numbers in [0, 1), one row an example, so
that an example's augmentation depends on its row alone and not on what else is in the batch.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float, Float32, Int

PICTURE_DRAWS = 10
SPEECH_DRAWS = 7


def affine_ink(
    ink: Float32[np.ndarray, "batch height width channel"],
    flip: Bool[np.ndarray, " batch"],
    uniform: Float[np.ndarray, "batch draw"],
    *,
    shift: float = 3.0,
    zoom: float = 0.15,
    colour: float = 0.1,
    saturation: float = 0.3,
) -> Float32[np.ndarray, "batch height width channel"]:
    """Shifts, zooms, mirrors and tints pictures given as ink (1 - intensity, so that white is 0).

    White stays white, and what is moved in from outside is white. Hue is kept, up to the gains: names name colours.

    Args:
      ink: in [0, 1].
      flip: which pictures may be mirrored; half of those are.
      uniform: `PICTURE_DRAWS` columns.
      shift: largest shift, in pixels.
      zoom: largest relative change of size (each axis varies a further quarter of it).
      colour: largest relative change of each channel's ink.
      saturation: largest relative change of the distance from grey.
    """
    u = 2.0 * uniform.astype(np.float32) - 1.0
    height, width = ink.shape[1:3]
    scale = np.exp(zoom * u[:, 2:3] + zoom / 4 * u[:, 3:5])
    rows = _resampling(height, scale[:, 0], shift * u[:, 0], np.zeros(len(ink), bool))
    columns = _resampling(width, scale[:, 1], shift * u[:, 1], flip & (uniform[:, 9] < 0.5))
    moved = np.matmul(rows, ink.reshape(len(ink), height, -1)).reshape(ink.shape)
    moved = np.matmul(columns[:, None], moved)
    grey = moved.mean(axis=-1, keepdims=True)
    tinted = grey + (1.0 + saturation * u[:, 5, None, None, None]) * (moved - grey)
    gains = 1.0 + colour * u[:, 6:9]
    return np.clip(tinted * gains[:, None, None], 0.0, 1.0)


def _resampling(
    size: int,
    scale: Float32[np.ndarray, " batch"],
    shift: Float32[np.ndarray, " batch"],
    flip: Bool[np.ndarray, " batch"],
) -> Float32[np.ndarray, "batch {size} {size}"]:
    """Matrices that scale a line about its middle and then shift it, antialiased; the outside counts as 0."""
    # The line goes on as far again on both sides, so that every row is normalised before the outside is cut off.
    centres = np.arange(-size, 2 * size, dtype=np.float32) + 0.5
    target = centres[size : 2 * size]
    source = (target - size / 2 - shift[:, None]) / scale[:, None] + size / 2
    source = np.where(flip[:, None], size - source, source)
    reach = np.maximum(1.0, 1.0 / scale)[:, None, None]
    weight = np.maximum(0.0, 1.0 - np.abs(source[:, :, None] - centres) / reach)
    weight /= np.maximum(weight.sum(axis=2, keepdims=True), 1e-6)
    return weight[:, :, size : 2 * size].astype(np.float32)


def degrade_speech(
    energies: Float32[np.ndarray, "batch frame mel"],
    length: Int[np.ndarray, " batch"],
    noise: Float32[np.ndarray, "bank_frame mel"],
    uniform: Float[np.ndarray, "batch draw"],
    *,
    snr_db: tuple[float, float] = (5.0, 45.0),
    gain_db: float = 6.0,
) -> Float32[np.ndarray, "batch frame mel"]:
    """Adds noise and changes the loudness of utterances given as mel energies.

    Energies of speech and noise are added, which neglects their cross terms.

    Args:
      energies: the utterance first, anything after it.
      length: frames of each utterance.
      noise: a recording's energies, of mean 1, at least as long as an utterance.
      uniform: `SPEECH_DRAWS` columns, of which the first three are used.
      snr_db: range of the ratio of mean energies.
      gain_db: largest change of loudness.
    """
    frames = np.arange(energies.shape[1])
    inside = (frames < length[:, None])[..., None]
    mean = (energies * inside).sum(axis=(1, 2)) / (length * energies.shape[2])
    snr = snr_db[0] + (snr_db[1] - snr_db[0]) * uniform[:, 0]
    level = (mean * 10.0 ** (-snr / 10)).astype(np.float32)
    start = (uniform[:, 1] * (len(noise) - length + 1)).astype(np.int64)
    drawn = noise[np.minimum(start[:, None] + frames, len(noise) - 1)]
    gain = (10.0 ** (gain_db * (2 * uniform[:, 2] - 1) / 10)).astype(np.float32)
    return gain[:, None, None] * (energies + level[:, None, None] * drawn)


def mask_spectrum(
    fbank: Float32[np.ndarray, "batch frame mel"],
    length: Int[np.ndarray, " batch"],
    uniform: Float[np.ndarray, "batch draw"],
    *,
    max_frames: int = 12,
    max_bins: int = 10,
) -> Float32[np.ndarray, "batch frame mel"]:
    """Sets one random band of time and one of frequency to 0 (SpecAugment, arXiv 1904.08779).

    Args:
      fbank: normalised, so that 0 is the mean.
      length: frames of each utterance; at most a quarter of it is masked.
      uniform: `SPEECH_DRAWS` columns, of which the last four are used.
      max_frames: widest band of time.
      max_bins: widest band of frequency.
    """
    frames, bins = fbank.shape[1:]
    duration = (np.minimum(max_frames, length // 4) + 1) * uniform[:, 3]
    duration = duration.astype(np.int64)
    start = (uniform[:, 4] * (length - duration + 1)).astype(np.int64)
    height = ((max_bins + 1) * uniform[:, 5]).astype(np.int64)
    low = (uniform[:, 6] * (bins - height + 1)).astype(np.int64)
    time = np.arange(frames) - start[:, None]
    mel = np.arange(bins) - low[:, None]
    kept = ((time < 0) | (time >= duration[:, None]))[:, :, None] & ((mel < 0) | (mel >= height[:, None]))[:, None]
    return fbank * kept


@dataclasses.dataclass(frozen=True)
class Phrases:
    """A name and its keywords in token ids, word by word.

    Attributes:
      name: the words of the name, each a tuple of token ids.
      keywords: the same for each keyword.
    """

    name: tuple[tuple[int, ...], ...]
    keywords: tuple[tuple[tuple[int, ...], ...], ...]

    @property
    def draws(self) -> int:
        """How many random numbers `sample_phrases` needs."""
        return 2 + len(self.keywords) + len(self.name) + sum(map(len, self.keywords))


def sample_phrases(
    phrases: Phrases, uniform: Float[np.ndarray, " draw"], *, name_rate: float = 0.8, drop_rate: float = 0.1
) -> list[list[tuple[int, ...]]]:
    """A random part of what is said of a pictograph: the name (usually), some keywords in random order, words dropped.

    Args:
      phrases: all that is said.
      uniform: at least `phrases.draws` numbers.
      name_rate: how often the name is kept (always, if no keyword is).
      drop_rate: how often a word is left out.

    Returns:
      The phrases that remain, each a list of words; never nothing.
    """
    draws = uniform.tolist()
    number = len(phrases.keywords)
    chosen = sorted(range(number), key=draws[2 : 2 + number].__getitem__)[: int(draws[0] * (number + 1))]
    kept: Sequence[tuple[tuple[int, ...], ...]] = [phrases.keywords[k] for k in chosen]
    if not chosen or draws[1] < name_rate:
        kept = [phrases.name, *kept]
    words = iter(draws[2 + number :])
    thinned = [[word for word in phrase if next(words) >= drop_rate] for phrase in kept]
    thinned = [phrase for phrase in thinned if phrase]
    return thinned or [list(kept[0])]

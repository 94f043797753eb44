"""Classical features of pictures, words and speech, in NumPy: what the fixed baseline sees.

Nothing here is learned from pairs: gradient histograms and colours of a picture, character n-grams of a text, log-mel
energies of an utterance averaged over time.
"""

import dataclasses
import itertools
import math
from collections import Counter
from collections.abc import Iterator, Sequence

import numpy as np
from einops import rearrange, reduce

HOG_ORIENTATIONS = 9


def hog(pictures: np.ndarray, *, cell: int) -> np.ndarray:
    """Histograms of oriented gradients (Dalal and Triggs, CVPR 2005), `[N, H, W, 3]` in [0, 1] to `[N, features]`.

    Per pixel the channel with the largest gradient, unsigned orientations in 9 bins with each vote shared between the
    two nearest, blocks of 2 x 2 cells at every cell, L2 norm clipped at 0.2 and renormalised.

    Raises:
      ValueError: if the height or the width is not a multiple of `cell`, or there is room for fewer than 2 x 2 cells.
    """
    _, height, width, _ = pictures.shape
    if height % cell or width % cell or min(height, width) < 2 * cell:
        raise ValueError(f"cell must divide the pictures at least twice: cell={cell}, pictures {height} x {width}")
    padded = np.pad(pictures, ((0, 0), (1, 1), (1, 1), (0, 0)), mode="edge")
    down = padded[:, 2:, 1:-1] - padded[:, :-2, 1:-1]
    right = padded[:, 1:-1, 2:] - padded[:, 1:-1, :-2]
    strongest = np.argmax(down**2 + right**2, axis=-1)[..., None]
    down = np.take_along_axis(down, strongest, -1)[..., 0]
    right = np.take_along_axis(right, strongest, -1)[..., 0]

    # Bin b is centred on (b + 1/2) * 20 degrees; a vote is split linearly between the two nearest centres, cyclically.
    position = np.mod(np.arctan2(down, right), np.pi) / np.pi * HOG_ORIENTATIONS - 0.5
    low = np.floor(position)
    share = (position - low)[..., None]
    low = low.astype(np.int64) % HOG_ORIENTATIONS
    one_hot = np.eye(HOG_ORIENTATIONS, dtype=pictures.dtype)
    votes = one_hot[low] * (1 - share) + one_hot[(low + 1) % HOG_ORIENTATIONS] * share
    votes = votes * np.sqrt(down**2 + right**2)[..., None]
    cells = reduce(votes, "n (y cy) (x cx) o -> n y x o", "sum", cy=cell, cx=cell)

    blocks = np.concatenate([cells[:, :-1, :-1], cells[:, :-1, 1:], cells[:, 1:, :-1], cells[:, 1:, 1:]], axis=-1)
    blocks = np.minimum(_unit_norm(blocks), 0.2)
    return rearrange(_unit_norm(blocks), "n y x f -> n (y x f)")


def colour(pictures: np.ndarray, *, grid: int) -> np.ndarray:
    """Mean colour in each of `grid` x `grid` squares, and a histogram of 4 x 4 x 4 colours; each of unit norm."""
    means = reduce(pictures, "n (y cy) (x cx) c -> n (y x c)", "mean", y=grid, x=grid)
    levels = np.clip((pictures * 4).astype(np.int64), 0, 3)
    codes = rearrange((levels * np.array([16, 4, 1])).sum(-1), "n y x -> n (y x)")
    counts = np.stack([np.bincount(row, minlength=64) for row in codes])
    # Square roots (Euclidean distance becomes Hellinger's) keep the white ground from drowning the rest.
    histogram = np.sqrt(counts / codes.shape[1]).astype(pictures.dtype)
    return np.concatenate([_unit_norm(means), histogram], axis=1)


def picture_features(pictures: np.ndarray, *, cells: Sequence[int], grid: int, colour_weight: float) -> np.ndarray:
    """HOG with cells of each of the sizes, of unit norm together, then colour, whose norm is `colour_weight`."""
    shapes = [_unit_norm(hog(pictures, cell=cell)) for cell in cells]
    shape = _unit_norm(np.concatenate(shapes, axis=1))
    paint = _unit_norm(colour(pictures, grid=grid))
    return np.concatenate([shape, colour_weight * paint], axis=1)


def character_ngrams(text: str, shortest: int, longest: int) -> Iterator[str]:
    """Character n-grams of each word of a text, in lower case, with a space marking both ends of the word.

    >>> list(character_ngrams("Ox", 2, 3))
    [' o', 'ox', 'x ', ' ox', 'ox ']
    """
    for word in text.lower().split():
        padded = f" {word} "
        for length in range(shortest, longest + 1):
            for start in range(len(padded) - length + 1):
                yield padded[start : start + length]


@dataclasses.dataclass(frozen=True)
class TfIdf:
    """Character n-gram tf-idf: `(1 + log tf) * (1 + log((1 + n) / (1 + df)))`, each row of unit norm."""

    shortest: int
    longest: int
    vocabulary: dict[str, int]
    idf: np.ndarray

    @classmethod
    def fit(cls, texts: Sequence[str], *, shortest: int, longest: int) -> "TfIdf":
        """Vocabulary (n-grams in at least two of the texts) and document frequencies of the training texts."""
        frequency = Counter(gram for text in texts for gram in set(character_ngrams(text, shortest, longest)))
        kept = sorted(gram for gram, count in frequency.items() if count >= 2)
        counts = np.array([frequency[gram] for gram in kept], np.float32)
        idf = 1 + np.log((1 + len(texts)) / (1 + counts))
        return cls(shortest, longest, {gram: column for column, gram in enumerate(kept)}, idf.astype(np.float32))

    def __call__(self, texts: Sequence[str]) -> np.ndarray:
        """`[len(texts), vocabulary]`; n-grams never seen in training are ignored."""
        matrix = np.zeros((len(texts), len(self.vocabulary)), np.float32)
        for row, text in enumerate(texts):
            for gram, count in Counter(character_ngrams(text, self.shortest, self.longest)).items():
                if (column := self.vocabulary.get(gram)) is not None:
                    matrix[row, column] = 1 + np.log(count)
        return _unit_norm(matrix * self.idf)


def pooled_log_mel(fbank: np.ndarray, *, segments: Sequence[int]) -> np.ndarray:
    """Mean and standard deviation over time of log-mel energies `[frames, mel]`, in parts of the utterance.

    Args:
      fbank: natural logarithms, of a waveform in the range of 16-bit samples.
      segments: into how many equal stretches the utterance is cut, for each of the cuts.
    """
    # Less than the rounding of 16-bit samples is silence, and its logarithm says nothing.
    fbank = np.maximum(fbank, 0.0)
    statistics = []
    for count in segments:
        for start, stop in itertools.pairwise(np.linspace(0, len(fbank), count + 1)):
            part = fbank[int(start) : max(math.ceil(stop), int(start) + 1)]
            statistics += [part.mean(axis=0), part.std(axis=0)]
    return np.concatenate(statistics)


def _unit_norm(rows: np.ndarray) -> np.ndarray:
    norm = np.linalg.norm(rows, axis=-1, keepdims=True)
    return rows / np.maximum(norm, 1e-6)

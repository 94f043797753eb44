"""Reads the packed pictographs that ship inside the package (built by `experiments/build_emoji.py`)."""

import functools
import gzip
import io
import json
import zipfile
from pathlib import Path
from typing import Any

import einops
import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image

DIRECTORY = Path(__file__).parent / "assets"
SPLITS = ("train", "validation", "test")
CATEGORIES = (
    "Smileys & Emotion",
    "People & Body",
    "Animals & Nature",
    "Food & Drink",
    "Travel & Places",
    "Activities",
    "Objects",
    "Symbols",
)
PICTURE_SIZE = 32
SHEET_COLUMNS = 8
PER_SHEET = 32


@functools.cache
def load_records(directory: Path = DIRECTORY) -> tuple[dict[str, Any], ...]:
    """Every pictograph's words, label and split, in Unicode's order.

    Returns:
      Dictionaries with `id` (code points in hexadecimal, joined by "-"), `label` (index into `CATEGORIES`),
      `subcategory`, `english`, `spanish` and `chinese` (each `{"name": str, "keywords": [str, ...]}`), `split`,
      `family` (id of the first near-duplicate; a family lies wholly in one split) and `flip` (whether the mirrored
      drawing keeps its meaning).
    """
    return tuple(json.loads(gzip.decompress((directory / "words.json.gz").read_bytes())))


def load_pictures(artist: str, directory: Path = DIRECTORY) -> UInt8[np.ndarray, "pictograph 32 32 4"]:
    """One artist's drawings ("twitter" or "google"), RGB and straight alpha, in the order of `load_records`."""
    with zipfile.ZipFile(directory / f"{artist}.zip") as archive:
        sheets = [
            split_tiles(np.asarray(Image.open(io.BytesIO(archive.read(name))).convert("RGBA")))
            for name in sorted(archive.namelist())
        ]
    return np.concatenate(sheets)[: len(load_records(directory))]


def join_tiles(tiles: UInt8[np.ndarray, "tile 32 32 channel"]) -> UInt8[np.ndarray, "height width channel"]:
    """Lays pictures out in a sheet `SHEET_COLUMNS` wide; the last row is filled up with zeros."""
    missing = -len(tiles) % SHEET_COLUMNS
    tiles = np.concatenate([tiles, np.zeros((missing, *tiles.shape[1:]), tiles.dtype)])
    return einops.rearrange(tiles, "(row column) h w c -> (row h) (column w) c", column=SHEET_COLUMNS)


def split_tiles(sheet: UInt8[np.ndarray, "height width channel"]) -> UInt8[np.ndarray, "tile 32 32 channel"]:
    """The inverse of `join_tiles`, filling included."""
    return einops.rearrange(sheet, "(row h) (column w) c -> (row column) h w c", h=PICTURE_SIZE, column=SHEET_COLUMNS)


def on_white(pictures: UInt8[np.ndarray, "*batch h w 4"]) -> Float[np.ndarray, "*batch h w 3"]:
    """Pictures with alpha over a white ground, in [0, 255]."""
    alpha = pictures[..., 3:].astype(np.float32) / 255.0
    return pictures[..., :3] * alpha + 255.0 * (1.0 - alpha)

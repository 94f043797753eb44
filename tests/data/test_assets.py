"""The packed pictographs: what is there, that it never changes, and that no near-duplicate straddles the split."""

import collections
import hashlib
import io
import itertools
import json
import re
import zipfile

import numpy as np
import pytest
from PIL import Image

from experiments import build_emoji
from gramjax.data import emoji
from gramjax.data.emoji import assets

RECORDS = assets.load_records()
SPLIT = np.array([record["split"] for record in RECORDS])
NAMES = [record["english"]["name"] for record in RECORDS]


def sha256(value: bytes) -> str:
    return hashlib.sha256(value).hexdigest()


def test_what_is_there():
    assert len(RECORDS) == 1572
    assert len({record["id"] for record in RECORDS}) == 1572
    assert set(range(8)) == {record["label"] for record in RECORDS}
    for record, language in itertools.product(RECORDS, emoji.LANGUAGES):
        assert record[language]["name"]
        assert all(record[language]["keywords"])
        assert record[language]["name"].lower() not in map(str.lower, record[language]["keywords"])
    # Names tell pictographs apart, so retrieval by name is well posed.
    for language in emoji.LANGUAGES:
        assert len({record[language]["name"] for record in RECORDS}) == 1572


def test_the_assets_are_small_and_attributed():
    files = {path.name: path for path in assets.DIRECTORY.iterdir()}
    assert set(files) == {"ATTRIBUTION.md", "google.zip", "tokenizer.json", "twitter.zip", "words.json.gz"}
    assert sum(path.stat().st_size for path in files.values()) < 1_500_000
    text = files["ATTRIBUTION.md"].read_text(encoding="utf-8")
    for required in ("CC BY 4.0", "Apache\nLicense, Version 2.0", "UNICODE LICENSE V3", "MIT License", "Changes:"):
        assert required in text


def test_the_split_never_changes():
    table = [(record["id"], record["split"], record["label"], record["flip"]) for record in RECORDS]
    assert collections.Counter(SPLIT) == {"train": 1090, "validation": 161, "test": 321}
    assert sha256(json.dumps(table).encode()) == "31307e239a6c4f67fa7701097d66e7e7b9c599604bf477b836c3c55642287450"
    words = [[record[language] for language in emoji.LANGUAGES] for record in RECORDS]
    assert (
        sha256(json.dumps(words, sort_keys=True).encode())
        == "b278b8264ab43bd50c46004d8c13559ddca40bf696b883b3f59b7efa3feeba37"
    )


@pytest.mark.parametrize(
    ("artist", "digest"),
    [
        ("twitter", "b8fd93ed2328b08c8a609b524a6d1ea897cce356a3a18fecb1971e198f3f4269"),
        ("google", "6dc5eb354a976f7e9c1d72589ba753b629b4416c92107e0e00fcf6e3acb9a5ea"),
    ],
)
def test_the_pictures_never_change(artist, digest):
    pictures = assets.load_pictures(artist)
    assert pictures.shape == (1572, 32, 32, 4)
    assert sha256(pictures.tobytes()) == digest
    assert (pictures[..., 3] > 0).mean(axis=(1, 2)).min() > 0.05, "an empty picture"


def test_every_split_holds_every_category():
    for split in emoji.SPLITS:
        assert {record["label"] for record in RECORDS if record["split"] == split} == set(range(8))


def straddling(keys):
    """Keys that occur in more than one split."""
    sides = collections.defaultdict(set)
    for key, split in zip(keys, SPLIT, strict=True):
        sides[key].add(split)
    return {key for key, splits in sides.items() if len(splits) > 1}


def test_families_lie_on_one_side():
    assert not straddling(record["family"] for record in RECORDS)


def test_code_points_that_differ_by_gender_or_skin_alone_lie_on_one_side():
    drop = set("\u200d\ufe0f♀♂") | set(map(chr, range(0x1F3FB, 0x1F400)))
    people = {"👨", "👩", "🧑"}

    def key(record):
        text = "".join(chr(int(code, 16)) for code in record["id"].split("-"))
        return "".join("p" if character in people else character for character in text if character not in drop)

    assert len({key(record) for record in RECORDS}) < 1572
    assert not straddling(map(key, RECORDS))


def test_names_that_differ_by_person_direction_or_colour_alone_lie_on_one_side():
    variants = re.compile(
        r"\b(man|woman|person|men|women|people|face|left|right|up|down|oncoming|red|orange|yellow|green|blue|purple|"
        r"brown|black|white|grey|pink|large|small|medium|open|closed|old)\b"
    )
    keys = [" ".join(variants.sub(" ", name.lower()).replace("with", "").split()) or name for name in NAMES]
    assert len(set(keys)) < 1500
    assert not straddling(keys)


@pytest.mark.parametrize(
    "family",
    [r"o’clock|-thirty", r"moon( face)?$", r"^keycap", r"^Japanese “", r" arrow", r"mailbox", r"^family", r"medal$"],
)
def test_known_families_lie_on_one_side(family):
    sides = {split for name, split in zip(NAMES, SPLIT, strict=True) if re.search(family, name)}
    assert len(sides) == 1


def blurred_distance(pictures):
    """[n, n]: an independent measure, RMS difference of 8 x 8 thumbnails on grey, as drawn or mirrored."""
    alpha = pictures[..., 3:] / 255.0
    shown = pictures[..., :3] / 255.0 * alpha + 0.5 * (1 - alpha)
    small = shown.reshape(-1, 8, 4, 8, 4, 3).mean(axis=(2, 4)).astype(np.float32)
    rows, mirrored = small.reshape(len(small), -1), small[:, :, ::-1].reshape(len(small), -1)

    def rms(other):
        squares = (rows**2).sum(1)[:, None] + (other**2).sum(1) - 2 * rows @ other.T
        return np.sqrt(np.maximum(squares, 0) / rows.shape[1])

    return np.minimum(rms(rows), rms(mirrored))


def test_no_drawing_has_a_near_duplicate_across_the_split():
    across = SPLIT[:, None] != SPLIT
    measured, independent = [], []
    for artist in emoji.PICTURES:
        pictures = assets.load_pictures(artist)
        measured.append(build_emoji.picture_distances(pictures))
        independent.append(blurred_distance(pictures))
    # Packing to 256 colours moves distances a little from those the split was made with.
    assert np.min(measured, axis=0)[across].min() > build_emoji.NEAR_DUPLICATE_ONCE - 0.01
    assert np.mean(measured, axis=0)[across].min() > build_emoji.NEAR_DUPLICATE_BOTH - 0.01
    # By the other measure, almost all of the closest pairs lie on one side.
    mean = np.mean(independent, axis=0)
    upper = np.triu(np.ones_like(across), 1)
    closest = np.argsort(np.where(upper, mean, np.inf), axis=None)[:300]
    assert across.ravel()[closest].mean() < 0.05
    assert across[upper].mean() > 0.4


def test_what_has_a_direction_is_not_flipped():
    directed = re.compile(
        r"\b(left|right|leftwards|rightwards|clockwise|o’clock|arrow|keycap|button|Japanese|\w*moon)\b"
    )
    flips = [record["flip"] for record in RECORDS]
    assert not any(flip for name, flip in zip(NAMES, flips, strict=True) if directed.search(name))
    assert 0.5 < np.mean(flips) < 0.9
    assert dict(zip(NAMES, flips, strict=True))["grinning cat"]


def test_sheets_are_pngs_of_few_colours():
    for artist in emoji.PICTURES:
        with zipfile.ZipFile(assets.DIRECTORY / f"{artist}.zip") as archive:
            image = Image.open(io.BytesIO(archive.read(archive.namelist()[0])))
            assert image.format == "PNG"
            assert image.mode == "P"


def test_a_sheet_of_few_colours_is_packed_without_loss():
    rng = np.random.default_rng(0)
    colours = np.concatenate([rng.integers(0, 256, (200, 3)), np.full((200, 1), 255)], axis=1).astype(np.uint8)
    pictures = colours[rng.integers(0, 200, (11, 32, 32))]
    sheet = np.asarray(Image.open(io.BytesIO(build_emoji.encode_sheet(pictures))).convert("RGBA"))
    np.testing.assert_array_equal(assets.split_tiles(sheet)[:11], pictures)


def test_packing_is_deterministic(tmp_path):
    pictures = assets.load_pictures("google")[:64]
    for name in ("a.zip", "b.zip"):
        build_emoji.write_pictures(tmp_path / name, pictures)
    assert (tmp_path / "a.zip").read_bytes() == (tmp_path / "b.zip").read_bytes()
    build_emoji.write_words(tmp_path / "words.json.gz", RECORDS)
    assert assets.load_records(tmp_path) == RECORDS

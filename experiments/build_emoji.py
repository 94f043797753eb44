"""Builds the packed pictograph set that ships inside gramjax (gramjax/data/emoji/assets).

    python -m experiments.build_emoji                 # fetches three npm packages with `npm pack`, writes the assets
    python -m experiments.build_emoji --downloads DIR  # keeps the fetched archives in DIR and reuses them
    python -m experiments.build_emoji --contact-sheet sheet.png

Sources: `emoji-datasource-twitter` (Twemoji art, CC BY 4.0), `emoji-datasource-google` (Noto Emoji art, Apache-2.0) and
`cldr-annotations-full` (Unicode CLDR names and keywords, Unicode licence). The art of other vendors is never read.

The same sources give the same bytes. The split is fixed: once a release has used it, it must not change, or published
figures no longer compare; `tests/data/test_assets.py` pins its hash.
"""

import argparse
import collections
import gzip
import hashlib
import io
import json
import re
import shutil
import subprocess
import tarfile
import tempfile
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from scipy.sparse.csgraph import connected_components
from scipy.spatial import KDTree

from gramjax.data import tokenizer
from gramjax.data.emoji import assets

PACKAGES = {
    "twitter": "emoji-datasource-twitter@16.0.0",
    "google": "emoji-datasource-google@16.0.0",
    "cldr": "cldr-annotations-full@48.2.0",
}
ARTISTS = ("twitter", "google")
LANGUAGES = {"english": "en", "spanish": "es", "chinese": "zh"}

# A family is kept on one side of the split. Larger ones all train: 24 clock faces would be 8% of the test set, and
# telling them apart is a different task from recognising a pictograph.
LARGEST_TESTED_FAMILY = 8
TESTED, VALIDATED = 320, 160
# Distances below which two drawings count as near-duplicates (see `picture_distances`): for either artist's drawings,
# and for the mean over both.
NEAR_DUPLICATE_ONCE, NEAR_DUPLICATE_BOTH = 0.34, 0.40

SKIN_TONES = {"1f3fb", "1f3fc", "1f3fd", "1f3fe", "1f3ff"}
JOINERS = {"fe0f", "200d", "2640", "2642"}
PEOPLE = {"1f468", "1f469", "1f9d1"}  # man, woman, person

# Words whose change alone makes a variant of the same thing.
# fmt: off
VARIANT_WORDS = frozenset([
    "man", "woman", "men", "women", "person", "people", "adult", "boy", "girl", "child", "children", "man’s",
    "woman’s", "men’s", "women’s", "male", "female", "face", "with", "and", "of", "the", "a", "in", "on",
    "oncoming", "front-facing", "black", "white", "red", "green", "blue", "yellow", "orange", "purple", "brown",
    "pink", "grey", "light", "large", "medium", "small", "medium-small", "left", "right", "up", "down", "leftwards",
    "rightwards", "upwards", "downwards", "open", "closed", "old", "older", "sign", "symbol", "button", "low",
    "high", "double", "single",
])
# fmt: on
# Whole subcategories whose members are variations on one drawing.
# fmt: off
FAMILY_SUBCATEGORIES = frozenset([
    "cat-face", "monkey-face", "heart", "arrow", "keycap", "alphanum", "geometric", "av-symbol", "zodiac", "math",
    "punctuation", "gender", "religion", "family", "person",
])
# fmt: on
# (families by name): every pictograph whose English name matches one expression belongs to one family.
# fmt: off
FAMILY_NAMES = (
    r"o’clock|-thirty", r"^(full|new) moon|moon$|moon face|crescent moon", r"\bsuit$|\bhearts?$",
    r"backhand index|index pointing", r"thumbs (up|down)", r"\bfist\b",
    r"(left|right)wards.* hand|palm (up|down) hand|raised back of hand|raised hand|hand with fingers splayed",
    r"^OK hand|pinch", r"^prince|person with crown", r"Claus", r"mermaid|merman|merperson", r"pregnant",
    r"feeding|breast-feeding", r"in tuxedo", r"dancing", r"holding hands|couple|^kiss$|hugging", r"bust in|busts in",
    r"mailbox", r"globe", r"hourglass", r"speaker (low|medium|high)|muted speaker", r"^bell$|^bell with", r"locked",
    r"\bnest\b", r"medal$", r"^(green|blue|orange|closed|open) book|^books|notebook|ledger", r"banknote",
    r"mountain$|mount fuji|volcano", r"sunrise|sunset|cityscape|night",
    r"^train|metro|light rail|station|tram|high-speed train|bullet train|railway car|mountain railway",
    r"cloud|umbrella", r"^chart|bar chart", r"tray", r"calendar|spiral notepad", r"envelope|e-mail|love letter",
    r"mobile phone|vibration mode", r"snowman", r"\bchick\b|^chicken$|rooster",
    r"check mark|check box|cross mark|multiply", r"^no |prohibited|potable|litter", r"’s room$|restroom|water closet",
    r"pointed star|star of David|^star$|glowing star", r"speech|anger bubble|thought balloon", r"camel",
    r"magnifying glass", r"musical note|musical score", r"beer mug|clinking", r"^eyes?$",
    r"^houses?|house$|house with garden", r"post office", r"traffic light", r"airplane", r"tickets?$",
    r"sunglasses|^glasses|goggles", r"disk|dvd", r"whale", r"(?<!jelly)fish$", r"^page|^scroll",
    r"file folder|card index", r"paperclips?$", r"ruler", r"pencil|^pen$|fountain pen|black nib|paintbrush|crayon",
    r"hammer|^pick$|wrench", r"^link$|\bchains?$|linked", r"hotel", r"(video|movie) camera|^camera",
    r"shoes?$|boot$|sandal$", r"\bdog\b(?<!hot dog)", r"police car", r"wheelchair", r"pushpin", r"cross$",
    r"bicycle|biking", r"customs|passport control|baggage claim|left luggage", r"fearful|anxious|crying|tears",
    r"circle|radio button", r"\bhorns$", r"^ear\b", r"battery", r"droplet|drop of blood",
    r"leaf (?!green)|\bleaf$|clover|shamrock|^herb$", r"(?<!bow and )(?<!heart with )arrow$", r"sun with face|^sun$",
    r"newspaper", r"fork and knife", r"microphone", r"passenger ship|^ship$|ferry", r"^film", r"beetle",
    r"^horse|carousel horse", r"football", r"(?<!teddy )\bbear$", r"exclamation", r"purse|handbag|clutch bag",
    r"swimsuit|briefs|bikini", r"^oncoming ", r"ice cream|shaved ice", r"^smiling face", r"^mechanical",
    r"^head shaking", r"gesturing", r"mountain cableway|aerial tramway|suspension railway",
)
# fmt: on

# A mirrored drawing must keep its meaning: never flipped is what shows letters, digits, the hands of a clock, a phase
# of the moon, a hand, or a direction that its name tells.
# fmt: off
DIRECTED_SUBCATEGORIES = frozenset([
    "arrow", "keycap", "alphanum", "math", "punctuation", "currency", "av-symbol", "zodiac", "religion", "time",
    "transport-sign", "warning", "gender", "other-symbol", "place-map", "money", "mail", "writing", "computer",
    "book-paper", "music",
])
# fmt: on
DIRECTED_NAMES = re.compile(
    r"\b(left|right|leftwards|rightwards|\w*clockwise|o’clock|thirty|clock|watch|stopwatch|timer|compass|moon|moai|"
    r"hundred|ZZZ|chart|calendar|medal|Japan|Japanese|sign|button|letter|hotel|hospital|bank|convenience|school|"
    r"post office|department|ATM|8 ball|slot|card|joker|mahjong|newspaper|label|dollar|euro|yen|pound|globe|map|stop|"
    r"police|ambulance|taxi|fire engine|bus|minibus|trolleybus|tram|question|exclamation|musical|speech|anger bubble|"
    r"thought|elevator|passport|scroll|memo|curving|airplane (departure|arrival)|dna|television|mirror ball|horizontal|"
    r"arrow|keyboard|dvd|disk|identification|receipt|ledger|red envelope|bowling|speaker|loudspeaker|megaphone|fist|"
    r"thumb|raised|hand|fan|radio|game die|kaaba|Tokyo|baseball|placard|battery|pager|fax|telephone|saluting|vulcan|"
    r"love-you|video game|lacrosse|film|clapper|videocassette|x-ray|barber|ticket|symbol)s?\b"
)


def fetch(downloads: Path) -> dict[str, Path]:
    """Returns the paths of the three packed npm archives, fetching those that `downloads` lacks."""
    npm = shutil.which("npm")
    paths = {}
    for key, package in PACKAGES.items():
        path = downloads / (package.replace("@", "-") + ".tgz")
        if not path.exists():
            if npm is None:
                raise SystemExit(f"{path.name} is not in {downloads} and npm, which fetches it, is not installed")
            subprocess.run([npm, "pack", package], cwd=downloads, check=True, stdout=subprocess.DEVNULL)
        paths[key] = path
    return paths


def read_member(archive: Path, member: str) -> bytes:
    with tarfile.open(archive) as tar:
        file = tar.extractfile(f"package/{member}")
        if file is None:
            raise ValueError(f"{archive.name} has no file {member}")
        return file.read()


def read_words(archive: Path) -> dict[str, dict[str, dict]]:
    """{language: {characters: {"name": str, "keywords": [str]}}} of the CLDR annotations."""
    words = {}
    for language, code in LANGUAGES.items():
        raw = json.loads(read_member(archive, f"annotations/{code}/annotations.json"))
        words[language] = {
            characters: {
                "name": entry["tts"][0],
                # The name is often listed among its own keywords.
                "keywords": [word for word in entry["default"] if word.lower() != entry["tts"][0].lower()],
            }
            for characters, entry in raw["annotations"]["annotations"].items()
            if entry.get("tts") and entry.get("default")
        }
    return words


def read_rows(paths: Mapping[str, Path]) -> list[dict]:
    """Every pictograph that is kept, in Unicode's order, with its words and its cell in the sprite sheets.

    Dropped: the categories Component (skin tones, not pictographs) and Flags (270 near-identical rectangles named
    after countries), and the 64 that CLDR's annotations do not name in all three languages (mostly people who face
    right, families and hair colours, whose names CLDR derives from their parts).
    """
    words = read_words(paths["cldr"])
    rows = []
    for entry in sorted(json.loads(read_member(paths["twitter"], "emoji.json")), key=lambda entry: entry["sort_order"]):
        if entry["category"] not in assets.CATEGORIES:
            continue
        characters = "".join(chr(int(code, 16)) for code in entry["unified"].split("-"))
        named = {
            language: table.get(characters) or table.get(characters.replace("\ufe0f", ""))
            for language, table in words.items()
        }
        if not all(named.values()):
            continue
        rows.append(
            {
                "id": entry["unified"].lower(),
                "label": assets.CATEGORIES.index(entry["category"]),
                "subcategory": entry["subcategory"],
                **named,
                "cell": (entry["sheet_y"], entry["sheet_x"]),
            }
        )
    return rows


def read_pictures(archive: Path, artist: str, rows: Sequence[Mapping]) -> np.ndarray:
    """uint8 [pictograph, 32, 32, 4], red green blue alpha, cut from the sheet of 34-pixel cells with a border of 1."""
    sheet = Image.open(io.BytesIO(read_member(archive, f"img/{artist}/sheets-clean/32.png"))).convert("RGBA")
    pixels = np.asarray(sheet)
    size, cell = assets.PICTURE_SIZE, assets.PICTURE_SIZE + 2
    corners = [(row * cell + 1, column * cell + 1) for row, column in (row["cell"] for row in rows)]
    pictures = np.stack([pixels[y : y + size, x : x + size] for y, x in corners])
    return np.where(pictures[..., 3:] > 0, pictures, 0).astype(np.uint8)


# Near-duplicates and the split.


def picture_distances(pictures: np.ndarray) -> np.ndarray:
    """[n, n]: root of squared difference over mean squared ink, on white, the smaller of as drawn and mirrored.

    0 for equal drawings, about 1.4 for drawings that share no ink.
    """
    ink = (255.0 - assets.on_white(pictures)) / 255.0
    flat, mirrored = ink.reshape(len(ink), -1), ink[:, :, ::-1].reshape(len(ink), -1)
    energy = np.sum(flat**2, axis=1)
    scale = (energy[:, None] + energy[None]) / 2

    def distance(other: np.ndarray) -> np.ndarray:
        squared = energy[:, None] + energy[None] - 2 * flat @ other.T
        return np.sqrt(np.maximum(squared, 0) / scale)

    result = np.minimum(distance(flat), distance(mirrored))
    return np.minimum(result, result.T)


def name_key(name: str) -> str:
    """What remains of an English name without the words that only make a variant."""
    words = re.sub(r"[:,“”()!]", " ", name.lower()).split()
    return " ".join(sorted(set(words) - VARIANT_WORDS))


def code_point_key(identifier: str) -> str:
    """The code points without skin tone, gender and joiners; man, woman and person are one."""
    codes = [code for code in identifier.split("-") if code not in SKIN_TONES | JOINERS]
    return "-".join("person" if code in PEOPLE else code for code in codes)


def families(rows: Sequence[Mapping], pictures: Mapping[str, np.ndarray]) -> np.ndarray:
    """[n] int: the family each pictograph belongs to; near-duplicates by code points, names or drawings share one."""
    n = len(rows)
    adjacency = np.zeros((n, n), bool)

    def link(keys: Iterable[str | None]) -> None:
        members = collections.defaultdict(list)
        for index, key in enumerate(keys):
            if key:
                members[key].append(index)
        for indices in members.values():
            adjacency[indices[0], indices] = True

    names = [row["english"]["name"] for row in rows]
    link(code_point_key(row["id"]) for row in rows)
    link(name_key(name) for name in names)
    link(row["subcategory"] if row["subcategory"] in FAMILY_SUBCATEGORIES else None for row in rows)
    for pattern in FAMILY_NAMES:
        expression = re.compile(pattern)
        link("member" if expression.search(name) else None for name in names)
    distances = np.stack([picture_distances(art) for art in pictures.values()])
    adjacency |= (distances.min(axis=0) < NEAR_DUPLICATE_ONCE) | (distances.mean(axis=0) < NEAR_DUPLICATE_BOTH)
    return connected_components(adjacency, directed=False)[1]


def split_of(rows: Sequence[Mapping], family: np.ndarray) -> list[str]:
    """Whole families to test, then validation, in an order fixed by a hash, each category in proportion."""
    members = collections.defaultdict(list)
    for index, key in enumerate(family):
        members[key].append(index)
    small = [indices for indices in members.values() if len(indices) <= LARGEST_TESTED_FAMILY]
    eligible = collections.Counter()
    for indices in small:
        eligible[rows[indices[0]]["label"]] += len(indices)
    total = sum(eligible.values())
    splits = ["train"] * len(rows)
    taken = {"test": collections.Counter(), "validation": collections.Counter()}
    for indices in sorted(small, key=lambda ix: hashlib.sha256(f"gramjax/{rows[ix[0]]['id']}".encode()).digest()):
        label = rows[indices[0]]["label"]
        for name, wanted in (("test", TESTED), ("validation", VALIDATED)):
            if taken[name][label] < round(wanted * eligible[label] / total):
                taken[name][label] += len(indices)
                for index in indices:
                    splits[index] = name
                break
    return splits


def may_flip(row: Mapping) -> bool:
    """Whether the mirrored drawing still means what the name says."""
    return row["subcategory"] not in DIRECTED_SUBCATEGORIES and not DIRECTED_NAMES.search(row["english"]["name"])


# Packing.


def palette(colours: np.ndarray, counts: np.ndarray, size: int, rounds: int = 8) -> np.ndarray:
    """[size, 4] premultiplied colours by variance-based median cut, then Lloyd's k-means; deterministic."""
    colours, counts = colours.astype(np.float64), counts.astype(np.float64)
    if len(colours) <= size:
        return np.concatenate([colours, np.zeros((size - len(colours), 4))])

    def spread(box: np.ndarray) -> np.ndarray:
        mean = np.average(colours[box], axis=0, weights=counts[box])
        return np.sum((colours[box] - mean) ** 2 * counts[box, None], axis=0)

    boxes = [np.arange(len(colours))]
    spreads = [spread(boxes[0])]
    while len(boxes) < size:
        widest = int(np.argmax([s.sum() for s in spreads]))
        box, axis = boxes.pop(widest), int(np.argmax(spreads.pop(widest)))
        mean = np.average(colours[box, axis], weights=counts[box])
        low = colours[box, axis] <= mean
        for half in (box[low], box[~low]):
            boxes.append(half)
            spreads.append(spread(half))
    centres = np.stack([np.average(colours[box], axis=0, weights=counts[box]) for box in boxes])
    for _ in range(rounds):
        nearest = KDTree(centres).query(colours)[1]
        mass = np.bincount(nearest, counts, minlength=size)
        sums = np.stack([np.bincount(nearest, counts * channel, minlength=size) for channel in colours.T], axis=1)
        centres = np.where(mass[:, None] > 0, sums / np.maximum(mass[:, None], 1), centres)
    return np.round(centres)


def encode_sheet(pictures: np.ndarray) -> bytes:
    """One PNG of up to `assets.PER_SHEET` pictures side by side, 256 colours with alpha, chosen for these pictures."""
    alpha = pictures[..., 3:]
    premultiplied = np.concatenate([np.round(pictures[..., :3] * (alpha / 255.0)).astype(np.uint8), alpha], axis=-1)
    colours, inverse, counts = np.unique(premultiplied.reshape(-1, 4), axis=0, return_inverse=True, return_counts=True)
    centres = palette(colours, counts, 256)
    centres = centres[np.lexsort((centres[:, 2], centres[:, 0], centres[:, 1], centres[:, 3]))]
    nearest = np.asarray(KDTree(centres).query(colours.astype(np.float64))[1])
    indices = nearest[inverse.ravel()].astype(np.uint8)
    sheet = assets.join_tiles(indices.reshape(len(pictures), assets.PICTURE_SIZE, assets.PICTURE_SIZE, 1))[..., 0]
    straight = np.clip(np.round(centres[:, :3] * 255 / np.maximum(centres[:, 3:], 1)), 0, 255).astype(np.uint8)
    image = Image.frombytes("P", sheet.shape[::-1], sheet.tobytes())
    image.putpalette(straight.tobytes())
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True, transparency=centres[:, 3].astype(np.uint8).tobytes())
    return buffer.getvalue()


def write_pictures(path: Path, pictures: np.ndarray) -> None:
    """A stored (not deflated) zip of PNG sheets, with the earliest date zip knows, so that the bytes never vary."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for number, start in enumerate(range(0, len(pictures), assets.PER_SHEET)):
            entry = zipfile.ZipInfo(f"{number:03d}.png", date_time=(1980, 1, 1, 0, 0, 0))
            archive.writestr(entry, encode_sheet(pictures[start : start + assets.PER_SHEET]))


def write_words(path: Path, rows: Sequence[Mapping]) -> None:
    document = json.dumps(rows, ensure_ascii=False, separators=(",", ":"), sort_keys=True).encode()
    path.write_bytes(gzip.compress(document, compresslevel=9, mtime=0))


ATTRIBUTION = """# Where the pictures and words in this folder come from

Built by `experiments/build_emoji.py` of gramjax from three npm packages. Nothing here is endorsed by those named below.

## twitter.zip: Twemoji

Drawings from Twemoji, Copyright (c) Twitter, Inc and other contributors, https://github.com/twitter/twemoji (maintained
at https://github.com/jdecked/twemoji), licensed under the Creative Commons Attribution 4.0 International licence
(CC BY 4.0), https://creativecommons.org/licenses/by/4.0/. Taken from `{twitter}`.

Changes: {count} of the drawings were selected, at 32 x 32 pixels, and reduced to 256 colours for every {per_sheet} of
them.

## google.zip: Noto Emoji

Drawings from Noto Emoji, Copyright (c) Google LLC, https://github.com/googlefonts/noto-emoji, licensed under the Apache
License, Version 2.0, https://www.apache.org/licenses/LICENSE-2.0 (the text is gramjax's own LICENSE too). Taken from
`{google}`.

Changes: as above.

## words.json.gz: Unicode CLDR

English, Spanish and Chinese names and keywords from the Unicode Common Locale Data Repository, Copyright (c) 2004-2026
Unicode, Inc., taken from `{cldr}`, under the licence below. Changes: selected; keywords equal to the name
left out. `tokenizer.json` was trained on these words.

Categories, order and positions are those of emoji-data, Copyright (c) 2013 Cal Henderson, under the MIT licence below;
`split`, `family` and `flip` were added by gramjax.

### Unicode licence

```
{unicode_licence}
```

### MIT licence (emoji-data)

```
{mit_licence}
```
"""


def write_attribution(path: Path, paths: Mapping[str, Path], count: int) -> None:
    text = ATTRIBUTION.format(
        **PACKAGES,
        count=count,
        per_sheet=assets.PER_SHEET,
        unicode_licence=read_member(paths["cldr"], "LICENSE").decode().strip(),
        mit_licence=read_member(paths["twitter"], "LICENSE").decode().strip(),
    )
    path.write_text(text, encoding="utf-8")


def contact_sheet(pictures: Sequence[np.ndarray], path: Path, columns: int = 48) -> None:
    """Both artists' drawings on white, one under the other, for a look with one's own eyes."""
    rows = []
    for start in range(0, len(pictures[0]), columns):
        for art in pictures:
            strip = assets.on_white(art[start : start + columns]).round().astype(np.uint8)
            strip = np.concatenate([strip, np.full((columns - len(strip), *strip.shape[1:]), 255, np.uint8)])
            rows.append(np.concatenate(list(strip), axis=1))
    Image.fromarray(np.concatenate(rows)).save(path)


def build(paths: Mapping[str, Path], output: Path) -> None:
    rows = read_rows(paths)
    pictures = {artist: read_pictures(paths[artist], artist, rows) for artist in ARTISTS}
    family = families(rows, pictures)
    records = [
        {key: value for key, value in row.items() if key != "cell"}
        | {"family": rows[int(np.flatnonzero(family == family[index])[0])]["id"], "split": split, "flip": may_flip(row)}
        for index, (row, split) in enumerate(zip(rows, split_of(rows, family), strict=True))
    ]
    output.mkdir(parents=True, exist_ok=True)
    for artist, art in pictures.items():
        write_pictures(output / f"{artist}.zip", art)
    write_words(output / "words.json.gz", records)
    write_attribution(output / "ATTRIBUTION.md", paths, len(records))
    tokenizer.train_tokenizer(records).save(str(output / "tokenizer.json"), pretty=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=assets.DIRECTORY)
    parser.add_argument("--downloads", type=Path, help="folder that keeps the npm archives (default: a temporary one)")
    parser.add_argument("--contact-sheet", type=Path, help="also draw every packed picture to this PNG")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        downloads = arguments.downloads or Path(temporary)
        downloads.mkdir(parents=True, exist_ok=True)
        build(fetch(downloads), arguments.output)
    packed = assets.load_records(arguments.output)
    art = [assets.load_pictures(artist, arguments.output) for artist in ARTISTS]
    if arguments.contact_sheet:
        contact_sheet(art, arguments.contact_sheet)
    size = sum(path.stat().st_size for path in arguments.output.iterdir())
    print(f"{len(packed)} pictographs, {size / 1e6:.2f} MB in {arguments.output}")
    for split in assets.SPLITS:
        labels = collections.Counter(row["label"] for row in packed if row["split"] == split)
        print(f"{split}: {sum(labels.values())}", {assets.CATEGORIES[label]: labels[label] for label in sorted(labels)})


if __name__ == "__main__":
    main()

"""Every picture is written, has the size it promises and shows something."""

import warnings

import numpy as np
import pytest
from PIL import Image

from experiments import figures

RNG = np.random.default_rng(0)


def read(path):
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"), np.float32) / 255


def has_colour(picture, colour, tolerance=0.02):
    wanted = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) / 255
    return (np.abs(picture - wanted).max(axis=-1) < tolerance).sum()


def found(colour, right=False):
    return figures.Found(np.broadcast_to(np.array(colour), (8, 8, 3)), "a name longer than fits below it", right)


def test_scaling_draws_every_line(tmp_path):
    lines = {"ours": ([1.0, 2.0, 4.0], [1.0, 2.0, 4.0]), "theirs": ([1.0, 2.0], [3.0, 12.0])}
    path = figures.scaling(
        {("time", "batch", "seconds"): lines, ("memory", "batch", "bytes"): lines}, tmp_path / "s.png"
    )
    picture = read(path)
    assert has_colour(picture, figures.PALETTE[0]) > 100
    assert has_colour(picture, figures.PALETTE[1]) > 100


def gallery_row(query, rank=1):
    results = [found((1.0, 0.0, 0.0)), found((0.0, 1.0, 0.0), right=rank == 2)]
    return figures.GalleryRow(query, "speak no evil monkey", results, found((0.0, 0.0, 1.0)), rank)


@pytest.mark.parametrize(
    "query",
    ["grinning face: face, grin", np.sin(np.linspace(0, 500, 4000)), np.full((8, 8, 3), 0.5)],
    ids=["text", "speech", "picture"],
)
def test_gallery_shows_queries_results_and_answers(tmp_path, query):
    sections = {"a → b": [gallery_row(query, rank=2), gallery_row(query, rank=11)]}
    path = figures.retrieval_gallery(sections, tmp_path / "new" / "gallery.png", title="title", caption="caption")
    picture = read(path)
    for colour in ("#ff0000", "#00ff00", "#0000ff"):
        assert has_colour(picture, colour) > 2 * 50 * 50, "one square in each of two rows"
    framed = has_colour(picture, figures.RIGHT)
    unframed = figures.retrieval_gallery(
        {"a → b": [gallery_row(query, rank=11)] * 2}, tmp_path / "unframed.png", title="title", caption="caption"
    )
    assert framed > has_colour(read(unframed), figures.RIGHT) + 300


def test_gallery_grows_with_its_rows(tmp_path):
    heights = []
    for count in (1, 4):
        sections = {"a → b": [gallery_row("query")] * count}
        heights.append(len(read(figures.retrieval_gallery(sections, tmp_path / "g.png", title="", caption=""))))
    assert heights[1] > heights[0] + 3 * 90


def test_a_long_caption_stays_inside_the_gallery(tmp_path):
    caption = "Queries are evenly spaced through the test split, not picked by hand. " * 2
    sections = {"a → b": [gallery_row("query")]}
    long, none = (
        read(figures.retrieval_gallery(sections, tmp_path / "g.png", title="", caption=text)) for text in (caption, "")
    )
    assert (long[:, 10:-10] != none[:, 10:-10]).any(), "it is there"
    np.testing.assert_array_equal(long[:, -10:], none[:, -10:])
    np.testing.assert_array_equal(long[-3:], none[-3:])


def test_names_in_the_gallery_keep_clear_of_their_neighbours(tmp_path):
    row = figures.GalleryRow(
        "query", "name", [found((1.0, 0.0, 0.0)), found((0.0, 1.0, 0.0))], found((0.0, 0.0, 1.0)), 3
    )
    picture = read(figures.retrieval_gallery({"a": [row]}, tmp_path / "g.png", title="", caption=""))
    red, green = (
        np.flatnonzero((np.abs(picture - colour).max(axis=-1) < 0.02).any(axis=0)).mean() for colour in np.eye(3)[:2]
    )
    below = np.flatnonzero((np.abs(picture - (1.0, 0.0, 0.0)).max(axis=-1) < 0.02).any(axis=1)).max() + 5
    columns = slice(round((red + green) / 2 - 5), round((red + green) / 2 + 5))
    assert (picture[below:, : round(red)] < 0.9).any(), "there are names"
    assert (picture[below:, columns] > 0.98).all()


def test_training_curves_have_a_panel_for_each_group(tmp_path):
    records = [{"step": step, "train/loss": 1 / (step + 1), "train/gram": 0.5, "rate": step} for step in range(100)]
    records += [{"step": step, "validation/recall@1": step / 100} for step in range(0, 100, 20)]
    picture = read(figures.training_curves(records, tmp_path / "curves.png"))
    assert picture.shape[1] == 8.0 * figures.DPI
    assert has_colour(picture, figures.PALETTE[0], 0.1) > 300
    assert has_colour(picture, figures.PALETTE[1], 0.1) > 100


def test_curves_that_coincide_are_drawn_once(tmp_path):
    once = [{"step": step, "loss": 2.0 - step} for step in range(3)]
    twice = [record | {"loss/gram": record["loss"]} for record in once]
    other = [record | {"loss/gram": record["loss"] / 2} for record in once]
    drawn = [read(figures.training_curves(records, tmp_path / "curves.png")) for records in (twice, other)]
    assert has_colour(drawn[0], figures.PALETTE[1], 0.1) == 0
    assert has_colour(drawn[1], figures.PALETTE[1], 0.1) > 100


def test_training_curves_of_nothing_are_refused(tmp_path):
    with pytest.raises(ValueError, match="two steps"):
        figures.training_curves([{"step": 1, "loss": 2.0}], tmp_path / "curves.png")


def test_embedding_map_shows_every_category(tmp_path):
    labels = np.arange(80) % 8
    embeddings = {name: RNG.normal(size=(80, 16)) + 4 * np.eye(16)[labels] for name in ("english", "twitter", "speech")}
    categories = [f"category {number}" for number in range(8)]
    picture = read(figures.embedding_map(embeddings, labels, categories, tmp_path / "map.png"))
    assert picture.shape == (5.6 * figures.DPI, 8.0 * figures.DPI, 3)
    for colour in figures.PALETTE:
        assert has_colour(picture, colour) > 40


def test_recall_heatmap_leaves_the_diagonal_empty(tmp_path):
    recall = np.array([[np.nan, 0.5], [0.25, np.nan]])
    picture = read(figures.recall_heatmap(recall, ["english", "twitter"], tmp_path / "recall.png", title="recall@1"))
    assert has_colour(picture, "#f2f2f2", 0.001) > 2 * 60 * 60
    assert has_colour(picture, "#fee838", 0.03) > 60 * 60, "the highest recall has the brightest colour"


def test_recall_of_zero_everywhere_is_drawn(tmp_path):
    recall = np.where(np.eye(3, dtype=bool), np.nan, 0.0)
    assert read(figures.recall_heatmap(recall, ["a", "b", "c"], tmp_path / "recall.png", title="")).std() > 0.05


def test_undrawable_text_falls_back():
    assert figures.drawable("grinning face →", "other") == "grinning face →"
    assert figures.drawable("\U000f1234", "other") == "other"


def test_any_text_is_drawn_without_warnings(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        text = figures.drawable("咧嘴笑的脸", "grinning face")
        figures.retrieval_gallery({"a": [gallery_row(text)]}, tmp_path / "g.png", title="", caption="")

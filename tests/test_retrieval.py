"""The index against float64 brute force, by how many modalities the items have."""

import dataclasses
import io
import json
import re
import zipfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from gramjax import metrics, retrieval, scores
from tests import reference

ITEMS = 60
SCORES = {
    "volume": (scores.Volume(), lambda query, item: reference.volume([query, *item])),
    "residual": (scores.Residual(), lambda query, item: reference.volume([query, *item]) / reference.volume(item)),
    "cosine": (scores.Cosine(), lambda query, item: np.mean([query @ x for x in item])),
    "direction": (scores.LeadingDirection(), lambda query, item: query @ reference.leading_direction(item)),
    "multilinear": (scores.Multilinear(), lambda query, item: query @ np.prod(item, axis=0)),
}


def _gallery(noise=0.4, m=3, d=24, seed=0):
    """Texts and their items; item `i` has `i % (m + 1)` of the `m` data modalities, which are NaN where absent."""
    rng = np.random.default_rng(seed)
    centre = reference.unit(rng, ITEMS, 1, d)
    z = centre + noise * reference.unit(rng, ITEMS, m + 1, d)
    z = z / np.linalg.norm(z, axis=-1, keepdims=True)
    arity = np.arange(ITEMS) % (m + 1)
    where = np.argsort(rng.random((ITEMS, m)), axis=1) < arity[:, None]
    texts, gallery = z[:, 0].astype(np.float32), z[:, 1:].astype(np.float32)
    return texts, np.where(where[..., None], gallery, np.nan).astype(np.float32), where, arity


@pytest.mark.parametrize("name", SCORES)
def test_search_by_arity_against_brute_force(name):
    """Every item of every arity that is found has its float64 score, and the order is that of the float64 scores."""
    score, plain = SCORES[name]
    texts, gallery, where, arity = _gallery()
    index = retrieval.build_index(jnp.asarray(gallery), jnp.asarray(where), score)
    assert len(index) == ITEMS
    best, found = (np.asarray(x) for x in retrieval.search(index, jnp.asarray(texts[:20]), ITEMS, block_size=7))
    truth = np.full((20, ITEMS), np.nan)
    for i, j in np.ndindex(truth.shape):
        if arity[j]:
            truth[i, j] = plain(texts[i].astype(np.float64), gallery[j, where[j]].astype(np.float64))
    there = np.count_nonzero(arity)
    assert np.all(found[:, there:] == -1)
    assert np.all(best[:, there:] == (-np.inf if score.higher_is_better else np.inf))
    for count in (1, 2, 3):
        assert all(set(np.flatnonzero(arity == count)) <= set(row) for row in found)
        rows, places = np.nonzero((found >= 0) & (arity[found] == count))
        np.testing.assert_allclose(best[rows, places], truth[rows, found[rows, places]], atol=1e-5)
    in_order = np.take_along_axis(truth, found[:, :there], axis=1)
    steps = np.diff(in_order, axis=1)
    assert np.all((steps <= 1e-5) if score.higher_is_better else (steps >= -1e-5))


def test_recall_by_arity():
    """What the documentation warns of: items of few modalities are found by residual and by cosine, not by volume."""
    texts, gallery, where, arity = _gallery(noise=0.3)
    recall = {}
    for name in ("volume", "residual", "cosine"):
        index = retrieval.build_index(jnp.asarray(gallery), jnp.asarray(where), SCORES[name][0])
        ranks = np.asarray(retrieval.ranks(index, jnp.asarray(texts), block_size=16))
        _, found = retrieval.search(index, jnp.asarray(texts), 1)
        for count in (1, 2, 3):
            chosen = np.flatnonzero(arity == count)
            recall[name, count] = float(metrics.recall_at_k(jnp.asarray(ranks[chosen]), 1))
            assert recall[name, count] == np.mean(np.asarray(found)[chosen, 0] == chosen)
    assert recall["volume", 1] < 0.1
    assert recall["volume", 3] == 1
    for count in (1, 2, 3):
        assert recall["residual", count] == 1
        assert recall["cosine", count] == 1


@pytest.mark.parametrize("p", [1, 2])
def test_queries_of_several_modalities(p):
    """With only its text present, a query of several modalities finds what the text finds."""
    texts, gallery, where, _ = _gallery()
    index = retrieval.build_index(jnp.asarray(gallery), jnp.asarray(where))
    alone = retrieval.search(index, jnp.asarray(texts), 5)
    sets = np.full((ITEMS, p, 24), np.nan, np.float32)
    sets[:, 0] = texts
    present = np.zeros((ITEMS, p), bool)
    present[:, 0] = True
    best, found = retrieval.search(index, jnp.asarray(sets), 5, where=jnp.asarray(present))
    np.testing.assert_array_equal(found, alone[1])
    np.testing.assert_allclose(best, alone[0], atol=1e-5)
    ranks = retrieval.ranks(index, jnp.asarray(sets), where=jnp.asarray(present))
    np.testing.assert_array_equal(ranks, retrieval.ranks(index, jnp.asarray(texts)))


def test_divided_over_a_mesh():
    texts, gallery, where, _ = _gallery()
    index = retrieval.build_index(jnp.asarray(gallery), jnp.asarray(where), scores.Residual())
    best, found = retrieval.search(index, jnp.asarray(texts), 9)
    ranks = retrieval.ranks(index, jnp.asarray(texts))
    for devices, kind in ((4, AxisType.Explicit), (8, AxisType.Auto)):
        mesh = jax.make_mesh((devices,), ("data",), axis_types=(kind,), devices=jax.devices()[:devices])
        # 60 items divide over 4 devices, not over 8.
        placed = jax.device_put(index, NamedSharding(mesh, PartitionSpec("data"))) if devices == 4 else index
        again, order = retrieval.search(placed, jnp.asarray(texts), 9, mesh=mesh)
        np.testing.assert_array_equal(order, found)
        np.testing.assert_allclose(again, best, atol=1e-6)
        np.testing.assert_array_equal(retrieval.ranks(placed, jnp.asarray(texts), mesh=mesh), ranks)


@pytest.mark.parametrize(
    "score",
    [
        scores.Volume(), scores.Cosine(precision=None), scores.LeadingDirection(), scores.Multilinear(),
        scores.Residual(precision=jax.lax.Precision.HIGH), scores.Triangle(square_root=False), scores.Cone(),
    ],
    ids=lambda s: type(s).__name__,
)  # fmt: skip
def test_saved_and_loaded(score, tmp_path):
    _, gallery, where, _ = _gallery(m=2)
    index = retrieval.build_index(jnp.asarray(gallery), jnp.asarray(where), score)
    retrieval.save_index(index, tmp_path / "index.npz")
    loaded = retrieval.load_index(tmp_path / "index.npz")
    assert jax.tree.structure(loaded) == jax.tree.structure(index)
    jax.tree.map(np.testing.assert_array_equal, loaded, index)
    assert [file.name for file in tmp_path.iterdir()] == ["index.npz"]
    assert loaded.score == score


@dataclasses.dataclass(frozen=True)
class Counted(scores.Cosine):
    """Prepares more than vectors, and not the vectors first."""

    def prepare(self, gallery, where):
        return jnp.sum(where, axis=1), super().prepare(gallery, where)

    def products(self, queries, prepared):
        return super().products(queries, prepared[1])

    def pairs(self, queries, prepared):
        return super().pairs(queries, prepared[1])


def test_only_an_index_is_saved(tmp_path, unchecked_signatures):
    with pytest.raises(TypeError, match="index must be one that build_index or load_index made, got NoneType"):
        retrieval.save_index(None, tmp_path / "index.npz")
    assert not list(tmp_path.iterdir())


def test_what_is_prepared_need_not_begin_with_vectors(tmp_path, monkeypatch):
    monkeypatch.setattr(scores, "Counted", Counted, raising=False)
    index = retrieval.build_index(jnp.eye(3)[:, None], score=Counted())
    retrieval.save_index(index, tmp_path / "index.npz")
    loaded = retrieval.load_index(tmp_path / "index.npz")
    assert index.dtype == loaded.dtype == jnp.float32
    jax.tree.map(np.testing.assert_array_equal, loaded, index)


@pytest.fixture
def saved(tmp_path):
    retrieval.save_index(retrieval.build_index(jnp.ones((4, 2, 3))), tmp_path / "index.npz")
    return tmp_path / "index.npz"


def _rewrite(path, change):
    with np.load(path) as file:
        arrays = dict(file)
    change(arrays)
    np.savez(path, **arrays)


def _with_header(**changes):
    def change(arrays):
        header = json.loads(str(arrays["header"])) | changes
        arrays["header"] = np.array(json.dumps(header))

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda arrays: arrays.pop("header"), "header"),
        (lambda arrays: arrays.pop("leaf0"), "leaf0"),
        (lambda arrays: arrays.pop("leaf3"), "arrays are not those of a gallery"),
        (lambda arrays: arrays.update(leaf0=arrays["leaf0"][:3]), "arrays are not those of a gallery"),
        (lambda arrays: arrays.update(leaf1=arrays["leaf1"].astype(np.float64)), "arrays are not those of a gallery"),
        (lambda arrays: arrays.update(header=np.array("{")), "damaged or not an index"),
        (_with_header(format="gramjax index 99"), "its format is 'gramjax index 99'"),
        (_with_header(score={"class": "Nothing", "precision": None}), "Nothing"),
        (_with_header(score={"class": "jax", "precision": None}), "damaged or not an index"),
        (_with_header(score="Volume"), "its score is Volume"),
        (_with_header(score={"class": "Volume"}), "its score is"),
        (_with_header(score={"class": "Volume", "precision": "LOW"}), "LOW"),
        (_with_header(dim=5), "arrays are not those of a gallery"),
        (_with_header(score={"class": None, "precision": None}), "its score is"),
        (_with_header(score={"class": "Volume", "precision": ["HIGHEST"]}), "precision of its score is"),
        (_with_header(dim=-5), "header or its arrays are not those of an index"),
        (_with_header(modalities=0), "header or its arrays are not those of an index"),
        (lambda arrays: arrays.update(leaf0=arrays["leaf0"].astype(int)), "arrays are not those of a gallery"),
        (
            lambda arrays: arrays.update({n: a.astype(int) for n, a in arrays.items() if n != "header"}),
            "header or its arrays are not those",
        ),
        (_with_header(dim="5"), "header or its arrays are not those of an index"),
        (lambda arrays: arrays.update(header=np.array("[1]")), "its header is no mapping"),
    ],
)
def test_foreign_and_broken_files_are_refused(saved, change, message):
    _rewrite(saved, change)
    with pytest.raises(ValueError, match=f"index.npz is damaged or not an index saved by gramjax.*{message}|{message}"):
        retrieval.load_index(saved)


def _encrypted(whole):
    """The flag of a password set in the list of contents at the end of the archive."""
    flags = whole.index(b"PK\x01\x02") + 8
    return whole[:flags] + bytes([whole[flags] | 1]) + whole[flags + 1 :]


def test_a_file_that_cannot_be_opened_is_not_called_damaged(saved, monkeypatch):
    def refuse(*_):
        raise PermissionError(13, "Permission denied", str(saved))

    monkeypatch.setattr(retrieval, "open", refuse, raising=False)
    with pytest.raises(PermissionError, match="Permission denied"):
        retrieval.load_index(saved)


def test_damaged_bytes_are_refused(saved):
    whole = saved.read_bytes()
    for broken in (
        whole[: len(whole) // 2],
        b"",
        b"not a zip file",
        b"\x80\x04N.",
        _flipped(whole),
        _compressed_strangely(whole),
        _encrypted(whole),
    ):
        saved.write_bytes(broken)
        with pytest.raises(ValueError, match=r"index\.npz is damaged or not an index saved by gramjax"):
            retrieval.load_index(saved)
    np.save(saved.with_suffix(".npy"), np.ones(3))
    with pytest.raises(ValueError, match="damaged or not an index"):
        retrieval.load_index(saved.with_suffix(".npy"))
    with pytest.raises(FileNotFoundError, match="path must be of a file that save_index wrote, got"):
        retrieval.load_index(saved.with_name("absent.npz"))


def _compressed_strangely(whole):
    """Headers that ask for compression method 99."""
    for signature, place in ((b"PK\x01\x02", 10), (b"PK\x03\x04", 8)):
        start = whole.index(signature) + place
        whole = whole[:start] + (99).to_bytes(2, "little") + whole[start + 2 :]
    return whole


def test_an_index_is_as_readable_as_any_new_file(saved):
    new = saved.with_name("new")
    new.touch()
    assert saved.stat().st_mode == new.stat().st_mode


def _flipped(whole):
    """One byte of the first basis vectors changed: only the checksum knows."""
    with zipfile.ZipFile(io.BytesIO(whole)) as file:
        data = file.read("leaf0.npy")
    place = whole.index(data) + len(data) - 1
    return whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :]


def test_a_failed_write_leaves_the_old_file(saved, monkeypatch):
    before = saved.read_bytes()
    monkeypatch.setattr(retrieval.os, "fsync", lambda _: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        retrieval.save_index(retrieval.build_index(jnp.ones((9, 2, 3))), saved)
    assert saved.read_bytes() == before
    assert [file.name for file in saved.parent.iterdir()] == ["index.npz"]


def test_only_what_can_be_read_again_is_saved(saved):
    before = saved.read_bytes()
    index = retrieval.load_index(saved)
    halved = jax.tree.map(lambda x: x.astype(jnp.bfloat16) if x.dtype == jnp.float32 else x, index)
    with pytest.raises(ValueError, match="index must be as build_index makes it, to be read again: its arrays"):
        retrieval.save_index(halved, saved)
    assert saved.read_bytes() == before


def test_double_precision_is_read_in_double_precision_alone(tmp_path):
    with jax.enable_x64(True):
        index = retrieval.build_index(jnp.eye(3)[:, None])
        retrieval.save_index(index, tmp_path / "index.npz")
        assert retrieval.load_index(tmp_path / "index.npz").dtype == jnp.float64
    with pytest.raises(ValueError, match=r"cannot be loaded: its vectors are float64, which needs jax_enable_x64"):
        retrieval.load_index(tmp_path / "index.npz")


def test_paths_that_are_no_place_for_an_index(saved, tmp_path):
    index = retrieval.load_index(saved)
    letter, archive, folder = tmp_path / "letter.txt", tmp_path / "arrays.npz", tmp_path / "folder"
    letter.write_text("dear")
    np.savez(archive, x=np.ones(3))
    folder.mkdir()
    for path in (letter, archive):
        before = path.read_bytes()
        with pytest.raises(ValueError, match=rf"a new file, or of an index to replace, got '{path}', which is someth"):
            retrieval.save_index(index, path)
        assert path.read_bytes() == before
    for path in ("", folder):
        with pytest.raises(ValueError, match=rf"path must be of a file, got '{path}'"):
            retrieval.save_index(index, path)
        with pytest.raises(ValueError, match=rf"path must be of a file that save_index wrote, got '{path}'"):
            retrieval.load_index(path)
    with pytest.raises(ValueError, match="path must lie in a folder that exists, got"):
        retrieval.save_index(index, tmp_path / "none" / "index.npz")
    retrieval.save_index(index, saved)  # an index may be replaced


@pytest.mark.usefixtures("unchecked_signatures")
def test_bad_input(tmp_path):
    index = retrieval.build_index(jnp.ones((4, 2, 3)))
    for shape in ((0, 2, 3), (4, 0, 3), (4, 2, 0)):
        with pytest.raises(
            ValueError, match=rf"gallery must hold at least one item.*, got shape {re.escape(str(shape))}"
        ):
            retrieval.build_index(jnp.ones(shape))
    for score, got in ((scores.Volume, "the class Volume"), ("volume", "str")):
        with pytest.raises(TypeError, match=rf"score must be a score object, such as .*, got {got}"):
            retrieval.build_index(jnp.ones((4, 2, 3)), score=score)
    with pytest.raises(TypeError, match="index must be one that build_index or load_index made, got ArrayImpl"):
        retrieval.search(jnp.ones((4, 2, 3)), jnp.ones((5, 3)), 1)
    with pytest.raises(TypeError, match="queries must be an array, got NoneType"):
        retrieval.search(index, None, 1)
    with pytest.raises(ValueError, match="query_ids must fit int32 unless jax_enable_x64 is on, got 4294967296"):
        retrieval.ranks(index, jnp.ones((2, 3)), query_ids=np.array([1, 2**32]))
    with pytest.raises(ValueError, match=r"where must have shape \[items, modality\] = \(4, 2\), got shape \(4,\)"):
        retrieval.build_index(jnp.ones((4, 2, 3)), jnp.ones(4, bool))
    with pytest.raises(ValueError, match=r"queries must have vectors of 3 entries .* got shape \(5, 4\)"):
        retrieval.search(index, jnp.ones((5, 4)), 1)
    with pytest.raises(ValueError, match="k must be from 1 to the number of items in the gallery, 4; got 5"):
        retrieval.search(index, jnp.ones((5, 3)), 5)
    with pytest.raises(TypeError, match="queries must have a floating-point dtype"):
        retrieval.ranks(index, jnp.ones((5, 3), jnp.int32))

    class Own(scores.Cosine):
        pass

    with pytest.raises(TypeError, match=r"score must be one of gramjax\.scores to be saved"):
        retrieval.save_index(retrieval.build_index(jnp.ones((4, 2, 3)), score=Own()), tmp_path / "own.npz")

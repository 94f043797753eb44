"""A gallery of items of several modalities, prepared once and searched by any score.

>>> import jax, tempfile
>>> from gramjax.scores import Volume
>>> x = jax.random.normal(jax.random.key(0), (100, 3, 16))
>>> x = x / jnp.linalg.norm(x, axis=-1, keepdims=True)
>>> index = build_index(x[:, 1:], score=Volume())  # the items' two data modalities
>>> scores, found = search(index, x[:5, 0], k=3)  # five texts: the three best items of each
>>> scores.shape, found.shape
((5, 3), (5, 3))
>>> with tempfile.TemporaryDirectory() as folder:
...     save_index(index, f"{folder}/gallery.npz")
...     bool(jnp.all(search(load_index(f"{folder}/gallery.npz"), x[:5, 0], k=3)[1] == found))
True

Searches are exact: every item is scored, tile by tile (`gramjax.streaming.streamed_top_k`). Read in `gramjax.scores`
what a score can compare before choosing one: by `Volume` items with fewer modalities, and items whose own modalities
lie apart, are found late or never; `Residual` and `Cosine` treat them more evenly.

Over several devices: place the index on a mesh, divided by items, and pass the mesh,

    index = jax.device_put(index, NamedSharding(mesh, PartitionSpec("data")))
    search(index, queries, k, mesh=mesh, axis_name="data")

or, inside `jax.shard_map`, pass `axis_name` alone and the device's part of the index. An index that does not divide
evenly over the devices is passed undivided; `search` fills it up.
"""

import dataclasses
import json
import os
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

import jax
import jax.numpy as jnp
import numpy as np
from jax import dtypes
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int

from gramjax import _checks, _devices, scores
from gramjax._score import Score, check_results, check_score
from gramjax.scores import Volume
from gramjax.streaming import search as streamed

_FORMAT = "gramjax index 1"


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Index:
    """A prepared gallery: a pytree whose arrays all have the items as leading axis. Made by `build_index`."""

    # Not declared as arrays: a pytree must also be able to hold shardings, specs or None in their places.
    prepared: Any
    usable: Any
    score: Score = dataclasses.field(metadata={"static": True})
    modalities: int = dataclasses.field(metadata={"static": True})
    dim: int = dataclasses.field(metadata={"static": True})

    def __len__(self) -> int:
        return self.usable.shape[0]

    @property
    def dtype(self) -> Any:
        """In which scores are computed."""
        return _dtype(jax.tree.leaves(self.prepared))


def build_index(
    gallery: Float[Array, "items modality dim"],
    where: Bool[Array, "items modality"] | None = None,
    score: Score = Volume(),  # noqa: B008 (a score is an immutable value)
) -> Index:
    """Prepares a gallery for searches: what the score needs to know of each item, computed once.

    Args:
      gallery: `[N, m, d]`, unit vectors.
      where: `[N, m]` bool, which modalities are present; default all. Absent ones are left out exactly. An item that
        the score cannot use (nothing of it is present) is never found.
      score: what is compared.

    Returns:
      An index of about the size of the gallery, in at least float32.

    Raises:
      TypeError: if a dtype is wrong.
      ValueError: if a shape does not fit or the gallery is empty.

    >>> len(build_index(jnp.ones((4, 2, 8))))
    4
    """
    gallery = _checks.floating("gallery", gallery, ("items", "modality", "dim"))
    if not all(gallery.shape):
        raise ValueError(
            f"gallery must hold at least one item of one modality, got shape {gallery.shape} ([items, modality, dim])."
        )
    check_score(score)
    check_results(score, (), (), gallery.shape, gallery.dtype)
    where = _checks.mask("where", where, gallery.shape[:2], "[items, modality]")
    prepared, usable = _prepare(score, jnp.where(where[..., None], gallery, 0.0), where)
    return Index(prepared, usable, score, *gallery.shape[1:])


def search(
    index: Index,
    queries: Float[Array, "queries dim"] | Float[Array, "queries query_modality dim"],
    k: int,
    *,
    where: Bool[Array, " queries"] | Bool[Array, "queries query_modality"] | None = None,
    block_size: int | None = None,
    axis_name: _devices.AxisName | None = None,
    mesh: Mesh | None = None,
) -> tuple[Float[Array, "queries k"], Int[Array, "queries k"]]:
    """The `k` best items for each query, best first, exactly.

    Args:
      index: from `build_index` or `load_index`.
      queries: `[Q, d]`, or `[Q, p, d]` for queries of several modalities (text and sound, looking for a video). By
        `Volume` their score is the volume of all modalities of query and item together, by `Residual` the volume of
        what the item leaves of the query, by `Cosine` and `LeadingDirection` the mean over the query's modalities.
      k: from 1 to the number of items.
      where: `[Q]` bool, or `[Q, p]` for queries of several modalities: which are present; default all.
      block_size: items of a tile; default from the platform. It changes time and memory, not the result.
      axis_name: mesh axis over which the index is divided.
      mesh: a mesh, to call this outside `shard_map`; `axis_name` may be left out if it has one axis.

    Returns:
      `(scores, indices)`, both `[Q, k]`, indices int32, as from `gramjax.streaming.streamed_top_k`: of equal scores
      the lower index first, and index -1 with the worst score where nothing is left to be found.

    Raises:
      TypeError: if a dtype is wrong, or the score does not take queries of several modalities.
      ValueError: if a shape does not fit, `k` or `block_size` is out of range, or `axis_name` is not an axis.

    >>> from gramjax.scores import Cosine
    >>> search(build_index(jnp.eye(3)[:, None], score=Cosine()), jnp.array([[0.0, 0.6, 0.8]]), k=2)[1]
    Array([[2, 1]], dtype=int32)
    """
    rows = _check_queries(index, queries, where)
    return streamed.top_k_of(
        index.score, rows, (index.prepared, index.usable), k, load=_as_it_is, block_size=block_size,
        axis_name=axis_name, mesh=mesh,
    )  # fmt: skip


def ranks(
    index: Index,
    queries: Float[Array, "queries dim"] | Float[Array, "queries query_modality dim"],
    *,
    query_ids: Int[Array, " queries"] | None = None,
    gallery_ids: Int[Array, " items"] | None = None,
    where: Bool[Array, " queries"] | Bool[Array, "queries query_modality"] | None = None,
    block_size: int | None = None,
    axis_name: _devices.AxisName | None = None,
    mesh: Mesh | None = None,
) -> Int[Array, " queries"]:
    """For each query, how many wrong items come before its best right item, for evaluation sets of any size.

    Args:
      index: from `build_index` or `load_index`.
      queries: `[Q, d]`, or `[Q, p, d]` for queries of several modalities.
      query_ids: `[Q]` integers; default `0 .. Q-1`.
      gallery_ids: `[N]` integers; an item is right for a query with the same id, and there may be several; default
        `0 .. N-1`.
      where: `[Q]` bool, or `[Q, p]` for queries of several modalities: which are present; default all.
      block_size: items of a tile; default from the platform.
      axis_name: mesh axis over which the index is divided.
      mesh: a mesh, to call this outside `shard_map`; `axis_name` may be left out if it has one axis.

    Returns:
      `[Q]` int32 as from `gramjax.streaming.streamed_ranks`, to be passed on to `gramjax.metrics.recall_at_k`.

    Raises:
      TypeError: if a dtype is wrong, or the score does not take queries of several modalities.
      ValueError: if a shape does not fit, `block_size` is out of range, or `axis_name` is not an axis.

    >>> from gramjax import metrics
    >>> index = build_index(jnp.eye(3)[:, None])
    >>> float(metrics.recall_at_k(ranks(index, jnp.eye(3)), 1))
    1.0
    """
    rows = _check_queries(index, queries, where)
    return streamed.ranks_of(
        index.score, rows, (index.prepared, index.usable), query_ids=query_ids, gallery_ids=gallery_ids,
        load=_as_it_is, block_size=block_size, axis_name=axis_name, mesh=mesh,
    )  # fmt: skip


def save_index(index: Index, path: str | os.PathLike) -> None:
    """Writes an index to a file (NumPy's .npz, without pickles), all of it or nothing.

    Args:
      index: its arrays must be on this process's devices, and its score one of `gramjax.scores`.
      path: of the file; an index that is there is replaced once the new one is complete.

    Raises:
      TypeError: if `index` is no index, or its score is not one of `gramjax.scores`: then save the gallery, and build
        the index again.
      ValueError: if `path` is a folder, lies in none, or is a file that is no index, or the index has been altered.
    """
    _check_index(index)
    _check_replaceable(path)
    path = Path(path)
    header = {
        "format": _FORMAT,
        "score": _describe(index.score),
        "modalities": index.modalities,
        "dim": index.dim,
    }
    leaves = [np.asarray(leaf) for leaf in jax.tree.leaves((index.prepared, index.usable))]
    try:
        _restore(header, leaves)
    except ValueError as error:
        raise ValueError(f"index must be as build_index makes it, to be read again: {error}") from error
    arrays: Any = {f"leaf{i}": leaf for i, leaf in enumerate(leaves)}
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", delete=False) as file:
        try:
            np.savez(file, header=np.array(json.dumps(header)), **arrays)
            file.flush()
            os.fsync(file.fileno())
            # Temporary files are their owner's alone; an index is as readable as any new file.
            os.chmod(file.name, 0o666 & ~_umask())
            os.replace(file.name, path)
        except BaseException:
            os.unlink(file.name)
            raise


def _check_replaceable(path: str | os.PathLike) -> None:
    if not os.fspath(path) or Path(path).is_dir():
        raise ValueError(f"path must be of a file, got {os.fspath(path)!r}")
    if not Path(path).parent.is_dir():
        raise ValueError(f"path must lie in a folder that exists, got {os.fspath(path)!r}")
    if Path(path).exists():
        try:
            with zipfile.ZipFile(path) as file:
                file.getinfo("header.npy")
        except (zipfile.BadZipFile, KeyError) as error:
            what = f"got {os.fspath(path)!r}, which is something else"
            raise ValueError(f"path must be of a new file, or of an index to replace, {what}") from error


def _umask() -> int:
    # The only way to read it is to set it.
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


# What reading a damaged archive raises, once it could be opened: RuntimeError where a header asks for a password or (a
# NotImplementedError) an unknown compression, OSError for a position outside of the file.
_DAMAGE = (zipfile.BadZipFile, RuntimeError, EOFError, OSError, KeyError, ValueError)


def load_index(path: str | os.PathLike) -> Index:
    """Reads an index that `save_index` wrote.

    Args:
      path: of the file.

    Returns:
      The index, in the dtype in which it was saved.

    Raises:
      FileNotFoundError: if there is no file.
      OSError: if it cannot be opened.
      ValueError: if `path` is a folder, or the file is damaged, no index, or one that this version cannot read, or its
        vectors are float64 and jax_enable_x64 is off.
    """
    if not os.fspath(path) or Path(path).is_dir():
        raise ValueError(f"path must be of a file that save_index wrote, got {os.fspath(path)!r}")
    if not Path(path).exists():
        raise FileNotFoundError(f"path must be of a file that save_index wrote, got {os.fspath(path)!r}: there is none")
    with open(path, "rb") as opened:
        try:
            header, leaves = _read(opened)
        except _DAMAGE as error:
            raise ValueError(f"{path} is damaged or not an index saved by gramjax: {error}") from error
    dtype = _dtype(leaves)
    if dtype is not None and dtype != dtypes.canonicalize_dtype(dtype):
        raise ValueError(f"{path} cannot be loaded: its vectors are {dtype}, which needs jax_enable_x64")
    try:
        return _restore(header, leaves)
    except ValueError as error:
        raise ValueError(f"{path} is damaged or not an index saved by gramjax: {error}") from error


def _read(opened: BinaryIO) -> tuple[dict, list[np.ndarray]]:
    # np.load itself would go on to try other formats and speak of pickles.
    zipfile.ZipFile(opened).close()
    opened.seek(0)
    with np.load(opened, allow_pickle=False) as file:
        header = json.loads(str(file["header"]))
        if not isinstance(header, dict):
            raise ValueError("its header is no mapping")
        if header["format"] != _FORMAT:
            raise ValueError(f"its format is {header['format']!r}, not {_FORMAT!r}")
        return header, [file[f"leaf{i}"] for i in range(len(file.files) - 1)]


def _restore(header: dict, leaves: list[np.ndarray]) -> Index:
    """Puts the arrays back into the tree that the score makes, whose shapes and dtypes they must have."""
    modalities, dim = sizes = [header.get(name) for name in ("modalities", "dim")]
    sized = all(isinstance(size, int) and size >= 1 for size in sizes)
    dtype = _dtype(leaves)
    if not (sized and len(leaves) >= 2 and leaves[-1].ndim and dtype is not None):
        raise ValueError("its header or its arrays are not those of an index")
    score = _score_from(header.get("score"))
    size = leaves[-1].shape[0]
    gallery = jax.ShapeDtypeStruct((size, modalities, dim), dtype)
    where = jax.ShapeDtypeStruct(gallery.shape[:2], bool)
    expected = jax.eval_shape(lambda gallery, where: _prepare(score, gallery, where), gallery, where)
    shapes = [(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(expected)]
    if [(leaf.shape, leaf.dtype) for leaf in leaves] != shapes:
        raise ValueError(f"its arrays are not those of a gallery of shape {gallery.shape} for {score}")
    prepared, usable = jax.tree.unflatten(jax.tree.structure(expected), [jnp.asarray(leaf) for leaf in leaves])
    return Index(prepared, usable, score, *gallery.shape[1:])


def _dtype(leaves: Sequence[Any]) -> Any:
    """That of the vectors: a score may prepare counts and masks as well."""
    return next((leaf.dtype for leaf in leaves if jnp.issubdtype(leaf.dtype, jnp.floating)), None)


def _describe(score: Score) -> dict:
    kind = type(score)
    if getattr(scores, kind.__name__, None) is not kind:
        raise TypeError(f"score must be one of gramjax.scores to be saved, got {score!r}.")
    fields = {field.name: getattr(score, field.name) for field in dataclasses.fields(score)}  # pyright: ignore[reportArgumentType]
    fields["precision"] = None if fields["precision"] is None else jax.lax.Precision(fields["precision"]).name
    return {"class": kind.__name__, **fields}


def _score_from(description: Any) -> Score:
    name = description.get("class") if isinstance(description, dict) else None
    kind = getattr(scores, name, None) if isinstance(name, str) else None
    # The module has more than scores, such as what it imports.
    if not (isinstance(kind, type) and dataclasses.is_dataclass(kind)):
        raise ValueError(f"its score is {description}")
    fields = {name: value for name, value in description.items() if name != "class"}
    if set(fields) != {field.name for field in dataclasses.fields(kind)}:
        raise ValueError(f"its score is {description}")
    precision = fields.pop("precision")
    if not (precision is None or (isinstance(precision, str) and precision in jax.lax.Precision.__members__)):
        raise ValueError(f"the precision of its score is {precision!r}")
    make: Any = kind
    return make(precision=None if precision is None else jax.lax.Precision[precision], **fields)


def _check_index(index: Index) -> None:
    if not isinstance(index, Index):
        raise TypeError(f"index must be one that build_index or load_index made, got {type(index).__name__}.")


def _check_queries(index: Index, queries, where) -> tuple[Array, Array]:
    _check_index(index)
    queries = _checks.as_array("queries", queries)
    if jnp.issubdtype(queries.dtype, jnp.floating):
        queries = queries.astype(index.dtype)
    if queries.ndim and queries.shape[-1] != index.dim:
        raise ValueError(
            f"queries must have vectors of {index.dim} entries like the items of the index, got shape {queries.shape}."
        )
    if where is not None and queries.ndim > 1:
        where = _checks.mask("where", where, queries.shape[:-1], "[Q]" if queries.ndim == 2 else "[Q, p]")
    rows = streamed.check_queries(index.score, queries, where)
    streamed.check_trial(index.score, rows, (len(index), index.modalities, index.dim))
    return rows


@jax.jit(static_argnums=0)
def _prepare(score: Score, gallery: Array, where: Array) -> tuple[Any, Array]:
    return score.prepare(gallery, where), score.usable(where)


def _as_it_is(score: Score, items, dtype) -> tuple[Any, Array]:
    del score, dtype
    return items

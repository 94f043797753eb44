"""One tree of arrays in one directory."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from gramjax.checkpoints.checksums import find_damage, write_checksums
from gramjax.checkpoints.folders import check_destination


class _Handler(ocp.PyTreeCheckpointHandler):
    """Orbax's, with checksums."""

    def finalize(self, directory: Any) -> None:
        super().finalize(directory)
        write_checksums(Path(directory))


@ocp.args.register_with_handler(_Handler, for_save=True)
@dataclass
class _Save(ocp.args.PyTreeSave):
    pass


@ocp.args.register_with_handler(_Handler, for_restore=True)
@dataclass
class _Restore(ocp.args.PyTreeRestore):
    pass


def save(path: str | os.PathLike, tree: Any, *, overwrite: bool = False) -> None:
    """Write a tree of arrays to the directory `path`, which appears only once everything is in it.

    Args:
        path: directory to make.
        tree: any pytree of arrays, random keys included: nested dictionaries, `nnx.state(module)`, an optimizer's
            state.
        overwrite: replace the tree that is there, or an empty directory.

    Raises:
        ValueError: `path` exists and `overwrite` is False, it is something else, or no directory can be made there.

    >>> import tempfile, numpy as np
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save(f"{folder}/weights", {"kernel": np.ones((2, 3), np.float32)})
    ...     restore(f"{folder}/weights")["kernel"].shape
    (2, 3)
    """
    path = Path(path).absolute()
    check_destination(path, ("_METADATA",), overwrite=overwrite)
    # Orbax would copy the whole tree before it writes, and collect it again for one large file. This limits both: the
    # memory needed beside the tree is about a gigabyte, whatever its size.
    handler = _Handler(save_device_host_concurrent_gb=1)
    with ocp.Checkpointer(handler) as checkpointer:
        checkpointer.save(path, _Save(tree, ocdbt_target_data_file_size=100_000_000), force=overwrite)


def restore(path: str | os.PathLike, target: Any = None) -> Any:
    """Read a tree of arrays that `save` wrote.

    Args:
        path: directory `save` was given.
        target: tree of arrays or `jax.ShapeDtypeStruct`s with the structure, shapes and dtypes to restore. Every leaf
            is placed as the target's leaf is sharded, whatever devices it was saved from; a leaf without sharding
            goes to the default device. None gives nested dictionaries of NumPy arrays with the names they were saved
            under.

    Raises:
        FileNotFoundError: nothing was saved at `path`.
        ValueError: what was saved is damaged, or the names or shapes in `target` are not those saved.
    """
    path = Path(path).absolute()
    if not path.exists():
        raise FileNotFoundError(f"path must be a checkpoint that save wrote, got {path}, which does not exist")
    if damage := find_damage(path):
        raise ValueError(f"path must be a checkpoint that is whole, got {path}: {damage}")
    if not (path / "_METADATA").exists():  # Orbax would restore an empty tree
        raise ValueError(f"path must be a checkpoint that is whole, got {path}: _METADATA is missing")
    if target is None:
        with ocp.PyTreeCheckpointer() as checkpointer:
            names = checkpointer.metadata(path).item_metadata.tree
            as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), names)
            return checkpointer.restore(path, ocp.args.PyTreeRestore(restore_args=as_numpy))
    with ocp.StandardCheckpointer() as checkpointer:
        return checkpointer.restore(path, as_target(target))


def as_target(tree: Any) -> Any:
    """The shapes, dtypes and shardings of a tree, each leaf placed on the default device unless it says otherwise."""
    default = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])

    def describe(leaf: Any) -> jax.ShapeDtypeStruct:
        shape, dtype = (leaf.shape, leaf.dtype) if hasattr(leaf, "dtype") else (np.shape(leaf), np.asarray(leaf).dtype)
        return jax.ShapeDtypeStruct(shape, dtype, sharding=getattr(leaf, "sharding", None) or default)

    return jax.tree.map(describe, tree)

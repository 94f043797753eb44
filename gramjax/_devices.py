"""A batch divided over devices: what a loss of the whole batch needs to know and to do there.

Inside `jax.shard_map` (or `pmap`) a loss is called on each device with that device's examples and `axis_name`, the
mesh axis along which the batch is divided. With `mesh` besides, it is called on global arrays and enters `shard_map`
by itself (`over_mesh`).
"""

import functools
import inspect
import math
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array

from gramjax import _checks

AxisName = str | tuple[str, ...]
_Loss = TypeVar("_Loss", bound=Callable[..., Array | tuple[Array, ...]])


def axis_size(axis_name: AxisName | None) -> int:
    """Number of devices along the axis; 1 for None."""
    if axis_name is None:
        return 1
    _names(axis_name)
    try:
        return jax.lax.axis_size(axis_name)
    except NameError as error:
        raise ValueError(
            "axis_name must name a mesh axis of the jax.shard_map (or pmap) that the call is made in, got "
            f"{axis_name!r}, which is not bound here. For global arrays outside of shard_map pass mesh= as well."
        ) from error


def _names(axis_name: AxisName) -> tuple[str, ...]:
    names = (axis_name,) if isinstance(axis_name, str) else axis_name
    if not isinstance(names, tuple) or not all(isinstance(name, str) for name in names):
        raise TypeError(f"axis_name must be the name of a mesh axis or a tuple of names, got {axis_name!r}.")
    return names


def check_whole(*arrays: Array) -> None:
    """Raises if an array is divided over an axis whose divisions its type tells (`AxisType.Explicit`)."""
    for array in arrays:
        spec = jax.typeof(array).sharding.spec
        if axes := [axis for axis in spec if axis is not None]:
            raise ValueError(
                f"mesh must be given for arrays divided over an Explicit mesh axis, got one of shape {array.shape} "
                f"divided over {axes} without it."
            )


def position(axis_name: AxisName | None) -> Array | int:
    """Which device along the axis this is; 0 for None."""
    axis_size(axis_name)
    return 0 if axis_name is None else jax.lax.axis_index(axis_name)


def global_sum(x: Array, axis_name: AxisName | None) -> Array:
    """Sum over the devices along the axis, with the gradient of one global number.

    JAX transposes `psum` in two ways. Where it tracks what varies over devices (`check_vma=True`, the default of
    `shard_map`), a cotangent of the sum reaches every device's term once. Where it does not (`check_vma=False`,
    `pmap`), the cotangents of all devices' copies of the sum are added up: the gradient of one loss comes out times
    the number of devices. Here it is once in both.
    """
    if axis_name is None:
        return x
    axis_size(axis_name)
    return jax.lax.psum(vary_over(x, axis_name), axis_name) if _tracked(axis_name) else _untracked_sum(x, axis_name)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _untracked_sum(x: Array, axis_name: AxisName) -> Array:
    return jax.lax.psum(x, axis_name)


_untracked_sum.defvjp(lambda x, axis_name: (_untracked_sum(x, axis_name), None), lambda axis_name, _, g: (g,))


def varying(tree: Any) -> frozenset:
    """Mesh axes over which any array of the tree is known to vary."""
    axes = frozenset()
    for leaf in jax.tree.leaves(tree):
        kind = jax.typeof(leaf)
        kind = getattr(kind, "manual_axis_type", kind)  # where the type keeps it depends on the version of JAX
        axes |= getattr(kind, "varying", None) or getattr(kind, "vma", frozenset())
    return axes


def vary_over(tree: Any, axes: AxisName | frozenset | None) -> Any:
    """Marks every array as varying over these axes, where JAX tracks it: the operands of a loop must agree on that."""
    axes = frozenset((axes,) if isinstance(axes, str) else axes or ())

    def mark(leaf):
        missing = tuple(axis for axis in sorted(axes - varying(leaf)) if _tracked(axis))
        return jax.lax.pcast(leaf, missing, to="varying") if missing else leaf

    return jax.tree.map(mark, tree)


def _tracked(axis_name: AxisName) -> bool:
    return bool(varying(jax.lax.axis_index(axis_name)))


def shift(tree: Any, axis_name: AxisName) -> Any:
    """Every device's arrays to the next device of a ring; over several axes it may follow another order than theirs."""
    size = axis_size(axis_name)
    if size == 1:
        return tree
    # Of several axes `ppermute` numbers the devices in the order of the mesh, and wants them named in that order.
    order = jax.sharding.get_abstract_mesh().axis_names
    if not isinstance(axis_name, str) and set(axis_name) <= set(order):
        axis_name = tuple(sorted(axis_name, key=order.index))
    steps = [(device, (device + 1) % size) for device in range(size)]
    return jax.tree.map(lambda leaf: jax.lax.ppermute(leaf, axis_name, steps), tree)


def round_the_ring(axis_name: AxisName | None, visit: Callable, state: Any, columns: Any, travelling: Any) -> Any:
    """Folds `visit(state, columns, travelling) -> state, travelling` over the columns of every device.

    `travelling` goes with its columns, and after the last step is where it started.
    """
    if axis_name is None or axis_size(axis_name) == 1:
        return visit(state, columns, travelling)

    def step(_, carry):
        state, columns, travelling = carry
        state, travelling = visit(state, columns, travelling)
        # Sending the columns on does not wait for the visit: a device can do both at once.
        columns, travelling = shift((columns, travelling), axis_name)
        return state, columns, travelling

    carry = vary_over((state, columns, travelling), axis_name)
    state, _, travelling = jax.lax.fori_loop(0, axis_size(axis_name), step, carry)
    return state, travelling


def over_mesh(*divided: str) -> Callable[[_Loss], _Loss]:
    """Gives a loss with the keywords `axis_name`, `mesh` and `reduction` its form for global arrays.

    Called with `mesh`, the loss runs inside `jax.shard_map` over the whole mesh: the arguments named in `divided` are
    divided along their first axis over `axis_name`, all other arrays are the same everywhere. Entry `i` of each belongs
    to entry `i` of the first, on one device then. Of an array that is longer than the first, what goes beyond is
    divided by itself, and each device has its share of it at the end.
    """

    def decorate(loss: _Loss) -> _Loss:
        signature = inspect.signature(loss)

        @functools.wraps(loss)
        def wrapped(*args, **kwargs):
            if kwargs.get("mesh") is None:
                return loss(*args, **kwargs)
            given = signature.bind(*args, **kwargs).arguments
            mesh = given.pop("mesh")
            axis_name, devices = axis_of(mesh, given.pop("axis_name", None))
            batched = {name: _checks.as_array(name, given.pop(name)) for name in divided if given.get(name) is not None}
            for name, array in batched.items():
                if array.ndim == 0 or array.shape[0] % devices:
                    raise ValueError(
                        f"{name} must have a first axis that divides over the {devices} devices of mesh axis "
                        f"{axis_name!r}, got shape {array.shape}."
                    )
            _check_lengths(batched, divided[0])
            if "weights" in batched and batched["weights"].ndim:
                # Inside, their values are no longer known.
                _checks.weights("weights", batched["weights"], len(batched["weights"]))
            # A scalar that is known stays known inside, so that it is checked there.
            given = {name: np.asarray(x) if _is_known_scalar(x) else x for name, x in given.items()}
            arrays = {name: given.pop(name) for name in list(given) if isinstance(given[name], jax.Array)}
            spec = PartitionSpec(axis_name)
            whole = spec if given.get("reduction", "mean") is None else PartitionSpec()
            size = batched[divided[0]].shape[0]
            batched = _on_mesh(mesh, batched, spec)
            parts = {name: jnp.split(x, [size] if len(x) > size else []) for name, x in batched.items()}

            def body(parts, arrays):
                batched = {name: jnp.concatenate(x) for name, x in parts.items()}
                return loss(**given, **batched, **arrays, axis_name=axis_name)

            try:
                return run_on(mesh, body, (parts, arrays), (spec, PartitionSpec()), whole)
            except (TypeError, ValueError) as error:
                error.add_note(f"Shapes in it are those on one of the {devices} devices that divide the batch.")
                raise

        return wrapped  # pyright: ignore[reportReturnType]

    return decorate


def _check_lengths(batched: dict[str, Array], first: str) -> None:
    """Inside of `shard_map` an error would speak of the parts of arrays. A gallery may be longer than its queries."""
    for name, array in batched.items():
        other = "gallery" if name in ("gallery_where", "ids") and "gallery" in batched else first
        if name != "gallery" and len(array) != len(batched[other]):
            raise ValueError(
                f"{name} must have the first axis of {other}, of size {len(batched[other])}, got shape {array.shape}."
            )


def _is_known_scalar(x: Any) -> bool:
    if not isinstance(x, jax.Array) or isinstance(x, Tracer) or jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        return False
    return x.ndim == 0 and x.is_fully_addressable


def run_on(mesh: Mesh, body: Callable, operands: tuple, specs: tuple[PartitionSpec, ...], out_specs: Any) -> Any:
    """`body(*operands)` inside `jax.shard_map`, with one spec for all arrays of an operand."""
    operands = tuple(_on_mesh(mesh, x, spec) for x, spec in zip(operands, specs))
    return jax.shard_map(body, mesh=mesh, in_specs=specs, out_specs=out_specs)(*operands)


def _on_mesh(mesh: Mesh, tree: Any, spec: PartitionSpec) -> Any:
    """Explicit axes do not move arrays by themselves."""
    return jax.reshard(tree, NamedSharding(mesh, spec)) if AxisType.Explicit in mesh.axis_types else tree


def axis_of(mesh: Mesh, axis_name: AxisName | None) -> tuple[AxisName, int]:
    """The axis of the mesh that is meant, by default its only one, and the number of devices along it."""
    if not isinstance(mesh, Mesh):
        raise TypeError(f"mesh must be a jax.sharding.Mesh, got {type(mesh).__name__}.")
    if manual := jax.sharding.get_abstract_mesh().manual_axes:
        raise ValueError(
            f"mesh must be left out inside of jax.shard_map or pmap (here over {manual}): the arrays are a device's "
            "own part there, and axis_name alone says along which axis they are divided."
        )
    if axis_name is None and len(mesh.axis_names) == 1:
        axis_name = mesh.axis_names[0]
    names = () if axis_name is None else _names(axis_name)
    if not names or not set(names) <= set(mesh.axis_names):
        raise ValueError(f"axis_name must name an axis of the mesh, one of {mesh.axis_names}, got {axis_name!r}.")
    return axis_name, math.prod(mesh.shape[name] for name in names)  # pyright: ignore[reportReturnType]

"""Parameters from and to PyTorch state dicts, by tables.

An encoder's `torch_rules(config)` lists which tensor of a released file goes where and how its axes move; nothing else
needs to know either side's names. Tables of parts are joined with `prefixed` into the table of a whole model.
`params_from_torch` applies a table: every tensor checked, all problems reported at once, nothing written in place.
`state_dict_of` reads it backwards.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from einops import EinopsError, rearrange
from flax import nnx

# How PyTorch's layouts become ours (einops patterns; read backwards they export).
AS_IS = "... -> ..."
LINEAR = "o i -> i o"
CONV_1D = "o i t -> t i o"
CONV_2D = "o i h w -> h w i o"


@dataclass(frozen=True)
class Rule:
    """One tensor of a state dict and the parameter, or parameters, it becomes.

    Attributes:
        keys: names under which files hold the tensor: several for the copies of a shared parameter. One suffices; where
            several are present they must be equal.
        paths: dotted path of the parameter in the module. Several: the tensor is cut evenly along its first axis
            (a fused query-key-value weight). None at all: the tensor is known, and not used.
        layout: einops pattern from PyTorch's axes to ours, for each part. It only moves axes and drops those of size 1.
        spellings: further names, of other versions of the code: as good as `keys` to read from, and never written.
    """

    keys: tuple[str, ...]
    paths: tuple[str, ...]
    layout: str = AS_IS
    spellings: tuple[str, ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        """All names by which a file may call the tensor."""
        return self.keys + self.spellings


@runtime_checkable
class Tensor(Protocol):
    """What a state dict holds: a NumPy array, or a tensor that is read from its file by `np.asarray`."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Sizes of the axes."""
        ...

    @property
    def dtype(self) -> np.dtype:
        """Of the values."""
        ...

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        """The values."""
        ...


def rule(key: str, *paths: str, layout: str = AS_IS) -> Rule:
    """A rule for a tensor with one name."""
    return Rule((key,), paths, layout)


def linear_rules(key: str, path: str) -> tuple[Rule, ...]:
    """Weight and bias of a linear layer."""
    return (
        rule(f"{key}.weight", f"{path}.kernel", layout=LINEAR),
        rule(f"{key}.bias", f"{path}.bias"),
    )


def norm_rules(key: str, path: str) -> tuple[Rule, ...]:
    """Weight and bias of a LayerNorm."""
    return rule(f"{key}.weight", f"{path}.scale"), rule(f"{key}.bias", f"{path}.bias")


def prefixed(rules: Iterable[Rule], *, key: str = "", path: str = "") -> tuple[Rule, ...]:
    """The same rules for a part of a larger model: `key` and `path` are put before all keys and paths."""

    def join(prefix: str, names: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(prefix + name for name in names)

    return tuple(
        replace(r, keys=join(key, r.keys), paths=join(path, r.paths), spellings=join(key, r.spellings)) for r in rules
    )


def unused(rules: Iterable[Rule]) -> tuple[Rule, ...]:
    """The same tensors as known, and not used: of a part that the files have and the configuration leaves out."""
    return tuple(replace(r, paths=()) for r in rules)


def strip_prefix(state_dict: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    """The entries of `state_dict` whose names start with `prefix`, without it."""
    return {key.removeprefix(prefix): value for key, value in state_dict.items() if key.startswith(prefix)}


def params_from_torch(module: nnx.Module, rules: Sequence[Rule], state_dict: Mapping[str, Tensor]) -> Mapping[str, Any]:
    """Converts a PyTorch state dict to the parameters of `module`.

    Names, shapes and dtypes are checked before any values are read (but for the copies of shared parameters, which are
    compared), and then tensors are read and converted one by one: beside the result, memory is needed for one tensor.

    Args:
        module: an encoder, or its shapes alone (`nnx.eval_shape(lambda: Encoder(config, rngs=nnx.Rngs(0)))`), which
            costs no memory. It is not changed.
        rules: the table; it must cover every parameter of `module` once.
        state_dict: names to tensors of any floating dtype; they are cast to the parameters' dtypes.

    Returns:
        The parameters as an `nnx.State`, ready for `nnx.update(module, state)`.

    Raises:
        ValueError: listing by name all keys that are missing, unexpected, of a wrong shape or dtype, and all copies
            of one parameter that differ.
    """
    flat = nnx.to_flat_state(nnx.state(module, nnx.Param))
    wanted = {_dotted(path): variable for path, variable in flat}
    _check_table(rules, wanted)
    problems = [problem for r in rules if r.paths for problem in _problems(r, state_dict, wanted)]
    known = {name for r in rules for name in r.names}
    problems += [f"unexpected: {name}" for name in state_dict if name not in known]
    if problems:
        raise ValueError(f"state_dict does not fit {type(module).__name__}:\n  " + "\n  ".join(problems))

    converted: dict[str, jax.Array] = {}
    for r in rules:
        if not r.paths:
            continue
        tensor = np.asarray(state_dict[next(name for name in r.names if name in state_dict)])
        for path, part in zip(r.paths, _parts(r, tensor)):
            # The array must be a copy, and complete before the next tensor is read: sending it to a device goes on in
            # the background and would keep the tensor.
            converted[path] = jnp.array(part, dtype=wanted[path].dtype).block_until_ready()
    return nnx.from_flat_state((path, variable.replace(converted[_dotted(path)])) for path, variable in flat)


def state_dict_of(module: nnx.Module, rules: Sequence[Rule]) -> dict[str, Tensor]:
    """The PyTorch state dict of a module: `params_from_torch` backwards.

    Args:
        module: an encoder.
        rules: its table.

    Returns:
        Names to tensors in PyTorch's layout, which are made only when `np.asarray` asks for them. Copies of a shared
        parameter are one object under several names; tensors that the table knows but does not use are left out.
    """
    params = {_dotted(path): variable for path, variable in nnx.to_flat_state(nnx.state(module, nnx.Param))}
    _check_table(rules, params)
    tensors = [(r, _Exported(r, tuple(params[path][...] for path in r.paths))) for r in rules if r.paths]
    return {key: tensor for r, tensor in tensors for key in r.keys}


def from_torch(
    encoder: Any,
    config: Any,
    state_dict: Mapping[str, Tensor],
    *,
    dtype: Any = jnp.float32,
    param_dtype: Any = jnp.float32,
) -> Any:
    """Builds an encoder from a PyTorch state dict, without initialising it first.

    Args:
        encoder: `VisionTransformer`, `BEATs` or `BERT`.
        config: its configuration.
        state_dict: names (as in the released file of that encoder alone) to tensors.
        dtype: of the computation.
        param_dtype: of the parameters.

    Raises:
        ValueError: as `params_from_torch`.
    """
    module = nnx.eval_shape(lambda: encoder(config, rngs=nnx.Rngs(0), dtype=dtype, param_dtype=param_dtype))
    nnx.update(module, params_from_torch(module, encoder.torch_rules(config), state_dict))
    return module


def _check_table(rules: Sequence[Rule], wanted: Mapping[str, Any]) -> None:
    covered = [path for r in rules for path in r.paths]
    wrong = {path for path in covered if covered.count(path) > 1} | set(covered) ^ set(wanted)
    if wrong:
        raise ValueError(f"rules must name every parameter of the module once; not so for {sorted(wrong)}")


def _dotted(path: Sequence[Any]) -> str:
    return ".".join(map(str, path))


def _problems(r: Rule, state_dict: Mapping[str, Tensor], wanted: Mapping[str, Any]) -> list[str]:
    """What is wrong with the tensor of a rule."""
    present = [name for name in r.names if name in state_dict]
    if not present:
        return ["missing: " + " or ".join(r.names)]
    name, *copies = present
    tensor = state_dict[name]
    if not jnp.issubdtype(tensor.dtype, jnp.floating):
        return [f"wrong dtype: {name} is {tensor.dtype}, needed a floating dtype"]
    shapes = [tuple(wanted[path].shape) for path in r.paths]
    try:
        # The same steps on an array without memory.
        parts = [part.shape for part in _parts(r, np.broadcast_to(np.float32(0), tensor.shape))]
    except (ValueError, IndexError, EinopsError):  # wrong rank, or not even parts
        parts = []
    if parts != shapes:
        target = " and ".join(f"{path} {shape}" for path, shape in zip(r.paths, shapes))
        return [f"wrong shape: {name} {tensor.shape} cannot become {target} by '{r.layout}'"]
    return [
        f"not equal: {copy} and {name} are one parameter"
        for copy in copies
        if state_dict[copy].shape != tensor.shape or not np.array_equal(tensor, state_dict[copy])
    ]


def _parts(r: Rule, tensor: np.ndarray) -> list[np.ndarray]:
    """The values of the rule's parameters, as views of the tensor."""
    parts = np.split(tensor, len(r.paths)) if len(r.paths) > 1 else [tensor]
    return [rearrange(part, r.layout) for part in parts]


@dataclass(frozen=True, eq=False)
class _Exported:
    """The tensor of a rule, made of parameters when it is asked for."""

    rule: Rule
    parameters: tuple[Any, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        without_memory = tuple(np.broadcast_to(np.float32(0), p.shape) for p in self.parameters)
        return self._join(without_memory).shape

    @property
    def dtype(self) -> np.dtype:
        return np.dtype(self.parameters[0].dtype)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.asarray(self._join([np.asarray(p) for p in self.parameters]), dtype)

    def _join(self, parameters: Sequence[np.ndarray]) -> np.ndarray:
        ours, theirs = reversed(self.rule.layout.split("->"))
        parts = [rearrange(p, f"{ours} -> {theirs}") for p in parameters]
        return np.concatenate(parts) if len(parts) > 1 else parts[0]


def parameter_count(module: nnx.Module) -> int:
    """Number of parameters of a module or of its shapes (`nnx.eval_shape`)."""
    return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(nnx.state(module, nnx.Param)))

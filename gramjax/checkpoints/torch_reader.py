"""PyTorch's checkpoint files (`torch.save`, since version 1.6), read without PyTorch and without unpickling.

Such a file is a zip archive: `data.pkl`, a pickle that says which tensors there are, and one entry with the numbers of
each storage. A pickle is a program that can call anything. This one is not run by Python's `pickle` but followed here,
instruction by instruction: it can make plain data and describe tensors, and whatever else it asks for is refused.
"""

import os
import pickletools
import sys
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import ml_dtypes
import numpy as np

from gramjax.checkpoints.stored import DAMAGE, Storage, StoredTensor

# What PyTorch calls a storage of each dtype.
STORAGE_DTYPES = {
    "torch.FloatStorage": np.dtype(np.float32),
    "torch.HalfStorage": np.dtype(np.float16),
    "torch.BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
    "torch.DoubleStorage": np.dtype(np.float64),
    "torch.LongStorage": np.dtype(np.int64),
    "torch.IntStorage": np.dtype(np.int32),
    "torch.ShortStorage": np.dtype(np.int16),
    "torch.CharStorage": np.dtype(np.int8),
    "torch.ByteStorage": np.dtype(np.uint8),
    "torch.BoolStorage": np.dtype(np.bool_),
}
# The other names that a pickle may mention; what they do is in `_Machine`.
KNOWN = {
    *STORAGE_DTYPES,
    "torch._utils._rebuild_tensor_v2",
    "torch._utils._rebuild_parameter",
    "torch.Size",
    "collections.OrderedDict",
    "argparse.Namespace",
}

# The first bytes of what torch.save wrote before it wrote zip archives.
_LEGACY_MAGIC = bytes.fromhex("80028a0a6cfc9c46f9206aa85019")


def read_torch_file(path: str | os.PathLike) -> Any:
    """Reads a file that `torch.save` wrote.

    Nothing in the file is executed: it may hold tensors, dictionaries, lists, tuples, numbers, strings and
    `argparse.Namespace`, and a file that mentions anything else is refused.

    Args:
        path: the file.

    Returns:
        What was saved. Dictionaries are plain ones and namespaces become dictionaries. Tensors (and parameters) are
        `StoredTensor`s, whose values are read from the file when `np.asarray` asks for them.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file was written before PyTorch 1.6, is no PyTorch file, is truncated or damaged, or is refused;
            the message names what it asked to call.
    """
    path = Path(path)
    with open(path, "rb") as file:
        if file.read(len(_LEGACY_MAGIC)) == _LEGACY_MAGIC:
            raise ValueError(
                f"{path} has the format of PyTorch before 1.6, which is not read here. Save it again with a newer one: "
                "torch.save(torch.load(path, weights_only=True), new_path)"
            )
        try:
            with zipfile.ZipFile(file) as entries:
                archive = _Archive(path, file, entries)
                return _Machine(archive).run(archive.read("data.pkl"))
        except _Refused as error:
            raise ValueError(
                f"{path} is refused: {error}. Only tensors and plain data are read; if you trust the file, save its "
                "state_dict alone with PyTorch"
            ) from None
        except DAMAGE as error:
            raise ValueError(
                f"{path} is truncated or damaged, or no PyTorch checkpoint (plain pickles are not read): {error}"
            ) from error


class _Refused(Exception):
    """The file asks for more than tensors and plain data."""


class _Archive:
    """The zip archive, open while its pickle is followed."""

    def __init__(self, path: Path, file: IO[bytes], entries: zipfile.ZipFile):
        self.path, self.file, self.entries = path, file, entries
        self.length = file.seek(0, os.SEEK_END)
        pickles = [name for name in entries.namelist() if name == "data.pkl" or name.endswith("/data.pkl")]
        if len(pickles) != 1:
            raise ValueError(f"it must hold one data.pkl, got {len(pickles)}")
        self.root = pickles[0].removesuffix("data.pkl")
        order = self.read("byteorder") if self.root + "byteorder" in entries.NameToInfo else b"little"
        self.swapped = order.decode() != sys.byteorder

    def storage(self, key: str, dtype: np.dtype, size: int) -> Storage:
        """The storage of `size` numbers under `key`."""
        info = self.entries.getinfo(f"{self.root}data/{key}")
        if size < 0 or size * dtype.itemsize > info.file_size:
            raise ValueError(f"storage {key} shall hold {size} numbers of {dtype}, but has {info.file_size} bytes")
        if info.compress_type != zipfile.ZIP_STORED:
            return Storage(self.path, dtype, size, entry=info.filename, swapped=self.swapped)
        return Storage(self.path, dtype, size, start=self._start(info), swapped=self.swapped)

    def read(self, name: str) -> bytes:
        """A whole entry."""
        info = self.entries.getinfo(self.root + name)
        if info.compress_type != zipfile.ZIP_STORED:
            return self.entries.read(info)
        # Without zipfile's checksum: PyTorch can be told to leave it out, and does not look at it either.
        self.file.seek(self._start(info))
        return self.file.read(info.file_size)

    def _start(self, info: zipfile.ZipInfo) -> int:
        """Where an uncompressed entry starts in the file: after its local header, which is not like the central one."""
        self.file.seek(max(info.header_offset, 0))
        header = self.file.read(30)
        if info.header_offset < 0 or len(header) != 30 or header[:4] != b"PK\x03\x04":
            raise ValueError(f"{info.filename} is not where the archive says")
        start = (
            info.header_offset + 30 + int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")
        )
        if start + info.file_size > self.length:
            raise ValueError(f"{info.filename} ends after the file")
        return start


@dataclass(frozen=True)
class _Global:
    """A name of `KNOWN` that the pickle has mentioned."""

    name: str


class _Namespace(dict):
    """An `argparse.Namespace`."""


_CONSTANTS = {
    *("BININT", "BININT1", "BININT2", "LONG1", "LONG4", "BINFLOAT"),
    *("BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8"),
}
_FIXED = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_MEMO_PUTS = {"BINPUT", "LONG_BINPUT", "MEMOIZE"}
_MEMO_GETS = {"BINGET", "LONG_BINGET"}


class _Machine:
    """Follows the instructions of a pickle: a stack, a memo, and no calls but those of `_call`."""

    def __init__(self, archive: _Archive):
        self.archive = archive
        self.stack: list[Any] = []
        self.outer: list[list[Any]] = []  # stacks below the marks
        self.memo: dict[int, Any] = {}

    def run(self, pickled: bytes) -> Any:
        """What the pickle describes."""
        for opcode, argument, _ in pickletools.genops(pickled):
            if opcode.name != "STOP":
                self._step(opcode.name, argument)
        if len(self.stack) != 1 or self.outer:
            raise ValueError("its pickle does not end with one value")
        return self.stack.pop()

    def _step(self, name: str, argument: Any) -> None:
        stack = self.stack
        match name:
            case "PROTO" | "FRAME":
                pass
            case "MARK":
                self.outer.append(stack)
                self.stack = []
            case "EMPTY_DICT":
                stack.append({})
            case "EMPTY_LIST":
                stack.append([])
            case "EMPTY_TUPLE":
                stack.append(())
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                count = int(name[-1])
                if len(stack) < count:
                    raise ValueError("the pickle takes more than there is")
                stack[-count:] = [tuple(stack[-count:])]
            case "TUPLE":
                items = self._since_mark()
                self.stack.append(tuple(items))
            case "APPEND" | "APPENDS":
                items = self._since_mark() if name == "APPENDS" else [stack.pop()]
                _expect(self.stack[-1], list).extend(items)
            case "SETITEM" | "SETITEMS":
                items = self._since_mark() if name == "SETITEMS" else [stack.pop(-2), stack.pop()]
                _expect(self.stack[-1], dict).update(_pairs(items))
            case "GLOBAL":
                stack.append(_mention(argument.replace(" ", ".")))
            case "STACK_GLOBAL":
                attribute, module = stack.pop(), stack.pop()
                stack.append(_mention(f"{module}.{attribute}"))
            case "REDUCE":
                arguments, function = stack.pop(), stack.pop()
                stack.append(self._call(_expect(function, _Global).name, _expect(arguments, tuple)))
            case "NEWOBJ":
                arguments, kind = stack.pop(), stack.pop()
                if (kind, arguments) != (_Global("argparse.Namespace"), ()):
                    raise _Refused(f"it makes an object of {kind}")
                stack.append(_Namespace())
            case "BUILD":
                state = stack.pop()
                if isinstance(stack[-1], _Namespace):
                    stack[-1].update(_pairs([x for pair in _expect(state, dict).items() for x in pair]))
                elif not isinstance(stack[-1], dict):  # a dictionary's attributes are of no use here
                    raise _Refused(f"it sets the state of {type(stack[-1]).__name__}")
            case "BINPERSID":
                stack.append(self._storage(stack.pop()))
            case _ if name in _CONSTANTS:
                stack.append(argument)
            case _ if name in _FIXED:
                stack.append(_FIXED[name])
            case _ if name in _MEMO_PUTS:
                self.memo[len(self.memo) if name == "MEMOIZE" else argument] = stack[-1]
            case _ if name in _MEMO_GETS:
                stack.append(self.memo[argument])
            case _:
                raise _Refused(f"its pickle has the instruction {name} {argument or ''}".strip())

    def _since_mark(self) -> list[Any]:
        items, self.stack = self.stack, self.outer.pop()
        return items

    def _call(self, function: str, arguments: tuple) -> Any:
        match function, arguments:
            case ("collections.OrderedDict", ()):
                return {}
            case ("torch._utils._rebuild_tensor_v2", (storage, offset, shape, strides, *_)):
                (offset,), shape, strides = (_integers(numbers) for numbers in ((offset,), shape, strides))
                return StoredTensor(_expect(storage, Storage), offset, shape, strides)
            case ("torch._utils._rebuild_parameter", (tensor, *_)):
                return _expect(tensor, StoredTensor)
            case ("torch.Size", (shape,)):
                return _integers(shape)
        raise _Refused(f"it calls {function} with {len(arguments)} arguments")

    def _storage(self, identifier: Any) -> Storage:
        match identifier:
            case ("storage", _Global(name), str(key), str(), int(size)) if name in STORAGE_DTYPES:
                return self.archive.storage(key, STORAGE_DTYPES[name], size)
        raise ValueError("a tensor has no storage")


def _mention(name: str) -> _Global:
    if name not in KNOWN:
        raise _Refused(f"it asks for {name}")
    return _Global(name)


def _expect(value: Any, kind: Any) -> Any:
    if not isinstance(value, kind):
        raise ValueError(f"its pickle has a {type(value).__name__} where a {kind.__name__} belongs")
    return value


def _integers(values: Any) -> tuple[int, ...]:
    for value in _expect(values, tuple):
        _expect(value, int)
    return values


def _pairs(items: list[Any]) -> Iterable[tuple[Any, Any]]:
    keys, values = items[::2], items[1::2]
    for key in keys:
        _expect(key, (str, int, float))
    return zip(keys, values, strict=True)

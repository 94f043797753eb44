"""PyTorch's files: what is read from those it wrote, what is refused, what is damaged, and what it reads of ours."""

import io
import os
import pickle
import pickletools
import zipfile
from collections import OrderedDict

import ml_dtypes
import numpy as np
import pytest

from gramjax.checkpoints import read_state_dict, read_torch_file, write_torch_file
from tests.checkpoints.conftest import GOLDEN
from tests.checkpoints.pickles import dictionary_instructions, instructions, tensor_instructions


@pytest.mark.parametrize(
    ("name", "pt", "prefix"), [("beats_tiny", "beats_tiny", ""), ("gram_tiny", "gram_tiny_ddp", "module.")]
)
def test_released_files_hold_the_reference_parameters(golden_state_dict, name, pt, prefix):
    contents = read_torch_file(GOLDEN / f"{pt}.pt")
    tensors, expected = contents.get("model", contents), golden_state_dict(name)
    assert set(tensors) == {prefix + key for key in expected}
    for key, value in expected.items():
        tensor = tensors[prefix + key]
        assert (tensor.shape, tensor.dtype) == (value.shape, value.dtype)
        np.testing.assert_array_equal(tensor, value)


def test_half_precision_release(golden_state_dict):
    tensors, expected = read_torch_file(GOLDEN / "eva_tiny_fp16.pt"), golden_state_dict("eva_tiny")
    assert set(tensors) == set(expected)
    for key, value in expected.items():
        assert tensors[key].dtype == np.float16
        np.testing.assert_array_equal(tensors[key], value.astype(np.float16))


def test_every_kind_of_tensor_and_plain_data():
    contents = read_torch_file(GOLDEN / "torch_kinds.pt")
    base, small = np.arange(24, dtype=np.float32).reshape(4, 6), np.arange(6, dtype=np.float32).reshape(2, 3)
    expected = {
        "transposed": base.T,
        "slice": base[1:3, ::2],
        "expanded": np.full((5, 4), 2, np.float32),
        "tied_a": small,
        "tied_b": small,
        "scalar": np.float64(2.5),
        "empty": np.zeros((0, 3), np.float32),
        "bfloat16": np.array([1.5, -2.0, 3.0e38], ml_dtypes.bfloat16),
        "half": np.array([0.5, -1.0], np.float16),
        "int64": np.array([1, -(2**40)]),
        "int32": np.array([3, -4], np.int32),
        "int16": np.array([5], np.int16),
        "int8": np.array([-6], np.int8),
        "uint8": np.array([250], np.uint8),
        "bool": np.array([True, False, True]),
    }
    for name, value in expected.items():
        array = np.asarray(contents[name])
        assert (array.dtype, array.shape) == (value.dtype, value.shape), name
        np.testing.assert_array_equal(array, value, err_msg=name)
    assert contents["tied_a"] == contents["tied_b"]
    np.testing.assert_array_equal(contents["state_dict"]["bias"], [7, 8])
    assert contents["size"] == (2, 3)
    assert contents["namespace"] == {"lr": 1e-3, "name": "x", "on": True, "none": None}
    assert contents["list"] == [1, (2, "three", -70000, 2**70)]
    assert contents["optimizer"]["param_groups"][0]["params"] == [0, 1]


def test_old_files_say_how_to_save_them_again():
    with pytest.raises(ValueError, match=r"PyTorch before 1\.6.*torch\.save\(torch\.load\(path, weights_only=True\)"):
        read_torch_file(GOLDEN / "torch_legacy.pt")


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED], ids=["stored", "compressed"])
@pytest.mark.parametrize(("byteorder", "sign"), [("little", "<"), ("big", ">")])
def test_compression_and_byte_order(write_pickle, compression, byteorder, sign):
    numbers = np.arange(6, dtype=np.float32)
    half = numbers.astype(ml_dtypes.bfloat16).view(np.uint16).astype(f"{sign}u2")
    path = write_pickle(
        dictionary_instructions(
            {
                "a": tensor_instructions(offset=1, shape=(2, 2), strides=(2, 1)),
                "b": tensor_instructions("BFloat16Storage", key="1", shape=(6,), strides=(1,)),
            }
        ),
        {"0": numbers.astype(f"{sign}f4").tobytes(), "1": half.tobytes()},
        compression=compression,
        byteorder=byteorder,
    )
    contents = read_torch_file(path)
    np.testing.assert_array_equal(contents["a"], [[1, 2], [3, 4]])
    np.testing.assert_array_equal(contents["b"], numbers.astype(ml_dtypes.bfloat16))


# What a file must not do. `{}` is a shell command.
def reduced(function, *arguments):
    class Evil:
        def __reduce__(self):
            return function, arguments

    return pickle.dumps(Evil(), 2)[2:-1]


class Restored:
    """Python calls __setstate__ when it unpickles this."""

    def __setstate__(self, state):
        os.system(state)


def attacks(command):
    evil = reduced(os.system, command)
    call = instructions((command,)) + b"R"
    restored = b"\x80\x02" + b"ctests.checkpoints.test_torch_files\nRestored\n)\x81" + instructions(command) + b"b."
    return {
        f"{os.name}.system": evil,
        "builtins.eval": b"cbuiltins\neval\n" + instructions((f"__import__('os').system({command!r})",)) + b"R",
        "torch.load": b"ctorch\nload\n" + call,
        "torch._utils._rebuild_tensor_v2.__globals__": b"\x8c\x0ctorch._utils"
        b"\x8c\x1e_rebuild_tensor_v2.__globals__\x93",
        "torch.serialization.os.system": b"ctorch.serialization\nos.system\n" + call,
        "tests.checkpoints.test_torch_files.Restored": restored[2:-1],
        "instruction INST": b"(" + instructions(command) + b"iposix\nsystem\n",
        "instruction EXT1": b"\x82\x01",
        "instruction OBJ": b"(ccollections\nOrderedDict\no",
        "calls torch.FloatStorage": b"ctorch\nFloatStorage\n)R",
        "calls collections.OrderedDict with 1": b"ccollections\nOrderedDict\n" + call,
        "makes an object of": b"ccollections\nOrderedDict\n)\x81",
        "sets the state of _Global": b"ctorch\nFloatStorage\n}b",
        "sets the state of StoredTensor": tensor_instructions() + b"}b",
    }


@pytest.mark.parametrize("name", attacks(""))
@pytest.mark.parametrize("nested", [False, True], ids=["", "in cfg"])
def test_files_that_want_more_than_tensors_are_refused_and_nothing_is_executed(
    write_pickle, tmp_path, monkeypatch, name, nested
):
    monkeypatch.chdir(tmp_path)
    body = attacks("touch executed")[name]
    if nested:
        model = dictionary_instructions({"w": tensor_instructions()})
        body = dictionary_instructions({"model": model, "cfg": dictionary_instructions({"depth": body})})
    path = write_pickle(body)
    for read in (read_torch_file, read_state_dict):
        with pytest.raises(ValueError, match="is refused: ") as error:
            read(path)
        assert name in str(error.value)
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("name", [f"{os.name}.system", "builtins.eval", "tests.checkpoints.test_torch_files.Restored"])
def test_the_attacks_work_on_python(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    pickle.loads(b"\x80\x02" + attacks("touch executed")[name] + b".")
    assert (tmp_path / "executed").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"offset": 1}, r"shape \(2, 3\).*offset 1 reaches outside its storage of 6"),
        ({"strides": (4, 1)}, "reaches outside"),
        ({"shape": (2, 4)}, "reaches outside"),
        ({"offset": -1}, "offset -1"),
        ({"strides": (-3, 1)}, "strides"),
        ({"shape": (-2, -3)}, "shape"),
        ({"strides": (1,)}, "strides"),
        ({"shape": (2, "3")}, "a str where a int belongs"),
        ({"numbers": 7}, "shall hold 7 numbers of float32, but has 24 bytes"),
        ({"numbers": -1}, "-1 numbers"),
        ({"storage": "DoubleStorage"}, "shall hold 6 numbers of float64"),
        ({"key": "9"}, "data/9"),
        ({"key": "../data.pkl"}, "data/../data.pkl"),
        ({"shape": (1 << 62, 1 << 62), "strides": (1, 1)}, "reaches outside"),
    ],
)
def test_views_outside_of_their_storage_are_errors(write_pickle, options, message):
    with pytest.raises(ValueError, match=f"truncated or damaged.*{message}"):
        read_torch_file(write_pickle(tensor_instructions(**options)))


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"t",
        b"R",
        b"u",
        b"b",
        b"h\x00",
        b"\x85",
        b"}(N",
        b"](K\x01u",
        b"}(]K\x01u",
        b"X\xff\x00\x00\x00a",
        b"Q",
        b"\xff",
        b"NQ",
    ],
)
def test_damaged_pickles_are_errors(write_pickle, body):
    with pytest.raises(ValueError, match=r"file\.pt is (truncated or damaged|refused)"):
        read_torch_file(write_pickle(body))


def test_truncated_and_other_files_are_errors(tmp_path):
    whole = (GOLDEN / "beats_tiny.pt").read_bytes()
    path = tmp_path / "file.pt"
    for data in (
        b"",
        b"PK",
        whole[:1000],
        whole[: len(whole) // 2],
        whole[:-30],
        b"version https://git-lfs",
        whole[100:],
    ):
        path.write_bytes(data)
        with pytest.raises(
            ValueError, match=r"is truncated or damaged, or no PyTorch checkpoint \(plain pickles are not"
        ):
            read_torch_file(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("notes.txt", "hello")
    with pytest.raises(ValueError, match=r"must hold one data\.pkl, got 0"):
        read_torch_file(path)
    with pytest.raises(FileNotFoundError):
        read_torch_file(tmp_path / "none.pt")


def test_random_damage_is_an_error_or_changes_values_and_nothing_else(tmp_path):
    whole = (GOLDEN / "torch_kinds.pt").read_bytes()
    rng, path, refused = np.random.default_rng(0), tmp_path / "file.pt", 0
    for _ in range(200):
        data = bytearray(whole)
        data[rng.integers(2600)] = rng.integers(256)  # the archive's headers and the pickle
        path.write_bytes(data)
        try:
            read_torch_file(path)
        except ValueError:
            refused += 1
    assert 50 < refused < 200


def test_a_file_cut_short_after_it_was_opened(write_pickle):
    path = write_pickle(tensor_instructions())
    tensor = read_torch_file(path)
    path.write_bytes(path.read_bytes()[: tensor.storage.start + 5])
    with pytest.raises(ValueError, match="is truncated: a tensor ends 19 bytes after the file"):
        np.asarray(tensor)


def test_damaged_compressed_numbers(write_pickle):
    numbers = np.random.default_rng(0).normal(size=5000).astype("<f4").tobytes()
    body = tensor_instructions(numbers=5000, shape=(5000,), strides=(1,))
    path = write_pickle(body, {"0": numbers}, compression=zipfile.ZIP_DEFLATED)
    tensor = read_torch_file(path)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 255
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"file\.pt is truncated or damaged"):
        np.asarray(tensor)


def examples():
    rng = np.random.default_rng(0)
    shared = rng.normal(size=(3, 4)).astype(np.float32)
    return {
        "cfg": {
            "zero": 0,
            "big": 2**40,
            "negative": -300,
            "rate": 0.5,
            "name": "é",
            "none": None,
            "on": True,
            "off": False,
        },
        "model": {
            "transposed": shared.T,
            "a": shared,
            "b": shared,
            "bfloat16": np.array([1.5, -2], ml_dtypes.bfloat16),
            "half": np.arange(3, dtype=np.float16),
            "double": rng.normal(size=(2, 1, 3)),
            "scalar": np.array(3, np.int64),
            "empty": np.zeros((0, 3), np.float32),
            "bool": np.array([True, False]),
        },
    }


def test_what_is_written_is_read_back(tmp_path):
    contents = examples()
    write_torch_file(tmp_path / "file.pt", contents)
    again = read_torch_file(tmp_path / "file.pt")
    assert again["cfg"] == contents["cfg"]
    assert list(again["model"]) == list(contents["model"])
    for name, value in contents["model"].items():
        array = np.asarray(again["model"][name])
        assert (array.dtype, array.shape) == (value.dtype, value.shape)
        np.testing.assert_array_equal(array, value)
        assert again["model"][name].storage.start % 64 == 0
    assert again["model"]["a"] == again["model"]["b"]
    assert os.listdir(tmp_path) == ["file.pt"]


def test_writing_takes_existing_files_only_when_asked_and_leaves_nothing_half_written(tmp_path):
    path = tmp_path / "file.pt"
    write_torch_file(path, {"a": np.zeros(2)})
    with pytest.raises(ValueError, match="path must not exist unless overwrite=True"):
        write_torch_file(path, {"a": np.ones(2)})
    before = path.read_bytes()
    for wrong, message in (
        ({"a": np.ones(2), "b": {"c": object()}}, r"contents\['b'\]\['c'\] must be an array"),
        ({"a": np.ones(2), "b": np.zeros(1, np.complex64)}, "dtype that PyTorch has, got complex64"),
        ({1: np.ones(2)}, "strings as keys, got 1"),
    ):
        with pytest.raises(TypeError, match=message):
            write_torch_file(path, wrong, overwrite=True)
        assert path.read_bytes() == before
    write_torch_file(path, {"a": np.ones(2)}, overwrite=True)
    np.testing.assert_array_equal(read_torch_file(path)["a"], 1)
    assert os.listdir(tmp_path) == ["file.pt"]


def test_the_pickle_written_is_plain(tmp_path):
    """PyTorch's own restricted reader knows these names."""
    write_torch_file(tmp_path / "file.pt", examples())
    with zipfile.ZipFile(tmp_path / "file.pt") as archive:
        assert archive.testzip() is None
        pickled = archive.read("archive/data.pkl")
    pickletools.dis(pickled, io.StringIO())  # raises if the stack is not as it should be
    names = {argument for opcode, argument, _ in pickletools.genops(pickled) if opcode.name == "GLOBAL"}
    storages = {f"torch {kind}Storage" for kind in ("Float", "BFloat16", "Half", "Double", "Long", "Bool")}
    assert names == {"torch._utils _rebuild_tensor_v2", "collections OrderedDict", *storages}


@pytest.mark.parity
def test_pytorch_reads_what_is_written(tmp_path):
    torch = pytest.importorskip("torch", reason="needs the packages that `make test-parity` installs")
    contents = examples()
    write_torch_file(tmp_path / "file.pt", contents)
    for options in ({}, {"mmap": True}):
        loaded = torch.load(tmp_path / "file.pt", weights_only=True, **options)
        assert loaded["cfg"] == contents["cfg"]
        for name, value in contents["model"].items():
            tensor = loaded["model"][name]
            if tensor.dtype == torch.bfloat16:
                tensor, value = tensor.float(), value.astype(np.float32)
            np.testing.assert_array_equal(tensor.numpy(), value)
            assert tensor.numpy().dtype == value.dtype
        assert loaded["model"]["a"].data_ptr() == loaded["model"]["b"].data_ptr()


@pytest.mark.parity
def test_what_pytorch_writes_is_read(tmp_path):
    torch = pytest.importorskip("torch", reason="needs the packages that `make test-parity` installs")
    module = torch.nn.Sequential(OrderedDict(first=torch.nn.Linear(3, 4), second=torch.nn.BatchNorm1d(4)))
    for options in ({}, {"pickle_protocol": 4}):
        torch.save(
            {"state_dict": module.state_dict(), "parameters": list(module.parameters())}, tmp_path / "f.pt", **options
        )
        contents = read_torch_file(tmp_path / "f.pt")
        assert list(contents["state_dict"]) == list(module.state_dict())
        for name, value in module.state_dict().items():
            np.testing.assert_array_equal(contents["state_dict"][name], value.numpy())
        np.testing.assert_array_equal(contents["parameters"][0], module.first.weight.detach().numpy())

"""Weight files of every kind, and everything that people take for one."""

import io
import json
import pickle
import sys
import zipfile

import numpy as np
import pytest
from safetensors.numpy import save_file

from mplug_jax.conversion.reading import read_weights
from mplug_jax.conversion.report import ConversionError
from mplug_jax.conversion.writing import write_weights

ARRAYS = {
    "a.weight": np.arange(6, dtype=np.float32).reshape(2, 3),
    "half": np.array([0.5, -2], np.float16),
    "double": np.array([0.1]),
    "scalar": np.array(3.5, np.float32),
    "ids": np.arange(4),
}


def check(tensors) -> None:
    assert tensors.keys() == ARRAYS.keys()
    for name, array in ARRAYS.items():
        want = array if array.dtype.kind == "i" else array.astype(np.float32)
        assert (tensors[name].dtype, tensors[name].shape) == (want.dtype, want.shape)
        np.testing.assert_array_equal(tensors[name], want)


def test_safetensors(tmp_path):
    save_file(ARRAYS, tmp_path / "w.safetensors")
    check(read_weights(tmp_path / "w.safetensors").tensors)


def test_numpy_archive(tmp_path):
    np.savez(tmp_path / "w.npz", **ARRAYS)
    check(read_weights(str(tmp_path / "w.npz")).tensors)


def test_bfloat16(tmp_path):
    """Two values written byte by byte: 1.5 and -2 are 0x3fc0 and 0xc000."""
    header = json.dumps({"x": {"dtype": "BF16", "shape": [2], "data_offsets": [0, 4]}}).encode()
    data = len(header).to_bytes(8, "little") + header + b"\xc0\x3f\x00\xc0"
    (tmp_path / "w.safetensors").write_bytes(data)
    x = read_weights(tmp_path / "w.safetensors").tensors["x"]
    assert x.dtype == np.float32 and x.tolist() == [1.5, -2]


def test_a_header_length_that_looks_like_a_web_page(tmp_path):
    """The first byte of a safetensors file may be '<' or '{'."""
    for first in b"<{":
        header = json.dumps({"x": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}}).encode()
        header = header.ljust(first)
        (tmp_path / "w").write_bytes(len(header).to_bytes(8, "little") + header + b"\7")
        assert read_weights(tmp_path / "w").tensors["x"].tolist() == [7]


def test_torch_files(tmp_path):
    torch = pytest.importorskip("torch")
    state = {name: torch.from_numpy(np.array(array)) for name, array in ARRAYS.items()}
    for wrapped, notes in (
        (state, []),
        (
            {"model": state, "optimizer": {"lr": 1.0}, "epoch": 3},
            ["state dict found under 'model'", "not read: epoch, optimizer beside it"],
        ),
        ({"module": state}, ["state dict found under 'module'"]),
        (
            {f"module.{name}": tensor for name, tensor in state.items()},
            ["'module.' removed from every name"],
        ),
    ):
        for modern in (True, False):
            torch.save(wrapped, tmp_path / "w.pth", _use_new_zipfile_serialization=modern)
            weights = read_weights(tmp_path / "w.pth")
            check(weights.tensors)
            assert weights.notes == notes
    torch.save({"x": torch.tensor([1.5]).bfloat16(), "step": 7}, tmp_path / "w.bin")
    weights = read_weights(tmp_path / "w.bin")
    assert weights.tensors["x"].dtype == np.float32 and weights.tensors["x"] == 1.5
    assert weights.notes == ["not tensors, not read: step"]


def test_torchscript_archive(tmp_path):
    torch = pytest.importorskip("torch")
    linear = torch.nn.Linear(3, 2).half()
    torch.jit.script(linear).save(str(tmp_path / "clip.pt"))
    tensors = read_weights(tmp_path / "clip.pt").tensors
    np.testing.assert_array_equal(tensors["weight"], linear.weight.detach().float().numpy())
    assert tensors["bias"].dtype == np.float32


def test_no_pickle_is_executed(tmp_path):
    pytest.importorskip("torch")

    class Evil:
        def __reduce__(self):
            return exec, (f"open({str(tmp_path / 'pwned')!r}, 'w')",)

    for content in ({"model": Evil()}, {"args": Evil(), "model": {}}):
        (tmp_path / "w.pth").write_bytes(pickle.dumps(content))
        with pytest.raises(ConversionError, match="unpickling runs code"):
            read_weights(tmp_path / "w.pth")
    np.savez(tmp_path / "w.npz", x=np.array([Evil()], object))
    with pytest.raises(ConversionError, match="no archive of plain arrays"):
        read_weights(tmp_path / "w.npz")
    assert not (tmp_path / "pwned").exists()


def test_a_torch_file_without_torch(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    (tmp_path / "w.pth").write_bytes(pickle.dumps({"x": 1}))
    with pytest.raises(ConversionError, match=r"w\.pth needs PyTorch.*pip install torch"):
        read_weights(tmp_path / "w.pth")


def safetensors_bytes(tmp_path) -> bytes:
    save_file(ARRAYS, tmp_path / "whole.safetensors")
    return (tmp_path / "whole.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (b"", "is empty"),
        (b"\n<!DOCTYPE html><html>", "is a web page"),
        (b"version https://git-lfs.github.com/spec/v1\n", "is a Git LFS pointer.*git lfs pull"),
        (b'{"error": "Entry not found"}', "is a JSON text"),
        (b"Entry not found", "begins with b'Entry no'"),
        (b"PK\x03\x04" + bytes(50), "damaged or truncated archive"),
        ((2**40).to_bytes(8, "little") + b"{}", "begins with"),
        ((10**6).to_bytes(8, "little") + b"{}", "truncated: its header alone has 1,000,000 bytes"),
        ((2).to_bytes(8, "little") + b"{}", "holds no tensors"),
        ((4).to_bytes(8, "little") + b"{x!}", "damaged safetensors header"),
    ],
)
def test_what_is_no_weights(tmp_path, content, what):
    path = tmp_path / "w.pth"
    path.write_bytes(content)
    with pytest.raises(ConversionError, match=what) as error:
        read_weights(path)
    text = str(error.value)
    assert str(path) in text and f"({len(content)} bytes)" in text
    assert "expected a .safetensors, .npz, .pth" in text


@pytest.mark.parametrize("lost", [1, 40])
def test_a_truncated_file(tmp_path, lost):
    (tmp_path / "w.safetensors").write_bytes(safetensors_bytes(tmp_path)[:-lost])
    with pytest.raises(ConversionError, match="truncated: its tensors would end at byte"):
        read_weights(tmp_path / "w.safetensors")
    np.savez(tmp_path / "whole.npz", **ARRAYS)
    (tmp_path / "w.npz").write_bytes((tmp_path / "whole.npz").read_bytes()[:-lost])
    with pytest.raises(ConversionError, match="damaged or truncated archive"):
        read_weights(tmp_path / "w.npz")


def test_tensors_that_do_not_fill_their_shape(tmp_path):
    header = json.dumps({"x": {"dtype": "F32", "shape": [9], "data_offsets": [0, 4]}}).encode()
    (tmp_path / "w").write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    with pytest.raises(ConversionError, match="no valid safetensors file"):
        read_weights(tmp_path / "w")


TEN_TERABYTES = (2_500_000, 1_000_000)


def test_a_tensor_of_ten_terabytes_in_safetensors(tmp_path):
    """The same header with bytes to match is cut off, and with few bytes it does not fit them."""
    for end, what in (
        (10**13, "truncated: its tensors would end at byte 10,000,"),
        (4, "no valid"),
    ):
        entry = {"dtype": "F32", "shape": TEN_TERABYTES, "data_offsets": [0, end]}
        header = json.dumps({"x": entry}).encode()
        (tmp_path / "w").write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
        with pytest.raises(ConversionError, match=what):
            read_weights(tmp_path / "w")


@pytest.mark.parametrize("version", [(1, 0), (2, 0)])
def test_an_array_of_ten_terabytes(tmp_path, version):
    head = io.BytesIO()
    described = {"descr": "<f4", "fortran_order": False, "shape": TEN_TERABYTES}
    write = {1: np.lib.format.write_array_header_1_0, 2: np.lib.format.write_array_header_2_0}
    write[version[0]](head, described)
    with zipfile.ZipFile(tmp_path / "w.npz", "w") as archive:
        archive.writestr("x.npy", head.getvalue() + bytes(12))
    with pytest.raises(ConversionError, match=r"declares 10,000,.* for x\.npy, which has 12;"):
        read_weights(tmp_path / "w.npz")


def test_an_archive_that_would_unpack_to_terabytes(tmp_path):
    """As its directory says; the bytes need not be there for that."""
    with zipfile.ZipFile(tmp_path / "w.npz", "w") as archive:
        archive.writestr("x.npy", b"x")
        archive.filelist[0].file_size = 10**13
    with pytest.raises(ConversionError, match=r"would unpack to 10,000,000,000,000 bytes"):
        read_weights(tmp_path / "w.npz")


def test_a_compressed_archive_of_zeros_is_read(tmp_path):
    np.savez_compressed(tmp_path / "w.npz", x=np.zeros(10**6, np.float32))
    assert not read_weights(tmp_path / "w.npz").tensors["x"].any()


def test_a_tensor_that_repeats_one_number_for_ever(tmp_path):
    torch = pytest.importorskip("torch")
    torch.save({"x": torch.zeros(1).expand(TEN_TERABYTES)}, tmp_path / "w.pth")
    with pytest.raises(ConversionError, match=r"declares 10,000,.* for x, which has 4;"):
        read_weights(tmp_path / "w.pth")


def test_an_archive_of_something_else(tmp_path):
    with zipfile.ZipFile(tmp_path / "w.zip", "w") as archive:
        archive.writestr("readme.txt", "hello")
    with pytest.raises(ConversionError, match=r"is an archive of readme\.txt"):
        read_weights(tmp_path / "w.zip")


def test_a_missing_file(tmp_path):
    with pytest.raises(ConversionError, match="cannot be read: No such file"):
        read_weights(tmp_path / "w.pth")
    with pytest.raises(ConversionError, match="cannot be read: Is a directory"):
        read_weights(tmp_path)


def test_writing(tmp_path):
    floats = {name: array.astype(np.float32) for name, array in ARRAYS.items()}
    for ending in ("safetensors", "pth"):
        if ending == "pth":
            pytest.importorskip("torch")
        path = tmp_path / "new" / f"w.{ending}"
        write_weights(path, floats)
        tensors = read_weights(path).tensors
        assert tensors.keys() == floats.keys()
        for name, array in floats.items():
            assert tensors[name].shape == array.shape
            np.testing.assert_array_equal(tensors[name], array)
    with pytest.raises(ConversionError, match=r"ends in \.safetensors or \.pth"):
        write_weights(tmp_path / "w.npz", floats)
    (tmp_path / "file").write_text("")
    with pytest.raises(ConversionError, match="cannot be written"):
        write_weights(tmp_path / "file" / "w.safetensors", floats)

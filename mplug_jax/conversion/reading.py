"""Weight files to NumPy arrays: safetensors, NumPy, PyTorch and ONNX, told apart by content.

Nothing that a file contains is ever executed: pickles are read by torch's restricted unpickler
(``weights_only=True``), NumPy archives without pickles.
"""

from __future__ import annotations

import importlib
import json
import math
import pickle
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import IO, Any, NamedTuple

import numpy as np
from safetensors import SafetensorError, safe_open

from mplug_jax.conversion.onnx_file import read_onnx
from mplug_jax.conversion.report import ConversionError
from mplug_jax.training.declared import implausible

EXPECTED = "a .safetensors, .npz, .pth, .pt, .bin or .onnx file with weights"
# What training scripts wrap a state dict in.
WRAPPERS = ("model", "module", "state_dict")
# Beginnings of what people save by mistake in place of weights.
IMPOSTORS = {
    b"version https://git-lfs": "a Git LFS pointer, not the file it stands for: run `git lfs pull`",
    b"<": "a web page (HTML or XML), perhaps the error page of a download",
    b"{": "a JSON text",
}


class Weights(NamedTuple):
    """Tensors by name (floats as float32), and notes on what else the file held."""

    tensors: dict[str, np.ndarray]
    notes: list[str]


def read_weights(path: str | Path) -> Weights:
    """Reads a file of weights.

    Raises:
      ConversionError: the file is missing, damaged, or holds something else; the message names it,
        its size and what was expected. Or the package that reads its kind is not installed.
    """
    path = Path(path)
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            start = file.read(64)
    except OSError as error:
        raise ConversionError(f"{path} cannot be read: {error.strerror}.") from error
    if not size:
        raise _refusal(path, "is empty")
    # The length of a safetensors header is a 64-bit number below 100 MB, so its bytes end in zeros.
    if start[4:9] == b"\0\0\0\0{":
        tensors, notes = _read_safetensors(path, size, int.from_bytes(start[:8], "little"))
    elif start[:4] == b"PK\x03\x04":
        tensors, notes = _read_zip(path)
    elif start[:1] == b"\x80":
        tensors, notes = _read_torch(path)
    elif path.suffix == ".onnx" and start[:1] == b"\x08":
        tensors, notes = read_onnx(path)
    else:
        like = [
            what for beginning, what in IMPOSTORS.items() if start.lstrip().startswith(beginning)
        ]
        raise _refusal(path, f"is {like[0]}" if like else f"begins with {start[:8]!r}")
    if not tensors:
        raise _refusal(path, "holds no tensors")
    return Weights({name: _float32(array) for name, array in tensors.items()}, notes)


def _torch(path: Path) -> ModuleType:
    try:
        return importlib.import_module("torch")
    except ImportError as error:
        raise ConversionError(
            f"Reading {path} needs PyTorch, which is not installed: pip install torch. (A copy of "
            "the weights in safetensors format needs none.)"
        ) from error


def _refusal(path: Path, what: str) -> ConversionError:
    return ConversionError(f"{path} ({path.stat().st_size:,} bytes) {what}; expected {EXPECTED}.")


def _float32(array: np.ndarray) -> np.ndarray:
    """Half and double precision as float32; integers as they are."""
    kind = array.dtype
    if kind == np.float32 or kind.kind in "iub":
        return array
    return array.astype(np.float32)


def _read_zip(path: Path) -> tuple[dict[str, np.ndarray], list[str]]:
    """NumPy's archive, torch's, or TorchScript's, all of which are zip files."""
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
    except zipfile.BadZipFile as error:
        raise _refusal(path, f"is a damaged or truncated archive ({error})") from error
    names = [member.filename for member in members]
    unpacked = sum(member.file_size for member in members)
    if implausible(unpacked, path.stat().st_size):
        raise _refusal(path, f"would unpack to {unpacked:,} bytes, which no file of weights does")
    if names and all(name.endswith(".npy") for name in names):
        return _read_numpy(path, members), []
    if any(name.endswith("/constants.pkl") for name in names):
        torch = _torch(path)
        try:
            module = torch.jit.load(str(path), map_location="cpu")
        except RuntimeError as error:
            raise _refusal(
                path, f"is a TorchScript archive that torch refuses ({error})"
            ) from error
        state = module.state_dict()
        for name, tensor in state.items():
            _check_tensor(path, name, tensor)
        return {k: _numpy(v) for k, v in state.items()}, ["TorchScript archive"]
    if any(name.endswith("/data.pkl") for name in names):
        return _read_torch(path)
    raise _refusal(path, f"is an archive of {', '.join(names[:3]) or 'nothing'}")


def _read_numpy(path: Path, members: list[zipfile.ZipInfo]) -> dict[str, np.ndarray]:
    try:
        with zipfile.ZipFile(path) as archive:
            for member in members:
                with archive.open(member) as file:
                    _check_array(path, member, file)
        with np.load(path, allow_pickle=False) as arrays:
            return dict(arrays)
    except (ValueError, EOFError, zlib.error, zipfile.BadZipFile) as error:
        raise _refusal(path, f"is no archive of plain arrays ({error})") from error


def _check_array(path: Path, member: zipfile.ZipInfo, file: IO[bytes]) -> None:
    """NumPy takes memory for what a header declares, and looks for the content only then."""
    major, _ = np.lib.format.read_magic(file)
    read = (
        np.lib.format.read_array_header_1_0 if major == 1 else np.lib.format.read_array_header_2_0
    )
    shape, _, kind = read(file)
    declared = math.prod(shape) * kind.itemsize
    held = member.file_size - file.tell()
    if declared > held and not kind.hasobject:
        raise _refusal(
            path, f"declares {declared:,} bytes for {member.filename}, which has {held:,}"
        )


def _read_torch(path: Path) -> tuple[dict[str, np.ndarray], list[str]]:
    torch = _torch(path)
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError) as error:
        reason = str(error).strip().splitlines()
        raise _refusal(
            path,
            "is damaged, or holds more than tensors and plain values, which is not read because "
            f"unpickling runs code (torch says: {reason[0][:200] if reason else error!r})",
        ) from error
    return _unwrapped(content, path, torch)


def _unwrapped(content: Any, path: Path, torch: Any) -> tuple[dict[str, np.ndarray], list[str]]:
    """The state dict inside ``{'model': …}`` or ``{'module': …}``, and what lay beside it."""
    notes = []
    if isinstance(content, Mapping):
        for key in WRAPPERS:
            if isinstance(content.get(key), Mapping):
                beside = sorted(str(k) for k in content if k != key)
                notes.append(f"state dict found under {key!r}")
                notes += [f"not read: {', '.join(beside)} beside it"] if beside else []
                content = content[key]
                break
    if not isinstance(content, Mapping) or not all(isinstance(k, str) for k in content):
        raise _refusal(path, f"holds a {type(content).__name__}, no tensors by name")
    for name, value in content.items():
        if isinstance(value, torch.Tensor):
            _check_tensor(path, name, value)
    tensors = {k: _numpy(v) for k, v in content.items() if isinstance(v, torch.Tensor)}
    others = sorted(k for k in content if k not in tensors)
    notes += [f"not tensors, not read: {', '.join(others)}"] if others else []
    if tensors and all(name.startswith("module.") for name in tensors):
        tensors = {name.removeprefix("module."): array for name, array in tensors.items()}
        notes.append("'module.' removed from every name")
    return tensors, notes


def _check_tensor(path: Path, name: str, tensor: Any) -> None:
    """A tensor may repeat one number for ever, at no cost until it is copied."""
    declared = tensor.numel() * tensor.element_size()
    held = tensor.untyped_storage().nbytes()
    if declared > held:
        raise _refusal(path, f"declares {declared:,} bytes for {name}, which has {held:,}")


def _numpy(tensor: Any) -> np.ndarray:
    tensor = tensor.detach()
    return (tensor.float() if tensor.is_floating_point() else tensor).numpy()


def _read_safetensors(
    path: Path, size: int, header_size: int
) -> tuple[dict[str, np.ndarray], list[str]]:
    if 8 + header_size > size:
        raise _refusal(path, f"is truncated: its header alone has {header_size:,} bytes")
    with open(path, "rb") as file:
        header = file.read(8 + header_size)[8:]
    try:
        ends = [v["data_offsets"][1] for k, v in json.loads(header).items() if k != "__metadata__"]
        end = 8 + header_size + max(ends, default=0)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise _refusal(path, f"has a damaged safetensors header ({error})") from error
    if end > size:
        raise _refusal(path, f"is truncated: its tensors would end at byte {end:,}")
    try:
        with safe_open(path, framework="numpy") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, []  # noqa: SIM118
    except (SafetensorError, TypeError) as error:
        raise _refusal(path, f"is no valid safetensors file ({error})") from error

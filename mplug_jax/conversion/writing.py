"""Tensors to a file that PyTorch code reads."""

from __future__ import annotations

import importlib
from pathlib import Path

from safetensors.numpy import save_file

from mplug_jax.conversion.report import ConversionError
from mplug_jax.conversion.transfer import Arrays


def write_weights(path: str | Path, tensors: Arrays) -> None:
    """Writes a .safetensors file, or a .pth with ``{'model': tensors}`` (needs torch).

    Raises:
      ConversionError: another ending, torch is missing, or the file cannot be written.
    """
    path = Path(path)
    if path.suffix not in (".safetensors", ".pth"):
        raise ConversionError(f"--out={path}: give a name that ends in .safetensors or .pth.")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".safetensors":
            save_file(tensors, path)
            return
        torch = importlib.import_module("torch")
        torch.save({"model": {k: torch.from_numpy(v.copy()) for k, v in tensors.items()}}, path)
    except ImportError as error:
        raise ConversionError(
            f"Writing {path} needs PyTorch (pip install torch); a .safetensors file needs none."
        ) from error
    except OSError as error:
        raise ConversionError(f"--out={path} cannot be written: {error.strerror}.") from error

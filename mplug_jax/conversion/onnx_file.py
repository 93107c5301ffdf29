"""Weights of an ONNX graph that was exported from a PyTorch module, under the module's names.

Exporters keep the names of biases and norms but transpose the kernels of linear layers and call
them ``onnx::MatMul_1966``; the bias that is added to the product gives the name back.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import numpy as np

from mplug_jax.conversion.report import ConversionError


def read_onnx(path: Path) -> tuple[dict[str, np.ndarray], list[str]]:
    """The initialisers of a graph by their PyTorch names, and notes.

    Raises:
      ConversionError: the onnx package is missing, or the file is no ONNX model.
    """
    try:
        onnx = importlib.import_module("onnx")
        damaged = importlib.import_module("google.protobuf.message").DecodeError
    except ImportError as error:
        message = f"Reading {path} needs the package onnx: pip install onnx."
        raise ConversionError(message) from error
    try:
        # Other files would be named by this one, and lie anywhere.
        graph = onnx.load(str(path), load_external_data=False).graph
        outside = [i.name for i in graph.initializer if i.data_location == i.EXTERNAL]
        held = {i.name: onnx.numpy_helper.to_array(i) for i in graph.initializer if not outside}
    except (damaged, ValueError, TypeError) as error:
        raise ConversionError(
            f"{path} ({path.stat().st_size:,} bytes) is damaged or no ONNX model ({error})."
        ) from error
    if outside:
        raise ConversionError(
            f"{path} keeps {len(outside)} tensors in other files ({outside[0]}, ...): load it with "
            "onnx.load and save it as one file."
        )
    tensors = {name: array for name, array in held.items() if not name.startswith("onnx::")}
    maker = {output: node for node in graph.node for output in node.output}
    named = dict.fromkeys(tensors)
    for node in graph.node:
        if node.op_type == "Add":
            biases = [i for i in node.input if i in tensors and i.endswith(".bias")]
            products = [maker[i] for i in node.input if i in maker]
            kernels = [n.input[1] for n in products if n.op_type == "MatMul" and n.input[1] in held]
            if biases and kernels:
                tensors[biases[0].removesuffix("bias") + "weight"] = held[kernels[0]].T
                named[kernels[0]] = None
    tensors |= _split_positions(graph, held, named)
    lost = [name for name in held if name not in named]
    notes = [f"ONNX graph: {len(named)} initialisers named"]
    notes += [f"without a PyTorch name, not read: {', '.join(lost)}"] if lost else []
    return tensors, notes


def _split_positions(
    graph: Any, held: dict[str, np.ndarray], named: dict[str, None]
) -> dict[str, np.ndarray]:
    """DINOv2's position table: folded into its class row and its patch rows when exported.

    ``concat(class row [1, 1, D], resize(reshape(patch rows [1, P, D])))`` inside ``…/embeddings/``.
    """
    tables: dict[str, np.ndarray] = {}
    for concat in graph.node:
        scope, found, _ = concat.name.rpartition("/embeddings/")
        first = held.get(concat.input[0]) if concat.op_type == "Concat" and found else None
        if first is None or concat.input[0] in named or first.shape[:2] != (1, 1):
            continue
        rows = [
            n.input[0]
            for n in graph.node
            if n.op_type == "Reshape"
            and n.name.startswith(f"{scope}/embeddings/")
            and n.input[0] in held
            and n.input[0] not in named
        ]
        if len(rows) == 1:
            prefix = scope.strip("/").replace("/", ".")
            name = f"{prefix}.embeddings.position_embeddings".removeprefix(".")
            tables[name] = np.concatenate([first, held[rows[0]]], axis=1)
            named.update(dict.fromkeys((concat.input[0], rows[0])))
    return tables

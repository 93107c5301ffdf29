"""Weights out of ONNX graphs as PyTorch exports them."""

import numpy as np
import pytest

from mplug_jax.conversion.onnx_file import read_onnx
from mplug_jax.conversion.report import ConversionError

onnx = pytest.importorskip("onnx")

RNG = np.random.default_rng(0)
KERNEL = RNG.normal(size=(5, 3)).astype(np.float32)  # as torch holds it, [out, in]
BIAS = RNG.normal(size=5).astype(np.float32)
POSITIONS = RNG.normal(size=(1, 5, 3)).astype(np.float32)


def write(path, with_bias=True):
    """y = x W + b, with DINOv2's positions folded into their class row and their patch rows."""
    node = onnx.helper.make_node
    nodes = [
        node("Reshape", ["onnx::Reshape_2", "shape"], ["rows"], name="/enc/embeddings/Reshape_1"),
        node("Concat", ["onnx::Concat_1", "rows"], ["table"], name="/enc/embeddings/Concat_6"),
        node("Add", ["x", "table"], ["embedded"], name="/enc/embeddings/Add"),
        node("MatMul", ["embedded", "onnx::MatMul_3"], ["product"], name="/enc/fc1/MatMul"),
    ]
    if with_bias:
        nodes.append(node("Add", ["enc.fc1.bias", "product"], ["y"], name="/enc/fc1/Add"))
    arrays = {
        "onnx::Concat_1": POSITIONS[:, :1],
        "onnx::Reshape_2": POSITIONS[:, 1:],
        "onnx::MatMul_3": KERNEL.T.copy(),
        "enc.fc1.bias": BIAS,
        "enc.norm.weight": BIAS[:3],
    }
    graph = onnx.helper.make_graph(
        nodes,
        "graph",
        [onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [1, 5, 3])],
        [onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, None)],
        [onnx.numpy_helper.from_array(array, name) for name, array in arrays.items()],
    )
    onnx.save(onnx.helper.make_model(graph), str(path))


def test_anonymous_kernels_get_the_name_of_their_bias(tmp_path):
    write(tmp_path / "m.onnx")
    tensors, notes = read_onnx(tmp_path / "m.onnx")
    assert set(tensors) == {
        "enc.fc1.weight",
        "enc.fc1.bias",
        "enc.norm.weight",
        "enc.embeddings.position_embeddings",
    }
    np.testing.assert_array_equal(tensors["enc.fc1.weight"], KERNEL)
    np.testing.assert_array_equal(tensors["enc.embeddings.position_embeddings"], POSITIONS)
    assert notes == ["ONNX graph: 5 initialisers named"]


def test_a_kernel_without_a_name_is_told(tmp_path):
    write(tmp_path / "m.onnx", with_bias=False)
    tensors, notes = read_onnx(tmp_path / "m.onnx")
    assert "enc.fc1.weight" not in tensors
    assert "without a PyTorch name, not read: onnx::MatMul_3" in notes


def test_a_truncated_graph(tmp_path):
    write(tmp_path / "m.onnx")
    data = (tmp_path / "m.onnx").read_bytes()
    (tmp_path / "m.onnx").write_bytes(data[:-20])
    with pytest.raises(ConversionError, match="damaged or no ONNX model"):
        read_onnx(tmp_path / "m.onnx")


def test_tensors_in_other_files_are_refused_and_the_files_not_opened(tmp_path):
    (tmp_path / "secret").write_bytes(BIAS.tobytes())
    write(tmp_path / "m.onnx")
    model = onnx.load(str(tmp_path / "m.onnx"))
    onnx.external_data_helper.set_external_data(model.graph.initializer[3], "../secret")
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub/m.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(ConversionError, match=r"keeps 1 tensors in other files \(enc\.fc1\.bias,"):
        read_onnx(tmp_path / "sub/m.onnx")


def test_a_tensor_of_ten_terabytes_without_content_is_refused(tmp_path):
    write(tmp_path / "m.onnx")
    model = onnx.load(str(tmp_path / "m.onnx"))
    model.graph.initializer[4].dims[:] = [2_500_000, 1_000_000]
    onnx.save(model, str(tmp_path / "m.onnx"))
    with pytest.raises(ConversionError, match="is damaged or no ONNX model"):
        read_onnx(tmp_path / "m.onnx")

"""The seam to the inference engine, the mapped weights, and what is said when files or the engine do not fit."""

import json
import sys

import numpy as np
import pytest
import safetensors.torch
import torch
from onnx import TensorProto, helper

from hosl.errors import ConfigError, FailureError, ModelError
from hosl.parties.edge import engine, half
from hosl.parties.edge.weights import MappedWeights
from hosl.split.reading.tensors import tensors_digest
from hosl.system.safetensors_file import arrays_digest, read_arrays, write_arrays


def _graph(path, node="Add", domain="", opset=20):
    """z = x + y, and w = x y, as a graph."""
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", 2]) for name in "xyzw"]
    nodes = [
        helper.make_node(node, ["x", "y"], ["z"], domain=domain),
        helper.make_node("Mul", ["x", "y"], ["w"]),
    ]
    graph = helper.make_graph(nodes, "g", values[:2], values[2:])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=9)
    path.write_bytes(model.SerializeToString())
    return path


def _one_line(error):
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_graph_is_a_function_of_arrays(tmp_path):
    graph = engine.open_graph(_graph(tmp_path / "g.onnx"))
    x, y = np.ones((3, 2), np.float32), np.full((3, 2), 2, np.float32)
    assert graph.inputs == {"x": (None, 2), "y": (None, 2)}
    assert graph.outputs == ("z", "w")
    found = graph({"x": x, "y": y, "not taken": x})
    np.testing.assert_array_equal(found["z"], x + y)
    assert graph({"x": x, "y": y}, ["w"]).keys() == {"w"}
    into = np.zeros((3, 2), np.float32)
    found = graph({"x": x, "y": y}, into={"z": into})
    assert found["z"] is into
    np.testing.assert_array_equal(into, x + y)
    np.testing.assert_array_equal(found["w"], x * y)
    y.flags.writeable = False  # as the pages of weights that are not trained
    np.testing.assert_array_equal(graph({"x": x, "y": y}, ["z"])["z"], x + y)


def test_a_sum_is_added_to_where_it_lies(tmp_path):
    graph = engine.open_graph(_graph(tmp_path / "g.onnx"))
    total, x = np.ones((3, 2), np.float32), np.full((3, 2), 2, np.float32)
    for _ in range(2):
        graph({"x": x, "y": total}, ["z"], into={"z": total})
    np.testing.assert_array_equal(total, np.full((3, 2), 5, np.float32))


def test_graphs_that_cannot_be_opened_are_refused_in_one_line(tmp_path):
    whole = _graph(tmp_path / "g.onnx")
    cut_short = tmp_path / "short.onnx"
    cut_short.write_bytes(whole.read_bytes()[:-40])
    cases = {
        cut_short: "short.onnx",
        tmp_path / "absent.onnx": "absent.onnx",
        _graph(tmp_path / "unknown.onnx", "NoSuchOperator"): "NoSuchOperator",
        _graph(tmp_path / "newer.onnx", opset=99): "onnxruntime",
    }
    for path, named in cases.items():
        with pytest.raises(ModelError) as refused:
            engine.open_graph(path)
        said = _one_line(refused)
        assert named in said
        assert "split the model again" in said


def test_inputs_that_do_not_fit_are_refused_in_one_line(tmp_path):
    graph = engine.open_graph(_graph(tmp_path / "g.onnx"))
    with pytest.raises(FailureError) as refused:
        graph({"x": np.ones((3, 5), np.float32), "y": np.ones((3, 2), np.float32)})
    assert "g.onnx" in _one_line(refused)


def test_an_absent_engine_is_named(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(ConfigError) as refused:
        engine.open_graph(tmp_path / "g.onnx")
    assert "hosl[edge]" in _one_line(refused)


def test_an_older_engine_is_refused(monkeypatch):
    monkeypatch.setattr(half, "engine_version", lambda: "1.9.2")
    with pytest.raises(ModelError) as refused:
        half.check_engine("1.18")
    assert "1.18" in _one_line(refused)
    for newer in ("1.18", "1.18.0", "1.20.0rc1", "2.0"):
        monkeypatch.setattr(half, "engine_version", lambda version=newer: version)
        half.check_engine("1.18")


@pytest.fixture
def stored(tmp_path):
    """A safetensors file, and its tensors."""
    generator = torch.Generator().manual_seed(0)
    tensors = {
        "wide": torch.randn(500, 40, generator=generator), "bf16": torch.randn(6, 4, generator=generator).bfloat16(),
        "f16": torch.randn(6, 4, generator=generator).half(), "scalar": torch.tensor(3.0),
        "int8": torch.arange(-6, 6, dtype=torch.int8).view(3, 4), "empty": torch.empty(0, 3),
    }  # fmt: skip
    safetensors.torch.save_file(tensors, tmp_path / "model.safetensors")
    return tmp_path / "model.safetensors", tensors


def test_mapped_weights_are_those_of_the_file(stored):
    file, tensors = stored
    weights = MappedWeights(file)
    assert weights.digest() == tensors_digest(tensors)
    for name, tensor in tensors.items():
        expected = tensor.numpy() if name == "int8" else tensor.float().numpy()
        np.testing.assert_array_equal(weights.array(name), expected)
        assert weights.array(name).dtype == expected.dtype
        if tensor.dim() == 2 and len(tensor):
            np.testing.assert_array_equal(weights.rows(name, np.array([2, 0, 2])), expected[[2, 0, 2]])


def test_only_trained_weights_are_written_and_the_file_never(stored):
    file, tensors = stored
    before, weights = file.read_bytes(), MappedWeights(file)
    with pytest.raises(ValueError, match="read-only"):
        weights.array("wide")[0] = 1.0
    for name in ("wide", "bf16"):
        trained = weights.trained_(name)
        assert trained.dtype == np.float32
        trained -= 1.0
    weights.release(list(tensors))
    np.testing.assert_array_equal(weights.array("wide"), tensors["wide"].numpy() - 1)
    np.testing.assert_array_equal(
        weights.rows("bf16", np.array([1])), tensors["bf16"].float().numpy()[[1]] - 1
    )
    np.testing.assert_array_equal(weights.array("f16"), tensors["f16"].float().numpy())
    assert file.read_bytes() == before
    np.testing.assert_array_equal(MappedWeights(file).array("wide"), tensors["wide"].numpy())


def test_damaged_weights_are_refused_in_one_line(stored, tmp_path):
    whole = stored[0].read_bytes()
    length = int.from_bytes(whole[:8], "little")
    header = json.loads(whole[8 : 8 + length])
    header["wide"]["data_offsets"][1] += 4
    lying = json.dumps(header).encode()
    cases = [
        b"", whole[:7], whole[:200], whole[:-1], b"\xff" * 8 + whole[8:], len(lying).to_bytes(8, "little") + lying,
        whole[:8] + b"[" * length + whole[8 + length :],
    ]  # fmt: skip
    for number, content in enumerate(cases):
        file = tmp_path / f"{number}.safetensors"
        file.write_bytes(content)
        with pytest.raises(ModelError) as refused:
            MappedWeights(file)
        assert file.name in _one_line(refused)
    with pytest.raises(ModelError):
        MappedWeights(tmp_path / "absent.safetensors")


def test_arrays_are_written_as_torch_reads_them(stored, tmp_path):
    tensors = {name: tensor for name, tensor in stored[1].items() if name != "bf16"}
    arrays = {name: tensor.numpy() for name, tensor in tensors.items()}
    write_arrays(tmp_path / "arrays.safetensors", arrays)
    found = safetensors.torch.load_file(tmp_path / "arrays.safetensors")
    assert tensors_digest(found) == tensors_digest(tensors) == arrays_digest(arrays)
    again = read_arrays(stored[0])
    np.testing.assert_array_equal(again["bf16"], stored[1]["bf16"].float().numpy())
    for name, array in arrays.items():
        np.testing.assert_array_equal(again[name], array)

"""The choice of a device's runtime, what a run is told when it moves, and the arrays of the wire."""

import inspect

import numpy as np
import pytest
import torch

from hosl.network import onnx_runtime, runtime, torch_runtime
from hosl.parties.edge.memory import ProcessMemory
from hosl.parties.remote.packing import Arrays
from hosl.system.machine import machine, process_peak_bytes
from hosl.wire.tensors import WireArray


@pytest.fixture
def installed(monkeypatch):
    """`installed("torch")`: only these engines are."""

    def only(*names):
        monkeypatch.setattr(runtime, "_installed", lambda name: name in names)

    return only


@pytest.fixture
def half(tmp_path):
    """A folder with graphs."""
    (tmp_path / "onnx").mkdir()
    (tmp_path / "onnx" / "runtime.json").write_text("{}")
    return tmp_path


CHOICES = [
    # asked, of the run so far, installed, chosen
    (None, None, ("torch", "onnx"), "torch"),
    (None, None, ("onnx",), "onnx"),
    (None, "onnx", ("torch", "onnx"), "onnx"),
    (None, "torch", ("torch", "onnx"), "torch"),
    (None, "torch", ("onnx",), "onnx"),
    (None, "of-tomorrow", ("torch", "onnx"), "torch"),
    ("torch", "onnx", ("torch", "onnx"), "torch"),
    ("onnx", None, ("torch", "onnx"), "onnx"),
]


@pytest.mark.parametrize(("asked", "before", "there", "chosen"), CHOICES)
def test_a_runtime_is_the_one_asked_for_then_the_runs_own_then_torch(
    half, installed, asked, before, there, chosen
):
    installed(*there)
    record = {} if before is None else {"runtime": {"name": before}}
    assert chosen == runtime.open_runtime(asked, half, record).NAME


def test_both_runtimes_have_the_names_that_are_called():
    for module in (torch_runtime, onnx_runtime):
        assert isinstance(module, Arrays)
        assert [name for name in module.__all__ if not hasattr(module, name)] == []
    assert set(torch_runtime.__all__) == set(onnx_runtime.__all__)
    for name in (
        "check_before_data",
        "check_before_run",
        "open_client",
        "open_head",
        "put_client",
        "memory_meter",
    ):
        ours, theirs = (inspect.signature(getattr(m, name)).parameters for m in (onnx_runtime, torch_runtime))
        assert list(ours) == list(theirs), name


def test_a_run_that_stays_where_it_was_is_told_nothing():
    engine, here = onnx_runtime.engine(), machine()
    assert runtime.what_differs({}, onnx_runtime) is None
    assert runtime.what_differs({"machine": here}, onnx_runtime) is None  # begun by an earlier version
    record = {"runtime": {"name": "onnx", "engine": engine}, "machine": here}
    assert runtime.what_differs(record, onnx_runtime) is None


@pytest.mark.parametrize(
    ("engine", "place", "says"),
    [
        ("onnxruntime 1.18.0", {}, "by onnxruntime 1.18.0 on "),
        (None, {"processor": "Cortex-A76"}, ", Cortex-A76 so far and goes on by onnxruntime "),
        ("torch 2.10.0", {"system": "Linux aarch64"}, "by torch 2.10.0 on Linux aarch64"),
    ],
)
def test_a_run_that_moves_is_told_in_one_line_what_differs(engine, place, says):
    record = {"runtime": {"engine": engine or onnx_runtime.engine()}, "machine": machine() | place}
    line = runtime.what_differs(record, onnx_runtime)
    assert line is not None
    assert says in line
    assert "\n" not in line


def test_arrays_of_the_wire_are_float32_and_bfloat16_is_widened():
    numbers = np.arange(6, dtype=np.float32).reshape(1, 2, 3)
    sent = onnx_runtime.to_wire(numbers)
    assert sent.dtype == "float32"
    assert np.shares_memory(sent.data, numbers)
    assert np.shares_memory(onnx_runtime.from_wire(sent), numbers)
    half = torch.randn(1, 2, 3, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    bits = WireArray(half.view(torch.int16).numpy().view(np.uint16), "bfloat16")
    assert (onnx_runtime.from_wire(bits) == half.float().numpy()).all()
    every_other = onnx_runtime.to_wire(numbers[:, :, ::2])
    assert every_other.data.flags.c_contiguous


def test_the_peak_of_a_call_is_its_own_and_that_of_the_process_is_remembered():
    before = process_peak_bytes()
    meter = ProcessMemory()
    meter.watch(lambda: np.ones(40 << 20, np.uint8).sum())
    first = meter.peak_bytes
    assert first - meter.static_bytes > 30 << 20
    again = ProcessMemory()
    again.watch(lambda: None)
    assert again.peak_bytes < first - (30 << 20)
    assert process_peak_bytes() >= max(before, first)


def test_a_meter_begins_at_what_the_process_had_before():
    whole = ProcessMemory()
    assert ProcessMemory(whole.static_bytes).static_bytes < 1 << 20
    assert ProcessMemory(1 << 50).peak_bytes == 0

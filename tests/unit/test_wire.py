"""Arrays and targets on the wire: the same bits back, compression within its promise, lies refused; golden bytes."""

import subprocess
import sys
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hosl.config import ClientsConfig, Config, ZOConfig
from hosl.core.directions import DISTRIBUTIONS
from hosl.core.methods import METHODS
from hosl.core.targets import ClassTargets, OptionTargets, PositionTargets, RowPositionTargets
from hosl.errors import HoslError, LimitError, WireError
from hosl.network.handshake import config_of, training_message
from hosl.parties.remote.torch_wire import from_wire, to_wire
from hosl.wire import hosl_pb2 as pb
from hosl.wire.enums import from_enum, to_enum
from hosl.wire.targets import (
    positions_from_message,
    positions_to_message,
    targets_from_message,
    targets_to_message,
)
from hosl.wire.tensors import Unpacking, WireArray, lone_chunk, pack, packed_bytes

ROOT = Path(__file__).parents[2]


def _sent(array, compression, noise=""):
    packed = pack(array, compression, noise=noise)
    arriving = Unpacking(pb.Tensor.FromString(packed.header.SerializeToString()), tensor_bytes=1 << 24)
    for chunk in packed.chunks():
        arriving.add(chunk)
    assert packed.size_bytes == packed_bytes(array.data.shape, array.dtype, compression)
    return arriving.array()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_tensors_come_back_bit_for_bit(dtype):
    tensor = torch.randn(3, 7, 5, generator=torch.Generator().manual_seed(0)).to(dtype)
    assert torch.equal(from_wire(_sent(to_wire(tensor), "none")), tensor)


def test_bf16_rounds_as_torch_does():
    values = torch.randn(4, 9, 33, generator=torch.Generator().manual_seed(1)) * 10
    assert torch.equal(from_wire(_sent(to_wire(values), "bf16")), values.to(torch.bfloat16).to(torch.float32))


def test_int8_is_unbiased_and_within_one_step_of_its_scale():
    values = np.random.default_rng(2).standard_normal((2, 3, 64)).astype(np.float32)
    scales = np.abs(values).max(axis=-1, keepdims=True) / 127
    tries = np.stack([_sent(WireArray(values, "float32"), "int8", noise=str(n)).data for n in range(400)])
    assert (np.abs(tries - values) <= scales * 1.001).all()
    standard_error = (
        scales / 2 / np.sqrt(400)
    )  # rounding to two neighbours has a deviation of half a step at most
    assert (np.abs(tries.mean(axis=0) - values) < 5 * standard_error).all()


def test_the_same_noise_rounds_a_pair_alike():
    values = WireArray(np.random.default_rng(3).standard_normal((2, 3, 16)).astype(np.float32), "float32")
    assert np.array_equal(_sent(values, "int8", noise="a").data, _sent(values, "int8", noise="a").data)
    assert not np.array_equal(_sent(values, "int8", noise="a").data, _sent(values, "int8", noise="b").data)


def test_zeros_survive_int8():
    zeros = WireArray(np.zeros((1, 2, 8), np.float32), "float32")
    assert not _sent(zeros, "int8").data.any()


@pytest.mark.parametrize(
    ("shape", "error"),
    [
        ((1 << 12, 1 << 12, 1 << 12), LimitError),
        ((0, 4, 4), WireError),
        ((4, 4), WireError),
        ((1, 1, 1, 1), WireError),
    ],
)
def test_a_shape_is_refused_before_anything_is_allocated(shape, error):
    with pytest.raises(error):
        Unpacking(pb.Tensor(shape=shape, dtype=pb.FLOAT32), tensor_bytes=1 << 20)


@given(st.binary(max_size=200))
def test_no_bytes_make_a_header_do_more_than_refuse(data):
    try:
        header = pb.Tensor.FromString(data)
    except Exception:
        return  # the library's own refusal
    with suppress(HoslError):
        Unpacking(header, tensor_bytes=1 << 16).add(b"x")


def test_targets_come_back():
    mask = np.array([[1, 1, 0], [1, 1, 1]], np.int8)
    classes = ClassTargets(mask, np.array([4, 0]))
    options = OptionTargets(mask, np.array([[0, 1], [1, 0]], np.int32), np.array([[7, 9], [3, -1]], np.int32))
    by_token = replace(options, mean_over="tokens")
    for targets in (classes, options, by_token):
        message = pb.Targets.FromString(targets_to_message(targets).SerializeToString())
        back = targets_from_message(message, (2, 3, 8))
        for name in targets.__slots__:
            assert np.array_equal(getattr(back, name), getattr(targets, name))


def test_every_name_of_an_enum_comes_back():
    for kind, name in (
        (pb.Method, "hosl-gradient"),
        (pb.Compression, "int8"),
        (pb.Labels, "client"),
        (pb.Distribution, "sphere"),
    ):
        assert from_enum(kind, to_enum(kind, name)) == name


def test_the_bytes_of_a_question_never_change():
    """Wire protocol 1. A change needs a new protocol number and a decision record."""
    question = pb.Upload(
        step=pb.AskStep(
            where=pb.Where(session="ab.1", step=7), activations=pb.Tensor(shape=[2, 3, 4], dtype=pb.FLOAT32),
            targets=targets_to_message(ClassTargets(np.ones((2, 3), np.int8), np.array([1, 0]))), want_gradient=True,
        )
    )  # fmt: skip
    golden = "32260a080a0461622e31100712070a0302030410011a0f0a07080210031a013f12040a0201002001"
    assert question.SerializeToString().hex() == golden


def test_the_bytes_of_positions_never_change():
    """The first form is that of version 0.2; the second has each row's own."""
    mask = np.ones((2, 3), np.int8)
    asked = PositionTargets(mask, np.array([0, 2]))
    by_row = RowPositionTargets(mask, np.array([[0, 1, 1], [0, 0, 1]], np.int8))
    assert positions_to_message(asked).SerializeToString().hex() == "0a07080210031a013f12020002"
    assert positions_to_message(by_row).SerializeToString().hex() == "0a07080210031a013f1a07080210031a0126"
    for targets in (asked, by_row):
        back = positions_from_message(positions_to_message(targets), (2, 3, 8))
        assert type(back) is type(targets)
        assert all(np.array_equal(getattr(back, n), getattr(targets, n)) for n in targets.__slots__)


@pytest.mark.parametrize(
    "lie",
    [
        {"scored": pb.Mask(rows=2, seq=3, bits=b"\x07")},  # none in the second row
        {"scored": pb.Mask(rows=2, seq=4, bits=b"\xff")},
        {"scored": pb.Mask(rows=2, seq=3, bits=b"\x3f"), "positions": [1]},
        {"positions": [2, 1]},
        {},
    ],
)
def test_positions_that_do_not_fit_are_refused(lie):
    with pytest.raises(WireError):
        positions_from_message(pb.Positions(mask=pb.Mask(rows=2, seq=3, bits=b"\x3f"), **lie), (2, 3, 8))


def test_the_generated_messages_are_those_of_the_proto(tmp_path):
    command = [
        sys.executable, "-m", "grpc_tools.protoc", f"-I{ROOT / 'proto/hosl/v1'}", f"--python_out={tmp_path}",
        f"--pyi_out={tmp_path}", str(ROOT / "proto/hosl/v1/hosl.proto"),
    ]  # fmt: skip
    subprocess.run(command, check=True)
    for name in ("hosl_pb2.py", "hosl_pb2.pyi"):
        assert (tmp_path / name).read_text() == (ROOT / "src/hosl/wire" / name).read_text(), (
            f"{name}: run make proto"
        )


def test_no_field_can_carry_text_or_token_ids():
    """Strings are names, digests and versions; integers beside the targets are sizes, seeds, steps and positions."""
    from google.protobuf.descriptor import FieldDescriptor

    allowed = {
        "HelloRequest.run", "HelloRequest.version", "Model.family", "Model.base_digest", "Model.client_digest",
        "Model.server_digest", "Lora.target_modules", "HelloReply.session", "HelloReply.client", "Where.session",
        "Training.labels_digest", "AskGenerate.run", "AskGenerate.version", "GenerateReady.run",
        "HalfRequest.run", "HalfRequest.list_digest", "HalfTensor.name", "HalfTensor.dtype",
        "Given.run",
    }  # fmt: skip
    found = {
        f"{message.name}.{field.name}"
        for message in pb.DESCRIPTOR.message_types_by_name.values()
        for field in message.fields
        if field.type == FieldDescriptor.TYPE_STRING
    }
    assert found == allowed


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_every_law_of_directions_has_a_name_on_the_wire(distribution):
    agreed = training_message(Config(zo=ZOConfig(distribution=distribution)))
    assert (
        config_of(pb.Model(family="bert", dtype=pb.FLOAT32), agreed, device="cpu").zo.distribution
        == distribution
    )


@pytest.mark.parametrize("method", METHODS)
def test_a_server_knows_every_method_or_its_twin(method):
    agreed = training_message(Config(method=method))
    twins = {"fo-recompute": "fo-fo", "hosl-residual": "hosl-gradient", "hosl-node": "hosl-gradient"}
    served = config_of(pb.Model(family="bert", dtype=pb.FLOAT32), agreed, device="cpu")
    assert served.method == twins.get(method, method)


@given(st.binary(max_size=300), st.sampled_from([pb.Upload, pb.GenerateRequest]))
def test_a_chunk_read_in_place_is_the_one_that_protobuf_reads(chunk, kind):
    message = kind(chunk=chunk).SerializeToString()
    assert lone_chunk(message, kind) == chunk
    assert bytes(lone_chunk(message, kind)) == kind.FromString(message).chunk


@given(st.binary(max_size=40), st.sampled_from([pb.Upload, pb.GenerateRequest]))
def test_what_is_no_lone_chunk_is_left_to_protobuf(message, kind):
    chunk = lone_chunk(message, kind)
    if chunk is not None:
        assert kind.FromString(message) == kind(chunk=bytes(chunk))


def test_other_messages_are_no_lone_chunk():
    ask = pb.Upload(losses=pb.AskLosses(where=pb.Where(session="s", step=1)))
    whole = pb.Upload(chunk=bytes(1 << 19)).SerializeToString()
    for message in (b"", ask.SerializeToString(), whole[:-1], whole + b"\0", whole[:1], whole[:2]):
        assert lone_chunk(message, pb.Upload) is None


def test_a_tensor_is_the_same_however_it_is_cut_into_chunks():
    values = np.random.Generator(np.random.Philox(key=3)).standard_normal((8, 64, 256), np.float32)
    packed = pack(WireArray(values, "float32"), "none")
    sent = b"".join(packed.chunks())
    for sizes in ([len(sent)], [1 << 17] * 4, [7, 1 << 16, 1, len(sent) - (1 << 16) - 8]):
        arriving, begin = Unpacking(packed.header, tensor_bytes=1 << 24), 0
        for size in sizes:
            arriving.add(sent[begin : begin + size])
            begin += size
        np.testing.assert_array_equal(arriving.array().data, values)


def test_a_server_takes_more_devices_than_could_have_directions_of_their_own():
    config = Config(
        method="hosl", zo=ZOConfig(directions=10),
        clients=ClientsConfig(count=1000, halves="shared", schedule="synchronous", directions="common"),
    )  # fmt: skip
    model = pb.Model(dtype=pb.FLOAT32, cut=2, labels=pb.LABELS_AT_SERVER)
    assert config_of(model, training_message(config), device="cpu").clients.count == 1000

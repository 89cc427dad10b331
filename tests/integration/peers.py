"""A client that speaks the wire by hand: what an honest one says, and what a broken or malicious one might."""

import grpc
import numpy as np

from hosl.transport.channel import SERVICE
from hosl.transport.join_line import JoinLine
from hosl.transport.status import ERROR_KEY
from hosl.wire import hosl_pb2 as pb
from hosl.wire.tensors import WireArray, pack

WIDTH, ROWS, SEQ = 32, 3, 5


class Peer:
    """Raw calls to a server that was started with --plaintext."""

    def __init__(self, line, model, training=None, run="by-hand"):
        self.line = JoinLine.parse(line)
        self.channel = grpc.insecure_channel(self.line.address)
        self.model, self.run, self.session = model, run, ""
        self.training = training or pb.Training(
            method=pb.HOSL, distribution=pb.GAUSSIAN, trainable=pb.ALL, learning_rate=1e-3, max_steps=1000, clients=1,
            optimiser=pb.Optimiser(name=pb.SGD), lora=pb.Lora(r=8, alpha=16), grace_s=5.0,
        )  # fmt: skip

    def call(self, call, frames, *, token=None, timeout=30):
        """All answers to raw `frames`; raises grpc.RpcError."""
        stub = self.channel.stream_stream(f"/{SERVICE}/{call}")
        metadata = (("authorization", f"Bearer {token or self.line.token}"),)
        return list(stub(iter(frames), metadata=metadata, timeout=timeout))

    def refusal(self, call, frames, **how):
        """The name and the text of the error that `frames` must meet."""
        try:
            self.call(call, frames, **how)
        except grpc.RpcError as failed:
            named = dict(failed.trailing_metadata() or ()).get(ERROR_KEY)
            return named, failed.details()
        raise AssertionError(f"{call} was answered")

    def hello(self, **changed):
        """A Hello as bytes."""
        request = pb.HelloRequest(
            protocol=1, run=self.run, model=self.model, training=self.training, restorable=[0]
        )
        for name, value in changed.items():
            if isinstance(value, int | str):
                setattr(request, name, value)
            else:
                getattr(request, name).CopyFrom(value)
        return [request.SerializeToString()]

    def greet(self, **changed):
        """Say hello; keeps the session."""
        (answer,) = self.call("Hello", self.hello(**changed))
        reply = pb.HelloReply.FromString(answer)
        self.session = reply.session
        return reply

    def upload(
        self,
        kind,
        *,
        step=1,
        count=1,
        shape=(ROWS, SEQ, WIDTH),
        values=None,
        targets=None,
        chunks=None,
        **more,
    ):
        """A question with its activations, as a list of messages in bytes."""
        data = (
            np.random.default_rng(0).standard_normal(shape).astype(np.float32) if values is None else values
        )
        packed = [pack(WireArray(data, "float32"), "none") for _ in range(count)]
        rows, seq = data.shape[:2]
        targets = targets or pb.Targets(
            mask=pb.Mask(rows=rows, seq=seq, bits=b"\xff" * (-(-rows * seq // 8))),
            classes=pb.Classes(labels=[0] * rows),
        )
        many = kind in ("losses", "probe")
        ask = {
            "losses": pb.AskLosses, "probe": pb.AskProbe, "step": pb.AskStep, "scores": pb.AskScores,
            "gradient": pb.AskGradient,
        }[kind](
            where=pb.Where(session=self.session, step=step), targets=targets,
            activations=[p.header for p in packed] if many else packed[0].header, **more,
        )  # fmt: skip
        sent = chunks if chunks is not None else [chunk for p in packed for chunk in p.chunks()]
        frames = [pb.Upload(**{kind: ask}), *(pb.Upload(chunk=chunk) for chunk in sent)]
        return [frame.SerializeToString() for frame in frames]


def model_of(facts):
    """The model message of a half.json."""
    return pb.Model(
        family=facts["family"], cut=facts["cut"], base_digest=facts["base_digest"], dtype=pb.FLOAT32,
        client_digest=facts["client_digest"], server_digest=facts["server_digest"],
    )  # fmt: skip


def refused_as(peer, call, frames):
    """The name of the error that `frames` meet; None where they are answered."""
    try:
        peer.call(call, frames)
    except grpc.RpcError as failed:
        named = dict(failed.trailing_metadata() or ()).get(ERROR_KEY)
        if not named:
            raise AssertionError(
                f"{call} was refused without a name: {failed.code()} {failed.details()}"
            ) from None
        return named
    return None

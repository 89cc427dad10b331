"""A server that a test writes by hand: it answers every call as an honest one would, but for those that it is told."""

import math
from concurrent.futures import ThreadPoolExecutor

import grpc

from hosl.transport.channel import MESSAGE_BYTES, SERVICE
from hosl.transport.status import ERROR_KEY
from hosl.wire import hosl_pb2 as pb
from hosl.wire.tensors import CHUNK_BYTES, packed_bytes

MOST_CALLS = 400
"""The calls after which it refuses all: no client that is caught in a circle outlives its test."""
CLASSES = 2


def refused(context, name, text="no"):
    """End a call with the error `name`, whatever that is."""
    context.set_trailing_metadata(((ERROR_KEY, name),))
    context.abort(grpc.StatusCode.FAILED_PRECONDITION, text)


class HandWritten:
    """`changed`: call -> function of (request, honest replies, context) that gives the replies, messages or bytes."""

    def __init__(self, **changed):
        self.changed, self.calls, self.sent_bytes, self.updates, self.messages = changed, 0, 0, [], []
        self.server = grpc.server(
            ThreadPoolExecutor(4),
            options=[
                ("grpc.max_receive_message_length", MESSAGE_BYTES),
                ("grpc.max_send_message_length", 64 << 20),
            ],
        )
        names = [method.name for method in pb.DESCRIPTOR.services_by_name["Server"].methods]
        handlers = {name: grpc.stream_stream_rpc_method_handler(self._served(name)) for name in names}
        self.server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, handlers),))
        self.port = self.server.add_insecure_port("127.0.0.1:0")

    def __enter__(self):
        self.server.start()
        return self

    def __exit__(self, *how):
        self.server.stop(None).wait()

    @property
    def line(self):
        return f"hosl://127.0.0.1:{self.port}#{'t' * 43}"

    @property
    def exhausted(self):
        return self.calls > MOST_CALLS

    def _served(self, name):
        def serve(frames, context):
            self.calls += 1
            if self.exhausted:
                refused(context, "AccessError", "this client goes in circles")
            request = _request(name, next(frames))
            self.messages.append((name, request))
            if name == "StepStates":
                yield from self._step_states(request, frames, context)
                return
            for _ in frames:
                pass
            honest = self._honest(name, request)
            for reply in self.changed.get(name, lambda request, honest, context: honest)(
                request, honest, context
            ):
                data = reply if isinstance(reply, bytes) else reply.SerializeToString()
                self.sent_bytes += len(data)
                yield data

        return serve

    def _honest(self, name, request):
        match name:
            case "Hello":
                limits = pb.Limits(tensor_bytes=1 << 28, chunk_bytes=CHUNK_BYTES)
                start = max(request.current, *request.restorable)
                return [pb.HelloReply(session=f"ab.{self.calls}", start=start, limits=limits, client="first")]
            case "Losses" | "Probe":
                return [pb.LossesReply(losses=[0.7, 0.71][: len(request.activations)], server_s=0.01)]
            case "Scores":
                rows = request.activations.shape[0]
                values = _floats(math.log(0.5), rows * CLASSES)
                return [pb.ScoresReply(rows=rows, scores=CLASSES, values=values, server_s=0.01)]
            case "Step" | "Gradient":
                wanted = name == "Gradient" or request.want_gradient
                return step_reply(request.activations if wanted else None)
            case "States":
                headers = [_states(h, request.positions) for h in request.activations]
                done = pb.StatesReply(done=pb.StatesDone(states=headers, server_s=0.01))
                return [done, *(pb.StatesReply(chunk=c) for h in headers for c in _zeros(h))]
            case "Descend":
                return [pb.DescendReply(server_s=0.01)]
            case "Journal":
                if request.seeds:
                    self.updates.append((request.seeds, request.scales))
                newer = [
                    pb.Update(step=number, seeds=seeds, scales=scales)
                    for number, (seeds, scales) in enumerate(self.updates, 1)
                    if number > request.have
                ]
                return [pb.JournalReply(step=request.where.step, updates=newer)]
            case "Save":
                return [pb.SaveReply(step=request.where.step)]

    def _step_states(self, request, frames, context):
        states = _states(request.activations, request.positions)
        _read(frames, request.activations)
        first = [
            pb.StepStatesReply(states=states), *(pb.StepStatesReply(chunk=c) for c in _zeros(states))
        ]  # fmt: skip
        change = self.changed.get("StepStates", lambda request, honest, context: honest)
        replies = change(request, first, context)
        yield from (reply.SerializeToString() for reply in replies)
        if not replies:
            return
        _read(frames, states)
        for reply in step_reply(request.activations if request.want_gradient else None):
            part = reply.WhichOneof("part")
            yield pb.StepStatesReply(**{part: getattr(reply, part)}).SerializeToString()


def step_reply(header, value=0.0, **done):
    """The parts of a reply to Step: the loss, and a gradient of `value` everywhere where there is a `header`."""
    done = {"loss": 0.7, "server_s": 0.01} | done
    if header is None:
        return [pb.StepReply(done=pb.StepDone(**done))]
    plain = pb.Tensor(shape=header.shape, dtype=header.dtype)
    return [
        pb.StepReply(done=pb.StepDone(gradient=plain, **done)),
        *(pb.StepReply(chunk=chunk) for chunk in _zeros(plain, value)),
    ]


def _request(name, data):
    kinds = {"Hello": pb.HelloRequest, "Descend": pb.DescendRequest, "Journal": pb.JournalRequest}
    kinds["Save"] = pb.SaveRequest
    if name in kinds:
        return kinds[name].FromString(data)
    upload = pb.Upload.FromString(data)
    return getattr(upload, upload.WhichOneof("part"))


def _states(header, positions):
    rows, _, width = header.shape
    return pb.Tensor(shape=[rows, len(positions.positions), width], dtype=header.dtype)


def _floats(value, count):
    import numpy as np

    return np.full(count, value, "<f4").tobytes()


def _zeros(header, value=0.0):
    data = _floats(value, math.prod(header.shape))
    return [data[start : start + CHUNK_BYTES] for start in range(0, len(data), CHUNK_BYTES)]


def _read(frames, header):
    """Read a tensor's chunks; its compression is none."""
    left = packed_bytes(tuple(header.shape), "float32", "none")
    while left > 0:
        left -= len(pb.Upload.FromString(next(frames)).chunk)

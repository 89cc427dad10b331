"""The checks of a Hello: the protocol, the halves, and settings that no run has."""

from functools import reduce
from typing import Any

from hosl.core.methods import METHODS
from hosl.errors import HandshakeError, WireError
from hosl.wire import hosl_pb2 as pb
from hosl.wire.enums import from_enum
from hosl.wire.protocol import spoken_protocol

_MOST = {
    "max_steps": 2**31, "warmup_steps": 2**31, "learning_rate": 1e6, "clients": 4096, "grace_s": 86400.0,
    "lora.r": 1024, "lora.alpha": 2**20, "optimiser.momentum": 1.0, "optimiser.weight_decay": 1e6,
}  # fmt: skip
"""The largest value of each number of a Hello; each decides what a run costs in memory or time."""


def check_protocol(told: int, *, personal: bool) -> None:
    """Refuse another version of the protocol.

    Raises:
        HandshakeError: naming both versions.
    """
    spoken = spoken_protocol(personal=personal)
    if told != spoken:
        raise HandshakeError(
            f"this server speaks protocol {spoken}, the client {told}; install the same version of hosl on both sides"
        )


def check_same_halves(ours: pb.Model, theirs: pb.Model) -> None:
    """Refuse a client half of another split; its dtype may be another.

    Raises:
        HandshakeError: naming the first difference with both values.
    """
    for name in ("family", "cut", "base_digest", "client_digest", "server_digest", "labels"):
        mine, other = str(getattr(ours, name))[:16], str(getattr(theirs, name))[:16]
        if getattr(ours, name) != getattr(theirs, name):
            raise HandshakeError(
                f"the halves do not fit: {name} is {mine} on the server and {other} on the client; use both folders of "
                "one `hosl split`"
            )


def check_numbers(training: pb.Training) -> None:
    """Refuse numbers that no run has, before anything is made by them.

    Raises:
        HandshakeError: naming the setting.
    """
    for path, most in _MOST.items():
        value: Any = reduce(getattr, path.split("."), training)
        if not 0 <= value <= most:
            raise HandshakeError(f"{path} must lie in 0..{most:g}, got {value}")
    targets = training.lora.target_modules
    if len(targets) > 64 or any(len(name) > 64 for name in targets):
        raise HandshakeError(
            f"lora.target_modules: at most 64 names of 64 characters, got {len(targets)} names"
        )


def check_training(training: pb.Training) -> None:
    """Refuse settings that contradict each other, whoever sent them.

    Raises:
        HandshakeError: naming the settings.
    """
    if training.max_steps < 1 or not 0 <= training.learning_rate < float("inf"):
        raise HandshakeError(
            f"max_steps must be >= 1 and the learning rate a number >= 0, got {training.max_steps} and "
            f"{training.learning_rate}"
        )
    try:
        method = METHODS[from_enum(pb.Method, training.method)]
    except WireError as cause:
        raise HandshakeError(f"method: {cause}") from cause
    if training.order == pb.SYNCHRONOUS and method.server != "first-order":
        raise HandshakeError(
            f"the synchronous schedule needs a first-order server, method is {method.name}; use sequential"
        )
    if training.halves == pb.SHARED and method.client_state == "weights":
        raise HandshakeError(
            f"shared client halves need a journal, and a client of method {method.name} has none; use personal"
        )
    together = training.order == pb.SYNCHRONOUS or training.halves == pb.SHARED or training.clients < 2
    backprop = method.server == "first-order"
    if training.personal_server and (together or not backprop or training.trainable != pb.LORA):
        raise HandshakeError(
            "personal_server needs server.trainable: lora, a server that is trained by backprop, two clients or more, "
            "personal client halves and the sequential schedule"
        )

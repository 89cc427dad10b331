"""hosl's errors <-> gRPC's status codes: the one table, and the two functions that use it.

The error's own name travels in the trailing metadata, so that the other side raises the same class.
"""

from typing import Any

import grpc

import hosl.errors
from hosl.errors import (
    AccessError,
    FailureError,
    HandshakeError,
    HoslError,
    LimitError,
    LinkError,
    NonFiniteError,
    RequestError,
    SessionError,
    StepError,
    WireError,
)

ERROR_KEY = "hosl-error"

_CODES: dict[type[HoslError], grpc.StatusCode] = {
    AccessError: grpc.StatusCode.UNAUTHENTICATED,
    HandshakeError: grpc.StatusCode.FAILED_PRECONDITION,
    SessionError: grpc.StatusCode.FAILED_PRECONDITION,
    StepError: grpc.StatusCode.OUT_OF_RANGE,
    WireError: grpc.StatusCode.INVALID_ARGUMENT,
    LimitError: grpc.StatusCode.RESOURCE_EXHAUSTED,
    NonFiniteError: grpc.StatusCode.ABORTED,
    LinkError: grpc.StatusCode.UNAVAILABLE,
    RequestError: grpc.StatusCode.INVALID_ARGUMENT,
    FailureError: grpc.StatusCode.INTERNAL,
}

_ERRORS: dict[grpc.StatusCode, type[HoslError]] = {
    grpc.StatusCode.UNAUTHENTICATED: AccessError,
    grpc.StatusCode.PERMISSION_DENIED: AccessError,
    grpc.StatusCode.RESOURCE_EXHAUSTED: LimitError,
    grpc.StatusCode.INVALID_ARGUMENT: WireError,
    grpc.StatusCode.UNIMPLEMENTED: WireError,
    grpc.StatusCode.DATA_LOSS: WireError,
    grpc.StatusCode.OUT_OF_RANGE: StepError,
    grpc.StatusCode.FAILED_PRECONDITION: SessionError,
    grpc.StatusCode.ABORTED: FailureError,
    grpc.StatusCode.INTERNAL: LinkError,  # what gRPC says when a stream breaks in the middle
    grpc.StatusCode.UNAVAILABLE: LinkError,
    grpc.StatusCode.CANCELLED: LinkError,
    grpc.StatusCode.DEADLINE_EXCEEDED: LinkError,
    grpc.StatusCode.UNKNOWN: FailureError,
    grpc.StatusCode.NOT_FOUND: FailureError,
    grpc.StatusCode.ALREADY_EXISTS: FailureError,
    grpc.StatusCode.OK: WireError,  # an answer that ended early
}


def code_of(error: HoslError) -> grpc.StatusCode:
    """The status code of the nearest class in the table."""
    for kind in type(error).__mro__:
        if kind in _CODES:
            return _CODES[kind]
    return grpc.StatusCode.INTERNAL


def error_of(failed: grpc.RpcError, peer: str) -> HoslError:
    """What a failed call means to us: the class that the peer named, else the one of the status code."""
    call: Any = failed
    code, said = call.code(), call.details() or ""
    trailing = dict(call.trailing_metadata() or ())
    named = getattr(hosl.errors, str(trailing.get(ERROR_KEY, "")), None)
    if isinstance(named, type) and issubclass(named, HoslError):
        return named(f"{said} (said by {peer})")
    return _ERRORS.get(code, FailureError)(f"{peer}: {code.name.lower().replace('_', ' ')}: {said}")

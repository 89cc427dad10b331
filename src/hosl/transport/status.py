"""hosl's errors <-> gRPC's status codes: a table for each way, and the function that uses it.

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
DETAILS_CHARACTERS = 1000
"""The longest text of a peer that is shown."""

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
    grpc.StatusCode.INTERNAL: LinkError,  # gRPC's code for a stream that breaks in the middle
    grpc.StatusCode.UNAVAILABLE: LinkError,
    grpc.StatusCode.CANCELLED: LinkError,
    grpc.StatusCode.DEADLINE_EXCEEDED: LinkError,
    grpc.StatusCode.UNKNOWN: FailureError,
    grpc.StatusCode.NOT_FOUND: FailureError,
    grpc.StatusCode.ALREADY_EXISTS: FailureError,
    grpc.StatusCode.OK: WireError,  # a reply that ended early
}


_NAMED: dict[str, type[HoslError]] = {
    name: kind
    for name, kind in vars(hosl.errors).items()
    if isinstance(kind, type) and issubclass(kind, RequestError | FailureError)
}
"""The errors that a peer may name: a call's, not what steers a run's loop."""


def code_of(error: HoslError) -> grpc.StatusCode:
    """The status code of the error's class, or of its nearest base class in the table."""
    for kind in type(error).__mro__:
        if kind in _CODES:
            return _CODES[kind]
    return grpc.StatusCode.INTERNAL


def error_of(failed: grpc.RpcError, peer: str) -> HoslError:
    """The error of ours for a failed call: of the class that the peer named, else of the status code's class."""
    call: Any = failed
    code = call.code()
    details = "".join(c if c.isprintable() else " " for c in (call.details() or "")[:DETAILS_CHARACTERS])
    named = _NAMED.get(str(dict(call.trailing_metadata() or ()).get(ERROR_KEY, "")))
    if named is not None:
        return named(f"{details} (said by {peer})")
    return _ERRORS.get(code, FailureError)(f"{peer}: {code.name.lower().replace('_', ' ')}: {details}")

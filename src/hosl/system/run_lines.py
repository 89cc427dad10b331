"""The lines of metrics.jsonl and timings.jsonl, by key and type, so that every reader may rely on them."""

from typing import Annotated, Any

import msgspec
from msgspec import Meta

_Count = Annotated[int, Meta(ge=0)]
_Amount = Annotated[float, Meta(ge=0)]
_Share = Annotated[float, Meta(ge=0, le=1)]


class _Line(msgspec.Struct):
    step: _Count


class _Step(_Line):
    loss_nats: float
    bytes_up: _Count
    bytes_down: _Count
    coefficients: list[float] = []


class _Evaluation(_Line):
    split: str
    accuracy: _Share
    loss_nats: float
    examples: _Count
    f1_macro: _Share = 0.0


class _EvaluationTiming(_Line):
    split: str
    server_s: _Amount


class _Timing(_Line):
    step_s: _Amount
    client_s: _Amount
    server_s: _Amount
    client_peak_bytes: _Amount
    server_peak_bytes: _Amount
    process_peak_bytes: _Amount = 0
    wire_s: float = 0  # below 0 where a server says that it computed longer than the device waited
    client_calls_s: dict[str, _Amount] = {}
    server_calls_s: dict[str, _Amount] = {}


_KINDS = {
    (False, False): _Step, (False, True): _Evaluation, (True, False): _Timing, (True, True): _EvaluationTiming,
}  # fmt: skip
"""(Of timings.jsonl or not, of an evaluation or not) -> the keys of the line."""


def whole_line(line: bytes, *, timing: bool) -> dict[str, Any] | None:
    """The content of a line; None: it is torn, or no JSON, as the NUL bytes that a power failure may leave.

    Args:
        line: the bytes, with the line's end.
        timing: whether it is one of timings.jsonl.

    Raises:
        ValueError: if it is a whole JSON object without a key that every such line has, or with an impossible value.
    """
    try:
        content = msgspec.json.decode(line)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return None
    if not line.endswith(b"\n") or not isinstance(content, dict):
        return None
    try:
        msgspec.convert(content, _KINDS[timing, "split" in content])
    except msgspec.ValidationError as cause:
        raise ValueError(str(cause)) from cause
    return content

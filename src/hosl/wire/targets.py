"""Targets <-> messages. What arrives is checked against the tensor that it belongs to."""

import numpy as np

from hosl.core.targets import (
    AskedPositions,
    ClassTargets,
    OptionTargets,
    PositionTargets,
    RowPositionTargets,
    Targets,
)
from hosl.errors import WireError
from hosl.wire import hosl_pb2 as pb


def targets_to_message(targets: ClassTargets | OptionTargets) -> pb.Targets:
    """The padding mask and the targets of the scored positions: all that may cross of a batch besides activations."""
    if isinstance(targets, ClassTargets):
        return pb.Targets(mask=_mask(targets.mask), classes=pb.Classes(labels=targets.labels.tolist()))
    options = pb.Options(
        span=targets.positions.shape[1],
        positions=targets.positions.reshape(-1).tolist(),
        tokens=targets.tokens.reshape(-1).tolist(),
        by_token=targets.mean_over == "tokens",
    )
    return pb.Targets(mask=_mask(targets.mask), options=options)


def positions_to_message(targets: AskedPositions) -> pb.Positions:
    """The padding mask and the scored positions: all that crosses when labels stay with the client."""
    if isinstance(targets, RowPositionTargets):
        return pb.Positions(mask=_mask(targets.mask), scored=_mask(targets.scored))
    return pb.Positions(mask=_mask(targets.mask), positions=targets.positions.tolist())


def targets_from_message(message: pb.Targets, shape: tuple[int, ...]) -> Targets:
    """The targets of activations of `shape` [rows, seq, width].

    Raises:
        WireError: if they do not fit the shape, or a row has no scored position.
    """
    rows, seq = shape[:2]
    mask = _read_mask(message.mask, rows, seq)
    match message.WhichOneof("kind"):
        case "classes":
            labels = np.array(message.classes.labels, dtype=np.int64)
            if labels.shape != (rows,):
                raise WireError(f"{rows} rows need {rows} labels, got {len(labels)}")
            return ClassTargets(mask, labels)
        case "options":
            return _read_options(message.options, mask)
        case _:
            raise WireError("targets name neither classes nor options; one of them is needed")


def positions_from_message(message: pb.Positions, shape: tuple[int, ...]) -> AskedPositions:
    """The scored positions of activations of `shape` [rows, seq, width], when labels stay with the client.

    Raises:
        WireError: if they do not fit the shape, do not ascend, or there are none, be it in one row.
    """
    rows, seq = shape[:2]
    if message.HasField("scored"):
        scored = _read_mask(message.scored, rows, seq)
        if message.positions or not scored.any(axis=1).all():
            raise WireError(
                "scored positions stand once, for all rows or for each; and each row has one at least"
            )
        return RowPositionTargets(_read_mask(message.mask, rows, seq), scored)
    positions = np.array(message.positions, dtype=np.int64)
    if not len(positions) or (np.diff(positions) <= 0).any() or positions[-1] >= seq:
        raise WireError(
            f"scored positions must ascend within 0..{seq - 1}, and there must be one at least; got {positions[:8]}"
        )
    return PositionTargets(_read_mask(message.mask, rows, seq), positions)


def _read_options(message: pb.Options, mask: np.ndarray) -> OptionTargets:
    rows, seq = mask.shape
    if not 1 <= message.span <= seq:
        raise WireError(f"options span {message.span} tokens; it must lie in 1..{seq}")
    count = rows * message.span
    if len(message.positions) != count or len(message.tokens) != count:
        raise WireError(
            f"{rows} rows of span {message.span} need {count} positions and tokens, got {len(message.positions)} "
            f"and {len(message.tokens)}"
        )
    positions = np.array(message.positions, dtype=np.int64).reshape(rows, -1)
    tokens = np.array(message.tokens, dtype=np.int64).reshape(rows, -1)
    if positions.max() >= seq:
        raise WireError(f"option position {positions.max()} lies outside 0..{seq - 1}")
    if tokens.min() < -1 or not (tokens >= 0).any(axis=1).all():
        raise WireError("option tokens must be >= -1, and every row needs one that is scored")
    mean_over = "tokens" if message.by_token else "rows"
    return OptionTargets(mask, positions.astype(np.int32), tokens.astype(np.int32), mean_over)


def _mask(mask: np.ndarray) -> pb.Mask:
    bits = np.packbits(mask.astype(bool).reshape(-1), bitorder="little").tobytes()
    return pb.Mask(rows=mask.shape[0], seq=mask.shape[1], bits=bits)


def _read_mask(message: pb.Mask, rows: int, seq: int) -> np.ndarray:
    if (message.rows, message.seq) != (rows, seq):
        raise WireError(
            f"the mask is [{message.rows}, {message.seq}], the activations are [{rows}, {seq}, ...]"
        )
    if len(message.bits) != -(-rows * seq // 8):
        raise WireError(f"a mask [{rows}, {seq}] needs {-(-rows * seq // 8)} bytes, got {len(message.bits)}")
    bits = np.unpackbits(np.frombuffer(message.bits, dtype=np.uint8), count=rows * seq, bitorder="little")
    return bits.reshape(rows, seq).astype(np.int8)

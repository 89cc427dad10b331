"""Activations clipped and blurred before they leave the client: `wire.clip_norm`, `wire.noise_multiplier`. No torch.

The Gaussian mechanism on each token's vector: scaled down to a norm of at most C, then noise of standard deviation
sigma C on each number. `hosl.privacy.accounting` says which (epsilon, delta) that is. The noise is a function of a
secret key, of the place of a row in the run, and of the numbers that it is added to: what is sent again, after a lost
connection or a resume, is the same; equal rows at two places, and what differs by a bit, have noise of their own.
Doubles are not real numbers: who builds on an epsilon should know Mironov, "On significance of the least significant
bits for differential privacy" (CCS 2012).
"""

import math
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b, shake_256
from pathlib import Path
from typing import Any

import numpy as np

from hosl.core.array_types import Float
from hosl.core.targets import Activations, StepReply, Targets
from hosl.errors import FolderError, NonFiniteError
from hosl.parties.metered import Meter
from hosl.parties.remote.packing import Arrays
from hosl.system.atomic import whole_file
from hosl.wire.tensors import WireArray, to_bfloat16

KEY_BYTES = 32
KEY_FILE = "noise.key"


@dataclass(frozen=True)
class ActivationNoise:
    """The clipping and the noise of one run."""

    clip_norm: float
    """C, the largest L2 norm of a token's activation."""
    multiplier: float
    """sigma; 0: activations are clipped alone."""
    key: bytes
    """The secret that keys the noise: whoever has it can take the noise off."""

    def released(self, h: np.ndarray, place: str) -> np.ndarray:
        """What leaves the client: [rows, seq, width], in the dtype of `h`, float32 or float64. One row at a time.

        `place`: that of the message in the run; no two messages of a run have the same.
        """
        released = np.empty_like(h)
        for number, (row, out) in enumerate(zip(h, released, strict=True)):
            np.multiply(row, _shrinking(row, self.clip_norm), out=out)
            if self.multiplier:
                out += self.multiplier * self.clip_norm * self._normals(row, f"{place}/{number}")
        return released

    def released_array(self, h: WireArray, place: str) -> WireArray:
        """`released` of an array for the wire, in its dtype."""
        return _as(self.released(h.widened(), place), h)

    def pulled_back(self, gradient: np.ndarray, h: np.ndarray) -> np.ndarray:
        """dL/dh from dL/d(released): [rows, seq, width]; the noise is constant, clipping is a projection and a scale.

        Of a clipped token, d(released) = (C / |h|) (1 - h h^T / |h|^2) dh.
        """
        pulled = np.empty_like(gradient)
        for g, row, out in zip(gradient, h, pulled, strict=True):
            factor = _shrinking(row, self.clip_norm)
            along = np.sum(g * row, axis=-1, keepdims=True) / np.maximum(
                np.sum(row * row, axis=-1, keepdims=True), 1e-30
            )
            out[:] = np.where(factor < 1, factor * (g - along * row), g)
        return pulled

    def _normals(self, row: np.ndarray, place: str) -> np.ndarray:
        """Standard normal numbers, float64, of the shape of `row`: Box-Muller over SHAKE-256 of its keyed digest."""
        seed = blake2b(place.encode() + b"\0" + row.tobytes(), key=self.key, digest_size=32).digest()
        pairs = -(-row.size // 2)
        bits = np.frombuffer(shake_256(seed).digest(16 * pairs), dtype="<u8")
        uniform = ((bits >> np.uint64(11)) + 1) * 2.0**-53  # in (0, 1]
        radius, angle = np.sqrt(-2.0 * np.log(uniform[:pairs])), 2.0 * math.pi * uniform[pairs:]
        normals = np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])
        return normals[: row.size].reshape(row.shape)


def _shrinking(row: np.ndarray, clip_norm: float) -> np.ndarray:
    """The factor of each token, [seq, 1]: 1, or less where its norm is larger than `clip_norm`."""
    norms = np.linalg.norm(row.astype(np.float64), axis=-1, keepdims=True)
    return np.minimum(1.0, clip_norm / np.maximum(norms, 1e-30)).astype(row.dtype)


def simulated_key(seed: int) -> bytes:
    """The key of a run in one process, where there is nobody to hide from, so that a run can be repeated."""
    return blake2b(f"hosl noise {seed}".encode(), digest_size=KEY_BYTES).digest()


def kept_key(run: Path) -> bytes:
    """The secret key of a run over a network: RUN/noise.key, drawn by the system at the run's first start.

    Raises:
        FolderError: if the file has another length.
    """
    file = run / KEY_FILE
    if not file.is_file():
        file.parent.mkdir(parents=True, exist_ok=True)
        whole_file(file, secrets.token_bytes(KEY_BYTES), mode=0o600)
    key = file.read_bytes()
    if len(key) != KEY_BYTES:
        raise FolderError(
            f"{file} should have {KEY_BYTES} bytes, found {len(key)}; put it back, or delete it: a new key is then "
            "drawn, and what is sent again has other noise"
        )
    return key


class NoisyServer:
    """A `FirstOrderServerSide` in front of another one, which gets clipped and blurred activations.

    One is made for each round and each evaluation: a round that is repeated then has the same noise.
    """

    def __init__(
        self, server: Any, arrays: Arrays, noise: ActivationNoise, place: str, *, meter: Meter | None = None
    ) -> None:
        """Put the noise before a server.

        Args:
            server: a `FirstOrderServerSide`, or one that evaluates alone.
            arrays: the conversion for the client's runtime.
            noise: what is done to activations.
            place: that of the round or the evaluation in the run, such as its step.
            meter: the client's, who makes the noise; None: nobody counts.
        """
        self._server, self._arrays, self._noise, self._meter = server, arrays, noise, meter or Meter()
        self._place, self._messages = place, 0

    def losses(self, activations: Sequence[Activations], targets: Targets) -> Sequence[float]:
        """The mean loss of each activation, in nats; NaN where one is NaN or infinite."""
        try:
            sent = [self._released(h) for h in activations]
        except NonFiniteError:
            return [math.nan for _ in activations]
        return self._server.losses(sent, targets)

    def scores(self, activations: Activations, targets: Targets) -> Float[np.ndarray, "rows scores"]:
        """Log-probabilities per class, or per option, mean per token."""
        return self._server.scores(self._released(activations), targets)

    def step(
        self, activations: Activations, targets: Targets, *, step: int, want_gradient: bool = False
    ) -> StepReply:
        """One update of theta_s at what it got; the gradient is that at the activations as they were before clipping.

        Raises:
            NonFiniteError: if an activation is NaN or infinite; nothing is sent then.
        """
        sent = self._released(activations)
        reply = self._server.step(sent, targets, step=step, want_gradient=want_gradient)
        if reply.gradient is None:
            return reply
        return StepReply(
            reply.loss, self._meter.own_work("pull_back", self._pull_back, reply.gradient, activations)
        )

    def _pull_back(self, received: Activations, activations: Activations) -> Activations:
        gradient, h = (self._arrays.to_wire(tensor) for tensor in (received, activations))
        return self._arrays.from_wire(_as(self._noise.pulled_back(gradient.widened(), h.widened()), gradient))

    def _released(self, activations: Activations) -> Activations:
        return self._meter.own_work("release", self._release, activations)

    def _release(self, activations: Activations) -> Activations:
        array = self._arrays.to_wire(activations)
        if not array.finite():
            raise NonFiniteError(
                "an activation at the cut is NaN or infinite; nothing was sent: lower client.learning_rate"
            )
        self._messages += 1
        return self._arrays.from_wire(self._noise.released_array(array, f"{self._place}/{self._messages}"))


def _as(values: np.ndarray, like: WireArray) -> WireArray:
    """Numbers in the dtype of another array."""
    data = to_bfloat16(values) if like.dtype == "bfloat16" else values.astype(like.data.dtype, copy=False)
    return WireArray(data, like.dtype)

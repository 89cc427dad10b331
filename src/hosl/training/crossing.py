"""What crosses between the two machines in a run, in one line, and what is done to it before. No torch."""

from typing import Any, Literal

from hosl.config import Config
from hosl.parties.metered import Meter
from hosl.parties.remote.noisy import ActivationNoise, NoisyServer
from hosl.parties.remote.packing import Arrays


def what_crosses(config: Config, head: Literal["classification", "causal"]) -> str:
    """The line for people: where the labels are, and the fields that cross in a step, either way.

    `head`: that of the task. Evaluations send the same fields and get scores or states. Sizes and what each field
    tells: `hosl audit`.
    """
    method = config.method_row
    gradient = ["the gradient at the cut"] if method.wants_gradient else []
    up = [f"activations{_blurred(config)}", "padding mask"]
    if config.wire.labels == "client":
        up += ["scored positions", "the gradient at the last states"]
        down = ["states at the scored positions", *gradient]
    else:
        up += ["class labels" if head == "classification" else "positions and tokens of what is learned"]
        down = ["losses", *gradient]
    if config.clients.halves == "shared" or method.server == "zeroth-order":
        up += ["seeds and coefficients"]
    line = f"labels at the {config.wire.labels}; up cross {_listed(up)}; down {_listed(down)}"
    return (
        line
        if config.wire.clip_norm is None
        else f"{line}; the model that is written has no clipping and no noise"
    )


def behind_noise(
    config: Config, server: Any, arrays: Arrays, key: bytes, place: str, meter: Meter | None = None
) -> Any:
    """The server as the client calls it: it gets activations as `wire.clip_norm` and `wire.noise_multiplier` have them.

    Args:
        config: the settings of the run.
        server: a `ServerSide`.
        arrays: the conversion for the client's runtime.
        key: the secret of the noise; see `hosl.parties.remote.noisy`.
        place: that of the round or the evaluation in the run.
        meter: the client's, who makes the noise.
    """
    noise = noise_of(config, key)
    return server if noise is None else NoisyServer(server, arrays, noise, place, meter=meter)


def noise_of(config: Config, key: bytes) -> ActivationNoise | None:
    """What `wire.clip_norm` and `wire.noise_multiplier` do to activations; None: nothing."""
    clip_norm = config.wire.clip_norm
    return None if clip_norm is None else ActivationNoise(clip_norm, config.wire.noise_multiplier, key)


def _blurred(config: Config) -> str:
    """What is done to activations, in words."""
    wire = config.wire
    if wire.clip_norm is None:
        return ""
    noise = (
        f", with noise of {wire.noise_multiplier:g} times that on each number"
        if wire.noise_multiplier
        else ""
    )
    return f" (clipped to a norm of {wire.clip_norm:g}{noise})"


def _listed(fields: list[str]) -> str:
    return fields[0] if len(fields) == 1 else f"{', '.join(fields[:-1])} and {fields[-1]}"

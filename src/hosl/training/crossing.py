"""What crosses between the two machines in a run, in one line. No torch."""

from typing import Literal

from hosl.config import Config


def what_crosses(config: Config, head: Literal["classification", "causal"]) -> str:
    """The line for people: where the labels are, and the fields that cross in a step, either way.

    `head`: that of the task. Evaluations send the same fields and get scores or states. Sizes and what each field
    tells: `hosl audit`.
    """
    method = config.method_row
    gradient = ["the gradient at the cut"] if method.wants_gradient else []
    up = ["activations", "padding mask"]
    if config.wire.labels == "client":
        up += ["scored positions", "the gradient at the last states"]
        down = ["states at the scored positions", *gradient]
    else:
        up += ["class labels" if head == "classification" else "positions and tokens of what is learned"]
        down = ["losses", *gradient]
    if config.clients.halves == "shared" or method.server == "zeroth-order":
        up += ["seeds and coefficients"]
    return f"labels at the {config.wire.labels}; up cross {_listed(up)}; down {_listed(down)}"


def _listed(fields: list[str]) -> str:
    return fields[0] if len(fields) == 1 else f"{', '.join(fields[:-1])} and {fields[-1]}"

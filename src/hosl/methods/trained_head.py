"""Which weights of a head are trained where adapters are, and by a client that keeps its labels. No torch."""

from collections.abc import Sequence

from hosl.config import Config

CLASSIFIER_HEADS = ("classifier", "pre_classifier", "score")
"""The modules that are a classifier's head: LoRA trains them whole, as peft does for such a task."""


def beside_adapters(name: str, new_weights: Sequence[str]) -> bool:
    """Whether a weight is trained where adapters are: it is new, or a classifier's head."""
    return name in new_weights or name.partition(".")[0] in CLASSIFIER_HEADS


def trained_at_client(config: Config, name: str, new_weights: Sequence[str]) -> bool:
    """Whether a client that keeps its labels trains this weight of the head, which is not tied to its half.

    It is what the server would train of it. Where devices share a client half nothing is: each would train a head of
    its own.
    """
    whole = config.server.trainable == "all" or beside_adapters(name, new_weights)
    return whole and config.clients.halves == "personal"

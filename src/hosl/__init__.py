"""hosl: fine-tune a language model that is cut in two, the device's half by forward passes only.

The public names, and nothing else. They are loaded when first used: `import hosl` costs a device nothing. Type checkers
read them from `__init__.pyi`.
"""

from importlib import import_module
from typing import Any

_HOMES = {
    "Batch": "hosl.core.targets",
    "ClassTargets": "hosl.core.targets",
    "OptionTargets": "hosl.core.targets",
    "Journal": "hosl.core.journal",
    "direction_seed": "hosl.core.directions",
    "StepInputs": "hosl.core.rounds",
    "hosl_round": "hosl.core.rounds",
    "hosl_gradient_round": "hosl.core.rounds",
    "hosl_residual_round": "hosl.core.rounds",
    "hosl_node_round": "hosl.core.rounds",
    "fo_round": "hosl.core.rounds",
    "zo_round": "hosl.core.rounds",
    "fo_zo_round": "hosl.core.rounds",
    "frozen_round": "hosl.core.rounds",
    "split_model": "hosl.split",
    "FrozenClient": "hosl.parties.clients.frozen",
    "ZerothOrderClient": "hosl.parties.clients.zeroth_order",
    "ResidualClient": "hosl.parties.clients.residual",
    "NodeClient": "hosl.parties.clients.node",
    "FirstOrderClient": "hosl.parties.clients.first_order",
    "RecomputingClient": "hosl.parties.clients.recomputing",
    "FirstOrderServer": "hosl.parties.servers.basic",
    "ZerothOrderServer": "hosl.parties.servers.basic",
    "OptimiserSpec": "hosl.parties.engine.optimisers",
    "load_run": "hosl.training.local_session",
    "export": "hosl.training.train",
    "export_checkpoint": "hosl.split.export",
}

__all__ = sorted(_HOMES)  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module hosl has no public name {name!r}; it has {', '.join(__all__)}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return __all__

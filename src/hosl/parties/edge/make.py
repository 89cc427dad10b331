"""The client of a run's config on the inference engine. What the engine has not is refused by name."""

from pathlib import Path
from typing import Any

import msgspec

from hosl.core.directions import Distribution
from hosl.core.methods import METHODS
from hosl.errors import ConfigError
from hosl.parties.edge.clients.frozen import FrozenEdgeClient
from hosl.parties.edge.clients.guided import GuidedEdgeClient
from hosl.parties.edge.clients.recomputing import RecomputingEdgeClient
from hosl.parties.edge.clients.residual import ResidualEdgeClient
from hosl.parties.edge.clients.zeroth_order import ZerothOrderEdgeClient
from hosl.parties.edge.half import EdgeHalf
from hosl.parties.edge.trainable import trained_names
from hosl.split.families import FAMILIES
from hosl.split.reading.half_json import half_facts
from hosl.split.specs import LoraSpec

_HERE = tuple(name for name, row in METHODS.items() if row.on_engine)


def make_edge_client(config: Any, folder: Path) -> FrozenEdgeClient:
    """The client party of a run at its base weights, from the half's folder.

    Args:
        config: a `hosl.config.Config`.
        folder: OUT/client of `hosl split --runtime onnx`.

    Raises:
        ConfigError: if the config asks for what the engine has not, or the half was split without what it needs.
        SplitError: if the architecture's output projections are not known, where these shall be trained.
        ModelError: as in `EdgeHalf`.
        FolderError: if the folder is the server's half.
    """
    check_config(config)
    half = EdgeHalf(
        folder, adapters=_adapters(config, folder), seed=config.seed, int8=config.client.dtype == "int8"
    )
    options = {"micro_batch_size": config.client.micro_batch_size}
    trained = _trained(config, half)
    match config.method:
        case "frozen":
            return FrozenEdgeClient(half, **options)
        case "fo-recompute":
            return RecomputingEdgeClient(half, trained, optimiser=config.client.optimiser, **options)
        case "hosl-residual" if config.residual.slopes != "none":
            residual = config.residual
            return GuidedEdgeClient(half, trained, slopes=residual.slopes, decay=residual.decay, **options)
        case "hosl-residual":
            residual = config.residual
            optimiser = config.client.optimiser
            return ResidualEdgeClient(
                half, trained, decay=residual.decay, kept=residual.kept, optimiser=optimiser, **options
            )
        case _:
            distribution: Distribution = config.zo.distribution
            return ZerothOrderEdgeClient(half, trained, distribution=distribution, **options)


def check_config(config: Any) -> None:
    """Refuse settings that the engine has not, by name; `config` is a `hosl.config.Config`.

    Raises:
        ConfigError: naming the setting, and what is allowed.
    """
    client, trains = config.client, config.method_row.trains
    refused = {
        f"method: {config.method} (it has {', '.join(_HERE)})": config.method not in _HERE,
        f"profile: {config.profile}": config.profile != "paper",
        f"model.dtype: {config.model.dtype}": config.model.dtype != "float32",
        f"client.dtype: {client.dtype} (it has model and int8; a half keeps the dtype of its file)":
            client.dtype not in ("model", "int8"),
        f"client.device: {client.device}": client.device != "cpu",
        "zo.derivative: forward-mode": config.zo.derivative == "forward-mode",
        "residual.kept: inputs (it has stream and blocks)": config.residual.kept == "inputs",
        "client.trainable: all (fo-recompute has blocks, last-block, output-projections and lora)":
            config.method == "fo-recompute" and trains == "chosen" and client.trainable == "all",
    }  # fmt: skip
    for setting, holds in refused.items():
        if holds:
            raise ConfigError(
                f"the onnx runtime has no {setting}; change this setting, or take the torch runtime"
            )


def _adapters(config: Any, folder: Path) -> LoraSpec | None:
    """The run's adapters; None: it has none. Of a method of output projections, on these alone.

    Raises:
        ConfigError: if other layers are named for such a method.
    """
    if config.client.trainable != "lora" or config.method_row.trains == "nothing":
        return None
    spec = config.client.lora
    if not config.method_row.needs_blocks:
        return spec
    facts = half_facts(folder, "client")
    family = FAMILIES.get((facts["family"], facts["head"]))
    layers = sorted({name.rpartition(".")[2] for name in family.output_projections}) if family else []
    others = sorted(set(spec.target_modules or ()) - set(layers))
    if others:
        raise ConfigError(
            f"client.lora.target_modules: {', '.join(others)}: method {config.method} trains adapters of layers that "
            f"write to the residual stream, in a {facts['family']} {', '.join(layers)}; leave the others out"
        )
    return msgspec.structs.replace(spec, target_modules=spec.target_modules or tuple(layers))


def _trained(config: Any, half: EdgeHalf) -> list[str]:
    row, which = config.method_row, config.client.trainable
    if row.trains == "nothing":
        return []
    if row.needs_blocks and which == "lora":  # of other layers of the same name, adapters stay as they start
        projections = half.family.output_projections if half.family else ()
        last = half.facts.blocks[half.cut - config.trained_blocks :]
        layers = tuple(f"{block.prefix}.{layer}." for block in last for layer in projections)
        return [name for name in half.adapters if name.startswith(layers)]
    if row.needs_blocks:
        return trained_names(half, "output-projections", blocks=config.trained_blocks)
    return trained_names(half, which, blocks=config.trained_blocks)

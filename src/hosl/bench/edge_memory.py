"""`hosl bench memory --runtime onnx`: the process of a client on the inference engine, beside torch's and the plan's.

Every figure is that of a process of its own that holds a client half, no server, and all that `hosl join` imports.
"""

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec

from hosl.bench.isolated_client import client_alone
from hosl.bench.isolated_edge_client import edge_client_alone
from hosl.bench.random_halves import BenchSizes, random_halves
from hosl.config import Config
from hosl.errors import FailureError
from hosl.methods.variants import Variant
from hosl.parties.edge.engine import engine_version
from hosl.parties.edge.make import check_config
from hosl.planner.edge_memory import planned_process_bytes
from hosl.split.specs import GraphSpec

_MIB = 2**20
GRAPHS = GraphSpec(lora_targets=("q_proj", "v_proj"), int8=True)
"""The graphs of a measured half: of adapters on the layers that peft chooses for the known shapes, all OPT's."""


def bench_edge_memory(
    sizes: BenchSizes,
    directions: int,
    variants: Sequence[Variant],
    say: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Measure every variant on either runtime; returns the settings, and under `methods` a row per variant.

    A row has the MiB of the process on the engine, of its own pages and of files', what the plan says of it, the
    process on torch, and how many times less the engine's takes. A variant that does not fit has its error in place of
    figures.

    Args:
        sizes: the model and the batch.
        directions: random directions of a step.
        variants: the rows of the table.
        say: is called with one line of progress per variant.

    Raises:
        ConfigError: if the engine is not installed, or has not what a variant asks for.
        FailureError: if the shape is unknown, or no variant can be measured.
    """
    version = engine_version()
    configs = engine_configs(sizes, directions, variants)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="hosl-bench-") as name:
        say("making a half and its graphs")
        half = random_halves(sizes, Path(name), GRAPHS) / "client"
        for number, (variant, config) in enumerate(configs.items(), start=1):
            say(f"{number} of {len(configs)}: {variant}")
            try:
                rows.append({"name": variant, **_row(config, half, sizes)})
            except FailureError as error:
                rows.append({"name": variant, "failed": str(error)})
    if all("failed" in row for row in rows):
        raise FailureError(rows[0]["failed"])
    return {**sizes.facts(), "directions": directions, "onnxruntime": version, "methods": rows}


def engine_configs(sizes: BenchSizes, directions: int, variants: Sequence[Variant]) -> dict[str, Config]:
    """The config of each variant by its name, adapters on the layers of `GRAPHS`.

    Raises:
        ConfigError: if the engine has not what a variant asks for.
    """
    configs: dict[str, Config] = {}
    for variant in variants:
        config = variant.config(cut=sizes.cut, directions=directions)
        if config.client.trainable == "lora":
            lora = msgspec.structs.replace(config.client.lora, target_modules=GRAPHS.lora_targets)
            config = msgspec.structs.replace(config, client=msgspec.structs.replace(config.client, lora=lora))
        check_config(config)
        configs[variant.name] = config
    return configs


def _row(config: Config, half: Path, sizes: BenchSizes) -> dict[str, Any]:
    found = edge_client_alone(config, half, sizes.rows, sizes.tokens)
    torch = client_alone(config, half, sizes.rows, sizes.tokens, joining=True)["process_peak_bytes"]
    planned = planned_process_bytes(config, half, sizes.rows, sizes.tokens).process_bytes
    process = found["process_peak_bytes"]
    return {
        "onnx_process_mib": round(process / _MIB, 1),
        "own_pages_mib": round(found["anonymous_bytes"] / _MIB, 1),
        "file_pages_mib": round(found["file_bytes"] / _MIB, 1),
        "planned_mib": round(planned / _MIB, 1),
        "planned_over_measured": round(planned / process, 3),
        "torch_process_mib": round(torch / _MIB, 1),
        "times_less_than_torch": round(torch / process, 2),
    }

"""The runtime that computes this device's half: PyTorch or ONNX Runtime, chosen in one place. No torch.

A runtime is a module with the functions that `join`, `generate` and `predict` call: `torch_runtime`, `onnx_runtime`.
"""

from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args

from hosl.errors import ConfigError
from hosl.split.reading import runtime_json
from hosl.system.machine import machine

RuntimeName: TypeAlias = Literal["torch", "onnx"]
RUNTIMES: tuple[RuntimeName, ...] = get_args(RuntimeName)
_ENGINES = {"torch": "torch", "onnx": "onnxruntime"}
"""By name of a runtime, the module of its engine."""


def open_runtime(asked: RuntimeName | None, half: Path, record: dict[str, Any]) -> Any:
    """The module of a runtime.

    Args:
        asked: its name; None: that of the run so far, else torch where it is installed, else onnx.
        half: the folder of the client half.
        record: of the run so far; empty: there is none.

    Raises:
        ModuleNotFoundError: if the engine of the runtime that was asked for is not installed.
        ConfigError: if none was asked for, and none can be used: there is no engine, or none for this half.
    """
    before = record.get("runtime", {}).get("name")
    name = asked or (before if before in RUNTIMES and _installed(before) else None) or _default(half)
    if not _installed(name):
        raise ModuleNotFoundError(f"No module named {_ENGINES[name]!r}", name=_ENGINES[name])
    return import_module(f"hosl.network.{name}_runtime")


def what_differs(record: dict[str, Any], runtime: Any) -> str | None:
    """A line about a run that goes on with another engine or on another kind of machine; None: on the same.

    Args:
        record: of the run so far.
        runtime: the module of the runtime by which it goes on.
    """
    engine, now = record.get("runtime", {}).get("engine"), machine()
    if engine is None:
        return None
    before = record.get("machine", {})
    kinds = [(before.get("system"), before.get("processor")), (now["system"], now.get("processor"))]
    if (engine, kinds[0]) == (runtime.engine(), kinds[1]):
        return None
    was, becomes = (
        f"{name} on {', '.join(str(fact) for fact in kind if fact)}"
        for name, kind in zip((engine, runtime.engine()), kinds, strict=True)
    )
    return (
        f"this run was trained by {was} so far and goes on by {becomes}: its numbers may differ, in their last digits, "
        "from those of a run that stayed where it was"
    )


def _default(half: Path) -> RuntimeName:
    if _installed("torch"):
        return "torch"
    if not _installed("onnx"):
        raise ConfigError(
            "this device's half needs an engine, and none is installed: `pip install 'hosl[edge]'` brings ONNX "
            "Runtime, `pip install 'hosl[torch]'` PyTorch"
        )
    if not (half / runtime_json.FOLDER / runtime_json.FILE).is_file():
        raise ConfigError(
            f"{half} has no graphs for ONNX Runtime, and PyTorch is not installed here: split the model again with "
            "`hosl split ... --runtime onnx`, or `pip install 'hosl[torch]'`"
        )
    return "onnx"


def _installed(name: RuntimeName) -> bool:
    try:
        return find_spec(_ENGINES[name]) is not None
    except ModuleNotFoundError:  # a finder that says so by raising
        return False

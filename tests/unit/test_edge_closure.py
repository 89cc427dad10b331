"""What a device runs imports neither torch nor transformers, and stays small."""

import json
import subprocess
import sys

_JOIN_MIB = 64
"""What everything that a device imports to train, generate and predict may take, without an inference engine."""
_ENGINE_MIB = 90
"""The same with ONNX Runtime."""

_SCRIPT = """
import importlib, json, pkgutil, sys
from importlib.abc import MetaPathFinder

class OnlyOfTests(MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {"jaxtyping", "beartype", "grpc_tools"}:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, OnlyOfTests())
for module in json.loads(sys.argv[1]):
    importlib.import_module(module)
for package in json.loads(sys.argv[2]):
    for module in pkgutil.iter_modules(importlib.import_module(package).__path__, package + "."):
        importlib.import_module(module.name)
status = dict(line.split(":", 1) for line in open("/proc/self/status"))
print(json.dumps({"loaded": sorted({name.partition(".")[0] for name in sys.modules}),
                  "peak_mib": int(status["VmHWM"].split()[0]) / 1024}))
"""
_COMMANDS = ["hosl.cli.join", "hosl.network.join", "hosl.network.generate", "hosl.network.predict"]
_HEAVY = {
    "torch", "transformers", "peft", "datasets", "pydantic", "pandas", "pyarrow", "jinja2", "scipy", "matplotlib",
    "tyro", "rich", "onnx",
}  # fmt: skip


def loaded(modules, packages=()):
    """The top-level modules that are loaded beside these, and the peak memory of such a process, MiB."""
    command = [sys.executable, "-c", _SCRIPT, json.dumps(modules), json.dumps(packages)]
    ran = subprocess.run(command, capture_output=True, text=True, check=True)
    found = json.loads(ran.stdout)
    return set(found["loaded"]), found["peak_mib"]


def test_the_closure_of_the_devices_commands_is_light():
    names, peak_mib = loaded(_COMMANDS)
    print(f"join, generate and predict: {peak_mib:.1f} MiB at the peak")
    assert names & (_HEAVY | {"onnxruntime"}) == set()
    assert peak_mib <= _JOIN_MIB


def test_the_closure_with_the_engine_is_light():
    modules = [*_COMMANDS, "hosl.network.onnx_runtime", "hosl.planner.edge_budget", "onnxruntime"]
    names, peak_mib = loaded(modules, ["hosl.parties.edge", "hosl.parties.edge.clients"])
    print(f"with ONNX Runtime: {peak_mib:.1f} MiB at the peak")
    assert names & _HEAVY == set()
    assert peak_mib <= _ENGINE_MIB


def test_what_a_device_may_import_has_neither_torch_nor_pages():
    names, _ = loaded(_COMMANDS, ["hosl.core", "hosl.tasks", "hosl.transport", "hosl.wire"])
    assert names & _HEAVY == set()


def test_the_config_schema_needs_no_torch():
    script = "import sys, hosl.config; print('torch' in sys.modules, 'transformers' in sys.modules)"
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert ran.stdout.split() == ["False", "False"]

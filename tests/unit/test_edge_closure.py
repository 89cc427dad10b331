"""What a device runs imports neither torch nor transformers, and stays small."""

import json
import subprocess
import sys

JOIN_MIB, ENGINE_MIB = 64, 90
"""What everything that a device imports to train, generate and predict may take at its peak, without an inference
engine and with ONNX Runtime: held in an environment of its own (`tests/integration/test_bare_device.py`). Here, where
much else is installed, the system makes more pages of the same libraries resident, by what it has read before."""
_OWN_MIB, _OWN_WITH_ENGINE_MIB = 34, 44
"""What of that may be pages of the process's own, which do not depend on such things."""

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
mib = {field: int(status[field].split()[0]) / 1024 for field in ("VmHWM", "RssAnon")}
print(json.dumps({"loaded": sorted({name.partition(".")[0] for name in sys.modules}), **mib}))
"""
COMMANDS = ["hosl.cli.join", "hosl.network.join", "hosl.network.generate", "hosl.network.predict"]
_HEAVY = {
    "torch", "transformers", "peft", "datasets", "pydantic", "pandas", "pyarrow", "jinja2", "scipy", "matplotlib",
    "tyro", "rich", "onnx",
}  # fmt: skip


WITH_ENGINE = [*COMMANDS, "hosl.network.onnx_runtime", "hosl.planner.edge_budget", "onnxruntime"]
_EDGE = ["hosl.parties.edge", "hosl.parties.edge.clients"]


def loaded(modules, packages=(), python=sys.executable, **how):
    """The top-level modules that are loaded beside these; the peak memory of such a process and its own part, MiB."""
    command = [str(python), "-c", _SCRIPT, json.dumps(modules), json.dumps(packages)]
    ran = subprocess.run(command, capture_output=True, text=True, check=True, **how)
    found = json.loads(ran.stdout)
    return set(found["loaded"]), found["VmHWM"], found["RssAnon"]


def test_the_closure_of_the_devices_commands_is_light():
    names, peak_mib, own_mib = loaded(COMMANDS)
    print(f"join, generate and predict: {peak_mib:.1f} MiB at the peak, {own_mib:.1f} of its own")
    assert names & (_HEAVY | {"onnxruntime"}) == set()
    assert own_mib <= _OWN_MIB


def test_the_closure_with_the_engine_is_light():
    names, peak_mib, own_mib = loaded(WITH_ENGINE, _EDGE)
    print(f"with ONNX Runtime: {peak_mib:.1f} MiB at the peak, {own_mib:.1f} of its own")
    assert names & _HEAVY == set()
    assert own_mib <= _OWN_WITH_ENGINE_MIB


def test_what_a_device_may_import_has_neither_torch_nor_pages():
    names, _, _ = loaded(COMMANDS, ["hosl.core", "hosl.tasks", "hosl.transport", "hosl.wire"])
    assert names & _HEAVY == set()


def test_the_config_schema_needs_no_torch():
    script = "import sys, hosl.config; print('torch' in sys.modules, 'transformers' in sys.modules)"
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert ran.stdout.split() == ["False", "False"]

"""What a device runs imports neither torch nor transformers, and stays small."""

import json
import subprocess
import sys

_BUDGET_MIB = 64
_NETWORK_MIB = 48
"""What speaking to a server may add to that."""

_SCRIPT = """
import importlib, json, pkgutil, sys
import hosl
for package in ("hosl.core", "hosl.tasks"):
    for module in pkgutil.iter_modules(importlib.import_module(package).__path__, package + "."):
        importlib.import_module(module.name)
status = dict(line.split(":", 1) for line in open("/proc/self/status"))
before_mib = int(status["VmRSS"].split()[0]) / 1024
import hosl.network.generate, hosl.network.join
heavy = {"torch", "transformers", "peft", "datasets", "pydantic", "pandas", "pyarrow", "jinja2", "scipy", "matplotlib"}
heavy &= set(sys.modules)
status = dict(line.split(":", 1) for line in open("/proc/self/status"))
rss_mib = int(status["VmRSS"].split()[0]) / 1024
print(json.dumps({"heavy": sorted(heavy), "rss_mib": before_mib, "network_mib": rss_mib - before_mib}))
"""


def test_the_edge_closure_is_light():
    ran = subprocess.run([sys.executable, "-c", _SCRIPT], capture_output=True, text=True, check=True)
    found = json.loads(ran.stdout)
    print(f"edge closure: {found['rss_mib']:.1f} MiB resident, join adds {found['network_mib']:.1f}")
    assert found["heavy"] == []
    assert found["rss_mib"] <= _BUDGET_MIB
    assert found["network_mib"] <= _NETWORK_MIB


def test_the_config_schema_needs_no_torch():
    script = "import sys, hosl.config; print('torch' in sys.modules, 'transformers' in sys.modules)"
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert ran.stdout.split() == ["False", "False"]

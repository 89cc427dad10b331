"""`hosl` where torch, and what only tests have, cannot be found: python without_torch.py [--and MODULE] join ...

In place of the command stands a program, such as dying_client.py with its arguments; it is run then.
"""

import runpy
import sys
from importlib.abc import MetaPathFinder

_ABSENT = {"torch", "transformers", "peft", "onnx", "onnxscript", "jaxtyping", "beartype", "grpc_tools"}


class Absent(MetaPathFinder):
    """Answers for the modules that a device does not have."""

    def find_spec(self, name, path=None, target=None):
        """Refuse a module as where it is not installed."""
        if name.partition(".")[0] in _ABSENT:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


sys.meta_path.insert(0, Absent())
sys.argv = sys.argv[1:]
if sys.argv[0] == "--and":
    _ABSENT.add(sys.argv[1])
    sys.argv = sys.argv[2:]
if sys.argv[0].endswith(".py"):
    runpy.run_path(sys.argv[0], run_name="__main__")
else:
    from hosl.cli import main

    sys.exit(main(sys.argv))

"""`hosl` before any command, in a process of its own."""

import subprocess
import sys
from importlib.metadata import version

from hosl.cli import main

_HEAVY_AFTER_VERSION = """
import sys
from hosl.cli import main
status = main(["--version"])
heavy = {"torch", "transformers", "numpy", "yaml", "grpc"} & set(sys.modules)
sys.exit(f"imported: {heavy}" if heavy else status)
"""


def run(*words):
    return subprocess.run([sys.executable, *words], capture_output=True, text=True, timeout=60)


def test_the_version_is_that_of_the_installed_package():
    said = run("-m", "hosl", "--version")
    assert (said.returncode, said.stdout, said.stderr) == (0, f"hosl {version('hosl')}\n", "")


def test_the_version_is_told_without_torch():
    said = run("-c", _HEAVY_AFTER_VERSION)
    assert (said.returncode, said.stderr) == (0, "")


def test_python_m_hosl_is_the_command():
    assert run("-m", "hosl", "--help").stdout.startswith("hosl COMMAND ...")
    refused = run("-m", "hosl", "no-such-command")
    assert refused.returncode == 2
    assert "unknown command `no-such-command`" in refused.stderr


def test_help_names_every_flag_that_needs_no_command(capsys):
    assert main(["--help"]) == 0
    assert "--version" in capsys.readouterr().out

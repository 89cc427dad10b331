"""The halves that benchmarks measure: a known shape with random weights, cut, as `hosl split` writes it."""

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from hosl.errors import FailureError
from hosl.split.specs import GraphSpec

_PROGRAM = (
    "import sys, msgspec; from pathlib import Path; from hosl.split import split_folder; "
    "from hosl.split.shapes import save_random_model; from hosl.split.specs import GraphSpec; "
    "folder = Path(sys.argv[1]); save_random_model(sys.argv[2], folder / 'model'); "
    "graphs = msgspec.json.decode(sys.argv[4], type=GraphSpec | None); "
    "split_folder(folder / 'model', int(sys.argv[3]), folder / 'halves', graphs=graphs)"
)


@dataclass(frozen=True)
class BenchSizes:
    """The model of a benchmark and its batch."""

    shape: str
    """The name of a known shape (`hosl.split.shapes`); its weights are random."""
    cut: int
    """Blocks on the client."""
    rows: int
    """Rows of the batch."""
    tokens: int
    """Tokens per row."""

    def facts(self) -> dict[str, Any]:
        """The sizes as they open a benchmark's result."""
        return {"shape": self.shape, "cut": self.cut, "rows": self.rows, "tokens": self.tokens}


def random_halves(sizes: BenchSizes, folder: Path, graphs: GraphSpec | None = None) -> Path:
    """Make both halves below `folder`; returns the folder with `client` and `server` in it.

    Another process makes them, so that the memory of this process stays its own. `graphs`: those to make for an
    inference engine; None: no graphs.

    Raises:
        FailureError: if the shape is unknown, has no such cut, or there is no room.
    """
    spec = msgspec.json.encode(graphs).decode()
    command = [sys.executable, "-c", _PROGRAM, str(folder), sizes.shape, str(sizes.cut), spec]
    process = subprocess.run(command, capture_output=True, text=True)
    if process.returncode:
        reason = " ".join(process.stderr.strip().splitlines()[-1:])
        raise FailureError(
            f"the benchmark's model ({sizes.shape}, cut {sizes.cut}) could not be made: {reason}"
        )
    return folder / "halves"

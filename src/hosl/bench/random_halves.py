"""The halves that benchmarks measure: a known shape with random weights, cut, as `hosl split` writes it."""

import subprocess
import sys
from pathlib import Path

from hosl.errors import FailureError

_PROGRAM = (
    "import sys; from pathlib import Path; from hosl.split import split_folder; "
    "from hosl.split.shapes import save_random_model; folder = Path(sys.argv[1]); "
    "save_random_model(sys.argv[2], folder / 'model'); "
    "split_folder(folder / 'model', int(sys.argv[3]), folder / 'halves')"
)


def random_halves(shape: str, cut: int, folder: Path) -> Path:
    """The folder of both halves, below `folder`. Made by another process, so that this one's memory stays its own.

    Raises:
        FailureError: if the shape is unknown, has no such cut, or there is no room.
    """
    command = [sys.executable, "-c", _PROGRAM, str(folder), shape, str(cut)]
    made = subprocess.run(command, capture_output=True, text=True)
    if made.returncode:
        said = made.stderr.strip().splitlines()[-1:]
        raise FailureError(f"the benchmark's model ({shape}, cut {cut}) could not be made: {' '.join(said)}")
    return folder / "halves"

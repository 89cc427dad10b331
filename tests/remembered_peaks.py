"""The plan of a report's page, made once for one config, model and batch: half of the time of a tiny run is its page.

Plans are files of one folder for all processes of a test session. A process that is forked for a test
(`tests/integration/forked.py`) imports this module first, and so remembers as the session does.
"""

import json
import os
from hashlib import sha256
from pathlib import Path

import msgspec

from hosl.report import planned

FOLDER = "HOSL_TEST_PEAKS"
"""The environment's variable with the folder, for processes that are forked later."""
_peaks = planned._peaks


def remember(folder):
    """Look in `folder` before a plan is made, and keep there what was made."""

    def remembered(config, shape, batch, cuts):
        settings = msgspec.to_builtins(config) | {"output_dir": None, "task": None, "seed": None}
        settings["model"] |= {"name": None}
        asked = json.dumps(
            [settings, shape.config.to_dict() | {"_name_or_path": None}, shape.head, batch, list(cuts)],
            default=str,
        )
        file = folder / f"{sha256(asked.encode()).hexdigest()}.json"
        if not file.is_file():
            partial = file.with_suffix(f".{os.getpid()}")
            partial.write_text(json.dumps([*_peaks(config, shape, batch, cuts).items()]))
            partial.rename(file)
        return dict(json.loads(file.read_text()))

    planned._peaks = remembered


def forget():
    """Make every plan anew."""
    planned._peaks = _peaks


if FOLDER in os.environ:
    remember(Path(os.environ[FOLDER]))

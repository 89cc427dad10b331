"""The theorem's rates, measured: a resumable study of many short runs, then its tables and pictures.

python -m research.convergence_rate research/convergence_rate/rate.yaml [--dry-run]     # from the root; resumes
"""

import argparse
import json
import sys
from pathlib import Path

from hosl.errors import HoslError
from hosl.study.config import read_study
from research.convergence_rate.config import parse_rate_study
from research.convergence_rate.study import missing_cells, run_rate_study


def main(arguments: list[str] | None = None) -> int:
    """Measure what is missing and render; 130 after Ctrl-C, with what was measured kept."""
    parser = argparse.ArgumentParser(
        prog="python -m research.convergence_rate",
        description=__doc__,
        formatter_class=argparse.RawTextHelpFormatter,
    )
    parser.add_argument("study", help="a YAML file, such as research/convergence_rate/rate.yaml")
    parser.add_argument("--dry-run", action="store_true", help="count the cells, measure nothing")
    asked = parser.parse_args(arguments)
    try:
        study = parse_rate_study(read_study(asked.study), where=asked.study)
        if asked.dry_run:
            print(json.dumps({"cells": len(missing_cells(study, {})), "problems": ", ".join(study.problems)}))
            return 0
        done = run_rate_study(study)
    except HoslError as error:
        sys.stderr.write(f"{error}\n")
        return error.exit_status
    if not done["finished"]:
        sys.stderr.write("stopped; the same command goes on\n")
        return 130
    print(Path(done["table"]).read_text(encoding="utf-8"))
    return 0


if __name__ == "__main__":
    sys.exit(main())

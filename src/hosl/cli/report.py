"""`hosl report RUN... [-o FILE]`: one self-contained page of one run, of many, or of a study's chosen ones."""

from importlib.util import find_spec
from pathlib import Path

from hosl.cli.answers import answer, command_parser
from hosl.cli.run_argument import RUN_HELP, named_run


def run(words: list[str]) -> int:
    """Write the page and print where it is."""
    parser = command_parser(
        "report", "One page of one run or of many: curves, accuracy, memory, bytes, time."
    )
    parser.add_argument(
        "run", nargs="+", help=f"{RUN_HELP}; or a study's folder, whose chosen runs are taken"
    )
    parser.add_argument(
        "-o", "--out", metavar="FILE",
        help="default: report.html in the folder; of several folders, in the current one",
    )  # fmt: skip
    asked = parser.parse_args(words)

    from hosl.report.build import write_comparison, write_report, write_study_report
    from hosl.report.planned import planned_lines
    from hosl.report.render import check_installed
    from hosl.report.runs import is_study, run_folders

    check_installed()
    planner = planned_lines if find_spec("torch") else None  # without it: measured memory only
    folders, out = [named_run(word) for word in asked.run], Path(asked.out) if asked.out else None
    if len(folders) > 1:
        runs = run_folders(folders)
        written = write_comparison(runs, out or Path("report.html"), planner=planner)
    elif is_study(folders[0]):
        written = write_study_report(folders[0], out=out, planner=planner)
    else:
        written = write_report(folders[0], out=out, planner=planner)
    answer({"report": str(written)}, as_json=asked.json)
    return 0

"""`hosl report RUN`: write report.html again from the files of a run."""

from pathlib import Path

from hosl.cli.answers import answer, verb_parser
from hosl.errors import FolderError


def run(words: list[str]) -> int:
    """Write the page and print where it is."""
    parser = verb_parser("report", "Write a run's report.html again.")
    parser.add_argument("run", help="a run's folder")
    known = parser.parse_args(words)
    if not (Path(known.run) / "metrics.jsonl").is_file():
        raise FolderError(f"{known.run} is not a run's folder: it has no metrics.jsonl")

    from hosl.run.report import write_report

    answer({"report": str(write_report(Path(known.run)))}, as_json=known.json)
    return 0

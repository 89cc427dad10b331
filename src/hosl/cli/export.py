"""`hosl export RUN OUT`: one Hugging Face checkpoint from a run's newest weights."""

from pathlib import Path

from hosl.cli.answers import answer, command_parser
from hosl.cli.run_argument import BEST_HELP, RUN_HELP, named_run


def run(arguments: list[str]) -> int:
    """Write OUT, which must not exist or be empty. Returns the exit status.

    Raises:
        FolderError: if RUN holds no run, or OUT is taken.
        ConfigError: if --tie is asked of a model that is not tied.
    """
    parser = command_parser("export", "Merge both halves into one checkpoint that plain transformers loads.")
    parser.add_argument("run", help=RUN_HELP)
    parser.add_argument("out", help="a folder to make; adapters also go to OUT/adapter")
    parser.add_argument(
        "--tie",
        choices=("embedding", "head"),
        help="of a tied model, the copy that stands for both; default: two",
    )
    parser.add_argument("--best", action="store_true", help=BEST_HELP)
    options = parser.parse_args(arguments)

    from hosl.training.train import export

    run_folder = named_run(options.run)
    export(run_folder, Path(options.out), best=options.best, tie=options.tie)
    answer({"run": str(run_folder), "out": options.out}, as_json=options.json)
    return 0

"""`hosl export RUN OUT`: one Hugging Face checkpoint from a run's newest weights."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hosl.cli.answers import answer, command_parser
from hosl.cli.run_argument import BEST_HELP, RUN_HELP, named_run
from hosl.cli.use.gguf import add_gguf, gguf_written
from hosl.errors import ConfigError


def run(arguments: list[str]) -> int:
    """Write OUT, which must not exist or be empty. Returns the exit status.

    Raises:
        FolderError: if RUN holds no run, or OUT is taken.
        ConfigError: if --tie is asked of a model that is not tied, or --gguf of a family that cannot be written so.
    """
    parser = command_parser("export", "Merge both halves into one checkpoint that plain transformers loads.")
    parser.add_argument("run", help=RUN_HELP)
    parser.add_argument(
        "out", nargs="?", help="a folder to make; adapters also go to OUT/adapter. Not needed with --gguf"
    )
    add_gguf(parser)
    parser.add_argument(
        "--tie",
        choices=("embedding", "head"),
        help="of a tied model, the copy that stands for both; default: two",
    )
    parser.add_argument("--best", action="store_true", help=BEST_HELP)
    options = parser.parse_args(arguments)

    if options.out is None and options.gguf is None:
        raise ConfigError("hosl export needs OUT, a folder to make, or --gguf FILE, or both")

    from hosl.system.run_folder import read_record
    from hosl.training.train import export

    run_folder = named_run(options.run)
    file = None if options.gguf is None else Path(options.gguf)
    if file is not None:
        from hosl.split.gguf_export import check_gguf

        check_gguf((read_record(run_folder) or {}).get("model", {}).get("family"), file)
    with _folder(options.out, file) as out:
        export(run_folder, out, best=options.best, tie=options.tie)
        written = {} if file is None else gguf_written(out, file, options.gguf_dtype)
    answer({"run": str(run_folder), "out": options.out, **written}, as_json=options.json)
    return 0


@contextmanager
def _folder(out: str | None, file: Path | None) -> Iterator[Path]:
    """The folder of the checkpoint; where only a GGUF file is wanted, one beside it that is deleted at the end."""
    if out is not None:
        yield Path(out)
        return
    assert file is not None, "one of the two is wanted"
    between = file.with_name(f".{file.name}.model")
    shutil.rmtree(between, ignore_errors=True)  # left by a process that was killed
    try:
        yield between
    finally:
        shutil.rmtree(between, ignore_errors=True)

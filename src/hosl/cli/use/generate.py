"""`hosl generate RUN --prompt TEXT`: what a tuned model says, here or across the split."""

import argparse
import json
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

from hosl.cli.answers import (
    Parser,
    add_connection,
    add_runtime,
    answer,
    check_across,
    command_parser,
    connection,
    say,
)
from hosl.cli.run_argument import BEST_HELP, named_run
from hosl.cli.use.choice import add_choice, wanted_answers
from hosl.cli.use.prompts import Prompt, read_prompts
from hosl.errors import ConfigError
from hosl.system.atomic import whole_file
from hosl.system.run_folder import ANSWERS


def run(arguments: list[str]) -> int:
    """Generate; answers go to standard output as they come, what they come from to standard error.

    Returns the exit status.

    Raises:
        RequestError: if an argument, the model or a prompt cannot be used.
        FailureError: if weights are damaged.
    """
    parser = command_parser("generate", "What a tuned model says to prompts, token by token.")
    parser.add_argument(
        "model",
        help="a run's folder or its CONFIG.yaml, or a model's folder or name; with --to: OUT/client of `hosl split` or "
        "a run of `hosl join`",
    )
    _add_prompts(parser)
    add_choice(parser)
    parser.add_argument("--before", action="store_true", help="also what the model said before the run")
    parser.add_argument("--best", action="store_true", help=BEST_HELP)
    parser.add_argument(
        "--keep", action="store_true", help="keep the answers in the run's folder; its report.html shows them"
    )
    add_connection(parser, required=False)
    add_runtime(parser)
    parser.add_argument(
        "--run",
        default="",
        metavar="NAME",
        help="with --to: a run on the server; default: this half's newest",
    )
    options = parser.parse_args(arguments)
    prompts = read_prompts(options.prompt, options.prompts)
    kept_in = _folder_to_keep_in(options) if options.keep else None
    wanted = wanted_answers(
        options, chat=options.chat
    )  # an impossible one is refused before anything is loaded

    from hosl.inference.text_model import TextModel
    from hosl.tasks import TextTokenizer

    models, read = _models_across(options) if options.to else _models_here(options)
    columns: dict[str, list[Any]] = {}
    for when, opened in models.items():
        with opened() as ready:
            say(f"{when}: {ready.says}")
            tokenizer = TextTokenizer.load(ready.folder, read)
            asked = replace(wanted, chat_template=ready.chat_template)
            speaker = TextModel(ready.model, tokenizer, ready.folder, asked, say)
            columns[when] = [
                _shown(speaker, number, prompt.text, many=len(prompts) > 1, silent=options.json)
                for number, prompt in enumerate(prompts)
            ]
    rows = _rows(prompts, columns)
    if kept_in is not None:
        _keep(kept_in, rows)
    if options.json:
        answer({"model": options.model, "answers": rows}, as_json=True)
    return 0


def _rows(prompts: list[Prompt], columns: dict[str, list[Any]]) -> list[dict[str, Any]]:
    """A row for each prompt: what the model says now, what it said before, and what was wanted."""
    rows: list[dict[str, Any]] = []
    for number, (prompt, now) in enumerate(zip(prompts, columns["now"], strict=True)):
        row = {"prompt": prompt.text, "text": now.text, "tokens": len(now.tokens), "end": now.end}
        if "before" in columns:
            row["before"] = columns["before"][number].text
        if prompt.wanted is not None:
            row["wanted"] = prompt.wanted
        rows.append(row)
    return rows


def _folder_to_keep_in(options: argparse.Namespace) -> Path:
    """The run's folder in which the answers are kept."""
    folder = named_run(options.model)
    if not (folder / "metrics.jsonl").is_file():
        raise ConfigError(f"--keep is for the folder of a run, {options.model} is none; leave it out")
    return folder


def _keep(run: Path, rows: list[dict[str, Any]]) -> None:
    """Write the answers into a run's folder, and its page anew."""
    from hosl.report.build import write_report

    whole_file(run / ANSWERS, json.dumps(rows, ensure_ascii=False, indent=1).encode())
    page = write_report(run)
    say(f"answers are kept in {run / ANSWERS}" + ("" if page is None else f"; {page} shows them"))


_Models = dict[str, Callable[[], AbstractContextManager[Any]]]
"""Models by when they spoke; each is loaded when it is opened."""


def _models_across(options: argparse.Namespace) -> tuple[_Models, None]:
    """The models across the split that are asked for; a half's tokenizer.json is read as it is."""
    if options.best:
        raise ConfigError("--best is for a run whose both halves are here; leave it out, or --to")
    line, proof = connection(options)

    from hosl.network.generate import SplitUse, split_model_for_use

    use = SplitUse(path=Path(options.model), line=line, proof=proof, run=options.run, runtime=options.runtime)
    models: _Models = {"now": lambda: split_model_for_use(use, say)}
    if options.before:
        models["before"] = lambda: split_model_for_use(replace(use, base=True), say)
    return models, None


def _models_here(options: argparse.Namespace) -> tuple[_Models, Callable[[Path], Any]]:
    """The models of this machine that are asked for, and how their tokenizer is read."""
    if options.run:
        raise ConfigError("--run names a run on a server; give --to too, or leave it out")
    check_across(options)

    from hosl.inference.local import check_has_before, model_before, ready_model
    from hosl.split import transformers_tokenizer

    name = str(named_run(options.model)) if Path(options.model).exists() else options.model
    models: _Models = {"now": lambda: nullcontext(ready_model(name, best=options.best))}
    if options.before:
        check_has_before(name)  # before the model speaks
        models["before"] = lambda: nullcontext(model_before(name))
    return models, transformers_tokenizer


def _add_prompts(parser: Parser) -> None:
    parser.add_argument(
        "--prompt", action="append", default=[], metavar="TEXT",
        help="a prompt; may be given several times; - reads one from standard input",
    )  # fmt: skip
    parser.add_argument(
        "--prompts", metavar="FILE",
        help="a text file of prompts, one per line, or rows of `prompt` and `completion` (.jsonl)",
    )  # fmt: skip
    parser.add_argument(
        "--chat",
        action="store_true",
        help="a prompt is a user's message, put into the tokenizer's chat template",
    )


def _shown(speaker: Any, number: int, prompt: str, *, many: bool, silent: bool) -> Any:
    """The answer to a prompt; written to standard output piece by piece unless `silent`."""

    def write(text: str) -> None:
        if not silent:
            sys.stdout.write(text)
            sys.stdout.flush()

    if many:
        write(f"{'' if number == 0 else chr(10)}> {' '.join(prompt.split())}\n")
    made = speaker.answer(prompt, number, write)
    write("\n")
    return made

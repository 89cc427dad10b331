"""`hosl predict RUN ROWS -o OUT.jsonl`: the labels of new rows, or the answers to them, here or across the split."""

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hosl.cli.answers import (
    add_connection,
    add_runtime,
    answer,
    check_across,
    command_parser,
    connection,
    say,
)
from hosl.cli.run_argument import BEST_HELP, named_run
from hosl.cli.use.choice import add_choice, given_choice, wanted_answers
from hosl.config import Config, load_config
from hosl.errors import ConfigError
from hosl.tasks import SftConfig


def run(arguments: list[str]) -> int:
    """Predict; OUT appears whole or not at all. Returns the exit status.

    Raises:
        RequestError: if an argument, the model or a row cannot be used, or the server refuses.
        FailureError: if weights are damaged, or OUT cannot be written.
    """
    parser = command_parser(
        "predict",
        "The label of every row with the probability of each, or of a model that learned texts (sft) the answer to "
        "every row, as one JSON object per line.",
    )
    parser.add_argument(
        "model",
        help="a run's folder or its CONFIG.yaml; with --config a model's folder or name; with --to a run of `hosl "
        "join`, or OUT/client of `hosl split` with --config",
    )
    parser.add_argument(
        "rows", help="a file or a dataset folder, in the columns of the task; needs no labels and no answers"
    )
    parser.add_argument("-o", "--out", required=True, metavar="OUT.jsonl", help="a file to make")
    parser.add_argument("--config", help="a YAML file, as for `hosl train`, of a model that is no run")
    parser.add_argument("--split", default="test", help="of a saved dataset that has several splits")
    parser.add_argument(
        "--keep-columns", action="store_true", help="also write the columns that a row was read from"
    )
    parser.add_argument("--best", action="store_true", help=BEST_HELP)
    add_connection(parser, required=False)
    add_runtime(parser)
    add_choice(parser)
    options = parser.parse_args(arguments)
    check_across(options)
    if Path(options.model).exists():
        options.model = str(named_run(options.model))
    config = _task_config(options)
    if config is not None and isinstance(config.task, SftConfig):
        result = _answers(options, config)
    else:
        if given := given_choice(parser, options):
            raise ConfigError(f"{given[0]} is for answers, and this task has labels; leave it out")
        result = _labels(options)
    answer({"out": options.out, **result}, as_json=options.json)
    return 0


def _task_config(options: argparse.Namespace) -> Config | None:
    """The settings that name the task: those given, or the run's; None: there are none, which is refused later."""
    if options.config is not None:
        return load_config(options.config)
    of_run = Path(options.model) / "config.yaml"
    return load_config(of_run) if of_run.is_file() else None


def _answers(options: argparse.Namespace, config: Config) -> dict[str, Any]:
    """Write the answer to every row; returns what is said of them."""
    from hosl.inference.answered_rows import asked_rows, check_room, write_answers
    from hosl.inference.text_model import TextModel
    from hosl.system.atomic import whole_lines
    from hosl.system.progress import open_view
    from hosl.tasks import TextTokenizer, own_chat_template

    wanted = wanted_answers(options, chat_template=own_chat_template(config.task))
    asked = asked_rows(options.rows, options.split)
    with whole_lines(Path(options.out)) as out, _text_model(options, config) as (ready, read):
        speaker = TextModel(ready.model, TextTokenizer.load(ready.folder, read), ready.folder, wanted)
        short = check_room(speaker, asked.rows, wanted.max_new_tokens)
        for note in (ready.says, *asked.notes, *short):
            say(note)
        with open_view("predict", 0, len(asked.rows), unit="row") as view:
            return write_answers(
                speaker,
                asked.rows,
                out,
                with_columns=options.keep_columns,
                done=lambda count: view.step(count, {}),
            )


@contextmanager
def _text_model(options: argparse.Namespace, config: Config) -> Iterator[tuple[Any, Any]]:
    """The model that answers, for as long as the context, and how its tokenizer is read."""
    path = Path(options.model)
    if options.to is None:
        from hosl.inference.local import ready_model
        from hosl.split import transformers_tokenizer

        if options.config is not None and (path / "config.yaml").is_file():
            raise ConfigError(f"{path} is a run and has its own config; leave --config out")
        yield ready_model(options.model, best=options.best), transformers_tokenizer
        return
    if options.best:
        raise ConfigError("--best is for a run whose both halves are here; leave it out, or --to")
    line, proof = connection(options)

    from hosl.network.generate import SplitUse, check_not_blurred, split_model_for_use
    from hosl.network.join import begun_run

    check_not_blurred(config, path)
    base = False
    if (path / "half.json").is_file():
        begun = begun_run(config)
        path, base = begun or path, begun is None
    elif options.config is not None:
        raise ConfigError(f"{path} is a run and has its own config; leave --config out")
    with split_model_for_use(
        SplitUse(path=path, line=line, proof=proof, base=base, runtime=options.runtime), say
    ) as ready:
        yield ready, None


def _labels(options: argparse.Namespace) -> dict[str, Any]:
    """Write the label of every row; returns what is said of them."""
    from hosl.inference.new_rows import RowReader
    from hosl.inference.predicting import predictions, write_predictions
    from hosl.system.atomic import whole_lines
    from hosl.system.progress import open_view

    with whole_lines(Path(options.out)) as out, _scorer(options) as scorer:
        reader = RowReader(scorer.config.task, scorer.labels, scorer.tokenizer)
        rows = reader.read(options.rows, options.split)
        for note in (scorer.says, *reader.notes):
            say(note)
        predicted = predictions(
            scorer.client, scorer.server, reader.task, reader.encoded(rows),
            rows_per_batch=scorer.config.per_device_eval_batch_size,
        )  # fmt: skip
        with open_view("predict", 0, len(rows), unit="row") as view:
            tally = write_predictions(
                predicted, reader.task.labels, out, with_scores=reader.task.head == "causal",
                with_columns=options.keep_columns, done=lambda count: view.step(count, {}),
            )  # fmt: skip
    for note in reader.cuts():
        say(note)
    if reader.has_labels(rows) and tally.labelled < tally.rows:
        say(
            f"{tally.rows - tally.labelled} of {tally.rows} rows have no label of {', '.join(reader.task.labels)}; the "
            "accuracy is that of the others"
        )
    return tally.result()


@contextmanager
def _scorer(options: argparse.Namespace) -> Iterator[Any]:
    """The model that is asked for, for as long as the context."""
    config = None if options.config is None else load_config(options.config)
    if options.to is None:
        from hosl.inference.scorer import scorer_here

        yield scorer_here(options.model, config, best=options.best)
        return
    if options.best:
        raise ConfigError("--best is for a run whose both halves are here; leave it out, or --to")
    line, proof = connection(options)

    from hosl.network.predict import PredictOptions, scorer_across

    with scorer_across(
        PredictOptions(path=Path(options.model), line=line, proof=proof, runtime=options.runtime),
        config,
        say,
    ) as scorer:
        yield scorer

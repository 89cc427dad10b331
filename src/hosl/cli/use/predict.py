"""`hosl predict RUN ROWS -o OUT.jsonl`: the labels of new rows, here or across the split."""

import argparse
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hosl.cli.answers import add_connection, answer, command_parser, connection
from hosl.cli.run_argument import BEST_HELP, named_run
from hosl.config import load_config
from hosl.errors import ConfigError


def run(arguments: list[str]) -> int:
    """Predict; OUT appears whole or not at all. Returns the exit status.

    Raises:
        RequestError: if an argument, the model or a row cannot be used, or the server refuses.
        FailureError: if weights are damaged, or OUT cannot be written.
    """
    parser = command_parser(
        "predict", "The label of every row with the probability of each, as one JSON object per line."
    )
    parser.add_argument(
        "model",
        help="a run's folder or its CONFIG.yaml; with --config a model's folder or name; with --to a run of `hosl "
        "join`, or OUT/client of `hosl split` with --config",
    )
    parser.add_argument(
        "rows", help="a file or a dataset folder, in the columns of the task; needs no labels"
    )
    parser.add_argument("-o", "--out", required=True, metavar="OUT.jsonl", help="a file to make")
    parser.add_argument("--config", help="a YAML file, as for `hosl train`, of a model that is no run")
    parser.add_argument("--split", default="test", help="of a saved dataset that has several splits")
    parser.add_argument(
        "--keep-columns", action="store_true", help="also write the columns that a row was read from"
    )
    parser.add_argument("--best", action="store_true", help=BEST_HELP)
    add_connection(parser, required=False)
    options = parser.parse_args(arguments)

    from hosl.inference.new_rows import RowReader
    from hosl.inference.predicting import predictions, write_predictions
    from hosl.system.atomic import whole_lines
    from hosl.system.progress import open_view

    with whole_lines(Path(options.out)) as out, _scorer(options) as scorer:
        reader = RowReader(scorer.config.task, scorer.labels, scorer.tokenizer)
        rows = reader.read(options.rows, options.split)
        for note in (scorer.says, *reader.notes):
            _say(note)
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
        _say(note)
    if reader.has_labels(rows) and tally.labelled < tally.rows:
        _say(
            f"{tally.rows - tally.labelled} of {tally.rows} rows have no label of {', '.join(reader.task.labels)}; the "
            "accuracy is that of the others"
        )
    answer({"out": options.out, **tally.result()}, as_json=options.json)
    return 0


@contextmanager
def _scorer(options: argparse.Namespace) -> Iterator[Any]:
    """The model that is asked for, for as long as the context."""
    config = None if options.config is None else load_config(options.config)
    if options.to is None:
        from hosl.inference.scorer import scorer_here

        name = str(named_run(options.model)) if Path(options.model).exists() else options.model
        yield scorer_here(name, config, best=options.best)
        return
    if options.best:
        raise ConfigError("--best is for a run whose both halves are here; leave it out, or --to")
    line, proof = connection(options)

    from hosl.network.predict import PredictOptions, scorer_across

    with scorer_across(
        PredictOptions(path=Path(options.model), line=line, proof=proof), config, _say
    ) as scorer:
        yield scorer


def _say(text: str) -> None:
    sys.stderr.write(f"hosl: {text}\n")

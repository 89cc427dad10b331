"""`hosl eval RUN [--split dev|test]`: score a run's newest weights."""

from collections.abc import Sequence
from typing import Any

from hosl.cli.answers import answer, command_parser
from hosl.cli.run_argument import BEST_HELP, RUN_HELP, named_run


def run(arguments: list[str]) -> int:
    """Evaluate and print; nothing in the run's folder changes. Returns the exit status.

    Raises:
        FolderError, CheckpointError: if the folder holds no run, or a damaged one.
    """
    parser = command_parser(
        "eval",
        "Accuracy, macro F1, loss and the scores of each class, of a run's newest weights; where texts are learned "
        "loss, perplexity and the share of tokens right.",
    )
    parser.add_argument("run", help=RUN_HELP)
    parser.add_argument("--split", choices=("dev", "test"), default="dev")
    parser.add_argument("--best", action="store_true", help=BEST_HELP)
    options = parser.parse_args(arguments)

    from hosl.evaluation import by_class, evaluate
    from hosl.inference.own_metric import own_metric
    from hosl.training.local_session import load_run

    run_folder = named_run(options.run)
    session = load_run(run_folder, best=options.best, weights_only=True)
    examples = session.task.test if options.split == "test" else session.task.dev
    evaluation = evaluate(
        session.client, session.server_to_call(in_round=False), session.task, examples,
        rows_per_batch=session.config.per_device_eval_batch_size,
    )  # fmt: skip
    result = {"run": str(run_folder), "step": session.step, "split": options.split, **evaluation.numbers()}
    metric = own_metric(session.config, options.split)
    if metric is not None:
        figures = metric.of_run(run_folder, best=options.best)
        result |= {f"own_{name}": value for name, value in figures.items()}
    if evaluation.confusion is not None:
        labels, confusion = session.task.labels, evaluation.confusion.tolist()
        classes = by_class(labels, evaluation.confusion)
        if options.json:
            result |= {"classes": classes, "confusion": confusion}
        else:
            result |= _lines(classes, labels, confusion)
    answer(result, as_json=options.json)
    return 0


def _lines(
    classes: Sequence[dict[str, Any]], labels: Sequence[str], confusion: Sequence[Sequence[int]]
) -> dict[str, str]:
    """A line for each class: its scores, and its row of the confusion matrix without zeros."""
    lines = {}
    for row, counts in zip(classes, confusion, strict=True):
        scores = ", ".join(f"{name} {row[name]:.4f}" for name in ("precision", "recall", "f1"))
        taken = ", ".join(f"{label} {count}" for label, count in zip(labels, counts, strict=True) if count)
        lines[f"class {row['label']}"] = (
            f"{scores}, {row['support']} examples{taken and f', taken for: {taken}'}"
        )
    return lines

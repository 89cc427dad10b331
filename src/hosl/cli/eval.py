"""`hosl eval RUN [--split dev|test]`: score a run's newest weights."""

from dataclasses import asdict
from pathlib import Path

from hosl.cli.answers import answer, verb_parser


def run(words: list[str]) -> int:
    """Evaluate and print; nothing in the run's folder changes."""
    parser = verb_parser("eval", "Accuracy, macro F1 and loss of a run's newest weights.")
    parser.add_argument("run", help="a run's folder")
    parser.add_argument("--split", choices=("dev", "test"), default="dev")
    known = parser.parse_args(words)

    from hosl.evaluation import evaluate
    from hosl.training.local_session import load_run

    session = load_run(Path(known.run))
    examples = session.task.test if known.split == "test" else session.task.dev
    found = evaluate(
        session.client, session.asked_server(metered=False), session.task, examples,
        rows_per_batch=session.config.per_device_eval_batch_size,
    )  # fmt: skip
    answer(
        {"run": known.run, "step": session.step, "split": known.split, **asdict(found)}, as_json=known.json
    )
    return 0

"""`hosl eval RUN [--split dev|test]`: score a run's newest weights."""

from dataclasses import asdict

from hosl.cli.answers import answer, command_parser
from hosl.cli.run_argument import BEST_HELP, RUN_HELP, named_run


def run(arguments: list[str]) -> int:
    """Evaluate and print; nothing in the run's folder changes. Returns the exit status.

    Raises:
        FolderError, CheckpointError: if the folder holds no run, or a damaged one.
    """
    parser = command_parser("eval", "Accuracy, macro F1 and loss of a run's newest weights.")
    parser.add_argument("run", help=RUN_HELP)
    parser.add_argument("--split", choices=("dev", "test"), default="dev")
    parser.add_argument("--best", action="store_true", help=BEST_HELP)
    options = parser.parse_args(arguments)

    from hosl.evaluation import evaluate
    from hosl.training.local_session import load_run

    run_folder = named_run(options.run)
    session = load_run(run_folder, best=options.best)
    examples = session.task.test if options.split == "test" else session.task.dev
    evaluation = evaluate(
        session.client, session.server_to_call(under_meter=False), session.task, examples,
        rows_per_batch=session.config.per_device_eval_batch_size,
    )  # fmt: skip
    answer(
        {"run": str(run_folder), "step": session.step, "split": options.split, **asdict(evaluation)},
        as_json=options.json,
    )
    return 0

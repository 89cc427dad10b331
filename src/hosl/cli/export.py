"""`hosl export RUN OUT`: one Hugging Face checkpoint from a run's newest weights."""

from pathlib import Path

from hosl.cli.answers import answer, verb_parser


def run(words: list[str]) -> int:
    """Write OUT; it must not exist, or be empty."""
    parser = verb_parser("export", "Merge both halves into one checkpoint that plain transformers loads.")
    parser.add_argument("run", help="a run's folder")
    parser.add_argument("out", help="a folder to make; adapters also go to OUT/adapter")
    known = parser.parse_args(words)

    from hosl.training.train import export

    export(Path(known.run), Path(known.out))
    answer({"run": known.run, "out": known.out}, as_json=known.json)
    return 0

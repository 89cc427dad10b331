"""`hosl split MODEL --cut K OUT`: one checkpoint becomes OUT/client and OUT/server."""

from pathlib import Path

from hosl.cli.answers import answer, verb_parser


def run(words: list[str]) -> int:
    """Split; each side gets only its own tensors, read one at a time."""
    parser = verb_parser("split", "Cut a checkpoint into a client folder and a server folder.")
    parser.add_argument("model", help="a local folder or a hub name")
    parser.add_argument("out", help="a folder to make: OUT/client goes to the device, OUT/server stays")
    parser.add_argument(
        "--cut", type=int, required=True, help="the client keeps the embeddings and blocks 0..K-1"
    )
    parser.add_argument("--head", choices=("causal", "classification"), default="causal")
    parser.add_argument(
        "--num-labels", "--labels", type=int, help="number of labels of a classification head"
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="of a new head; give the seed of the run's config"
    )
    parser.add_argument(
        "--labels-at",
        choices=("server", "client"),
        default="server",
        help="client: norm and head go to the device too",
    )
    known = parser.parse_args(words)

    from hosl.split import split_folder

    info = split_folder(
        known.model, known.cut, Path(known.out), head=known.head, num_labels=known.num_labels, seed=known.seed,
        labels=known.labels_at,
    )  # fmt: skip
    answer({"out": known.out, "cut": known.cut, **info.facts()}, as_json=known.json)
    return 0

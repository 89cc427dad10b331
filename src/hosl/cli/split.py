"""`hosl split MODEL --cut K OUT`: one checkpoint becomes OUT/client and OUT/server."""

import sys
from pathlib import Path

from hosl.cli.answers import answer, command_parser


def run(arguments: list[str]) -> int:
    """Split; each side gets only its own tensors, read one at a time. Returns the exit status.

    Raises:
        RequestError, ModelError: if the model cannot be read or cut, or OUT is taken.
    """
    parser = command_parser("split", "Cut a checkpoint into a client folder and a server folder.")
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
    options = parser.parse_args(arguments)

    from hosl.split import split_folder

    info = split_folder(
        options.model, options.cut, Path(options.out), head=options.head, num_labels=options.num_labels,
        seed=options.seed, labels=options.labels_at,
    )  # fmt: skip
    for note in info.notes:
        sys.stderr.write(f"hosl: model {options.model}: {note}\n")
    answer({"out": options.out, "cut": options.cut, **info.facts()}, as_json=options.json)
    return 0

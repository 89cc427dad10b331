"""`hosl split MODEL --cut K OUT`: one checkpoint becomes OUT/client and OUT/server."""

from argparse import Namespace
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Literal, TypeAlias

from hosl.cli.answers import Parser, answer, command_parser, say
from hosl.config import load_config
from hosl.errors import ConfigError
from hosl.split.reading.runtime_json import read_runtime_json
from hosl.split.specs import GraphSpec

LabelsAt: TypeAlias = Literal["server", "client"]


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
        help="the party that has the labels; client: norm and head go to the device too. Default: as --config says, "
        "else client for a causal model, which learns text, and server for a classifier",
    )
    parser.add_argument("--config", help="the run's YAML file, for wire.labels")
    _add_graphs(parser)
    options = parser.parse_args(arguments)
    graphs = _graphs(options)

    labels, why = _labels_at(options.labels_at, options.config, options.head)

    from hosl.split import split_folder

    info = split_folder(
        options.model, options.cut, Path(options.out), head=options.head, num_labels=options.num_labels,
        seed=options.seed, labels=labels, graphs=graphs, say=partial(say, by="split"),
    )  # fmt: skip
    for note in info.notes:
        say(f"model {options.model}: {note}")
    say(why)
    facts = {"out": options.out, "cut": options.cut, **info.facts()}
    if graphs is not None:
        runtime = read_runtime_json(Path(options.out) / "client")
        facts["graphs"] = sum(name.endswith(".onnx") for name in runtime.files)
        facts["operators"] = runtime.operators if options.json else ", ".join(runtime.operators)
    answer(facts, as_json=options.json)
    return 0


def _add_graphs(parser: Parser) -> None:
    """Add the arguments about graphs for an inference engine."""
    parser.add_argument(
        "--runtime",
        choices=("onnx",),
        help="make OUT/client/onnx too: graphs for a device that has ONNX Runtime and no torch",
    )
    parser.add_argument(
        "--lora-targets",
        metavar="q_proj,v_proj",
        help="the layers that the device may adapt (trainable: lora), by the last parts of their names; with --runtime",
    )
    parser.add_argument(
        "--client-dtype",
        choices=("int8",),
        help="make int8 matrices of the client's blocks too, for client.dtype: int8; with --runtime",
    )


def _graphs(options: Namespace) -> GraphSpec | None:
    """What the arguments say about graphs; None: make none.

    Raises:
        ConfigError: if they are asked for in part, or what makes them is not installed.
    """
    if options.runtime is None:
        for name in ("lora_targets", "client_dtype"):
            if getattr(options, name) is not None:
                raise ConfigError(
                    f"--{name.replace('_', '-')} {getattr(options, name)} is about the graphs of a device without "
                    "torch; add --runtime onnx, or leave it out"
                )
        return None
    targets = tuple(dict.fromkeys(filter(None, map(str.strip, (options.lora_targets or "").split(",")))))
    if options.lora_targets is not None and not targets:
        raise ConfigError("--lora-targets names no layer; such as --lora-targets q_proj,v_proj")

    try:
        import_module("hosl.split.onnx_export")  # before minutes of work, of which it would be the last
    except ModuleNotFoundError as cause:
        if not (cause.name or "").startswith("onnx"):
            raise
        raise ConfigError(
            f"--runtime onnx needs {cause.name}, which is not installed here: `pip install 'hosl[onnx-export]'`"
        ) from cause
    return GraphSpec(lora_targets=targets, int8=options.client_dtype == "int8")


def _labels_at(asked: LabelsAt | None, config: str | None, head: str) -> tuple[LabelsAt, str]:
    """The party that has the labels, and the line that says what follows and why.

    Raises:
        ConfigError: if the config cannot be read, or says otherwise than was asked.
    """
    said: LabelsAt | None = None if config is None else load_config(config).wire.labels
    if asked is not None and said not in (None, asked):
        raise ConfigError(
            f"--labels-at {asked}, but wire.labels of {config} is {said}; leave one of the two out, or make them equal"
        )
    labels: LabelsAt = said or asked or ("client" if head == "causal" else "server")
    if said is not None:
        why = f"as wire.labels of {config} says"
    elif asked is not None:
        why = "as asked"
    else:
        other = "client" if labels == "server" else "server"
        what = "a causal model learns text" if labels == "client" else "a classifier's labels are names"
        why = f"{what}; --labels-at {other} or --config changes it"
    where = (
        "norm and head go to the device, too" if labels == "client" else "norm and head stay on the server"
    )
    return labels, f"split for wire.labels: {labels}, {where} ({why})"

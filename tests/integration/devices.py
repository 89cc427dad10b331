"""Halves with graphs for ONNX Runtime, and `hosl` in processes that have no torch, for the tests of such a device."""

import json
import os
import shutil
import sys
from hashlib import sha256
from pathlib import Path

import yaml

from tests.exported import alone, made_by
from tests.integration.conftest import write_classifier
from tests.integration.network import ENVIRONMENT, HOSL, anew, finished

HERE = Path(__file__).parent
WITHOUT_TORCH = [sys.executable, str(HERE / "without_torch.py")]

ADAPTED = {"query", "value"}
LORA = {"trainable": "lora", "lora": {"r": 4, "target_modules": sorted(ADAPTED)}, "learning_rate": 0.1}
BLOCKS, LAST = (
    {"trainable": "blocks", "learning_rate": 0.1},
    {"trainable": "last-block", "learning_rate": 0.1},
)
RUNS = {
    "frozen": {"method": "frozen"},
    "hosl": {"method": "hosl"},
    "hosl-lora": {"method": "hosl", "client": LORA},
    "hosl-low-rank": {"method": "hosl", "zo": {"directions": 2, "distribution": "low-rank"}},
    "hosl-gradient": {"method": "hosl-gradient", "zo": {"directions": 4, "distribution": "rademacher"}},
    "hosl-residual": {"method": "hosl-residual", "client": {"learning_rate": 0.1}},
    "residual-adamw": {
        "method": "hosl-residual", "client": {"learning_rate": 1e-3, "optimiser": {"name": "adamw"}},
    },
    "fo-blocks": {"method": "fo-recompute", "client": BLOCKS},
    "fo-compressed": {"method": "fo-recompute", "client": BLOCKS, "wire": {"compression": "bf16"}},
    "fo-last-block": {"method": "fo-recompute", "client": LAST},
    "fo-lora": {"method": "fo-recompute", "client": LORA},
    "fo-lora-int8": {"method": "fo-recompute", "client": LORA | {"dtype": "int8"}},
}  # fmt: skip
"""The settings of each kind of client that the engine has."""

WORDS = ["--cut", 2, "--head", "classification", "--labels", 2]
"""Of `hosl split` for the classifier of `write_classifier`."""
ADAPTED_WORDS = [*WORDS, "--lora-targets", ",".join(sorted(ADAPTED)), "--client-dtype", "int8"]
"""With the graphs of adapters and of an int8 base, too."""


def split_with_graphs(config, model, out, *words):
    """`hosl split --runtime onnx` into `out`, in a process where annotations are not verified: traced values are none.

    It takes a minute, so halves are kept in pytest's cache (`config`), by the model, the words and what makes graphs.
    """
    files = sorted(Path(model).glob("*")) if Path(model).is_dir() else []
    content = sha256(b"".join(file.read_bytes() for file in files)).hexdigest()
    named = [str(model)] if not files else [content]
    key = sha256(json.dumps([*named, *map(str, words), made_by()]).encode()).hexdigest()[:16]
    kept = config.cache.mkdir("halves-with-graphs") / key
    with alone(kept):
        if not kept.is_dir():
            partial = kept.with_suffix(f".{os.getpid()}")
            command = [*HOSL, "split", model, partial, "--runtime", "onnx", "--json", *words]
            finished(anew(list(map(str, command)), env=ENVIRONMENT), wait_s=1200)
            partial.rename(kept)
    return shutil.copytree(kept, out)


def classifier_halves(config, folder, words):
    """Write data.csv, and halves of a tiny classifier with graphs, into `folder`; returns it."""
    write_classifier(folder)
    split_with_graphs(config, folder / "model-in", folder / "halves", *words)
    return folder


def device(*words, program=()):
    """`hosl` in a process of its own that has no torch; `program`: another Python program and its arguments before."""
    return anew([*WITHOUT_TORCH, *map(str, [*program, *words])], env=ENVIRONMENT)


def joining(halves, line, config, run, *words, program=()):
    """`hosl join` on such a device."""
    command = [
        "join",
        halves / "client",
        "--to",
        line,
        "--config",
        config,
        "--json",
        "--output-dir",
        run,
        *words,
    ]
    return device(*command, program=program)


def lines(run):
    """The lines of metrics.jsonl of a run."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def losses(run):
    """The losses of a run's steps, then those of its evaluations."""
    found = lines(run)
    return [row["loss_nats"] for row in found if "split" not in row] + [
        row["loss_nats"] for row in found if "split" in row
    ]


def write_config(path, folder, **settings):
    """A config over the data of `write_classifier` in `folder`."""
    config = {
        "output_dir": str(path.parent / "run"), "method": "hosl", "model": {"cut": 2},
        "task": {"kind": "files", "train": str(folder / "data.csv")},
        "zo": {"directions": 2, "distribution": "gaussian"}, "client": {"learning_rate": 1e-3},
        "server": {"learning_rate": 1e-2, "optimiser": {"name": "sgd"}},
        "max_steps": 6, "per_device_train_batch_size": 8, "eval_steps": 3, "save_steps": 2, "snapshot_steps": 4,
    }  # fmt: skip
    path.write_text(yaml.safe_dump(config | settings))
    return path

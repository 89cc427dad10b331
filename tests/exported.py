"""Tiny models split with graphs for an inference engine, kept between test sessions: each takes a minute to make."""

import fcntl
import json
import shutil
import subprocess
import sys
from contextlib import contextmanager
from functools import cache
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path

import msgspec

import hosl.split
from hosl.split.specs import GraphSpec
from tests.conftest import build

_SPLIT = Path(hosl.split.__file__).parent
_PROGRAM = """
import json, sys
from pathlib import Path
from hosl.split import split_folder
from hosl.split.specs import GraphSpec
import msgspec
model, out, cut, spec, of_head = sys.argv[1:]
split_folder(model, int(cut), Path(out), graphs=msgspec.json.decode(spec, type=GraphSpec), **json.loads(of_head))
"""


def client_folder(config, name, cut=2, spec=None):
    """OUT/client of a tiny model with graphs; read-only. `config` is pytest's, with its cache.

    A folder is of the model, the cut, the graphs asked for, and the code and packages that make them.
    """
    asked = msgspec.json.encode(spec or GraphSpec()).decode()
    key = sha256(json.dumps([name, cut, asked, made_by()]).encode()).hexdigest()[:16]
    out = config.cache.mkdir("edge-graphs") / f"{name}-{key}"
    with alone(out):
        _make(name, cut, asked, out)
    return out / "client"


@contextmanager
def alone(folder):
    """Context manager: no other test process makes this folder of the cache meanwhile."""
    with folder.with_name(f"{folder.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _make(name, cut, asked, out):
    if not (out / "client").is_dir():
        model, of_head = build(name), {}
        if type(model).__name__.endswith("ForSequenceClassification"):
            of_head = {"head": "classification", "num_labels": model.config.num_labels}
        whole = out.with_name(f"{out.name}-model")
        model.save_pretrained(whole)
        # in a process of its own: tracing warns much, and what is traced must not be under the checks of tests
        arguments = [str(whole), str(out), str(cut), asked, json.dumps(of_head)]
        ran = subprocess.run([sys.executable, "-c", _PROGRAM, *arguments], capture_output=True, text=True)
        shutil.rmtree(whole)
        assert ran.returncode == 0, ran.stderr[-2000:]


@cache
def made_by():
    """What makes the graphs: code and packages, as they were when this session began."""
    files = [
        *sorted((_SPLIT / "onnx_export").glob("*.py")),
        _SPLIT / "residual_feedback.py",
        _SPLIT / "quantised.py",
    ]
    code = sha256(b"".join(file.read_bytes() for file in files)).hexdigest()
    return [code, *(version(package) for package in ("torch", "transformers", "onnx"))]

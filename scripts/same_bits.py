"""Short runs of every method and variant, as digests: equal bit for bit, a change has changed no result.

    python scripts/same_bits.py > bits.json                    # of this tree
    python scripts/same_bits.py --tree ../other > other.json   # of another checkout
    python scripts/same_bits.py --against main                 # this tree beside a commit; exit status 1 if they differ
    python scripts/same_bits.py --compare A.json B.json

Each case trains four steps on the embedded model (some on a tiny decoder), in one process or over loopback, and is told
by SHA-256 of its metrics, its journal and the weights of both halves. Where `HOSL_DATA` is set, a larger decoder joins
in. Two minutes.
"""

import argparse
import contextlib
import csv
import hashlib
import io
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[1]

FORMER_NAMES = {
    "distribution": "law", "micro_batch_size": "micro_batch_rows", "server_gradient_at": "fo_point",
}  # fmt: skip
"""Settings by the name that a tree from before their renaming reads."""

LORA, ADAMW = {"trainable": "lora"}, {"optimiser": {"name": "adamw"}}
PRE_LN = "pre-ln"
"""A tiny decoder of random weights, for what the embedded model does not have: its norms stand on the stream."""

CASES = {
    "frozen": {"method": "frozen"},
    "hosl": {"method": "hosl"},
    "hosl, default rate": {"method": "hosl", "client": {"learning_rate": None}},
    "hosl, rate found": {"method": "hosl", "client": {"learning_rate": "auto"}, "max_steps": 2},
    "hosl, all weights": {"method": "hosl", "client": {"trainable": "all"}},
    "hosl, last block": {"method": "hosl", "client": {"trainable": "last-block"}},
    "hosl, gaussian": {"method": "hosl", "zo": {"distribution": "gaussian"}},
    "hosl, sphere": {"method": "hosl", "zo": {"distribution": "sphere"}},
    "hosl, low-rank": {"method": "hosl", "zo": {"distribution": "low-rank"}},
    "hosl, first-plus": {"method": "hosl", "zo": {"server_gradient_at": "first-plus"}},
    "hosl, clipped and divided by its spread": {"method": "hosl", "zo": {"clip": 1.5, "normalise": "spread"}},
    "hosl, micro-batches": {"method": "hosl", "client": {"micro_batch_size": 3}},
    "hosl, bf16 wire": {"method": "hosl", "wire": {"compression": "bf16"}},
    "hosl, int8 wire": {"method": "hosl", "wire": {"compression": "int8"}},
    "hosl, bfloat16": {"method": "hosl", "model": {"dtype": "bfloat16"}, "zo": {"epsilon": 1.0e-2}},
    "hosl, LoRA on both halves": {"method": "hosl", "client": LORA, "server": LORA | ADAMW},
    "hosl, cosine": {"method": "hosl", "lr_scheduler_type": "cosine", "warmup_steps": 2},
    "hosl-gradient": {"method": "hosl-gradient"},
    "hosl-gradient, default rate": {"method": "hosl-gradient", "client": {"learning_rate": None}},
    "hosl-gradient, one-sided": {"method": "hosl-gradient", "zo": {"sides": "one"}},
    "hosl-gradient, forward-mode": {"method": "hosl-gradient", "zo": {"derivative": "forward-mode"}},
    "hosl-gradient, low-rank": {"method": "hosl-gradient", "zo": {"distribution": "low-rank"}},
    "hosl-gradient, low-rank, one-sided": {
        "method": "hosl-gradient", "zo": {"distribution": "low-rank", "sides": "one"},
    },
    "hosl-gradient, rows clipped": {"method": "hosl-gradient", "zo": {"row_clip": 2.0}},
    "hosl-gradient, LoRA": {"method": "hosl-gradient", "client": LORA},
    "hosl-gradient, int8 + LoRA": {"method": "hosl-gradient", "client": LORA | {"dtype": "int8"}},
    "hosl-gradient, bfloat16 + LoRA": {"method": "hosl-gradient", "client": LORA | {"dtype": "bfloat16"}},
    "hosl-residual": {"method": "hosl-residual"},
    "hosl-residual, pre-LN": {"method": "hosl-residual", "model": {"name": PRE_LN}},
    "hosl-residual, a slope per block": {
        "method": "hosl-residual", "residual": {"slopes": "per-block"}, "model": {"name": PRE_LN},
    },
    "hosl-residual, AdamW": {"method": "hosl-residual", "client": ADAMW},
    "hosl-residual, LoRA": {"method": "hosl-residual", "client": LORA},
    "hosl-node": {"method": "hosl-node"},
    "hosl-node, default rate": {"method": "hosl-node", "client": {"learning_rate": None}},
    "zo-zo": {"method": "zo-zo"},
    "zo-zo, default rate": {"method": "zo-zo", "client": {"learning_rate": None}},
    "fo-zo": {"method": "fo-zo"},
    "fo-fo": {"method": "fo-fo"},
    "fo-fo, default rate": {"method": "fo-fo", "client": {"learning_rate": None}},
    "fo-fo, AdamW": {"method": "fo-fo", "client": ADAMW, "server": ADAMW},
    "fo-fo, momentum": {"method": "fo-fo", "server": {"optimiser": {"name": "sgd", "momentum": 0.9}}},
    "fo-fo, LoRA": {"method": "fo-fo", "client": LORA},
    "fo-fo, rate found": {"method": "fo-fo", "client": {"learning_rate": "auto"}, "max_steps": 2},
    "fo-recompute": {"method": "fo-recompute"},
    "fo-recompute, last block": {"method": "fo-recompute", "client": {"trainable": "last-block"}},
    "authors-head": {
        "method": "hosl", "profile": "authors-head", "zo": {"distribution": "sphere"},
        "client": {"trainable": "all", "learning_rate": 1e-6},
        "server": {"optimiser": {"name": "sgd", "momentum": 0.9}},
    },
}  # fmt: skip

JOINED = (
    "frozen", "hosl", "hosl, low-rank", "hosl, first-plus", "hosl, int8 wire", "hosl, LoRA on both halves",
    "hosl-gradient", "hosl-gradient, one-sided", "hosl-gradient, int8 + LoRA", "hosl-residual", "hosl-node",
    "zo-zo", "fo-zo", "fo-fo", "fo-fo, AdamW", "fo-recompute",
)  # fmt: skip
LABELS_STAY = ("frozen", "hosl", "hosl-gradient", "hosl-node", "fo-fo", "fo-recompute")
DECODER = ("frozen", "hosl", "hosl-gradient", "hosl-node", "zo-zo", "fo-fo", "fo-recompute")


def main() -> int:
    """Run this tree, another one, or both; print the digests or compare them."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--tree", type=Path, default=ROOT, help="the checkout whose code runs; default: this one"
    )
    parser.add_argument("--only", metavar="TEXT", default="", help="cases with this text in their names")
    parser.add_argument("--against", metavar="REV", help="run a commit's code, too, and compare")
    parser.add_argument("--compare", nargs=2, type=Path, metavar=("A", "B"), help="two files made before")
    parser.add_argument("--inside", type=Path, help=argparse.SUPPRESS)  # in a process that runs a tree's code
    parser.add_argument("--part", type=int, nargs=2, default=(0, 1), help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.inside:
        print(json.dumps(digests(asked.inside, asked.only, *asked.part), indent=1))
        return 0
    if asked.compare:
        return compared(*(json.loads(file.read_text("utf-8")) for file in asked.compare))
    here = of_tree(asked.tree, asked.only)
    if asked.against is None:
        print(json.dumps(here, indent=1))
        return 0
    with tempfile.TemporaryDirectory() as folder:
        other = Path(folder) / "tree"
        subprocess.run(
            ["git", "worktree", "add", "-q", "--detach", str(other), asked.against], cwd=ROOT, check=True
        )
        try:
            return compared(of_tree(other, asked.only), here)
        finally:
            subprocess.run(["git", "worktree", "remove", "--force", str(other)], cwd=ROOT, check=True)


def of_tree(tree: Path, only: str) -> dict[str, dict[str, str]]:
    """The digests of a checkout's code; a process per core, each on one thread."""
    environment = os.environ | {
        "PYTHONPATH": str(tree.resolve() / "src"), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "",
    }  # fmt: skip
    parts, found = os.cpu_count() or 1, {}
    with tempfile.TemporaryDirectory() as folder:
        working = []
        for part in range(parts):
            (Path(folder) / str(part)).mkdir()
            words = ["--inside", f"{folder}/{part}", "--only", only, "--part", str(part), str(parts)]
            command = [sys.executable, str(Path(__file__).resolve()), *words]
            working.append(subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True))
        said = [process.communicate()[0] for process in working]
    if any(process.returncode for process in working):
        raise SystemExit("a case failed; it says above which")
    for text in said:
        found |= json.loads(text)
    return dict(sorted(found.items()))


def compared(before: dict[str, dict[str, str]], now: dict[str, dict[str, str]]) -> int:
    """Say which cases differ, and in what; 1 if any does."""
    different = 0
    for name in before.keys() & now.keys():
        parts = [part for part in before[name] | now[name] if before[name].get(part) != now[name].get(part)]
        if parts:
            different += 1
            print(f"differs: {name}: {', '.join(parts)}")
    for name in sorted(before.keys() ^ now.keys()):
        print(f"only {'before' if name in before else 'now'}: {name}")
    print(f"{len(before.keys() & now.keys()) - different} cases equal, {different} different")
    return 1 if different or not before.keys() & now.keys() else 0


def digests(folder: Path, only: str, part: int, parts: int) -> dict[str, dict[str, str]]:
    """The digests of every `parts`-th case from `part` on; run by the code that this process imports."""
    _write_rows(folder / "rows.csv")
    found = {}
    for name, settings in list(CASES.items())[part::parts]:
        if only in name:
            found[name] = _digests_of(_trained(folder, name, settings))
    found |= _over_loopback(folder, only, JOINED[part::parts], "server")
    found |= _over_loopback(folder, only, LABELS_STAY[part::parts], "client")
    if "HOSL_DATA" in os.environ:
        for name in DECODER[part::parts]:
            if only in f"decoder: {name}":
                found[f"decoder: {name}"] = _digests_of(
                    _trained(folder, f"decoder-{name}", _merged(CASES[name], _decoder()))
                )
    return found


def _decoder() -> dict:
    return {
        "model": {"name": "$HOSL_DATA/models/minilm-l6-as-opt"},
        "task": {"kind": "prompts", "name": "SST-2", "folder": "$HOSL_DATA/data/tasks", "train_rows": 40,
                 "dev_rows": 12, "test_rows": 12},
    }  # fmt: skip


def _trained(folder: Path, name: str, settings: dict) -> Path:
    run = folder / _file_name(name)
    _hosl("train", str(_config(folder, run, settings)))
    return run


def _over_loopback(folder: Path, only: str, names: tuple[str, ...], labels: str) -> dict[str, dict[str, str]]:
    """Joined runs with one server; their client halves here, their server halves in the service's folder."""
    wanted = [name for name in names if only in f"joined: {name}"]
    if not wanted:
        return {}
    halves, service, found = folder / f"halves-{labels}", folder / f"service-{labels}", {}
    words = ["--cut", "3", "--head", "classification", "--labels", "2", "--seed", "3"]
    _hosl("split", "all-MiniLM-L6-v2", str(halves), *words, "--labels-at", labels)
    with _served(halves / "server", service) as line:
        for name in wanted:
            # a server's run is called as the folder: it must differ from those of cases in one process
            title = f"joined: {name}" + (", labels stay" if labels == "client" else "")
            run = folder / _file_name(title)
            config = _config(folder, run, _merged(CASES[name], {"wire": {"labels": labels}}))
            before = set(service.glob("runs/*"))
            _hosl("join", str(halves / "client"), "--to", line, "--config", str(config))
            (of_server,) = set(service.glob("runs/*")) - before
            found[title] = _digests_of(run) | _digests_of(of_server, prefix="at the server: ")
    return found


@contextlib.contextmanager
def _served(half: Path, service: Path):
    """`hosl serve` on loopback; yields the join line."""
    program = "import sys; from hosl.cli import main; sys.exit(main())"
    words = ["serve", str(half), "--service", str(service), "--listen", "127.0.0.1:0", "--runs-at-once", "2"]
    process = subprocess.Popen(
        [sys.executable, "-c", program, *words], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    try:
        lines = []
        for text in process.stdout:
            lines.append(text.strip())
            if text.startswith("serving"):
                break
        yield next(text for text in lines if text.startswith("hosl://"))
    finally:
        process.terminate()
        process.wait(60)
        process.stdout.close()


def _hosl(*words: str) -> None:
    from hosl.cli import main

    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        status = main(words)
    if status:
        raise SystemExit(f"hosl {' '.join(words)}: exit status {status}\n{said.getvalue()[-2000:]}")


def _config(folder: Path, run: Path, settings: dict) -> Path:
    """The case's YAML."""
    base = {
        "output_dir": str(run), "seed": 3, "model": {"name": "all-MiniLM-L6-v2", "cut": 3},
        "task": {"kind": "files", "train": str(folder / "rows.csv")},
        "zo": {"directions": 2}, "client": {"learning_rate": 1e-3},
        "server": {"learning_rate": 1e-2, "optimiser": {"name": "sgd"}},
        "max_steps": 4, "per_device_train_batch_size": 4, "eval_steps": 4, "save_steps": 4, "snapshot_steps": 3,
    }  # fmt: skip
    file, merged = run.with_suffix(".yaml"), _merged(base, settings)
    if merged["model"]["name"] == PRE_LN:
        merged["model"]["name"] = str(_pre_ln_model(folder))
    file.write_text(yaml.safe_dump(_as_this_tree_reads(merged)), encoding="utf-8")
    return file


def _pre_ln_model(folder: Path) -> Path:
    """The folder of `PRE_LN`, with a tokenizer of the words of the rows; made once."""
    import tokenizers

    from hosl.split.shapes import save_random_model

    model = folder / PRE_LN
    if not model.is_dir():
        save_random_model("tiny", model)
        words = sorted(set(re.findall(r"\w+|,", (folder / "rows.csv").read_text("utf-8"))))
        vocabulary = {word: index for index, word in enumerate(["<unk>", "<pad>", *words])}
        tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
        tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
        tokenizer.save(str(model / "tokenizer.json"))
        (model / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    return model


def _as_this_tree_reads(settings: dict) -> dict:
    from hosl.config import Config

    config = Config()
    known = {name for section in (config.zo, config.client) for name in section.__struct_fields__}
    renamed = dict(settings)
    for section in ("zo", "client"):
        renamed[section] = {
            n if n in known else FORMER_NAMES.get(n, n): v for n, v in settings[section].items()
        }
    return renamed


def _merged(base: dict, changes: dict) -> dict:
    """`base` with `changes` laid over it, section by section; another task replaces the whole."""
    return base | {
        name: base[name] | value if isinstance(value, dict) and name in base and name != "task" else value
        for name, value in changes.items()
    }


def _write_rows(file: Path) -> None:
    colours, shapes = (
        ("red", "green", "blue", "white", "black", "grey"),
        ("round", "flat", "long", "old", "new", "warm"),
    )
    with file.open("w", newline="", encoding="utf-8") as stream:
        rows = csv.writer(stream)
        rows.writerow(["text", "label"])
        for a in colours:
            for b in shapes:
                rows.writerow(
                    [f"a {a} thing" if b == "flat" else f"a {b}, {a} thing", "bright" if a < "c" else "dull"]
                )
                rows.writerow([f"nothing {b}", "dull" if a > "g" else "bright"])


def _digests_of(run: Path, prefix: str = "") -> dict[str, str]:
    """Metrics, journal and weights of a run's folder, each by its SHA-256."""
    found = {}
    if (run / "metrics.jsonl").is_file():
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text("utf-8").splitlines()]
        found["metrics"] = _sha(json.dumps(lines, sort_keys=True).encode())
    newest = max((run / "checkpoints").glob("step-*"))
    for file in sorted([*newest.rglob("*.bin"), *newest.rglob("*.safetensors")]):
        content = file.read_bytes() if file.suffix == ".bin" else _weights(file)
        found[prefix + file.relative_to(newest).as_posix()] = _sha(content)
    if (run / "model").is_dir():
        found["model"] = _sha(b"".join(map(_weights, sorted((run / "model").glob("*.safetensors")))))
    return found


def _weights(file: Path) -> bytes:
    """Name, dtype, shape and bytes of every tensor, in the order of the names."""
    import torch
    from safetensors.torch import load_file

    return b"".join(
        f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode()
        + tensor.contiguous().view(torch.uint8).numpy().tobytes()
        if tensor.dim()
        else f"{name} {tensor.dtype} {tensor.item()} ".encode()
        for name, tensor in sorted(load_file(file).items())
    )


def _sha(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _file_name(name: str) -> str:
    return "".join(c if c.isalnum() else "-" for c in name)


if __name__ == "__main__":
    sys.exit(main())

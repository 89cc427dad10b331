"""Several devices with one client half: does each draw its own directions, or do all draw the same?

    python research/several_clients.py [--clients 4] [--seeds 0 1 2] [--steps 60]     # resumes

Real processes over loopback: one server, N devices, each with its own quarter of the embedded task's training rows. A
round has 2Q + 1 uploads of every device. With own directions a round knows N Q directions, each from one device's
rows; with common ones Q directions, each from the rows of all. Rates were tried on the first seed, by dev loss.
"""

import argparse
import csv
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from hosl.report.statistics import spread_text
from hosl.split.reading.embedded import ENCODER
from hosl.study.tables import of_seeds
from hosl.system.atomic import whole_file
from hosl.tasks.classification import LabelledText, carve
from hosl.tasks.docstrings import standard_library_texts

OUT = Path("runs/several-clients")
HOSL = [sys.executable, "-c", "import sys; from hosl.cli import main; sys.exit(main())"]
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}
RATES = (1e-5, 3e-5, 1e-4)
HELD_OUT = 400


def write_tasks(clients: int) -> None:
    """Test and dev for all, and each device's own training rows; labels are dealt out evenly."""
    labels, texts = standard_library_texts(Path(os.__file__).parent)
    test, dev, train = carve(texts, [HELD_OUT] * 2, seed=0)
    by_label = sorted(train, key=lambda row: row[1])
    parts = {"test": test, "dev": dev} | {
        f"train-{place}": by_label[place::clients] for place in range(clients)
    }
    for name, rows in parts.items():
        _write_csv(OUT / "data" / f"{name}.csv", labels, rows)


def _write_csv(file: Path, labels: tuple[str, ...], rows: list[LabelledText]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("w", newline="", encoding="utf-8") as out:
        lines = csv.writer(out)
        lines.writerow(["text", "label"])
        lines.writerows((text, labels[label]) for text, label in rows)


def config(
    place: int, *, directions: str, rate: float, seed: int, clients: int, steps: int
) -> dict[str, Any]:
    """One device's settings; rate 0 is the frozen client."""
    data = OUT / "data"
    return {
        "method": "hosl" if rate else "frozen",
        "seed": seed,
        "model": {"name": ENCODER, "cut": 6},
        "task": {
            "kind": "files", "train": str(data / f"train-{place}.csv"), "dev": str(data / "dev.csv"),
            "test": str(data / "test.csv"), "max_tokens": 48,
        },
        "zo": {"directions": 2, "epsilon": 1e-3, "distribution": "rademacher"},
        "client": {"learning_rate": rate} if rate else {},
        "server": {"learning_rate": 3e-3, "optimiser": {"name": "adamw"}},
        "clients": {
            "count": clients, "schedule": "synchronous", "grace_s": 600.0,
            **({"halves": "shared", "directions": directions} if rate else {}),
        },
        "max_steps": steps, "per_device_train_batch_size": 16, "eval_steps": steps, "save_steps": steps,
    }  # fmt: skip


def made(folder: Path, settings: list[dict[str, Any]], seed: int) -> dict[str, Any]:
    """The first device's summary, from before or from a run of server and devices in processes of their own."""
    done = folder / "summary.json"
    if done.exists():
        return json.loads(done.read_text("utf-8"))
    shutil.rmtree(folder, ignore_errors=True)  # what a kill has left
    folder.mkdir(parents=True)
    _call("split", ENCODER, folder / "halves", "--cut", 6, "--head", "classification", "--labels", 20,
          "--seed", seed)  # fmt: skip
    with _served(folder) as line:
        lines = [line, *(_enrolled(folder, f"device-{place}") for place in range(1, len(settings)))]
        joined = []
        for place, (settings_of, to) in enumerate(zip(settings, lines, strict=True)):
            file = folder / f"device-{place}.yaml"
            file.write_text(yaml.safe_dump(settings_of), encoding="utf-8")
            words = ["join", folder / "halves" / "client", "--to", to, "--config", file, "--json"]
            words += ["--output-dir", folder / f"device-{place}" / "run"]  # its name is what they share
            joined.append(_started(words))
        said = _all_said(joined)
    if said is None:
        raise SystemExit(f"a device failed; see what it wrote above, and {folder / 'server.log'}")
    summaries = [json.loads(text.splitlines()[-1]) for text in said]
    whole_file(done, json.dumps(summaries[0]).encode())
    return summaries[0]


def _started(words: list[object]) -> subprocess.Popen[str]:
    return subprocess.Popen([*HOSL, *map(str, words)], stdout=subprocess.PIPE, text=True, env=ENVIRONMENT)


def _all_said(joined: list[subprocess.Popen[str]]) -> list[str] | None:
    """What every device printed; None if one failed: the others, who would wait for it, are ended."""
    while any(process.poll() is None for process in joined):
        if any(process.returncode for process in joined):
            for process in joined:
                process.terminate()
        time.sleep(0.2)
    said = [process.communicate()[0] for process in joined]
    return None if any(process.returncode for process in joined) else said


def _call(*words: object) -> str:
    return subprocess.run(
        [*HOSL, *map(str, words)], check=True, stdout=subprocess.PIPE, text=True, env=ENVIRONMENT
    ).stdout


def _enrolled(folder: Path, name: str) -> str:
    said = _call("clients", "add", name, "--service", folder / "service")
    return next(word for word in said.split() if word.startswith("hosl://"))


@contextmanager
def _served(folder: Path) -> Iterator[str]:
    """A server on loopback; its join line."""
    log = (folder / "server.log").open("w")
    process = subprocess.Popen(
        [*HOSL, "serve", str(folder / "halves" / "server"), "--service", str(folder / "service"),
         "--listen", "127.0.0.1:0"],
        stdout=subprocess.PIPE, stderr=log, text=True, env=ENVIRONMENT,
    )  # fmt: skip
    try:
        line = ""
        for said in process.stdout or ():
            line = said.strip() if said.startswith("hosl://") else line
            if said.startswith("serving"):
                break
        yield line
    finally:
        process.terminate()
        process.wait()
        log.close()


def main() -> None:
    """Make the runs that are missing, then print the table."""
    words = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    words.add_argument("--clients", type=int, default=4)
    words.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    words.add_argument("--steps", type=int, default=60)
    asked = words.parse_args()
    write_tasks(asked.clients)

    def run(directions: str, rate: float, seed: int) -> dict[str, Any]:
        name = f"{directions}-{rate:g}-seed{seed}"
        print(f"run {name}", file=sys.stderr, flush=True)
        of_all = {"directions": directions, "rate": rate, "seed": seed, "clients": asked.clients}
        settings = [config(place, steps=asked.steps, **of_all) for place in range(asked.clients)]
        return made(OUT / name, settings, seed)

    chosen = {"frozen": 0.0}
    for directions in ("own", "common"):
        tried = {rate: run(directions, rate, asked.seeds[0])["dev_loss_nats"] for rate in RATES}
        chosen[directions] = min(tried, key=lambda rate, tried=tried: tried[rate])
    found = {name: [run(name, rate, seed) for seed in asked.seeds] for name, rate in chosen.items()}
    print("| directions | client rate | test accuracy | test loss, nats | loss - frozen's, per seed |")
    print("|---|---|---|---|---|")
    for name, summaries in found.items():
        accuracy, loss = 100 * of_seeds(summaries, "test_accuracy"), of_seeds(summaries, "test_loss_nats")
        apart = loss - of_seeds(found["frozen"], "test_loss_nats")
        shown = "" if name == "frozen" else ", ".join(f"{value:+.4f}" for value in apart)
        print(
            f"| {name} | {chosen[name]:g} | {spread_text(accuracy, 2)} | {spread_text(loss, 4)} | {shown} |"
        )


if __name__ == "__main__":
    main()

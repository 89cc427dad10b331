"""The worked example of docs/how-to/add-a-method.md: its code, pasted into a copy of the sources, makes a method."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "how-to" / "add-a-method.md").read_text(encoding="utf-8")
BEFORE = {"src/hosl/core/methods.py": "\nMETHODS: "}
"""What a piece is pasted in front of; others go to the end of their file."""

BOTH_WAYS = """
import sys
sys.path[0:0] = [sys.argv[1], sys.argv[2]]
from tests.integration.network import Server, finished, join, split
from hosl.cli import main
from pathlib import Path
import hosl
assert Path(hosl.__file__).is_relative_to(sys.argv[1]), hosl.__file__
config, folder = sys.argv[3], Path(sys.argv[4])
assert main(["train", config]) == 0
halves = split(folder / "model-in", folder / "halves")
with Server(halves / "server", folder / "service") as server:
    finished(join(halves / "client", server.line, config, "--output-dir", folder / "joined"))
assert main(["bench", "step", "--shape", "tiny", "--cut", "1", "--methods", "frozen", "--repeats", "1",
             "--memory-repeats", "0", "--batch", "2", "--tokens", "8"]) == 0
"""


def test_a_new_method_touches_four_files_at_most_and_runs_everywhere(tiny_run, tmp_path):
    pieces = re.findall(r'```python title="([^"]+)"\n(.*?)```', PAGE, re.DOTALL)
    assert 3 <= len({file for file, _ in pieces}) <= 4
    shutil.copytree(
        ROOT / "src", tmp_path / "src", ignore=shutil.ignore_patterns("*.egg-info", "__pycache__")
    )
    for file, code in pieces:
        path = tmp_path / file
        text, mark = path.read_text(encoding="utf-8"), BEFORE.get(file)
        place = text.index(mark) if mark else len(text)
        path.write_text(f"{text[:place]}\n\n{code}\n{text[place:]}", encoding="utf-8")
    config = tiny_run(method="hosl-sign")
    command = [sys.executable, "-c", BOTH_WAYS, tmp_path / "src", ROOT, config, tmp_path]
    environment = os.environ | {"PYTHONPATH": str(tmp_path / "src"), "OMP_NUM_THREADS": "1"}
    ran = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr[-3000:]
    metrics, joined = (tmp_path / name / "metrics.jsonl" for name in ("run", "joined"))
    assert metrics.read_bytes() == joined.read_bytes()
    steps = [json.loads(line) for line in metrics.read_text().splitlines() if "split" not in line]
    assert len(steps) == yaml.safe_load(config.read_text())["max_steps"]
    journal = max((tmp_path / "run" / "checkpoints").glob("step-*")) / "client" / "journal.bin"
    assert journal.stat().st_size == 16 * 2 * len(steps)

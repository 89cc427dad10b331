"""What a person mistypes or a machine lacks: one line that says what to write instead, never a traceback."""

import os
import re
import subprocess
import sys

import pytest
import torch

from hosl.cli import main
from hosl.config import Config, load_config
from tests.integration.network import ENVIRONMENT


def refused(capsys, *words):
    """The one line of standard error of a command that must be refused."""
    assert main([*map(str, words)]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1, err
    return err


def written(tmp_path, text):
    path = tmp_path / "my.yaml"
    path.write_text(text)
    return path


def test_help_beside_a_config_shows_the_values_of_that_file(tmp_path, capsys):
    text = "max_steps: 77\nzo: {epsilon: 0.25}\ntask: {kind: files, train: own.csv}\n"
    assert main(["train", str(written(tmp_path, text)), "--help"]) == 0
    shown = " ".join(capsys.readouterr().out.translate(str.maketrans("", "", "│")).split())
    assert "a step is one server update. (default: 77)" in shown
    assert "theta +- epsilon u. (default: 0.25)" in shown
    assert "The file or folder to train on. (default: own.csv)" in shown


@pytest.mark.parametrize("text", [None, "task: {kind: docstrings}\n", "task: {kind: files, train: a.csv}\n"])
def test_help_has_the_fields_of_every_kind_of_task(tmp_path, capsys, text):
    words = [] if text is None else [str(written(tmp_path, text))]
    assert main(["train", *words, "--help"]) == 0
    shown = capsys.readouterr().out
    for field in ("--task.label-column", "--task.folder", "--task.test-rows", "--task.max-tokens"):
        assert re.search(rf"{field} ", shown), field


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("method: sgd", "at `$.method`. Allowed: frozen, zo-zo, hosl, hosl-gradient,"),
        ("task: {kind: filez}", "did you mean `files`? Allowed: docstrings, files, prompts, sft."),
        ("task: {train: a.csv}", "Allowed: docstrings, files, prompts, sft."),
        ("zo: {distribution: gausian}", "did you mean `gaussian`? Allowed: gaussian, rademacher, sphere, low-rank."),
        ("zo: {normalise: off}", "Allowed: none, spread."),
        ("report_to: [wandbb]", "did you mean `wandb`? Allowed: tensorboard, wandb, trackio."),
        ("client: {learning_rate: fast}", "Allowed: a number, auto, null."),
        ("task: {kind: prompts, name: SST2, folder: x}", "did you mean `SST-2`? Allowed: SST-2, CB, RTE, WiC,"),
    ],
)  # fmt: skip
def test_a_word_that_is_no_choice_is_told_the_choices(tmp_path, capsys, text, said):
    assert said in refused(capsys, "train", written(tmp_path, text))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("max_steps: 1e2", "YAML reads 1e2 as text: write 100"),
        ("task: {kind: docstrings, train_rows: 1.2e3}", "YAML reads 1.2e3 as text: write 1200"),
        ("client: {lora: {r: '4'}}", "write 4"),
        ("clients: {grace_s: 1e3}", "YAML reads 1e3 as text: write 1.0e+3"),
        ("wire: {idle_s: 5e0}", "write 5.0e+0"),
        ("client: {learning_rate: 25E-5}", "YAML reads 25E-5 as text: write 25.0e-5"),
    ],
)
def test_a_number_that_yaml_reads_as_text_is_shown_as_yaml_wants_it(tmp_path, capsys, text, said):
    line = refused(capsys, "train", written(tmp_path, text))
    assert said in line
    mended = text.replace(re.search(r"[\d.]+[eE]-?\d|'4'", text)[0], line.strip().rpartition("write ")[2])
    assert isinstance(load_config(written(tmp_path, mended)), Config)


def test_a_whole_number_of_the_command_line_is_shown_as_it_must_be(tmp_path, capsys):
    config = written(tmp_path, "max_steps: 5")
    assert "--max-steps: invalid literal for int() with base 10: '1e2'; write 100" in refused(
        capsys, "train", config, "--max-steps", "1e2"
    )


@pytest.mark.parametrize(
    ("text", "key", "line"),
    [
        ("max_steps: 5\nseed: 1\nmax_steps: 7\n", "max_steps", 3),
        ("zo: {epsilon: 0.1, epsilon: 0.2}\n", "epsilon", 1),
        ("zo:\n  epsilon: 0.1\n  'epsilon': 0.2\n", "epsilon", 3),
        ("task: {kind: docstrings}\ntask: {kind: docstrings}\n", "task", 2),
    ],
)
def test_a_key_that_stands_twice_is_refused(tmp_path, capsys, text, key, line):
    assert f"line {line}: the key `{key}` stands there a second time" in refused(
        capsys, "train", written(tmp_path, text)
    )


def test_a_key_that_stands_twice_in_a_study_is_refused(tmp_path, capsys):
    said = refused(capsys, "study", written(tmp_path, "output_dir: a\noutput_dir: b\n"))
    assert "line 2: the key `output_dir` stands there a second time" in said


def test_anchors_and_merged_keys_are_no_duplicates(tmp_path):
    text = "client: &half {device: cpu, lora: {r: 2}}\nserver: {<<: *half, device: cpu}\n"
    config = load_config(written(tmp_path, text))
    assert (config.server.lora.r, config.server.device) == (2, "cpu")


@pytest.mark.parametrize(
    "text",
    [
        "[" * 3000,
        "seed: 2026-13-45",
        "a: &a [*a]",
        'output_dir: "runs/\\ud800"',
        "? {a: b}\n: 1",
        "seed: \x07",
    ],
    ids=["deep", "date", "endless", "surrogate", "unhashable", "bell"],
)
def test_strange_yaml_is_one_line(tmp_path, capsys, text):
    assert "my.yaml" in refused(capsys, "train", written(tmp_path, text))


@pytest.mark.parametrize("path", ["", ".", "/", "..", "$NO_SUCH_VARIABLE/x", "a\0b"])
def test_an_output_dir_that_cannot_be_made_is_one_line(tmp_path, capsys, monkeypatch, path):
    monkeypatch.chdir(tmp_path)
    config = written(tmp_path, "output_dir: " + repr(path).replace("'", '"'))
    assert "output_dir" in refused(capsys, "train", config)
    assert "output_dir" in refused(capsys, "train", written(tmp_path, "seed: 1"), f"--output-dir={path}")
    assert [entry.name for entry in tmp_path.iterdir()] == ["my.yaml"]


def test_an_unwritable_output_dir_is_one_line(tiny_run, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert main(["train", str(tiny_run()), "--output-dir", str(tmp_path / "file" / "run")]) == 2
    *notes, last = capsys.readouterr().err.splitlines()
    assert "cannot be made: Not a directory" in last
    assert all("drawn from the seed" in note for note in notes)


def test_home_and_variables_stand_in_every_path(tiny_run, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("HERE", str(tmp_path))
    task = {"kind": "files", "train": "~/data.csv", "test": "$HERE/test.csv"}
    config = tiny_run(output_dir="~/$NAME", model={"name": "~/model-in", "cut": 2}, task=task, max_steps=1)
    monkeypatch.setenv("NAME", "one")
    (tmp_path / "test.csv").write_text("text,label\nred red red,colour\nold old old,other\n")
    assert load_config(config).output_dir == str(tmp_path / "one")
    assert main(["train", "~/config.yaml", "--output-dir=$HERE/two"]) == 0
    assert (tmp_path / "two" / "metrics.jsonl").is_file()
    assert main(["report", "~/two", "--out=~/page.html"]) == 0
    assert (tmp_path / "page.html").is_file()
    capsys.readouterr()
    line = refused(capsys, "join", tmp_path, "--to", "@~/no-line", "--config=~/config.yaml")
    assert f"--to @{tmp_path}/no-line: No such file" in line


@pytest.mark.parametrize("device", ["cuda:99", "banana", "meta", ""])
@pytest.mark.parametrize("side", ["client", "server"])
def test_a_device_that_is_not_there_is_one_line(tiny_run, tmp_path, capsys, side, device):
    line = refused(capsys, "train", tiny_run(), f"--{side}.device={device}")
    assert " ".join(f"{side}.device: {device} cannot be used on this machine".split()) in line
    assert "there is cpu" in line
    assert not (tmp_path / "run").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_run_whose_gpu_is_gone_is_one_line_for_every_verb(tiny_run, tmp_path, capsys):
    assert main(["train", str(tiny_run(max_steps=1))]) == 0
    config = tmp_path / "run" / "config.yaml"
    config.write_text(config.read_text().replace("device: cpu", "device: cuda"))
    capsys.readouterr()
    for words in (["eval", tmp_path / "run"], ["train", "--resume", tmp_path / "run"],
                  ["export", tmp_path / "run", tmp_path / "out"], ["serve", tmp_path, "--device", "cuda"]):  # fmt: skip
        assert "cuda cannot be used on this machine" in refused(capsys, *words)


def hosl(*words, **environment):
    """The command in a process of its own, whose standard output has bytes."""
    command = [sys.executable, "-m", "hosl", *words]
    return subprocess.run(command, capture_output=True, env=ENVIRONMENT | environment, timeout=120)


def test_an_argument_that_is_not_utf8_is_one_line(tiny_run):
    said = hosl("train", tiny_run(), b"--output-dir", b"runs/\xff")
    assert said.returncode == 2
    assert said.stderr.count(b"\n") == 1
    assert b"is not text in UTF-8" in said.stderr


def test_an_ascii_terminal_gets_escapes(tiny_run, tmp_path):
    run = tmp_path / "r\u00e9sultat"
    said = hosl("train", tiny_run(output_dir=str(run), max_steps=1), PYTHONIOENCODING="ascii", PYTHONUTF8="0")
    assert said.returncode == 0, said.stderr
    assert b"r\\xe9sultat" in said.stdout
    assert hosl("train", "--help", PYTHONIOENCODING="ascii", PYTHONUTF8="0").returncode == 0


def test_the_profilers_own_lines_do_not_appear():
    """torch warns in C++ of memory that is freed under the profiler and was allocated before it."""
    script = (
        "import hosl.cli\n"
        "hosl.cli.main(['eval', 'no-such-run'])\n"
        "import torch\n"
        "from hosl.parties.engine.memory import TorchMemory\n"
        "before = [torch.zeros(1000) for _ in range(10)]\n"
        "TorchMemory(0).watch(before.clear)\n"
    )
    plain = {k: v for k, v in os.environ.items() if k not in ("KINETO_LOG_LEVEL", "TORCH_CPP_LOG_LEVEL")}
    ran = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, env=plain, timeout=120
    )
    assert ran.returncode == 0, ran.stderr
    assert ran.stderr.count("\n") == 1, ran.stderr

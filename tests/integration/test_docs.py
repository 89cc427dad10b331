"""The documentation: a site that builds strictly, reference pages that are what the code says, code that runs."""

import contextlib
import importlib.util
import json
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest

import hosl
from hosl.cli import main
from hosl.config import Config
from tests.integration.languages import language_model, tuning
from tests.integration.network import ENVIRONMENT, HOSL, Server
from tests.texts import CHATS, text_run, write_rows

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
needs_mkdocs = pytest.mark.skipif(
    importlib.util.find_spec("material") is None, reason="mkdocs-material is not installed: make docs"
)


def build(folder: Path, site: Path) -> subprocess.CompletedProcess[str]:
    """A strict build of the site of `folder`."""
    return subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(site)],
        cwd=folder, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"}, capture_output=True, text=True, check=False,
    )  # fmt: skip


def site_sources(folder: Path) -> Path:
    """A copy of what the site is made of; other files of the repository are links, so that pages may link to them."""
    folder.mkdir()
    shutil.copytree(DOCS, folder / "docs")
    for path in ROOT.iterdir():
        if path.name != "docs" and not path.name.startswith("."):
            (folder / path.name).symlink_to(path)
    return folder


@needs_mkdocs
def test_the_site_builds_strictly_and_loads_nothing_from_elsewhere(tmp_path):
    built = build(ROOT, tmp_path / "site")
    assert built.returncode == 0, built.stderr
    loads = re.compile(
        r"""<(?:script|img|iframe)[^>]*\bsrc=["']?(https?:)?//|<link[^>]*rel=["']?(?:stylesheet|preconnect)["']?[^>]*href=["']?(?:https?:)?//"""
    )
    pages = list((tmp_path / "site").rglob("*.html"))
    assert len(pages) > 40
    assert [p.name for p in pages if loads.search(p.read_text(encoding="utf-8"))] == []


@needs_mkdocs
@pytest.mark.parametrize(
    "link",
    ["[gone](gone.md)", "[no such part](glossary.md#no-such-part)", "[no source](../../src/hosl/gone.py)"],
    ids=["page", "anchor", "source"],
)
def test_a_dead_link_fails_the_build(tmp_path, link):
    folder = site_sources(tmp_path / "repository")
    with (folder / "docs" / "concepts" / "paper.md").open("a") as page:
        page.write(f"\n{link}\n")
    built = build(folder, tmp_path / "site")
    assert built.returncode != 0
    assert "concepts/paper.md" in built.stderr + built.stdout


def test_the_reference_pages_are_what_the_code_says():
    stale_pages = runpy.run_path(str(ROOT / "scripts" / "reference_pages.py"))["stale_pages"]
    assert list(stale_pages(DOCS / "reference")) == [], "run scripts/reference_pages.py"


def key_paths(settings: Any, path: str = "") -> list[str]:
    """The dotted path of every key of a complete config."""
    if not isinstance(settings, dict):
        return [path]
    return [p for key, value in settings.items() for p in key_paths(value, f"{path}.{key}".lstrip("."))]


def test_every_key_of_a_config_stands_on_its_page():
    page = (DOCS / "reference" / "config.md").read_text(encoding="utf-8")
    paths = key_paths(msgspec.to_builtins(Config()))
    assert len(paths) > 40
    assert [path for path in paths if f"| `{path}` |" not in page] == []


def test_every_key_of_a_config_says_what_it_means():
    page = (DOCS / "reference" / "config.md").read_text(encoding="utf-8")
    assert re.findall(r"^\| `([^`]+)` \|.*\|  \|$", page, re.MULTILINE) == []


def test_every_command_and_every_public_name_stands_on_its_page(capsys):
    assert main(["--help"]) == 0
    names_of_commands = re.findall(r"^  ([a-z][\w-]*) ", capsys.readouterr().out, re.MULTILINE)
    assert "train" in names_of_commands
    page = (DOCS / "reference" / "cli.md").read_text(encoding="utf-8")
    names = (DOCS / "reference" / "api.md").read_text(encoding="utf-8")
    assert [name for name in names_of_commands if f"\n## hosl {name}\n" not in page] == []
    assert [name for name in hosl.__all__ if f"\n## {name}\n" not in names] == []


def test_the_loop_of_the_how_to_runs():
    page = (DOCS / "how-to" / "own-loop.md").read_text(encoding="utf-8")
    (loop,) = re.findall(r"^```python\n(.*?)^```", page, re.DOTALL | re.MULTILINE)
    found: dict[str, Any] = {}
    exec(loop, found)
    assert found["result"].loss < found["first_loss"]


def test_the_chats_of_the_how_to_are_learned(tmp_path, monkeypatch):
    """Its rows, config and commands, on a tiny model that is cut lower and makes few steps."""
    page = (DOCS / "how-to" / "tune-on-your-chats.md").read_text(encoding="utf-8")
    (row,) = re.findall(r"^```json\n(.*?)^```", page, re.DOTALL | re.MULTILINE)
    (config,) = re.findall(r"^```yaml\n(.*?)^```", page, re.DOTALL | re.MULTILINE)
    (commands,) = re.findall(r"^```console\n(.*?)^```", page, re.DOTALL | re.MULTILINE)
    monkeypatch.chdir(tmp_path)
    text_run(tmp_path)
    write_rows(tmp_path / "chats.jsonl", [json.loads(row), *CHATS])
    Path("chats.yaml").write_text(
        config.replace("SmolLM2-135M, cut: 10", "model-in, cut: 1").replace("max_steps: 100", "max_steps: 2")
    )
    for command in commands.splitlines():
        words = shlex.split(command.removeprefix("$ hosl "))
        assert main([*words, *(["--zo.directions", "1"] if words[0] == "train" else [])]) == 0
    assert "test tokens right, %" in Path("chats.html").read_text(encoding="utf-8")
    assert Path("out/chat_template.jinja").is_file()


def test_the_prompts_of_the_how_to_are_learned_and_label_new_rows(tmp_path, monkeypatch):
    """Its row, config and commands in order, on a tiny model; a server listens on loopback for that of the page."""
    page = (DOCS / "how-to" / "classify-with-prompts.md").read_text(encoding="utf-8")
    (row,) = re.findall(r"^```json\n(.*?)^```", page, re.DOTALL | re.MULTILINE)
    (config,) = re.findall(r"^```yaml\n(.*?)^```", page, re.DOTALL | re.MULTILINE)
    commands = [
        shlex.split(line, comments=True)[2:] for line in re.findall(r"^\$ hosl .*$", page, re.MULTILINE)
    ]
    assert len(commands) == 10
    monkeypatch.chdir(tmp_path)
    language_model(tmp_path / "tiny", "llama")
    small = {"SmolLM2-135M": "tiny", "cut: 10": "cut: 1", "max_steps: 100": "max_steps: 2", "negative\"": "great\"",
             "positive\"": "terrible\""}  # fmt: skip
    for text, other in small.items():
        config = config.replace(text, other)
    Path("my.yaml").write_text(config + "zo: {directions: 1}\n")
    labelled = [
        json.loads(row),
        *({"text": f"w{i}", "label": ("negative", "positive")[i % 2]} for i in range(20)),
    ]
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in labelled))
    Path("new.csv").write_text("text\nw1 w2\nw3\n")
    with contextlib.ExitStack() as servers:
        line = ""
        for name, *words in commands:
            if name == "serve":
                line = servers.enter_context(Server(Path(words[0]), tmp_path / "service")).line
                continue
            words = [line if word.startswith("hosl://") else word for word in words]
            words = [{"SmolLM2-135M": "tiny", "10": "1"}.get(word, word) for word in words]
            if (
                name == "join"
            ):  # annotations are verified in this process, and a session begins without a client
                subprocess.run([*HOSL, name, *words], check=True, env=ENVIRONMENT, capture_output=True)
                continue
            assert main([name, *words]) == 0, words
    files = ("new", "rows-again", "exported", "across")
    lines = {file: Path(f"{file}.jsonl").read_text(encoding="utf-8").splitlines() for file in files}
    assert [len(lines[file]) for file in files] == [2, 21, 2, 2]
    assert lines["exported"] == lines["new"]
    assert json.loads(lines["across"][0]).keys() == {"row", "label", "probabilities", "scores"}


def test_every_decision_is_listed():
    listed = (DOCS / "adr" / "index.md").read_text(encoding="utf-8")
    assert [p.name for p in (DOCS / "adr").glob("0*.md") if f"({p.name})" not in listed] == []


def test_the_commands_of_using_a_tuned_model_run(tmp_path, monkeypatch):
    """Each in order; a server listens on loopback, and its line stands for that of the page."""
    page = (DOCS / "how-to" / "use-the-tuned-model.md").read_text(encoding="utf-8")
    commands = [
        shlex.split(line, comments=True)[2:] for line in re.findall(r"^\$ hosl .*$", page, re.MULTILINE)
    ]
    assert len(commands) > 10
    monkeypatch.chdir(tmp_path)
    language_model(tmp_path / "MODEL", "llama")
    write_rows(tmp_path / "rows.jsonl", [{"prompt": f"w{i} w1", "completion": " w2"} for i in range(20)])
    task = {"kind": "sft", "train": "rows.jsonl", "max_tokens": 32}
    config = tuning(tmp_path, "MODEL", output_dir="runs/my", task=task)
    assert main(["train", str(config.rename("my.yaml"))]) == 0
    (tmp_path / "prompts.txt").write_text("w1 w2\nw3\n")
    with contextlib.ExitStack() as servers:
        for number, (name, *words) in enumerate(commands):
            if name == "generate":
                words += ["--max-new-tokens", "3"]
            if name == "serve":
                more = [
                    word for word in words[1:] if ":" not in word and word not in ("--listen", "--public")
                ]
                server = servers.enter_context(Server(Path(words[0]), tmp_path / f"service-{number}", *more))
                continue
            line = server.line if "--to" in words else ""
            words = [line if word.startswith("hosl://") else word for word in words]
            if (
                name == "join"
            ):  # annotations are verified in this process, and a session begins without a client
                subprocess.run([*HOSL, name, *words], check=True, env=ENVIRONMENT, capture_output=True)
                continue
            assert main([name, *words]) == 0, words
    here, across = (Path(name).read_text().splitlines() for name in ("answers.jsonl", "across.jsonl"))
    assert len(here) == len(across) == 20

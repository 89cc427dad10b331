"""The house rules that a machine can check."""

import ast
import importlib
import pkgutil
import runpy
from collections import Counter
from pathlib import Path

import pytest

import hosl

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
    import subprocess

    subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)
    (tmp_path / "page.md").write_text("# Here\n[good](page.md#here) [bad](page.md#there) [gone](no.md)\n")
    broken_links = runpy.run_path(str(ROOT / "scripts" / "check_links.py"))["broken_links"]
    assert broken_links(tmp_path) == ["page.md:2: page.md#there", "page.md:2: no.md"]

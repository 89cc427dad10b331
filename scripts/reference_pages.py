"""The reference pages that come from the code: docs/reference/config.md, study.md, cli.md and api.md.

    python scripts/reference_pages.py            # writes them
    python scripts/reference_pages.py --check    # exit status 1 names those that are not what the code says

Only what the package shows is read: `hosl.config.Config`, `hosl.study.config.Study`, the help of every command,
`hosl.__all__`. So the pages follow when modules move, and are the same on every machine.
"""

import argparse
import ast
import contextlib
import inspect
import io
import os
import re
import sys
import textwrap
import types
from collections.abc import Iterable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import msgspec
import yaml

import hosl
import hosl.cli
import hosl.config
from hosl.core.methods import METHODS
from hosl.study.config import Study, StudyMethod

ROOT = Path(__file__).resolve().parents[1]
_PAGE = re.compile(r"\bdocs/([\w/.-]+\.md)")
MADE = "<!-- Made by scripts/reference_pages.py from the code: change the code, then run `make docs`. -->\n"


def plain(text: str) -> str:
    """A docstring's prose as Markdown: nothing in it is markup but `code`, and pages of docs/ are links."""

    def escaped(prose: str) -> str:
        return _PAGE.sub(linked, re.sub(r"([*\[\]])", r"\\\1", prose).replace("<", "&lt;"))

    def linked(match: re.Match[str]) -> str:
        there = (ROOT / match[0]).is_file()
        return f"[{match[0]}]({os.path.relpath(match[1], 'reference')})" if there else match[0]

    return "".join(p if p.startswith("`") else escaped(p) for p in re.split(r"(`[^`]*`)", text))


def either(words: Iterable[str]) -> str:
    """`a`, `b` or `c`."""
    *most, last = (f"`{word}`" for word in words)
    return f"{', '.join(most)} or {last}" if most else last


def cell(text: str) -> str:
    """The same on one line of a table."""
    return " ".join(plain(text).split()).replace("|", "&#124;")


def table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    """A Markdown table."""
    return "\n".join("| " + " | ".join(line) + " |" for line in [head, ("---",) * len(head), *rows]) + "\n"


def prose(docstring: str) -> str:
    """A docstring of Google's style: its sections as bold words."""
    text = inspect.cleandoc(docstring)
    out = []
    for part in text.split("\n\n"):
        match = re.match(r"(Args|Raises|Returns|Yields):\n", part)
        if match:
            items = re.findall(r"^    (\S[^:]*): ((?:.|\n        )*)", part, re.MULTILINE)
            listed = [f"* `{name}`: {cell(told)}" for name, told in items]
            out.append(f"**{match[1]}**\n\n" + ("\n".join(listed) or cell(part[match.end() :])))
        elif part.startswith("    "):
            out.append(f"```\n{textwrap.dedent(part)}\n```")
        else:
            out.append(plain(part))
    return "\n\n".join(out)


def field_docstrings(cls: type) -> dict[str, str]:
    """name -> the string below that field in the class's source, its bases' fields included."""
    found: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        if base.__module__.split(".")[0] != "hosl":
            continue
        body = ast.parse(textwrap.dedent(inspect.getsource(base))).body[0].body  # type: ignore[attr-defined]
        for this, after in pairwise(body):
            if (
                isinstance(this, ast.AnnAssign)
                and isinstance(this.target, ast.Name)
                and isinstance(after, ast.Expr)
            ):
                value = after.value
                if isinstance(value, ast.Constant) and isinstance(value.value, str):
                    found[this.target.id] = value.value
    return found


def config_page() -> str:
    """Every key that a run's YAML file may have."""
    parts = [
        MADE,
        "# Configuration\n",
        "Every key that the YAML file of a run may have. `hosl train CONFIG.yaml --a.b value` changes one from the "
        "command line. An unknown key is refused, and the nearest right name is told. Every key can be left out, "
        "unless it says *required*. How a file looks: [train on your own data](../how-to/own-data.md).\n",
        "YAML reads `1e-3` as text: write `1.0e-3`.\n",
    ]
    for path, cls in sections(hosl.config.Config):
        tag = cls.__struct_config__.tag
        title = f"{path}, kind: {tag}" if tag else path or "Top level"
        rows = list(keys(path, cls))
        head = f"## {title}\n\n{cell(cls.__doc__ or '')}\n"
        if tag:
            rows.insert(0, (f"`{path}.kind`", f"`{tag}`", "", "Which kind of task this is."))
        parts.append(head + "\n" + table(("key", "value", "default", "meaning"), rows))
    methods = [(f"`{m.name}`", cell(m.about), cell(", ".join(sorted(m.reads)))) for m in METHODS.values()]
    parts.append(
        "## Methods\n\nThe values of `method`. A config that sets a governed key which its method does not read is "
        "refused.\n\n" + table(("method", "what it is", "governed keys that it reads"), methods)
    )
    return "\n".join(parts)


def study_page() -> str:
    """Every key that a study's YAML file may have."""
    parts = [
        MADE,
        "# Keys of a study\n",
        "Every key that the YAML file of `hosl study` may have. `base`, `tasks` and `settings` hold "
        "[settings of a run](config.md). How to write one: [run a study](../how-to/study.md).\n",
    ]
    for title, path, cls in (("Top level", "", Study), ("methods.NAME", "methods.NAME", StudyMethod)):
        rows = table(("key", "value", "default", "meaning"), list(keys(path, cls)))
        parts.append(f"## {title}\n\n{cell(cls.__doc__ or '')}\n\n{rows}")
    return "\n".join(parts)


def sections(cls: type, path: str = "") -> Iterator[tuple[str, type]]:
    """The struct itself and those in it, with their dotted paths, in the order of the file."""
    yield path, cls
    for field in msgspec.structs.fields(cls):
        for inner in structs_of(get_type_hints(cls)[field.name]):
            yield from sections(inner, f"{path}.{field.encode_name}".lstrip("."))


def structs_of(kind: Any) -> list[type]:
    """The structs among a type's alternatives."""
    options = get_args(kind) if get_origin(kind) in (Union, types.UnionType) else (kind,)
    return [o for o in options if isinstance(o, type) and issubclass(o, msgspec.Struct)]


def keys(path: str, cls: type) -> Iterator[tuple[str, ...]]:
    """A row of the table for each key of a struct that is no section."""
    told = field_docstrings(cls)
    for field in msgspec.structs.fields(cls):
        kind = get_type_hints(cls)[field.name]
        if structs_of(kind):
            continue
        name = f"{path}.{field.encode_name}".lstrip(".")
        yield f"`{name}`", shown_type(kind), shown_default(field), cell(told.get(field.name, ""))


def shown_type(kind: Any) -> str:
    """A type as a person would say it: number, text, or the words allowed."""
    if get_origin(kind) in (Union, types.UnionType):
        return " or ".join(shown_type(option) for option in get_args(kind))
    if get_origin(kind) is Literal:
        return either(map(str, get_args(kind)))
    if get_origin(kind) is tuple:
        return f"list of {shown_type(get_args(kind)[0])}"
    if kind is bool:
        return either(["true", "false"])
    words = {int: "whole number", float: "number", str: "text", types.NoneType: "`null`", dict: "mapping"}
    return words.get(get_origin(kind) or kind) or f"`{getattr(kind, '__name__', kind)}`"


def shown_default(field: msgspec.structs.FieldInfo) -> str:
    """As YAML has it."""
    value = field.default
    if value is msgspec.NODEFAULT and field.default_factory is not msgspec.NODEFAULT:
        value = field.default_factory()
    if value is msgspec.NODEFAULT:
        return "*required*"
    as_yaml = yaml.safe_dump(msgspec.to_builtins(value), default_flow_style=True).replace("\n...", "").strip()
    return f"`{as_yaml}`"


def commands() -> dict[str, str]:
    """command -> its line in `hosl --help`."""
    help_text = io.StringIO()
    with contextlib.redirect_stdout(help_text):
        hosl.cli.main(["--help"])
    return dict(re.findall(r"^  ([a-z][\w-]*) +(\S.*)$", help_text.getvalue(), re.MULTILINE))


def cli_page() -> str:
    """Every command with its arguments."""
    parts = [
        MADE,
        "# Commands\n",
        "`hosl COMMAND --help` tells the same. Most commands take `--json`: the result as one JSON object on standard "
        'output, and nothing else there; of a failure, `{"error": {"kind": ..., "message": ...}}`. Commands that read '
        "the config of a run take any [setting](config.md) of it as `--a.b value`. Exit status: 0 done, 1 the work "
        "failed, 2 the request was wrong, 3 the run diverged, 130 interrupted.\n",
    ]
    lines = commands()
    parts.append(
        table(("command", "what it does"), [(f"[`{c}`](#hosl-{c})", cell(t)) for c, t in lines.items()])
    )
    for command in lines:
        parser = parser_of([command])
        parts.append(f"## hosl {command}\n\n" + arguments(parser))
        for words in inner_commands(parser, command):
            parts.append(f"### hosl {' '.join(words)}\n\n" + arguments(parser_of(words)))
    return "\n".join(parts)


class _HelpAskedError(Exception):
    """Carries the parser whose help was asked for."""


def parser_of(words: list[str]) -> argparse.ArgumentParser:
    """The parser that answers `hosl WORDS --help`."""

    def caught(self: argparse.ArgumentParser, file: Any = None) -> None:
        raise _HelpAskedError(self)

    printing, argparse.ArgumentParser.print_help = argparse.ArgumentParser.print_help, caught  # type: ignore[method-assign]
    try:
        hosl.cli.main([*words, "--help"])
    except _HelpAskedError as found:
        return found.args[0]
    finally:
        argparse.ArgumentParser.print_help = printing  # type: ignore[method-assign]
    raise SystemExit(f"hosl {' '.join(words)} --help shows no parser")


def inner_commands(parser: argparse.ArgumentParser, command: str) -> list[list[str]]:
    """Words such as [bench, step] whose help is another's than the command's own."""
    first = next((a for a in parser._actions if not a.option_strings and a.choices), None)
    pairs = [[command, str(choice)] for choice in (first.choices if first and first.choices else ())]
    return [words for words in pairs if parser_of(words).prog != parser.prog]


def arguments(parser: argparse.ArgumentParser) -> str:
    """Usage in one line, what it does, and a row per argument."""
    actions = [a for a in parser._actions if not isinstance(a, argparse._HelpAction)]
    actions.sort(key=lambda a: (bool(a.option_strings), "--json" in a.option_strings))
    optional = [a for a in actions if a.option_strings]
    usage = [parser.prog, *(_placed(a) for a in actions if not a.option_strings)]
    usage += [f"{a.option_strings[-1]} {_metavar(a)}" for a in optional if a.required]
    usage += ["[options]"] if any(not a.required for a in optional) else []
    rows = [(_name(a), _default(a), _help(parser, a)) for a in actions]
    return f"{cell(parser.description or '')}\n\n```\n{' '.join(usage)}\n```\n\n" + table(
        ("argument", "default", "meaning"), rows
    )


def _metavar(action: argparse.Action) -> str:
    if action.metavar:
        return str(action.metavar)
    return "|".join(map(str, action.choices)) if action.choices else action.dest.upper()


def _placed(action: argparse.Action) -> str:
    name = str(
        action.metavar or ("|".join(map(str, action.choices)) if action.choices else action.dest.upper())
    )
    return {"?": f"[{name}]", "+": f"{name}...", "*": f"[{name}...]"}.get(str(action.nargs), name)


def _name(action: argparse.Action) -> str:
    if not action.option_strings:
        return f"`{action.metavar or action.dest.upper()}`"
    taken = "" if action.nargs == 0 else f" {action.metavar or action.dest.upper()}"
    return ", ".join(f"`{option}{taken}`" for option in action.option_strings)


def _default(action: argparse.Action) -> str:
    if action.required and action.option_strings:
        return "*required*"
    return "" if action.default in (None, False, argparse.SUPPRESS) else f"`{action.default}`"


def _help(parser: argparse.ArgumentParser, action: argparse.Action) -> str:
    told = cell(parser._get_formatter()._expand_help(action)) if action.help else ""
    allowed = either(map(str, action.choices)) if action.choices else ""
    return told + (f" ({allowed})" if told and allowed else allowed)


def api_page() -> str:
    """Every public name with its signature and docstring."""
    parts = [
        MADE,
        "# Public names\n",
        "What `import hosl` gives, and nothing else. A name is loaded when it is first used, so the import itself "
        "costs nothing. In use: [write your own loop](../how-to/own-loop.md).\n",
    ]
    objects = {name: getattr(hosl, name) for name in hosl.__all__}
    rows = [
        (f"[`{n}`](#{n.lower()})", cell((o.__doc__ or "").strip().split("\n\n")[0]))
        for n, o in objects.items()
    ]
    parts.append(table(("name", "what it is"), rows))
    for name, thing in objects.items():
        parts.append(f"## {name}\n")
        source = Path(str(sys.modules[thing.__module__].__file__)).relative_to(
            Path(str(hosl.__file__)).parents[1]
        )
        body = class_text(thing) if isinstance(thing, type) else function_text(thing, "hosl.")
        parts.append(f"{body}\n\n[Source](../../src/{source.as_posix()})\n")
    return "\n".join(parts)


def function_text(function: Any, before: str = "") -> str:
    """Its signature as written, and its docstring."""
    node = ast.parse(textwrap.dedent(inspect.getsource(function))).body[0]
    assert isinstance(node, ast.FunctionDef)
    return f"```python\n{signature(node, before)}\n```\n\n{prose(function.__doc__ or '')}"


def signature(node: ast.FunctionDef, before: str = "") -> str:
    """On one line, or with a line per argument where that is too long; no self."""
    wanted = node.args
    if wanted.args and wanted.args[0].arg in ("self", "cls"):
        wanted.args = wanted.args[1:]
    returns = f" -> {ast.unparse(node.returns)}" if node.returns else ""
    pieces = arguments_of(wanted)
    one = f"{before}{node.name}({', '.join(pieces)}){returns}"
    if len(one) <= 90:
        return one
    return "\n".join([f"{before}{node.name}(", *(f"    {piece}," for piece in pieces), f"){returns}"])


def arguments_of(given: ast.arguments) -> list[str]:
    """Each argument as it is written, the bare star included."""

    def one(argument: ast.arg, default: ast.expr | None) -> str:
        return ast.unparse(argument) + (f" = {ast.unparse(default)}" if default else "")

    placed = given.posonlyargs + given.args
    defaults = [None] * (len(placed) - len(given.defaults)) + list(given.defaults)
    found = [one(a, d) for a, d in zip(placed, defaults, strict=True)]
    if given.vararg or given.kwonlyargs:
        found.append(f"*{ast.unparse(given.vararg)}" if given.vararg else "*")
    found += [one(a, d) for a, d in zip(given.kwonlyargs, given.kw_defaults, strict=True)]
    return found + ([f"**{ast.unparse(given.kwarg)}"] if given.kwarg else [])


def class_text(cls: type) -> str:
    """How it is made, its docstring, fields and public methods, inherited ones by name."""
    node = ast.parse(textwrap.dedent(inspect.getsource(cls))).body[0]
    assert isinstance(node, ast.ClassDef)
    told = field_docstrings(cls)
    made = [n for n in methods_of(cls) if n[0] == "__init__"]
    if made:
        made[0][1].name, made[0][1].returns = cls.__name__, None
        head = signature(made[0][1], "hosl.")
    else:
        head = f"hosl.{cls.__name__}({', '.join(get_type_hints(cls)) if told else ''})"
    parts = [f"```python\n{head}\n```", prose(cls.__doc__ or "")]
    if told:
        parts.append(table(("field", "what it is"), [(f"`{n}`", cell(t)) for n, t in told.items()]))
    for name, method, member in methods_of(cls):
        if name.startswith("_"):
            continue
        if "property" in [ast.unparse(d) for d in method.decorator_list]:
            returns = f" -> {ast.unparse(method.returns)}" if method.returns else ""
            parts.append(f"```python\n{name}{returns}\n```\n\n" + prose(member.__doc__ or ""))
        else:
            parts.append(f"```python\n{signature(method)}\n```\n\n" + prose(member.__doc__ or ""))
    return "\n\n".join(part for part in parts if part)


def methods_of(cls: type) -> list[tuple[str, ast.FunctionDef, Any]]:
    """(name, its source's tree, the member) of a class and hosl's classes above it, each name once."""
    found: dict[str, tuple[str, ast.FunctionDef, Any]] = {}
    for base in reversed(cls.__mro__):
        if base.__module__.split(".")[0] != "hosl" or getattr(base, "_is_protocol", False):
            continue
        for node in ast.parse(textwrap.dedent(inspect.getsource(base))).body[0].body:  # type: ignore[attr-defined]
            if isinstance(node, ast.FunctionDef):
                found[node.name] = (node.name, node, base.__dict__.get(node.name))
    return list(found.values())


PAGES = {"config.md": config_page, "study.md": study_page, "cli.md": cli_page, "api.md": api_page}


def stale_pages(folder: Path) -> dict[str, str]:
    """Names of the pages in `folder` that are not what the code says -> what they should be."""
    wanted = {name: page().rstrip() + "\n" for name, page in PAGES.items()}
    found = {n: (folder / n).read_text(encoding="utf-8") if (folder / n).is_file() else "" for n in wanted}
    return {name: text for name, text in wanted.items() if found[name] != text}


if __name__ == "__main__":
    reference = ROOT / "docs" / "reference"
    stale = stale_pages(reference)
    if sys.argv[1:] == ["--check"]:
        for name in stale:
            sys.stderr.write(
                f"docs/reference/{name} is not what the code says: run scripts/reference_pages.py\n"
            )
        sys.exit(bool(stale))
    for name, text in stale.items():
        (reference / name).write_text(text, encoding="utf-8")
        sys.stdout.write(f"wrote docs/reference/{name}\n")

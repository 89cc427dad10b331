"""The embedded texts, on every machine with Python: its standard library's docstrings, to classify and to write.

**The embedded task**: which package of Python's standard library does a docstring come from?
Real text that is on every machine with Python: the first paragraphs of the standard library's docstrings. The label is
the top-level package or module; the 20 with the most texts are taken. Python 3.11.7: 4,373 rows. Texts that occur under
two labels are dropped. Source files are parsed, never imported. The texts are kept in the user's cache folder, since
parsing would add a second or two to every command.

**The embedded rows to learn** (`documented_functions`): what does a function do, in one sentence? The prompt is its
source without the docstring, the completion the docstring's first sentence.
"""

import ast
import hashlib
import os
import re
import sys
import sysconfig
import textwrap
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import msgspec

from hosl.errors import TaskError
from hosl.system.atomic import whole_file
from hosl.system.gc_paused import gc_paused
from hosl.system.paths import cache_folder
from hosl.tasks.base import content_order
from hosl.tasks.classification import ClassificationTask, LabelledText, carve, classification_task
from hosl.tasks.configs import DocstringsConfig
from hosl.tasks.tokenizer import TextTokenizer

_SKIPPED = {
    "test",
    "tests",
    "site-packages",
    "dist-packages",
    "idle_test",
    "turtledemo",
    "__pycache__",
    "lib2to3",
}
_ENCLOSING = ("body", "orelse", "handlers", "finalbody", "cases")
PYTHON_DOCSTRINGS = "python-docstrings"
"""The name of the embedded rows to learn, where a task names a file."""
_LABELS = 20
_LEAST_WORDS = 4
"""Shorter first paragraphs are left out."""
_MOST_WORDS = 25
"""Longer first sentences are left out."""
_MOST_CHARACTERS = 400
"""Longer functions are left out: about 120 tokens."""
_NOT_EVERYWHERE = {"distutils", "ensurepip", "idlelib", "tkinter", "turtle", "venv"}
"""The packages that distributions of Python put into packages of their own, or leave out."""
_DEV_ROWS, _TEST_ROWS, _LARGEST_HELD_OUT = 64, 96, 15
"""The rows of dev and test, about, and the most rows of a package in them, so that they are of many packages."""
_SENTENCE = re.compile(r"(.*?[^\W_A-Z][)'\"`]?\.)(?:\s|$)")
"""Up to the first full stop after a small letter or a digit: not after an initial."""
_ABBREVIATIONS = ("e.g.", "i.e.", "etc.", "vs.", "cf.")


def docstrings_task(config: DocstringsConfig, tokenizer: TextTokenizer, *, seed: int) -> ClassificationTask:
    """The task, split by content hash into test 15 %, dev 10 % and train; the splits do not depend on the seed.

    The seed chooses which rows a smaller `train_rows` keeps.

    Raises:
        TaskError: if this Python has no readable standard library.
    """
    library = _library()
    labels, texts = _kept_texts(library, _cache_file())
    if len(labels) < 2:
        raise TaskError(
            f"task docstrings: {library} holds no Python sources to read; use kind: files with your own text"
        )
    test, dev, train = carve(texts, [0.15, 0.10], seed=0)
    if config.train_rows is not None:
        train = carve(train, [config.train_rows], seed)[0]
    parts = {"train": train, "dev": dev, "test": test}
    return classification_task("docstrings", labels, parts, tokenizer, config.max_tokens)


def library_texts() -> list[str]:
    """All texts, in an order that depends on their content alone.

    Raises:
        TaskError: if this Python has no readable standard library.
    """
    _, labelled = _kept_texts(_library(), _cache_file())
    texts = [text for text, _ in labelled]
    if not texts:
        raise TaskError(f"{_library()} holds no Python sources to read; give text of your own")
    return [texts[index] for index in content_order(texts, 1)]


def keep_texts() -> None:
    """Fill the cache, so that the first command starts as fast as later ones. For installations."""
    _kept_texts(_library(), _cache_file())


def _library() -> Path:
    return Path(sysconfig.get_paths()["stdlib"])


def _cache_file() -> Path | None:
    """The file that keeps the texts between commands; None: this user has no home folder."""
    folder = cache_folder()
    return folder and folder / "docstrings.json"


class _Kept(msgspec.Struct, forbid_unknown_fields=True):
    """The content of the cache file."""

    made_from: str
    """The `_digest` at the time when the library was parsed."""
    labels: tuple[str, ...]
    texts: list[LabelledText]


def _kept_texts(library: Path, cache: Path | None) -> tuple[tuple[str, ...], list[LabelledText]]:
    """The `standard_library_texts`, from the cache if neither the library nor this module has changed since."""
    made_from = _digest(library)
    if cache is not None:
        with suppress(OSError, msgspec.DecodeError):  # none yet, or damaged: parsing replaces it
            kept = msgspec.json.decode(cache.read_bytes(), type=_Kept)
            if kept.made_from == made_from:
                return kept.labels, kept.texts
    with gc_paused():
        labels, texts = standard_library_texts(library)
    if cache is not None:
        with suppress(OSError):  # a read-only home or a full disk: the next command parses again
            cache.parent.mkdir(parents=True, exist_ok=True)
            whole_file(cache, msgspec.json.encode(_Kept(made_from, labels, texts)))
    return labels, texts


def _digest(library: Path) -> str:
    """SHA-256 of all that the texts depend on: Python, its library's files by name, size and time, and this module."""
    digest = hashlib.sha256(sys.version.encode() + Path(__file__).read_bytes())
    for path in sorted(_sources(library)):
        stat = path.stat()
        digest.update(f"{path}|{stat.st_size}|{stat.st_mtime_ns}\n".encode())
    return digest.hexdigest()


def standard_library_texts(library: Path) -> tuple[tuple[str, ...], list[LabelledText]]:
    """(labels, texts with label indices) of the 20 packages with the most texts; independent of the order of files."""
    packages_of: dict[str, set[str]] = {}
    for package, text in _paragraphs(library):
        packages_of.setdefault(text, set()).add(package)
    single = [
        (next(iter(packages)), text) for text, packages in sorted(packages_of.items()) if len(packages) == 1
    ]
    largest = sorted(Counter(package for package, _ in single).items(), key=lambda item: (-item[1], item[0]))
    labels = tuple(sorted(package for package, _ in largest[:_LABELS]))
    return labels, [(text, labels.index(package)) for package, text in single if package in labels]


def _paragraphs(library: Path) -> Iterator[tuple[str, str]]:
    """(package, first paragraph) of every docstring that is long enough."""
    for path in _sources(library):
        try:
            tree = ast.parse(path.read_bytes())
        except (SyntaxError, ValueError):
            continue  # samples of broken code that some distributions ship
        package = path.relative_to(library).parts[0].removesuffix(".py")
        for node in _statements(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                text = _first_paragraph(ast.get_docstring(node))
                if len(text.split()) >= _LEAST_WORDS:
                    yield package, text


def _sources(library: Path) -> Iterator[Path]:
    for folder, folders, files in os.walk(library):
        folders[:] = [name for name in folders if name not in _SKIPPED]
        yield from (Path(folder, name) for name in files if name.endswith(".py"))


def _statements(node: ast.AST) -> Iterator[ast.AST]:
    """The node and the statements in it, without expressions: most of a tree's nodes, and no docstrings."""
    yield node
    for field in _ENCLOSING:
        for inner in getattr(node, field, ()):
            yield from _statements(inner)


def _first_paragraph(docstring: str | None) -> str:
    return " ".join((docstring or "").split("\n\n")[0].split())


def documented_functions(library: Path | None = None) -> dict[str, list[dict[str, str]]]:
    """Rows {"prompt", "completion"} of train, dev and test: a function's source -> its docstring's first sentence.

    Every prompt and every completion occurs once; train, dev and test are of different packages. The order is that of
    the content's hash: with one Python the rows are the same on every machine. Python 3.11.7: 2,147, 60 and 106 rows.

    Args:
        library: the folder of the standard library; None: this Python's.

    Raises:
        TaskError: if this Python has no readable standard library.
    """
    library = library or _library()
    with gc_paused():
        found = {(package, source, sentence) for package, source, sentence in _functions(library)}
    rows: list[tuple[str, str, str]] = []
    sources: set[str] = set()
    sentences: set[str] = set()
    ordered = sorted(found)
    for index in content_order([source for _, source, _ in ordered], seed=0):
        package, source, sentence = ordered[index]
        if source not in sources and sentence not in sentences:
            rows.append((package, source, sentence))
        sources.add(source)
        sentences.add(sentence)
    if not rows:
        raise TaskError(f"{library} holds no Python sources to read; give your own rows in task.train")
    part_of = _parts(Counter(package for package, _, _ in rows))
    parts: dict[str, list[dict[str, str]]] = {"train": [], "dev": [], "test": []}
    for package, source, sentence in rows:
        row = {"prompt": f"{source}\n\n# What it does:", "completion": f" {sentence}"}
        parts[part_of[package]].append(row)
    return parts


def documented_functions_note() -> str:
    """The line that says where the rows of `documented_functions` come from."""
    version = ".".join(map(str, sys.version_info[:3]))
    return (
        f"{PYTHON_DOCSTRINGS}: functions of the library of Python {version}; another version has other rows"
    )


def _parts(sizes: Counter[str]) -> dict[str, str]:
    """The part of each package: small ones are held out, in the order of their names' hashes, till it is enough."""
    part_of = dict.fromkeys(sizes, "train")
    small = sorted(package for package, rows in sizes.items() if rows <= _LARGEST_HELD_OUT)
    held_out = 0
    for index in content_order(small, seed=0):
        if held_out >= _TEST_ROWS + _DEV_ROWS:
            break
        part_of[small[index]] = "test" if held_out < _TEST_ROWS else "dev"
        held_out += sizes[small[index]]
    return part_of


def _functions(library: Path) -> Iterator[tuple[str, str, str]]:
    """(package, source without docstring and blank lines, first sentence) of every function of a fitting length."""
    for path in _sources(library):
        package = path.relative_to(library).parts[0].removesuffix(".py")
        if package in _NOT_EVERYWHERE or package not in sys.stdlib_module_names:
            continue
        try:
            text = path.read_text(encoding="utf-8")
            tree = ast.parse(text)
        except (SyntaxError, ValueError):
            continue  # as above, or in an old encoding
        lines = text.split("\n")
        for node in _statements(tree):
            if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) or len(node.body) < 2:
                continue
            sentence = _first_sentence(ast.get_docstring(node))
            if not _LEAST_WORDS <= len(sentence.split()) <= _MOST_WORDS:
                continue
            docstring = node.body[0]
            kept = (
                lines[node.lineno - 1 : docstring.lineno - 1] + lines[docstring.end_lineno : node.end_lineno]
            )
            source = textwrap.dedent("\n".join(line.rstrip() for line in kept if line.strip()))
            if len(source) <= _MOST_CHARACTERS:
                yield package, source, sentence


def _first_sentence(docstring: str | None) -> str:
    """The first sentence of the first paragraph; empty if it does not end with a full stop."""
    paragraph = _first_paragraph(docstring)
    end = 0
    while sentence := _SENTENCE.match(paragraph, end):
        end = sentence.end(1)
        if not paragraph[:end].endswith(_ABBREVIATIONS):
            return paragraph[:end]
    return ""

"""What a type checker says of `import hosl`, and what the package needs installed."""

import json
import re
import subprocess
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import hosl

ROOT = Path(__file__).parents[2]


def test_a_misspelt_public_name_is_an_error_to_a_type_checker(tmp_path):
    used = "\n".join(f"hosl.{name}" for name in hosl.__all__)
    (tmp_path / "mine.py").write_text(
        f"import hosl\n{used}\nreveal_type(hosl.load_run)\nreveal_type(hosl.OptimiserSpec(name='adamw'))\n"
        "hosl.hosl_rond\nhosl.OptimiserSpec(name='adam')\n"
    )
    command = [sys.executable, "-m", "pyright", "--pythonpath", sys.executable, "--outputjson", "mine.py"]
    (tmp_path / "pyrightconfig.json").write_text(json.dumps({"extraPaths": [str(ROOT / "src")]}))
    ran = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    found = json.loads(ran.stdout)["generalDiagnostics"]
    errors = [d["message"] for d in found if d["severity"] == "error"]
    assert len(errors) == 2, errors
    assert '"hosl_rond" is not a known attribute of module "hosl"' in errors[0]
    assert "adam" in errors[1]
    revealed = [d["message"] for d in found if d["severity"] == "information"]
    assert [re.search(r'is "(.*)"$', text, re.DOTALL)[1] for text in revealed] == [
        "(run: Path, *, low_precision: bool = True, max_steps: int | None = None, best: bool = False, "
        "weights_only: bool = False) -> LocalSession",
        "OptimiserSpec",
    ]


def test_type_checkers_and_python_know_the_same_names():
    stub = (ROOT / "src" / "hosl" / "__init__.pyi").read_text(encoding="utf-8")
    assert sorted(re.findall(r" as (\w+)$", stub, re.MULTILINE)) == hosl.__all__
    for home, name in re.findall(r"^from ([\w.]+) import (\w+) as", stub, re.MULTILINE):
        assert getattr(sys.modules[getattr(hosl, name).__module__], name) is getattr(hosl, name)
        assert hosl._HOMES[name] == home


WITHOUT = """
import sys
ABSENT = {"torch", "transformers", "peft", "jaxtyping", "beartype", "grpc_tools"}
from importlib.abc import MetaPathFinder
class Absent(MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ABSENT:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Absent())
"""


def without_torch(script, *words, absent=()):
    """A script in a process that finds neither torch nor transformers nor peft, nor what only tests have."""
    more = f"ABSENT |= set({sorted(absent)})\n"
    command = [sys.executable, "-c", WITHOUT + more + script, *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


LINE = "hosl://127.0.0.1:1#" + "A" * 43 + "." + "B" * 43
NEED_TORCH = {
    "train": ["CONFIG"], "train --resume": ["RUN"], "eval": ["RUN"], "export": ["RUN", "OUT"],
    "split": ["MODEL", "OUT", "--cut", "2"], "serve": ["HALF"], "plan": ["CONFIG"], "plan of a model": ["opt-125m"],
    "bench step": [], "bench memory": [], "bench plan": [], "bench link": [], "bench service": [], "study": ["STUDY"],
    "generate": ["RUN", "--prompt", "a"], "predict": ["RUN", "ROWS", "-o", "OUT"],
    "merge": ["JOINED", "--to", LINE, "-o", "OUT"],
}  # fmt: skip
HALF = {"format": 1, "side": "client", "family": "bert", "head": "classification", "cut": 2} | dict.fromkeys(
    ("base_digest", "digest", "client_digest", "server_digest"), ""
)


def test_every_verb_that_needs_torch_says_so_in_one_line_where_there_is_none(tmp_path):
    (tmp_path / "half").mkdir()
    (tmp_path / "half" / "half.json").write_text(json.dumps(HALF))
    (tmp_path / "config.yaml").write_text("max_steps: 1\n")
    names = {"CONFIG": tmp_path / "config.yaml", "HALF": tmp_path / "half", "RUN": tmp_path / "run"}
    (tmp_path / "joined").mkdir()
    (tmp_path / "joined" / "record.json").write_text("{}")
    names |= {"JOINED": tmp_path / "joined", "ROWS": tmp_path / "rows.csv"}
    names |= {"OUT": tmp_path / "out", "STUDY": ROOT / "examples" / "studies" / "quick.yaml"}
    verbs = {verb: [verb.partition(" of ")[0].split(), words] for verb, words in NEED_TORCH.items()}
    asked = [[*verb, *(str(names.get(word, word)) for word in words)] for verb, words in verbs.values()]
    script = (
        "import json, io, contextlib\nfrom hosl.cli import main\n"
        "for words in json.loads(sys.argv[1]):\n"
        "    said = io.StringIO()\n"
        "    with contextlib.redirect_stderr(said):\n"
        "        status = main(words)\n"
        "    print(json.dumps([status, said.getvalue()]))\n"
    )
    ran = without_torch(script, json.dumps(asked))
    assert ran.returncode == 0, ran.stderr
    for verb, line in zip(NEED_TORCH, ran.stdout.splitlines(), strict=True):
        said = "needs torch, which is not installed here: `pip install 'hosl[torch]'`\n"
        command = verb.split()[0]
        assert json.loads(line) == [2, f"hosl: hosl {command} {said}"], verb
    assert not (tmp_path / "out").exists()


NO_ENGINE = """
import json
from hosl.cli import main
sys.exit(main(json.loads(sys.argv[1])))
"""


@pytest.mark.parametrize(
    ("absent", "runtime", "says"),
    [
        (set(), None, "has no graphs for ONNX Runtime, and PyTorch is not installed here: split the model again"),
        ({"onnxruntime"}, None, "needs an engine, and none is installed: `pip install 'hosl[edge]'` brings ONNX"),
        (set(), "torch", "hosl join needs torch, which is not installed here: `pip install 'hosl[torch]'`"),
        ({"onnxruntime"}, "onnx", "hosl join needs onnxruntime, which is not installed here: `pip install 'hosl[ed"),
        (set(), "onnx", "has no graphs for an inference engine"),
    ],
)  # fmt: skip
def test_join_says_which_engine_it_lacks(tmp_path, absent, runtime, says):
    (tmp_path / "half.json").write_text(json.dumps(HALF))
    (tmp_path / "config.yaml").write_text(
        f"method: hosl\nmax_steps: 1\nmodel: {{cut: 2}}\noutput_dir: {tmp_path / 'run'}\n"
    )
    words = ["join", str(tmp_path), "--to", LINE, "--config", str(tmp_path / "config.yaml")]
    words += [] if runtime is None else ["--runtime", runtime]
    ran = without_torch(NO_ENGINE, json.dumps(words), absent=absent)
    (line,) = ran.stderr.splitlines()
    assert says in line
    assert ran.returncode == (1 if "inference engine" in says else 2)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("words", [["--help"], ["train", "--help"], ["join", "--help"], ["--version"]])
def test_help_needs_no_torch(words):
    ran = without_torch("from hosl.cli import main\nsys.exit(main(sys.argv[1:]))", *words)
    assert ran.returncode == 0, ran.stderr


def test_a_bare_install_brings_all_that_a_device_imports():
    """The distributions behind every module that the device's side loads, against pyproject's own list."""
    script = (
        "import json, pkgutil, importlib\n"
        "import hosl.network.join, hosl.network.audit, hosl.cli.join, hosl.cli.clients, grpc.aio\n"
        "from hosl.config import Config\nfrom hosl.cli.train import overridden\noverridden(Config(), ['--seed', '1'])\n"
        "for package in ('hosl.core', 'hosl.tasks', 'hosl.wire', 'hosl.transport', 'hosl.system', 'hosl.config'):\n"
        "    for module in pkgutil.iter_modules(importlib.import_module(package).__path__, package + '.'):\n"
        "        importlib.import_module(module.name)\n"
        "top = {name.partition('.')[0] for name in sys.modules}\n"
        "print(json.dumps(sorted(top - set(sys.stdlib_module_names))))\n"
    )
    ran = without_torch(script)
    assert ran.returncode == 0, ran.stderr
    providers = packages_distributions()
    loaded = [
        {canonicalize_name(d) for d in providers.get(name, ["hosl"])} for name in json.loads(ran.stdout)
    ]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    bare = {Requirement(text).name.lower() for text in project["dependencies"]}
    assert bare == {
        "numpy",
        "msgspec",
        "pyyaml",
        "safetensors",
        "tokenizers",
        "tyro",
        "rich",
        "grpcio",
        "protobuf",
    }
    assert {Requirement(t).name for t in project["optional-dependencies"]["torch"]} == {
        "torch",
        "transformers",
    }
    # what those bring themselves
    theirs = {
        "typing-extensions", "docstring-parser", "typeguard", "shtab", "markdown-it-py", "mdurl", "pygments",
        "setuptools",  # its .pth is loaded before any import
    }  # fmt: skip
    assert [found for found in loaded if not found & (bare | theirs | {"hosl"})] == []

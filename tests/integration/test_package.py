"""The wheel, as a user gets it: every file of the package, and the command in an environment without the checkout."""

import re
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def run(*command, cwd=None):
    said = subprocess.run(
        [str(word) for word in command], cwd=cwd, capture_output=True, text=True, timeout=300
    )
    assert said.returncode == 0, said.stdout + said.stderr
    return said.stdout


def tracked(*paths):
    return run("git", "ls-files", *paths, cwd=ROOT).split("\n")[:-1]


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The folder of wheel and source archive, as `make package` builds them, from what git has."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("dist")
    for path in tracked("src", "pyproject.toml", "README.md", "LICENSE"):
        (source / path).parent.mkdir(parents=True, exist_ok=True)
        (source / path).write_bytes((ROOT / path).read_bytes())
    run(sys.executable, "-m", "build", "--outdir", out, source)
    return out


@pytest.mark.slow
@pytest.mark.network  # the build's own environment takes setuptools from the package index
def test_the_wheel_has_every_file_of_the_package_and_no_other(built):
    (wheel,) = built.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        files = {name for name in archive.namelist() if ".dist-info/" not in name}
        (metadata,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        requires = re.findall(r"^Requires-Dist: (.*)$", archive.read(metadata).decode(), re.MULTILINE)
    assert files == {path.removeprefix("src/") for path in tracked("src/hosl")}
    assert len(list(built.glob("*.tar.gz"))) == 1
    heavy = [text for text in requires if text.startswith(("torch", "transformers", "peft"))]
    assert len(heavy) == 3
    assert all("extra == " in text for text in heavy)


@pytest.mark.slow
@pytest.mark.network
def test_the_installed_wheel_helps_and_plans(built, tmp_path):
    """The heavy dependencies come from this environment by a .pth file, behind the wheel's own folder."""
    (wheel,) = built.glob("*.whl")
    venv.create(tmp_path / "bare", with_pip=True)
    python = tmp_path / "bare" / "bin" / "python"
    run(python, "-m", "pip", "install", "-q", "--no-deps", "--no-index", wheel)
    paths = {"base": str(tmp_path / "bare"), "platbase": str(tmp_path / "bare")}
    site = Path(sysconfig.get_path("purelib", vars=paths))
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")

    home = run(python, "-I", "-c", "import hosl; print(hosl.__file__)", cwd=tmp_path).strip()
    assert Path(home).is_relative_to(site)
    hosl = tmp_path / "bare" / "bin" / "hosl"
    assert "--client.learning-rate" in run(hosl, "train", "--help", cwd=tmp_path)
    assert "fo-recompute" in run(hosl, "plan", "opt-125m", cwd=tmp_path)

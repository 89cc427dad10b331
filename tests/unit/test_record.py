"""What a run writes down of where it was made."""

import subprocess

import pytest

from hosl.system.machine import checkout_commit, versions


def git(folder, *words):
    settings = ["-c", "user.name=a", "-c", "user.email=a@example.org"]
    asked = ["git", "-C", str(folder), *settings, *words]
    return subprocess.run(asked, capture_output=True, text=True, check=True).stdout.strip()


@pytest.mark.parametrize("way", ["loose", "packed", "detached"])
def test_the_commit_of_a_checkout_is_what_git_says(tmp_path, way):
    assert checkout_commit(tmp_path) is None
    git(tmp_path, "init", "-q", "-b", "main")
    git(tmp_path, "commit", "-q", "--allow-empty", "-m", "first")
    if way == "packed":
        git(tmp_path, "pack-refs", "--all")
    if way == "detached":
        git(tmp_path, "checkout", "-q", "--detach")
    assert checkout_commit(tmp_path) == git(tmp_path, "rev-parse", "HEAD")


def test_a_branch_without_a_commit_has_none(tmp_path):
    git(tmp_path, "init", "-q")
    assert checkout_commit(tmp_path) is None


def test_versions_name_what_shapes_a_runs_numbers():
    found = versions()
    assert {"hosl", "torch", "transformers", "numpy"} <= found.keys()
    assert all(isinstance(value, str) for value in found.values())

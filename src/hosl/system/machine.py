"""The machine and the software that a run's numbers were made with, and the memory of this process."""

import importlib.metadata
import os
import platform
from pathlib import Path


def versions() -> dict[str, str]:
    """Versions of what shapes a run's numbers, and the machine."""
    found = {"python": platform.python_version(), "machine": f"{platform.system()} {platform.machine()}"}
    for package in ("hosl", "torch", "transformers", "numpy", "safetensors", "tokenizers", "peft"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "absent"
    commit = checkout_commit(Path(__file__).parents[3])
    return found if commit is None else found | {"commit": commit}


def checkout_commit(folder: Path) -> str | None:
    """The commit that a git checkout is at, read without git; None: `folder` is none. Edits since are not told."""
    head = folder / ".git" / "HEAD"
    try:
        name = head.read_text(encoding="ascii").strip().removeprefix("ref: ")
        if "/" not in name:  # detached: HEAD is the commit
            return name
        if (head.parent / name).is_file():
            return (head.parent / name).read_text(encoding="ascii").strip()
        packed = (head.parent / "packed-refs").read_text(encoding="ascii").splitlines()
        return next((line.split()[0] for line in packed if line.endswith(f" {name}")), None)
    except (OSError, ValueError):
        return None


def machine() -> dict[str, str | int]:
    """What seconds are measured on: system, processor, and how many cores this process may use."""
    found = {"system": f"{platform.system()} {platform.machine()}", "cores": cores()}
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as facts:
            names = [line.partition(":")[2].strip() for line in facts if line.startswith("model name")]
    except OSError:
        names = []
    return found | ({"processor": names[0]} if names else {})


def cores() -> int:
    """Those that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def process_peak_bytes() -> int:
    """The most memory this process has had resident since it started (VmHWM); 0 where the system does not say."""
    return _of_process("VmHWM")


def process_bytes() -> int:
    """The memory that this process has resident now (VmRSS); 0 where the system does not say."""
    return _of_process("VmRSS")


def _of_process(what: str) -> int:
    try:
        with open("/proc/self/status", encoding="ascii") as status:
            for line in status:
                if line.startswith(f"{what}:"):
                    return int(line.split()[1]) * 1024
    except OSError:
        pass
    return 0

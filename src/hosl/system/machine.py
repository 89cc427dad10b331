"""The machine and the software that a run's numbers were made with, and the memory of this process."""

import importlib.metadata
import os
import platform
from pathlib import Path

_EARLIER_PEAK_BYTES = [0]
"""The most memory before the system's count began anew: one number, which changes as the system's count does."""


def versions() -> dict[str, str]:
    """The versions of the packages that a run's numbers depend on ("absent": not installed), and the machine."""
    facts = {"python": platform.python_version(), "machine": f"{platform.system()} {platform.machine()}"}
    for package in (
        "hosl",
        "torch",
        "transformers",
        "numpy",
        "safetensors",
        "tokenizers",
        "peft",
        "onnxruntime",
    ):
        try:
            facts[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            facts[package] = "absent"
    commit = checkout_commit(Path(__file__).parents[3])
    return facts if commit is None else facts | {"commit": commit}


def checkout_commit(folder: Path) -> str | None:
    """The commit of a git checkout, read without git; None: `folder` is no checkout. Later edits are not noticed."""
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
    """The machine that seconds are measured on: system, processor, and the number of cores this process may use."""
    facts = {"system": f"{platform.system()} {platform.machine()}", "cores": cores()}
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as cpuinfo:
            names = [line.partition(":")[2].strip() for line in cpuinfo if line.startswith("model name")]
    except OSError:
        names = []
    return facts | ({"processor": names[0]} if names else {})


def cores() -> int:
    """The number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def process_peak_bytes() -> int:
    """The most memory this process has had resident since it started (VmHWM); 0 where the system does not say."""
    return max(_status_bytes("VmHWM"), _EARLIER_PEAK_BYTES[0])


def peak_bytes_of(pid: int) -> int:
    """The most memory that another process has had resident; 0 where the system does not say."""
    return _status_bytes("VmHWM", pid)


def begin_peak() -> None:
    """Let the system's own count of the most memory begin anew; `process_peak_bytes` remembers what was before."""
    _EARLIER_PEAK_BYTES[0] = process_peak_bytes()
    try:
        with open("/proc/self/clear_refs", "w", encoding="ascii") as control:
            control.write("5")
    except OSError:  # not Linux, or not allowed: peaks are then those of the whole process
        pass


def peak_since_begin_bytes() -> int:
    """The most memory this process has had resident since `begin_peak`."""
    return _status_bytes("VmHWM")


def process_bytes() -> int:
    """The memory that this process has resident now (VmRSS); 0 where the system does not say."""
    return _status_bytes("VmRSS")


def process_pages() -> tuple[int, int]:
    """The resident bytes of this process's own pages (RssAnon), and of files' (RssFile), which the system may drop."""
    return _status_bytes("RssAnon"), _status_bytes("RssFile")


def _status_bytes(field: str, pid: int | str = "self") -> int:
    """A field of /proc/PID/status, which holds KiB, in bytes; 0 where there is none."""
    try:
        with open(f"/proc/{pid}/status", encoding="ascii") as status:
            for line in status:
                if line.startswith(f"{field}:"):
                    return int(line.split()[1]) * 1024
    except OSError:
        pass
    return 0

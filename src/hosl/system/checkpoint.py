"""Both halves at one step, on disk: written whole or not at all, read back bit for bit.

    checkpoints/step-00000200/
      state.json                   step, distribution, length of metrics.jsonl, digest of every other file
      client/journal.bin           zeroth-order client: every update since the base weights
      client/trained.safetensors   first-order client: always; zeroth-order: a snapshot (may be of an earlier step)
      client/optimiser.safetensors, server/trained.safetensors, server/optimiser.safetensors

The folder is written under another name, flushed to the disk and renamed, so the newest `step-*` is always complete.
Base weights are not copied: they are the model's own, recognised by their digest (`hosl.training.local_session`).
torch is imported only when there are tensors to write or read, so that a device without it can import this module.
"""

import json
import os
import shutil
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

from hosl.errors import CheckpointError, FailureError
from hosl.system.atomic import whole_folder

_FORMAT = 1


@dataclass
class Checkpoint:
    """The content of a checkpoint, in memory."""

    step: int
    state: dict[str, Any] = field(default_factory=dict)
    """Values for state.json, all of them JSON."""
    tensors: dict[str, dict[str, Any]] = field(default_factory=dict)
    """The tensors of each file, by the file's name without its ending, such as `server/trained`."""
    journal: bytes | None = None
    """The zeroth-order client's journal; None: the client has none."""
    linked: tuple[str, ...] = ()
    """Names of files that are hard links to those of the previous checkpoint, such as an earlier snapshot."""


def write_checkpoint(folder: Path, checkpoint: Checkpoint, *, keep: int = 1) -> Path:
    """Write `checkpoint` below `folder` and delete all but the newest `keep`; returns the path of the new one.

    `keep` is 2 where the other half is saved on another machine: a kill may come between the two writes.

    Raises:
        CheckpointError: if the disk is full or cannot be written; the older checkpoint then stays.
    """
    final, previous = folder / f"step-{checkpoint.step:08d}", newest_checkpoint(folder)
    try:
        with whole_folder(final) as partial:
            _fill(partial, checkpoint, previous)
    except (OSError, FailureError) as cause:
        raise CheckpointError(
            f"the checkpoint of step {checkpoint.step} could not be written: {cause}; "
            f"{'the one before it is intact' if previous else 'there is none before it'}: free space, then resume"
        ) from cause
    kept = sorted(folder.glob("step-*"))[-keep:]
    for old in folder.iterdir():
        if old not in kept:
            shutil.rmtree(old)
    return final


def drop_checkpoints_after(folder: Path, step: int) -> None:
    """Delete checkpoints later than `step`: the run has gone back and will write them again."""
    for path in folder.glob("step-*"):
        if int(path.name.removeprefix("step-")) > step:
            shutil.rmtree(path)


def newest_checkpoint(folder: Path) -> Path | None:
    """The newest complete checkpoint below `folder`, or None."""
    return max(folder.glob("step-*"), default=None)


def read_checkpoint(path: Path) -> Checkpoint:
    """Read a checkpoint back and check every file against its digest.

    Raises:
        CheckpointError: if a file is missing or is not the one that was written.
    """
    try:
        state = json.loads((path / "state.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as cause:
        raise CheckpointError(f"checkpoint {path} has no readable state.json: {cause}") from cause
    if state["format"] != _FORMAT:
        raise CheckpointError(f"checkpoint {path} has format {state['format']}; this version reads {_FORMAT}")
    checkpoint = Checkpoint(step=state["step"], state=state["facts"])
    for name, digest in state["digests"].items():
        file = path / name
        if not file.is_file() or _digest(file) != digest:
            actual = "another content" if file.is_file() else "no such file"
            raise CheckpointError(
                f"checkpoint {path}: {name} should have digest {digest[:12]}, found {actual}"
            )
        if name == "client/journal.bin":
            checkpoint.journal = file.read_bytes()
        else:
            import safetensors.torch

            checkpoint.tensors[name.removesuffix(".safetensors")] = safetensors.torch.load_file(file)
    return checkpoint


def _fill(partial: Path, checkpoint: Checkpoint, previous: Path | None) -> None:
    (partial / "client").mkdir()
    (partial / "server").mkdir()
    for name, tensors in checkpoint.tensors.items():
        _save_tensors(tensors, partial / f"{name}.safetensors")
    if checkpoint.journal is not None:
        (partial / "client" / "journal.bin").write_bytes(checkpoint.journal)
    for name in checkpoint.linked:
        assert previous is not None, f"{name} is linked from a checkpoint that does not exist"
        try:
            os.link(previous / name, partial / name)
        except OSError:  # a filesystem without hard links, such as exFAT
            shutil.copyfile(previous / name, partial / name)
    digests = {
        str(file.relative_to(partial)): _digest(file) for file in sorted(partial.rglob("*")) if file.is_file()
    }
    state = {"format": _FORMAT, "step": checkpoint.step, "facts": checkpoint.state, "digests": digests}
    (partial / "state.json").write_text(json.dumps(state, indent=2), encoding="utf-8")


def _save_tensors(tensors: dict[str, Any], file: Path) -> None:
    import safetensors.torch

    on_cpu = {key: t.detach().contiguous().cpu() for key, t in tensors.items()}
    try:
        safetensors.torch.save_file(on_cpu, file)
    except safetensors.SafetensorError as cause:  # wraps the system's error, such as a full disk
        raise OSError(0, str(cause)) from cause


def _digest(file: Path) -> str:
    with file.open("rb") as stream:
        digest = sha256()
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()

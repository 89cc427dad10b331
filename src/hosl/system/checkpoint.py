"""Both halves at one step, on disk: written whole or not at all, read back bit for bit.

    checkpoints/step-00000200/
      state.json                   step, distribution, length of metrics.jsonl, digest of every file, its own too
      client/journal.bin           zeroth-order client: every update since the base weights; state.json says how many
                                   of its bytes count (`add_to_checkpoint`)
      client/trained.safetensors   first-order client: always; zeroth-order: a snapshot (may be of an earlier step)
      client/optimiser.safetensors, server/trained.safetensors, server/optimiser.safetensors

The folder is written under another name, flushed to the disk and renamed, so every `step-*` is complete. One that a
disk has damaged since is told by its digests, and the one before it is taken (`newest_intact`, docs/adr/0015).
Base weights are not copied: they are the model's own, recognised by their digest (`hosl.training.local_session`).
Tensors are torch's, or numpy's arrays on a device without it; the files are the same.
"""

import json
import os
import re
import shutil
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np

from hosl.errors import CheckpointError, FailureError
from hosl.system.atomic import whole_file, whole_folder
from hosl.system.safetensors_file import read_arrays, write_arrays

_FORMAT = 2
"""Format that is written; 1, without a digest of state.json, is read too."""
_LENGTH = "journal_bytes"
"""Key of state.json: the length of the journal; what a kill has left behind it in the file does not count."""
_NAME = re.compile(r"step-(\d{8,})")
_JOURNAL, _SNAPSHOT, _OPTIMISER = "client/journal.bin", "client/trained.safetensors", "optimiser.safetensors"


@dataclass
class Checkpoint:
    """The content of a checkpoint, in memory."""

    step: int
    state: dict[str, Any] = field(default_factory=dict)
    """Values for state.json, all of them JSON."""
    tensors: dict[str, dict[str, Any]] = field(default_factory=dict)
    """The tensors of each file, by the file's name without its ending, such as `server/trained`."""
    written: dict[str, Callable[[Path], object]] = field(default_factory=dict)
    """The functions that write more such files, whose tensors are never in memory together; empty once it is read."""
    journal: bytes | None = None
    """The zeroth-order client's journal; None: the client has none."""
    linked: tuple[str, ...] = ()
    """Names of files that are hard links to those of the previous checkpoint, such as an earlier snapshot."""


def write_checkpoint(folder: Path, checkpoint: Checkpoint, *, beside: Collection[int] | None = None) -> Path:
    """Write `checkpoint` below `folder` and delete the older ones but the one before it; returns the new one's path.

    Two, because a disk may damage one, and a kill may come between the writes of the two sides of a network run.

    Args:
        folder: the folder of the checkpoints.
        checkpoint: what is written.
        beside: the steps whose checkpoints stay beside it; None: that of the one before it.

    Raises:
        CheckpointError: if the disk is full or cannot be written; the older checkpoint then stays.
    """
    final, previous = checkpoint_path(folder, checkpoint.step), newest_checkpoint(folder)
    try:
        with whole_folder(final) as partial:
            _fill(partial, checkpoint, previous)
    except (OSError, FailureError) as cause:
        raise CheckpointError(
            f"the checkpoint of step {checkpoint.step} could not be written: {cause}; "
            f"{'the one before it is intact' if previous else 'there is none before it'}: free space, then resume"
        ) from cause
    _keep(folder, {checkpoint.step, *(checkpoint_steps(folder)[-2:] if beside is None else beside)})
    return final


def add_to_checkpoint(path: Path, facts: dict[str, Any], journal: bytes) -> None:
    """Bring a checkpoint's facts and its journal up to date, both or neither; its tensors stay.

    The longer journal is written first. Until state.json counts it, which is replaced as one file, readers take the
    part that was there.

    Args:
        path: the checkpoint's folder.
        facts: the values that take the place of those of the same names.
        journal: the whole journal, which begins with the one that is there.

    Raises:
        CheckpointError: if the checkpoint is damaged, has another journal, or cannot be written: it is then as before.
    """
    state = _state(path)
    if _JOURNAL not in state["digests"] or not journal.startswith(_journal(path, state) or b""):
        raise CheckpointError(
            f"checkpoint {path} has a journal that went another way; nothing was added to it"
        )
    state |= {"facts": state["facts"] | facts, _LENGTH: len(journal)}
    state["digests"] = state["digests"] | {_JOURNAL: sha256(journal).hexdigest()}
    try:
        whole_file(path / _JOURNAL, journal)
        whole_file(path / "state.json", _state_bytes(state))
    except OSError as cause:
        raise CheckpointError(
            f"checkpoint {path} could not be brought up to date: {cause.strerror}; it is as it was: free space"
        ) from cause


def journal_bytes(path: Path) -> int:
    """The length of the journal of a checkpoint whose files are as they were written; 0: it has none."""
    state = _state(path)
    if _JOURNAL not in state["digests"]:
        return 0
    return state.get(_LENGTH, (path / _JOURNAL).stat().st_size)


def keep_newest(folder: Path, count: int) -> None:
    """Delete all checkpoints but the newest `count`, and what kills left half-written; other files stay."""
    _keep(folder, checkpoint_steps(folder)[-count:])


def _keep(folder: Path, steps: Collection[int]) -> None:
    for step in checkpoint_steps(folder):
        if step not in steps:
            shutil.rmtree(checkpoint_path(folder, step))
    for partial in folder.glob(".step-*.partial"):
        shutil.rmtree(partial)


def drop_checkpoints_after(folder: Path, step: int) -> None:
    """Delete checkpoints later than `step`: the run has gone back and will write them again."""
    for later in checkpoint_steps(folder):
        if later > step:
            shutil.rmtree(checkpoint_path(folder, later))


def checkpoint_path(folder: Path, step: int) -> Path:
    """The path of the checkpoint of `step` below `folder`."""
    return folder / f"step-{step:08d}"


def checkpoint_steps(folder: Path) -> list[int]:
    """The steps of the checkpoints below `folder`, ascending, by their names; anything else there is ignored."""
    names = (_NAME.fullmatch(path.name) for path in folder.glob("step-*") if path.is_dir())
    return sorted(int(name[1]) for name in names if name)


def newest_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint below `folder`, damaged or not, or None."""
    steps = checkpoint_steps(folder)
    return checkpoint_path(folder, steps[-1]) if steps else None


def intact_steps(folder: Path, say: Callable[[str], None]) -> Iterator[int]:
    """The steps of the checkpoints below `folder` whose files are those that were written, the newest first.

    `say` is called with a line about each that is damaged and newer than those. Files are read as steps are asked for.

    Raises:
        CheckpointError: if there are checkpoints, and none is intact.
    """
    return (state["step"] for _, state in _intact(folder, say, weights_only=False))


def newest_intact(
    folder: Path, say: Callable[[str], None], *, weights_only: bool = False
) -> Checkpoint | None:
    """The newest checkpoint below `folder` whose files are as they were written, each hashed once; None: there is none.

    Args:
        folder: the folder of the checkpoints.
        say: as in `intact_steps`.
        weights_only: whether the files of optimisers are left out, and may be damaged or missing.

    Raises:
        CheckpointError: if there are checkpoints, and none is intact.
    """
    found = next(_intact(folder, say, weights_only=weights_only), None)
    return found and _read(*found)


def _intact(
    folder: Path, say: Callable[[str], None], *, weights_only: bool
) -> Iterator[tuple[Path, dict[str, Any]]]:
    """The path and the checked state.json of each intact checkpoint; see `intact_steps`."""
    damaged, newest = [], None
    for step in reversed(checkpoint_steps(folder)):
        path = checkpoint_path(folder, step)
        try:
            state = _checked(path, weights_only=weights_only)
        except CheckpointError as damage:
            damaged.append(damage)
            continue
        if newest is None:
            for damage in damaged:
                say(f"{damage}; the newest intact one is of step {step}")
            if state["snapshot_damaged"]:
                say(f"checkpoint {path}: {_SNAPSHOT} is damaged; its journal rebuilds the same weights")
        newest = newest or step
        yield path, state
    if damaged and newest is None:
        raise CheckpointError(
            f"{damaged[0]}; no intact checkpoint is left in {folder}: put one back, or start a new run"
        ) from damaged[0]


def damage_of(path: Path) -> str | None:
    """Words for what is damaged in a checkpoint; None: every file is as it was written, each of which is hashed."""
    try:
        state = _checked(path)
    except CheckpointError as damage:
        return str(damage)
    return f"{_SNAPSHOT} is damaged; the journal rebuilds it" if state["snapshot_damaged"] else None


def facts_of(path: Path) -> dict[str, Any]:
    """The values that a checkpoint's writer put into its state.json; its other files are not looked at.

    Raises:
        CheckpointError: if state.json is missing or damaged.
    """
    return _state(path)["facts"]


def read_checkpoint(path: Path, *, arrays: bool = False) -> Checkpoint:
    """Read a checkpoint back and check every file against its digest.

    A damaged snapshot is left out where there is a journal, which rebuilds the same weights from the base weights.

    Args:
        path: the checkpoint's folder.
        arrays: whether its tensors are read as numpy's arrays (bfloat16 as float32), although torch is installed.

    Raises:
        CheckpointError: if a file is missing or is not the one that was written.
    """
    return _read(path, _checked(path), arrays=arrays)


def read_without_tensors(path: Path) -> tuple[Checkpoint, dict[str, Path]]:
    """A checkpoint without its tensors, and the files that hold them by their names without ending, all checked.

    Raises:
        CheckpointError: as of `read_checkpoint`.
    """
    state = _checked(path)
    files = [name for name in state["digests"] if name != _JOURNAL]
    checkpoint = Checkpoint(step=state["step"], state=state["facts"], journal=_journal(path, state))
    return checkpoint, {name.removesuffix(".safetensors"): path / name for name in files}


def _read(path: Path, state: dict[str, Any], *, arrays: bool = False) -> Checkpoint:
    checkpoint = Checkpoint(step=state["step"], state=state["facts"], journal=_journal(path, state))
    for name in state["digests"]:
        if name != _JOURNAL:
            tensors = read_arrays(path / name) if arrays else _torch_tensors(path / name)
            checkpoint.tensors[name.removesuffix(".safetensors")] = tensors
    return checkpoint


def _journal(path: Path, state: dict[str, Any]) -> bytes | None:
    """The journal of a checkpoint that was checked; None: it has none."""
    if _JOURNAL not in state["digests"]:
        return None
    return (path / _JOURNAL).read_bytes()[: state.get(_LENGTH)]


def _torch_tensors(file: Path) -> dict[str, Any]:
    """The tensors of a file, torch's; where torch is not installed, numpy's arrays."""
    try:
        import safetensors.torch
    except ImportError:
        return read_arrays(file)
    return safetensors.torch.load_file(file)


def _checked(path: Path, *, weights_only: bool = False) -> dict[str, Any]:
    """The content of state.json once every file is as written; its digests are of those that can and shall be read."""
    state, usable = _state(path), dict[str, str]()
    for name, digest in state["digests"].items():
        if weights_only and name.endswith(_OPTIMISER):
            continue
        found = _found(path / name, digest, state.get(_LENGTH) if name == _JOURNAL else None)
        if found and not (name == _SNAPSHOT and _JOURNAL in state["digests"]):
            raise CheckpointError(
                f"checkpoint {path}: {name} should have digest {digest[:12]}, found {found}"
            )
        usable |= {} if found else {name: digest}
    damaged = _SNAPSHOT in state["digests"] and _SNAPSHOT not in usable
    return state | {"digests": usable, "snapshot_damaged": damaged}


def _state(path: Path) -> dict[str, Any]:
    """The content of state.json, checked against its own digest."""
    try:
        state = json.loads((path / "state.json").read_text(encoding="utf-8"))
        digest = state.pop("digest", None)
        if state["format"] not in (1, _FORMAT):
            raise CheckpointError(
                f"checkpoint {path} has format {state['format']}; this version reads 1 and {_FORMAT}"
            )
        if digest != (None if state["format"] == 1 else _state_digest(state)):
            raise CheckpointError(f"checkpoint {path}: state.json has another digest than it says")
        if path.name != checkpoint_path(path, state["step"]).name:
            raise CheckpointError(f"checkpoint {path} holds step {state['step']}; its folder was renamed")
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as cause:
        raise CheckpointError(f"checkpoint {path} has no readable state.json: {cause}") from cause
    return state


def _found(file: Path, digest: str, size: int | None = None) -> str | None:
    """Words for what is there in place of the file of that digest, or of its first `size` bytes; None: the file is."""
    try:
        return None if _digest(file, size) == digest else "another content"
    except FileNotFoundError:
        return "no such file"
    except OSError as cause:  # such as a bad sector
        return f"that it cannot be read ({cause.strerror})"


def _fill(partial: Path, checkpoint: Checkpoint, previous: Path | None) -> None:
    (partial / "client").mkdir()
    (partial / "server").mkdir()
    for name, tensors in checkpoint.tensors.items():
        _save_tensors(tensors, partial / f"{name}.safetensors")
    for name, write in checkpoint.written.items():
        write(partial / f"{name}.safetensors")
    if checkpoint.journal is not None:
        (partial / "client" / "journal.bin").write_bytes(checkpoint.journal)
    digests = {
        str(file.relative_to(partial)): _digest(file) for file in sorted(partial.rglob("*")) if file.is_file()
    }
    for name in checkpoint.linked:
        assert previous is not None, f"{name} is linked from a checkpoint that does not exist"
        # its digest of then: one of now would vouch for whatever a disk has made of it
        digests[name] = _state(previous)["digests"][name]
        try:
            os.link(previous / name, partial / name)
        except OSError:  # a filesystem without hard links, such as exFAT
            shutil.copyfile(previous / name, partial / name)
    state = {"format": _FORMAT, "step": checkpoint.step, "facts": checkpoint.state, "digests": digests}
    if checkpoint.journal is not None:
        state[_LENGTH] = len(checkpoint.journal)
    (partial / "state.json").write_bytes(_state_bytes(state))


def _save_tensors(tensors: dict[str, Any], file: Path) -> None:
    if all(isinstance(tensor, np.ndarray) for tensor in tensors.values()):
        write_arrays(file, tensors)
        return
    import safetensors.torch

    on_cpu = {key: t.detach().contiguous().cpu() for key, t in tensors.items()}
    try:
        safetensors.torch.save_file(on_cpu, file)
    except safetensors.SafetensorError as cause:  # wraps the system's error, such as a full disk
        raise OSError(0, str(cause)) from cause


def _state_bytes(state: dict[str, Any]) -> bytes:
    """The content of state.json, with its own digest."""
    digest = _state_digest(json.loads(json.dumps(state)))  # as it will be read
    return json.dumps(state | {"digest": digest}, indent=2).encode()


def _state_digest(state: dict[str, Any]) -> str:
    """The SHA-256 digest of the content of state.json without its own digest."""
    return sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()


def _digest(file: Path, size: int | None = None) -> str:
    """The SHA-256 digest of a file, or of its first `size` bytes."""
    left = file.stat().st_size if size is None else size
    with file.open("rb") as stream:
        digest = sha256()
        while block := stream.read(min(left, 1 << 20)):
            digest.update(block)
            left -= len(block)
    return digest.hexdigest()

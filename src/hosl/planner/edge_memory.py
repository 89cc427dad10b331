"""The memory of a client on the inference engine, predicted from shapes alone. No torch: a device checks its budget."""

from dataclasses import dataclass
from pathlib import Path

from hosl.config import Config


@dataclass(frozen=True, slots=True)
class PlannedMemory:
    """The largest resident size of a client's process, by kind of page."""

    base_bytes: float
    """Python, the modules of `hosl join` and the engine, before any weight."""
    anonymous_bytes: float
    """What the process needs of its own beside the base: trained weights, activations, gradients, scratch."""
    file_bytes: float
    """Pages of the half's files: weights that are only read. The system may drop them and read them again."""

    @property
    def tensor_bytes(self) -> float:
        """All but the base."""
        return self.anonymous_bytes + self.file_bytes

    @property
    def process_bytes(self) -> float:
        """The peak of the process (VmHWM)."""
        return self.base_bytes + self.tensor_bytes


def planned_process_bytes(config: Config, folder: Path, rows: int, tokens: int) -> PlannedMemory:
    """The memory that a client of `make_edge_client(config, folder)` takes for a step on a batch [rows, tokens].

    Of an evaluation: the same with method frozen (`hosl.planner.costs.clean_pass`).

    Args:
        config: method, trainable set, micro-batch and directions are read.
        folder: OUT/client of `hosl split --runtime onnx`; only runtime.json and the headers of its files are read.
        rows: rows of the batch; a candidate answer is a row.
        tokens: tokens per row of the longest batch.

    Raises:
        ModelError: as in `read_runtime_json`.
        FolderError: if the folder is the server's half.
    """
    raise NotImplementedError

"""The calls of a half's blocks, and what stands before them as a function of tensors: the prelude.

Blocks are replaced by stand-ins that hand their input on and keep what they were called with. So the prelude of any
family is what its own forward computes for its blocks: the hidden state, masks, rotary angles, tables of distances.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from hosl.errors import SplitError
from hosl.split.halves import ClientHalf
from hosl.split.onnx_export.tracing import IDS, MASK, Tensors, given
from hosl.split.reading.runtime_json import HIDDEN, ROWS_OF_IDS, TABLE
from hosl.split.stand_ins import PassThrough


@dataclass(frozen=True, slots=True)
class Call:
    """What a block was called with, after the hidden state."""

    leaves: list[Any]
    """All arguments, flat."""
    form: Any
    """How they are put together again."""

    @property
    def tensors(self) -> list[torch.Tensor]:
        """The distinct tensors among them, in order."""
        return list({id(leaf): leaf for leaf in self.leaves if isinstance(leaf, torch.Tensor)}.values())

    def arguments(self, tensors: list[torch.Tensor]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments after the hidden state with these in place of `tensors`."""
        instead = {id(old): new for old, new in zip(self.tensors, tensors, strict=True)}
        return pytree.tree_unflatten([instead.get(id(leaf), leaf) for leaf in self.leaves], self.form)

    @property
    def outline(self) -> str:
        """Everything about the arguments but the tensors' values."""
        number = {id(tensor): i for i, tensor in enumerate(self.tensors)}
        leaves = [
            (number[id(leaf)], leaf.dtype, leaf.shape) if isinstance(leaf, torch.Tensor) else leaf
            for leaf in self.leaves
        ]
        return f"{leaves} {self.form}"


@dataclass(frozen=True, slots=True)
class Recording:
    """One forward pass up to the blocks."""

    hidden: torch.Tensor
    """[rows, seq, width], what block 0 is given."""
    calls: list[Call]
    """One for every block."""


def record(half: ClientHalf, batch: Tensors) -> Recording:
    """What the blocks of `half` are called with for a batch: `input_ids` and `attention_mask` [rows, seq], int64.

    Raises:
        SplitError: if anything else is computed between or after the blocks.
    """
    recording, loop = _run(half, batch)
    first = recording.hidden
    if any(state.data_ptr() != first.data_ptr() or state.shape != first.shape for state in loop):
        raise SplitError(
            "its forward pass computes something between or after its blocks, which a loop of blocks would leave out; "
            "run this client on torch"
        )
    if len(recording.calls) != half.cut:
        raise SplitError(
            f"its forward pass calls {len(recording.calls)} times {half.cut} blocks; run this client on torch"
        )
    if any(tensor is first for call in recording.calls for tensor in call.tensors):
        raise SplitError(
            "its blocks are given the embeddings beside the hidden state; run this client on torch"
        )
    return recording


def _run(half: ClientHalf, batch: Tensors) -> tuple[Recording, list[torch.Tensor]]:
    """The recording, and the hidden states that blocks and the caller were given: all one, if nothing is between."""
    calls: list[tuple[torch.Tensor, Call]] = []

    def keep(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        leaves, form = pytree.tree_flatten((args[1:], kwargs))
        calls.append((args[0], Call(leaves, form)))

    blocks: Any = half.model.get_submodule(half.blocks_name)
    stand_ins = [
        PassThrough(block, returns_tuple=half._family.blocks_return_tuples)
        for block in list(blocks)[: half.cut]
    ]
    for stand_in in stand_ins:
        stand_in.register_forward_pre_hook(keep, with_kwargs=True)
    with _instead(half.model, half.blocks_name, nn.ModuleList(stand_ins or list(blocks))):
        last = half(batch[IDS], batch[MASK])
    states = [*(hidden for hidden, _ in calls), last]
    return Recording(states[0], [call for _, call in calls]), states


def prelude(half: ClientHalf, weights: tuple[str, ...], tensors: Tensors) -> Recording:
    """`record` as a function of ids, mask, `rows_of_ids`, `table` and `weights`, these by their names in the half."""
    table = token_table(half)
    embeddings = half.model.get_submodule(table.rpartition(".")[0])
    whole, padding = embeddings.forward, embeddings.padding_idx
    replaced = {name: tensors[name] for name in weights} | {table: tensors[TABLE]}
    with given(half.model, replaced):
        # positions and masks see the ids themselves; only the table is read by the rows that it has here
        embeddings.forward = lambda *_, **__: whole(tensors[ROWS_OF_IDS])
        embeddings.padding_idx = None  # which must be a row of the table; it has to do with gradients alone
        try:
            return _run(half, tensors)[0]
        finally:
            del embeddings.forward
            embeddings.padding_idx = padding


def token_table(half: ClientHalf) -> str:
    """The name in the half of the token table's weight.

    Raises:
        SplitError: if the model does not say which it is.
    """
    table = half.model.get_input_embeddings()
    found = [name for name, module in half.model.named_modules() if module is table]
    if not found or not isinstance(table, nn.Embedding):
        raise SplitError("its token embeddings are no plain table of rows; run this client on torch")
    return f"{found[0]}.weight"


def before_blocks(half: ClientHalf) -> tuple[str, ...]:
    """The names of the parameters outside the blocks, without the token table."""
    inside, table = f"{half.blocks_name}.", token_table(half)
    return tuple(name for name, _ in half.named_parameters() if not name.startswith(inside) and name != table)


def outputs(recording: Recording) -> Tensors:
    """The tensors of a recording by name: `hidden`, and the distinct ones that blocks were given, `extra.0`, ..."""
    distinct = {id(tensor): tensor for call in recording.calls for tensor in call.tensors}
    return {HIDDEN: recording.hidden} | {f"extra.{i}": t for i, t in enumerate(distinct.values())}


@contextmanager
def _instead(model: nn.Module, name: str, module: nn.Module) -> Iterator[None]:
    kept = model.get_submodule(name)
    model.set_submodule(name, module)
    try:
        yield
    finally:
        model.set_submodule(name, kept)

"""Torch code run on tensors without data: its peak memory, its products and the bytes that it moves.

The plan's figures come from the parties' own code, not from a copy of it in formulas. Weights, batches and all
intermediate results are torch's fake tensors, which have shapes, dtypes and lifetimes but no memory. Fake tensors are
CPU tensors to torch, so it chooses the kernels of a CPU run. Memory inside a kernel is not counted.
"""

import math
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

_ATEN = torch.ops.aten
_FIRST_FACTOR = {_ATEN.mm: 0, _ATEN.bmm: 0, _ATEN.addmm: 1, _ATEN.baddbmm: 1, _ATEN._grouped_mm: 0}
"""Matrix products, and the position of their first factor among the arguments; the second follows it. The last one is
that of experts: each row of the first factor, a token that is routed to an expert, meets one of their matrices."""
_ATTENTION = {
    _ATEN._scaled_dot_product_flash_attention_for_cpu: 0,
    _ATEN._scaled_dot_product_flash_attention_for_cpu_backward: 1,
}
"""Fused attention, and the position of the queries among the arguments; the keys follow them."""

_ALLOCATIONS = (_ATEN.empty, _ATEN.new_empty, _ATEN.empty_like, _ATEN.empty_strided, _ATEN.new_empty_strided)
"""Operations that allocate memory and do not touch it."""


class Product(NamedTuple):
    """A matrix product: [batch, rows, inner] times [batch, inner, columns]."""

    batch: int
    rows: int
    inner: int
    columns: int
    dtype: torch.dtype

    @property
    def flops(self) -> int:
        """The number of multiplications and additions."""
        return 2 * self.batch * self.rows * self.inner * self.columns


class Attention(NamedTuple):
    """A call of fused attention, forward or backward."""

    rows: int
    heads: int
    queries: int
    keys: int
    width: int
    """The width of one head."""
    dtype: torch.dtype
    backward: bool

    @property
    def flops(self) -> int:
        """The multiplications and additions: of two products forward, five backward."""
        of_one = 2 * self.rows * self.heads * self.queries * self.keys * self.width
        return of_one * (5 if self.backward else 2)


@dataclass
class Work:
    """The work of some code, counted on tensors without data."""

    peak_bytes: int = 0
    """The peak of live memory beyond the memory that was alive before."""
    products: dict[Product, float] = field(default_factory=dict)
    """The number of times that each matrix product is made."""
    attention: dict[Attention, float] = field(default_factory=dict)
    """The number of times that each fused attention is called."""
    moved_bytes: int = 0
    """Bytes that all other operations read and write."""
    calls: int = 0
    """Operations that touch data."""


@contextmanager
def without_data() -> Iterator[None]:
    """A context manager in which new tensors have no data. `empty_` removes that of a model; arrays keep theirs.

    Numbers that code reads from tensors are synthetic (`_SyntheticContents`, `_SyntheticScalars`).
    """
    with FakeTensorMode(allow_non_fake_inputs=True), _SyntheticContents(), _SyntheticScalars():
        yield


def empty_(model: nn.Module, *others: nn.Module, device: str = "cpu") -> None:
    """Replace the parameters and buffers of models by tensors without data; ties stay, also between the models.

    Requires: inside `without_data`; the models were built on the meta device.
    """
    replacements: dict[int, torch.Tensor] = {}
    for module in (module for whole in (model, *others) for module in whole.modules()):
        for store in (module._parameters, module._buffers):
            for key, old in store.items():
                if old is None:
                    continue
                if id(old) not in replacements:
                    new = torch.empty(old.shape, dtype=old.dtype, device=device)
                    if isinstance(old, nn.Parameter):
                        new = nn.Parameter(new, requires_grad=old.requires_grad)
                    replacements[id(old)] = new
                store[key] = replacements[id(old)]  # pyright: ignore[reportArgumentType]


def storage_bytes(tensors: Iterable[torch.Tensor]) -> int:
    """The bytes of the storages behind tensors without data, each storage once."""
    storages = [t.untyped_storage() for t in tensors]
    return sum({s._cdata: s.nbytes() for s in storages}.values())


def work_of(code: Callable[[], Any], alive: Iterable[torch.Tensor]) -> Work:
    """Run `code` and count its work.

    Args:
        code: may call any torch operation.
        alive: tensors that exist before; their memory is not counted.

    Requires: inside `without_data`.
    """
    work = Work()
    with _Counting(work, alive):
        code()
    return work


def as_if_computed(code: Callable[[], Any]) -> Any:
    """Run `code` on the meta device, with synthetic numbers where it reads numbers from tensors; returns its result."""
    with torch.device("meta"), _SyntheticContents(), _SyntheticScalars():
        return code()


class _SyntheticScalars(TorchDispatchMode):
    """Scalars for code that reads them from tensors without data: True, or 1. A mask selects all elements."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is _ATEN._local_scalar_dense.default:
            return True if args[0].dtype == torch.bool else 1
        if func is _ATEN.index.Tensor and args[1][0] is not None and args[1][0].dtype == torch.bool:
            # so the gradient of an embedding has every row that was looked up
            indexed, mask = args[0], args[1][0]
            return indexed.new_empty((mask.numel(), *indexed.shape[mask.dim() :]))
        if func is _ATEN._grouped_mm.default:  # torch knows its result in bfloat16 alone
            first, second, ends = args[0], args[1], args[2]
            experts = () if second.dim() == 3 else (len(ends),)  # 2: the gradient of each expert's weights
            return first.new_empty((*experts, first.shape[0], second.shape[-1]))
        return func(*args, **(kwargs or {}))


class _Counting(TorchDispatchMode):
    """A mode that follows every storage from its birth to its end, and counts the operations."""

    def __init__(self, work: Work, alive: Iterable[torch.Tensor]) -> None:
        super().__init__()
        self._work, self._held_bytes = work, 0
        self._storages: WeakIdKeyDictionary = WeakIdKeyDictionary()
        for t in alive:
            self._storages[t.untyped_storage()] = True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        outputs = [out] if isinstance(out, torch.Tensor) else _tensors(out)
        for t in outputs:
            for dense in _dense(t):
                self._hold(dense.untyped_storage())
        self._count(func, args, kwargs or {}, outputs)
        return out

    def _hold(self, storage: Any) -> None:
        if storage in self._storages:
            return
        self._storages[storage] = True
        size_bytes = storage.nbytes()
        self._held_bytes += size_bytes
        self._work.peak_bytes = max(self._work.peak_bytes, self._held_bytes)
        weakref.finalize(storage, self._let_go, size_bytes)

    def _let_go(self, size_bytes: int) -> None:
        self._held_bytes -= size_bytes

    def _count(self, func: Any, args: Any, kwargs: Any, outputs: list[torch.Tensor]) -> None:
        packet, work = func.overloadpacket, self._work
        if packet in _FIRST_FACTOR:
            first, second = args[_FIRST_FACTOR[packet] :][:2]
            batch = first.shape[0] if first.dim() == 3 else 1
            rows, inner = first.shape[-2:]
            _add(work.products, Product(batch, rows, inner, second.shape[-1], first.dtype))
        elif packet in _ATTENTION:
            query, key = args[_ATTENTION[packet] :][:2]
            rows, heads, length, width = query.shape
            backward = _ATTENTION[packet] == 1
            _add(work.attention, Attention(rows, heads, length, key.shape[-2], width, query.dtype, backward))
        elif (
            outputs and packet not in _ALLOCATIONS and not _is_view(func)
        ):  # without outputs: a query of the device
            inputs = _tensors((args, kwargs))
            if _is_pointwise(func):
                work.peak_bytes = max(work.peak_bytes, self._held_bytes + _promoted_bytes(inputs))
            if func.overloadpacket in (_ATEN.embedding, _ATEN.index, _ATEN.index_select):
                inputs = outputs  # only the rows that are looked up are read
            work.moved_bytes += sum(t.numel() * t.element_size() for t in (*inputs, *outputs))
        else:
            return
        work.calls += 1


def _dense(t: torch.Tensor) -> Iterable[torch.Tensor]:
    """The tensors with the elements of `t`: itself, or indices and values of a sparse gradient of embeddings."""
    return (t._indices(), t._values()) if t.layout is torch.sparse_coo else (t,)


def _promoted_bytes(inputs: list[torch.Tensor]) -> int:
    """The bytes of an operation on different dtypes besides its result: a CPU kernel copies the narrower tensors."""
    shaped = [t for t in inputs if t.dim()]
    widest = max((t.element_size() for t in shaped if t.is_floating_point()), default=0)
    return sum(t.numel() * widest for t in shaped if t.is_floating_point() and t.element_size() < widest)


def _add(counts: dict[Any, float], key: Any) -> None:
    counts[key] = counts.get(key, 0.0) + 1.0


def _tensors(content: Any) -> list[torch.Tensor]:
    return [t for t in tree_leaves(content) if isinstance(t, torch.Tensor)]


@cache
def _is_view(func: Any) -> bool:
    """Whether an operation touches no data."""
    schema = func._schema
    return not schema.is_mutable and any(
        r.alias_info is not None and not r.alias_info.is_write for r in schema.returns
    )


@cache
def _is_pointwise(func: Any) -> bool:
    return torch.Tag.pointwise in func.tags


class _SyntheticContents(TorchFunctionMode):
    """Contents for code that reads whole tensors without data: arrays are ones, and all elements of a list differ."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.numpy:
            return np.ones(tuple(args[0].shape), dtype=str(args[0].dtype).removeprefix("torch."))
        if func is torch.Tensor.tolist:
            return np.arange(args[0].numel()).reshape(tuple(args[0].shape)).tolist()
        if func in (torch.unique, torch.Tensor.unique):
            count = math.prod(args[0].shape)
            return torch.arange(count), torch.arange(count).view(args[0].shape)
        if func is nn.functional.embedding and hasattr(args[1], "answer"):  # a probed table
            with self:
                return args[1].answer(args[0])
        return func(*args, **(kwargs or {}))

"""Functions of tensors as graphs of plain operators, with sizes left open; gradients too.

`traced` goes through `make_fx`, which also records what autograd computes: a block and its vector-Jacobian product are
traced the same way. Attention's fused kernel, and the operators that only backward passes use, become plain ones.
"""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode

from hosl.split.reading.runtime_json import GRADIENT

Tensors = dict[str, torch.Tensor]
IDS, MASK = "input_ids", "attention_mask"


@dataclass(frozen=True, slots=True)
class Sizes:
    """The sizes of examples that stay open in graphs; no other dimension has one of them."""

    rows: int
    seq: int
    distinct: int
    """Of the token table's rows."""
    rank: int
    """Of adapters."""

    @property
    def names(self) -> dict[int, str]:
        """By size, what the dimension is called in graphs."""
        return {size: name for name, size in asdict(self).items()}

    def batch(self) -> Tensors:
        """`input_ids` and `attention_mask`, with padding on both sides: a mask of ones is left out by some models."""
        ids = torch.zeros(self.rows, self.seq, dtype=torch.int64)
        mask = torch.ones_like(ids)
        mask[1, :2], mask[2, -2:] = 0, 0
        return {IDS: ids, MASK: mask}


def traced(
    function: Callable[[Tensors], Tensors], examples: Tensors
) -> tuple[torch.fx.GraphModule, tuple[str, ...]]:
    """The graph of `function`, of tensors by name, and the names of its outputs. Takes and returns tensors in order.

    Sizes of 2 and more stay open.

    Equal sizes are taken for one size, and equal tensors would be taken for one tensor: examples need sizes of their
    own (`sizes_beside`) where they mean different things.
    """
    assert len({t.data_ptr() for t in examples.values()}) == len(examples), "examples share memory"
    names, given = list(examples), list[str]()

    def in_order(*tensors: torch.Tensor) -> list[torch.Tensor]:
        found = function(dict(zip(names, tensors, strict=True)))
        given[:] = found
        return list(found.values())

    make = make_fx(
        in_order, tracing_mode="symbolic", decomposition_table=_decompositions(), _allow_non_fake_inputs=True
    )
    with _PlainAttention():
        graph = make(*examples.values())
    graph.graph.eliminate_dead_code()
    graph.recompile()
    return graph, tuple(given)


def without_unused_(graph: torch.fx.GraphModule, examples: Tensors, keep: Collection[str]) -> tuple[str, ...]:
    """Take away the inputs that `graph` does not read, in place, but those to `keep`; the names of the rest."""
    places = graph.graph.find_nodes(op="placeholder")
    left = []
    for node, name in zip(places, examples, strict=True):
        if node.users or name in keep:
            left.append(name)
        else:
            graph.graph.erase_node(node)
    graph.recompile()
    return tuple(left)


def differentiated(
    forward: Callable[[Tensors], Tensors], output: str, names: Iterable[str], tensors: Tensors
) -> Tensors:
    """`d.NAME` of those inputs of `forward`, by name, on which `output` depends, from `gradient` = dL/d output."""
    leaves = {name: tensors[name].detach().requires_grad_() for name in names}
    with torch.enable_grad():
        gradients = torch.autograd.grad(
            forward(tensors | leaves)[output], list(leaves.values()), tensors[GRADIENT], allow_unused=True
        )
    return {f"d.{name}": g for name, g in zip(leaves, gradients, strict=True) if g is not None}


@contextmanager
def given(module: nn.Module, weights: Mapping[str, torch.Tensor]) -> Iterator[None]:
    """Context manager: the parameters of `module` are these tensors, by their names in it."""
    places = [(*_place(module, name), tensor) for name, tensor in weights.items()]
    kept = [parameters[leaf] for parameters, leaf, _ in places]
    for parameters, leaf, tensor in places:
        parameters[leaf] = tensor
    try:
        yield
    finally:
        for (parameters, leaf, _), parameter in zip(places, kept, strict=True):
            parameters[leaf] = parameter


def _place(module: nn.Module, name: str) -> tuple[dict[str, Any], str]:
    parent, _, leaf = name.rpartition(".")
    return module.get_submodule(parent)._parameters, leaf


def sizes_beside(taken: Collection[int]) -> Sizes:
    """Sizes that are odd primes, and none of those `taken`."""
    found, number = list[int](), 3
    while len(found) < len(fields(Sizes)):
        if number not in taken and all(number % divisor for divisor in range(2, int(number**0.5) + 1)):
            found.append(number)
        number += 2
    return Sizes(*found)


class _PlainAttention(TorchFunctionMode):
    """Mode in which the fused attention is written out as products and a softmax."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return (_attention if func is F.scaled_dot_product_attention else func)(*args, **(kwargs or {}))


def _attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> torch.Tensor:
    """The attention of torch's own function. A query that may see no key gives zeros, as there."""
    assert dropout_p == 0.0, "a half in training has no one graph"
    if enable_gqa:
        groups = query.shape[-3] // key.shape[-3]
        key, value = key.repeat_interleave(groups, -3), value.repeat_interleave(groups, -3)
    scores = query @ key.transpose(-2, -1) * (query.shape[-1] ** -0.5 if scale is None else scale)
    if is_causal:
        attn_mask = scores.new_ones(scores.shape[-2:], dtype=torch.bool).tril()
    if attn_mask is None:
        return scores.softmax(-1) @ value
    if attn_mask.dtype == torch.bool:
        # the smallest number, not -inf: a row without keys would be NaN; it is zeroed after the product instead
        scores = scores.masked_fill(~attn_mask, torch.finfo(scores.dtype).min)
        return scores.softmax(-1) @ value * attn_mask.any(-1, keepdim=True).to(value.dtype)
    return (scores + attn_mask).softmax(-1) @ value


def _decompositions() -> dict[Any, Any]:
    """By operator of backward passes for which torch's exporter has no form, or a slow one, what to write instead."""
    aten: Any = torch.ops.aten
    return {
        aten.silu_backward.default: _silu_backward,
        aten.slice_backward.default: _slice_backward,
        aten.threshold_backward.default: _threshold_backward,
    }


def _silu_backward(gradient: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    gate = x.sigmoid()
    return gradient * gate * (1 + x * (1 - gate))


def _slice_backward(
    gradient: torch.Tensor, sizes: Any, dim: int, start: Any, end: Any, step: int
) -> torch.Tensor:
    """Zeros around the gradient; torch's own would write it into a tensor of zeros, which engines do slowly."""
    size = sizes[dim]
    if step != 1:
        whole = gradient.new_zeros(sizes)
        return torch.ops.aten.slice_scatter(whole, gradient, dim, start, end, step)
    start = start + size if start < 0 else start
    after = size - start - gradient.shape[dim]
    if isinstance(start, int) and start == 0 and isinstance(after, int) and after == 0:
        return gradient
    behind = [0, 0] * (gradient.dim() - 1 - dim % gradient.dim())
    return torch.ops.aten.constant_pad_nd(gradient, [*behind, start, after], 0.0)


def _threshold_backward(gradient: torch.Tensor, output: torch.Tensor, threshold: float | int) -> torch.Tensor:
    """ReLU's, as a product, which the engine computes in place; its `Where` makes two more copies of the gradient."""
    return gradient * (output > threshold).to(gradient.dtype)

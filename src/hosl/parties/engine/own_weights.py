"""One forward and backward pass over the rows of several clients, each with trained weights of its own.

Where a module owns a trained tensor, the rows of each client use that client's; everything else (the frozen base,
attention, activation functions) gets one ordinary batch. Works for adapters, and for a head that is trained whole.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import nn

from hosl.parties.engine.block_calls import of_rows
from hosl.parties.engine.perturbation import replaced_forwards, together

Weights = Mapping[str, nn.Parameter]
"""The trained weights of one client, by Hugging Face's names."""


@dataclass(slots=True)
class _Pass:
    """One forward pass over the rows of some clients."""

    weights: Sequence[Weights]
    rows: Sequence[int]

    def parts(self, total: int) -> list[slice]:
        """Each client's rows of a tensor of `total`, which may be [rows, seq] in one, or of one client a table."""
        if len(self.rows) == 1:
            return [slice(0, total)]
        whole = sum(self.rows)
        assert total % whole == 0, f"a layer got {total} rows, those of the clients are {whole}"
        ends = [0, *accumulate(rows * (total // whole) for rows in self.rows)]
        return [slice(first, last) for first, last in pairwise(ends)]

    @contextmanager
    def only(self, index: int) -> Iterator[None]:
        """Context manager: the modules inside the one that runs are called for one client's rows."""
        before = self.weights, self.rows
        self.weights, self.rows = [self.weights[index]], [self.rows[index]]
        try:
            yield
        finally:
            self.weights, self.rows = before


@contextmanager
def own_weights(model: nn.Module, weights: Sequence[Weights], rows: Sequence[int]) -> Iterator[None]:
    """Context manager: `model` maps batches whose first `rows[0]` rows use `weights[0]`, the next `rows[1]` the next.

    Gradients of a pass reach each client's own weights, and no other's. Requires: every set of weights has all tensors
    that the model trains, and each batch has `sum(rows)` rows.
    """
    one_pass = _Pass(weights, rows)

    def forward_of(module: nn.Module, names: Mapping[str, str]) -> Callable[..., Any]:
        linear = type(module) is nn.Linear and "weight" in names
        return _linear(module, names, one_pass) if linear else _by_client(module, names, one_pass)

    with replaced_forwards(model, forward_of):
        yield


def _linear(module: Any, names: Mapping[str, str], one_pass: _Pass) -> Callable[..., torch.Tensor]:
    """y = W_t x + b_t for the rows of each client t: one batched product where all have as many rows."""
    by_client = _by_client(module, names, one_pass)

    def forward(x: torch.Tensor) -> torch.Tensor:
        if len(one_pass.rows) == 1 or len(set(one_pass.rows)) > 1:
            return by_client(x)
        own = {key: torch.stack([w[name] for w in one_pass.weights]) for key, name in names.items()}
        y = torch.bmm(x.reshape(len(one_pass.rows), -1, x.shape[-1]), own["weight"].transpose(1, 2))
        if module.bias is not None:
            y = y + (own["bias"][:, None] if "bias" in own else module.bias)
        return y.view(*x.shape[:-1], y.shape[-1])

    return forward


def _by_client(module: nn.Module, names: Mapping[str, str], one_pass: _Pass) -> Callable[..., Any]:
    """A forward for any module that owns trained tensors: one call for the rows of each client."""
    own_forward = module.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        x = args[0] if args else next(value for value in kwargs.values() if isinstance(value, torch.Tensor))
        mounted, outputs = {key: module._parameters[key] for key in names}, []
        try:
            for index, rows in enumerate(one_pass.parts(len(x))):
                module._parameters.update({key: one_pass.weights[index][name] for key, name in names.items()})
                with one_pass.only(index):
                    outputs.append(own_forward(*of_rows(args, rows, len(x)), **of_rows(kwargs, rows, len(x))))
        finally:
            module._parameters.update(mounted)
        return together(outputs)

    return forward

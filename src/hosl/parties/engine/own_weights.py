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
from torch.nn import functional as F

from hosl.parties.engine.block_calls import of_rows
from hosl.parties.engine.perturbation import replaced_forwards, together

Weights = Mapping[str, nn.Parameter]
"""The trained weights of one client, by Hugging Face's names."""


@dataclass(slots=True)
class _Pass:
    """One forward pass over the rows of some clients."""

    weights: Sequence[Weights]
    rows: Sequence[int]
    """The number of rows of each client."""

    def parts(self, total: int) -> list[slice]:
        """Each client's rows of a tensor of `total`: some families flatten [rows, seq] before a layer.

        Of one client all: what has no rows may be read, too, such as a table of distances.
        """
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
    with replaced_forwards(model, lambda module, names: _own_forward(module, names, one_pass)):
        yield


def _own_forward(module: nn.Module, names: Mapping[str, str], one_pass: _Pass) -> Callable[..., Any]:
    if type(module) is nn.Linear and "weight" in names:
        return _linear(module, names, one_pass)
    return _by_client(module, names, one_pass)


def _linear(module: nn.Linear, names: Mapping[str, str], one_pass: _Pass) -> Callable[..., torch.Tensor]:
    """y = W_t x + b_t for the rows of each client t: one batched product where all have as many rows."""

    def own(key: str) -> Sequence[torch.Tensor]:
        """This tensor of each client; its layer's own where it is not trained; empty: the layer has none."""
        frozen = module._parameters[key]
        if key in names:
            return [weights[names[key]] for weights in one_pass.weights]
        return [] if frozen is None else [frozen] * len(one_pass.weights)

    def forward(x: torch.Tensor) -> torch.Tensor:
        own_weight, own_bias = own("weight"), own("bias")
        if len(own_weight) == 1 or len(set(one_pass.rows)) > 1:
            biases: Sequence[torch.Tensor | None] = own_bias or [None] * len(own_weight)
            parts = zip(one_pass.parts(len(x)), own_weight, biases, strict=True)
            return torch.cat([F.linear(x[rows], weight, bias) for rows, weight, bias in parts])
        stacked = x.reshape(len(own_weight), -1, module.in_features)
        y = torch.bmm(stacked, torch.stack(list(own_weight)).transpose(1, 2))
        if own_bias:
            y = y + torch.stack(list(own_bias))[:, None]
        return y.view(*x.shape[:-1], module.out_features)

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

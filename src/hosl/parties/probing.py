"""Probes over torch modules: f at theta + epsilon u and theta - epsilon u in one walk, the weights read-only.

The two evaluations travel as one batch of twice the rows: first half plus, second half minus. Wherever a module owns a
trained tensor, its forward runs once per sign on that sign's rows, with W + epsilon u, then W - epsilon u, formed in
scratch memory; everything else (attention, activations) sees one ordinary batch. No weight is written, so nothing
drifts and a killed process leaves nothing perturbed (paper.md D14, methods.md (c)). Updates: `descend_`.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from hosl.core.directions import Law, direction, direction_rows, direction_sum, tiles


@dataclass(frozen=True, slots=True)
class Probe:
    """One direction at one scale: theta +- epsilon u(seed)."""

    seed: int
    epsilon: float
    law: Law


def trained_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters of `model` that require a gradient, by Hugging Face's own names, in the model's order."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


@contextmanager
def paired(model: nn.Module, probe: Probe, rows: int) -> Iterator[None]:
    """Within this fence, `model` maps rows 0..rows/2-1 at theta + epsilon u and the others at theta - epsilon u.

    Requires: batches of exactly `rows` rows, no autograd. The fence must not span a call to the other party.
    """
    covered: list[tuple[nn.Module, Callable[..., Any] | None]] = []
    try:
        for module_name, module in model.named_modules():
            names = {
                key: f"{module_name}.{key}" if module_name else key
                for key, p in module._parameters.items()
                if p is not None and p.requires_grad
            }
            if names:
                covered.append((module, module.__dict__.get("forward")))
                if isinstance(module, nn.Embedding):
                    module.forward = _signed_lookup(module, names, probe, rows)
                else:
                    module.forward = _signed_rows(module, names, probe, rows)
        yield
    finally:
        for module, previous in covered:
            del module.forward  # uncovers the class's own
            if previous is not None:
                module.forward = previous


def descend_(
    trained: Mapping[str, nn.Parameter], seeds: Sequence[int], scales: Sequence[float], law: Law
) -> None:
    """theta -= sum_q scale_q u(seed_q), in place, tile by tile; no buffer of the weights' size.

    Source: paper.md l.8. Half-precision weights are updated through float32 and rounded to nearest.
    """
    with torch.no_grad():
        for name, p in trained.items():
            flat = p.view(-1)
            dtype = np.float64 if p.dtype == torch.float64 else np.float32
            for start, stop in tiles(flat.numel()):
                total = torch.from_numpy(
                    direction_sum(name, start, stop, flat.numel(), seeds, scales, law, dtype)
                )
                tile = flat[start:stop]
                tile.copy_(tile.to(total.dtype) - total.to(tile.device))


def _signed_rows(
    module: nn.Module, names: Mapping[str, str], probe: Probe, rows: int
) -> Callable[..., torch.Tensor]:
    """A forward for any module that owns trained tensors: one call per sign, on that sign's rows."""
    own_forward = module.forward

    def forward(x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        # some families flatten [rows, seq] before a layer; plus rows still come first
        assert x.shape[0] % rows == 0, (
            f"{module} got {tuple(x.shape)}; a probe of {rows} rows needs rows first"
        )
        weights = {key: module._parameters[key] for key in names}
        u = {key: _drawn(p, names[key], probe) for key, p in weights.items() if p is not None}
        scratch = {key: torch.empty_like(p) for key, p in weights.items() if p is not None}
        outputs = []
        try:
            for sign, x_sign in zip((+1, -1), x.chunk(2), strict=True):
                for key, p in weights.items():
                    torch.add(p, u[key], alpha=sign * probe.epsilon, out=scratch[key])  # pyright: ignore
                    module._parameters[key] = scratch[key]  # pyright: ignore[reportArgumentType]
                outputs.append(own_forward(x_sign, *args, **kwargs))
        finally:
            module._parameters.update(weights)
        return torch.cat(outputs)

    return forward


def _signed_lookup(
    module: nn.Embedding, names: Mapping[str, str], probe: Probe, rows: int
) -> Callable[..., torch.Tensor]:
    """A forward for an embedding table: only the rows that the batch touches are drawn and perturbed.

    The module's own forward runs (subclasses shift or scale), on a table that answers lookups with signs.
    """
    own_forward = module.forward

    def forward(*args: Any, **kwargs: Any) -> torch.Tensor:
        weight = module.weight
        table = weight.detach().as_subclass(_SignedTable)
        table.answer = lambda ids: _looked_up(weight, names["weight"], ids, probe, rows)
        module._parameters["weight"] = table  # pyright: ignore[reportArgumentType]
        try:
            return own_forward(*args, **kwargs)
        finally:
            module._parameters["weight"] = weight  # pyright: ignore[reportArgumentType]

    return forward


class _SignedTable(torch.Tensor):
    """An embedding table whose lookups are answered at +epsilon u for the first half of the rows, -epsilon u below."""

    answer: Callable[[torch.Tensor], torch.Tensor]

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is nn.functional.embedding:
            return args[1].answer(args[0])
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))


def _looked_up(weight: torch.Tensor, name: str, ids: torch.Tensor, probe: Probe, rows: int) -> torch.Tensor:
    # position ids come as one row for the whole batch; the two signs need rows of their own
    ids = ids.expand(rows, *ids.shape[1:])
    touched, place = torch.unique(ids, return_inverse=True)
    u = direction_rows(probe.seed, name, tuple(weight.shape), touched.tolist(), probe.law)
    compute = torch.promote_types(weight.dtype, torch.float32)
    shift = torch.from_numpy(u).to(weight.device, compute)[place] * probe.epsilon
    shift[rows // 2 :].neg_()
    return (nn.functional.embedding(ids, weight) + shift).to(weight.dtype)


def _drawn(weight: torch.Tensor, name: str, probe: Probe) -> torch.Tensor:
    return torch.from_numpy(direction(probe.seed, name, tuple(weight.shape), probe.law)).to(weight.device)

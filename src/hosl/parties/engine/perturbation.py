"""Probes over torch modules: f at theta + epsilon u and theta - epsilon u in one forward pass, the weights read-only.

All evaluations form one batch: for each probe its plus rows, then its minus rows. Where a module owns a trained tensor,
the rows of each sign use W + epsilon u or W - epsilon u, formed in scratch memory; everything else (attention,
activation functions) gets one ordinary batch. No weight is written, so nothing drifts and a killed process leaves no
perturbed model (paper.md D14, methods.md (c)). Low-rank directions need no scratch, and any number of probes share one
product with W. Updates: `descend_`.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import nn

from hosl.core.directions import (
    Distribution,
    Drawn,
    direction_rows,
    direction_sum,
    drawn,
    forget_tables,
    low_rank_factors,
)
from hosl.parties.engine.block_calls import of_rows

SCRATCH_ELEMENTS = 1 << 22
"""The largest part of a linear layer that is perturbed at once: 16 MiB in float32. Smaller products are slower."""

_PIECE_ELEMENTS = 1 << 16
"""The elements of u in memory at once, in scratch that stays in a core's cache."""


@dataclass(frozen=True, slots=True)
class Probe:
    """One direction at one scale: theta +- epsilon u(seed)."""

    seed: int
    epsilon: float
    distribution: Distribution


Signs: TypeAlias = tuple[int, ...]
"""The sides of theta at which a probe is evaluated: +1 for theta + epsilon u, -1 for theta - epsilon u."""

BOTH_SIDES: Signs = (+1, -1)
PLUS_SIDE: Signs = (+1,)


@dataclass(slots=True)
class _Pass:
    """One forward pass over all evaluations of some probes."""

    probes: Sequence[Probe]
    signs: Signs
    rows: int
    """The rows of all evaluations together."""
    scratch: "Scratch"

    @contextmanager
    def only(self, probe: Probe, sign: int) -> Iterator[None]:
        """Context manager: the modules inside the one that runs are called for one evaluation's rows."""
        before = self.probes, self.signs, self.rows
        self.rows //= len(self.probes) * len(self.signs)
        self.probes, self.signs = [probe], (sign,)
        try:
            yield
        finally:
            self.probes, self.signs, self.rows = before


def trained_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters of `model` that require a gradient, by Hugging Face's own names, in the model's order."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


@contextmanager
def stacked(
    model: nn.Module,
    probes: Sequence[Probe],
    rows: int,
    signs: Signs = BOTH_SIDES,
    scratch: "Scratch | None" = None,
) -> Iterator[None]:
    """Context manager: `model` maps batches of `rows` rows, for each probe and for each sign as many rows.

    Requires: batches of exactly `rows` rows, no autograd. The context must not span a call to the other party.
    """
    one_pass = _Pass(probes, signs, rows, scratch or Scratch())
    with replaced_forwards(model, lambda module, names: _perturbed_forward(module, names, one_pass)):
        yield


@contextmanager
def replaced_forwards(
    model: nn.Module, forward_of: Callable[[nn.Module, Mapping[str, str]], Callable[..., Any]]
) -> Iterator[None]:
    """Context manager: every module that owns trained tensors runs `forward_of(module, names)` as its forward.

    `names` maps the module's own names of these tensors to Hugging Face's; empty for a module that a half has marked
    `one_evaluation_at_a_time`.
    """
    replaced: list[tuple[nn.Module, Callable[..., Any] | None]] = []
    try:
        for module_name, module in model.named_modules():
            names = {
                key: f"{module_name}.{key}" if module_name else key
                for key, p in module._parameters.items()
                if p is not None and p.requires_grad
            }
            if names or hasattr(module, "one_evaluation_at_a_time"):
                replaced.append((module, module.__dict__.get("forward")))
                module.forward = forward_of(module, names)
        yield
    finally:
        for module, previous in replaced:
            del module.forward  # uncovers the class's own
            if previous is not None:
                module.forward = previous


def descend_(
    trained: Mapping[str, nn.Parameter],
    seeds: Sequence[int],
    scales: Sequence[float],
    distribution: Distribution,
) -> None:
    """theta -= sum_q scale_q u(seed_q), in place, tile by tile; no buffer of the weights' size.

    Source: Alg. 1, line 8. Half-precision weights are updated through float32 and rounded to nearest.
    """
    with torch.no_grad():
        for name, p in trained.items():
            flat = p.view(-1)
            for start, stop, total in direction_sum(
                name, tuple(p.shape), seeds, scales, distribution, _numpy_compute(p)
            ):
                shift = torch.from_numpy(total).to(p.device)
                tile = flat[start:stop]
                if tile.dtype == shift.dtype:
                    tile.sub_(shift)
                else:
                    tile.copy_(tile.to(shift.dtype) - shift)
    forget_tables()


def _perturbed_forward(
    module: nn.Module, names: Mapping[str, str], one_pass: _Pass
) -> Callable[..., torch.Tensor]:
    if isinstance(module, nn.Embedding):
        return _signed_lookup(module, names, one_pass)
    if type(module) is nn.Linear and "weight" in names:
        if all(probe.distribution == "low-rank" for probe in one_pass.probes):
            return _low_rank_linear(module, names, one_pass)
        return _signed_linear(module, names, one_pass)
    return _signed_rows(module, names, one_pass)


def _signed_rows(module: nn.Module, names: Mapping[str, str], one_pass: _Pass) -> Callable[..., torch.Tensor]:
    """A forward for any module that owns trained tensors: one call per probe and sign, on that sign's rows.

    Trained modules inside it then run for that probe and sign alone: gpt-oss's attention has sinks of its own,
    DeBERTa's layers also read a table of distances.
    """
    own_forward, scratch = module.forward, one_pass.scratch
    has_inner = any(p.requires_grad for child in module.children() for p in child.parameters())

    def forward(*args: Any, **kwargs: Any) -> Any:
        probes, signs = one_pass.probes, one_pass.signs
        x = args[0] if args else next(value for value in kwargs.values() if isinstance(value, torch.Tensor))
        # some families flatten [rows, seq] before a layer; a probe's plus rows still come first
        assert x.shape[0] % one_pass.rows == 0, (
            f"{module} got {tuple(x.shape)}; a probe of {one_pass.rows} rows needs rows first"
        )
        weights = {key: p for key in names if (p := module._parameters[key]) is not None}
        total, each = len(x), len(x) // (len(signs) * len(probes))
        starts = iter(range(0, total, each))
        outputs = []
        try:
            for probe in probes:
                directions = [_drawn(p, names[key], probe) for key, p in weights.items()]
                for sign in signs:
                    if has_inner:  # the modules inside will take the scratch
                        tiles = [torch.empty_like(p) for p in weights.values()]
                    else:
                        tiles = scratch.tiles(list(weights.values()))
                    for (key, p), tile, u in zip(weights.items(), tiles, directions, strict=True):
                        scratch.form_(tile, p.detach(), u, sign)
                        module._parameters[key] = tile  # pyright: ignore[reportArgumentType]
                    rows = slice(start := next(starts), start + each)
                    with one_pass.only(probe, sign):
                        outputs.append(
                            own_forward(*of_rows(args, rows, total), **of_rows(kwargs, rows, total))
                        )
        finally:
            module._parameters.update(weights)
        return together(outputs)

    return forward


def together(outputs: Sequence[Any]) -> Any:
    """The outputs of all evaluations as one; an expert layer's router returns several tensors."""
    if isinstance(outputs[0], torch.Tensor):
        return torch.cat(list(outputs))
    return None if outputs[0] is None else tuple(together(parts) for parts in zip(*outputs, strict=True))


def _signed_linear(
    module: nn.Linear, names: Mapping[str, str], one_pass: _Pass
) -> Callable[..., torch.Tensor]:
    """A linear layer's forward by tiles of output features: bits drawn once, W +- epsilon u formed in scratch."""
    scratch = one_pass.scratch

    def forward(x: torch.Tensor) -> torch.Tensor:
        probes, signs = one_pass.probes, one_pass.signs
        weight, width, features = module.weight.detach(), module.in_features, module.out_features
        parts = x.reshape(len(probes), len(signs), -1, width)
        out = x.new_empty(len(probes), len(signs), parts.shape[2], features)
        step = scratch.rows_at_once(features, width)
        for probe, x_sides, y_sides in zip(probes, parts, out, strict=True):
            biases = _shifted_biases(module, names, probe, signs)
            for first, last in pairwise([*range(0, features, step), features]):
                u = scratch.drawn(weight, names["weight"], probe, (first * width, last * width))
                (tile,) = scratch.tiles([weight[first:last]])
                for sign, x_sign, y, bias in zip(signs, x_sides, y_sides, biases, strict=True):
                    scratch.form_(tile, weight[first:last], u, sign, start=first * width)
                    if bias is None:
                        torch.mm(x_sign, tile.T, out=y[:, first:last])
                    else:
                        torch.addmm(bias[first:last], x_sign, tile.T, out=y[:, first:last])
        return out.view(*x.shape[:-1], features)

    return forward


def _shifted_biases(
    module: nn.Linear, names: Mapping[str, str], probe: Probe, signs: Signs
) -> list[torch.Tensor | None]:
    """bias + epsilon u, bias - epsilon u, by sign; the bias itself for each where it is not trained."""
    bias = None if module.bias is None else module.bias.detach()
    if bias is None or "bias" not in names:
        return [bias for _ in signs]
    shift = _whole(bias, names["bias"], probe)
    return [(bias + shift if sign > 0 else bias - shift).to(bias.dtype) for sign in signs]


def _low_rank_linear(
    module: nn.Linear, names: Mapping[str, str], one_pass: _Pass
) -> Callable[..., torch.Tensor]:
    """y = W x + bias +- epsilon (a (b^T x) + u_bias): one product with W for all probes, no scratch.

    Source: methods.md (f).
    """
    own_forward = module.forward
    prepared: dict[tuple[Signs, tuple[Probe, ...]], tuple[torch.Tensor, torch.Tensor]] = {}

    def forward(x: torch.Tensor) -> torch.Tensor:
        key = one_pass.signs, tuple(one_pass.probes)
        if key not in prepared:
            prepared[key] = _low_rank_factors(module, names, *key)
        columns, rows = prepared[key]
        signs, evaluations = len(one_pass.signs), len(one_pass.signs) * len(one_pass.probes)
        y = own_forward(x)
        parts = x.reshape(evaluations, -1, module.in_features)
        along = parts.new_ones(*parts.shape[:2], rows.shape[1])
        along[..., :1] = torch.bmm(parts, columns.repeat_interleave(signs, dim=0)[:, :, None])
        y.view(evaluations, -1, module.out_features).baddbmm_(along, rows)
        return y

    return forward


def _low_rank_factors(
    module: nn.Linear, names: Mapping[str, str], signs: Signs, probes: Sequence[Probe]
) -> tuple[torch.Tensor, torch.Tensor]:
    """b of each probe, and epsilon a (below it u_bias, where it is trained) of each probe times each sign."""
    weight, name = module.weight, names["weight"]
    factors = [low_rank_factors(probe.seed, name, tuple(weight.shape)) for probe in probes]
    columns = torch.stack([torch.from_numpy(b).to(weight.device, weight.dtype) for _, b in factors])
    scaled = [
        a * _numpy_compute(weight)(probe.epsilon) for (a, _), probe in zip(factors, probes, strict=True)
    ]
    rows = _by_sign([torch.from_numpy(a) for a in scaled], signs, weight)
    if "bias" in names:  # as a second row with factor 1: y is read and written one time less
        shifts = [_whole(module.bias, names["bias"], probe) for probe in probes]
        rows = torch.cat([rows, _by_sign(shifts, signs, weight)], dim=1)
    return columns, rows


def _signed_lookup(
    module: nn.Embedding, names: Mapping[str, str], one_pass: _Pass
) -> Callable[..., torch.Tensor]:
    """A forward for an embedding table: only the rows that the batch uses are drawn and perturbed.

    The module's own forward runs (subclasses shift or scale), on a table whose lookups are perturbed.
    """
    own_forward = module.forward

    def forward(*args: Any, **kwargs: Any) -> torch.Tensor:
        weight = module.weight
        table: Any = one_pass.scratch.answering(weight.detach())
        table.answer = lambda ids: _looked_up(weight.detach(), names["weight"], ids, one_pass)
        module._parameters["weight"] = table  # pyright: ignore[reportArgumentType]
        try:
            return own_forward(*args, **kwargs)
        finally:
            module._parameters["weight"] = weight  # pyright: ignore[reportArgumentType]

    return forward


class _SignedTable(torch.Tensor):
    """An embedding table whose lookups are perturbed by +epsilon u or -epsilon u, depending on the row of the batch."""

    answer: Callable[[torch.Tensor], torch.Tensor]

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is nn.functional.embedding:
            return args[1].answer(args[0])
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))


def _looked_up(weight: torch.Tensor, name: str, ids: torch.Tensor, one_pass: _Pass) -> torch.Tensor:
    probes, signs, rows = one_pass.probes, one_pass.signs, one_pass.rows
    # position ids come as one row for the whole batch; the signs need rows of their own
    ids = ids.expand(rows, *ids.shape[1:])
    unique_ids, index = torch.unique(ids, return_inverse=True)
    embeddings = nn.functional.embedding(ids, weight)
    embeddings = embeddings.to(torch.promote_types(weight.dtype, torch.float32))
    of_probes = zip(probes, embeddings.chunk(len(probes)), index.chunk(len(probes)), strict=True)
    for probe, probe_embeddings, probe_index in of_probes:
        u = direction_rows(probe.seed, name, tuple(weight.shape), unique_ids.tolist(), probe.distribution)
        shift = torch.from_numpy(u).to(embeddings)[probe_index] * probe.epsilon
        for sign, sign_shift in zip(signs, shift.chunk(len(signs)), strict=True):
            sign_shift.mul_(sign)
        probe_embeddings += shift
    return embeddings.to(weight.dtype)


class Scratch:
    """Memory in which perturbed weights are formed: one module's at a time, kept until the context ends.

    `hosl plan` has a subclass that takes each layer in one part and only counts the elements.
    """

    def __init__(self) -> None:
        self._memory = torch.empty(0)
        self._piece = np.empty(0, dtype=np.float32)

    def rows_at_once(self, features: int, width: int) -> int:
        """The number of rows of a linear layer's weight that are perturbed at once."""
        return max(SCRATCH_ELEMENTS // width, 1)

    def drawn(self, weight: torch.Tensor, name: str, probe: Probe, span: tuple[int, int]) -> Drawn:
        """epsilon u for a span of a weight's elements."""
        return _drawn(weight, name, probe, span)

    def answering(self, table: torch.Tensor) -> torch.Tensor:
        """The same embedding table, with lookups computed by its attribute `answer`."""
        return table.as_subclass(_SignedTable)

    def tiles(self, weights: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """A tile of the shape of each of these tensors; earlier tiles are overwritten."""
        like = weights[0]
        sizes = [w.numel() for w in weights]
        if self._memory.numel() < sum(sizes) or self._memory.dtype != like.dtype:
            self._memory = torch.empty(0)  # freed before the larger one is allocated
            self._memory = torch.empty(sum(sizes), dtype=like.dtype, device=like.device)
        parts = self._memory[: sum(sizes)].split(sizes)
        return [part.view(w.shape) for part, w in zip(parts, weights, strict=True)]

    def form_(self, tile: torch.Tensor, weight: torch.Tensor, u: Drawn, sign: int, start: int = 0) -> None:
        """tile = weight + sign u, piece by piece; `start`: the index of the weight's first element in its tensor."""
        flat, shifted = weight.reshape(-1), tile.view(-1)
        combine = torch.add if sign > 0 else torch.sub
        # a CPU gets pieces of the size of its cache, another device few large ones
        size = min(_PIECE_ELEMENTS if weight.device.type == "cpu" else SCRATCH_ELEMENTS, len(flat))
        if len(self._piece) < size or self._piece.dtype != _numpy_compute(weight):
            self._piece = np.empty(size, dtype=_numpy_compute(weight))
        for first, last in pairwise([*range(0, len(flat), size), len(flat)]):
            piece = self._piece[: last - first]
            u.fill(start + first, start + last, piece)
            combine(flat[first:last], torch.from_numpy(piece).to(weight.device), out=shifted[first:last])


def _drawn(weight: torch.Tensor, name: str, probe: Probe, span: tuple[int, int] | None = None) -> Drawn:
    """epsilon u of one tensor, or of a span of its elements."""
    return drawn(
        probe.seed, name, tuple(weight.shape), probe.distribution, probe.epsilon, _numpy_compute(weight), span
    )


def _whole(weight: torch.Tensor, name: str, probe: Probe) -> torch.Tensor:
    """epsilon u of a small tensor."""
    u = np.empty(weight.numel(), dtype=_numpy_compute(weight))
    _drawn(weight, name, probe).fill(0, len(u), u)
    return torch.from_numpy(u).view(weight.shape).to(weight.device)


def _by_sign(shifts: Sequence[torch.Tensor], signs: Signs, like: torch.Tensor) -> torch.Tensor:
    """[len(shifts) len(signs), 1, features]: each shift times each sign, in the dtype of `like`."""
    each = [shift if sign > 0 else -shift for shift in shifts for sign in signs]
    return torch.stack(each)[:, None, :].to(like.device, like.dtype)


def _numpy_compute(weight: torch.Tensor) -> type:
    """The dtype in which shifts are computed: float64 for float64 weights, float32 for all others."""
    return np.float64 if weight.dtype == torch.float64 else np.float32

"""The speed of a machine: assumed from its kind, or measured in a few seconds at the shapes of a step."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from statistics import median

import numpy as np
import torch

from hosl.core.directions import Distribution, drawn
from hosl.parties.engine.perturbation import Scratch, descend_
from hosl.planner.dry_run import Attention, Product, Work

_TOO_LARGE_BYTES = 1 << 30
"""The largest matrix to measure; a larger one is measured with fewer columns, at the same speed."""
_MEASURED_SHARE = 0.9
"""The share of a step's arithmetic whose shapes are measured one by one, the most costly first."""


@dataclass(frozen=True)
class Machine:
    """The speeds of one side."""

    flops_per_s: Mapping[torch.dtype, float]
    """The speed of matrix products by dtype, for shapes that are not measured."""
    moved_bytes_per_s: float
    """Bytes per second that all other operations read and write, activations in and out of a core's cache."""
    formed_per_s: float
    """Elements of shifted weights per second that one probe draws and adds."""
    updated_per_s: float
    """Elements of one direction per second that an update draws and subtracts."""
    call_s: float
    """Seconds of every operation beside its work."""
    products_s: Mapping[Product, float] = field(default_factory=dict)
    """Measured seconds of single products."""
    attention_s: Mapping[Attention, float] = field(default_factory=dict)
    """Measured seconds of single calls of fused attention."""

    def seconds(self, work: Work, *, formed: float = 0.0, updated: float = 0.0) -> float:
        """The seconds of a step's work on this machine; `formed` and `updated` are those of `costs.PartyCost`."""
        products = sum(count * self._product_s(product) for product, count in work.products.items())
        attention = sum(count * self._attention_s(call) for call, count in work.attention.items())
        other = work.moved_bytes / self.moved_bytes_per_s + work.calls * self.call_s
        return products + attention + other + formed / self.formed_per_s + updated / self.updated_per_s

    def _product_s(self, product: Product) -> float:
        if product in self.products_s:
            return self.products_s[product]
        like = [p for p in self.products_s if p.dtype == product.dtype]
        if like:  # the measured one of the most similar size gives the speed
            nearest = min(like, key=lambda p: abs(np.log(max(p.flops, 1) / max(product.flops, 1))))
            return product.flops * self.products_s[nearest] / nearest.flops
        return product.flops / self._flops_per_s(product.dtype)

    def _attention_s(self, call: Attention) -> float:
        like = [c for c in self.attention_s if (c.dtype, c.backward) == (call.dtype, call.backward)]
        if call in self.attention_s:
            return self.attention_s[call]
        if like:
            nearest = min(like, key=lambda c: abs(np.log(c.flops / call.flops)))
            return call.flops * self.attention_s[nearest] / nearest.flops
        return call.flops / (self._flops_per_s(call.dtype) / 2)

    def _flops_per_s(self, dtype: torch.dtype) -> float:
        return self.flops_per_s.get(dtype, min(self.flops_per_s.values()))


def assumed_cpu(cores: int) -> Machine:
    """The CPU of a laptop or a board: half the measured speed of one AVX-512 core, times the cores."""
    return Machine(
        flops_per_s={torch.float32: 4e10 * cores, torch.bfloat16: 4e10 * cores, torch.float64: 2e10 * cores},
        moved_bytes_per_s=5e9, formed_per_s=5e8, updated_per_s=5e8, call_s=1e-5,
    )  # fmt: skip


def assumed_server(tera_flops: float) -> Machine:
    """An accelerator that reaches so many TFLOP/s on a step's products."""
    rate = tera_flops * 1e12
    return Machine(
        flops_per_s={torch.float32: rate, torch.bfloat16: rate, torch.float64: rate / 2},
        moved_bytes_per_s=rate / 20, formed_per_s=rate / 1000, updated_per_s=rate / 1000, call_s=1e-5,
    )  # fmt: skip


def probed(work: Work, distribution: Distribution, *, base: Machine, budget_s: float = 10.0) -> Machine:
    """This machine, measured with the operations of `work` in about `budget_s` seconds.

    Products and attention are measured at their own shapes, most costly first; then the other operations of a layer,
    the forming of W + epsilon u with u from `distribution`, and an update.
    """
    deadline = time.perf_counter() + budget_s
    products = _measured(work.products, lambda p: p.flops, _time_product, deadline - budget_s * 0.4)
    attention = _measured(work.attention, lambda a: a.flops, _time_attention, deadline - budget_s * 0.25)
    tokens = max((p.rows for p in work.products if p.batch == 1), default=1024)
    width = max((p.inner for p in work.products if p.batch == 1), default=768)
    return replace(
        base, products_s=products, attention_s=attention, moved_bytes_per_s=_moved_bytes_per_s(tokens, width),
        formed_per_s=_formed_per_s(distribution), updated_per_s=_updated_per_s(distribution), call_s=_call_s(),
    )  # fmt: skip


def _measured(counts: Mapping, flops: Callable, timed: Callable, deadline: float) -> dict:
    """The seconds of each shape, most costly first, until `_MEASURED_SHARE` of all is measured or time is up."""
    costs = {shape: flops(shape) * count for shape, count in counts.items()}
    seconds, done, total = {}, 0.0, sum(costs.values())
    for shape in sorted(costs, key=lambda shape: -costs[shape]):
        if seconds and (done >= _MEASURED_SHARE * total or time.perf_counter() > deadline):
            break
        seconds[shape] = timed(shape)
        done += costs[shape]
    return seconds


def _median_s(call: Callable[[], object], *, at_least_s: float = 0.15) -> float:
    """The median seconds of several calls, after a first one that warms up."""
    call()
    times: list[float] = []
    while len(times) < 3 or sum(times) < at_least_s:
        begin = time.perf_counter()
        call()
        times.append(time.perf_counter() - begin)
    return median(times)


def _time_product(product: Product) -> float:
    batch, rows, inner, columns, dtype = product
    share = 1.0
    while batch * inner * columns * dtype.itemsize * share > _TOO_LARGE_BYTES and columns * share > 512:
        share /= 2
    first = torch.ones(batch, rows, inner, dtype=dtype)
    second = torch.ones(batch, max(round(columns * share), 1), inner, dtype=dtype).transpose(1, 2)
    if batch == 1:
        first, second = first[0], second[0]
    return _median_s(lambda: first @ second) / share


def _time_attention(call: Attention) -> float:
    queries = torch.ones(call.rows, call.queries, call.heads, call.width, dtype=call.dtype).transpose(1, 2)
    keys = torch.ones(call.rows, call.keys, call.heads, call.width, dtype=call.dtype).transpose(1, 2)
    queries.requires_grad_(call.backward)
    mask = torch.zeros(call.rows, 1, call.queries, call.keys, dtype=call.dtype)

    def forward() -> torch.Tensor:
        return torch.nn.functional.scaled_dot_product_attention(queries, keys, keys, attn_mask=mask)

    if not call.backward:
        return _median_s(forward)
    upper = torch.ones(call.rows, call.heads, call.queries, call.width, dtype=call.dtype)
    return max(_median_s(lambda: forward().backward(upper)) - _median_s(forward), 1e-9)


def _moved_bytes_per_s(tokens: int, width: int) -> float:
    """The speed of the operations around a layer's products, in freshly allocated memory, as they run in a layer."""
    x, y = torch.ones(tokens, width), torch.ones(tokens, width)
    norm = torch.nn.LayerNorm(width)

    def layer() -> None:
        with torch.no_grad():
            torch.relu(norm(x) + y)

    return 7 * x.nbytes / _median_s(layer)


def _formed_per_s(distribution: Distribution) -> float:
    scratch, weight = Scratch(), torch.ones(1024, 2048)
    (tile,) = scratch.tiles([weight])

    def form() -> None:
        u = drawn(1, "w", tuple(weight.shape), distribution, 1e-3, np.float32)
        for sign in (+1, -1):
            scratch.form_(tile, weight, u, sign)

    return 2 * weight.numel() / _median_s(form)


def _updated_per_s(distribution: Distribution) -> float:
    trained = {"w": torch.nn.Parameter(torch.ones(1024, 2048))}
    return trained["w"].numel() / _median_s(lambda: descend_(trained, [1, 2], [1e-9, 1e-9], distribution)) * 2


def _call_s() -> float:
    x = torch.ones(8)

    def many() -> None:
        for _ in range(100):
            torch.add(x, x)

    return _median_s(many) / 100 + 4e-6  # and what a module's Python takes around it

"""Exact directional derivatives of a half by forward-mode differentiation: h and J u in one walk, no graph.

Each module that owns a trained tensor meets it as a dual number, W with tangent u, for the length of its own call: u is
drawn there and let go, so no direction is ever held for the whole half. Source: methods.md (e). Torch's fused attention
has no forward-mode rule: the plain one runs.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel

from hosl.core.directions import Distribution, direction


@contextmanager
def along(
    model: nn.Module, seed: int, distribution: Distribution
) -> Iterator[Callable[[torch.Tensor], torch.Tensor]]:
    """Within this context, what `model` returns carries its derivative along u(seed); the function given reads it off.

    Requires: that it is read before the context ends.
    """
    covered: list[tuple[nn.Module, Callable[..., Any] | None]] = []
    try:
        with forward_ad.dual_level(), sdpa_kernel(SDPBackend.MATH):
            for module_name, module in model.named_modules():
                names = {
                    key: f"{module_name}.{key}" if module_name else key
                    for key, p in module._parameters.items()
                    if p is not None and p.requires_grad
                }
                if names:
                    covered.append((module, module.__dict__.get("forward")))
                    module.forward = _dual_forward(module, names, seed, distribution)
            yield _tangent_of
    finally:
        for module, previous in covered:
            del module.forward  # uncovers the class's own
            if previous is not None:
                module.forward = previous


def _dual_forward(
    module: nn.Module, names: dict[str, str], seed: int, distribution: Distribution
) -> Callable[..., torch.Tensor]:
    own_forward = module.forward

    def forward(*args: Any, **kwargs: Any) -> torch.Tensor:
        weights = {key: p for key in names if (p := module._parameters[key]) is not None}
        try:
            for key, p in weights.items():
                u = torch.from_numpy(direction(seed, names[key], tuple(p.shape), distribution)).to(p)
                module._parameters[key] = forward_ad.make_dual(p.detach(), u)  # pyright: ignore[reportArgumentType]
            return own_forward(*args, **kwargs)
        finally:
            module._parameters.update(weights)

    return forward


def _tangent_of(h: torch.Tensor) -> torch.Tensor:
    tangent = forward_ad.unpack_dual(h).tangent
    return torch.zeros_like(h) if tangent is None else tangent

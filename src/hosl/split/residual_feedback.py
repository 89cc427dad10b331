"""The gradients that residual feedback takes for its own, of one block: g x^T for what writes to the residual stream.

From the gradient at the block's output it goes to each output projection through the multipliers and norms between,
exactly, and nowhere else; through norms on the stream itself (post-LN) it goes on to the block below. Which layers
these are, the half's family says. Who trains by it: `hosl.parties.clients.residual`; its graphs: `onnx_export`.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import nn

from hosl.split.adapters import ADAPTER
from hosl.split.halves import ClientHalf


@dataclass(frozen=True, slots=True)
class Term:
    """A gradient as the product left^T right, or the sum of left's rows where there is no right."""

    parameter: torch.Tensor
    left: torch.Tensor
    right: torch.Tensor | None = None

    @property
    def total(self) -> torch.Tensor:
        """The gradient."""
        return self.left.sum(0) if self.right is None else self.left.T @ self.right

    def add_to_(self, target: torch.Tensor, factor: float) -> None:
        """target += factor x the gradient."""
        if self.right is None:
            target.add_(self.left.sum(0), alpha=factor)
        else:
            target.addmm_(self.left.T, self.right, alpha=factor)


TermsOf: TypeAlias = Callable[[str, Any, torch.Tensor, torch.Tensor], list[Term]]
"""By name and module of a layer, dL/dy [rows, seq, out] and its input x [..., in]: the terms of its trained weights."""


@dataclass(frozen=True, slots=True)
class BlockLayers:
    """The layers of a block that the gradient at its output reaches along the stream."""

    projections: Mapping[str, nn.Module | None]
    """By name, the output projections, first to last; None: without trained weights."""
    norms_above: Mapping[str, tuple[str, ...]]
    """By projection, the names of the norms between it and the block's output, from the projection up."""
    norms: Mapping[str, nn.Module]
    """By name, all of these."""
    norms_on_stream: tuple[str, ...]
    """The names of the norms that the residual stream itself passes, from the block's input up."""
    scale: float
    """The multiplier of outputs before they are added to the stream."""

    @property
    def read(self) -> dict[str, nn.Module]:
        """By name, the modules whose inputs `feedback_terms` needs."""
        return {name: layer for name, layer in self.projections.items() if layer is not None} | {**self.norms}


def block_layers(half: ClientHalf, block: nn.Module, within: str = "") -> BlockLayers:
    """The layers of a block that write to the residual stream; `within` stands before their names.

    Raises:
        SplitError: if they are not known of the family.
    """
    above = half.norms_above
    norms = dict.fromkeys(n for names in (*above.values(), half.norms_on_stream) for n in names)
    return BlockLayers(
        projections={f"{within}{name}": block.get_submodule(name) for name in half.output_projections},
        norms_above={
            f"{within}{name}": tuple(f"{within}{norm}" for norm in above.get(name, ()))
            for name in half.output_projections
        },
        norms={f"{within}{norm}": block.get_submodule(norm) for norm in norms},
        norms_on_stream=tuple(f"{within}{norm}" for norm in half.norms_on_stream),
        scale=getattr(block, half.output_scale) if half.output_scale else 1.0,
    )


def feedback_terms(
    layers: BlockLayers, reads: Mapping[str, torch.Tensor], gradient: torch.Tensor, terms_of: TermsOf
) -> tuple[list[Term], torch.Tensor]:
    """The gradients of one block's weights, and the gradient for the block below.

    Args:
        layers: the block's layers.
        reads: by name, the inputs of `layers.read`.
        gradient: dL/d output of the block, [rows, seq, width].
        terms_of: the terms of a projection's own weights (`layer_terms`).
    """
    at: dict[tuple[str, ...], torch.Tensor] = {
        (): gradient if layers.scale == 1.0 else gradient * layers.scale
    }
    terms = list[Term]()

    def below(norms: tuple[str, ...]) -> torch.Tensor:
        for i in reversed(range(len(norms))):
            if norms[i:] not in at:
                norm = layers.norms[norms[i]]
                at[norms[i:]], of_norm = through_norm(norm, reads[norms[i]], at[norms[i + 1 :]])
                terms.extend(of_norm)
        return at[norms]

    for name, layer in layers.projections.items():
        if layer is not None:
            terms += terms_of(name, layer, below(layers.norms_above[name]), reads[name])
    return terms, below(layers.norms_on_stream) if layers.norms_on_stream else gradient


def layer_terms(name: str, layer: Any, gradient: torch.Tensor, x: torch.Tensor) -> list[Term]:
    """The terms of a layer's trained weights from dL/dy [rows, seq, out] and its input x [..., in].

    With adapters, y = W x + s B A x, they are those of A and B.
    """
    if hasattr(layer, "lora_A"):
        a, b = layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight
        return adapter_terms(a, b, layer.scaling[ADAPTER], gradient, x)
    g, x = _flat(gradient, x, exact(layer.weight.dtype))
    transposed = not isinstance(layer, nn.Linear)  # GPT-2's Conv1D keeps [in, out]
    term = Term(layer.weight, x, g) if transposed else Term(layer.weight, g, x)
    return [term] if layer.bias is None else [term, Term(layer.bias, g)]


def adapter_terms(
    a: torch.Tensor, b: torch.Tensor, scale: float | torch.Tensor, gradient: torch.Tensor, x: torch.Tensor
) -> list[Term]:
    """The terms of A [r, in] and B [out, r] in y = W x + scale B A x; otherwise as `layer_terms`."""
    g, x = _flat(gradient, x, exact(a.dtype))
    g = g * scale
    return [Term(b, g, x @ a.to(g.dtype).T), Term(a, g @ b.to(g.dtype), x)]


def through_norm(norm: nn.Module, x: torch.Tensor, gradient: torch.Tensor) -> tuple[torch.Tensor, list[Term]]:
    """The gradient at a norm's input from that at its output, exactly; and the terms of its trained weights."""
    trained = [p for p in norm.parameters() if p.requires_grad]
    with torch.enable_grad():
        leaf = x.detach().requires_grad_()
        output = norm(leaf)
        at_output = gradient.reshape(output.shape).to(output.dtype)
        below, *own = torch.autograd.grad(output, [leaf, *trained], at_output)
    terms = [Term(p, total.to(exact(p.dtype))[None]) for p, total in zip(trained, own, strict=True)]
    return below.reshape(gradient.shape), terms


def exact(dtype: torch.dtype) -> torch.dtype:
    """The dtype of gradients of weights: at least float32."""
    return torch.promote_types(dtype, torch.float32)


@contextmanager
def inputs_read(
    modules: Mapping[str, nn.Module], read: Callable[[str, torch.Tensor], None]
) -> Iterator[None]:
    """Context manager: `read(name, x)` is called with the input of each of these modules before it is used."""

    def reader(name: str) -> Any:
        return lambda module, args: read(name, args[0])

    hooks = [module.register_forward_pre_hook(reader(name)) for name, module in modules.items()]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _flat(gradient: torch.Tensor, x: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Both as matrices of a row for each token."""
    g = gradient.reshape(-1, gradient.shape[-1]).to(dtype)
    return g, x.reshape(g.shape[0], -1).to(dtype)

"""One block as a function of its input, its weights and, for gradients, dL/d output. Tensors by name, in and out.

With adapters: y = W x + b + s B (A x) for the target layers, A and B as inputs. Over an int8 base: W = scale q.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from hosl.errors import SplitError
from hosl.split.halves import ClientHalf
from hosl.split.onnx_export.recording import Call
from hosl.split.onnx_export.tracing import Sizes, Tensors, differentiated, given
from hosl.split.reading.runtime_json import D_HIDDEN, GRADIENT, HIDDEN, HIDDEN_OUT, LORA_SCALE
from hosl.split.residual_feedback import (
    BlockLayers,
    Term,
    TermsOf,
    adapter_terms,
    block_layers,
    feedback_terms,
    inputs_read,
    layer_terms,
)


@dataclass(frozen=True, slots=True)
class BlockFunction:
    """A block and the way it was called."""

    block: nn.Module
    call: Call
    adapted: tuple[str, ...] = ()
    """The layers with adapters, by their names in the block."""
    quantised: tuple[str, ...] = ()
    """The layers whose matrices are int8."""
    layers: BlockLayers | None = None
    """Those that residual feedback trains, without regard to adapters; None: not known of the family."""

    @property
    def weights(self) -> tuple[str, ...]:
        """The names in the block of all weights that it is given."""
        matrices = {f"{layer}.weight" for layer in self.quantised}
        own = [
            more
            for name, _ in self.block.named_parameters()
            for more in ((name, f"{name}.scale") if name in matrices else (name,))
        ]
        return (*own, *self.adapters)

    @property
    def adapters(self) -> tuple[str, ...]:
        """The names of the adapters' weights."""
        return tuple(f"{layer}.lora_{side}.weight" for layer in self.adapted for side in "AB")

    @property
    def extras(self) -> tuple[str, ...]:
        """The names of the tensors that it is called with beside the hidden state."""
        return tuple(f"extra.{i}" for i in range(len(self.call.tensors)))

    def examples(self, sizes: Sizes, width: int) -> Tensors:
        """Tensors of every input of `forward`, of these sizes; the values do not matter."""
        found = {HIDDEN: torch.zeros(sizes.rows, sizes.seq, width)}
        found |= {name: t.clone() for name, t in zip(self.extras, self.call.tensors, strict=True)}
        for name, p in self.block.named_parameters():
            layer, _, leaf = name.rpartition(".")
            if layer in self.quantised and leaf == "weight":
                out, into = rows_of(self.block.get_submodule(layer)).shape
                found[name] = torch.zeros(out, into, dtype=torch.int8)
                found[f"{name}.scale"] = torch.zeros(out, 1)
            else:
                found[name] = torch.zeros(p.shape)
        for layer in self.adapted:
            out, into = rows_of(self.block.get_submodule(layer)).shape
            found[f"{layer}.lora_A.weight"] = torch.zeros(sizes.rank, into)
            found[f"{layer}.lora_B.weight"] = torch.zeros(out, sizes.rank)
        return found | ({LORA_SCALE: torch.ones(())} if self.adapted else {})

    def forward(self, tensors: Tensors) -> Tensors:
        """`hidden_out` [rows, seq, width]."""
        with self._weights_given(tensors):
            return {HIDDEN_OUT: self._output(tensors[HIDDEN], tensors)}

    def gradient(self, tensors: Tensors) -> Tensors:
        """`d.hidden` and `d.NAME` for every float weight, or for adapters alone, from `gradient` = dL/d output."""
        own = self.adapters or tuple(name for name, _ in self.block.named_parameters())
        return differentiated(self.forward, HIDDEN_OUT, (HIDDEN, *own), tensors)

    def feedback(self, tensors: Tensors) -> Tensors:
        """`d.hidden` for the block below, and `d.NAME` for what `ResidualClient` trains of the block.

        With adapters it trains those on output projections alone.
        """
        assert self.layers is not None
        reads: Tensors = {}
        trained = self.fed_back
        given = tensors | {name: tensors[name].detach().requires_grad_() for name in trained}
        layers = self._fed_layers()
        with self._weights_given(given):
            with inputs_read(layers.read, reads.__setitem__):
                self._output(tensors[HIDDEN], tensors)
            terms, below = feedback_terms(layers, reads, tensors[GRADIENT], self._terms_of(given))
        names = {id(given[name]): name for name in trained}
        return {D_HIDDEN: below} | {f"d.{names[id(term.parameter)]}": term.total for term in terms}

    @property
    def fed_back(self) -> tuple[str, ...]:
        """The names of the weights that residual feedback trains: output projections and norms, or their adapters."""
        if self.layers is None:
            return ()
        if self.adapted:
            return tuple(n for n in self.adapters if n.rpartition(".lora_")[0] in self.layers.projections)
        inside = tuple(f"{name}." for name in (*self.layers.projections, *self.layers.norms))
        return tuple(name for name, _ in self.block.named_parameters() if name.startswith(inside))

    def _fed_layers(self) -> BlockLayers:
        assert self.layers is not None
        if not self.adapted:
            return self.layers
        own = {n: m if n in self.adapted else None for n, m in self.layers.projections.items()}
        return replace(self.layers, projections=own)

    def _terms_of(self, tensors: Tensors) -> TermsOf:
        def of_adapters(name: str, layer: Any, gradient: torch.Tensor, x: torch.Tensor) -> list[Term]:
            a, b = tensors[f"{name}.lora_A.weight"], tensors[f"{name}.lora_B.weight"]
            return adapter_terms(a, b, tensors[LORA_SCALE], gradient, x)

        return of_adapters if self.adapted else layer_terms

    def _output(self, hidden: torch.Tensor, tensors: Tensors) -> torch.Tensor:
        args, kwargs = self.call.arguments([tensors[name] for name in self.extras])
        output = self.block(hidden, *args, **kwargs)
        return output[0] if isinstance(output, tuple) else output

    @contextmanager
    def _weights_given(self, tensors: Tensors) -> Iterator[None]:
        """Context manager: the block computes with the weights among `tensors`."""
        matrices = {f"{layer}.weight" for layer in self.quantised}
        plain = {n: tensors[n] for n, _ in self.block.named_parameters() if n not in matrices}
        with ExitStack() as stack:
            stack.enter_context(given(self.block, plain))
            for layer in dict.fromkeys((*self.quantised, *self.adapted)):
                module: Any = self.block.get_submodule(layer)
                compute: Callable[[torch.Tensor], torch.Tensor] = module.forward
                if layer in self.quantised:
                    compute = _int8_layer(layer, module.bias, tensors)
                if layer in self.adapted:
                    compute = _adapted_layer(compute, layer, tensors)
                stack.enter_context(_forward_of(module, compute))
            yield


def rows_of(layer: Any) -> torch.Tensor:
    """The weight [out, in] of a linear layer, GPT-2's transposed ones too."""
    return layer.weight.T if isinstance(layer, Conv1D) else layer.weight


def layers_named(block: nn.Module) -> tuple[str, ...]:
    """The names of a block's linear layers, GPT-2's transposed ones too."""
    return tuple(name for name, module in block.named_modules() if isinstance(module, nn.Linear | Conv1D))


def layers_of(half: ClientHalf, block: nn.Module) -> BlockLayers | None:
    """The layers of a block that write to the residual stream, by their names in it; None: not known of the family."""
    try:
        return block_layers(half, block)
    except SplitError:
        return None


@contextmanager
def _forward_of(module: nn.Module, compute: Callable[[torch.Tensor], torch.Tensor]) -> Iterator[None]:
    module.forward = compute
    try:
        yield
    finally:
        del module.forward


def _adapted_layer(
    compute: Callable[[torch.Tensor], torch.Tensor], layer: str, tensors: Tensors
) -> Callable[[torch.Tensor], torch.Tensor]:
    a, b = tensors[f"{layer}.lora_A.weight"], tensors[f"{layer}.lora_B.weight"]

    def adapted(x: torch.Tensor) -> torch.Tensor:
        return compute(x) + x @ a.T @ b.T * tensors[LORA_SCALE]

    return adapted


def _int8_layer(
    layer: str, bias: torch.Tensor | None, tensors: Tensors
) -> Callable[[torch.Tensor], torch.Tensor]:
    q, scale = tensors[f"{layer}.weight"], tensors[f"{layer}.weight.scale"]

    def product(x: torch.Tensor) -> torch.Tensor:
        y: Any = _Int8Product.apply(x, q, scale)
        return y if bias is None else y + bias

    return product


class _Int8Product(torch.autograd.Function):
    """x (scale q)^T, differentiable in x.

    Forward multiplies q by its scale, backward the gradient: an engine that merges equal expressions would otherwise
    keep the float matrix from one to the other.
    """

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, q: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(q, scale)
        return x @ (q.to(x.dtype) * scale).T

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        q, scale = ctx.saved_tensors
        return gradients[0] * scale[:, 0] @ q.to(gradients[0].dtype), None, None

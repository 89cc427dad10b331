"""One block as a function of its input, its weights and, for gradients, dL/d output. Tensors by name, in and out.

With adapters: y = W x + b + s B (A x) for the target layers, A and B as inputs. Over an int8 base: W = scale q.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from hosl.split.onnx_export.recording import Call
from hosl.split.onnx_export.tracing import Sizes, Tensors, given
from hosl.split.reading.runtime_json import D_HIDDEN, GRADIENT, HIDDEN, HIDDEN_OUT, LORA_SCALE


@dataclass(frozen=True, slots=True)
class BlockFunction:
    """A block and the way it was called."""

    block: nn.Module
    call: Call
    adapted: tuple[str, ...] = ()
    """The layers with adapters, by their names in the block."""
    quantised: tuple[str, ...] = ()
    """The layers whose matrices are int8."""

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
        leaves = {name: tensors[name].detach().requires_grad_() for name in (HIDDEN, *own)}
        with torch.enable_grad():
            output = self.forward(tensors | leaves)[HIDDEN_OUT]
            gradients = torch.autograd.grad(
                output, list(leaves.values()), tensors[GRADIENT], allow_unused=True
            )
        found = zip(leaves, gradients, strict=True)
        return {D_HIDDEN if name == HIDDEN else f"d.{name}": g for name, g in found if g is not None}

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
            for layer in {*self.quantised, *self.adapted}:
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

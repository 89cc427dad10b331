"""A guided client that also trains the last block's queries, by node perturbation: shifts of outputs, not of weights.

A shift of a token's query changes the block's output at that token alone. So one evaluation measures, for every token
of the batch at once, the slope of the loss along that token's own random shift. With s the slope of a token and u its
shift, s u is an unbiased estimate of the gradient at the query's output; its outer product with the layer's input
estimates that of the weights. A random direction of the weights gives one slope per batch for in x out numbers; here
each token gives one for out numbers. Needs the returned gradient, and the block's inputs. Source: methods.md (i); node
perturbation with a slope per example is from arXiv 2210.03310.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch

from hosl.core.array_types import Float
from hosl.core.directions import tile
from hosl.parties.clients.guided import GuidedClient
from hosl.parties.engine.block_calls import recorded
from hosl.parties.engine.perturbation import trained_parameters
from hosl.split import ClientHalf


class NodeClient(GuidedClient):
    """A `NodeClientSide`: a `GuidedClient` that also trains the last block's queries by node perturbation.

    Memory beside that of a `GuidedClient`: one estimate of the query weights' size during `descend_nodes`.
    """

    def __init__(
        self, half: ClientHalf, *, blocks: int = 1, micro_batch_size: int | None = None, device: str = "cpu"
    ) -> None:
        """The arguments are those of `GuidedClient`. Keys and values in a fused projection stay as they are."""
        super().__init__(half, blocks=blocks, micro_batch_size=micro_batch_size, device=device)
        self._query: Any = self._blocks[-1].get_submodule(half.query)
        self._name = f"{half.blocks_name}.{half.cut - 1}.{half.query}"
        self._query.requires_grad_(True)
        self._features = half.query_features.to(self.device)
        self.trained = trained_parameters(half.model)

    def node_slopes(
        self, clean: torch.Tensor, seeds: Sequence[int], epsilon: float, gradient: torch.Tensor
    ) -> Iterator[Float[np.ndarray, "rows seq"]]:
        """<gradient, h+ - clean> / scale for each seed and token, float64.

        In h+ the token's query is shifted by scale u, with scale = epsilon |x| and x the layer's input: the size of
        shift that a random direction of the weights would make. One-sided: the error is first order in epsilon.
        """
        gradient = gradient.to(self.device)
        for seed in seeds:
            slopes = np.empty(tuple(clean.shape[:2]))
            for rows in self._micro_batches():
                shift = _Shift(self._shifts(seed, rows, clean.shape[1]), self._features, epsilon)
                hook = self._query.register_forward_hook(shift)
                try:
                    with torch.no_grad():
                        difference = self._evaluate_again(rows) - clean[rows].to(self.device)
                finally:
                    hook.remove()
                loss_change = (difference.to(torch.float64) * gradient[rows]).sum(-1)
                slopes[rows] = (loss_change / shift.scale).cpu().numpy()
            yield slopes

    def descend_nodes(
        self, seeds: Sequence[int], slopes: Sequence[Float[np.ndarray, "rows seq"]], learning_rate: float
    ) -> None:
        """W_query -= learning_rate mean_q sum_tokens (s u) x^T, and the bias likewise; x is computed again.

        Requires: a call before `descend_along`, which releases the block's inputs.
        """
        weight, bias = self._query.weight, self._query.bias
        exact = torch.promote_types(weight.dtype, torch.float32)
        total = torch.zeros(len(self._features), self._inputs_of_query, dtype=exact, device=self.device)
        bias_total = torch.zeros(len(self._features), dtype=exact, device=self.device)
        with torch.no_grad():
            for rows in self._micro_batches():
                x = self._query_input(rows).to(exact)
                at_nodes = x.new_zeros(*x.shape[:2], len(self._features))
                for seed, seed_slopes in zip(seeds, slopes, strict=True):
                    s = torch.from_numpy(seed_slopes[rows]).to(x) / len(seeds)
                    at_nodes += s[:, :, None] * self._shifts(seed, rows, x.shape[1]).to(x)
                flat = at_nodes.flatten(0, 1)
                total.addmm_(flat.T, x.flatten(0, 1))
                bias_total += flat.sum(0)
            _descend_features_(weight if self._linear else weight.T, self._features, total, learning_rate)
            if bias is not None:
                _descend_features_(bias, self._features, bias_total, learning_rate)

    @property
    def _linear(self) -> bool:
        return isinstance(self._query, torch.nn.Linear)  # GPT-2's Conv1D keeps [in, out]

    @property
    def _inputs_of_query(self) -> int:
        return self._query.weight.shape[1 if self._linear else 0]

    def _shifts(self, seed: int, rows: slice, seq: int) -> torch.Tensor:
        """u of these rows' tokens, +-1, [rows, seq, features]; the same bits for any division into micro-batches."""
        features = len(self._features)
        first, last = (row * seq * features for row in (rows.start, rows.stop))
        signs = tile(seed, f"{self._name}/nodes", first, last, "rademacher")
        return torch.from_numpy(signs).view(-1, seq, features).to(self.device)

    def _query_input(self, rows: slice) -> torch.Tensor:
        """The input of the query's layer for these rows, [rows, seq, in]."""
        with recorded([self._query]) as calls:
            self._evaluate_again(rows)
        return calls[0].args[0]


class _Shift:
    """A forward hook that adds epsilon |x| u to the given features of each token's output."""

    def __init__(self, u: torch.Tensor, features: torch.Tensor, epsilon: float) -> None:
        self._u = u
        self._features = features
        self._epsilon = epsilon
        self.scale = torch.empty(0)
        """epsilon |x| of each token in the last call, [rows, seq], float64."""

    def __call__(self, layer: Any, args: tuple[torch.Tensor], output: torch.Tensor) -> torch.Tensor:
        lengths = torch.linalg.vector_norm(args[0].to(torch.float64), dim=-1)
        self.scale = self._epsilon * lengths.clamp_min(math.sqrt(torch.finfo(torch.float64).tiny))
        shift = (self.scale[..., None] * self._u).to(torch.promote_types(output.dtype, torch.float32))
        shifted = shift.new_zeros(output.shape)
        shifted[..., self._features] = shift
        return shifted.add_(output).to(output.dtype)


def _descend_features_(
    p: torch.Tensor, features: torch.Tensor, gradient: torch.Tensor, learning_rate: float
) -> None:
    """p[features] -= learning_rate gradient, rounded once."""
    p[features] = (p[features].to(gradient.dtype) - learning_rate * gradient).to(p.dtype)

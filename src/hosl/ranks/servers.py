"""First-order servers over several ranks: every rank calls the same method with the same arguments at the same time.

The loss is one number on every rank, and every rank makes the same updates of the weights that it holds.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from hosl.core.array_types import Float
from hosl.core.targets import StepReply, Targets, rows_of, weight_of
from hosl.errors import NonFiniteError
from hosl.parties.engine.loss import mean_loss, row_scores, weighed_losses
from hosl.parties.engine.merging import Part, by_groups, stacked, stacked_losses
from hosl.parties.engine.optimisers import check_gradients
from hosl.parties.servers.basic import FirstOrderServer
from hosl.parties.servers.synchronous import Contributed, RoundGradient, SynchronousServer
from hosl.ranks.group import Group
from hosl.ranks.rows import AllRows, OwnRows, Share, ValueOfAll, share_of


class RankedServer(FirstOrderServer):
    """One rank of a server trained by backprop."""

    def __init__(self, half: Any, *, group: Group, **how: Any) -> None:
        """Take a half whose weights are this rank's, and the arguments of `FirstOrderServer`."""
        self._group = group
        super().__init__(half, **how)

    def scores(self, activations: torch.Tensor, targets: Targets) -> Float[np.ndarray, "rows scores"]:
        """As of `TorchServer`."""
        if self._group.layout.rows == "all":
            return super().scores(activations, targets)
        share = self._share(activations)
        with torch.no_grad():
            own = rows_of(targets, share.rows)
            scores = row_scores(self._logits(activations[list(share.rows)], own), own)
        return self._group.gathered(torch.from_numpy(scores)).numpy()[: len(activations)]

    def _share(self, activations: torch.Tensor) -> Share:
        return share_of(len(activations), self._group.rank, self._group.layout.ranks)

    def _loss(self, h: torch.Tensor, targets: Targets) -> torch.Tensor:
        group, h = self._group, h.to(self.device)
        if group.layout.rows == "all":
            loss = mean_loss(self._logits(AllRows.apply(h, group), targets), targets)  # pyright: ignore[reportArgumentType]
            counted = loss if group.leads else loss * 0.0
            return ValueOfAll.apply(counted, group.of_first(loss.detach()))  # pyright: ignore[reportReturnType]
        share = self._share(h)
        own = rows_of(targets, share.rows)
        logits = self._logits(OwnRows.apply(h, share, group), own)  # pyright: ignore[reportArgumentType]
        losses, _ = weighed_losses(logits, own)
        weight = weight_of(targets)
        everyone = group.gathered(losses.detach())[: len(h)]
        part = losses[: share.own].sum() / weight if share.own else losses.sum() * 0.0
        return ValueOfAll.apply(part, everyone.sum() / weight)  # pyright: ignore[reportReturnType]

    def _merged_losses(self, parts: Sequence[Part]) -> list[torch.Tensor]:
        return by_groups(parts, lambda part: self._loss(*part), self._stacked_losses)

    def _stacked_losses(self, parts: Sequence[Part]) -> list[torch.Tensor]:
        group, (hidden, targets) = self._group, stacked(parts)
        if group.layout.rows == "all":
            losses = stacked_losses(self.half, AllRows.apply(hidden, group), targets)  # pyright: ignore[reportArgumentType]
            of_all = group.of_first(torch.stack(losses).detach())
            losses = losses if group.leads else [loss * 0.0 for loss in losses]
        else:
            share = self._share(hidden)
            own = OwnRows.apply(hidden, share, group)
            losses = stacked_losses(self.half, own, targets.of_rows(share.rows, share.own))  # pyright: ignore[reportArgumentType]
            of_all = group.gathered(torch.stack(losses).detach()[None]).sum(dim=0)
        return [ValueOfAll.apply(loss, value) for loss, value in zip(losses, of_all, strict=True)]  # pyright: ignore[reportReturnType]

    def _finite_loss(self, h: torch.Tensor, targets: Targets, step: int) -> torch.Tensor:
        with self._forgetting():
            return super()._finite_loss(h, targets, step)

    def _backward(self, loss: torch.Tensor) -> None:
        loss.backward()
        if self._group.mesh is None:  # else FSDP has added them up
            self._group.sum_gradients_(self.trained.values())

    @contextmanager
    def _forgetting(self) -> Iterator[None]:
        """Have the half forget a forward pass that is refused, so that no backward pass follows it."""
        try:
            yield
        except NonFiniteError:
            reset = getattr(getattr(self.half, "root", None), "reset_iter_state", None)  # torch 2.13 has it
            if reset is not None:
                reset()
            raise


class RankedSynchronousServer(RankedServer, SynchronousServer):
    """One rank of a server that several clients train together."""

    def __init__(self, half: Any, *, group: Group, **how: Any) -> None:
        """Take the arguments of `RankedServer`."""
        super().__init__(half, group=group, **how)
        self._round = _RankedRound(self)

    def contribute(
        self, activations: torch.Tensor, targets: Targets, examples: int, *, want_gradient: bool = False
    ) -> StepReply:
        """As of `SynchronousServer`."""
        with self._forgetting():
            return super().contribute(activations, targets, examples, want_gradient=want_gradient)

    def contribute_together(self, parts: Sequence[Contributed]) -> list[StepReply]:
        """As of `SynchronousServer`."""
        with self._forgetting():
            return super().contribute_together(parts)


class _RankedRound(RoundGradient):
    """A `RoundGradient` whose gradients are those that a backward pass of all ranks leaves."""

    def __init__(self, server: RankedServer) -> None:
        super().__init__(server.trained)
        self._server = server

    def _gradients(
        self, output: torch.Tensor, leaves: Sequence[torch.Tensor], at: torch.Tensor | None
    ) -> tuple[Sequence[torch.Tensor | None], Sequence[torch.Tensor]]:
        assert at is None, "labels at the client have one rank"
        before = [p.grad for p in self._trained]
        for p in self._trained:
            p.grad = None
        try:
            self._server._backward(output)
            found = [p.grad for p in self._trained]
            of_leaves = [h.grad for h in leaves if h.grad is not None]
            assert len(of_leaves) == len(leaves), "each leaf is read"
            check_gradients(found)
            check_gradients(of_leaves)  # apart: they are not shared out
            return found, of_leaves
        finally:
            for p, grad in zip(self._trained, before, strict=True):
                p.grad = grad

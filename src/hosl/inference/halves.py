"""Two halves on PyTorch that go on with a text: the calls of each, and both together in one process."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch

from hosl.inference.answering import NextToken
from hosl.inference.decoding import Candidates, most_probable
from hosl.parties.remote.torch_wire import from_wire, to_wire
from hosl.split import ClientHalf, HeadHalf, ServerHalf, TrunkHalf
from hosl.split.caches import HalfCache
from hosl.wire.tensors import WireArray


def hidden_states(half: ClientHalf, ids: Sequence[int], cache: HalfCache) -> torch.Tensor:
    """The hidden state [1, seq, width] of tokens that follow those in the cache, which is made longer."""
    device = next(half.parameters()).device
    rows = torch.tensor([list(ids)], device=device)
    with torch.no_grad():
        return half(rows, _all_ones(cache, rows), cache)


def at_the_end(half: ServerHalf | TrunkHalf, hidden: torch.Tensor, cache: HalfCache) -> torch.Tensor:
    """The logits [1, 1, vocabulary], or a trunk's states [1, 1, width], at the last of the positions of `hidden`.

    Args:
        half: the half of the server.
        hidden: [1, seq, width], of tokens that follow those in the cache.
        cache: is made longer.
    """
    weight = next(half.parameters(), None)  # a trunk at the last cut has none
    h = hidden if weight is None else hidden.to(weight.device, weight.dtype)
    last = torch.tensor([h.shape[1] - 1], device=h.device)
    with torch.no_grad():
        return half(h, _all_ones(cache, h), last, cache)


def best_of(logits: torch.Tensor, count: int) -> Candidates:
    """The `count` most probable tokens by logits [1, 1, vocabulary], in float32; 0: all."""
    return most_probable(logits[0, -1].to(torch.float32).cpu().numpy(), count)


class TwoHalves:
    """A whole model in this process, as its two halves."""

    def __init__(self, client_half: ClientHalf, server_half: ServerHalf) -> None:
        self._client, self._server = client_half, server_half

    @contextmanager
    def text(self, most_tokens: int, candidates: int) -> Iterator[NextToken]:
        """The model for one text of at most `most_tokens` tokens, prompt included; it answers with `candidates`."""
        caches = self._client.new_cache(), self._server.new_cache()

        def next_token(ids: Sequence[int]) -> Candidates:
            hidden = hidden_states(self._client, ids, caches[0])
            return best_of(at_the_end(self._server, hidden, caches[1]), candidates)

        yield next_token


class TorchDeviceHalf:
    """The half of a device that generates with a server's, with its head where the labels stay here."""

    def __init__(self, half: ClientHalf, head: HeadHalf | None = None) -> None:
        self._half, self._head = half, head

    def new_text(self) -> Callable[[Sequence[int]], WireArray]:
        """See `hosl.inference.remote.DeviceHalf`."""
        cache = self._half.new_cache()
        return lambda ids: to_wire(hidden_states(self._half, ids, cache))

    def candidates(self, state: WireArray, count: int) -> Candidates:
        """See `hosl.inference.remote.DeviceHalf`."""
        assert self._head is not None, "a half without a head is answered with candidates"
        weight = next(self._head.parameters())
        with torch.no_grad():
            return best_of(self._head.logits(from_wire(state).to(weight.device, weight.dtype)), count)


def _all_ones(cache: HalfCache, new: torch.Tensor) -> torch.Tensor:
    """The mask of a text without padding: of the tokens in the cache, and of the new ones [1, seq, ...]."""
    return torch.ones(1, cache.tokens + new.shape[1], dtype=torch.int64, device=new.device)

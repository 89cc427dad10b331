"""Two halves on PyTorch that go on with a text: the calls of each, and both together in one process."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from hosl.inference.answering import NextToken
from hosl.inference.decoding import Candidates, most_probable
from hosl.split import ClientHalf, ServerHalf, TrunkHalf
from hosl.split.caches import HalfCache


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
    weight = next(half.parameters())
    h = hidden.to(weight.device, weight.dtype)
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


def _all_ones(cache: HalfCache, new: torch.Tensor) -> torch.Tensor:
    """The mask of a text without padding: of the tokens in the cache, and of the new ones [1, seq, ...]."""
    return torch.ones(1, cache.tokens + new.shape[1], dtype=torch.int64, device=new.device)

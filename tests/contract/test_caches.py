"""Halves that go on with a cache: greedy, they are transformers' own `generate` token for token."""

import numpy as np
import pytest
import torch

from hosl.inference.halves import TorchDeviceHalf, at_the_end
from hosl.parties.remote.torch_wire import from_wire, to_wire
from hosl.split import split_model, split_u_shape
from tests.conftest import BLOCKS, MODELS, build

CAUSAL = [name for name, (model_class, *_) in MODELS.items() if "Sequence" not in model_class.__name__]
# a sliding window is 5: one prompt is shorter, one longer, one begins and ends beyond it
PROMPT_LENGTHS = (1, 4, 11)
NEW_TOKENS = 9


def prompt_of(length):
    return torch.from_numpy(np.random.default_rng(length).integers(3, 97, (1, length)))


def ones(tokens):
    return torch.ones(1, tokens, dtype=torch.int64)


def greedy(client, server, prompt):
    """The most probable tokens after a prompt, by two halves with their caches."""
    caches, ids, chosen = (client.new_cache(), server.new_cache()), prompt, []
    with torch.no_grad():
        for _ in range(NEW_TOKENS):
            mask = ones(caches[0].tokens + ids.shape[1])
            last = torch.tensor([ids.shape[1] - 1])
            logits = server(client(ids, mask, caches[0]), mask, last, caches[1])
            ids = logits[:, -1].argmax(-1, keepdim=True)
            chosen.append(int(ids))
    return chosen, caches


@pytest.mark.parametrize("cut", range(BLOCKS + 1))
@pytest.mark.parametrize("name", CAUSAL)
def test_greedy_halves_are_the_whole_models_generate(name, cut):
    model = build(name)
    client, server = split_model(model, cut)
    for length in PROMPT_LENGTHS:
        prompt = prompt_of(length)
        whole = model.generate(
            prompt, attention_mask=ones(length), do_sample=False, max_new_tokens=NEW_TOKENS,
            min_new_tokens=NEW_TOKENS,
        )  # fmt: skip
        # the id that ends a text is 2 here: `min_new_tokens` forbids it to the whole model
        chosen, _ = greedy(client, _Without(server, 2), prompt)
        assert chosen == whole[0, length:].tolist()


class _Without:
    """A server half that gives one token no chance."""

    def __init__(self, half, token):
        self.half, self.token, self.new_cache = half, token, half.new_cache

    def __call__(self, *arguments):
        logits = self.half(*arguments)
        logits[..., self.token] = -torch.inf
        return logits


@pytest.mark.parametrize("name", ["llama", "opt-projections", "gemma3"])
def test_a_trunk_and_a_head_choose_the_same_tokens_as_the_server_half(name):
    model = build(name)
    client, trunk, head = split_u_shape(model, 1)

    def trunk_and_head(h, mask, last, cache):
        return head.logits(trunk(h, mask, last, cache))

    trunk_and_head.new_cache = trunk.new_cache
    expected, _ = greedy(*split_model(model, 1), prompt_of(7))
    assert greedy(client, trunk_and_head, prompt_of(7))[0] == expected


def test_a_cache_holds_keys_and_values_of_its_own_blocks_and_a_window_no_more():
    client, server = split_model(build("llama"), 1)
    _, caches = greedy(client, server, prompt_of(11))
    tokens = 11 + NEW_TOKENS - 1  # the last token that was chosen is in no cache
    of_a_block, elsewhere = 2 * 2 * 8 * 4 * tokens, 2 * tokens  # keys and values of 2 heads of 8 float32
    assert caches[0].tokens == caches[1].tokens == tokens
    assert caches[0].size_bytes == of_a_block + 2 * elsewhere
    assert caches[1].size_bytes == 2 * of_a_block + elsewhere
    client, server = split_model(build("mistral"), 0)
    _, (_, windows) = greedy(client, server, prompt_of(11))
    assert windows.size_bytes == 3 * 2 * 2 * 8 * 4 * 5  # the window, and nothing of what is before it


def test_a_trunk_without_blocks_hands_on_the_last_state():
    client, trunk, head = split_u_shape(build("llama"), BLOCKS)
    device, ids = TorchDeviceHalf(client, head), prompt_of(4)[0].tolist()
    state = at_the_end(trunk, from_wire(device.new_text()(ids)), trunk.new_cache())
    with torch.no_grad():
        logits = build("llama")(torch.tensor([ids])).logits[0, -1]
    assert device.candidates(to_wire(state), 1).tokens.tolist() == [int(logits.argmax())]

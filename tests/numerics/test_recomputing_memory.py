"""What a first-order client must hold: a bound from methods.md section 3, and the allocations that torch records."""

import numpy as np
import pytest
import torch
import transformers as hf

from hosl.core.targets import Batch, ClassTargets
from hosl.parties.clients.first_order import FirstOrderClient
from hosl.parties.clients.recomputing import RecomputingClient
from hosl.parties.engine.memory import TorchMemory, resident_bytes
from hosl.split import set_trainable, split_model

BLOCKS, WIDTH, VOCABULARY, ROWS, SEQ = 6, 128, 4000, 8, 32
FLOAT_BYTES = 4
_SIZES = {"vocab_size": VOCABULARY, "hidden_size": WIDTH, "word_embed_proj_dim": WIDTH, "ffn_dim": 4 * WIDTH}
_SIZES |= {"num_hidden_layers": BLOCKS + 1, "num_attention_heads": 4, "max_position_embeddings": 64}


@pytest.fixture
def peak_bytes():
    """`peak_bytes(kind, trainable, **options)`: of two steps of an OPT-shaped client half, weights included."""
    ids = np.random.Generator(np.random.Philox(key=0)).integers(3, VOCABULARY, (ROWS, SEQ))
    mask = np.ones((ROWS, SEQ), np.int8)
    mask[1, : SEQ // 2] = 0
    batch = Batch(ids, ClassTargets(mask, np.zeros(ROWS, np.int64)))

    def measure(kind, trainable, **options):
        half, _ = split_model(hf.OPTForCausalLM(hf.OPTConfig(**_SIZES)).eval(), BLOCKS)
        set_trainable(half, trainable)
        client = kind(half, **options)
        memory = TorchMemory(resident_bytes(list(half.parameters())))
        for _ in range(2):
            h = memory.watch(client.forward_for_backward, batch)
            memory.watch(client.backward, torch.ones_like(h), 1e-3)
        return memory.peak_bytes

    return measure


def _bound_bytes(at_once):
    """Weights + one block's gradients + what each block was given, and h + one block's activations at `at_once` rows.

    A block of OPT is 12 width^2 + 13 width numbers, its activations and their gradients 19 u (methods.md section 3),
    u a hidden state. Where gradients are summed over micro-batches, the summand of the largest matrix is there too.
    """
    block = 12 * WIDTH**2 + 13 * WIDTH
    weights = BLOCKS * block + (VOCABULARY + 64 + 2) * WIDTH
    u = ROWS * SEQ * WIDTH
    summand = 4 * WIDTH**2 if at_once < ROWS else 0
    return FLOAT_BYTES * (weights + block + summand + (BLOCKS + 1) * u + 19 * u * at_once // ROWS)


@pytest.mark.parametrize("trainable", ["blocks", "all"])
@pytest.mark.parametrize("micro_batch_size", [None, 4, 1])
def test_a_recomputing_client_stays_within_its_bound_and_plain_backprop_does_not(
    peak_bytes, trainable, micro_batch_size
):
    """The bound leaves no room for a second block's gradients (0.8 MB) or a dense one of the token table (2 MB)."""
    bound = _bound_bytes(micro_batch_size or ROWS)
    peak = peak_bytes(RecomputingClient, trainable, micro_batch_size=micro_batch_size)
    print(f"{trainable}, micro-batches of {micro_batch_size}: {peak} bytes, bound {bound}")
    assert bound - 500_000 < peak <= bound
    assert peak_bytes(FirstOrderClient, trainable) > bound

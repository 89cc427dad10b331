"""hosl in a training loop of your own: a synthetic task, a small model, and the three rows that a comparison needs.

    python examples/own_loop.py [--steps 150] [--seed 0]

Is a sequence's first token above 50? The model is a BERT of random weights, cut after two of its four blocks. It is
trained three times: with a client that never changes (frozen), one that is trained by forward passes only (hosl), and
one that is trained by backprop (first-order); the server learns by backprop each time. What hosl's client contributes
is its gap closure G: 0, nothing; 1, as much as by backprop. One seed says little; `hosl study` has intervals.
"""

import argparse
import copy
from collections.abc import Iterator

import numpy as np
import torch
from transformers import BertConfig, BertForSequenceClassification

import hosl

CUT, ROWS, TOKENS, VOCABULARY = 2, 32, 8, 100
SERVER_RATE, EPSILON, DIRECTIONS = 0.05, 1e-3, 2
METHODS = {
    "frozen": (hosl.FrozenClient, hosl.frozen_round, 0.0),
    "hosl": (hosl.ZerothOrderClient, hosl.hosl_round, 1e-3),
    "first-order": (hosl.FirstOrderClient, hosl.fo_round, 0.05),
}
"""What each row is made of: its client, its round, the client's learning rate."""


def small_model(seed: int) -> BertForSequenceClassification:
    """Any model that plain transformers builds or loads can stand here: `hosl.split_model` knows its family."""
    config = BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=64,
    )
    model = BertForSequenceClassification(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0.0, 0.1, generator=generator)
    return model


def draw_batch(random: np.random.Generator, rows: int) -> hosl.Batch:
    """Token ids, which stay on the client, and targets (mask and labels), which the server sees."""
    ids = random.integers(2, VOCABULARY, (rows, TOKENS))
    labels = (ids[:, 0] > 50).astype(np.int64)
    return hosl.Batch(ids, hosl.ClassTargets(np.ones((rows, TOKENS), np.int8), labels))


def dev_losses(method: str, model: torch.nn.Module, steps: int, seed: int) -> Iterator[float]:
    """Train one row on batches that are the same for every row; yields the loss on held-out data before and after."""
    client_half, server_half = hosl.split_model(copy.deepcopy(model), cut=CUT)
    server = hosl.FirstOrderServer(server_half, learning_rate=lambda step: SERVER_RATE)
    make_client, play_round, client_rate = METHODS[method]
    client = make_client(client_half)
    dev = draw_batch(np.random.default_rng([seed, 1]), rows=512)
    yield server.losses([client.forward(dev)], dev.targets)[0]

    random = np.random.default_rng([seed, 0])
    for step in range(1, steps + 1):
        batch = draw_batch(random, ROWS)
        seeds = [hosl.direction_seed(seed, step, q) for q in range(DIRECTIONS)]
        inputs = hosl.StepInputs(step, seeds=seeds, epsilon=EPSILON, learning_rate=client_rate)
        play_round(client, server, batch, inputs)
    yield server.losses([client.forward(dev)], dev.targets)[0]


def main() -> None:
    """Train the rows and print them."""
    parser = argparse.ArgumentParser(description="frozen, hosl and first-order clients on one small task")
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--seed", type=int, default=0)
    known = parser.parse_args()

    torch.set_num_threads(1)  # on matrices this small a second thread only waits
    model = small_model(known.seed)
    after = {}
    print(f"dev loss, nats, before and after {known.steps} steps, seed {known.seed}")
    for method in METHODS:
        before, after[method] = dev_losses(method, model, known.steps, known.seed)
        print(f"{method:<12} {before:.4f} -> {after[method]:.4f}", flush=True)
    gap = after["frozen"] - after["first-order"]
    closure = (
        f"{(after['frozen'] - after['hosl']) / gap:.2f}" if gap > 0 else "none: first-order gained nothing"
    )
    print(f"gap closure of hosl: {closure}")


if __name__ == "__main__":
    main()

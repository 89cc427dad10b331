"""How much the gradient at the last states tells of labels that stay with the client: a curious server's guess.

    python research/label_leak.py

The server clusters the gradients of each batch by the sign of their inner product with the first one (two classes);
how often that agrees with the labels, up to naming: 0.5 is chance, 1.0 tells everything.
"""

import numpy as np
import torch
import transformers

from hosl.core.targets import ClassTargets
from hosl.parties.engine.loss import row_losses
from hosl.split import split_u_shape


def agreement(seed: int, rows: int = 64, batches: int = 20) -> float:
    """Share of examples whose class a server guesses from the gradients of one batch; a fresh two-class BERT."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        sizes = {"vocab_size": 500, "hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4}
        model = transformers.BertForSequenceClassification(
            transformers.BertConfig(**sizes, num_labels=2)
        ).eval()
    client, trunk, head = split_u_shape(model, 2)
    chance, right = np.random.default_rng(seed), []
    for _ in range(batches):
        ids = torch.from_numpy(chance.integers(3, 500, (rows, 16)))
        labels = chance.integers(0, 2, rows)
        mask = torch.ones_like(ids)
        with torch.no_grad():
            states = trunk(client(ids, mask), mask, torch.tensor([0]))
        states.requires_grad_()
        row_losses(head.logits(states), ClassTargets(mask.numpy().astype(np.int8), labels)).mean().backward()
        assert states.grad is not None
        gradients = states.grad.reshape(rows, -1)
        guess = (gradients @ gradients[0] > 0).numpy()
        share = float((guess == (labels == labels[0])).mean())
        right.append(max(share, 1 - share))
    return float(np.mean(right))


if __name__ == "__main__":
    found = [agreement(seed) for seed in range(3)]
    print(
        f"labels guessed from the gradient at the states: {np.mean(found):.3f} ± {np.std(found, ddof=1):.3f} (3 seeds)"
    )

"""What a client's step costs against plain forwards of the same half, as ratios of medians from one interleaved run.

    python benchmarks/step.py [--blocks 5 --width 768 --batch 16 --tokens 64 --repeats 7] [--json]

Random weights of the OPT shape, embeddings frozen. A probe is two forwards' work; 1.0 would be a free direction.
"""

import argparse
import json
import statistics
import time

import numpy as np
import torch
import transformers

import hosl
from hosl.split import set_trainable


def _client(blocks: int, width: int, law: str) -> "hosl.ZerothOrderClient":
    config = transformers.OPTConfig(
        hidden_size=width, word_embed_proj_dim=width, ffn_dim=4 * width, vocab_size=5000
    )
    config.num_hidden_layers, config.num_attention_heads = blocks, width // 64
    half, _ = hosl.split_model(transformers.OPTForCausalLM(config), blocks)
    set_trainable(half, "blocks")
    return hosl.ZerothOrderClient(half, law=law)


def measure(blocks: int, width: int, batch: int, tokens: int, repeats: int) -> dict[str, float]:
    """Seconds of a forward, and ratios: probe to two forwards, update of one direction to a forward."""
    ids = np.random.Generator(np.random.Philox(0)).integers(3, 5000, (batch, tokens))
    mask = np.ones((batch, tokens), np.int8)
    rows = hosl.Batch(ids, hosl.ClassTargets(mask, np.zeros(batch, np.int64)))
    clients = {law: _client(blocks, width, law) for law in ("gaussian", "rademacher")}
    times: dict[str, list[float]] = {}
    for turn in range(repeats + 1):  # the first turn warms up
        for law, client in clients.items():
            work = {
                "forward": lambda c=client: c.forward(rows),
                f"probe {law}": lambda c=client, s=turn: c.probe(rows, s, 1e-3),
                f"update {law}": lambda c=client, s=turn: c.descend(s + 1, [s], [1.0], 1e-9),
            }
            for name, run in work.items():
                start = time.perf_counter()
                run()
                if turn:
                    times.setdefault(name, []).append(time.perf_counter() - start)
    median = {name: statistics.median(values) for name, values in times.items()}
    found = {"forward_s": median["forward"], "threads": torch.get_num_threads()}
    for law in clients:
        found[f"probe_{law}_per_two_forwards"] = median[f"probe {law}"] / (2 * median["forward"])
        found[f"update_{law}_per_forward"] = median[f"update {law}"] / median["forward"]
    return found


if __name__ == "__main__":
    words = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("blocks", 5), ("width", 768), ("batch", 16), ("tokens", 64), ("repeats", 7)):
        words.add_argument(f"--{name}", type=int, default=default)
    words.add_argument("--json", action="store_true")
    asked = vars(words.parse_args())
    as_json = asked.pop("json")
    result = measure(**asked)
    print(
        json.dumps(result) if as_json else "\n".join(f"{key:32} {value:.3f}" for key, value in result.items())
    )

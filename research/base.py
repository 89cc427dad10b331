"""What a low-precision base under LoRA adapters costs and saves, and how far off it makes the slopes of probes.

    python research/base.py [--blocks 5 --width 768 --batch 16 --tokens 64 --repeats 3] [--json]

Random weights of the OPT shape for time and memory; the embedded model, cut at 3, for slopes. Peaks are of tensors,
beyond the weights. A slope is <g, h+ - h-> / (2 epsilon) for a random g; its error is relative, over six directions,
against float64 with the same base (bfloat16: with the original weights).
"""

import argparse
import json
import statistics
import time

import numpy as np
import torch
import transformers

import hosl
from hosl.parties.engine.memory import TorchMemory, resident_bytes
from hosl.split import LoraSpec, add_lora, load_model, quantise_

BASES = ("float32", "bfloat16", "int8")


def _adapted(model, cut, base, targets, dtype=torch.float32):
    half, _ = hosl.split_model(model, cut)
    if base != "float32":
        quantise_(half, base)
    add_lora(half, LoraSpec(target_modules=targets), seed=1, dtype=dtype)
    return half


def cost(base: str, *, blocks: int, width: int, batch: int, tokens: int, repeats: int) -> dict[str, float]:
    """Medians in seconds, sizes in MiB."""
    config = transformers.OPTConfig(
        hidden_size=width, word_embed_proj_dim=width, ffn_dim=4 * width, vocab_size=5000
    )
    config.num_hidden_layers, config.num_attention_heads = blocks, width // 64
    half = _adapted(transformers.OPTForCausalLM(config), blocks, base, ("q_proj", "v_proj"))
    ids = np.random.Generator(np.random.Philox(0)).integers(3, 5000, (batch, tokens))
    rows = hosl.Batch(ids, hosl.ClassTargets(np.ones(ids.shape, np.int8), np.zeros(batch, np.int64)))
    probed, first_order = hosl.ZerothOrderClient(half), hosl.FirstOrderClient(half)
    gradient = torch.zeros(batch, tokens, width)
    weights_bytes = resident_bytes([*half.model.parameters(), *half.model.buffers()])
    found = {"weights_mib": weights_bytes / 2**20}
    steps = {
        "probe": [(probed.probe, rows, 3, 1e-3)],
        "backprop": [(first_order.forward_for_backward, rows), (first_order.backward, gradient, 0.0)],
    }
    for name, calls in steps.items():
        times = []
        for _ in range(repeats + 1):  # the first warms up
            start = time.perf_counter()
            for call, *args in calls:
                call(*args)
            times.append(time.perf_counter() - start)
        memory = TorchMemory(weights_bytes)
        for call, *args in calls:
            memory.watch(call, *args)
        found[f"{name}_s"] = statistics.median(times[1:])
        found[f"{name}_peak_mib"] = (memory.peak_bytes - weights_bytes) / 2**20
    return found


def slope_errors(base: str, *, batch: int, tokens: int, directions: int = 6) -> dict[str, float]:
    """|slopes - exact| / |exact| over `directions`, at three epsilons."""
    ids = np.random.Generator(np.random.Philox(0)).integers(1000, 20000, (batch, tokens))
    rows = hosl.Batch(ids, hosl.ClassTargets(np.ones(ids.shape, np.int8), np.zeros(batch, np.int64)))
    g = torch.randn(batch, tokens, 384, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    def slopes(base, epsilon, dtype):
        model = load_model("all-MiniLM-L6-v2", head="classification", num_labels=2, seed=0, dtype=dtype).model
        client = hosl.ZerothOrderClient(_adapted(model, 3, base, ("query", "value"), dtype))
        return np.array([p.rows.sum() for p in client.projections(rows, range(directions), epsilon, g)])

    exact = slopes("float32" if base == "bfloat16" else base, 1e-4, torch.float64)
    errors = {e: slopes(base, e, torch.float32) - exact for e in (1e-3, 3e-3, 1e-2)}
    return {f"slope_error_{e:g}": float(np.linalg.norm(d) / np.linalg.norm(exact)) for e, d in errors.items()}


if __name__ == "__main__":
    words = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("blocks", 5), ("width", 768), ("batch", 16), ("tokens", 64), ("repeats", 3)):
        words.add_argument(f"--{name}", type=int, default=default)
    words.add_argument("--json", action="store_true")
    asked = vars(words.parse_args())
    as_json = asked.pop("json")
    shape = {name: asked[name] for name in ("batch", "tokens")}
    result = {base: cost(base, **asked) | slope_errors(base, **shape) for base in BASES}
    if as_json:
        print(json.dumps(result | {"threads": torch.get_num_threads()}))
    else:
        print(f"{'':20}" + "".join(f"{base:>12}" for base in BASES))
        for key in result["int8"]:
            print(f"{key:20}" + "".join(f"{result[base][key]:12.4f}" for base in BASES))

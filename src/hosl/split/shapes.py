"""Well-known models by their shape alone, with random weights: for benchmarks, where values do not matter."""

from pathlib import Path
from typing import Any

import torch
import transformers

from hosl.errors import ConfigError

SHAPES: dict[str, dict[str, Any]] = {
    "tiny": {
        "hidden_size": 64,
        "ffn_dim": 256,
        "num_hidden_layers": 6,
        "num_attention_heads": 4,
        "vocab_size": 1000,
    },
    "opt-125m": {"hidden_size": 768, "ffn_dim": 3072, "num_hidden_layers": 12, "num_attention_heads": 12},
    "opt-1.3b": {"hidden_size": 2048, "ffn_dim": 8192, "num_hidden_layers": 24, "num_attention_heads": 32},
    "opt-6.7b": {"hidden_size": 4096, "ffn_dim": 16384, "num_hidden_layers": 32, "num_attention_heads": 32},
    "opt-66b": {"hidden_size": 9216, "ffn_dim": 36864, "num_hidden_layers": 64, "num_attention_heads": 72},
}
"""OPT's published sizes (arXiv 2205.01068, table 1), and one that takes no time."""


def shape_config(shape: str) -> Any:
    """The `OPTConfig` of a known shape.

    Raises:
        ConfigError: if there is no such shape.
    """
    if shape not in SHAPES:
        raise ConfigError(f"no shape is called {shape!r}; there are {', '.join(SHAPES)}")
    sizes = SHAPES[shape] | {"word_embed_proj_dim": SHAPES[shape]["hidden_size"]}
    return transformers.OPTConfig(**sizes)


def random_model(shape: str) -> Any:
    """An `OPTForCausalLM` in a known shape, weights as transformers draws them; not from the global random state.

    Raises:
        ConfigError: if there is no such shape.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        return transformers.OPTForCausalLM(shape_config(shape)).eval()


def save_random_model(shape: str, folder: Path) -> None:
    """Write `random_model` as a Hugging Face checkpoint without a tokenizer."""
    random_model(shape).save_pretrained(folder)

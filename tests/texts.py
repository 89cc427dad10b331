"""A tiny Llama with a tokenizer of bytes and a chat template, and rows to learn: a whole run takes seconds."""

import json

import torch
import yaml

from tests.conftest import MODELS
from tests.unit.test_chat_template import CHATML, saved_tokenizer

PAIRS = [
    {"prompt": f"Say {i} to the {'man' if i % 3 else 'woman'}: ", "completion": "Hello there" + "!" * (i % 5)}
    for i in range(24)
]
CHATS = [
    {
        "messages": [
            {"role": "user", "content": f"Number {i}?"}, {"role": "assistant", "content": "Good bye " * (1 + i % 3)},
            {"role": "user", "content": "And?"}, {"role": "assistant", "content": f"Hello {i}"},
        ]
    }
    for i in range(12)
]  # fmt: skip
TEXTS = [{"text": f"There were {i} " + "system user " * (i % 4)} for i in range(12)]


def tiny_language_model(dtype=torch.float32, seed=0):
    """A Llama as wide as the tokenizer of `saved_tokenizer`, every weight drawn from the seed."""
    model_class, config_class, settings = MODELS["llama"]
    tokens = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    model = model_class(
        config_class(**settings | tokens | {"vocab_size": 320, "max_position_embeddings": 256})
    )
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * 0.1 + (1.0 if p.dim() == 1 else 0.0))
    return model.eval().to(dtype)


def write_rows(path, rows):
    """Rows as JSON Lines; returns the path."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def text_run(folder, rows=CHATS, template=CHATML, **settings):
    """The path of a config over the model, its tokenizer and rows, all written into a folder."""
    model = folder / "model-in"
    tiny_language_model().save_pretrained(model)
    saved_tokenizer(model, template)
    config = {
        "output_dir": str(folder / "run"), "method": "hosl", "model": {"name": str(model), "cut": 1},
        "task": {"kind": "sft", "train": write_rows(folder / "rows.jsonl", rows)},
        "zo": {"directions": 2}, "client": {"learning_rate": 1e-3},
        "server": {"learning_rate": 1e-2, "optimiser": {"name": "sgd"}},
        "max_steps": 6, "per_device_train_batch_size": 4, "eval_steps": 3, "save_steps": 2, "snapshot_steps": 4,
    }  # fmt: skip
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(config | settings))
    return path

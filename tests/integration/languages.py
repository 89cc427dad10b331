"""A tiny language model with a tokenizer of words, and a config that tunes it: for the tests of generation."""

import json

import tokenizers
import transformers
import yaml

from tests.conftest import build

WORDS = ["<unk>", "<s>", "</s>", "terrible", "great", "It", "was", *(f"w{index}" for index in range(90))]
PROMPTS = ["w1 w2 w3", "great", "w10 It was w20 w30 w40 w50 w60 w70", "terrible terrible", "w89 w88 It was"]


def language_model(folder, family):
    """A tiny model of a family with its tokenizer, in a new folder; no token ends a text."""
    model = build(family)
    model.generation_config.eos_token_id = model.config.eos_token_id = None
    model.save_pretrained(folder)
    vocabulary = {word: index for index, word in enumerate(WORDS)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", pad_token="<s>",
        chat_template="{% for m in messages %}<s> {{ m.content }} {% endfor %}{{ 'It was' if add_generation_prompt }}",
    )  # fmt: skip
    fast.save_pretrained(folder)
    return folder


def tuning(folder, model, **settings):
    """The path of a config that tunes a model on a few prompts of its words: a run of seconds."""
    for part, count in (("train", 40), ("validation", 8)):
        rows = [{"sentence": f"w{index} w{index + 40}", "label": index % 2} for index in range(count)]
        file = folder / "SST-2" / f"{part}.jsonl"
        file.parent.mkdir(exist_ok=True)
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = {"kind": "prompts", "name": "SST-2", "folder": str(folder), "train_rows": 20, "dev_rows": 5}
    config = {
        "output_dir": str(folder / "run"), "method": "hosl", "model": {"name": str(model), "cut": 1}, "task": task,
        "zo": {"directions": 2, "distribution": "gaussian"}, "client": {"learning_rate": 1e-2},
        "server": {"learning_rate": 0.5, "optimiser": {"name": "sgd"}}, "max_steps": 4,
        "per_device_train_batch_size": 8, "eval_steps": 4, "save_steps": 2,
    }  # fmt: skip
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(config | settings))
    return path


def greedy_words(model, prompt, tokens):
    """What transformers' own greedy `generate` of a model goes on with, as words."""
    import torch

    ids = torch.tensor([[WORDS.index(word) for word in prompt.split()]])
    out = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=tokens)
    return [WORDS[token] for token in out[0, ids.shape[1] :].tolist() if WORDS[token] not in ("<s>",)]

"""A decoder as a classifier of own rows: tuned by `hosl train`, exported, and scored by plain transformers."""

import json

import numpy as np
import pytest
import tokenizers
import torch
import transformers
import yaml

from hosl.cli import main
from tests.conftest import build

WORDS = ["<unk>", "<s>", "</s>", "<pad>", *(f"w{index}" for index in range(80))]
TEXTS = [" ".join(f"w{(7 * i + j) % 80}" for j in range(1 + i % 5)) for i in range(48)]


def decoder(folder, pad_token, *, stated=None, ends=False):
    """A tiny Llama that names `stated` as its padding, with a tokenizer that pads by `pad_token`."""
    model = build("llama")
    model.config.pad_token_id = stated
    model.generation_config.pad_token_id = None
    model.save_pretrained(folder)
    vocabulary = {word: index for index, word in enumerate(WORDS)}
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    inner.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A </s>" if ends else "<s> $A", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token=pad_token
    ).save_pretrained(folder)
    return folder


def config_of(folder, model):
    """A run of seconds on 48 rows, whose class is that of the last word."""
    rows = [
        {"text": text, "label": "even" if int(text.split()[-1][1:]) % 2 == 0 else "odd"} for text in TEXTS
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump({
        "output_dir": str(folder / "run"), "method": "hosl", "model": {"name": str(model), "cut": 1},
        "task": {"kind": "files", "train": str(folder / "rows.jsonl")}, "zo": {"directions": 2},
        "client": {"learning_rate": 1e-3}, "server": {"learning_rate": 0.05, "optimiser": {"name": "sgd"}},
        "max_steps": 6, "per_device_train_batch_size": 8, "eval_steps": 6, "save_steps": 6,
    }))  # fmt: skip
    return path


@pytest.mark.parametrize(
    ("pad_token", "stated", "due"),
    [("<pad>", None, 3), ("<pad>", 1, 3), (None, None, 2), (None, 1, 1)],
    ids=["tokenizer's", "tokenizer's, not the config's", "neither", "config's"],
)
def test_plain_transformers_reads_the_same_classes_off_the_exported_decoder(
    tmp_path, capsys, pad_token, stated, due
):
    config = config_of(tmp_path, decoder(tmp_path / "model", pad_token, stated=stated))
    assert main(["train", str(config)]) == 0
    said = capsys.readouterr().err
    assert (f"{due} stands for it" in said) == (due != stated)
    assert (
        main(
            [
                "predict",
                str(tmp_path / "run"),
                str(tmp_path / "rows.jsonl"),
                "-o",
                str(tmp_path / "out.jsonl"),
            ]
        )
        == 0
    )
    lines = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    found = np.array([[*line["probabilities"].values()] for line in lines])
    exported = transformers.AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "run" / "model"
    ).eval()
    assert exported.config.pad_token_id == due
    assert exported.config.id2label == {0: "even", 1: "odd"}
    reader = transformers.AutoTokenizer.from_pretrained(tmp_path / "run" / "model")
    for side in ("right", "left") if pad_token else ("alone",):
        with torch.no_grad():
            if side == "alone":  # a tokenizer without a padding token makes no batches
                logits = torch.cat([exported(**reader(text, return_tensors="pt")).logits for text in TEXTS])
            else:
                reader.padding_side = side
                logits = exported(**reader(TEXTS, padding=True, return_tensors="pt")).logits
        assert np.allclose(logits.softmax(-1).numpy(), found, atol=1e-5)
        assert [exported.config.id2label[i] for i in logits.argmax(-1).tolist()] == [
            line["label"] for line in lines
        ]


def test_texts_that_end_with_the_padding_token_are_told(tmp_path, capsys):
    model = decoder(tmp_path / "model", "</s>", ends=True)
    words = [
        "split",
        str(model),
        str(tmp_path / "halves"),
        "--cut",
        "1",
        "--head",
        "classification",
        "--labels",
        "2",
    ]
    assert main(words) == 0
    said = capsys.readouterr().err
    assert (
        "texts of this tokenizer end with its padding token 2: plain transformers reads the class off" in said
    )
    written = json.loads((tmp_path / "halves" / "server" / "config.json").read_text())
    assert written["pad_token_id"] == 2

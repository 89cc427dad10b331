"""Two halves -> one ordinary Hugging Face checkpoint, or a PEFT adapter, that load without hosl."""

import shutil
from collections.abc import Sequence
from copy import deepcopy
from pathlib import Path

import safetensors.torch
import torch

from hosl.errors import ConfigError
from hosl.split.adapters import ADAPTER, lora_layers
from hosl.split.halves import ClientHalf, ServerHalf
from hosl.system.atomic import whole_folder
from hosl.system.own_files import own_file

TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.txt", "vocab.json", "merges.txt",
)  # fmt: skip


def export_checkpoint(
    client_half: ClientHalf,
    server_half: ServerHalf,
    out: Path,
    *,
    tokenizer_folder: Path | None = None,
    labels: Sequence[str] | None = None,
) -> None:
    """Write `out`: config, safetensors and tokenizer of the whole model; adapters are merged into their weights.

    Tied weights that the cut separated and training changed apart are written untied (`tie_word_embeddings: false`).

    Raises:
        ConfigError: if the client half is low-precision: its original weights are gone.
        FolderError: if `out` exists and is not empty.
        FailureError: if the disk is full or cannot be written.
    """
    if client_half.hidden_dtype is not None:
        raise ConfigError(
            "a low-precision client half no longer has the weights of the model; `hosl export` puts its adapters on "
            "the original ones, export_adapter writes them alone"
        )
    tensors = merged_tensors(client_half) | merged_tensors(server_half)
    config = deepcopy(server_half.config)
    config.architectures = [type(server_half.model).__name__]
    if labels is not None:
        config.id2label = dict(enumerate(labels))
        config.label2id = {label: index for index, label in enumerate(labels)}
    ties = type(server_half.model)._tied_weights_keys or {}
    for tied, source in ties.items() if getattr(config, "tie_word_embeddings", False) else ():
        if torch.equal(tensors[tied], tensors[source]):
            del tensors[tied]
        else:
            config.tie_word_embeddings = False
    with whole_folder(out) as partial:
        config.save_pretrained(partial)
        safetensors.torch.save_file(tensors, partial / "model.safetensors", metadata={"format": "pt"})
        copy_tokenizer(tokenizer_folder, partial)


def export_adapter(client_half: ClientHalf, server_half: ServerHalf, out: Path) -> None:
    """Write the adapters of both halves to `out` as peft does, for `PeftModel.from_pretrained(base, out)`.

    Raises:
        FolderError: if `out` exists and is not empty.
        FailureError: if the disk is full or cannot be written.
    """
    import peft

    layers = lora_layers(client_half) | lora_layers(server_half)
    tensors = {}
    for name, layer in layers.items():
        for matrix in ("lora_A", "lora_B"):
            weight = getattr(layer, matrix)[ADAPTER].weight
            tensors[f"base_model.model.{name}.{matrix}.weight"] = weight.detach().contiguous().cpu()
    layer = next(iter(layers.values()))
    config = peft.LoraConfig(
        r=layer.r[ADAPTER],
        lora_alpha=layer.lora_alpha[ADAPTER],
        target_modules=sorted(layers),
        lora_dropout=0.0,
    )
    with whole_folder(out) as partial:
        config.save_pretrained(str(partial))
        safetensors.torch.save_file(tensors, partial / "adapter_model.safetensors", metadata={"format": "pt"})


def merged_tensors(half: ClientHalf | ServerHalf) -> dict[str, torch.Tensor]:
    """Copies of a half's tensors under their names in the whole model, with the adapters added to their weights."""
    layers = lora_layers(half)
    merged = {}
    with torch.no_grad():
        for name, tensor in half.state_dict().items():
            if ".lora_" in name:
                continue
            plain = name.replace(".base_layer.", ".")
            value = tensor.detach().clone().contiguous().cpu()
            owner, _, last = plain.rpartition(".")
            if owner in layers and last == "weight":
                value += layers[owner].get_delta_weight(ADAPTER).cpu().to(value.dtype)
            merged[plain] = value
    return merged


def copy_tokenizer(folder: Path | None, out: Path) -> None:
    """Copy those of `TOKENIZER_FILES` that `folder` has; None: none. Links out of the folder are refused."""
    for name in TOKENIZER_FILES:
        if folder is not None and own_file(folder, name).is_file():
            shutil.copyfile(folder / name, out / name)

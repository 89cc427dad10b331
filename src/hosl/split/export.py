"""Two halves -> one ordinary Hugging Face checkpoint, or a PEFT adapter, that load without hosl."""

import shutil
from collections.abc import Callable, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any, Literal

import safetensors.torch
import torch
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, revert_weight_conversion

from hosl.errors import ConfigError, FolderError
from hosl.split.adapters import ADAPTER, lora_layers
from hosl.split.halves import ClientHalf, Half, ServerHalf
from hosl.split.reading.skeleton import tied_names
from hosl.split.structure import submodule
from hosl.system.atomic import whole_folder
from hosl.system.own_files import is_own
from hosl.system.readable import readable_bytes

_LEFT_BEHIND = frozenset({
    ".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".onnx", ".onnx_data", ".gguf", ".ot", ".npz",
    ".npy", ".pkl", ".tflite", ".zip", ".tar", ".gz", ".py", ".pyc", ".so", ".csv", ".tsv", ".jsonl", ".ndjson",
    ".parquet", ".arrow",
})  # fmt: skip
"""The endings of files of a model's folder that an export does not carry."""
_OF_A_HALF = "half.json"
"""What `hosl split` writes of a half beside the model's own files."""
_CARRIED = ("*", "additional_chat_templates/*", "[0-9]_*/*")  # the last: modules of sentence-transformers


def export_model(
    client_half: ClientHalf,
    server_half: ServerHalf,
    out: Path,
    *,
    folder: Path,
    base: str | None,
    say: Callable[[str], None],
    command: str = "hosl export",
    labels: Sequence[str] | None = None,
    tie: Literal["embedding", "head"] | None = None,
    chat_template: Path | None = None,
) -> None:
    """Write `out` as `export_checkpoint` does; adapters also on their own, as `out`/adapter. All of it or nothing.

    Args and errors are those of `export_checkpoint` and `export_adapter`; `say` is called with lines for a person, in
    which `command` is the command to give. `chat_template` is the one that it was tuned with, where it was not the
    model's own: it takes that one's place.
    """
    with whole_folder(out) as partial:
        if chat_template is not None:  # first: what is there is not copied over
            partial.mkdir(parents=True, exist_ok=True)
            copy_chat_template(chat_template, partial)
        grown_bytes = _write(client_half, server_half, partial, folder=folder, labels=labels, tie=tie)
        if grown_bytes:
            say(
                f"head and embeddings were one tensor and differ now: {out} is {readable_bytes(grown_bytes)} larger "
                f"than the model; `{command} --tie embedding` or `--tie head` keeps one of the two"
            )
        if not (lora_layers(client_half) or lora_layers(server_half)):
            return
        try:
            export_adapter(client_half, server_half, partial / "adapter", base=base)
        except ConfigError as reason:
            say(f"no adapter beside the model: {reason}")


def export_checkpoint(
    client_half: ClientHalf,
    server_half: ServerHalf,
    out: Path,
    *,
    folder: Path | None = None,
    labels: Sequence[str] | None = None,
    tie: Literal["embedding", "head"] | None = None,
) -> int:
    """Write `out`: config, safetensors and tokenizer of the whole model; adapters are merged into their weights.

    Tied weights that the cut separated and training changed apart are written untied (`tie_word_embeddings: false`).

    Args:
        client_half: the client's half.
        server_half: the server's half; where the labels stay with the client `joined_server_half` of trunk and head.
        out: a folder to make.
        folder: the model's folder; all that it holds beside weights is copied. None: nothing is.
        labels: the names of the classes, in order.
        tie: the one of a tied model's two copies that stands for both, whatever training made of the other.

    Returns:
        The bytes by which the model has grown: those of a head that was tied and is so no more.

    Raises:
        ConfigError: if the client half is low-precision: its original weights are gone. Or if `tie` is asked of a model
            that is not tied.
        FolderError, FailureError: if `out` exists and is not empty, or cannot be written.
    """
    with whole_folder(out) as partial:
        return _write(client_half, server_half, partial, folder=folder, labels=labels, tie=tie)


def _write(
    client_half: ClientHalf,
    server_half: ServerHalf,
    out: Path,
    *,
    folder: Path | None,
    labels: Sequence[str] | None,
    tie: Literal["embedding", "head"] | None,
) -> int:
    """Fill the folder `out`; see `export_checkpoint`."""
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
        if getattr(config, "problem_type", None) is not None:
            config.problem_type = "single_label_classification"  # what was trained, whatever the head was for
    grown_bytes = 0
    ties = tied_names(server_half.model, config)
    if tie is not None and not ties:
        raise ConfigError(f"tie: {tie}: the head of this model is not tied to its embeddings; leave it out")
    for head, embedding in ties.items():
        if tie == "head":
            tensors[embedding] = tensors[head]
        if tie is not None or torch.equal(tensors[head], tensors[embedding]):
            del tensors[head]
        else:
            config.tie_word_embeddings = False
            grown_bytes += tensors[head].nbytes
    config.save_pretrained(out)
    stored = _as_stored(server_half.model, tensors)
    safetensors.torch.save_file(stored, out / "model.safetensors", metadata={"format": "pt"})
    copy_companions(folder, out)
    return grown_bytes


def _as_stored(model: Any, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors as checkpoints hold them: a layer's experts one by one, which transformers joins when it reads."""
    conversions = get_model_conversion_mapping(model, add_legacy=False)
    if not any(isinstance(c, WeightConverter) for c in conversions):
        return tensors
    return {name: t.contiguous().clone() for name, t in revert_weight_conversion(model, tensors).items()}


def export_adapter(
    client_half: ClientHalf,
    server_half: ServerHalf,
    out: Path,
    *,
    base: str | None = None,
) -> None:
    """Write all that was trained to `out` as peft does: adapters, and a classifier's head as `modules_to_save`.

    Args:
        client_half: the client's half, trained.
        server_half: the server's half, trained.
        out: a folder to make.
        base: the base model's folder or hub name, by which peft's AutoPeftModel classes find it.

    Raises:
        ConfigError: if other weights were trained too: an adapter would be another model.
        FolderError: if `out` exists and is not empty.
        FailureError: if the disk is full or cannot be written.
    """
    layers = lora_layers(client_half) | lora_layers(server_half)
    heads = _head_modules(server_half)
    trained = [
        n for half in (client_half, server_half) for n, p in half.named_parameters() if p.requires_grad
    ]
    beyond = [n for n in trained if ".lora_" not in n and not n.startswith(tuple(f"{h}." for h in heads))]
    if beyond:
        raise ConfigError(
            f"{len(beyond)} weights beside the adapters were trained, such as {beyond[0]}, which an adapter cannot "
            "hold; for an adapter set client.trainable and server.trainable to lora"
        )
    tensors = {
        f"base_model.model.{name}.{matrix}.weight": getattr(layer, matrix)[ADAPTER].weight
        for name, layer in layers.items()
        for matrix in ("lora_A", "lora_B")
    }
    for name in heads:
        weights = server_half.model.get_submodule(name).named_parameters(prefix=f"base_model.model.{name}")
        tensors |= dict(weights)
    config = _peft_config(layers, heads, base, "CAUSAL_LM" if server_half.head == "causal" else "SEQ_CLS")
    with whole_folder(out) as partial:
        config.save_pretrained(str(partial))
        stored = {name: p.detach().contiguous().cpu() for name, p in tensors.items()}
        safetensors.torch.save_file(stored, partial / "adapter_model.safetensors", metadata={"format": "pt"})


def _peft_config(layers: dict[str, Any], heads: list[str], base: str | None, task: str) -> Any:
    """The config with which peft loads these layers' adapters and these heads."""
    import peft

    ranks = {name: layer.r[ADAPTER] for name, layer in layers.items()}
    alphas = {name: layer.lora_alpha[ADAPTER] for name, layer in layers.items()}
    first = next(iter(layers))
    return peft.LoraConfig(
        task_type=task,
        base_model_name_or_path=base,
        r=ranks[first],
        lora_alpha=alphas[first],
        rank_pattern={name: rank for name, rank in ranks.items() if rank != ranks[first]},
        alpha_pattern={name: alpha for name, alpha in alphas.items() if alpha != alphas[first]},
        target_modules=sorted(layers),
        modules_to_save=heads or None,
        fan_in_fan_out=layers[first].fan_in_fan_out,
        lora_dropout=0.0,
        inference_mode=True,
    )


def _head_modules(half: ServerHalf) -> list[str]:
    """The modules of a classifier's head to save whole: its own, which peft always saves, and a trained pooler."""
    if half.head == "causal":
        return []
    modules = {name: submodule(half.model, name) for name in half.head_names}
    return [
        name
        for name, module in modules.items()
        if module is not None and ("." not in name or any(p.requires_grad for p in module.parameters()))
    ]


def merged_tensors(half: Half) -> dict[str, torch.Tensor]:
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


def copy_companions(folder: Path | None, out: Path) -> None:
    """Copy what a model's folder holds beside weights: tokenizer, chat templates, generation settings, licence.

    Left behind: weights of any format and their indexes; code, data and hidden files; what links lead to outside of
    the folder; what `out` has already. None: nothing is copied.
    """
    if folder is None:
        return
    for file in sorted(p for pattern in _CARRIED for p in folder.glob(pattern) if p.is_file()):
        copy = out / file.relative_to(folder)
        if not (_is_left_behind(file.name) or copy.exists()) and is_own(folder, file):
            copy.parent.mkdir(exist_ok=True)
            shutil.copyfile(file, copy)


def copy_chat_template(file: Path, out: Path) -> None:
    """Write a chat template where transformers looks for it first.

    Raises:
        FolderError: if it cannot be read: without it the model would be asked in another way than it was tuned.
    """
    try:
        (out / "chat_template.jinja").write_bytes(file.read_bytes())
    except OSError as cause:
        raise FolderError(
            f"task.chat_template {file}, with which this run was tuned, cannot be read: {cause.strerror}; put it back"
        ) from cause


def _is_left_behind(name: str) -> bool:
    return (
        name.startswith((".", "adapter_"))
        or name == _OF_A_HALF
        or name.endswith(".index.json")
        or Path(name).suffix in _LEFT_BEHIND
    )

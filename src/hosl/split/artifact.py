"""A split folder: client/ and server/, each with only its own tensors, read and written one tensor at a time.

    OUT/client/   config.json  half.json  model.safetensors  tokenizer  (head.safetensors: labels at the client)
    OUT/server/   config.json  half.json  model.safetensors

half.json names the side, family, cut and head, where the labels stay, the digests of the whole checkpoint and of both
sides' tensors, and the weights that the checkpoint did not hold. A head of the client that is tied is not written: its
weight is the embedding of model.safetensors, and half.json says `tied_head`.
"""

import json
from collections.abc import Collection
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import safetensors
import safetensors.torch
import torch
import transformers
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming

from hosl.errors import ModelError
from hosl.split.export import copy_companions
from hosl.split.families import Family, Head, family_of
from hosl.split.folder_facts import read_half_json
from hosl.split.halves import ClientHalf, ServerHalf, check_cut, cut_to_client_, cut_to_server_
from hosl.split.loading import checkpoint_digest, checkpoint_files, draw_weights_, resolve_model_folder
from hosl.split.streaming import Source, tensors_digest, write_tensors
from hosl.split.tokenizer import transformers_tokenizer
from hosl.split.u_shape import HeadHalf, TrunkHalf, cut_to_head_, cut_to_trunk_, tied_names
from hosl.system.atomic import whole_folder

_FORMAT = 1
Piece = Literal["client", "server", "head"]
LabelsAt = Literal["server", "client"]
_FILES: dict[Piece, str] = {
    "client": "client/model.safetensors", "server": "server/model.safetensors", "head": "client/head.safetensors",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class SplitInfo:
    """The summary of a split folder."""

    family: str
    cut: int
    base_digest: str
    """SHA-256 over the whole checkpoint's safetensors files."""
    client_bytes: int
    """The size of the client's tensors."""
    server_bytes: int
    """The size of the server's tensors."""

    def facts(self) -> dict[str, Any]:
        """The fields as plain data, for JSON."""
        return asdict(self)


def split_folder(
    model: str | Path,
    cut: int,
    out: Path,
    *,
    head: Head = "causal",
    num_labels: int | None = None,
    seed: int = 0,
    labels: LabelsAt = "server",
) -> SplitInfo:
    """Cut a checkpoint on disk into `out`/client and `out`/server, never holding more than one half.

    Args:
        model: a folder, a hub name, or the embedded model.
        cut: 0..n; the client keeps the embeddings and blocks 0..cut-1.
        out: must not exist, or be empty.
        head: the kind of top-level class that the checkpoint is read as.
        num_labels: the number of classes of a classification head.
        seed: the seed of weights that the checkpoint does not hold, such as a new head.
        labels: the side where the labels stay; `client` also puts final norm and head there, as
            OUT/client/head.safetensors.

    Raises:
        SplitError: if the family is unknown, or the cut outside 0..n.
        FolderError: if `out` exists and is not an empty folder.
        ModelError: if weights are missing or cut short, or the tokenizer is none that a device can read.
    """
    name = str(model)
    folder = resolve_model_folder(name)
    base_digest = checkpoint_digest(folder, name)
    config = transformers.AutoConfig.from_pretrained(folder)
    if num_labels is not None:
        config.num_labels = num_labels
    files = checkpoint_files(folder, name)
    sizes, digests, new_weights, tied_head = {}, {}, [], False
    with whole_folder(out) as partial:
        for side in ("client", "server"):
            (partial / side).mkdir()
            config.save_pretrained(partial / side)
        for piece in ("client", "server") if labels == "server" else ("client", "server", "head"):
            skeleton, _ = _piece(config, head, piece, cut, labels)
            tied = tied_names(skeleton, config) if piece == "head" else ()
            tied_head |= bool(tied)
            digests[piece], sizes[piece], drawn = _write_piece(
                skeleton, files, partial / _FILES[piece], name, seed, without=tied
            )
            new_weights += drawn
        for side in ("client", "server"):
            facts = {
                "format": _FORMAT, "side": side, "family": config.model_type, "head": head, "cut": cut,
                "labels": labels, "tied_head": tied_head, "base_digest": base_digest, "digest": digests[side],
                **{f"{piece}_digest": digest for piece, digest in digests.items()}, "new_weights": new_weights,
            }  # fmt: skip
            (partial / side / "half.json").write_text(json.dumps(facts, indent=2), encoding="utf-8")
        copy_companions(folder, partial / "client")
        if (folder / "tokenizer.json").is_file():  # its overrides applied, for a device without transformers
            transformers_tokenizer(folder).save(str(partial / "client" / "tokenizer.json"))
    client_bytes = sizes["client"] + sizes.get("head", 0)
    return SplitInfo(config.model_type, cut, base_digest, client_bytes, sizes["server"])


def load_half(folder: str | Path) -> ClientHalf | ServerHalf | TrunkHalf:
    """Load one side of a split folder, without ever allocating the other; bit for bit the half of `split_model`.

    Where the labels stay with the client, the server's half is a `TrunkHalf`; `load_head` loads the client's head.

    Raises:
        ModelError: if the folder is no half, or its tensors are not those that were written.
    """
    facts = _facts(Path(folder))
    kind = (
        ClientHalf if facts["side"] == "client" else TrunkHalf if facts["labels"] == "client" else ServerHalf
    )
    return kind(*_load_piece(Path(folder), facts, facts["side"]), facts["cut"])


def load_head(folder: str | Path, client_half: ClientHalf) -> HeadHalf:
    """Load the head of a client that keeps its labels; a tied head shares the embedding of `client_half`.

    `client_half` is left as it was: an embedding that is not trained stays frozen.

    Raises:
        ModelError: if the folder has no head, or its tensors are not those that were written.
    """
    facts = _facts(Path(folder))
    if facts["labels"] != "client" or facts["side"] != "client":
        raise ModelError(
            f"{folder} holds no head: the model was split for labels at the server; `hosl split --labels-at client`"
        )
    model, family = _load_piece(Path(folder), facts, "head", tied_to=client_half)
    return HeadHalf(model, family, facts["cut"])


def _facts(folder: Path) -> dict[str, Any]:
    facts = read_half_json(folder)
    if facts.get("format") != _FORMAT:
        raise ModelError(
            f"{folder}: half.json has format {facts.get('format')}, this version reads {_FORMAT}"
        )
    return {"labels": "server"} | facts


def _load_piece(
    folder: Path, facts: dict[str, Any], piece: Piece, *, tied_to: ClientHalf | None = None
) -> tuple[Any, Family]:
    config = transformers.AutoConfig.from_pretrained(folder)
    model, family = _piece(config, facts["head"], piece, facts["cut"], facts["labels"])
    file = folder / Path(_FILES[piece]).name
    try:
        tensors = safetensors.torch.load_file(file)
    except (OSError, safetensors.SafetensorError) as cause:
        raise ModelError(f"{file} cannot be read: {cause}; split the model again") from cause
    if tensors_digest(tensors) != facts[f"{piece}_digest" if piece == "head" else "digest"]:
        raise ModelError(f"{folder}: the tensors do not have the digest of half.json; split the model again")
    _restore_buffers_(model)
    shared: dict[str, torch.nn.Parameter] = {}
    if tied_to is not None and facts["tied_head"]:
        embeddings = dict(tied_to.named_parameters())
        shared = {name: embeddings[source] for name, source in tied_names(model, config).items()}
    frozen = [p for p in shared.values() if not p.requires_grad]
    model.load_state_dict(tensors | shared, assign=True)
    for p in model.parameters():
        p.requires_grad_(True)
    for p in frozen:  # the client half decides what it trains, but torch's assignment overwrote it
        p.requires_grad_(False)
    return model, family


def _piece(config: Any, head: Head, piece: Piece, cut: int, labels: LabelsAt) -> tuple[Any, Family]:
    """One piece of the model on the meta device: shapes and names, without memory."""
    model, family = _skeleton(config, head)
    check_cut(family, model, cut)
    match piece:
        case "client":
            cut_to_client_(model, family, cut)
        case "head":
            cut_to_head_(model, family)
        case "server":
            (cut_to_server_ if labels == "server" else cut_to_trunk_)(model, family, cut)
    return model, family


def _skeleton(config: Any, head: Head) -> tuple[Any, Family]:
    """The whole model on the meta device: shapes and names, without memory."""
    auto = (
        transformers.AutoModelForCausalLM
        if head == "causal"
        else transformers.AutoModelForSequenceClassification
    )
    with torch.device("meta"):
        model = auto.from_config(config)
    return model, family_of(config, type(model).__name__)


def _write_piece(
    skeleton: Any, files: list[Path], out: Path, name: str, seed: int, *, without: Collection[str]
) -> tuple[str, int, list[str]]:
    """Write the tensors of a piece; returns their digest, their bytes, and the names of those drawn anew."""
    locations = _locations(skeleton, files)
    sources, absent = [], []
    for tensor_name, tensor in skeleton.state_dict().items():
        if tensor_name in without:
            continue
        key = _key_in_checkpoint(skeleton, tensor_name, locations)
        source = None if key is None else _stored(tensor_name, *locations[key])
        if source is None or source.shape != tuple(tensor.shape):  # a head for other labels is drawn anew
            absent.append(tensor_name)
        else:
            sources.append(source)
    for tensor_name, tensor in _new_weights(skeleton, absent, name, seed).items():
        sources.append(Source(tensor_name, "F32", tuple(tensor.shape), lambda tensor=tensor: tensor))
    digest = write_tensors(out, sources)
    return digest, sum(source.size_bytes for source in sources), absent


def _stored(name: str, file: Path, stored_key: str) -> Source:
    """The source of the tensor `name`, which `file` holds as `stored_key`."""

    def read() -> torch.Tensor:
        with safetensors.safe_open(file, "pt") as content:
            return content.get_tensor(stored_key)

    with safetensors.safe_open(file, "pt") as content:
        part = content.get_slice(stored_key)
        return Source(name, part.get_dtype(), tuple(part.get_shape()), read)


def _locations(skeleton: Any, files: list[Path]) -> dict[str, tuple[Path, str]]:
    """The file of each tensor and its name there, by its name today: transformers has renamed some since."""
    renamings = [r for r in get_model_conversion_mapping(skeleton) if isinstance(r, WeightRenaming)]
    locations = {}
    for file in files:
        with safetensors.safe_open(file, "pt") as content:
            for stored_key in list(content.keys()):
                key = stored_key
                for renaming in renamings:
                    key, _ = renaming.rename_source_key(key)
                locations[key] = (file, stored_key)
    return locations


def _key_in_checkpoint(skeleton: Any, name: str, locations: dict[str, tuple[Path, str]]) -> str | None:
    """A tensor's key in `locations`: its own name or that of its tied twin, with or without the base model's prefix."""
    twin = (type(skeleton)._tied_weights_keys or {}).get(name)
    tied = getattr(skeleton.config, "tie_word_embeddings", False)
    for candidate in (name, twin if tied else None):
        if candidate is None:
            continue
        for key in (candidate, candidate.removeprefix(f"{skeleton.base_model_prefix}.")):
            if key in locations:
                return key
    return None


def _new_weights(skeleton: Any, absent: list[str], name: str, seed: int) -> dict[str, torch.Tensor]:
    """Draw the weights that the checkpoint does not hold, such as a new head: name -> float32 tensor.

    Raises:
        ModelError: if weights of the base model are absent.
    """
    prefix = f"{skeleton.base_model_prefix}."
    lost = [key for key in absent if key.startswith(prefix) and ".pooler." not in key]
    if lost:
        raise ModelError(
            f"model {name}: the checkpoint lacks {lost[0]} and {len(lost) - 1} more tensors of its own model, or has "
            "them in another shape than config.json says"
        )
    parameters = dict(skeleton.named_parameters())
    holder = torch.nn.Module()
    holder.config = skeleton.config
    for key in absent:
        owner, _, last = key.rpartition(".")
        child = holder
        for part in owner.split("."):
            if not hasattr(child, part):
                child.add_module(part, torch.nn.Module())
            child = child.get_submodule(part)
        child.register_parameter(
            last, torch.nn.Parameter(torch.empty(parameters[key].shape, dtype=torch.float32))
        )
    draw_weights_(holder, absent, seed)
    return {key: p.detach() for key, p in holder.named_parameters()}


def _restore_buffers_(model: Any) -> None:
    """Compute again the buffers that no file holds (rotary frequencies, position ids): the meta device lost them."""
    for module in model.modules():
        lost = [key for key, b in module._buffers.items() if b is not None and b.is_meta]
        for key in lost:
            b = module._buffers[key]
            module._buffers[key] = torch.zeros(b.shape, dtype=b.dtype)
        if lost:
            # transformers' own initialisation; parameters are still meta, so only buffers are filled
            model._init_weights(module)

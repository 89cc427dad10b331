"""A split folder: client/ and server/, each with only its own tensors, read and written one tensor at a time.

    OUT/client/   config.json  half.json  model.safetensors  tokenizer  (head.safetensors: labels at the client)
                  (onnx/: graphs for a device without torch, `hosl.split.onnx_export`)
    OUT/server/   config.json  half.json  model.safetensors

half.json names the side, family, cut, head and classes, where the labels stay, the digests of the whole checkpoint and
of both sides' tensors, and the weights that the checkpoint did not hold. A head of the client that is tied is not
written: its weight is the embedding of model.safetensors, and half.json says `tied_head`.
"""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import safetensors
import safetensors.torch
import torch

from hosl.errors import ModelError
from hosl.split.export import copy_companions
from hosl.split.families import Family, Head
from hosl.split.halves import ClientHalf, ServerHalf, check_cut, cut_to_client_, cut_to_server_
from hosl.split.reading.config_json import read_config
from hosl.split.reading.half_json import read_half_json
from hosl.split.reading.loading import open_pretrained
from hosl.split.reading.model_folder import resolve_model_folder
from hosl.split.reading.skeleton import fill_, skeleton, tied_names
from hosl.split.reading.tensors import tensors_digest, write_tensors
from hosl.split.reading.tokenizer import transformers_tokenizer
from hosl.split.reading.weight_files import checkpoint_digest
from hosl.split.specs import GraphSpec
from hosl.split.u_shape import HeadHalf, TrunkHalf, cut_to_head_, cut_to_trunk_
from hosl.system.atomic import whole_folder

_FORMAT = 1
Piece = Literal["client", "server", "head"]
LabelsAt = Literal["server", "client"]
SERVER_FILE = "server/model.safetensors"
_FILES: dict[Piece, str] = {
    "client": "client/model.safetensors", "server": SERVER_FILE, "head": "client/head.safetensors",
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
    notes: tuple[str, ...] = ()
    """What was passed over, replaced or drawn: lines for people."""

    def facts(self) -> dict[str, Any]:
        """The fields as plain data, for JSON; without the notes."""
        return {name: value for name, value in asdict(self).items() if name != "notes"}


def split_folder(
    model: str | Path,
    cut: int,
    out: Path,
    *,
    head: Head = "causal",
    num_labels: int | None = None,
    seed: int = 0,
    labels: LabelsAt = "server",
    graphs: GraphSpec | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> SplitInfo:
    """Cut a checkpoint on disk into `out`/client and `out`/server, never holding more than one half.

    Args:
        model: a folder, a GGUF file, a hub name, or an embedded model.
        cut: 0..n; the client keeps the embeddings and blocks 0..cut-1.
        out: must not exist, or be empty.
        head: the kind of top-level class that the checkpoint is read as.
        num_labels: the number of classes of a classification head.
        seed: the seed of weights that the checkpoint does not hold, such as a new head.
        labels: the side where the labels stay; `client` also puts final norm and head there, as
            OUT/client/head.safetensors.
        graphs: make OUT/client/onnx too, for a device without torch; None: do not.
        say: is called with a line of progress before each graph, which take about ten seconds each.

    Raises:
        SplitError: if the family is unknown, or the cut outside 0..n, or no graphs can be made.
        FolderError: if `out` exists and is not an empty folder.
        ModelError, ConfigError: if the model cannot be read, as in `load_model`, or a device cannot read the tokenizer.
    """
    name = str(model)
    folder = resolve_model_folder(name)
    config, whole, family, weights, notes = open_pretrained(
        name, folder, head=head, num_labels=num_labels, seed=seed
    )
    check_cut(family, whole, cut)
    base_digest = checkpoint_digest(folder, name)
    sizes, digests, tied_head = {}, {}, False
    with whole_folder(out) as partial:
        _make_sides(partial, config)
        for piece in ("client", "server") if labels == "server" else ("client", "server", "head"):
            part, _ = _piece(config, head, piece, cut, labels)
            tied = tied_names(part, config) if piece == "head" else ()
            tied_head |= bool(tied)
            sources = [weights.sources[key] for key in part.state_dict() if key not in tied]
            digests[piece] = write_tensors(partial / _FILES[piece], sources)
            sizes[piece] = sum(source.size_bytes for source in sources)
        for side in ("client", "server"):
            facts = {
                "format": _FORMAT, "side": side, "family": config.model_type, "head": head, "cut": cut,
                "labels": labels, "tied_head": tied_head, "base_digest": base_digest, "digest": digests[side],
                **{f"{piece}_digest": digest for piece, digest in digests.items()}, "new_weights": list(weights.new),
            } | ({"classes": config.num_labels} if head == "classification" else {})  # fmt: skip
            (partial / side / "half.json").write_text(json.dumps(facts, indent=2), encoding="utf-8")
        _add_companions(folder, partial / "client")
        if graphs is not None:
            _export_graphs(partial / "client", graphs, say)
    client_bytes = sizes["client"] + sizes.get("head", 0)
    return SplitInfo(config.model_type, cut, base_digest, client_bytes, sizes["server"], notes)


def _make_sides(folder: Path, config: Any) -> None:
    """Make the folders of both sides, with the model's config.json in each."""
    for side in ("client", "server"):
        (folder / side).mkdir()
        config.save_pretrained(folder / side)


def _add_companions(folder: Path, client: Path) -> None:
    copy_companions(folder, client)
    if (folder / "tokenizer.json").is_file():  # its overrides applied, for a device without transformers
        transformers_tokenizer(folder).save(str(client / "tokenizer.json"))


def _export_graphs(folder: Path, graphs: GraphSpec, say: Callable[[str], None]) -> None:
    from hosl.split.onnx_export import export_graphs  # its packages are an extra of their own

    half = load_half(folder)
    assert isinstance(half, ClientHalf)
    export_graphs(half, folder, graphs, _head_function(folder, half), say=say)


def _head_function(folder: Path, client_half: ClientHalf) -> Any:
    """The head of a client's folder as a function for graphs; None: the labels are at the server."""
    from hosl.split.onnx_export.head_functions import HeadFunction

    facts = _facts(folder)
    if facts["labels"] != "client":
        return None
    head = load_head(folder, client_half)
    tied = tied_names(head.model, read_config(folder, str(folder))) if facts["tied_head"] else {}
    return HeadFunction(head, tied)


def load_half(folder: str | Path, dtype: torch.dtype | None = None) -> ClientHalf | ServerHalf | TrunkHalf:
    """Load one side of a split folder, without ever allocating the other; bit for bit the half of `split_model`.

    Where the labels stay with the client, the server's half is a `TrunkHalf`; `load_head` loads the client's head.
    `dtype` is that of weights and buffers, as `load_model` makes them; None: weights as stored, buffers float32.

    Raises:
        ModelError: if the folder is no half, or its tensors are not those that were written.
    """
    facts = _facts(Path(folder))
    kind = (
        ClientHalf if facts["side"] == "client" else TrunkHalf if facts["labels"] == "client" else ServerHalf
    )
    return kind(*_load_piece(Path(folder), facts, facts["side"], dtype), facts["cut"])


def load_head(folder: str | Path, client_half: ClientHalf, dtype: torch.dtype | None = None) -> HeadHalf:
    """Load the head of a client that keeps its labels; a tied head shares the embedding of `client_half`.

    `dtype` is as in `load_half`; a tied weight has that of the embedding.
    `client_half` is left as it was: an embedding that is not trained stays frozen.

    Raises:
        ModelError: if the folder has no head, or its tensors are not those that were written.
    """
    facts = _facts(Path(folder))
    if facts["labels"] != "client" or facts["side"] != "client":
        raise ModelError(
            f"{folder} holds no head: the model was split for labels at the server; `hosl split --labels-at client`"
        )
    model, family = _load_piece(Path(folder), facts, "head", dtype, tied_to=client_half)
    return HeadHalf(model, family, facts["cut"])


def blank_half(
    folder: str | Path, piece: Piece, dtype: torch.dtype | None = None
) -> ClientHalf | ServerHalf | TrunkHalf:
    """A piece of a split model without memory, by the config.json and half.json of either side's folder.

    Raises:
        ModelError: if the folder is no half.
    """
    facts = _facts(Path(folder))
    config = read_config(Path(folder), str(folder))
    model, family = _piece(
        config, facts["head"], piece, facts["cut"], facts["labels"], dtype or torch.float32
    )
    of_server = TrunkHalf if facts["labels"] == "client" else ServerHalf
    kind = {"client": ClientHalf, "server": of_server, "head": HeadHalf}[piece]
    return kind(model, family, facts["cut"])


def server_half_of(
    folder: str | Path, tensors: dict[str, torch.Tensor], dtype: torch.dtype | None = None
) -> ServerHalf | TrunkHalf:
    """The server's half from its tensors by name, which came from the server; else as `load_half`.

    Args:
        folder: the client's folder of the same split.
        tensors: all of the half, and no other.
        dtype: as in `load_half`.

    Raises:
        ModelError: if the folder is no half, or the tensors are not those of the other one.
    """
    half: Any = blank_half(folder, "server", dtype)
    wrong = half.state_dict().keys() ^ tensors.keys()
    if wrong:
        raise ModelError(
            f"the server's half of {folder} has other tensors, such as {min(wrong)}; split again"
        )
    fill_(half.model, tensors if dtype is None else {name: t.to(dtype) for name, t in tensors.items()})
    return half


def client_elements(folder: str | Path) -> int:
    """The number of the elements of all tensors that the client's side of a split model has."""
    pieces: list[Piece] = ["client", "head"] if _facts(Path(folder))["labels"] == "client" else ["client"]
    halves = [blank_half(folder, piece) for piece in pieces]
    return sum(tensor.numel() for half in halves for tensor in half.state_dict().values())


def _facts(folder: Path) -> dict[str, Any]:
    facts = read_half_json(folder)
    if facts.get("format") != _FORMAT:
        raise ModelError(
            f"{folder}: half.json has format {facts.get('format')}, this version reads {_FORMAT}"
        )
    return {"labels": "server"} | facts


def _load_piece(
    folder: Path,
    facts: dict[str, Any],
    piece: Piece,
    dtype: torch.dtype | None,
    *,
    tied_to: ClientHalf | None = None,
) -> tuple[Any, Family]:
    config = read_config(folder, str(folder))
    model, family = _piece(
        config, facts["head"], piece, facts["cut"], facts["labels"], dtype or torch.float32
    )
    file = folder / Path(_FILES[piece]).name
    try:
        tensors = safetensors.torch.load_file(file)
    except (OSError, safetensors.SafetensorError) as cause:
        raise ModelError(f"{file} cannot be read: {cause}; split the model again") from cause
    if tensors_digest(tensors) != facts[f"{piece}_digest" if piece == "head" else "digest"]:
        raise ModelError(f"{folder}: the tensors do not have the digest of half.json; split the model again")
    if dtype is not None:
        tensors = {name: tensor.to(dtype) for name, tensor in tensors.items()}
    shared: dict[str, torch.nn.Parameter] = {}
    if tied_to is not None and facts["tied_head"]:
        embeddings = dict(tied_to.named_parameters())
        shared = {name: embeddings[source] for name, source in tied_names(model, config).items()}
    frozen = [p for p in shared.values() if not p.requires_grad]
    fill_(model, tensors | shared)
    for p in frozen:  # the client half decides what it trains, but torch's assignment overwrote it
        p.requires_grad_(False)
    return model, family


def _piece(
    config: Any, head: Head, piece: Piece, cut: int, labels: LabelsAt, dtype: torch.dtype = torch.float32
) -> tuple[Any, Family]:
    """One piece of the model on the meta device: shapes and names, without memory."""
    model, family = skeleton(config, head, dtype)
    check_cut(family, model, cut)
    match piece:
        case "client":
            cut_to_client_(model, family, cut)
        case "head":
            cut_to_head_(model, family)
        case "server":
            (cut_to_server_ if labels == "server" else cut_to_trunk_)(model, family, cut)
    return model, family

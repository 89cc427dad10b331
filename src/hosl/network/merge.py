"""`hosl merge`: one ordinary checkpoint out of the two halves of a run on two machines, on either of them.

On the device: its own half from its run's folder, the server's fetched. On the server: its own from the service's
folder, the client's from what the device gave by `hosl join --give-half`: its journal, replayed on the base half as a
resumed run does, or the weights that it trained. The same halves, so the same bytes on both.
"""

import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal

import msgspec
import safetensors
import safetensors.torch
import torch
from google.protobuf.json_format import ParseDict

from hosl.config import ClientConfig, Config, ModelConfig, ResidualConfig, load_begun_config
from hosl.core.journal import Journal
from hosl.errors import CheckpointError, ConfigError, FolderError, HandshakeError, WireError
from hosl.methods.torch_parties import DTYPES, check_device, make_client, prepare_server_half_
from hosl.network.half_transfer import fetch_half
from hosl.network.handshake import config_of
from hosl.parties.clients.zeroth_order import ZerothOrderClient
from hosl.parties.engine.perturbation import trained_parameters
from hosl.service.giving import given_of
from hosl.service.operation.stored import checkpoints_below, stored_handshake, stored_runs
from hosl.split import (
    ClientHalf,
    HeadHalf,
    ServerHalf,
    TrunkHalf,
    add_lora,
    load_half,
    load_head,
    split_folder,
)
from hosl.split.artifact import blank_half, server_half_of
from hosl.split.export import export_model
from hosl.split.gguf_export import check_gguf
from hosl.split.reading.half_json import half_facts
from hosl.split.reading.model_folder import adapter_base, resolve_model_folder
from hosl.split.reading.tensors import tensors_digest
from hosl.split.reading.weight_files import checkpoint_digest
from hosl.split.specs import LoraSpec
from hosl.split.u_shape import joined_server_half
from hosl.system.checkpoint import Checkpoint, newest_intact
from hosl.system.readable import readable_bytes
from hosl.system.run_folder import RunLock, read_record
from hosl.tasks import labels_digest, own_chat_template
from hosl.training.checkpointing import restore_client_, restore_weights_
from hosl.transport.channel import Patience, Proof, connect
from hosl.transport.join_line import JoinLine
from hosl.wire import hosl_pb2 as pb
from hosl.wire.enums import from_enum
from hosl.wire.halves import JOURNAL, HalfListing

Tie = Literal["embedding", "head"]
Say = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class MergeOptions:
    """The arguments of `hosl merge` that both machines have."""

    out: Path
    """A folder to make."""
    tie: Tie | None = None
    """The copy that stands for both where head and embeddings were one tensor; None: they are two if they differ."""
    client_half: Path | None = None
    """OUT/client of `hosl split`; None: where the run says, or from `base`."""
    base: str | None = None
    """The model that was split, for tokenizer and templates; on the server also for the client's base half."""
    gguf: Path | None = None
    """A GGUF file that will be made of it; refused ahead of the work where it cannot be."""


@dataclass(frozen=True)
class _Whole:
    """The pieces of a model with their newest weights, and what is written beside them."""

    client: ClientHalf
    server: ServerHalf | TrunkHalf
    head: HeadHalf | None
    step: int
    labels: Sequence[str] | None
    folder: Path
    """The folder whose tokenizer and templates are copied."""
    base: str | None
    chat_template: Path | None = None
    """The chat template that the run was tuned with, where it was not the model's own."""


# ---- on the device ----


def merge_on_device(
    run: Path, line: JoinLine, options: MergeOptions, say: Say, *, proof: Proof | None = None
) -> dict[str, Any]:
    """Fetch the server's half of a run of `hosl join`, and write the whole model; returns what was written.

    What was fetched stays in `run`/server-half until the model is written: the same command goes on from there.

    Raises:
        FolderError: if `run` is no such run, or the folder to make is taken.
        AccessError: if the server keeps its half. HandshakeError: if the client took no part in the run.
        CheckpointError: if the run's checkpoints are damaged, or the server lacks the newest one's step.
    """
    _check_free(options.out)
    record = _joined_record(run)
    with RunLock(run):
        config = load_begun_config(run / "config.yaml", record, warn=False)
        check_device(config.client.device, "client.device")
        folder = options.client_half or Path(record["model"]["source"])
        facts = _client_facts(folder, record["model"]["digest"])
        _check_options(options, facts)
        checkpoint = newest_intact(run / "checkpoints", say, weights_only=True)
        if checkpoint is None:
            raise FolderError(f"{run} has no checkpoint yet; merge it when it has saved one")
        channel = connect(
            line, patience=Patience(connect_s=config.wire.connect_s, idle_s=config.wire.idle_s),
            proof=proof or Proof(), known=False, say=say,
        )  # fmt: skip
        check = _expected(config, folder, facts)
        try:
            step = checkpoint.step if config.clients.alone else 0
            listing, file = fetch_half(channel, record["run_id"], step, run / "server-half", check, say)
        finally:
            channel.close()
        tensors = _by_place(file)
        whole = _Whole(
            client=(client := _client_of_run(config, folder, checkpoint, tensors.get(JOURNAL, {}))).half,
            server=_server_half(config, folder, facts, tensors),
            head=_head(config, folder, client.half, checkpoint.tensors.get("client/head", {})),
            step=listing.step, labels=_class_names(record), folder=_companions(options, folder),
            base=_base_of(options.base, config), chat_template=own_chat_template(config.task),
        )  # fmt: skip
        _say_digest(client.trained, _digest_of_record(record, client), say)
        result = _written(whole, options, say)
        shutil.rmtree(run / "server-half", ignore_errors=True)
        return {"run": str(run), **result}


def _joined_record(run: Path) -> dict[str, Any]:
    record = read_record(run)
    if record is None or "run_id" not in record:
        raise FolderError(
            f"{run} is no run of `hosl join`: both halves of a run of `hosl train` are here, `hosl export {run} OUT` "
            "merges them"
        )
    return record


def _client_facts(folder: Path, base_digest: str) -> dict[str, Any]:
    if not (folder / "half.json").is_file():
        raise FolderError(f"{folder} is not there; give --client-half, the folder OUT/client of `hosl split`")
    facts = half_facts(folder, "client")
    if facts["base_digest"] != base_digest:
        raise HandshakeError(
            f"{folder} is of a model with the digest {facts['base_digest'][:12]}, the run is of one with "
            f"{base_digest[:12]}; give the run's own half by --client-half"
        )
    return facts


def _client_of_run(
    config: Config, folder: Path, checkpoint: Checkpoint, journal: dict[str, torch.Tensor]
) -> Any:
    """The client party of a run at its newest state, on the base weights as the model has them."""
    client = make_client(config, _client_half(folder, config), low_precision=False)
    if config.clients.halves == "shared":
        if isinstance(client, ZerothOrderClient):
            client.replay(Journal.from_bytes(_bytes(journal)))
        return client
    restore_client_(client, checkpoint)
    return client


def _expected(config: Config, folder: Path, facts: dict[str, Any]) -> Callable[[HalfListing], None]:
    """A check of the list of a server's half against the shapes of this split and these settings."""
    half: Any = blank_half(folder, "server", DTYPES[config.model.dtype])
    base = {name: tuple(tensor.shape) for name, tensor in half.state_dict().items()}
    prepare_server_half_(config, half, facts.get("new_weights", ()))
    trained = {name: tuple(p.shape) for name, p in trained_parameters(half.model).items()}
    due = {
        "trained": trained,
        "base": {name: base[name] for name in base.keys() - trained.keys()},
        "head": {},
    }
    stored = {"float32": "F32", "bfloat16": "BF16"}[config.model.dtype]

    def check(listing: HalfListing) -> None:
        for place, shapes in due.items():
            named = listing.named(place)
            wrong = {
                name for name in shapes.keys() | named.keys()
                if name not in named or named[name].shape != shapes.get(name)
                or named[name].dtype not in ((stored,) if place == "trained" else ("F64", "F32", "F16", "BF16"))
            }  # fmt: skip
            if wrong:
                raise WireError(
                    f"the server's half is another one than the settings of this run say: {place}/{min(wrong)} is "
                    "missing, too much, or of another shape or dtype"
                )
        if any(tensor.name == JOURNAL for tensor in listing.tensors) and config.clients.halves != "shared":
            raise WireError("the server's half comes with a journal, which only shared halves have")

    return check


def _server_half(
    config: Config, folder: Path, facts: dict[str, Any], tensors: dict[str, dict[str, torch.Tensor]]
) -> ServerHalf | TrunkHalf:
    """The server's half with its trained weights, from tensors that were fetched."""
    base, trained = tensors.get("base", {}), tensors.get("trained", {})
    names = blank_half(folder, "server").state_dict().keys()
    whole = base | {name: tensor for name, tensor in trained.items() if name in names}
    half = server_half_of(folder, whole, DTYPES[config.model.dtype])
    prepare_server_half_(config, half, facts.get("new_weights", ()))
    restore_weights_(trained_parameters(half.model), trained)
    return half


def _digest_of_record(record: dict[str, Any], client: Any) -> str | None:
    """The digest of the client's half at the end of the run, if this is its state."""
    updates = record.get("journal_updates")
    if updates is not None and updates != client.journal.last_step:
        return None  # other devices made updates after this one's last step
    return record.get("client_digest") if record.get("finished") else None


# ---- on the server ----


def merge_on_server(
    service: Path,
    half: Path,
    run: str,
    options: MergeOptions,
    say: Say,
    *,
    client: str | None = None,
    labels: Sequence[str] | None = None,
) -> dict[str, Any]:
    """Put a client's half to the server's, and write the whole model; returns what was written.

    Args:
        service: the folder of the service.
        half: OUT/server of `hosl split`.
        run: the run's name, as `hosl runs ls` shows it.
        options: `base` or `client_half` tells where the client's base weights are.
        say: is called with lines of text.
        client: whose half it is; None: the only one that was given.
        labels: the names of the classes, which do not cross; None: those of the model.

    Raises:
        ConfigError: if there is no such run, or it is not told whose half is meant or where its base is.
        HandshakeError: if half or base are of another model. CheckpointError: if a file is damaged.
    """
    _check_free(options.out)
    model, training = _handshake(service / "runs", run)
    facts = half_facts(half, "server")
    if facts["server_digest"] != model.server_digest or facts["base_digest"] != model.base_digest:
        raise HandshakeError(
            f"{half} is another half than the one that run {run} was trained with; give that one"
        )
    _check_options(options, facts)
    _check_labels(labels, facts, training)
    if client is None and training.personal_server:
        client = _only_one(given_of(service / "runs", run), run)
    state = _server_state(service / "runs" / run, training, client or "", say)
    given, step, file = _given(service / "runs", run, client, training)
    if (training.clients <= 1 or training.personal_server) and step != state.step:
        raise CheckpointError(
            f"the half that was given is of step {step}, the server's of {state.step}: the device gives its newest by "
            "the same `hosl join --give-half`"
        )
    config = _with_client(config_of(model, training, device="cpu"), given)
    server: Any = load_half(half, DTYPES[config.model.dtype])
    prepare_server_half_(config, server, facts.get("new_weights", ()))
    restore_weights_(trained_parameters(server.model), state.tensors["server/trained"])
    with _client_folder(options, facts, config) as folder:
        tensors = {} if file is None else _by_place(file)
        shared = training.halves == pb.SHARED
        journal = (state.journal or b"") if shared else _bytes(tensors.get(JOURNAL, {}))
        of_client, trained = _given_client(config, folder, journal, tensors.get("trained", {}))
        at_its_end = not shared or Journal.from_bytes(journal).last_step == given.updates
        _say_digest(trained, given.digest.hex() if at_its_end and given.digest else None, say)
        whole = _Whole(
            client=of_client, server=server, head=_head(config, folder, of_client, tensors.get("head", {})),
            step=state.step, labels=labels, folder=_companions(options, folder),
            base=_base_of(options.base, config),
        )  # fmt: skip
        return {"run": run, **_written(whole, options, say)}


def _server_state(run: Path, training: pb.Training, client: str, say: Say) -> Checkpoint:
    """The newest checkpoint of the server's half of a run that a client trained."""
    state = newest_intact(checkpoints_below(run, training, client), say, weights_only=True)
    if state is None:
        raise FolderError(
            f"run {run.name} has no checkpoint on this server yet; merge it when it has saved one"
        )
    return state


def _handshake(runs: Path, run: str) -> tuple[pb.Model, pb.Training]:
    stored = stored_handshake(runs, run)
    if stored is None:
        names = [name for name, _ in stored_runs(runs)]
        raise ConfigError(f"no run is called {run}; there are {', '.join(names) or 'none'}")
    return ParseDict(stored["model"], pb.Model()), ParseDict(stored["training"], pb.Training())


def _check_labels(labels: Sequence[str] | None, facts: dict[str, Any], training: pb.Training) -> None:
    if labels is None:
        return
    if len(labels) != facts.get("classes"):
        raise ConfigError(
            f"--labels names {len(labels)} classes, the model has {facts.get('classes', 'none')}"
        )
    if training.labels_digest and labels_digest(list(labels)) != training.labels_digest:
        raise ConfigError("--labels are not the classes that the devices trained, or not in their order")


def _given(
    runs: Path, run: str, client: str | None, training: pb.Training
) -> tuple[pb.Given, int, Path | None]:
    """What the client said of its half, its step, and the file of its tensors."""
    given = given_of(runs, run)
    if client is None and training.halves == pb.SHARED:
        client = next(iter(given), None)  # whoever tells: the halves are one
    client = client or _only_one(given, run)
    if client not in given:
        raise ConfigError(
            f"client {client} gave no half of run {run}; there are {', '.join(given) or 'none'}"
        )
    return given[client]


def _only_one(given: dict[str, Any], run: str) -> str:
    """The only client that gave its half."""
    if len(given) == 1:
        return next(iter(given))
    names = f"those of {', '.join(given)}: say whose by --client" if given else "none"
    raise ConfigError(
        f"run {run} needs its client's half, and this server has {names}; a device gives its own by "
        "`hosl join --give-half`, after a finished run, too"
    )


def _with_client(config: Config, given: pb.Given) -> Config:
    """The config with what the client said of its half; the method's name is that of its twin on the wire."""
    lora = LoraSpec(
        r=given.lora.r, alpha=given.lora.alpha, target_modules=tuple(given.lora.target_modules) or None
    )
    weights: Any = from_enum(pb.Given.Weights, given.weights)
    client = ClientConfig(trainable=weights, lora=lora, dtype="int8" if given.low_precision else "model")
    residual = ResidualConfig(blocks=given.blocks or None)
    return msgspec.structs.replace(config, client=client, residual=residual)


def _given_client(
    config: Config, folder: Path, journal: bytes, tensors: dict[str, torch.Tensor]
) -> tuple[ClientHalf, dict[str, torch.nn.Parameter]]:
    """The client's half from its base weights and what it gave, and its trained weights by name."""
    half = _client_half(folder, config)
    if not tensors:  # a journal, which may be empty; or a client that is frozen
        client: Any = make_client(config, half, low_precision=False)
        if isinstance(client, ZerothOrderClient):
            client.replay(Journal.from_bytes(journal))
        return half, client.trained
    if config.client.trainable == "lora":
        adapters = None if config.client.dtype == "model" else torch.float32
        blocks: Any = config.residual.blocks  # as given: the method on the wire is one of all blocks
        add_lora(half, config.client.lora, seed=config.seed, dtype=adapters, blocks=blocks)
    parameters = dict(half.named_parameters())
    wrong = [n for n, t in tensors.items() if n not in parameters or parameters[n].shape != t.shape]
    if wrong:
        raise CheckpointError(
            f"the half that was given has {wrong[0]}, which is no weight of the client's half"
        )
    for name, p in parameters.items():
        p.requires_grad_(name in tensors)
    trained = trained_parameters(half.model)
    restore_weights_(trained, tensors)
    return half, trained


@contextmanager
def _client_folder(options: MergeOptions, facts: dict[str, Any], config: Config) -> Iterator[Path]:
    """The folder of the client's half at its base weights: the given one, or one that is split from the base model."""
    if options.client_half is not None:
        _client_facts(options.client_half, facts["base_digest"])
        yield options.client_half
        return
    if options.base is None:
        raise ConfigError(
            "the client's base weights are not here: give --base, the model that was split, or --client-half"
        )
    split = options.out.with_name(f".{options.out.name}.split")
    shutil.rmtree(split, ignore_errors=True)  # left by a process that was killed
    try:
        split_folder(
            options.base, facts["cut"], split, head=facts["head"], num_labels=facts.get("classes"),
            seed=config.seed, labels=facts.get("labels", "server"),
        )  # fmt: skip
        yield split / "client"
    finally:
        shutil.rmtree(split, ignore_errors=True)


# ---- both ----


def _client_half(folder: Path, config: Config) -> ClientHalf:
    half = load_half(folder, DTYPES[config.model.dtype])
    assert isinstance(half, ClientHalf), "half.json was checked to be a client's"
    return half


def _head(
    config: Config, folder: Path, client: ClientHalf, tensors: dict[str, torch.Tensor]
) -> HeadHalf | None:
    """The client's head, where the labels stay with it; None: the head is the server's."""
    if half_facts(folder, "client").get("labels", "server") == "server":
        return None
    head = load_head(folder, client, DTYPES[config.model.dtype])
    parameters = dict(head.named_parameters())
    wrong = [n for n, t in tensors.items() if n not in parameters or parameters[n].shape != t.shape]
    if wrong:
        raise CheckpointError(f"the client's head has {wrong[0]}, which is no weight of this model's head")
    restore_weights_({name: parameters[name] for name in tensors}, tensors)
    return head


def _by_place(file: Path) -> dict[str, dict[str, torch.Tensor]]:
    """The tensors of a half that was given away: place -> name in the model -> tensor. The journal's name is empty."""
    places = dict[str, dict[str, torch.Tensor]]()
    try:
        tensors = safetensors.torch.load_file(file)
    except (OSError, safetensors.SafetensorError) as cause:
        raise CheckpointError(f"{file} cannot be read: {cause}; give or fetch the half again") from cause
    for key, tensor in tensors.items():
        place, _, name = key.partition("/")
        places.setdefault(place, {})[name] = tensor
    return places


def _bytes(journal: dict[str, torch.Tensor]) -> bytes:
    return bytes(journal[""].numpy()) if journal else b""


def _companions(options: MergeOptions, folder: Path) -> Path:
    return folder if options.base is None else resolve_model_folder(options.base)


def _base_of(base: str | None, config: Config) -> str | None:
    """The name of the base in an adapter's config; None: nobody named the model."""
    name = base or config.model.name
    if base is None and (name == ModelConfig().name or not Path(name).is_dir()):
        return name if "/" in name and not Path(name).is_absolute() else None
    return adapter_base(name, resolve_model_folder(name))


def _class_names(record: dict[str, Any]) -> Sequence[str] | None:
    task = record.get("task", {})
    return task.get("labels") if task.get("head") == "classification" else None


def _say_digest(trained: dict[str, torch.nn.Parameter], due: str | None, say: Say) -> None:
    """Say whether the client's half is bit for bit the one at the end of its run."""
    found = tensors_digest({name: p.detach().cpu() for name, p in trained.items()})
    if due is None:
        say(
            f"the client's half has the digest {found[:12]}; its run's end is not known here, so it is not compared"
        )
    elif found != due:
        say(
            f"the client's half has the digest {found}, at the end of its run it had {due}: another machine's "
            "arithmetic; the model is written, and is not the same to the bit"
        )


def _check_free(out: Path) -> None:
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise FolderError(
            f"{out} exists and is not empty; nothing is overwritten: choose another folder, or empty it"
        )


def _check_options(options: MergeOptions, facts: dict[str, Any]) -> None:
    """Refuse a GGUF file that cannot be made, and another base than the model that was split."""
    if options.gguf is not None:
        check_gguf(facts["family"], options.gguf)
    if options.base is None:
        return
    digest = checkpoint_digest(resolve_model_folder(options.base), options.base)
    if digest != facts["base_digest"]:  # its tokenizer and templates would stand beside the weights
        raise HandshakeError(
            f"--base {options.base} has the digest {digest[:12]}, the run is of a model with "
            f"{facts['base_digest'][:12]}; give the model that was split"
        )


def _written(whole: _Whole, options: MergeOptions, say: Say) -> dict[str, Any]:
    out, server = options.out, whole.server
    if isinstance(server, TrunkHalf):
        assert whole.head is not None, "labels stayed with the client"
        server = joined_server_half(server, whole.head)
    export_model(
        whole.client, server, out, folder=whole.folder, base=whole.base, say=say, command="hosl merge",
        labels=whole.labels, tie=options.tie, chat_template=whole.chat_template,
    )  # fmt: skip
    file, adapter = out / "model.safetensors", out / "adapter"
    digest = sha256()
    with file.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    beside = f", its adapters in {adapter}" if adapter.is_dir() else ""
    say(
        f"{out}: both halves of step {whole.step} as one model, {readable_bytes(file.stat().st_size)}{beside}"
    )
    return {
        "out": str(out), "step": whole.step, "model_bytes": file.stat().st_size, "digest": digest.hexdigest(),
        "adapter": str(adapter) if adapter.is_dir() else None,
    }  # fmt: skip

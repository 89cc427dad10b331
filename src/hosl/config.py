"""The run's schema: what a YAML file may say, with defaults, limits and the nearest right name for a wrong one.

Each component's own settings stand with the component (`OptimiserSpec`, `LoraSpec`, the task configs); this file
composes them. Names follow TRL and axolotl where they have one. Reading it imports neither torch nor transformers.
"""

import difflib
import re
import types
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import msgspec
import yaml

from hosl.core.directions import Law
from hosl.core.step_control import Normalise
from hosl.errors import ConfigError
from hosl.parties.optimisers import OptimiserSpec
from hosl.split.specs import LoraSpec
from hosl.tasks import DocstringsConfig, TaskConfig

Method = Literal["hosl", "hosl-gradient", "fo-fo", "fo-recompute", "zo-zo", "fo-zo", "frozen"]


class ModelConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Which model, and where it is cut."""

    name: str = "all-MiniLM-L6-v2"
    """The embedded all-MiniLM-L6-v2, a local folder (environment variables allowed), or a hub name."""
    cut: int = 3
    """The client keeps the embeddings and blocks 0..cut-1."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the weights of both halves."""

    def __post_init__(self) -> None:
        if self.cut < 0:
            raise ConfigError(
                f"model.cut must be >= 0, got {self.cut}; 0 keeps only the embeddings on the client"
            )


class ZOConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Zeroth-order estimation, on whichever half is trained by probes."""

    directions: int = 10
    """Q, the directions (pairs of forward passes) per step."""
    epsilon: float = 1e-3
    """Perturbation scale: the loss is evaluated at theta +- epsilon u."""
    law: Law = "gaussian"
    """gaussian (the paper), rademacher (cheaper), sphere (the authors' code), low-rank (rank one, of signs)."""
    clip: float | None = None
    """Limit of a coefficient: this multiple of the running median of |c|, such as 5.0; none by default."""
    normalise: Normalise = "none"
    """spread: a step's coefficients are divided by their standard deviation (FZOO); wants another learning rate."""

    def __post_init__(self) -> None:
        if self.clip is not None and not self.clip > 0:
            raise ConfigError(f"zo.clip must be > 0, got {self.clip}; 5.0 is mild, null turns it off")
        if self.normalise == "spread" and self.directions < 2:
            raise ConfigError(
                f"zo.normalise: spread needs zo.directions of 2 or more, got {self.directions}: one coefficient has no "
                "spread"
            )
        if self.directions < 1:
            raise ConfigError(f"zo.directions must be >= 1, got {self.directions}")
        if not 0 < self.epsilon < 1:
            raise ConfigError(f"zo.epsilon must lie between 0 and 1, got {self.epsilon}; 1.0e-3 is usual")


class ClientConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The half on the device."""

    trainable: Literal["all", "blocks", "lora"] = "blocks"
    """all: every weight. blocks: the embeddings stay as they are. lora: adapters only."""
    learning_rate: float = 1e-6
    """eta_c of the client's update; a first-order client wants about a thousand times more."""
    optimiser: OptimiserSpec = OptimiserSpec()
    """Of a first-order client; a zeroth-order one is plain SGD, and so is that of fo-recompute."""
    micro_batch_rows: int | None = None
    """Of fo-recompute: rows for which a block is computed again at once; null: all of a batch."""
    lora: LoraSpec = LoraSpec()
    """Used when trainable is lora."""
    dtype: Literal["model", "bfloat16", "int8"] = "model"
    """Of the client's frozen weights; adapters stay float32. model: as model.dtype."""
    device: str = "cpu"
    """A torch device."""

    def __post_init__(self) -> None:
        if not self.learning_rate >= 0:
            raise ConfigError(f"client.learning_rate must be >= 0, got {self.learning_rate}")
        if self.micro_batch_rows is not None and self.micro_batch_rows < 1:
            raise ConfigError(f"client.micro_batch_rows must be >= 1 or null, got {self.micro_batch_rows}")


class ServerConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The half on the machine with compute."""

    trainable: Literal["all", "lora"] = "all"
    """all: every weight, the head included. lora: adapters, and the head of a classifier."""
    learning_rate: float = 1e-3
    """eta_s."""
    optimiser: OptimiserSpec = OptimiserSpec()
    """Of a first-order server; a zeroth-order one is plain SGD."""
    lora: LoraSpec = LoraSpec()
    """Used when trainable is lora."""
    device: str = "cpu"
    """A torch device."""

    def __post_init__(self) -> None:
        if not self.learning_rate >= 0:
            raise ConfigError(f"server.learning_rate must be >= 0, got {self.learning_rate}")


class WireConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What goes over the network of `hosl join`, and how long it may take."""

    compression: Literal["none", "bf16", "int8"] = "none"
    """Of the activations on their way up."""
    labels: Literal["server", "client"] = "server"
    """server: the scored targets travel. client: norm and head live on the device, label values never cross."""
    connect_s: float = 10.0
    """For the first connection; later ones are tried for ever."""
    idle_s: float = 60.0
    """Without any sign of life from the server before the connection is given up and made again."""

    def __post_init__(self) -> None:
        for name in ("connect_s", "idle_s"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"wire.{name} must be > 0 seconds, got {getattr(self, name)}")


class ClientsConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Several devices that train one server half (`hosl join` on each)."""

    count: int = 1
    """How many devices take part."""
    halves: Literal["personal", "shared"] = "personal"
    """personal: each keeps its own client half. shared: all stay equal, by one journal that the server relays."""
    schedule: Literal["sequential", "synchronous"] = "sequential"
    """sequential: each step is applied as it comes. synchronous: one server update per round over all."""
    grace_s: float = 30.0
    """How long a synchronous round waits for the others after its first contribution."""
    directions: Literal["own", "common"] = "own"
    """Shared halves: whether every device draws its own directions, or all the same."""

    def __post_init__(self) -> None:
        if self.count < 1:
            raise ConfigError(f"clients.count must be >= 1, got {self.count}")
        if not self.grace_s > 0:
            raise ConfigError(f"clients.grace_s must be > 0 seconds, got {self.grace_s}")


class Config(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One fine-tuning run of a split model."""

    output_dir: str = "runs/hosl"
    """The run's folder; made by the run, never overwritten."""
    method: Method = "hosl"
    """hosl: the paper. hosl-gradient: the server returns dL/dh once. Baselines: fo-fo, fo-recompute (fo-fo in little
    memory), zo-zo, fo-zo, frozen."""
    profile: Literal["paper", "authors-head"] = "paper"
    """paper: as written. authors-head: as the authors' published code runs (docs/algorithm.md)."""
    seed: int = 0
    """Of the data order, the directions, new heads and adapters."""
    model: ModelConfig = ModelConfig()
    task: TaskConfig = DocstringsConfig()
    zo: ZOConfig = ZOConfig()
    client: ClientConfig = ClientConfig()
    server: ServerConfig = ServerConfig()
    wire: WireConfig = WireConfig()
    clients: ClientsConfig = ClientsConfig()
    max_steps: int = 300
    """Steps of the run; a step is one server update."""
    per_device_train_batch_size: int = 16
    """Examples per step."""
    per_device_eval_batch_size: int = 64
    """Rows per forward pass in evaluation; a row is one candidate answer."""
    lr_scheduler_type: Literal["constant", "linear", "cosine"] = "constant"
    """Of both halves; linear and cosine end at 0."""
    warmup_steps: int = 0
    """Steps over which both learning rates rise from 0."""
    eval_steps: int = 100
    """Evaluate on dev every so many steps, and at the end."""
    save_steps: int = 100
    """Write a checkpoint every so many steps, and at the end."""
    snapshot_steps: int = 500
    """Between snapshots of a zeroth-order client's weights its checkpoints hold the journal only."""
    report_to: tuple[Literal["tensorboard", "wandb", "trackio"], ...] = ()
    """Experiment trackers to feed, beside metrics.jsonl."""

    def __post_init__(self) -> None:
        for name in ("max_steps", "per_device_train_batch_size", "per_device_eval_batch_size", "eval_steps"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be >= 1, got {getattr(self, name)}")
        for name in ("save_steps", "snapshot_steps"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be >= 1, got {getattr(self, name)}")
        if not 0 <= self.warmup_steps <= self.max_steps:
            raise ConfigError(
                f"warmup_steps must lie in 0..max_steps={self.max_steps}, got {self.warmup_steps}"
            )
        if self.profile == "authors-head":
            self._check_authors_head()
        self._check_recomputing()
        self._check_client_dtype()
        self._check_clients()

    def _check_recomputing(self) -> None:
        client = self.client
        if self.method != "fo-recompute" and client.micro_batch_rows is not None:
            raise ConfigError(
                f"client.micro_batch_rows is for method fo-recompute, method is {self.method}; leave it out"
            )
        if self.method == "fo-recompute" and client.optimiser != OptimiserSpec():
            raise ConfigError(
                "method fo-recompute updates each block inside backward by plain SGD and keeps no state, got "
                f"client.optimiser {_told(client.optimiser)}; leave client.optimiser out, or use fo-fo"
            )

    def _check_client_dtype(self) -> None:
        dtype, trainable = self.client.dtype, self.client.trainable
        if dtype == "model":
            return
        if self.method != "frozen" and trainable != "lora":
            raise ConfigError(
                f"client.dtype: {dtype} is for weights that stay as they are, but method {self.method} trains them "
                f"(client.trainable: {trainable}); set client.trainable: lora, or train in model.dtype: bfloat16"
            )
        if dtype == "bfloat16" and self.wire.labels == "client":
            raise ConfigError(
                "client.dtype: bfloat16 does not go with wire.labels: client, whose head may share the embeddings; "
                "use int8, which leaves embeddings as they are"
            )

    def _check_clients(self) -> None:
        clients = self.clients
        if clients.halves == "shared" and self.method in ("fo-fo", "fo-recompute", "fo-zo", "frozen"):
            raise ConfigError(
                f"clients.halves: shared needs a client that is trained by probes, method is {self.method}; use "
                "hosl, hosl-gradient or zo-zo, or halves: personal"
            )
        if clients.schedule == "synchronous" and self.method in ("zo-zo", "fo-zo"):
            raise ConfigError(
                f"clients.schedule: synchronous needs a server that is trained by backprop, method is {self.method}; "
                "use schedule: sequential"
            )
        if clients.count == 1 and (clients.halves, clients.schedule) != ("personal", "sequential"):
            raise ConfigError(
                "clients.halves and clients.schedule are for clients.count of 2 and more; leave them out"
            )
        if self.wire.labels == "client" and (clients.count > 1 or self.method in ("zo-zo", "fo-zo")):
            raise ConfigError(
                "wire.labels: client is for one client and a server trained by backprop; set clients.count: 1 and "
                "method to hosl, hosl-gradient, fo-fo, fo-recompute or frozen"
            )

    def _check_authors_head(self) -> None:
        wanted = {
            "method": "hosl",
            "zo.law": "sphere",
            "server.optimiser.name": "sgd",
            "server.optimiser.momentum": 0.9,
        }
        for path, value in wanted.items():
            found = self
            for name in path.split("."):
                found = getattr(found, name)
            if found != value:
                raise ConfigError(
                    f"profile authors-head wants {path}: {value}, got {found}; examples/authors-head.yaml has all of it"
                )
        if self.zo.clip is not None or self.zo.normalise != "none":
            raise ConfigError("profile authors-head has no step control; leave out zo.clip and zo.normalise")


def load_config(path: str | Path) -> Config:
    """Read a YAML file into a checked `Config`.

    Raises:
        ConfigError: if there is no such file, it is not YAML, or a setting is unknown or impossible.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(f"config {path}: no such file; `hosl train --help` lists the settings") from None
    except (OSError, UnicodeDecodeError) as cause:
        raise ConfigError(f"config {path} cannot be read as text: {cause}") from cause
    try:
        content = yaml.safe_load(text)
    except yaml.YAMLError as cause:
        raise ConfigError(f"config {path} is not YAML: {' '.join(str(cause).split())}") from cause
    if content is None:
        raise ConfigError(
            f"config {path} is empty; a run needs at least one setting, such as `max_steps: 300`"
        )
    return parse_config(content, where=str(path))


def parse_config(content: object, *, where: str) -> Config:
    """Check plain data (as YAML gives it) against the schema; `where` names it in errors."""
    try:
        return msgspec.convert(content, Config)
    except msgspec.ValidationError as cause:
        raise ConfigError(f"config {where}: {cause}{_hint(str(cause), content)}") from cause


def dump_config(config: Config) -> str:
    """Complete YAML, every default spelled out; `load_config` reads it back to an equal Config."""
    return yaml.safe_dump(msgspec.to_builtins(config), sort_keys=False, allow_unicode=True)


def _told(settings: msgspec.Struct) -> str:
    """The settings that are not at their defaults, as a person would write them."""
    plain = type(settings)()
    changed = {
        name: value
        for name, value in msgspec.structs.asdict(settings).items()
        if value != getattr(plain, name)
    }
    return ", ".join(f"{name}: {value}" for name, value in changed.items())


def _hint(message: str, content: object) -> str:
    unknown = re.search(r"unknown field `([^`]+)`(?: - at `\$\.?([^`]*)`)?", message)
    if unknown:
        allowed = _field_names(unknown[2] or "", content)
        nearest = difflib.get_close_matches(unknown[1], allowed, n=1)
        best = f"; did you mean `{nearest[0]}`?" if nearest else ""
        return f"{best} Allowed here: {', '.join(allowed)}."
    if re.search(r"Expected `float.*got `str`", message):
        return ". YAML reads 1e-3 as text: write 1.0e-3"
    return ""


def _field_names(path: str, content: object) -> list[str]:
    """The fields of the struct at a dotted path of the schema; of a union, the one that `content` chose."""
    struct: Any = Config
    for key in filter(None, path.split(".")):
        struct = get_type_hints(struct)[key]
        content = content.get(key, {}) if isinstance(content, dict) else {}
        if get_origin(struct) in (Union, types.UnionType):
            kind = content.get("kind") if isinstance(content, dict) else None
            choices = get_args(struct)
            struct = next((c for c in choices if c.__struct_config__.tag == kind), choices[0])
    return [field.encode_name for field in msgspec.structs.fields(struct)]

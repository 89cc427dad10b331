"""The run's schema: what a YAML file may say, with defaults, limits and the nearest right name for a wrong one.

Each component's own settings stand with the component (`OptimiserSpec`, `LoraSpec`, the task configs); this file
composes them. Names follow TRL and axolotl where they have one. Reading it imports neither torch nor transformers.
"""

from typing import Literal

import msgspec

from hosl.config.sections import ClientConfig, ClientsConfig, ModelConfig, ServerConfig, WireConfig, ZOConfig
from hosl.errors import ConfigError
from hosl.parties.engine.optimisers import OptimiserSpec
from hosl.tasks import DocstringsConfig, TaskConfig

Method = Literal[
    "hosl", "hosl-gradient", "hosl-guided", "hosl-node", "fo-fo", "fo-recompute", "zo-zo", "fo-zo", "frozen"
]
WITHOUT_DIRECTIONS = ("frozen", "fo-fo", "fo-recompute")
"""Methods that draw none: `zo.directions` changes nothing of them."""


class Config(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One fine-tuning run of a split model."""

    output_dir: str = "runs/hosl"
    """The run's folder; made by the run, never overwritten."""
    method: Method = "hosl-node"
    """hosl: the paper. hosl-gradient: the server returns dL/dh once. hosl-guided: and the client's last blocks move
    along directions formed from it. hosl-node: as hosl-guided, and the last block's queries by node perturbation.
    Baselines: fo-fo, fo-recompute (fo-fo in little memory), zo-zo, fo-zo, frozen."""
    profile: Literal["paper", "authors-head"] = "paper"
    """paper: as written. authors-head: as the authors' published code runs (docs/concepts/algorithm.md)."""
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
        self._check_rate()
        self._check_recomputing()
        self._check_fo_point()
        self._check_projection()
        self._check_guided()
        self._check_nodes()
        self._check_client_dtype()
        self._check_clients()

    @property
    def client_rate(self) -> float:
        """eta_c, a number.

        Raises:
            ConfigError: while client.learning_rate is auto.
        """
        rate = self.client.learning_rate
        if rate == "auto":
            raise ConfigError(
                "client.learning_rate: auto tries rates on both halves, which only `hosl train` has; run it once on "
                "data of the same kind and write the number that it says into the config"
            )
        return self.client.usual_rate(self.method) if rate is None else rate

    def with_client_rate(self, rate: float) -> "Config":
        """The same with this number for client.learning_rate."""
        return msgspec.structs.replace(self, client=msgspec.structs.replace(self.client, learning_rate=rate))

    def _check_rate(self) -> None:
        if self.client.learning_rate == "auto" and (self.method == "frozen" or self.profile != "paper"):
            raise ConfigError(
                f"client.learning_rate: auto has nothing to try for method {self.method}, profile {self.profile}; "
                "leave it out"
            )

    def _check_recomputing(self) -> None:
        client = self.client
        if self.method in ("fo-fo", "fo-zo") and client.micro_batch_size is not None:
            raise ConfigError(
                f"client.micro_batch_size: method {self.method} keeps the graph of the whole batch; leave it out, or "
                "use fo-recompute"
            )
        if self.method == "fo-recompute" and client.optimiser != OptimiserSpec():
            raise ConfigError(
                "method fo-recompute updates each block inside backward by plain SGD and keeps no state, got "
                f"client.optimiser {_told(client.optimiser)}; leave client.optimiser out, or use fo-fo"
            )

    def _check_fo_point(self) -> None:
        point = self.zo.server_gradient_at
        if point != "clean" and (self.method != "hosl" or self.profile != "paper"):
            raise ConfigError(
                f"zo.server_gradient_at: {point} is for method hosl, profile paper, got method {self.method}, profile "
                f"{self.profile}; leave zo.server_gradient_at out"
            )
        if point == "mean-plus" and self.clients.count > 1:
            raise ConfigError(
                "zo.server_gradient_at: mean-plus is for one client in the server's own process, clients.count is "
                f"{self.clients.count}; use clean or first-plus"
            )

    def _check_projection(self) -> None:
        zo = self.zo
        asked = [
            n
            for n, plain in (("sides", "two"), ("derivative", "difference"), ("row_clip", None))
            if getattr(zo, n) != plain
        ]
        if asked and self.method != "hosl-gradient":
            raise ConfigError(
                f"zo.{asked[0]}: {getattr(zo, asked[0])} is for method hosl-gradient, which projects on a returned "
                f"gradient, method is {self.method}; leave zo.{asked[0]} out"
            )
        if zo.derivative == "forward-mode" and (zo.sides, zo.guidance, self.client.dtype) != (
            "two",
            "none",
            "model",
        ):
            raise ConfigError(
                "zo.derivative: forward-mode has no sides, no guidance and no low-precision base, got zo.sides: "
                f"{zo.sides}, zo.guidance: {zo.guidance}, client.dtype: {self.client.dtype}; leave these out"
            )

    def _check_guided(self) -> None:
        if self.zo.guidance != "none" and (
            self.method not in ("hosl", "hosl-gradient", "zo-zo")
            or self.clients.halves == "shared"
            or self.profile != "paper"
        ):
            raise ConfigError(
                f"zo.guidance: {self.zo.guidance} is for a client with random probes of its own (method hosl, "
                f"hosl-gradient or zo-zo, clients.halves: personal, profile: paper), method is {self.method}, "
                f"clients.halves {self.clients.halves}, profile {self.profile}; leave zo.guidance out"
            )
        if self.method not in ("hosl-guided", "hosl-node"):
            return
        if self.zo.guided_blocks > self.model.cut:
            raise ConfigError(
                f"zo.guided_blocks: {self.zo.guided_blocks} wants as many blocks on the client, model.cut is "
                f"{self.model.cut}"
            )
        if self.client.trainable != "blocks" or self.client.dtype != "model":
            raise ConfigError(
                f"method {self.method} chooses what it trains by itself, in the model's own dtype, got "
                f"client.trainable: {self.client.trainable}, client.dtype: {self.client.dtype}; leave both out, or "
                "use hosl-gradient"
            )

    def _check_nodes(self) -> None:
        asked = {"clip": self.zo.clip, "row_clip": self.zo.row_clip, "normalise": self.zo.normalise}
        changed = [name for name, value in asked.items() if value not in (None, "none")]
        if changed and self.method == "hosl-node":
            raise ConfigError(
                f"zo.{changed[0]}: {asked[changed[0]]} is for methods that measure one coefficient per direction; "
                f"hosl-node measures one per token: leave zo.{changed[0]} out"
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
        if clients.halves == "shared" and self.method not in ("hosl", "hosl-gradient", "zo-zo"):
            raise ConfigError(
                f"clients.halves: shared needs a client that is trained by random probes, method is {self.method}; use "
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
                "method to hosl, hosl-gradient, hosl-guided, hosl-node, fo-fo, fo-recompute or frozen"
            )

    def _check_authors_head(self) -> None:
        wanted = {
            "method": "hosl",
            "zo.distribution": "sphere",
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
            raise ConfigError(
                "profile authors-head has no coefficient control; leave out zo.clip and zo.normalise"
            )
        if self.wire.compression != "none":
            raise ConfigError("profile authors-head has no compression; leave out wire.compression")


def _told(settings: msgspec.Struct) -> str:
    """The settings that are not at their defaults, as a person would write them."""
    plain = type(settings)()
    changed = {
        name: value
        for name, value in msgspec.structs.asdict(settings).items()
        if value != getattr(plain, name)
    }
    return ", ".join(f"{name}: {value}" for name, value in changed.items())

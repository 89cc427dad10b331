"""The schema of a run's config, and the checks across its sections.

The settings of a component are declared with the component (`OptimiserSpec`, `LoraSpec`, the task configs); those that
a method reads are listed in `core.methods`. Importing this file imports neither torch nor transformers.
"""

import math
from collections.abc import Callable
from functools import reduce
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import msgspec

from hosl.config.ranges import check_ranges
from hosl.config.sections import (
    ClientConfig,
    ClientsConfig,
    ModelConfig,
    ResidualConfig,
    ServerConfig,
    WireConfig,
    ZOConfig,
)
from hosl.core.estimators import MOST_DIRECTIONS
from hosl.core.methods import METHODS, LearningRates, Method
from hosl.errors import ConfigError
from hosl.parties.engine.optimisers import OptimiserSpec
from hosl.system.paths import expanded_folder
from hosl.tasks import DocstringsConfig, TaskConfig

if TYPE_CHECKING:
    MethodName: TypeAlias = str
else:
    MethodName = Literal[tuple(METHODS)]  # so that the error for a wrong name lists all methods


class Config(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One fine-tuning run of a split model."""

    output_dir: str = "runs/hosl"
    """The run's folder, ~ and environment variables allowed; created by the run, never overwritten."""
    method: MethodName = "hosl-node"
    """The way to train the two halves; docs/how-to/choose-a-method.md compares the methods."""
    profile: Literal["paper", "authors-head"] = "paper"
    """paper: the algorithm as published. authors-head: as the authors' code runs (docs/concepts/algorithm.md)."""
    seed: int = 0
    """The seed of the data order, the directions, new heads and adapters; 0 or more."""
    model: ModelConfig = ModelConfig()
    task: TaskConfig = DocstringsConfig()
    zo: ZOConfig = ZOConfig()
    residual: ResidualConfig = ResidualConfig()
    client: ClientConfig = ClientConfig()
    server: ServerConfig = ServerConfig()
    wire: WireConfig = WireConfig()
    clients: ClientsConfig = ClientsConfig()
    max_steps: int = 300
    """Steps of the run; a step is one server update."""
    num_train_epochs: float | None = None
    """Passes over the training rows, in place of max_steps; None: max_steps counts."""
    per_device_train_batch_size: int = 16
    """Examples per step."""
    per_device_eval_batch_size: int = 64
    """Rows per forward pass in evaluation; a row is one candidate answer."""
    lr_scheduler_type: Literal["constant", "linear", "cosine"] = "constant"
    """The course of both halves' learning rates; linear and cosine end at 0."""
    warmup_steps: int = 0
    """Steps over which both learning rates rise from 0."""
    eval_steps: int = 100
    """Steps between two evaluations on the dev split; one more is made at the end."""
    save_steps: int = 100
    """Steps between two checkpoints; one more is written at the end."""
    snapshot_steps: int = 500
    """Steps between snapshots of a zeroth-order client's weights; checkpoints between them hold the journal only."""
    save_model: bool = True
    """Whether the finished run writes RUN/model for transformers; `hosl export` makes it later, too."""
    save_optimiser: bool = True
    """Whether the last checkpoint holds the optimisers' state, with which a finished run can be trained further."""
    save_best: bool = False
    """Whether RUN/best keeps the weights of the best evaluation on dev, by accuracy, then loss (texts: by loss), for
    `export --best`."""
    report_to: tuple[Literal["tensorboard", "wandb", "trackio"], ...] = ()
    """Experiment trackers that get the metrics, beside metrics.jsonl."""

    def __post_init__(self) -> None:
        check_ranges(self)
        if self.wire.labels is None:  # a run's folder says where they were
            wire = msgspec.structs.replace(self.wire, labels=_labels_of(self.task))
            msgspec.structs.force_setattr(self, "wire", wire)
        msgspec.structs.force_setattr(self, "output_dir", expanded_folder(self.output_dir, "output_dir"))
        for name in (
            "max_steps", "per_device_train_batch_size", "per_device_eval_batch_size", "eval_steps", "save_steps",
            "snapshot_steps",
        ):  # fmt: skip
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be >= 1, got {getattr(self, name)}")
        if self.num_train_epochs is not None and not 0 < self.num_train_epochs < math.inf:
            raise ConfigError(f"num_train_epochs must be a number > 0, got {self.num_train_epochs}")
        if not 0 <= self.warmup_steps <= self.max_steps and self.num_train_epochs is None:
            raise ConfigError(
                f"warmup_steps must lie in 0..max_steps={self.max_steps}, got {self.warmup_steps}"
            )
        self._check_method()
        self._check_clients()
        if self.profile != "paper":
            self._check_authors_head()

    @property
    def method_row(self) -> Method:
        """The row of the table of methods."""
        return METHODS[self.method]

    def setting(self, path: str) -> Any:
        """The value at a dotted path, such as `zo.sides`."""
        return reduce(getattr, path.split("."), self)

    @property
    def client_rate(self) -> float:
        """eta_c, the learning rate of the client.

        Raises:
            ConfigError: if client.learning_rate is auto.
        """
        rate = self.client.learning_rate
        if rate == "auto":
            raise ConfigError(
                "client.learning_rate: auto tries rates on both halves, which only `hosl train` has; run it once on "
                "data of the same kind and write the number that it says into the config"
            )
        return self.learning_rates.usual_for(self.client.trainable) if rate is None else rate

    @property
    def trained_blocks(self) -> int:
        """The number of last blocks whose output projections are trained, where these are."""
        blocks = self.residual.blocks
        return self.model.cut if blocks == "all" else blocks or self.method_row.usual_blocks(self.model.cut)

    @property
    def server_rate(self) -> float:
        """eta_s, the learning rate of the server."""
        if self.server.learning_rate is not None:
            return self.server.learning_rate
        adamw = self.method_row.server == "first-order" and self.server.optimiser.name == "adamw"
        return 1e-4 if adamw else 1e-3

    @property
    def learning_rates(self) -> LearningRates:
        """The client learning rates of the method, with the client's optimiser."""
        return self.method_row.rates_for(self.client.optimiser.name)

    def with_client_rate(self, rate: float | Literal["auto"] | None) -> "Config":
        """This config with `rate` for client.learning_rate."""
        return msgspec.structs.replace(self, client=msgspec.structs.replace(self.client, learning_rate=rate))

    def _check_method(self) -> None:
        """Refuse settings that the method does not read, or not together."""
        method, zo, client = self.method_row, self.zo, self.client
        refusal = method.refusal(self.setting, _default)
        if refusal is not None:
            raise ConfigError(refusal)
        if client.learning_rate == "auto" and (method.trains == "nothing" or self.profile != "paper"):
            raise ConfigError(
                f"client.learning_rate: auto has nothing to try for method {self.method}, profile {self.profile}; "
                "leave it out"
            )
        if zo.derivative == "forward-mode" and (zo.sides, client.dtype) != ("two", "model"):
            raise ConfigError(
                "zo.derivative: forward-mode has no sides and no low-precision base, got zo.sides: "
                f"{zo.sides}, client.dtype: {client.dtype}; leave these out"
            )
        named = client.trainable == "output-projections" and method.trains != "nothing"
        if (method.needs_blocks or named) and not 1 <= self.trained_blocks <= self.model.cut:
            raise ConfigError(
                f"residual.blocks: {max(self.trained_blocks, 1)} wants as many blocks on the client, model.cut is "
                f"{self.model.cut}"
            )
        self._check_residual()
        if self.wire.clip_norm is not None and method.uploads(1) != 1:
            raise ConfigError(
                f"wire.clip_norm: {self.wire.clip_norm} is for methods that send activations once a step; method "
                f"{self.method} sends those of probes, too, whose losses would differ by noise more than by the probe; "
                f"use {_methods_with(lambda row: row.uploads(1) == 1)}, or leave wire.clip_norm out"
            )
        if client.dtype != "model" and method.trains != "nothing" and client.trainable != "lora":
            raise ConfigError(
                f"client.dtype: {client.dtype} is for weights that stay as they are, but method {self.method} trains "
                f"them (client.trainable: {client.trainable}); set client.trainable: lora, or train in model.dtype: "
                "bfloat16"
            )
        if client.dtype == "bfloat16" and self.wire.labels == "client":
            raise ConfigError(
                "client.dtype: bfloat16 does not go with wire.labels: client, whose head may share the embeddings; "
                "use int8, which leaves embeddings as they are, or wire.labels: server"
            )

    def _check_residual(self) -> None:
        """Refuse settings of the client that do not go with residual feedback."""
        method, client = self.method_row, self.client
        if not method.needs_blocks:
            return
        if client.trainable not in ("blocks", "output-projections", "lora"):
            raise ConfigError(
                f"client.trainable: {client.trainable} is not for method {self.method}, which trains output "
                "projections of its last blocks: leave it out (their weights), or set lora (adapters on them); "
                "residual.blocks says how many blocks"
            )
        slopes, kept = self.residual.slopes, self.residual.kept
        if slopes != "none" and kept != "auto":
            raise ConfigError(
                f"residual.kept: {kept} is for residual.slopes: none, got {slopes}, which evaluates blocks from the "
                "lowest one up; leave residual.kept out"
            )
        if slopes == "per-block" and self.residual.decay != 1.0:
            raise ConfigError(
                f"residual.decay: {self.residual.decay} changes nothing with residual.slopes: per-block, which "
                "measures the step of each block by itself; leave it out"
            )
        if self.residual.slopes != "none" and (
            client.trainable == "lora" or client.optimiser != OptimiserSpec()
        ):
            raise ConfigError(
                f"residual.slopes: {self.residual.slopes} measures a step of plain SGD on whole weights, got "
                f"client.trainable: {client.trainable}, client.optimiser: {client.optimiser.name}; leave these out, or "
                "residual.slopes"
            )

    def _check_clients(self) -> None:
        """Refuse settings of several clients that do not go with the method."""
        clients, method = self.clients, self.method_row
        if clients.halves == "shared" and method.client_state != "journal":
            raise ConfigError(
                f"clients.halves: shared needs a client that is trained by random probes, method is {self.method}; use "
                f"{_methods_with(lambda row: row.client_state == 'journal')}, or halves: personal"
            )
        if clients.schedule == "synchronous" and method.server != "first-order":
            raise ConfigError(
                f"clients.schedule: synchronous needs a server that is trained by backprop, method is {self.method}; "
                "use schedule: sequential"
            )
        if clients.count == 1 and (clients.halves, clients.schedule) != ("personal", "sequential"):
            raise ConfigError(
                "clients.halves and clients.schedule are for clients.count of 2 and more; leave them out"
            )
        if clients.server == "personal":
            self._check_personal_server()
        in_a_round = clients.count * self.zo.directions
        own = clients.halves == "shared" and clients.directions == "own"
        if own and clients.schedule == "synchronous" and in_a_round > MOST_DIRECTIONS:
            raise ConfigError(
                f"every device makes the directions of all: {clients.count} devices with {self.zo.directions} of their "
                f"own are {in_a_round} a round, {MOST_DIRECTIONS} are allowed: set clients.directions: common, or "
                "zo.directions lower"
            )
        if self.wire.labels == "client" and method.server != "first-order":
            raise ConfigError(
                f"wire.labels: client needs a server that is trained by backprop, method is {self.method}; set "
                f"wire.labels: server, or method to {_methods_with(lambda row: row.server == 'first-order')}"
            )

    def _check_personal_server(self) -> None:
        """Refuse what does not go with adapters of each device on the server."""
        method, clients = self.method_row, self.clients
        if self.server.trainable != "lora":
            raise ConfigError(
                f"clients.server: personal gives each device adapters of its own, server.trainable is "
                f"{self.server.trainable}; set server.trainable: lora, or clients.server: shared"
            )
        if method.server != "first-order":
            raise ConfigError(
                f"clients.server: personal needs a server that is trained by backprop, method is {self.method}; use "
                f"{_methods_with(lambda row: row.server == 'first-order')}, or clients.server: shared"
            )
        if clients.count == 1:
            raise ConfigError(
                "clients.server: personal is for clients.count of 2 and more: a single device has its server half to "
                "itself; leave it out"
            )
        if (clients.halves, clients.schedule) != ("personal", "sequential"):
            raise ConfigError(
                f"clients.server: personal trains each device by itself, got clients.halves: {clients.halves}, "
                f"clients.schedule: {clients.schedule}, in which devices train one half together; leave these out, or "
                "clients.server"
            )

    def _check_authors_head(self) -> None:
        required = {
            "method": "hosl",
            "zo.distribution": "sphere",
            "zo.server_gradient_at": "clean",
            "zo.clip": None,
            "zo.normalise": "none",
            "wire.compression": "none",
            "wire.labels": "server",
            "server.optimiser.name": "sgd",
            "server.optimiser.momentum": 0.9,
        }
        for path, value in required.items():
            if self.setting(path) != value:
                raise ConfigError(
                    f"profile authors-head wants {path}: {value}, got {self.setting(path)}; "
                    "examples/authors-head.yaml has all of it"
                )


def _labels_of(task: TaskConfig) -> Literal["server", "client"]:
    """The party that has the labels unless a config says it: of text that a person brings, the client."""
    kind = task.__struct_config__.tag
    own_text = kind == "sft" or (kind == "prompts" and getattr(task, "name", "") is None)
    return "client" if own_text else "server"


def _default(path: str) -> Any:
    """The default of a setting in `GOVERNED`, by its dotted path."""
    section, name = path.split(".")
    return getattr({"zo": ZOConfig, "client": ClientConfig, "residual": ResidualConfig}[section](), name)


def _methods_with(condition: Callable[[Method], bool]) -> str:
    """The names of the methods that meet a condition, as text for a message."""
    *others, last = [name for name, row in METHODS.items() if condition(row)]
    return f"{', '.join(others)} or {last}"

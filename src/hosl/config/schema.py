"""The run's schema: what a YAML file may say, and what holds between its sections.

Each component's own settings stand with the component (`OptimiserSpec`, `LoraSpec`, the task configs); what a method
means by them, `core.methods` says; this file composes them. Reading it imports neither torch nor transformers.
"""

from collections.abc import Callable
from functools import reduce
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import msgspec

from hosl.config.sections import ClientConfig, ClientsConfig, ModelConfig, ServerConfig, WireConfig, ZOConfig
from hosl.core.methods import METHODS, LearningRates, Method
from hosl.errors import ConfigError
from hosl.tasks import DocstringsConfig, TaskConfig

if TYPE_CHECKING:
    MethodName: TypeAlias = str
else:
    MethodName = Literal[tuple(METHODS)]  # so that a wrong name is refused with all the right ones


class Config(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One fine-tuning run of a split model."""

    output_dir: str = "runs/hosl"
    """The run's folder; made by the run, never overwritten."""
    method: MethodName = "hosl-node"
    """How the two halves are trained; docs/how-to/choose-a-method.md compares them."""
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
        for name in (
            "max_steps", "per_device_train_batch_size", "per_device_eval_batch_size", "eval_steps", "save_steps",
            "snapshot_steps",
        ):  # fmt: skip
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be >= 1, got {getattr(self, name)}")
        if not 0 <= self.warmup_steps <= self.max_steps:
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
        return self.learning_rates.usual_for(self.client.trainable) if rate is None else rate

    @property
    def learning_rates(self) -> LearningRates:
        """The client learning rates of the method, with the client's optimiser."""
        return self.method_row.rates_for(self.client.optimiser.name)

    def with_client_rate(self, rate: float) -> "Config":
        """The same with this number for client.learning_rate."""
        return msgspec.structs.replace(self, client=msgspec.structs.replace(self.client, learning_rate=rate))

    def _check_method(self) -> None:
        """Refuse what the method does not read, and settings that it reads but not together."""
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
        if method.needs_blocks and zo.guided_blocks > self.model.cut:
            raise ConfigError(
                f"zo.guided_blocks: {zo.guided_blocks} wants as many blocks on the client, model.cut is "
                f"{self.model.cut}"
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
                "use int8, which leaves embeddings as they are"
            )

    def _check_clients(self) -> None:
        """Refuse ways of sharing that the method's parties cannot follow."""
        clients, method = self.clients, self.method_row
        if clients.halves == "shared" and method.client_state != "journal":
            raise ConfigError(
                f"clients.halves: shared needs a client that is trained by random probes, method is {self.method}; use "
                f"{_those(lambda row: row.client_state == 'journal')}, or halves: personal"
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
        if self.wire.labels == "client" and (clients.count > 1 or method.server != "first-order"):
            raise ConfigError(
                "wire.labels: client is for one client and a server trained by backprop; set clients.count: 1 and "
                f"method to {_those(lambda row: row.server == 'first-order')}"
            )

    def _check_authors_head(self) -> None:
        wanted = {
            "method": "hosl",
            "zo.distribution": "sphere",
            "zo.server_gradient_at": "clean",
            "zo.clip": None,
            "zo.normalise": "none",
            "wire.compression": "none",
            "server.optimiser.name": "sgd",
            "server.optimiser.momentum": 0.9,
        }
        for path, value in wanted.items():
            if self.setting(path) != value:
                raise ConfigError(
                    f"profile authors-head wants {path}: {value}, got {self.setting(path)}; "
                    "examples/authors-head.yaml has all of it"
                )


def _default(path: str) -> Any:
    """The default at a dotted path of a governed setting."""
    section, name = path.split(".")
    return getattr({"zo": ZOConfig, "client": ClientConfig}[section](), name)


def _those(which: Callable[[Method], bool]) -> str:
    *others, last = [name for name, row in METHODS.items() if which(row)]
    return f"{', '.join(others)} or {last}"

"""The sections of a run's config: each with its settings, defaults and the limits that it can check by itself.

What holds between sections, and how a file is read: `hosl.config`.
"""

from typing import Literal

import msgspec

from hosl.core.clipping import Normalise
from hosl.core.directions import Distribution
from hosl.errors import ConfigError
from hosl.parties.engine.optimisers import OptimiserSpec
from hosl.split.specs import LoraSpec
from hosl.system.byte_sizes import parse_bytes


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

    directions: int = 16
    """Q, the directions per step: pairs of forward passes, for hosl-node single evaluations of one block."""
    epsilon: float = 1e-3
    """Perturbation scale: the loss is evaluated at theta +- epsilon u."""
    distribution: Distribution = "rademacher"
    """Of random directions: gaussian (the paper), rademacher (cheaper, as good), sphere (the authors' code), low-rank
    (rank one, of signs)."""
    server_gradient_at: Literal["clean", "first-plus", "mean-plus"] = "clean"
    """Of hosl: where the server takes its gradient, l.6. clean: at the unperturbed client, the paper. first-plus: at
    the first + probe, the authors' code. mean-plus: of the mean over all + probes, `hosl train` only."""
    sides: Literal["two", "one"] = "two"
    """Of hosl-gradient: two evaluations per direction, or one against the clean activations; cheaper, less exact."""
    derivative: Literal["difference", "forward-mode"] = "difference"
    """Of hosl-gradient: by finite differences, or exactly by forward-mode differentiation; needs no epsilon."""
    guidance: Literal["none", "activation", "mixed"] = "none"
    """activation: directions lie along each linear layer's own inputs (AGZO); biased. mixed: every other one does."""
    guided_blocks: int = 1
    """Of hosl-guided and hosl-node: in how many of the client's last blocks output projections are
    trained. The guess gets worse with every block below."""
    clip: float | None = None
    """Limit of a coefficient: this multiple of the running median of |c|, such as 5.0; none by default."""
    row_clip: float | None = None
    """Of hosl-gradient: limit of a row's part of a coefficient, in multiples of the batch's median; none by default."""
    normalise: Normalise = "none"
    """spread: a step's coefficients are divided by their standard deviation (FZOO); wants another learning rate."""

    def __post_init__(self) -> None:
        if self.guided_blocks < 1:
            raise ConfigError(f"zo.guided_blocks must be >= 1, got {self.guided_blocks}")
        if self.clip is not None and not self.clip > 0:
            raise ConfigError(f"zo.clip must be > 0, got {self.clip}; 5.0 is mild, null turns it off")
        if self.row_clip is not None and not self.row_clip > 0:
            raise ConfigError(f"zo.row_clip must be > 0, got {self.row_clip}; 5.0 is mild, null turns it off")
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

    trainable: Literal["all", "blocks", "last-block", "lora"] = "blocks"
    """all: every weight. blocks: the embeddings stay as they are. last-block: the one before the cut, all of it.
    lora: adapters only."""
    learning_rate: float | Literal["auto"] | None = None
    """eta_c of the client's update. null: the method's usual one (`usual_rate`). auto: found by a short sweep before
    the run, `hosl train` only."""
    optimiser: OptimiserSpec = OptimiserSpec()
    """Of a first-order client; a zeroth-order one is plain SGD, and so is that of fo-recompute."""
    micro_batch_size: int | None = None
    """Rows of a batch that are evaluated at once; null: as many as take no more memory than the batch's forward pass.
    Not of fo-fo and fo-zo, whose graph is of the whole batch."""
    lora: LoraSpec = LoraSpec()
    """Used when trainable is lora."""
    dtype: Literal["model", "bfloat16", "int8"] = "model"
    """Of the client's frozen weights; adapters stay float32. model: as model.dtype."""
    device: str = "cpu"
    """A torch device."""
    memory_budget: str | None = None
    """What the client process may take, such as 600MiB: checked before a run and at every step."""

    def __post_init__(self) -> None:
        if self.memory_budget is not None:
            parse_bytes(self.memory_budget)
        if isinstance(self.learning_rate, float | int) and not self.learning_rate >= 0:
            raise ConfigError(f"client.learning_rate must be >= 0, auto or null, got {self.learning_rate}")
        if self.micro_batch_size is not None and self.micro_batch_size < 1:
            raise ConfigError(f"client.micro_batch_size must be >= 1 or null, got {self.micro_batch_size}")

    def usual_rate(self, method: str) -> float:
        """What worked for a method in docs/results/index.md, or for lack of that, a careful guess."""
        if method in ("hosl", "hosl-gradient"):  # slopes of random directions as long as all weights
            return 1e-3 if self.trainable == "lora" else 1e-5
        if method == "zo-zo":
            return 1e-3
        if self.optimiser.name == "adamw":
            return 3e-4 if self.trainable == "lora" else 3e-5
        return 1e-2 if method in ("hosl-guided", "hosl-node") or self.trainable == "last-block" else 3e-3


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
    """Of the activations on their way up; `hosl train` has no wire, and computes with what would arrive."""
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

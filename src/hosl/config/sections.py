"""The sections of a run's config: settings, defaults, and the checks within a section.

The checks across sections: `hosl.config.schema`.
"""

import math
from typing import Literal

import msgspec

from hosl.core.clipping import Normalise
from hosl.core.directions import Distribution
from hosl.errors import ConfigError
from hosl.parties.engine.optimisers import OptimiserSpec
from hosl.split.specs import LoraSpec
from hosl.system.byte_sizes import parse_bytes


class ModelConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The model, and its cut."""

    name: str = "all-MiniLM-L6-v2"
    """all-MiniLM-L6-v2 or SmolLM2-135M, which `make` installs, a local folder (environment variables allowed), a GGUF
    file, or a hub name."""
    cut: int = 3
    """The client keeps the embeddings and blocks 0..cut-1."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """The dtype of the weights of both halves."""

    def __post_init__(self) -> None:
        if self.cut < 0:
            raise ConfigError(
                f"model.cut must be >= 0, got {self.cut}; 0 keeps only the embeddings on the client"
            )


class ZOConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Zeroth-order estimation, in each half that is trained by probes."""

    directions: int = 16
    """Q, the directions per step. Each costs a pair of forward passes; in hosl-node, one evaluation of one block."""
    epsilon: float = 1e-3
    """The perturbation scale: the loss is evaluated at theta +- epsilon u."""
    distribution: Distribution = "rademacher"
    """The distribution of random directions: gaussian (the paper), rademacher (cheaper, as good), sphere (the authors'
    code), low-rank (rank one, of signs)."""
    server_gradient_at: Literal["clean", "first-plus"] = "clean"
    """The point of the server's gradient in hosl (Alg. 1, line 7). clean: the unperturbed client, as in the paper.
    first-plus: the first + probe, as in the authors' code, which saves one upload."""
    sides: Literal["two", "one"] = "two"
    """Evaluations per direction in hosl-gradient: two, or one against the clean activations, cheaper and less exact."""
    derivative: Literal["difference", "forward-mode"] = "difference"
    """The derivative in hosl-gradient: by finite differences, or by forward-mode differentiation, which is exact and
    needs no epsilon."""
    clip: float | None = None
    """The limit of a coefficient, in multiples of the running median of |c|, such as 5.0; none by default."""
    row_clip: float | None = None
    """The limit of a row's part of a coefficient (hosl-gradient), in multiples of the batch's median; default: none."""
    normalise: Normalise = "none"
    """spread: a step's coefficients are divided by their standard deviation (FZOO); needs another learning rate."""

    def __post_init__(self) -> None:
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


class ResidualConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Residual feedback (hosl-residual): the returned gradient, used as it is by the client's last blocks."""

    blocks: int | Literal["all"] | None = None
    """The number of the client's last blocks whose output projections are trained, by hosl-residual, hosl-node and
    client.trainable: output-projections. null: half of the client's blocks, in hosl-node one."""
    slopes: Literal["none", "one", "per-block"] = "none"
    """The measured correction of the step's length. none: the learning rate alone. one, per-block: by two evaluations
    for all layers together, or for each block; the layers then move by their gradient's projection."""
    decay: float = 1.0
    """The factor of the learning rate for each block further down."""
    kept: Literal["auto", "stream", "blocks", "inputs"] = "auto"
    """What a step keeps of the clean pass until the gradient comes: the hidden state below the lowest trained block
    (stream), the input of each trained block, or that of each trained layer, so that nothing is computed twice.
    auto: blocks, where that takes little beside the weights, else stream. Not a bit of the update depends on it."""

    def __post_init__(self) -> None:
        if isinstance(self.blocks, int) and self.blocks < 1:
            raise ConfigError(f"residual.blocks must be >= 1, all or null, got {self.blocks}")
        if not 0 < self.decay <= 1:
            raise ConfigError(f"residual.decay must lie above 0 and up to 1, got {self.decay}; 1.0 is none")


class ClientConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The half on the device."""

    trainable: Literal["all", "blocks", "last-block", "output-projections", "lora"] = "blocks"
    """all: every weight. blocks: the embeddings stay as they are. last-block: every weight of the block before the cut.
    output-projections: what hosl-residual trains, the layers of the last `residual.blocks` blocks that write to the
    residual stream.
    lora: adapters only."""
    learning_rate: float | Literal["auto"] | None = None
    """eta_c of the client's update. null: the method's usual rate (`core.methods`). auto: a short sweep before the run
    finds it, in `hosl train` only."""
    optimiser: OptimiserSpec = OptimiserSpec()
    """The optimiser of a first-order client and of hosl-residual. All others use plain SGD."""
    micro_batch_size: int | None = None
    """Rows of a batch that are evaluated at once; null: as many as take no more memory than the batch's forward pass.
    Not for fo-fo and fo-zo, whose graph spans the whole batch."""
    lora: LoraSpec = LoraSpec()
    """The adapters, where trainable is lora."""
    dtype: Literal["model", "bfloat16", "int8"] = "model"
    """The dtype of the client's frozen weights; adapters stay float32. model: the same as model.dtype."""
    device: str = "cpu"
    """A torch device."""
    memory_budget: str | None = None
    """The memory that the client process may take, such as 600MiB; checked before a run and at every step."""

    def __post_init__(self) -> None:
        if self.memory_budget is not None:
            parse_bytes(self.memory_budget)
        if isinstance(self.learning_rate, float | int) and not self.learning_rate >= 0:
            raise ConfigError(f"client.learning_rate must be >= 0, auto or null, got {self.learning_rate}")
        if self.micro_batch_size is not None and self.micro_batch_size < 1:
            raise ConfigError(f"client.micro_batch_size must be >= 1 or null, got {self.micro_batch_size}")


class ServerConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The half on the machine with compute."""

    trainable: Literal["all", "lora"] = "all"
    """all: every weight, the head included. lora: adapters, and the head of a classifier."""
    learning_rate: float | None = None
    """eta_s of the server's update. null: 1e-4 with adamw; 1e-3 with sgd, and where it is trained by probes."""
    optimiser: OptimiserSpec = OptimiserSpec(name="adamw")
    """The optimiser of a first-order server. A zeroth-order server uses plain SGD."""
    lora: LoraSpec = LoraSpec()
    """The adapters, where trainable is lora."""
    device: str = "cpu"
    """A torch device."""

    def __post_init__(self) -> None:
        if self.learning_rate is not None and not self.learning_rate >= 0:
            raise ConfigError(f"server.learning_rate must be >= 0 or null, got {self.learning_rate}")


class WireConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The network of `hosl join`: compression, labels and timeouts."""

    compression: Literal["none", "bf16", "int8"] = "none"
    """The compression of uploaded activations. `hosl train` has no network, but computes with what would arrive."""
    clip_norm: float | None = None
    """The largest norm of a token's activation; larger ones are scaled down before they are sent. null: as they are."""
    noise_multiplier: float = 0.0
    """The standard deviation of Gaussian noise on each number that is sent, in units of clip_norm
    (docs/concepts/privacy.md)."""
    labels: Literal["server", "client"] | None = None
    """The party that has the labels. server: they are uploaded. client: norm and head are on the device, too. null:
    client where text is learned (task.kind: sft, prompts of your own), else server."""
    connect_s: float = 10.0
    """The seconds for the first connection; later ones are tried for ever."""
    idle_s: float = 60.0
    """The seconds without any sign of life from the server after which the connection is made anew."""

    def __post_init__(self) -> None:
        for name in ("connect_s", "idle_s"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"wire.{name} must be > 0 seconds, got {getattr(self, name)}")
        if self.clip_norm is not None and not 0 < self.clip_norm < math.inf:
            raise ConfigError(f"wire.clip_norm must be null or a finite number > 0, got {self.clip_norm}")
        if not 0 <= self.noise_multiplier < math.inf:
            raise ConfigError(
                f"wire.noise_multiplier must be 0 or a finite number > 0, got {self.noise_multiplier}"
            )
        if self.noise_multiplier and self.clip_norm is None:
            raise ConfigError(
                f"wire.noise_multiplier is {self.noise_multiplier}, in units of wire.clip_norm, which is null; set "
                "that too: `hosl audit --attack` says how large the activations are"
            )


class ClientsConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Several devices that train one server half (`hosl join` on each)."""

    count: int = 1
    """The number of devices that take part."""
    halves: Literal["personal", "shared"] = "personal"
    """personal: each device has its own client half. shared: all follow one journal on the server; halves with as many
    of its updates are equal. In the sequential schedule a device that ends early lacks the others' last updates."""
    schedule: Literal["sequential", "synchronous"] = "sequential"
    """sequential: each step is applied as it comes. synchronous: one server update per round, over all devices."""
    grace_s: float = 30.0
    """The seconds that a synchronous round waits for the others after its first contribution, or half of the median
    length of the last nine rounds where that is longer. A slower device's part counts in the round that is open when it
    comes. sequential, with labels at the client: the most seconds that the others wait for a device's gradient."""
    directions: Literal["own", "common"] = "own"
    """The random directions with shared halves. own: every device draws its own. common: all draw the same."""
    server: Literal["shared", "personal"] = "shared"
    """shared: all devices train one server half. personal, with server.trainable: lora: each device has adapters and an
    optimiser of its own over one frozen base on the server, as if it had a server to itself."""

    def __post_init__(self) -> None:
        if self.count < 1:
            raise ConfigError(f"clients.count must be >= 1, got {self.count}")
        if not self.grace_s > 0:
            raise ConfigError(f"clients.grace_s must be > 0 seconds, got {self.grace_s}")

    @property
    def alone(self) -> bool:
        """Whether no other device changes what a device's server half is."""
        return self.count == 1 or self.server == "personal"

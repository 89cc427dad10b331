"""The table of methods: the round of each, and its properties for planning, running, saving and comparing it.

All other code reads these properties from the row of a method; no other file lists names of methods.
To add a method: a round in `core.rounds`, a client class in `parties.clients`, a row here, and the line in
`methods.torch_parties` that builds the client (docs/how-to/add-a-method.md).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

from hosl.core import rounds
from hosl.core.authors_head import authors_head_round
from hosl.core.rounds import RoundResult, StepInputs
from hosl.core.targets import Batch

Round: TypeAlias = Callable[[Any, Any, Batch, StepInputs], RoundResult]
"""(client, server, batch, step) -> result. The round itself declares the protocols of its parties."""

Settings: TypeAlias = Callable[[str], Any]
"""The value of a run's setting by its dotted path, such as `zo.sides`."""


@dataclass(frozen=True)
class LearningRates:
    """The client learning rates of a method, for one kind of optimiser."""

    usual: float
    """The rate that worked in docs/results; where there is no result, a careful guess."""
    to_try: tuple[float, ...]
    """The rates of a sweep, ascending."""
    usual_lora: float | None = None
    """`usual`, where adapters are trained; None: the same."""
    usual_last_block: float | None = None
    """`usual`, where the last block is trained; None: the same."""
    lora_factor: float = 1.0
    """The factor of `to_try` where adapters are trained."""

    def usual_for(self, trainable: str) -> float:
        """The usual rate for a value of `client.trainable`."""
        special = {"lora": self.usual_lora, "last-block": self.usual_last_block}.get(trainable)
        return self.usual if special is None else special

    def to_try_for(self, trainable: str) -> tuple[float, ...]:
        """The rates of a sweep for a value of `client.trainable`, ascending."""
        return tuple(rate * self.lora_factor for rate in self.to_try) if trainable == "lora" else self.to_try


@dataclass(frozen=True)
class Method:
    """One row of the table."""

    name: str
    about: str
    """The method in one sentence, for help and documentation."""
    round: Round
    reads: frozenset[str]
    """The settings of `GOVERNED` that it reads, by dotted path. A config that sets another one of them is refused."""
    lets_stand: frozenset[str] = frozenset()
    """The settings of `GOVERNED` that it ignores; its config may set them, as configs of one comparison share them."""
    variants: tuple[tuple[str, str, Round], ...] = ()
    """(setting, value, round): the round in place of `round` where the setting has this value."""
    backward: Literal["none", "graph", "blocks"] = "none"
    """Whether its client differentiates: not at all, a graph of the whole batch, or one block at a time."""
    keeps_by_blocks: bool = False
    """Whether what its client keeps between calls follows from the number of blocks, though it makes no graph."""
    client_state: Literal["none", "journal", "weights"] = "journal"
    """The part of its client that a checkpoint holds beside the base weights."""
    trains: Literal["nothing", "chosen", "last-blocks"] = "chosen"
    """The trained weights of the client: none, those of `client.trainable`, or parts of its last `residual.blocks`
    blocks that the method chooses by itself."""
    usual_blocks: Callable[[int], int] = lambda cut: -(-cut // 2)
    """cut -> the number of last blocks whose output projections it trains, where no number is set. By default the upper
    half of the client's blocks: further down the returned gradient is hardly theirs."""
    draws: frozenset[Literal["client", "server"]] = frozenset()
    """The halves that draw random directions, `zo.directions` of them per step."""
    wants_gradient: bool = False
    """Whether the server sends dL/dh back in every step."""
    server: Literal["first-order", "zeroth-order"] = "first-order"
    """The kind of its server: trained by backprop or by probes."""
    uploads_per_direction: int = 0
    """The activations sent for each direction."""
    clean_uploads: int = 1
    """The activations at the unperturbed client sent in a step."""
    on_engine: bool = False
    """Whether the onnx runtime has its client, for a device without torch."""
    on_the_wire: str = ""
    """Its name in the protocol with the server; by default its own name."""
    learning_rates: LearningRates = field(kw_only=True)
    learning_rates_adamw: LearningRates | None = field(default=None, kw_only=True)
    """The learning rates where the client's optimiser is AdamW; None: the client has plain SGD."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "on_the_wire", self.on_the_wire or self.name)

    @property
    def memory_by_cut(self) -> bool:
        """Whether what its client holds beside the weights depends on the cut, so that no cut stands for another."""
        return self.backward != "none" or self.keeps_by_blocks

    @property
    def needs_blocks(self) -> bool:
        """Whether it trains parts of the client's last blocks, so that the client must have that many."""
        return self.trains == "last-blocks"

    @property
    def end(self) -> Literal["frozen", "first_order"] | None:
        """The end of gap closure that it can be: 0, a frozen client; 1, backprop on both sides; None: neither."""
        if self.trains == "nothing":
            return "frozen"
        return "first_order" if self.backward != "none" and self.server == "first-order" else None

    def uploads(self, directions: int) -> int:
        """The activations sent in a step with this many directions."""
        return self.uploads_per_direction * directions + self.clean_uploads

    def requests(self, directions: int) -> int:
        """The requests to the server in a step with this many directions; each one carries the targets."""
        return (directions if self.uploads_per_direction else 0) + self.clean_uploads

    def round_for(self, setting: Settings) -> Round:
        """The round of a run with these settings."""
        for path, value, variant in self.variants:
            if setting(path) == value:
                return variant
        return self.round

    def rates_for(self, optimiser: str) -> LearningRates:
        """The learning rates for the name of a client optimiser."""
        adamw = self.learning_rates_adamw if optimiser == "adamw" else None
        return adamw or self.learning_rates

    def refusal(self, setting: Settings, plain: Settings) -> str | None:
        """The reason why this method refuses a run with these settings; None: it does not.

        Args:
            setting: the settings of the run.
            plain: the default settings.
        """
        for path in GOVERNED:
            value = setting(path)
            if value == plain(path) or path in self.reads or path in self.lets_stand:
                continue
            readers = ", ".join(name for name, other in METHODS.items() if path in other.reads)
            return (
                f"{path} is not read by method {self.name}, got {readable(value)}; methods that read it: {readers}. "
                f"Leave {path} out, or take one of these"
            )
        return None


def readable(value: Any) -> str:
    """A setting's value for a message; of a section, the fields that differ from their defaults."""
    fields = getattr(value, "__struct_fields__", None)
    if fields is None:
        return str(value)
    plain = type(value)()
    changed = [name for name in fields if getattr(value, name) != getattr(plain, name)]
    return ", ".join(f"{name}: {getattr(value, name)}" for name in changed)


PROBES = frozenset({"zo.clip", "zo.normalise"})
"""The settings of coefficient control, for methods that measure coefficients along directions."""

_RESIDUAL = ("residual.slopes", "residual.decay", "residual.kept")

GOVERNED = (
    "zo.server_gradient_at", "zo.sides", "zo.derivative", "zo.row_clip", "zo.clip", "zo.normalise", "client.trainable",
    "client.dtype", "client.optimiser", "client.micro_batch_size", *_RESIDUAL,
)  # fmt: skip
"""The settings that are refused where a method does not read them. The others, such as `zo.directions` and the learning
rates, are shared by the methods of a comparison, whose configs differ in `method` alone."""

_TRAINED = frozenset({"client.trainable", "client.dtype", "client.micro_batch_size"})

_DESCENDED = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
"""The rates to try for gradients and their estimates, applied by SGD."""
_BY_PROBES = LearningRates(
    1e-5, (1e-7, 1e-6, 1e-5, 1e-4, 1e-3), usual_lora=1e-3, lora_factor=1e3
)  # a random direction of d weights has length sqrt(d), so adapters, few weights, take larger rates
_BY_GRADIENT = LearningRates(3e-3, _DESCENDED, usual_last_block=1e-2)
_BY_ADAMW = LearningRates(3e-5, (1e-5, 3e-5, 1e-4, 3e-4, 1e-3), usual_lora=3e-4)
_FED_BACK_BY_ADAMW = LearningRates(1e-3, (1e-4, 3e-4, 1e-3, 3e-3, 1e-2), usual_lora=3e-3)
"""Of output projections alone, which take larger steps than a whole half: docs/results/residual.md."""


_ROWS: tuple[Method, ...] = (
    Method(
        "frozen", "The client never changes: the baseline of every comparison.", rounds.frozen_round,
        reads=frozenset({"client.dtype", "client.micro_batch_size"}),
        lets_stand=PROBES | {"client.trainable", "client.optimiser"},
        client_state="none", trains="nothing", on_engine=True, learning_rates=_BY_GRADIENT,
    ),
    Method(
        "zo-zo", "Both halves are trained by probes.", rounds.zo_round, reads=_TRAINED | PROBES,
        draws=frozenset({"client", "server"}), server="zeroth-order", uploads_per_direction=2, clean_uploads=0,
        on_engine=True, learning_rates=LearningRates(1e-3, _BY_PROBES.to_try, lora_factor=1e3),
    ),
    Method(
        "hosl", "The paper: the client by probes, whose losses the server returns; the server by backprop.",
        rounds.hosl_round, reads=_TRAINED | PROBES | {"zo.server_gradient_at"},
        variants=(
            ("profile", "authors-head", authors_head_round),
            ("zo.server_gradient_at", "first-plus", rounds.hosl_first_plus_round),
        ),
        draws=frozenset({"client"}), uploads_per_direction=2, on_engine=True, learning_rates=_BY_PROBES,
    ),
    Method(
        "hosl-gradient", "As hosl, but the server returns dL/dh once and the client projects its probes on it.",
        rounds.hosl_gradient_round, reads=_TRAINED | PROBES | {"zo.sides", "zo.derivative", "zo.row_clip"},
        variants=(
            ("zo.sides", "one", rounds.hosl_gradient_one_sided_round),
            ("zo.derivative", "forward-mode", rounds.hosl_gradient_forward_mode_round),
        ),
        draws=frozenset({"client"}), wants_gradient=True, on_engine=True, learning_rates=_BY_PROBES,
    ),
    Method(
        "hosl-residual", "The client's last blocks take the returned gradient for their own: no probes, no backprop.",
        rounds.hosl_residual_round,
        reads=frozenset({
            "client.trainable", "client.dtype", "client.optimiser", "client.micro_batch_size", *_RESIDUAL,
        }),
        variants=(
            ("residual.slopes", "one", rounds.hosl_residual_slopes_round),
            ("residual.slopes", "per-block", rounds.hosl_residual_slopes_round),
        ),
        keeps_by_blocks=True, client_state="weights", trains="last-blocks", wants_gradient=True,
        on_the_wire="hosl-gradient", on_engine=True, learning_rates=LearningRates(3e-2, _DESCENDED),
        learning_rates_adamw=_FED_BACK_BY_ADAMW,
    ),
    Method(
        "hosl-node", "The last block's output projections by measured slopes, its queries by node perturbation.",
        rounds.hosl_node_round, reads=frozenset({"client.micro_batch_size"}),
        client_state="weights", trains="last-blocks", usual_blocks=lambda cut: 1, draws=frozenset({"client"}),
        wants_gradient=True, on_the_wire="hosl-gradient", learning_rates=LearningRates(1e-2, _DESCENDED),
    ),
    Method(
        "fo-zo", "The client by backprop, the server by probes.", rounds.fo_zo_round,
        reads=PROBES | {"client.trainable", "client.dtype", "client.optimiser"},
        backward="graph", client_state="weights", draws=frozenset({"server"}), wants_gradient=True,
        server="zeroth-order", uploads_per_direction=2, learning_rates=_BY_GRADIENT, learning_rates_adamw=_BY_ADAMW,
    ),
    Method(
        "fo-recompute", "As fo-fo in little memory: block by block with recomputation, the update inside backward.",
        rounds.fo_round, reads=_TRAINED | {"client.optimiser"}, lets_stand=PROBES, backward="blocks",
        client_state="weights", wants_gradient=True, on_the_wire="fo-fo", on_engine=True, learning_rates=_BY_GRADIENT,
        learning_rates_adamw=_BY_ADAMW,
    ),
    Method(
        "fo-fo", "Ordinary split learning: backprop through both halves.", rounds.fo_round,
        reads=frozenset({"client.trainable", "client.dtype", "client.optimiser"}), lets_stand=PROBES,
        backward="graph", client_state="weights", wants_gradient=True, learning_rates=_BY_GRADIENT,
        learning_rates_adamw=_BY_ADAMW,
    ),
)  # fmt: skip

METHODS: Mapping[str, Method] = {row.name: row for row in _ROWS}
"""All methods by name, in the order of tables: frozen first, first-order last."""

FROZEN, FIRST_ORDER = "frozen", "fo-fo"
"""The two baselines of every comparison: gap closure is 0 at the first and 1 at the second."""

USUAL_ON_ENGINE = "fo-recompute"
"""The method of a device on an inference engine where none is named: the engine computes exact gradients, too."""

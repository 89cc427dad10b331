"""The variants of client training that `hosl bench` measures and `hosl plan` compares.

A variant is data: a method and some settings. To measure another one, add a line to `VARIANTS`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import msgspec

from hosl.config import ClientConfig, Config, ZOConfig, parse_config
from hosl.core.methods import GOVERNED, METHODS, Method
from hosl.errors import ConfigError

SGD = {"name": "sgd"}
ADAMW = {"name": "adamw"}
LORA = {"trainable": "lora"}

_SHARED = ("zo.clip", "zo.normalise", "zo.row_clip")
"""The settings of `GOVERNED` that a variant takes over from the config that it is applied to."""
_OF_ITS_METHOD = ("client.optimiser", "residual.slopes", "residual.decay", "residual.kept")
"""Those that it takes over from a config of its own method only."""


@dataclass(frozen=True)
class Variant:
    """One way to train a client: a method with settings of the sections zo, residual, client and model."""

    name: str
    method: str
    zo: Mapping[str, Any] = field(default_factory=dict)
    client: Mapping[str, Any] = field(default_factory=dict)
    model: Mapping[str, Any] = field(default_factory=dict)
    residual: Mapping[str, Any] = field(default_factory=dict)
    planned: bool = False
    """Whether `hosl plan` compares it by default."""
    choice: int | None = None
    """Its rank among the forward-only variants that a plan recommends, by their results (docs/results/index.md)."""
    choice_of_texts: int | None = None
    """Its rank for language models, before all those that have `choice` alone, by results on such models."""
    on_engine: bool = False
    """Whether it is compared on the inference engine by default."""
    choice_on_engine: int | None = None
    """Its rank among the variants that a plan for the engine recommends: an engine that only infers computes exact
    gradients, too, so that forward-only ways are for what they keep and send (docs/how-to/device.md)."""

    @property
    def method_row(self) -> Method:
        """The row of the table of methods."""
        return METHODS[self.method]

    def config(self, *, cut: int, directions: int, micro_batch_size: int | None = None) -> Config:
        """The config of a run of this variant at a cut, with Q directions where the method has any.

        Raises:
            ConfigError: if the method does not allow these settings.
        """
        base = Config(
            zo=ZOConfig(directions=directions, distribution="rademacher"),
            client=ClientConfig(learning_rate=1e-9),
        )
        return self.applied(base, cut=cut, micro_batch_size=micro_batch_size)

    def applied(self, base: Config, *, cut: int, micro_batch_size: int | None = None) -> Config:
        """`base` with this variant's settings at a cut; settings that the method does not read are reset.

        Of a `base` of the same method the optimiser and the settings of residual feedback stay.

        Raises:
            ConfigError: if the method does not allow the settings of `base` or of the variant.
        """
        settings: dict[str, Any] = msgspec.to_builtins(base)
        defaults = msgspec.to_builtins(Config())
        reads = self.method_row.reads
        shared = (*_SHARED, *_OF_ITS_METHOD) if base.method == self.method else _SHARED
        for path in GOVERNED:
            section, _, name = path.partition(".")
            if path not in reads or path not in shared:
                settings[section][name] = defaults[section][name]
        if base.method_row.keeps_by_blocks != self.method_row.keeps_by_blocks:  # they adapt other layers
            settings["client"]["lora"]["target_modules"] = None
        if self.method_row.client_state != "journal":  # it has no updates that devices could share
            settings["clients"]["halves"] = "personal"
        if self.method_row.server != "first-order":
            settings["clients"]["schedule"] = "sequential"
        settings |= {"method": self.method, "profile": "paper"}
        settings["zo"] |= self.zo
        settings["residual"] |= self.residual
        settings["model"] |= {"cut": cut, **self.model}
        settings["client"] |= self.client
        if "client.micro_batch_size" in reads:
            settings["client"]["micro_batch_size"] = micro_batch_size
        return parse_config(settings, where=f"of {self.name}")


FORWARD = Variant("frozen", "frozen", planned=True, choice=6, on_engine=True, choice_on_engine=5)
"""The baseline of all variants: one forward pass of the same half."""

FIRST_ORDER = Variant("fo-fo", "fo-fo", client={"optimiser": SGD}, planned=True)
"""Plain backprop through the whole batch, with the optimiser that needs no state."""

VARIANTS = (
    FORWARD,
    Variant("hosl", "hosl", planned=True, choice=5, on_engine=True),
    Variant("hosl, gaussian", "hosl", {"distribution": "gaussian"}),
    Variant("hosl, low-rank", "hosl", {"distribution": "low-rank"}, on_engine=True),
    Variant("hosl, LoRA", "hosl", client=LORA, on_engine=True),
    Variant("hosl, first-plus", "hosl", {"server_gradient_at": "first-plus"}),
    Variant("hosl-gradient", "hosl-gradient", planned=True, choice=3, on_engine=True),
    Variant("hosl-gradient, one-sided", "hosl-gradient", {"sides": "one"}),
    Variant("hosl-gradient, forward-mode", "hosl-gradient", {"derivative": "forward-mode"}),
    Variant("hosl-gradient, low-rank", "hosl-gradient", {"distribution": "low-rank"}),
    Variant(
        "hosl-gradient, low-rank, one-sided", "hosl-gradient", {"distribution": "low-rank", "sides": "one"}
    ),
    Variant("hosl-residual", "hosl-residual", planned=True, choice=2, choice_of_texts=2, on_engine=True),
    Variant("hosl-residual, all blocks", "hosl-residual", residual={"blocks": "all"}),
    Variant(
        "hosl-residual, all blocks, inputs kept",
        "hosl-residual",
        residual={"blocks": "all", "kept": "inputs"},
    ),
    Variant("hosl-residual, one slope", "hosl-residual", residual={"slopes": "one"}),
    Variant("hosl-residual, a slope per block", "hosl-residual", residual={"slopes": "per-block"}),
    Variant("hosl-residual, AdamW", "hosl-residual", client={"optimiser": ADAMW}),
    Variant("hosl-residual, LoRA", "hosl-residual", client=LORA),
    Variant(
        "hosl-residual, LoRA + AdamW",
        "hosl-residual",
        client={**LORA, "optimiser": ADAMW},
        planned=True,
        choice_of_texts=1,
    ),
    Variant("hosl-node", "hosl-node", planned=True, choice=1),
    Variant("zo-zo", "zo-zo"),
    Variant("hosl-gradient, LoRA", "hosl-gradient", client=LORA),
    Variant("hosl-gradient, bfloat16", "hosl-gradient", model={"dtype": "bfloat16"}, planned=True),
    Variant("hosl-gradient, bfloat16 + LoRA", "hosl-gradient", client={**LORA, "dtype": "bfloat16"}),
    Variant(
        "hosl-gradient, int8 + LoRA",
        "hosl-gradient",
        client={**LORA, "dtype": "int8"},
        planned=True,
        choice=4,
    ),
    FIRST_ORDER,
    Variant("fo-fo, AdamW", "fo-fo", client={"optimiser": ADAMW}),
    Variant("fo-fo, LoRA", "fo-fo", client={"optimiser": SGD, **LORA}),
    Variant("fo-recompute", "fo-recompute", planned=True, on_engine=True, choice_on_engine=1),
    Variant(
        "fo-recompute, last block",
        "fo-recompute",
        client={"trainable": "last-block"},
        planned=True,
        on_engine=True,
        choice_on_engine=2,
    ),
    Variant("fo-recompute, LoRA", "fo-recompute", client=LORA, on_engine=True, choice_on_engine=3),
    Variant(
        "fo-recompute, LoRA + AdamW", "fo-recompute", client={**LORA, "optimiser": ADAMW}, on_engine=True
    ),
    Variant(
        "fo-recompute, int8 + LoRA",
        "fo-recompute",
        client={**LORA, "dtype": "int8"},
        on_engine=True,
        choice_on_engine=4,
    ),
)

ON_ENGINE = tuple(variant for variant in VARIANTS if variant.on_engine)
"""The variants that are compared on the inference engine (the onnx runtime) by default."""


def variants_called(names: str | None, usual: tuple[Variant, ...] = VARIANTS) -> tuple[Variant, ...]:
    """The variants with these names, separated by semicolons; None: the usual ones.

    Raises:
        ConfigError: if there is no such variant, or none is named.
    """
    if names is None:
        return usual
    by_name = {variant.name: variant for variant in VARIANTS}
    chosen = list(dict.fromkeys(" ".join(name.split()) for name in names.split(";") if name.strip()))
    for name in chosen or [names]:
        if name not in by_name:
            raise ConfigError(
                f"no variant is called {name!r}; names are separated by semicolons, and there are: {'; '.join(by_name)}"
            )
    return tuple(by_name[name] for name in chosen)

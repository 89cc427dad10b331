"""Every way to train a client, as settings of one config: the rows of `hosl bench` and `hosl plan`.

A row is data. To measure another method, add a line.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import msgspec

from hosl.config import ClientConfig, Config, ZOConfig, parse_config
from hosl.errors import ConfigError

SGD = {"name": "sgd"}
ADAMW = {"name": "adamw"}
LORA = {"trainable": "lora"}


@dataclass(frozen=True)
class Row:
    """One way to train a client."""

    name: str
    method: str
    zo: Mapping[str, Any] = field(default_factory=dict)
    client: Mapping[str, Any] = field(default_factory=dict)
    model: Mapping[str, Any] = field(default_factory=dict)

    def config(self, *, cut: int, directions: int, micro_batch_size: int | None = None) -> Config:
        """This row's run at a cut, with Q directions where the method has any.

        Raises:
            ConfigError: if the method does not allow what was asked.
        """
        base = Config(
            zo=ZOConfig(directions=directions, distribution="rademacher"),
            client=ClientConfig(learning_rate=1e-9),
        )
        return self.applied(base, cut=cut, micro_batch_size=micro_batch_size)

    def applied(self, base: Config, *, cut: int, micro_batch_size: int | None = None) -> Config:
        """`base`, trained in this way at this cut.

        Raises:
            ConfigError: if the method does not allow what `base` or the row asks.
        """
        settings: dict[str, Any] = msgspec.to_builtins(base)
        settings |= {"method": self.method, "profile": "paper"}
        plain = msgspec.to_builtins(Config())
        settings["zo"] |= {
            name: plain["zo"][name] for name in ("server_gradient_at", "sides", "derivative", "guidance")
        } | dict(self.zo)
        settings["model"] |= {"cut": cut, **self.model}
        of_row = {
            name: plain["client"][name] for name in ("trainable", "dtype", "optimiser", "micro_batch_size")
        }
        settings["client"] |= of_row | dict(self.client)
        if self.method not in ("fo-fo", "fo-zo"):
            settings["client"]["micro_batch_size"] = micro_batch_size
        return parse_config(settings, where=f"of the row {self.name}")


FORWARD = Row("frozen", "frozen")
"""What every row is compared with: one forward pass of the same half."""

FIRST_ORDER = Row("fo-fo", "fo-fo", client={"optimiser": SGD})
"""Plain backprop through the whole batch, with the optimiser that needs no state."""

ROWS = (
    FORWARD,
    Row("hosl", "hosl"),
    Row("hosl, gaussian", "hosl", {"distribution": "gaussian"}),
    Row("hosl, low-rank", "hosl", {"distribution": "low-rank"}),
    Row("hosl, first-plus", "hosl", {"server_gradient_at": "first-plus"}),
    Row("hosl, mean-plus", "hosl", {"server_gradient_at": "mean-plus"}),
    Row("hosl-gradient", "hosl-gradient"),
    Row("hosl-gradient, one-sided", "hosl-gradient", {"sides": "one"}),
    Row("hosl-gradient, forward-mode", "hosl-gradient", {"derivative": "forward-mode"}),
    Row("hosl-gradient, low-rank", "hosl-gradient", {"distribution": "low-rank"}),
    Row("hosl-gradient, low-rank, one-sided", "hosl-gradient", {"distribution": "low-rank", "sides": "one"}),
    Row("hosl-gradient, activation-guided", "hosl-gradient", {"guidance": "activation"}),
    Row("hosl-gradient, mixed", "hosl-gradient", {"guidance": "mixed"}),
    Row("hosl-guided", "hosl-guided"),
    Row("hosl-node", "hosl-node"),
    Row("zo-zo", "zo-zo"),
    Row("hosl-gradient, LoRA", "hosl-gradient", client=LORA),
    Row("hosl-gradient, bfloat16", "hosl-gradient", model={"dtype": "bfloat16"}),
    Row("hosl-gradient, bfloat16 + LoRA", "hosl-gradient", client={**LORA, "dtype": "bfloat16"}),
    Row("hosl-gradient, int8 + LoRA", "hosl-gradient", client={**LORA, "dtype": "int8"}),
    FIRST_ORDER,
    Row("fo-fo, AdamW", "fo-fo", client={"optimiser": ADAMW}),
    Row("fo-fo, LoRA", "fo-fo", client={"optimiser": SGD, **LORA}),
    Row("fo-recompute", "fo-recompute"),
    Row("fo-recompute, last block", "fo-recompute", client={"trainable": "last-block"}),
)


def rows_called(names: str | None) -> tuple[Row, ...]:
    """Those of `ROWS` whose names are given, separated by semicolons; None: all.

    Raises:
        ConfigError: if there is no such row.
    """
    if names is None:
        return ROWS
    by_name = {row.name: row for row in ROWS}
    wanted = [name.strip() for name in names.split(";")]
    for name in wanted:
        if name not in by_name:
            raise ConfigError(f"no row is called {name!r}; there are: {'; '.join(by_name)}")
    return tuple(by_name[name] for name in wanted)

"""Settings of a split that a config can name. No torch here: the schema is read by processes without it."""

import msgspec

from hosl.errors import ConfigError


class LoraSpec(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Low-rank adapters, by the names of peft's LoraConfig. No dropout: a probe's two losses must be one function."""

    r: int = 8
    """The rank."""
    alpha: int = 16
    """The adapter's output is scaled by alpha / r."""
    target_modules: tuple[str, ...] | None = None
    """The last parts of module names, such as q_proj; default: peft's own choice for the architecture."""

    def __post_init__(self) -> None:
        for name, most in (("r", 1024), ("alpha", 2**20)):
            value = getattr(self, name)
            if not 1 <= value <= most:
                shown = value if abs(value) < 10**12 else f"a number of {len(str(abs(value)))} digits"
                raise ConfigError(f"lora.{name} must lie in 1..{most:,}, got {shown}")
        if self.target_modules is not None and not self.target_modules:
            raise ConfigError("lora.target_modules is empty; name at least one module, or leave it out")
        for name in self.target_modules or ():
            if not name or any(character in ",;[]\"'" or character.isspace() for character in name):
                raise ConfigError(
                    f"lora.target_modules has {name!r}, which is no module's name; in a file it is a list, such as "
                    "[q_proj, v_proj], on a command line words: --client.lora.target-modules q_proj v_proj"
                )


class GraphSpec(msgspec.Struct, frozen=True, kw_only=True):
    """The graphs of a client half that are made for an inference engine, beside those of plain weights."""

    lora_targets: tuple[str, ...] = ()
    """The last parts of the names of layers to adapt, such as q_proj; empty: no graphs with adapters."""
    int8: bool = False
    """Whether to make int8 matrices of the blocks, and graphs for them, too."""

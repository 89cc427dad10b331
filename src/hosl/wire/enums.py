"""The names that people write and the wire's closed lists of them: `hosl-gradient` <-> Method.HOSL_GRADIENT."""

from typing import Any

from hosl.errors import WireError

_WRITTEN = {
    "bf16": "TO_BFLOAT16",
    "int8": "TO_INT8",
    "server": "LABELS_AT_SERVER",
    "client": "LABELS_AT_CLIENT",
}
_READ = {value: name for name, value in _WRITTEN.items()}


def to_enum(kind: Any, name: str) -> Any:
    """The number of a name in one of the wire's enums; the name must be one that hosl itself wrote."""
    return kind.Value(_WRITTEN.get(name, name.upper().replace("-", "_")))


def from_enum(kind: Any, value: int) -> str:
    """The name of a number.

    Raises:
        WireError: if the enum has no such number, or it stands for nothing.
    """
    known = kind.DESCRIPTOR.values_by_number
    if value not in known or known[value].name.endswith("_UNSPECIFIED"):
        names = ", ".join(v.name for v in known.values() if not v.name.endswith("_UNSPECIFIED"))
        raise WireError(f"{kind.DESCRIPTOR.name} {value} is unknown; there are {names}")
    name: str = known[value].name
    return _READ.get(name) or name.lower().replace("_", "-")

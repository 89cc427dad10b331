"""Names as a config writes them <-> the enums of the wire: `hosl-gradient` <-> Method.HOSL_GRADIENT."""

from typing import Any

from hosl.errors import WireError

_ENUM_NAMES = {
    "bf16": "TO_BFLOAT16",
    "int8": "TO_INT8",
    "server": "LABELS_AT_SERVER",
    "client": "LABELS_AT_CLIENT",
}
_CONFIG_NAMES = {value: name for name, value in _ENUM_NAMES.items()}


def to_enum(kind: Any, name: str) -> Any:
    """The number of a name in an enum of the wire, `kind`; the name must be a valid one."""
    return kind.Value(_ENUM_NAMES.get(name, name.upper().replace("-", "_")))


def from_enum(kind: Any, value: int) -> str:
    """The name of a number in an enum of the wire, `kind`.

    Raises:
        WireError: if the enum has no such number, or it is the one for "unspecified".
    """
    values = kind.DESCRIPTOR.values_by_number
    if value not in values or values[value].name.endswith("_UNSPECIFIED"):
        names = ", ".join(v.name for v in values.values() if not v.name.endswith("_UNSPECIFIED"))
        raise WireError(f"{kind.DESCRIPTOR.name} {value} is unknown; there are {names}")
    name: str = values[value].name
    return _CONFIG_NAMES.get(name) or name.lower().replace("_", "-")

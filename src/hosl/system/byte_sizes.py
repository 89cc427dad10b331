"""Sizes of memory as people write them."""

import re

from hosl.errors import ConfigError

_UNITS = {
    "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12, "kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40,
}  # fmt: skip


def parse_bytes(text: str) -> int:
    """Bytes of `600MiB`, `2GiB`, `1.5 GB`.

    Raises:
        ConfigError: if it is none, or zero.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([a-z]+)", text.strip().lower())
    if not found or found[2] not in _UNITS or float(found[1]) <= 0:
        units = "B, KB, MB, GB, TB (powers of 1000), KiB, MiB, GiB, TiB (powers of 1024)"
        raise ConfigError(
            f"{text!r} is no amount of memory such as 600MiB; it needs a number above 0 and one of {units}"
        )
    return round(float(found[1]) * _UNITS[found[2]])


def told_bytes(count: float | int) -> str:
    """Bytes for people: `612 MiB`, `2.41 GiB`."""
    return f"{count / 2**20:.0f} MiB" if count < 2**30 else f"{count / 2**30:.2f} GiB"

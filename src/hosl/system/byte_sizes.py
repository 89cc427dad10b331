"""Amounts of memory as people write them, such as `600MiB` <-> bytes."""

import re

from hosl.errors import ConfigError

_UNITS = {
    "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12, "kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40,
}  # fmt: skip


def parse_bytes(text: str) -> int:
    """The number of bytes that `600MiB`, `2GiB` or `1.5 GB` stands for.

    Raises:
        ConfigError: if `text` is no amount of memory, or zero.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([a-z]+)", text.strip().lower())
    if not match or match[2] not in _UNITS or float(match[1]) <= 0:
        units = "B, KB, MB, GB, TB (powers of 1000), KiB, MiB, GiB, TiB (powers of 1024)"
        raise ConfigError(
            f"{text!r} is no amount of memory such as 600MiB; it needs a number above 0 and one of {units}"
        )
    return round(float(match[1]) * _UNITS[match[2]])

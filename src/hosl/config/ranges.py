"""The largest number that a setting can mean: beyond it memory, a message of the wire or float32 would give way."""

import msgspec

from hosl.errors import ConfigError

_LARGEST: dict[str, float] = {
    "seed": 2**64 - 1, "directions": 1_000_000, "per_device_train_batch_size": 1_000_000,
    "connect_s": 1e8, "idle_s": 1e8, "grace_s": 1e8,
}  # fmt: skip
_LARGEST_COUNT, _LARGEST_FLOAT = 2**31 - 1, 1e30


def check_ranges(settings: msgspec.Struct, path: str = "") -> None:
    """Refuse numbers out of range in settings and their sections; `path` goes before the names in the error.

    Raises:
        ConfigError: naming the setting and its limit.
    """
    for field in msgspec.structs.fields(settings):
        value, name = getattr(settings, field.name), f"{path}{field.encode_name}"
        if isinstance(value, msgspec.Struct):
            check_ranges(value, f"{name}.")
        elif isinstance(value, int | float):
            largest = _LARGEST.get(field.name, _LARGEST_COUNT if isinstance(value, int) else _LARGEST_FLOAT)
            if not (0 if field.name == "seed" else -largest) <= value <= largest:
                shown = str(value) if len(str(value)) < 30 else f"a number of {len(str(value))} digits"
                raise ConfigError(f"{name} must lie in 0..{largest:,}, got {shown}")

"""Bytes, seconds, counts and other libraries' messages as people read them."""

from collections.abc import Sequence


def readable_bytes(count: float | int) -> str:
    """Size to three digits in powers of 1024: `4 B`, `1.01 MiB`, `612 MiB`."""
    for unit_bytes, unit in ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if count >= unit_bytes:
            size = count / unit_bytes
            return f"{size:.3g} {unit}" if size < 999.5 else f"{size:.0f} {unit}"
    return f"{count:.0f} B"


def readable_seconds(seconds: float) -> str:
    """Duration: `1.24 s`, `35 ms`."""
    if seconds >= 0.9995:
        return f"{seconds:.2f} s"
    return f"{1000 * seconds:.0f} ms" if seconds >= 0.00995 else f"{1000 * seconds:.1f} ms"


def readable_span(seconds: float) -> str:
    """Long time in its largest whole unit: `12 s`, `5 min`, `3 h`, `2 days`."""
    if seconds < 60:
        return f"{max(seconds, 0):.0f} s"
    if seconds < 3600:
        return f"{seconds // 60:.0f} min"
    return f"{seconds // 3600:.0f} h" if seconds < 86400 else readable_count(int(seconds // 86400), "day")


def readable_count(count: int, noun: str = "") -> str:
    """Count with its noun in the singular or the plural: `1 run`, `12,345 steps`; without a noun the number alone."""
    return f"{count:,} {noun}{'s' * (count != 1)}" if noun else f"{count:,}"


def one_line(message: object) -> str:
    """What another library says, in one line of at most 300 characters."""
    return " ".join(str(message).split())[:300]


def aligned(lines: Sequence[Sequence[str]], *, left: str) -> list[str]:
    """Lines of cells as text with even columns; the first line has their names, and the column `left` is flush left."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return [
        "  ".join(
            cell.ljust(width) if name == left else cell.rjust(width)
            for name, cell, width in zip(lines[0], line, widths, strict=True)
        ).rstrip()
        for line in lines
    ]

"""One look per way to train, the same in every picture of a page, readable on white and on black.

Pictures are drawn in placeholder colours, which then become variables of the page's CSS: the page chooses by its theme.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass

_COLOURS = {
    "page": ("#ffffff", "#11161c"), "card": ("#f5f7f9", "#1a222b"), "line": ("#dde3ea", "#33404d"),
    "ink": ("#1b2530", "#e3e9f0"), "quiet": ("#5c6a79", "#9aa8b7"),
    "client": ("#0f7d86", "#4cc3cb"), "server": ("#b0741a", "#e0b052"), "wire": ("#7d55c7", "#b79bf2"),
    "rest": ("#a3aeba", "#5d6a78"),
    "frozen": ("#76838f", "#98a5b3"), "zo-zo": ("#b83280", "#ef86c4"), "hosl": ("#d2691e", "#f29b55"),
    "hosl-gradient": ("#16875a", "#4fc892"), "hosl-guided": ("#7d55c7", "#b79bf2"),
    "hosl-node": ("#1f6fd1", "#6cb0ff"), "fo-zo": ("#83740f", "#cfc05a"), "fo-recompute": ("#b3352c", "#f27c71"),
    "fo-fo": ("#1b2530", "#e3e9f0"),
}  # fmt: skip
"""Name -> on a light page, on a dark one. A method's name is its colour's."""
_NAMES = tuple(_COLOURS)
_DASHES: tuple[tuple[float, ...], ...] = ((), (5.0, 2.0), (1.5, 1.5), (7.0, 2.0, 1.5, 2.0), (3.0, 1.0))
_MARKERS = ("o", "s", "D", "^", "v")
_KEY_MARKS = {
    "o": '<circle cx="14" cy="6" r="3.6"/>', "s": '<path d="M10.6 2.6h6.8v6.8h-6.8z"/>',
    "D": '<path d="M14 1.6l4.4 4.4-4.4 4.4-4.4-4.4z"/>', "^": '<path d="M14 1.8l4.4 7.8h-8.8z"/>',
    "v": '<path d="M14 10.2l4.4-7.8h-8.8z"/>',
}  # fmt: skip


@dataclass(frozen=True)
class Look:
    """How a way to train is drawn: its method's colour, and dashes and a marker that tell apart ways of one method."""

    name: str
    """Of the colour."""
    dashes: tuple[float, ...]
    """In line widths; empty: a plain line."""
    marker: str

    @property
    def line(self) -> tuple[float, tuple[float, ...] | None]:
        """As matplotlib wants it."""
        return (0.0, self.dashes or None)

    def key(self) -> str:
        """A small sample of it, for a legend in HTML."""
        dashes = " ".join(f"{1.8 * part:g}" for part in self.dashes)
        return (
            f'<svg class="key" viewBox="0 0 28 12" style="stroke:var(--{self.name});fill:var(--{self.name})" '
            f'aria-hidden="true"><path d="M0 6H28" style="stroke-width:1.8;stroke-dasharray:{dashes or "none"}"/>'
            f"{_KEY_MARKS[self.marker]}</svg>"
        )


def placeholder(name: str) -> str:
    """The colour that stands for a name of the page while a picture is drawn."""
    return f"#0101{_NAMES.index(name):02x}"


def with_variables(svg: str) -> str:
    """Placeholders replaced by the page's variables."""
    return re.sub(r"#0101([0-9a-f]{2})", lambda found: f"var(--{_NAMES[int(found[1], 16)]})", svg)


def css_variables(*, dark: bool) -> str:
    """Declarations for `:root`."""
    return " ".join(f"--{name}: {pair[dark]};" for name, pair in _COLOURS.items())


def looks(methods: Mapping[str, str]) -> dict[str, Look]:
    """A look for every way, given its method; a frozen client is dashed, as it is in all pictures of studies."""
    found: dict[str, Look] = {}
    used: dict[str, int] = {}
    for way, method in methods.items():
        name = method if method in _COLOURS else "quiet"
        place = used.get(name, 0)
        used[name] = place + 1
        dashes = _DASHES[(place + (method == "frozen")) % len(_DASHES)]
        marker = _MARKERS[(place + place // len(_DASHES)) % len(_MARKERS)]  # another pair after each five
        found[way] = Look(name, dashes, marker)
    return found

"""The palette, and one look per way to train: the same in every picture, readable on white and on black.

A page's pictures are drawn in placeholder colours, which then become variables of its CSS: the page chooses by its
theme. A picture in a file of its own has the colours that stand on white.
"""

import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass

_COLOURS = {
    "page": ("#ffffff", "#11161c"), "card": ("#f5f7f9", "#1a222b"), "line": ("#dde3ea", "#33404d"),
    "ink": ("#1b2530", "#e3e9f0"), "quiet": ("#5c6a79", "#9aa8b7"),
    "client": ("#0f7d86", "#4cc3cb"), "server": ("#b0741a", "#e0b052"), "wire": ("#7d55c7", "#b79bf2"),
    "rest": ("#a3aeba", "#5d6a78"),
    "frozen": ("#76838f", "#98a5b3"), "zo-zo": ("#b83280", "#ef86c4"), "hosl": ("#d2691e", "#f29b55"),
    "hosl-gradient": ("#16875a", "#4fc892"), "hosl-residual": ("#7d55c7", "#b79bf2"),
    "hosl-node": ("#1f6fd1", "#6cb0ff"), "fo-zo": ("#83740f", "#cfc05a"), "fo-recompute": ("#b3352c", "#f27c71"),
    "fo-fo": ("#1b2530", "#e3e9f0"),
}  # fmt: skip
"""Name -> on a light page, on a dark one. A method's name is its colour's."""
_NAMES = tuple(_COLOURS)
_DASHES: tuple[tuple[float, ...], ...] = ((), (5.0, 2.0), (1.5, 1.5), (7.0, 2.0, 1.5, 2.0), (3.0, 1.0))
_MARKERS = ("o", "s", "D", "^", "v")


@dataclass(frozen=True)
class Look:
    """Style of a way to train: its method's colour, and dashes and a marker that tell apart ways of one method."""

    name: str
    """Name of the colour."""
    dashes: tuple[float, ...]
    """Lengths in line widths; empty: a plain line."""
    marker: str

    @property
    def line(self) -> tuple[float, tuple[float, ...] | None]:
        """Dashes in matplotlib's notation."""
        return (0.0, self.dashes or None)


class Looks(dict[str, Look]):
    """Way -> its look, and what paints a colour by its name: `placeholder` for a page, `on_paper` for a file."""

    def __init__(self, looks: Mapping[str, Look], paint: Callable[[str], str]) -> None:
        super().__init__(looks)
        self.paint = paint

    def colour(self, way: str) -> str:
        """Colour of a way, painted."""
        return self.paint(self[way].name)


def on_paper(name: str) -> str:
    """Colour of a picture in a file of its own, on white."""
    return _COLOURS[name][0]


def placeholder(name: str) -> str:
    """Colour that stands for a name of the page while a picture is drawn."""
    return f"#0101{_NAMES.index(name):02x}"


def with_variables(svg: str) -> str:
    """Drawing with the page's variables in place of placeholders."""
    return re.sub(r"#0101([0-9a-f]{2})", lambda match: f"var(--{_NAMES[int(match[1], 16)]})", svg)


def css_variables(*, dark: bool) -> str:
    """Declarations for `:root`."""
    return " ".join(f"--{name}: {pair[dark]};" for name, pair in _COLOURS.items())


def looks(methods: Mapping[str, str], paint: Callable[[str], str] = placeholder) -> Looks:
    """Look of every way, given its method; a frozen client is dashed."""
    by_way: dict[str, Look] = {}
    used = Counter[str]()
    for way, method in methods.items():
        name = method if method in _COLOURS else "quiet"
        earlier = used[name]
        used[name] += 1
        dashes = _DASHES[(earlier + (method == "frozen")) % len(_DASHES)]
        marker = _MARKERS[(earlier + earlier // len(_DASHES)) % len(_MARKERS)]  # another pair after each five
        by_way[way] = Look(name, dashes, marker)
    return Looks(by_way, paint)

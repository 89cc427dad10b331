"""Labels beside points, moved up where they would lie on each other. Arithmetic only."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

_HEIGHT = 11.5
"""Of a line of text, in points."""
_CHARACTER = 5.1
"""Width of a character, in points."""
_GAP = 9.0
"""Between a point and its label, in points."""


@dataclass(frozen=True)
class Label:
    """A text to the right of a point."""

    x: float
    y: float
    text: str
    colour: str
    """A name of the page's colours."""

    @property
    def width(self) -> float:
        """From its point to its end, in points."""
        return _GAP + _CHARACTER * len(self.text)


def room_for(labels: Sequence[Label], left: float, width: float) -> float:
    """Where an axis that begins at `left` and is `width` points wide has to end for every label to fit."""
    return max(left + (label.x - left) / max(1 - (label.width + 6) / width, 0.2) for label in labels)


def spread_apart(
    labels: Sequence[Label], place: Callable[[float, float], tuple[float, ...]]
) -> list[tuple[Label, float]]:
    """Every label with how far it is lifted, in points.

    Args:
        labels: of one picture.
        place: data to points of 1/72 inch.
    """
    taken: list[tuple[float, float, float]] = []  # left, right, height
    found = []
    for label in sorted(labels, key=lambda label: label.y):
        left, at = place(label.x, label.y)[:2]
        right, lifted = left + label.width, at
        for other_left, other_right, other in sorted(taken, key=lambda of: of[2]):
            if other_left < right and left < other_right and abs(lifted - other) < _HEIGHT:
                lifted = other + _HEIGHT
        taken.append((left, right, lifted))
        found.append((label, lifted - at))
    return found

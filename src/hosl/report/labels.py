"""Labels beside points, moved up where they would lie on each other or on another's point. Arithmetic only."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

_HEIGHT = 11.5
"""Height of a line of text, in points."""
_CHARACTER = 5.1
"""Width of a character, in points."""
_GAP = 9.0
"""Between a point and its label, in points."""
_POINT = 4.0
"""Half of a point's width, in points."""


@dataclass(frozen=True)
class Label:
    """Text to the right of a point."""

    x: float
    y: float
    text: str
    colour: str
    """Colour, as it is drawn."""

    @property
    def width(self) -> float:
        """Points from its point to its end."""
        return _GAP + _CHARACTER * len(self.text)


def room_for(labels: Sequence[Label], left: float, width: float) -> float:
    """End of an axis that begins at `left` and is `width` points wide, so that every label fits."""
    return max(left + (label.x - left) / max(1 - (label.width + 6) / width, 0.2) for label in labels)


def spread_apart(
    labels: Sequence[Label], to_points: Callable[[float, float], tuple[float, ...]]
) -> list[tuple[Label, float]]:
    """Labels of one picture, each with how many points it is lifted; `to_points` takes data to points."""
    places = [to_points(label.x, label.y)[:2] for label in labels]
    taken = [(x - _POINT, x + _POINT, y) for x, y in places]  # left, right, height
    lifts = []
    for label in sorted(labels, key=lambda label: label.y):
        left, height = to_points(label.x, label.y)[:2]
        left, right, lifted = left + _GAP, left + label.width, height
        for other_left, other_right, other in sorted(taken, key=lambda spot: spot[2]):
            if other_left < right and left < other_right and abs(lifted - other) < _HEIGHT:
                lifted = other + _HEIGHT
        taken.append((left, right, lifted))
        lifts.append((label, lifted - height))
    return lifts

"""Schema of a rate study (`kind: rate` in the YAML of `hosl study`), and the cells that it stands for.

What a cell measures: `study`. The problems themselves: `chain`, `bert`.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any, Literal, TypeAlias

import msgspec

from hosl.core.directions import Distribution
from hosl.errors import ConfigError

AxisName: TypeAlias = Literal["T", "Q", "d_c", "Q at constant QT"]

THEORY: dict[AxisName, float] = {"T": -0.5, "Q": -0.5, "d_c": 0.5, "Q at constant QT": 0.0}
"""Exponents of O(sqrt(d_c / (T Q))). Source: paper.md section 5."""


class Middle(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The point of the grid through which every axis goes, and on which the step size is tuned."""

    steps: int
    directions: int
    cut: int

    def __post_init__(self) -> None:
        _check_positive(self, "steps", "directions", prefix="middle.")


class RateProblem(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag_field="kind"):
    """What every problem has: a grid of three axes through one point, and step sizes to choose from."""

    middle: Middle
    seeds: tuple[int, ...] = (0, 1, 2)
    """Draw start, mini-batches and directions. Step sizes are chosen on the first."""
    scales: tuple[float, ...]
    """c of eta = c sqrt(Q / (d_c T)); that with the lowest average at the middle is kept for the whole grid."""
    steps: tuple[int, ...] = ()
    """T of the first axis; none: no such axis."""
    directions: tuple[int, ...] = ()
    """Q of the second axis, and of the check at constant Q T."""
    cuts: tuple[int, ...] = ()
    """Of the third axis."""
    batch_rows: int
    """Rows of a mini-batch, drawn with replacement: gradients are unbiased, their noise independent over steps."""
    measure_every: int = 1
    """The full gradient is evaluated at every so-manieth step, at the middle of its stretch; T of a cell at most."""

    def __post_init__(self) -> None:
        if not self.scales or not self.seeds:
            raise ConfigError("scales and seeds need one entry each at least")
        if _repeat(self.scales) or not all(0 < c < math.inf for c in self.scales):
            raise ConfigError(f"scales must be different positive numbers, got {list(self.scales)}")
        if _repeat(self.seeds) or not all(0 <= seed < 2**63 for seed in self.seeds):
            raise ConfigError(
                f"seeds must be different whole numbers from 0 to 2^63 - 1, got {list(self.seeds)}"
            )
        _check_positive(self, "batch_rows")
        for name in ("steps", "directions", "cuts"):
            axis, middle = (
                getattr(self, name),
                getattr(self.middle, name.removesuffix("s") if name == "cuts" else name),
            )
            if axis and middle not in axis:
                raise ConfigError(f"{name} must hold the middle's {middle}, got {list(axis)}")
            if _repeat(axis) or any(value < (name != "cuts") for value in axis):
                least = "different, and >= 0" if name == "cuts" else "different positive numbers"
                raise ConfigError(f"{name} must be {least}, got {list(axis)}")
        product = self.middle.steps * self.middle.directions
        for q in self.directions:
            if product % q:
                raise ConfigError(f"directions: {q} does not divide the middle's Q T = {product}")
        fewest = min([self.middle.steps, *self.steps, *(product // q for q in self.directions)])
        if not 1 <= self.measure_every <= fewest:
            raise ConfigError(
                f"measure_every must lie in 1..{fewest}, the fewest steps of a cell, got {self.measure_every}"
            )


class ChainProblem(RateProblem, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="chain"):
    """A chain of angles in a field: smooth, bounded below, not convex; every coordinate is curved alike."""

    size: int
    """d = d_c + d_s; a cut is d_c."""
    coupling: float = 0.25
    """Of neighbours, the two at the cut among them."""
    rows: int = 256
    noise: float
    """Root mean square over rows of |row's gradient - full gradient|."""
    noisy_coordinates: int | None = None
    """How many of the first coordinates hold that noise; null: all, so that the client's share grows with d_c."""

    def __post_init__(self) -> None:
        RateProblem.__post_init__(self)
        for cut in (*self.cuts, self.middle.cut):
            if not 0 < cut < self.size:
                raise ConfigError(f"cut {cut} is outside 1..{self.size - 1}: a chain of {self.size} angles")
        if self.rows < 2:
            raise ConfigError(f"rows must be >= 2, got {self.rows}: their noise sums to zero")
        if not 0 <= self.noise < math.inf:
            raise ConfigError(f"noise must be >= 0 and finite, got {self.noise}")
        if self.noisy_coordinates is not None and not 1 <= self.noisy_coordinates <= self.size:
            raise ConfigError(
                f"noisy_coordinates must lie in 1..{self.size} or be null, got {self.noisy_coordinates}"
            )


class BertProblem(RateProblem, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="bert"):
    """A tiny BERT in float64 on a fixed made-up dataset; a cut counts blocks."""

    width: int = 8
    blocks: int = 3
    vocabulary: int = 16
    tokens: int = 8
    rows: int = 96
    flipped: float = 0.2
    """Share of labels that are wrong: without it the mini-batches' noise would vanish as the model learns."""
    weight_sd: float = 0.3
    """Of the weights at the start; biases start at 0."""

    def __post_init__(self) -> None:
        RateProblem.__post_init__(self)
        for cut in (*self.cuts, self.middle.cut):
            if not 0 <= cut <= self.blocks:
                raise ConfigError(
                    f"cut {cut} is outside 0..{self.blocks}: the model has {self.blocks} blocks"
                )
        _check_positive(self, "width", "vocabulary", "tokens", "rows")
        if self.width % 2:
            raise ConfigError(f"width must be even, got {self.width}: the model has two heads")


class RateStudy(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How the average squared gradient norm of HOSL falls with T and Q and grows with d_c."""

    kind: Literal["rate"]
    output_dir: str
    problems: dict[str, ChainProblem | BertProblem]
    epsilon: float = 1e-3
    distribution: Distribution = "gaussian"

    def __post_init__(self) -> None:
        if not self.problems:
            raise ConfigError("problems is empty; a study needs one at least")
        if not self.epsilon > 0:
            raise ConfigError(f"epsilon must be > 0, got {self.epsilon}")


@dataclass(frozen=True)
class Cell:
    """One run of HOSL."""

    problem: str
    settings: str
    """Digest of what the problem is, grid and seeds left out: results of other settings are not taken for these."""
    steps: int
    directions: int
    cut: int
    scale: float
    seed: int


def parse_rate_study(content: object, *, where: str) -> RateStudy:
    """Check what a study's file says; `where` names it in errors.

    Raises:
        ConfigError: if something in it is unknown or impossible.
    """
    try:
        return msgspec.convert(content, RateStudy)
    except msgspec.ValidationError as cause:
        raise ConfigError(f"study {where}: {cause}") from cause


def tuning_cells(study: RateStudy, name: str) -> list[Cell]:
    """The cells that choose c: the middle of the grid at every scale, on the first seed."""
    problem = study.problems[name]
    return [_cell(study, name, _point(problem.middle), c, problem.seeds[0]) for c in problem.scales]


def grid_cells(study: RateStudy, name: str, scale: float) -> list[Cell]:
    """All cells of a problem at the chosen c, each once, seed by seed."""
    problem = study.problems[name]
    points = dict.fromkeys(point for axis in axes(problem).values() for point in axis)
    return [_cell(study, name, point, scale, seed) for seed in problem.seeds for point in points]


def axes(problem: RateProblem) -> dict[AxisName, list[tuple[int, int, int]]]:
    """(T, Q, cut) of every axis's points; axes of fewer than two points are left out."""
    steps, directions, cut = _point(problem.middle)
    found: dict[AxisName, list[tuple[int, int, int]]] = {
        "T": [(t, directions, cut) for t in problem.steps],
        "Q": [(steps, q, cut) for q in problem.directions],
        "d_c": [(steps, directions, place) for place in problem.cuts],
        "Q at constant QT": [(steps * directions // q, q, cut) for q in problem.directions],
    }
    return {name: points for name, points in found.items() if len(points) > 1}


def step_size(scale: float, steps: int, directions: int, client_size: int) -> float:
    """eta = c sqrt(Q / (d_c T)), of both halves. Source: paper.md section 5, step 4."""
    return scale * math.sqrt(directions / (client_size * steps))


def _check_positive(settings: msgspec.Struct, *names: str, prefix: str = "") -> None:
    for name in names:
        if getattr(settings, name) < 1:
            raise ConfigError(f"{prefix}{name} must be >= 1, got {getattr(settings, name)}")


def _repeat(values: Sequence[object]) -> bool:
    return len(set(values)) < len(values)


def _point(middle: Middle) -> tuple[int, int, int]:
    return middle.steps, middle.directions, middle.cut


def _cell(study: RateStudy, name: str, point: tuple[int, int, int], scale: float, seed: int) -> Cell:
    what: dict[str, Any] = msgspec.to_builtins(study.problems[name])
    for of_grid in ("middle", "seeds", "scales", "steps", "directions", "cuts"):
        what.pop(of_grid)
    text = json.dumps([what, study.epsilon, study.distribution], sort_keys=True)
    return Cell(name, blake2b(text.encode(), digest_size=6).hexdigest(), *point, scale, seed)

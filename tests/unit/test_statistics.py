"""Statistics over seeds against numbers that stand in books, or can be counted on fingers."""

import itertools
import math
from collections.abc import Callable

import numpy as np
import pytest

from hosl.report.statistics import (
    GapClosure,
    NoGap,
    gap_closure,
    mean_interval,
    p_floor,
    paired_p,
    spread,
    t_quantile,
)
from research.convergence_rate.jackknife import jackknife_interval


def test_the_spread_divides_by_n_minus_one():
    assert spread(np.array([1.0, 2.0, 3.0])) == (2.0, 1.0)
    mean, sd = spread(np.array([4.0]))
    assert mean == 4.0
    assert np.isnan(sd)


def test_the_interval_is_that_of_students_own_data():
    # Student 1908, ten patients' extra hours of sleep; 95 % interval as R's t.test gives it
    sleep = np.array([1.2, 2.4, 1.3, 1.3, 0.0, 1.0, 1.8, 0.8, 4.6, 1.4])
    assert mean_interval(sleep) == pytest.approx((0.7001142, 2.4598858), abs=2e-5)
    assert np.isnan(mean_interval(np.array([1.0]))).all()


@pytest.mark.parametrize(
    ("degrees", "printed"),
    [(1, 12.7062), (2, 4.3027), (4, 2.7764), (30, 2.0423), (60, 2.0003), (120, 1.9799)],
)
def test_quantiles_are_those_of_printed_tables(degrees, printed):
    assert t_quantile(degrees) == pytest.approx(printed, abs=5e-5)


def test_quantiles_of_one_and_two_degrees_are_those_of_their_closed_forms():
    assert t_quantile(1) == pytest.approx(math.tan(0.475 * math.pi), rel=1e-12)
    assert t_quantile(2) == pytest.approx(0.95 / math.sqrt(2 * 0.975 * 0.025), rel=1e-12)


@pytest.mark.parametrize("seeds", [1, 2, 3, 5, 8])
def test_p_is_the_share_of_sign_patterns_counted_one_by_one(seeds):
    generator = np.random.Generator(np.random.Philox(seeds))
    one, other = generator.normal(size=seeds) + 0.5, generator.normal(size=seeds)
    differences = one - other
    sums = [abs(np.dot(signs, differences)) for signs in itertools.product((1, -1), repeat=seeds)]
    counted = np.mean(np.array(sums) >= abs(differences.sum()) - 1e-12)
    assert paired_p(one, other) == counted


@pytest.mark.parametrize("seeds", [3, 5, 8])
def test_p_counts_ties_between_accuracies_exactly(seeds):
    """Against whole numbers of right rows, of 872: sums of their shares are rounded, and scipy miscounts some ties."""
    generator = np.random.Generator(np.random.Philox(seeds))
    for _ in range(300):
        right, other = generator.integers(700, 780, (2, seeds))
        sums = [abs(np.dot(signs, right - other)) for signs in itertools.product((1, -1), repeat=seeds)]
        assert paired_p(right / 872, other / 872) == np.mean(np.array(sums) >= abs((right - other).sum()))


def test_p_has_a_floor_and_is_one_for_equal_rows():
    assert paired_p(np.array([1.0, 2.0, 3.0]), np.zeros(3)) == 0.25
    assert paired_p(np.arange(1.0, 6.0), np.zeros(5)) == 0.0625 == p_floor(5)
    assert paired_p(np.ones(4), np.ones(4)) == 1.0


def test_p_of_many_seeds_is_drawn_and_near_the_exact_one():
    ones = np.ones(20)
    mixed = np.array([1.0, -1.0] * 10)
    assert p_floor(20) <= paired_p(ones, np.zeros(20)) < 1e-3
    assert paired_p(mixed, np.zeros(20)) == 1.0


def test_p_is_uniform_when_there_is_no_difference():
    generator = np.random.Generator(np.random.Philox(0))
    found = np.array([paired_p(generator.normal(size=6), generator.normal(size=6)) for _ in range(2000)])
    standard_error = (0.125 * 0.875 / 2000) ** 0.5
    assert abs(np.mean(found <= 0.125) - 0.125) < 4 * standard_error


def test_gap_closure_is_the_ratio_of_means_not_the_mean_of_ratios():
    frozen, first = np.zeros(3), np.array([1.0, 2.0, 3.0])
    method = np.array([1.0, 1.0, 1.0])
    found = gap_closure(method, frozen, first, lower_is_better=False)
    # residuals 0.5, 0, -0.5 of sd 0.5; t 4.3027; gap 2
    half = 4.302653 * 0.5 / 3**0.5 / 2
    assert (found.value, found.low, found.high) == pytest.approx((0.5, 0.5 - half, 0.5 + half), rel=1e-4)
    assert str(gap_closure(first, frozen, first, lower_is_better=False)) == "1.00 [1.00, 1.00]"
    assert str(gap_closure(frozen, frozen, first, lower_is_better=False)) == "0.00 [0.00, 0.00]"


def test_gap_closure_is_the_same_for_a_metric_that_falls():
    frozen, first, method = np.array([3.0, 4.0]), np.array([1.0, 2.1]), np.array([2.0, 3.0])
    down = gap_closure(method, frozen, first, lower_is_better=True)
    assert isinstance(down, GapClosure)
    assert down == gap_closure(-method, -frozen, -first, lower_is_better=False)


@pytest.mark.parametrize("lower_is_better", [True, False])
def test_a_first_order_client_that_is_worse_than_a_frozen_one_is_no_yardstick(lower_is_better):
    worse = np.array([1.0, 1.1, 1.2]) * (1 if lower_is_better else -1)
    assert gap_closure(-worse, np.zeros(3), worse, lower_is_better=lower_is_better) is NoGap.REVERSED


@pytest.mark.parametrize(
    ("frozen", "first", "why"),
    [
        ([0.0, 0.0, 0.0], [1.0, -1.0, 0.5], NoGap.UNRESOLVED),
        ([1.0, 2.0], [1.0, 2.0], NoGap.UNRESOLVED),
        ([0.0], [1.0], NoGap.ONE_SEED),
    ],
    ids=["noisy", "none", "one seed"],
)
def test_a_gap_under_two_standard_errors_has_no_closure(frozen, first, why):
    assert gap_closure(np.array(first), np.array(frozen), np.array(first), lower_is_better=False) is why


def _share_covered(draws: int, covered: Callable[[np.random.Generator], bool]) -> float:
    generator = np.random.Generator(np.random.Philox(1))
    return sum(covered(generator) for _ in range(draws)) / draws


@pytest.mark.parametrize("seeds", [2, 3, 5, 10])
def test_the_interval_of_g_covers_the_truth_as_often_as_it_says(seeds):
    """True G 0.5; 2,000 draws have a standard error of 0.005. A bootstrap over whole seeds covers 0.53 to 0.91."""

    def covered(generator: np.random.Generator) -> bool:
        common = generator.normal(size=seeds)
        first = common + 2 + 0.3 * generator.normal(size=seeds)
        method = common + 1 + 0.3 * generator.normal(size=seeds)
        found = gap_closure(method, common, first, lower_is_better=False)
        return found.low <= 0.5 <= found.high

    assert 0.935 <= _share_covered(2000, covered) <= 0.97


@pytest.mark.parametrize("seeds", [3, 5, 8])
def test_the_jackknife_covers_the_truth_as_often_as_it_says(seeds):
    """Of the logarithm of a mean of values with a spread of a tenth, where the logarithm is nearly straight."""

    def covered(generator: np.random.Generator) -> bool:
        values = 1 + 0.1 * generator.normal(size=seeds)
        low, high = jackknife_interval(lambda kept: float(np.log(kept.mean())), values)
        return low <= 0 <= high

    assert 0.935 <= _share_covered(2000, covered) <= 0.97


def test_the_jackknife_of_a_mean_is_students_interval():
    values = np.array([1.2, 2.4, 1.3, 0.0])
    assert jackknife_interval(np.mean, values) == pytest.approx(mean_interval(values))
    assert np.isnan(jackknife_interval(np.mean, values[:1])).all()

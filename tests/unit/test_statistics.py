"""Statistics over seeds against numbers that stand in books, or can be counted on fingers."""

import itertools

import numpy as np
import pytest

from hosl.run.statistics import gap_closure, mean_interval, paired_p, spread, t_quantile


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


@pytest.mark.parametrize(("degrees", "exact"), [(31, 2.0395), (40, 2.0211), (60, 2.0003), (120, 1.9799)])
def test_quantiles_beyond_the_table_go_on_smoothly(degrees, exact):
    assert t_quantile(degrees) == pytest.approx(exact, abs=3e-4)


@pytest.mark.parametrize("seeds", [1, 2, 3, 5, 8])
def test_p_is_the_share_of_sign_patterns_counted_one_by_one(seeds):
    generator = np.random.Generator(np.random.Philox(seeds))
    one, other = generator.normal(size=seeds) + 0.5, generator.normal(size=seeds)
    differences = one - other
    sums = [abs(np.dot(signs, differences)) for signs in itertools.product((1, -1), repeat=seeds)]
    counted = np.mean(np.array(sums) >= abs(differences.sum()) - 1e-12)
    assert paired_p(one, other) == counted


def test_p_has_a_floor_and_is_one_for_equal_rows():
    assert paired_p(np.array([1.0, 2.0, 3.0]), np.zeros(3)) == 0.25
    assert paired_p(np.arange(1.0, 6.0), np.zeros(5)) == 0.0625
    assert paired_p(np.ones(4), np.ones(4)) == 1.0


def test_p_of_many_seeds_is_drawn_and_near_the_exact_one():
    ones = np.ones(20)
    mixed = np.array([1.0, -1.0] * 10)
    assert paired_p(ones, np.zeros(20)) < 1e-3
    assert paired_p(mixed, np.zeros(20)) == 1.0


def test_p_is_uniform_when_there_is_no_difference():
    generator = np.random.Generator(np.random.Philox(0))
    found = np.array([paired_p(generator.normal(size=6), generator.normal(size=6)) for _ in range(2000)])
    standard_error = (0.125 * 0.875 / 2000) ** 0.5
    assert abs(np.mean(found <= 0.125) - 0.125) < 4 * standard_error


def test_gap_closure_is_the_ratio_of_means_not_the_mean_of_ratios():
    frozen, first = np.zeros(3), np.array([1.0, 2.0, 3.0])
    method = np.array([1.0, 1.0, 1.0])
    found = gap_closure(method, frozen, first)
    assert found.value == pytest.approx(0.5)
    assert found.low <= found.value <= found.high
    assert gap_closure(first, frozen, first).value == 1.0
    assert str(gap_closure(frozen, frozen, first)) == "0.00 [0.00, 0.00]"


def test_gap_closure_is_the_same_for_a_metric_that_falls():
    frozen, first, method = np.array([3.0, 4.0]), np.array([1.0, 2.1]), np.array([2.0, 3.0])
    up, down = gap_closure(method, frozen, first), gap_closure(-method, -frozen, -first)
    assert (up.value, up.low, up.high) == (down.value, down.low, down.high)


@pytest.mark.parametrize(
    ("frozen", "first"),
    [([0.0, 0.0, 0.0], [1.0, -1.0, 0.5]), ([1.0, 2.0], [1.0, 2.0]), ([0.0], [1.0])],
    ids=["noisy", "none", "one seed"],
)
def test_a_gap_under_two_standard_errors_has_no_closure(frozen, first):
    assert gap_closure(np.array(first), np.array(frozen), np.array(first)) is None


def test_the_bootstrap_covers_the_truth_about_as_often_as_it_says():
    """Ten seeds, true G 0.5. A percentile bootstrap of few seeds is a little narrow: 0.85 to 1.0 is asked."""
    generator = np.random.Generator(np.random.Philox(1))
    inside = 0
    for _ in range(100):
        common = generator.normal(size=10)
        frozen, first = common, common + 2 + 0.3 * generator.normal(size=10)
        method = common + 1 + 0.3 * generator.normal(size=10)
        found = gap_closure(method, frozen, first)
        inside += found.low <= 0.5 <= found.high
    assert inside >= 85

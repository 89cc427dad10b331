"""Coefficient control against numpy, on any coefficients that hypothesis finds."""

import math

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from hosl.core.clipping import PLAIN, WARM_UP, WINDOW, CoefficientControl
from hosl.errors import NonFiniteError

_finite = st.floats(-1e6, 1e6).map(lambda c: 0.0 if abs(c) < 1e-9 else c)
_step = st.lists(_finite, min_size=1, max_size=8)
_not_finite = st.sampled_from([math.nan, math.inf, -math.inf])


@given(_step)
def test_by_default_finite_coefficients_pass_untouched(coefficients):
    judged = PLAIN.judge(coefficients)
    assert judged.coefficients == judged.measured == tuple(coefficients)
    assert judged.accepted == tuple(range(len(coefficients)))
    assert judged.rejected == 0
    assert PLAIN.after(judged.measured) is PLAIN
    assert PLAIN.state() == {}


@given(st.lists(st.one_of(_finite, _not_finite), min_size=1, max_size=8))
def test_what_is_no_number_is_rejected_with_its_seed_and_counted(coefficients):
    numbers = [(seed, c) for seed, c in enumerate(coefficients) if math.isfinite(c)]
    assume(numbers)
    judged = PLAIN.judge(coefficients)
    assert judged.of(range(len(coefficients))) == [seed for seed, _ in numbers]
    assert judged.coefficients == tuple(c for _, c in numbers)
    assert judged.rejected == len(coefficients) - len(numbers)


@given(st.lists(_not_finite, min_size=1, max_size=4))
def test_a_step_without_any_number_is_an_error_that_says_what_to_do(coefficients):
    with pytest.raises(NonFiniteError, match=f"all {len(coefficients)} probes .* lower the learning rates"):
        PLAIN.judge(coefficients)


@given(st.lists(_step, min_size=1, max_size=60), st.floats(0.5, 10))
def test_clipping_is_at_a_multiple_of_the_running_median_of_what_was_measured(steps, multiple):
    control, seen = CoefficientControl(clip=multiple), []
    for coefficients in steps:
        judged = control.judge(coefficients)
        limit = multiple * np.median(np.abs(seen[-WINDOW:])) if len(seen) >= WARM_UP else np.inf
        np.testing.assert_allclose(judged.coefficients, np.clip(coefficients, -limit, limit), rtol=1e-12)
        assert judged.measured == tuple(coefficients)
        control = control.after(judged.measured)
        seen += coefficients
    again = CoefficientControl(clip=multiple).restored(control.state())
    assert again == control


@given(st.lists(_finite, min_size=2, max_size=8))
def test_a_normalised_step_is_divided_by_the_spread_of_its_coefficients(coefficients):
    spread = np.std(coefficients, ddof=1)
    assume(spread == 0 or spread > 1e-6 * np.abs(coefficients).max())
    found = CoefficientControl(normalise="spread").judge(coefficients).coefficients
    if spread == 0:
        assert found == (0.0,) * len(coefficients)
    else:
        np.testing.assert_allclose(found, np.array(coefficients) / spread, rtol=1e-6)
        scaled = CoefficientControl(normalise="spread").judge([1000 * c for c in coefficients]).coefficients
        np.testing.assert_allclose(scaled, found, rtol=1e-6)  # the scale of the loss cancels


def test_clipping_comes_before_normalising():
    control = CoefficientControl(clip=2.0, normalise="spread", recent=(1.0,) * WARM_UP)
    found = control.judge([0.5, 1.5, 50.0]).coefficients
    np.testing.assert_allclose(found, np.array([0.5, 1.5, 2.0]) / np.std([0.5, 1.5, 2.0], ddof=1))


@given(st.lists(_finite, min_size=1, max_size=32), st.floats(0.5, 10))
def test_rows_are_limited_to_a_multiple_of_their_batchs_median(rows, multiple):
    rows = np.array(rows)
    limit = multiple * np.median(np.abs(rows))
    expected = math.fsum(np.clip(rows, -limit, limit))
    assert CoefficientControl(row_clip=multiple).total(rows) == pytest.approx(expected, rel=1e-12, abs=1e-12)
    assert PLAIN.total(rows) == pytest.approx(math.fsum(rows), rel=1e-12, abs=1e-12)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_one_bad_row_rejects_its_direction(bad):
    assert math.isnan(CoefficientControl(row_clip=3.0).total(np.array([1.0, bad, 2.0])))

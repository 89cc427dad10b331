import hashlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hosl.core.directions import (
    DISTRIBUTIONS,
    TILE_ELEMENTS,
    direction,
    direction_rows,
    direction_seed,
    direction_sum,
    drawn,
    gaussian_table,
    low_rank_factors,
    tile,
)

DRAWN_LAWS = ["gaussian", "rademacher"]


@pytest.mark.parametrize("distribution", DRAWN_LAWS)
@settings(max_examples=60, deadline=None)
@given(start=st.integers(0, 5000), length=st.integers(0, 3000))
def test_any_tile_on_its_own_has_the_bits_it_has_in_the_whole(distribution, start, length):
    whole = tile(11, "w", 0, 8000, distribution)
    assert np.array_equal(tile(11, "w", start, start + length, distribution), whole[start : start + length])


@pytest.mark.parametrize(
    ("distribution", "digest"),
    [
        ("gaussian", "1a79ead7154188f7"),
        ("rademacher", "67c39f913f199585"),
        ("sphere", "eea8f95a464c9208"),
        ("low-rank", "c0f43d0f9a14ed6b"),
    ],
)
def test_the_bits_of_a_direction_never_change(distribution, digest):
    """A journal written by one version must replay in every later one. A change needs a new distribution and an ADR."""
    u = direction(2**62 + 1, "model.layers.0.weight", (33, 17), distribution)
    assert hashlib.sha256(u.astype("<f4").tobytes()).hexdigest()[:16] == digest


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@settings(max_examples=40, deadline=None)
@given(span=st.tuples(st.integers(0, 900), st.integers(0, 900)).map(sorted), data=st.data())
def test_any_part_of_a_drawn_span_is_the_scaled_direction(distribution, dtype, span, data):
    """Once rounded: element by element, u in float32 times the scale."""
    low, high = span
    start = data.draw(st.integers(low, high))
    stop = data.draw(st.integers(start, high))
    out = np.empty(stop - start, dtype)
    drawn(11, "w", (30, 30), distribution, -0.3, dtype, span=(low, high)).fill(start, stop, out)
    assert np.array_equal(
        out, direction(11, "w", (30, 30), distribution).ravel()[start:stop].astype(dtype) * dtype(-0.3)
    )


def test_low_rank_is_an_outer_product_of_signs():
    u = direction(5, "w", (40, 70), "low-rank")
    assert np.linalg.matrix_rank(u) == 1
    assert set(np.unique(u)) == {-1.0, 1.0}
    a, b = low_rank_factors(5, "w", (40, 70))
    assert np.array_equal(u, np.outer(a, b))


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_chosen_rows_equal_those_of_the_whole_matrix(distribution):
    whole = direction(5, "embed", (50, 24), distribution)
    assert np.array_equal(direction_rows(5, "embed", (50, 24), [0, 7, 49], distribution), whole[[0, 7, 49]])


def test_seed_and_name_both_choose_the_stream():
    a, b, c = (tile(seed, name, 0, 64, "gaussian") for seed, name in [(1, "x"), (2, "x"), (1, "y")])
    assert not np.array_equal(a, b)
    assert not np.array_equal(a, c)


def test_gaussian_elements_have_the_moments_of_a_normal_within_their_standard_error():
    n = 2_000_000
    u = tile(3, "w", 0, n, "gaussian").astype(np.float64)
    assert abs(u.mean()) < 4 / np.sqrt(n)
    assert abs((u**2).mean() - 1) < 4 * np.sqrt(2 / n)
    assert abs((u**4).mean() - 3) < 4 * np.sqrt(96 / n) + 0.005  # the table's own kurtosis is 2.999
    assert abs(np.mean(u[:-1] * u[1:])) < 4 / np.sqrt(n)


def test_the_gaussian_table_is_symmetric_and_has_variance_one():
    table = gaussian_table().astype(np.float64)
    assert np.array_equal(table, -table[::-1])
    assert abs((table**2).mean() - 1) < 1e-7
    assert np.all(np.diff(table) > 0)


def test_rademacher_elements_are_signs_in_equal_number():
    u = tile(3, "w", 0, 100_000, "rademacher")
    assert set(np.unique(u)) == {-1.0, 1.0}
    assert abs(u.mean()) < 4 / np.sqrt(100_000)


def test_sphere_has_the_norm_of_its_dimension():
    u = direction(9, "w", (100, 30), "sphere").astype(np.float64)
    assert np.linalg.norm(u) == pytest.approx(np.sqrt(3000), rel=1e-6)


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_the_estimate_is_unbiased(distribution):
    """E[(g.u) u] = g, to three standard errors of its own mean."""
    gradient = np.random.Generator(np.random.Philox(1)).standard_normal(12)
    n, d = 4000, gradient.size
    directions = np.stack(
        [direction(seed, "w", (3, 4), distribution).astype(np.float64).ravel() for seed in range(n)]
    )
    mean = (directions * (directions @ gradient)[:, None]).mean(axis=0)
    standard_error = np.linalg.norm(gradient) * np.sqrt((d + 1) / n)
    assert np.linalg.norm(mean - gradient) < 3 * standard_error


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_the_sum_over_tiles_equals_the_sum_of_whole_directions(distribution):
    elements = TILE_ELEMENTS + 100
    seeds, scales = [1, 2, 3], [0.5, -1.25, 2.0]
    whole = sum(
        s * direction(seed, "w", (elements,), distribution).astype(np.float64)
        for seed, s in zip(seeds, scales, strict=True)
    )
    parts = [
        part.copy() for _, _, part in direction_sum("w", (elements,), seeds, scales, distribution, np.float64)
    ]
    assert len(parts) == 2
    np.testing.assert_allclose(np.concatenate(parts), whole, rtol=0, atol=4 * np.finfo(np.float64).eps * 8)


def test_halves_steps_and_directions_have_seeds_of_their_own():
    seeds = {
        direction_seed(run, step, q, half)
        for run in (0, 1)
        for step in range(50)
        for q in range(10)
        for half in ("client", "server")
    }
    assert len(seeds) == 2 * 50 * 10 * 2
    assert direction_seed(7, 3, 1) == 2112801624997574304  # a change would break every journal


def test_annotations_are_verified_in_tests():
    with pytest.raises(Exception, match="type") as refused:
        direction_rows("seven", "w", (3, 4), [1], "gaussian")
    assert "TypeCheckError" in type(refused.value).__name__

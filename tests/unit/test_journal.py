import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hosl.core.estimators import central_difference, mean_scales
from hosl.core.journal import Journal
from hosl.errors import JournalError, NonFiniteError

_updates = st.lists(
    st.lists(st.tuples(st.integers(0, 2**63 - 1), st.floats(-10, 10, width=32)), min_size=1, max_size=4),
    max_size=6,
)


def _journal(updates):
    journal = Journal()
    for step, entries in enumerate(updates, start=1):
        journal.append(step, [seed for seed, _ in entries], [scale for _, scale in entries])
    return journal


@given(_updates)
def test_what_was_appended_is_what_is_read_back(updates):
    again = Journal.from_bytes(_journal(updates).to_bytes())
    assert [(list(seeds), list(scales)) for _, seeds, scales in again.updates()] == [
        ([seed for seed, _ in u], [scale for _, scale in u]) for u in updates
    ]


def test_a_direction_takes_sixteen_bytes_and_the_file_has_no_header():
    journal = _journal([[(1, 0.5), (2, 0.25)], [(3, 1.0), (4, -1.0)]])
    assert len(journal.to_bytes()) == 16 * len(journal) == 64


def test_the_bytes_of_an_entry_never_change():
    journal = _journal([[(0x0102030405060708, 0.5)]])
    assert journal.to_bytes() == bytes.fromhex("0100000008070605040302010000003f")


def test_updates_after_a_step_leave_out_what_came_before():
    journal = _journal([[(1, 0.5)], [(2, 0.25)], [(3, 1.0)]])
    assert [step for step, _, _ in journal.updates(after=1)] == [2, 3]


@pytest.mark.parametrize("cut", [1, 15, 17])
def test_a_torn_tail_is_refused_and_the_whole_length_named(cut):
    data = _journal([[(1, 0.5)], [(2, 0.25)]]).to_bytes()[:cut]
    with pytest.raises(JournalError, match=f"keep the first {cut // 16 * 16} bytes"):
        Journal.from_bytes(data)


def test_a_step_from_the_past_is_refused_and_nothing_is_added():
    journal = _journal([[(1, 0.5)], [(2, 0.25)]])
    with pytest.raises(JournalError, match="steps of a journal never fall"):
        journal.append(1, [3], [1.0])
    assert len(journal) == 2


def test_a_scale_that_is_not_a_number_is_refused():
    with pytest.raises(JournalError, match="not a finite number"):
        Journal().append(1, [1], [float("nan")])


def test_the_central_difference_refuses_losses_that_are_not_numbers():
    with pytest.raises(NonFiniteError, match="L- = nan"):
        central_difference(1.0, float("nan"), 1e-3)


def test_scales_are_the_mean_over_directions_in_single_precision():
    scales = mean_scales([1.0, 3.0], 0.1)
    assert scales == (float(np.float32(0.05)), float(np.float32(0.1 / 2 * 3.0)))

"""Questions of several clients that several ranks answer together, against one process."""

import numpy as np
import pytest
import torch

from hosl.core.targets import ClassTargets, OptionTargets
from hosl.parties.remote.torch_wire import to_wire
from tests.ranks import halves_of, layout, merged, merged_with_nan, on_ranks, settings

SHAPES = ((1, 8), (3, 8), (2, 7), (2, 4), (1, 4), (1, 6))
"""Rows and length of each client's batch: the first three go together, then two, and the last one alone."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("merged-ranks")


def asked(family, mean_over="rows"):
    """(activations, targets) of clients with unequal rows, lengths, spans and padding."""
    generator, parts = np.random.default_rng(3), []
    for index, (rows, length) in enumerate(SHAPES):
        h = generator.normal(0, 1, (rows, length, 32)).astype(np.float32)
        mask = np.ones((rows, length), np.int8)
        if family == "bert":
            mask[-1, length - 1 :] = 0
            targets = ClassTargets(mask, generator.integers(0, 5, rows))
        else:
            span = 1 + index % 2
            positions = np.tile(np.arange(length - 1 - span, length - 1, dtype=np.int32), (rows, 1))
            tokens = generator.integers(3, 97, (rows, span)).astype(np.int32)
            if span > 1:
                tokens[0, 1] = -1
            targets = OptionTargets(mask, positions, tokens, mean_over)
        parts.append((to_wire(torch.from_numpy(h)), targets))
    return parts


def check(found, alone, loss, at_cut, weights):
    assert found.keys() == alone.keys()
    for name, array in alone.items():
        error = np.abs(array.astype(np.float64) - found[name]).max()
        limit = loss if name.startswith("loss") else at_cut if name.startswith("at-cut") else weights
        assert error <= limit, (name, error)


@pytest.mark.parametrize(
    ("family", "ranks", "per_copy", "trained", "mean_over"),
    [
        ("opt", 2, 2, "all", "rows"), ("llama", 2, 2, "lora", "tokens"),
        pytest.param("opt", 3, 1, "all", "tokens", marks=pytest.mark.slow),
        pytest.param("bert", 4, 2, "all", "rows", marks=pytest.mark.slow),
    ],
)  # fmt: skip
def test_merged_questions_and_rounds_are_those_of_one_process(
    folder, family, ranks, per_copy, trained, mean_over
):
    server, config, parts = halves_of(folder, family), settings(family, trained), asked(family, mean_over)
    out = folder / f"{family}-{ranks}-{per_copy}-{trained}"
    found = on_ranks(merged, layout(ranks, per_copy), server, config, parts, out)
    alone = merged(server, config, parts, out.with_name(f"{out.name}-alone"))
    check(found, alone, loss=2e-6, at_cut=2e-6, weights=2e-7)


def test_merged_with_every_row_on_every_rank_has_the_bits_of_one_process(folder):
    server, config, parts = halves_of(folder, "opt"), settings("opt"), asked("opt")
    found = on_ranks(merged, layout(2, rows="all"), server, config, parts, folder / "all-rows")
    alone = merged(server, config, parts, folder / "all-rows-alone")
    check(found, alone, loss=0.0, at_cut=0.0, weights=0.0)


def test_nan_of_one_client_is_refused_on_all_ranks_and_leaves_nothing_behind(folder):
    server, config, parts = halves_of(folder, "opt"), settings("opt"), asked("opt")
    error, found = on_ranks(merged_with_nan, layout(2), server, config, parts, folder / "nan")
    assert "nan" in error
    _, alone = merged_with_nan(server, config, parts, folder / "nan-alone")
    check(found, alone, loss=0.0, at_cut=0.0, weights=2e-7)

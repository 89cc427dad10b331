"""A server half over several ranks against the same half in one process."""

import numpy as np
import pytest

from tests.ranks import answers, cases, halves_of, layout, on_ranks, one_process, questions, settings


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("ranks")


def compared(folder, family, the_layout, rows, kinds, tag):
    """What one process and the ranks answer, by kind of training."""
    asked = questions(family, rows)
    server = halves_of(folder, family)
    configs = {kind: settings(family, *kind) for kind in kinds}
    named = {
        kind: (config, asked, folder / f"{tag}-{family}-{'-'.join(kind)}") for kind, config in configs.items()
    }
    found = on_ranks(cases, the_layout, server, named)
    for kind, config in configs.items():
        alone = answers(one_process(config, server), asked, folder / f"alone-{tag}-{family}-{'-'.join(kind)}")
        assert alone.keys() == found[kind].keys()
        yield kind, alone, found[kind]


KINDS = [(t, o) for t in ("all", "lora") for o in ("sgd", "adamw")]


@pytest.mark.parametrize("family", ["opt", "llama", "bert"])
@pytest.mark.parametrize(("ranks", "per_copy"), [(2, 2), (4, 4), (2, 1), (4, 2)])
def test_every_rank_with_all_rows_has_the_bits_of_one_process(folder, family, ranks, per_copy):
    the_layout = layout(ranks, per_copy, rows="all")
    for kind, alone, found in compared(folder, family, the_layout, 3, KINDS, f"all-{ranks}-{per_copy}"):
        for name, tensor in alone.items():
            assert np.array_equal(tensor, found[name]), (kind, name)

"""The parts of several ranks that need no second process, and the launcher over processes that do nothing."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import hosl
from hosl.config import ClientsConfig, Config, ServerConfig
from hosl.core.layout import Layout
from hosl.core.targets import ClassTargets, OptionTargets, rows_of
from hosl.errors import ConfigError, HandshakeError
from hosl.parties.engine.loss import mean_loss, weighed_losses
from hosl.ranks.hosting import check_server
from hosl.ranks.messages import packed, unpacked
from hosl.ranks.place import STORE, place_of_process
from hosl.ranks.rows import share_of
from tests.ranks import settings

SOURCES = Path(hosl.__file__).parent


@pytest.mark.parametrize(("rows", "ranks"), [(8, 4), (3, 4), (1, 4), (5, 4), (7, 2), (1, 1)])
def test_every_row_counts_once_and_every_rank_has_as_many(rows, ranks):
    shares = [share_of(rows, rank, ranks) for rank in range(ranks)]
    assert [row for share in shares for row in share.rows[: share.own]] == list(range(rows))
    assert len({len(share.rows) for share in shares}) == 1
    assert all(row == rows - 1 for share in shares for row in share.rows[share.own :])


@pytest.mark.parametrize("mean_over", ["rows", "tokens"])
def test_weighed_losses_of_rows_make_the_mean_loss(option_batch, mean_over):
    targets = option_batch.targets
    targets = OptionTargets(targets.mask, targets.positions, targets.tokens, mean_over)
    logits = torch.randn(3, 2, 97, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    sums, weights = weighed_losses(logits, targets)
    assert torch.allclose(sums.sum() / weights.sum(), mean_loss(logits, targets), rtol=1e-15)


def test_a_command_carries_what_calls_take_without_a_change(class_batch, option_batch):
    tensors = []
    sent = [
        [torch.ones(2, 3, dtype=torch.bfloat16)],
        class_batch.targets,
        option_batch.targets,
        3,
        True,
        "x",
        None,
    ]
    data = json.loads(json.dumps([packed(sent, tensors), packed({"step": 1}, tensors)]))
    (h,), classes, options, *plain = unpacked(data[0], tensors)
    assert plain == [3, True, "x", None]
    assert unpacked(data[1], tensors) == {"step": 1}
    assert torch.equal(h, sent[0][0])
    for there, here in ((classes, class_batch.targets), (options, option_batch.targets)):
        assert type(there) is type(here)
        names = [name for name in type(here).__slots__ if name != "mean_over"]
        assert all(np.array_equal(getattr(there, name), getattr(here, name)) for name in names)
    assert options.mean_over == option_batch.targets.mean_over


def test_targets_of_rows_are_those_of_these_rows(class_batch, option_batch):
    targets = rows_of(option_batch.targets, [2, 0, 0])
    assert np.array_equal(targets.tokens, option_batch.targets.tokens[[2, 0, 0]])
    assert isinstance(rows_of(class_batch.targets, [1]), ClassTargets)


@pytest.mark.parametrize(
    ("ranks", "per_copy", "said"), [(1, 1, "two or more"), (4, 3, "must divide"), (4, 0, "must divide")]
)
def test_a_layout_that_leaves_a_rank_over_is_refused(ranks, per_copy, said):
    with pytest.raises(ConfigError, match=said):
        Layout(ranks=ranks, per_copy=per_copy)


def test_a_place_is_that_of_the_environment_and_another_number_of_ranks_is_refused(monkeypatch):
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", STORE):
        monkeypatch.delenv(name, raising=False)
    assert place_of_process(4) is None
    for name, value in {"RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "4"}.items():
        monkeypatch.setenv(name, value)
    assert place_of_process(4) is None  # nobody says where the others are
    monkeypatch.setenv("MASTER_ADDR", "10.0.0.1")
    place = place_of_process(4)
    assert (place.rank, place.local_rank, place.ranks, place.store) == (3, 1, 4, None)
    with pytest.raises(ConfigError, match="rank 3 of 4"):
        place_of_process(8)


@pytest.mark.parametrize("method", ["zo-zo", "fo-zo"])
def test_a_server_that_is_probed_is_refused_by_name(method):
    with pytest.raises(HandshakeError, match=f"method {method} probes"):
        check_server(settings("opt", method=method))


def test_adapters_of_each_device_are_refused_by_name():
    config = Config(clients=ClientsConfig(count=2, server="personal"), server=ServerConfig(trainable="lora"))
    with pytest.raises(
        HandshakeError, match=r"clients.server: personal.*several ranks.*serve without --ranks"
    ):
        check_server(config)


def test_only_the_ranks_know_of_torch_distributed_and_nobody_loads_them_for_one_process():
    users = [path for path in SOURCES.rglob("*.py") if "torch.distributed" in path.read_text()]
    assert {path.parent.name for path in users} == {"ranks"}
    importers = [
        path.relative_to(SOURCES).as_posix()
        for path in SOURCES.rglob("*.py")
        if path.parent.name != "ranks"
        and any(
            line.startswith(("from hosl.ranks", "import hosl.ranks"))
            for line in path.read_text().splitlines()
        )
    ]
    assert importers == []  # the command does it within functions


def test_the_launcher_is_a_process_without_torch():
    script = "import sys, hosl.ranks.serve, hosl.ranks.launcher; sys.exit('torch' in sys.modules)"
    environment = os.environ | {"PYTHONPATH": str(SOURCES.parent)}
    assert subprocess.run([sys.executable, "-c", script], env=environment).returncode == 0


LAUNCH = """
import sys
from hosl.ranks.launcher import Launcher
sys.exit(Launcher([sys.executable, "-S", "-c", sys.argv[1]], 2, say=lambda text: print(text, flush=True)).run())
"""


def launch(rank_program):
    command = [sys.executable, "-S", "-c", LAUNCH, rank_program]
    environment = os.environ | {"PYTHONPATH": str(SOURCES.parent)}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)


WAITS = "import os, sys, time; rank = os.environ['RANK']; "


def test_a_rank_that_refuses_to_start_ends_all_with_its_status():
    process = launch(f"{WAITS} sys.exit(2) if rank == '1' else time.sleep(60)")
    out, _ = process.communicate(timeout=30)
    assert (process.returncode, out) == (2, "")


def test_all_ranks_are_started_again_when_one_is_killed(tmp_path):
    marker = tmp_path / "killed"
    up = tmp_path / "up"
    program = (
        f"{WAITS} there = os.path.exists({str(marker)!r})\n"
        f"os.write(1, (rank + ' ' + os.environ['{STORE}'] + chr(10)).encode())\n"
        f"if rank == '0': open({str(up)!r}, 'w')\n"
        f"while not os.path.exists({str(up)!r}): time.sleep(0.01)\n"
        f"if rank == '1' and not there: open({str(marker)!r}, 'w'); os.kill(os.getpid(), 9)\n"
        "if not there: time.sleep(60)"
    )
    process = launch(program)
    out, _ = process.communicate(timeout=30)
    assert process.returncode == 0
    lines = out.splitlines()
    assert "rank 1 ended by signal 9; all ranks are started again" in lines
    stores = {line.split()[1] for line in lines if line[0] in "01"}
    assert len(stores) == 2  # a store of its own for each start
    assert not any(Path(store).parent.exists() for store in stores)


def test_the_signal_to_end_goes_to_rank_0_and_its_status_is_that_of_all(tmp_path):
    stop = str(tmp_path / "stop")
    program = (
        f"{WAITS} import signal\n"
        f"def told(*_): rank == '0' and open({stop!r}, 'w'); sys.exit(0 if rank == '0' else 9)\n"
        "signal.signal(15, told); os.write(1, (rank + chr(10)).encode())\n"
        f"while not os.path.exists({stop!r}): time.sleep(0.01)"
    )
    process = launch(program)
    assert {process.stdout.readline().strip() for _ in range(2)} == {"0", "1"}
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=30)
    assert process.returncode == 0


def test_ranks_that_are_told_to_end_before_they_serve_end_in_order():
    process = launch(f"{WAITS} os.write(1, (rank + chr(10)).encode()); time.sleep(60)")
    assert {process.stdout.readline().strip() for _ in range(2)} == {"0", "1"}
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=30)
    assert process.returncode == 0

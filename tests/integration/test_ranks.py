"""`hosl serve --ranks` as devices see it: the bits of one process, across the death of any rank."""

import os
import signal
import sys
from pathlib import Path

import pytest

from hosl.cli import main
from tests.integration.network import Server, finished, join, newest, split, wait_until
from tests.integration.test_network_kills import left

PROGRAM = Path(__file__).with_name("forked_ranks.py")
RANKS = ("--ranks", "2", "--rows", "all")
AT = {"open": 1, "losses": 7, "step": 7, "whole": 60}
"""The command at which a rank dies, by its number: of saving, in the second checkpoint."""


LOOPBACK = ("0100007F", "0000000000000000FFFF00000100007F")
"""127.0.0.1 as the kernel writes it: of the ranks' own connections, and of gRPC's, which are of version 6."""


def program(*dying):
    return [sys.executable, str(PROGRAM), *map(str, dying or ("-", 0, 0, "-"))]


@pytest.fixture
def begun(tiny_run, tmp_path):
    """Config and halves of a short run, and what it leaves with a server of one process."""
    config = tiny_run(max_steps=8, save_steps=3, snapshot_steps=3, eval_steps=4, wire={"idle_s": 5.0})
    halves = split(tmp_path / "model-in", tmp_path / "halves")
    with Server(halves / "server", tmp_path / "whole-service") as server:
        finished(join(halves / "client", server.line, config, "--output-dir", tmp_path / "whole"))
    return config, halves, weights_of(tmp_path / "whole", tmp_path / "whole-service")


def weights_of(run, service):
    """What a run leaves on both sides; the server's files tensor by tensor, whose order in the file may differ."""
    import safetensors.torch

    exact = {name: data for name, data in left(run, service).items() if not name.startswith("server")}
    (served,) = (service / "runs").iterdir()
    for file in (newest(served / "checkpoints") / "server").iterdir():
        tensors = safetensors.torch.load_file(file)
        exact |= {f"server/{file.name}/{name}": t.numpy().tobytes() for name, t in tensors.items()}
    return exact


def ranks_of(process):
    """The ids of the processes that a launcher has started."""
    return [int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]


def listeners(pids):
    """The addresses that these processes listen on."""
    sockets = set()
    for pid in pids:
        for link in Path(f"/proc/{pid}/fd").iterdir():
            sockets.add(os.readlink(link))
    found = set()
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/self/net/{table}").read_text().splitlines()[1:]:
            words = line.split()
            if words[3] == "0A" and f"socket:[{words[9]}]" in sockets:
                found.add(words[1].partition(":")[0])
    return found


def test_two_ranks_train_a_joined_run_as_one_process_on_loopback_alone_and_end_in_order(begun, tmp_path):
    config, halves, whole = begun
    with Server(halves / "server", tmp_path / "service", *RANKS, program=program()) as server:
        ranks = ranks_of(server.process)
        assert len(ranks) == 2
        finished(join(halves / "client", server.line, config, "--output-dir", tmp_path / "run"))
        assert listeners(ranks) == set(LOOPBACK)
        os.kill(ranks[1], signal.SIGTERM)  # as systemd tells every process of a unit; rank 0 says when
        assert server.stop() == 0
    assert weights_of(tmp_path / "run", tmp_path / "service") == whole
    assert not any(Path(f"/proc/{pid}").exists() for pid in ranks)


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("do", AT)
def test_a_rank_that_dies_changes_no_bit_and_leaves_no_process(begun, tmp_path, do, rank):
    config, halves, whole = begun
    marker = tmp_path / "died"
    with Server(
        halves / "server", tmp_path / "service", *RANKS, program=program(do, rank, AT[do], marker)
    ) as server:
        first = ranks_of(server.process)
        joined = join(halves / "client", server.line, config, "--output-dir", tmp_path / "run")
        finished(joined)
        assert marker.exists()
        second = ranks_of(server.process)
        assert not set(first) & set(second)
        assert server.stop() == 0
    assert weights_of(tmp_path / "run", tmp_path / "service") == whole
    assert not any(Path(f"/proc/{pid}").exists() for pid in first + second)


def test_ranks_end_when_their_launcher_is_killed(halves, tmp_path):
    with Server(halves / "server", tmp_path / "service", *RANKS, program=program()) as server:
        ranks = ranks_of(server.process)
        server.process.kill()
        wait_until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in ranks))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--ranks", "0"), "two or more"),
        (("--rows", "all", "--keep-gathered"), "--rows, --keep-gathered: these are about several ranks"),
        (("--ranks", "4", "--ranks-per-copy", "0"), "must divide --ranks 4"),
        (("--ranks", "4", "--ranks-per-copy", "3"), "must divide --ranks 4"),
        (("--ranks", "2", "--device", "cuda:1"), "give cpu or cuda"),
        (("--ranks", "2", "--listen", "192.0.2.1:0"), "--listen 192.0.2.1: it cannot be listened on"),
    ],
)
def test_layouts_that_cannot_be_are_refused(halves, tmp_path, capsys, words, said):
    assert main(["serve", str(halves / "server"), "--service", str(tmp_path / "service"), *words]) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "service").exists()


def test_labels_at_the_client_need_one_process(tiny_run, tmp_path, capsys):
    tiny_run()
    halves = split(tmp_path / "model-in", tmp_path / "halves", **{"labels-at": "client"})
    words = ["serve", str(halves / "server"), "--service", str(tmp_path / "service"), "--ranks", "2"]
    assert main(words) == 2
    assert "was split with labels at the client" in capsys.readouterr().err
    assert not (tmp_path / "service").exists()

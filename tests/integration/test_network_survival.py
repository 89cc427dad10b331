"""Several devices, both kinds of halves, both schedules: kills, pauses, late joiners; all reach the end."""

import random
import signal
import sys
import time
from pathlib import Path

import pytest

from hosl.system.run_folder import read_lines
from tests.integration.network import Server, enrol, finished, split, wait_until
from tests.integration.test_network_clients import journal_of
from tests.integration.test_network_kills import joining

HERE = Path(__file__).parent
COMBINATIONS = [
    (halves, order) for halves in ("personal", "shared") for order in ("sequential", "synchronous")
]
GRACE_S = 2.0


@pytest.fixture
def several(tiny_run, tmp_path, capsys, request):
    """`several(halves, order, max_steps)`: the split halves, the config, a server and three join lines."""

    def make(halves, order, max_steps, program=None):
        clients = {"count": 3, "halves": halves, "schedule": order, "grace_s": GRACE_S}
        config = tiny_run(
            max_steps=max_steps, save_steps=3, eval_steps=max_steps, clients=clients, wire={"idle_s": 5.0}
        )
        parts = split(tmp_path / "model-in", tmp_path / "halves")
        server = Server(parts / "server", tmp_path / "service", program=program)
        lines = [server.line, *(enrol(tmp_path / "service", name, capsys) for name in ("second", "third"))]
        request.addfinalizer(server.close)
        return parts, config, server, lines

    return make


def check_ends(runs, summaries, halves, order, max_steps):
    """Every client has done the last step, in steps that rise; shared halves followed one journal."""
    for run, summary in zip(runs, summaries, strict=True):
        assert summary["finished"]
        steps = [line["step"] for line in read_lines(run / "metrics.jsonl") if "split" not in line]
        assert steps == sorted(set(steps))
        assert (run / "checkpoints" / f"step-{max_steps:08d}").is_dir()
    if halves == "shared":
        longest = max((journal_of(run) for run in runs), key=len).to_bytes()
        assert all(longest.startswith(journal_of(run).to_bytes()) for run in runs)
        if order == "synchronous":
            assert len({summary["client_digest"] for summary in summaries}) == 1


@pytest.mark.parametrize(("halves", "order"), COMBINATIONS)
def test_a_run_of_three_survives_a_killed_client_a_killed_server_a_pause_and_a_late_joiner(
    several, tmp_path, request, halves, order
):
    parts, config, server, lines = several(halves, order, 24)
    runs = [tmp_path / f"device-{place}" / "run" for place in range(3)]
    dying = [sys.executable, str(HERE / "dying_client.py"), "Step", "4", "after"]
    first = joining(parts, lines[0], config, runs[0])
    second = joining(parts, lines[1], config, runs[1], program=dying)
    second.communicate(timeout=240)
    assert second.returncode == -signal.SIGKILL
    first.send_signal(signal.SIGSTOP)  # for longer than the grace: the others start meanwhile
    joined = [first, *(joining(parts, lines[place], config, runs[place]) for place in (1, 2))]
    for process in joined:
        request.addfinalizer(process.kill)  # if the test fails
    wait_until(
        lambda: sum(event["event"] == "hello" for event in server.events) >= 4, 240
    )  # each, second twice
    time.sleep(GRACE_S)
    server.process.kill()
    server.process.wait()
    server.close()
    with Server(parts / "server", tmp_path / "service", listen=server.address):
        first.send_signal(signal.SIGCONT)
        summaries = [finished(process) for process in joined]
    check_ends(runs, summaries, halves, order, 24)


@pytest.mark.slow
@pytest.mark.parametrize(("halves", "order"), COMBINATIONS)
def test_forty_random_kills_of_a_run_of_three(several, tmp_path, halves, order):
    """Kills of either side and pauses beyond the grace, at random moments; the third client comes late."""
    max_steps, chance, kills, count = 150, random.Random(7), 0, 0
    parts, config, server, lines = several(halves, order, max_steps)
    address = server.address
    while kills < 40:
        count += 1
        runs = [tmp_path / f"device-{place}" / f"run{count}" for place in range(3)]
        joined = [
            joining(parts, line, config, run) for line, run in zip(lines, runs, strict=True) if run != runs[2]
        ]
        late_s = time.monotonic() + chance.uniform(2.0, 10.0)
        while any(process.poll() is None for process in joined) and kills < 40:
            time.sleep(chance.uniform(0.2, 5.0))
            if len(joined) == 2 and time.monotonic() > late_s:
                joined.append(joining(parts, lines[2], config, runs[2]))
            live = [place for place, process in enumerate(joined) if process.poll() is None]
            if not live:
                break
            place, draw = chance.choice(live), chance.random()
            if draw < 0.2:
                joined[place].send_signal(signal.SIGSTOP)
                time.sleep(GRACE_S + 1)
                joined[place].send_signal(signal.SIGCONT)
                continue
            kills += 1
            if draw < 0.7:
                joined[place].kill()
                joined[place].communicate()
                if not _done(runs[place]):  # else the same command would begin another run
                    joined[place] = joining(parts, lines[place], config, runs[place])
            else:
                server.process.kill()
                server.process.wait()
                server.close()
                server = Server(parts / "server", tmp_path / "service", listen=address)
        if len(joined) == 2:
            joined.append(joining(parts, lines[2], config, runs[2]))
        for process, run in zip(joined, runs, strict=True):
            _, err = process.communicate(timeout=600)  # closes its pipes, too
            assert _done(run), err
        server_rounds = max(
            int(p.name[5:]) for p in (tmp_path / "service" / "runs").glob("*/checkpoints/step-*")
        )
        assert server_rounds >= max_steps
    server.close()
    print(f"{kills} kills over {count} runs")


def _done(run):
    return (run / "report.html").is_file()

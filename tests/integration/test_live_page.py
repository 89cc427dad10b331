"""The live page in a real browser, without any outside resource; metrics and health beside it."""

import json
import ssl
import subprocess
import sys
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path

import pytest

from hosl.cli import main
from hosl.transport.join_line import JoinLine
from tests.integration.browser import browse, needs_chromium
from tests.integration.network import Server, finished, join, split, wait_until


def _get(url, token=None):
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    request = urllib.request.Request(url, headers={"authorization": f"Bearer {token}"} if token else {})
    with urllib.request.urlopen(request, context=context, timeout=10) as answer:
        return answer.read().decode()


@pytest.fixture
def trained(tiny_run, tmp_path):
    """A server with a live page that has just trained a run: its url, its client's token, the run's losses."""
    config = tiny_run(max_steps=10)
    halves = split(tmp_path / "model-in", tmp_path / "halves")
    with Server(halves / "server", tmp_path / "service", "--page", "127.0.0.1:0") as server:
        finished(join(halves / "client", server.line, config, "--output-dir", tmp_path / "joined"))
        url = server.said[-1].rpartition(" ")[2]
        yield url, JoinLine.parse(server.line).token, tmp_path / "joined"
        assert server.stop() == 0
    assert not (tmp_path / "service" / "running.json").exists()  # it ended in order


def test_metrics_and_state_are_behind_the_token_health_is_not_and_the_owner_looks_beside_it(
    trained, tmp_path, capsys
):
    url, token, run = trained
    assert _get(url + "health") == "ready\n"
    for place in ("metrics", "state.json"):
        with pytest.raises(urllib.error.HTTPError, match="401"):
            _get(url + place)
    with pytest.raises(urllib.error.HTTPError, match="404"):
        _get(url + "clients.json", token)
    metrics = _get(url + "metrics", token)
    assert "\nhosl_steps_total 10.0\n" in metrics
    assert 'hosl_run_step{run="joined-' in metrics
    assert 'hosl_compute_seconds_count{call="Step"} 10.0' in metrics
    assert "first" not in metrics  # no series of a client
    state = json.loads(_get(url + "state.json", token))
    (facts,) = state["runs"].values()
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss_nats"] for line in lines if "split" not in line]
    assert [loss for _, loss in facts["losses"]] == losses
    assert facts["step"] == 10
    assert state["clients"]["first"]["bytes_up"] > 10_000
    assert state["clients"]["first"]["compute_s"] > 0
    _owner_looks(tmp_path / "service", losses[-1], capsys)
    _container_asks(tmp_path / "service", url)


def _owner_looks(service, last_loss, capsys):
    """`hosl runs` beside the running server."""
    wait_until(lambda: '"step":10' in _progress(service))  # within some seconds
    assert main(["runs", "ls", "--service", str(service), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["server"]["alive"]
    (facts,) = told["runs"]
    assert (facts["step"], facts["max_steps"], facts["in_memory"], facts["clients"]) == (
        10,
        10,
        True,
        ["first"],
    )
    assert facts["loss_nats"] == last_loss
    assert main(["runs", "show", facts["name"], "--service", str(service), "--json"]) == 0
    assert [saved["damage"] for saved in json.loads(capsys.readouterr().out)["checkpoints"]] == [None, None]


def _container_asks(service, url):
    """The health check of deploy/Containerfile, of this server's port and certificate."""
    container = (Path(__file__).parents[2] / "deploy" / "Containerfile").read_text(encoding="utf-8")
    (asks,) = [line for line in container.splitlines() if line.startswith("HEALTHCHECK")]
    program = json.loads(asks.partition(" CMD ")[2])[-1]
    port, place = urllib.parse.urlsplit(url).port, str(service / "certificate.pem")
    here = program.replace(":7071", f":{port}").replace("/srv/hosl/service/certificate.pem", place)
    assert here.count(str(port)) == here.count(place) == 1
    subprocess.run([sys.executable, "-c", here], check=True, timeout=30)


def _progress(service):
    return "".join(file.read_text() for file in service.glob("runs/*/progress.json"))


@needs_chromium
def test_the_page_shows_the_live_loss_in_a_browser(trained, tmp_path):
    url, token, run = trained
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    last = [line["loss_nats"] for line in lines if "split" not in line][-1]
    picture = tmp_path / "page.png"
    ran = browse(
        tmp_path / "profile", f"{url}#token={token}", "--ignore-certificate-errors", "--window-size=1000,800",
        "--virtual-time-budget=4000", f"--screenshot={picture}", "--dump-dom",
    )  # fmt: skip
    assert f"step 10 of 10, loss {last:.4f} nats" in ran.stdout
    assert "<polyline" in ran.stdout
    assert "http://" not in ran.stdout.replace("http://www.w3.org", "")
    assert "https://" not in ran.stdout
    assert picture.stat().st_size > 5000

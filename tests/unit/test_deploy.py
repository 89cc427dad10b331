"""What deploy/ says is what hosl does: the metrics of the dashboard; commands and restarts of unit and container."""

import configparser
import json
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from hosl.cli.answers import command_parser
from hosl.cli.serve import _add_arguments
from hosl.errors import LimitError
from hosl.service.operation.now import ClientNow, RunNow
from hosl.service.status import Status

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"


@pytest.fixture(scope="module")
def samples():
    """Name of each sample of /metrics -> its labels, of a service that has done a little of everything."""
    status = Status(log=lambda line: None)
    status.watch_runs(lambda: [RunNow("run", 3, 10, 0.5, 2, {"a": ClientNow(3, 1.0, True)})])
    with status.call("a", "Losses"):
        status.worked("a", 0.1, 0.2)
    status.refused("a", "Losses", LimitError("too many"))
    found = {}
    for family in text_string_to_metric_families(status.exposition().decode()):
        for sample in family.samples:
            found.setdefault(sample.name, set()).update(sample.labels)
    return found


@pytest.fixture(scope="module")
def dashboard():
    return json.loads((DEPLOY / "grafana" / "hosl.json").read_text(encoding="utf-8"))


def _expressions(dashboard):
    return [target["expr"] for panel in dashboard["panels"] for target in panel.get("targets", ())]


def _names(expression):
    return re.findall(r"\b(?:hosl|process)_\w+", expression)


def test_every_expression_of_the_dashboard_names_metrics_that_there_are_with_labels_that_they_have(
    dashboard, samples
):
    expressions = [*_expressions(dashboard), dashboard["templating"]["list"][1]["definition"]]
    assert len(expressions) > 25
    for expression in expressions:
        names = _names(expression)
        assert names, expression
        assert set(names) <= samples.keys(), expression
        labels = {label for name in names for label in samples[name]}
        (grouped,) = re.findall(r"\bby \(([^)]*)\)", expression) or [""]
        assert {label.strip() for label in grouped.split(",") if label} <= labels, expression
        assert all(
            name.endswith(("_total", "_bucket", "_sum")) for name in re.findall(r"rate\((\w+)", expression)
        )
        assert expression.count("(") == expression.count(")")
    for panel in dashboard["panels"]:
        for target in panel.get("targets", ()):
            used = set(re.findall(r"{{(\w+)}}", target["legendFormat"]))
            assert used <= {label for name in _names(target["expr"]) for label in samples[name]}, panel[
                "title"
            ]


def test_every_metric_of_hosl_is_drawn(dashboard, samples):
    drawn = {name for expression in _expressions(dashboard) for name in _names(expression)}
    bases = {re.sub(r"_(bucket|sum|count)$", "", name) for name in drawn}
    left = {name for name in samples if name.startswith("hosl_")} - drawn
    assert {re.sub(r"_(bucket|sum|count)$", "", name) for name in left} - bases == {"hosl_build_info"}


def test_the_page_about_operation_names_every_metric_and_no_other(samples):
    page = (ROOT / "docs" / "how-to" / "operate-a-server.md").read_text(encoding="utf-8")
    (table,) = re.findall(r"\n\| metric \|.*?\n\n", page, flags=re.DOTALL)
    said = set()
    for row in table.splitlines():
        for name in re.findall(
            r"`(\w+)(?:{[^}]*})?`", row.partition("gauge" if "_max_steps" in row else "\0")[0]
        ):
            said.add(f"hosl_run{name}" if name.startswith("_") else name)
    known = {re.sub(r"_(bucket|count|sum)$", "", name) for name in samples if name.startswith("hosl_")}
    assert {name for name in said if name.startswith("hosl_")} == known


def test_the_panels_of_the_dashboard_lie_beside_each_other(dashboard):
    taken = set()
    for panel in dashboard["panels"]:
        grid = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(grid["x"], grid["x"] + grid["w"])
            for y in range(grid["y"], grid["y"] + grid["h"])
        }
        assert not cells & taken, panel["title"]
        assert grid["x"] + grid["w"] <= 24
        taken |= cells
    ids = [panel["id"] for panel in dashboard["panels"]]
    assert len(set(ids)) == len(ids)


def _options(words):
    """The words of `hosl serve`, as hosl reads them."""
    assert words[:1] == ["serve"]
    parser = command_parser("serve", "", as_json=False)
    _add_arguments(parser)
    return parser.parse_args(words[1:])


@pytest.fixture(scope="module")
def unit():
    parsed = configparser.ConfigParser(strict=True, interpolation=None)
    parsed.optionxform = str
    parsed.read(DEPLOY / "hosl-serve.service", encoding="utf-8")
    return parsed


@pytest.fixture(scope="module")
def steps():
    """The instructions of the container file: (word, rest), lines that go on joined."""
    text = (DEPLOY / "Containerfile").read_text(encoding="utf-8").replace("\\\n", " ")
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    return [tuple(line.split(" ", 1)) for line in lines]


@pytest.fixture(scope="module")
def composed():
    return yaml.safe_load((DEPLOY / "compose.yaml").read_text(encoding="utf-8"))["services"]["hosl"]


def test_the_unit_starts_what_hosl_understands_and_restarts_what_failed(unit):
    service = unit["Service"]
    program, *words = shlex.split(service["ExecStart"])
    assert program.endswith("/bin/hosl")
    options = _options(words)
    assert options.public
    assert options.page.startswith("127.0.0.1:")
    assert service["Restart"] == "on-failure"
    assert service["RestartPreventExitStatus"] == "2"  # a request that is wrong stays wrong
    assert service["KillSignal"] == "SIGTERM"
    assert (
        service["KillMode"] == "mixed"
    )  # the ranks are stopped by the first process, or with the whole unit
    assert service["TimeoutStopSec"] == "15min"
    assert service["User"] != "root"


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="needs systemd-analyze")
def test_systemd_finds_nothing_wrong_with_the_unit(tmp_path):
    text = (DEPLOY / "hosl-serve.service").read_text(encoding="utf-8")
    copy = tmp_path / "hosl-serve.service"
    copy.write_text(text.replace("/opt/hosl/bin/hosl", shutil.which("true")))
    ran = subprocess.run(
        ["systemd-analyze", "verify", str(copy)], capture_output=True, text=True, timeout=30, check=False
    )
    assert [line for line in ran.stderr.splitlines() if copy.name in line] == []
    assert ran.returncode == 0, ran.stderr


def test_the_container_is_built_by_the_steps_of_the_readme(steps):
    """No engine builds it here: what can be compared is compared."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    ((wanted, extras),) = re.findall(r"\$ (pip install) ('\.\[[^']*\]')", readme)[:1]
    run = [rest for word, rest in steps if word == "RUN"]
    installs = [line for line in run if line.startswith("pip install")]
    (line,) = installs
    assert line.startswith(wanted)
    assert line.endswith(extras)
    assert set(shlex.split(line)) - set(shlex.split(f"{wanted} {extras}")) == {
        "--no-cache-dir",
        "-c",
        "constraints.txt",
    }
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    (torch,) = [line for line in run if "TORCH_INDEX" in line]
    assert "--no-deps --index-url $(TORCH_INDEX) torch" in makefile
    assert '--no-deps --index-url "$TORCH_INDEX" torch' in torch
    (base,) = [rest for word, rest in steps if word == "FROM"]
    assert re.fullmatch(r"python:3\.1[1-9]-slim", base)


def test_the_container_runs_as_nobody_and_starts_what_hosl_understands(steps):
    last = dict(steps)  # of each instruction the last one
    assert last["USER"] == "hosl"
    (made,) = [rest for word, rest in steps if word == "RUN" and rest.startswith("useradd")]
    assert made.split()[-1] == last["USER"]
    assert json.loads(last["ENTRYPOINT"]) == ["hosl"]
    options = _options(json.loads(last["CMD"]))
    assert {options.listen.rpartition(":")[2], options.page.rpartition(":")[2]} == set(last["EXPOSE"].split())
    assert last["VOLUME"] == last["WORKDIR"]
    health = json.loads(last["HEALTHCHECK"].partition(" CMD ")[2])
    assert f"https://localhost:{options.page.rpartition(':')[2]}/health" in health[-1]
    assert f"{last['WORKDIR']}/{options.service}/certificate.pem" in health[-1]
    compile(health[-1], "health", "exec")


def test_compose_restarts_what_failed_and_listens_on_loopback_until_told_otherwise(composed, steps):
    assert composed["restart"] == "on-failure:5"
    assert composed["stop_grace_period"] == "15m"
    assert all(port.startswith("127.0.0.1:") for port in composed["ports"])
    options = _options(composed["command"])
    ports = {port.rpartition(":")[2] for port in composed["ports"]}
    assert {options.listen.rpartition(":")[2], options.page.rpartition(":")[2]} == ports
    places = [
        volume.split(":")[-2] if volume.endswith(":ro") else volume.rpartition(":")[2]
        for volume in composed["volumes"]
    ]
    home = dict(steps)["WORKDIR"]
    assert places == [f"{home}/{options.half}", home]

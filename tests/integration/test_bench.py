"""`hosl bench step`, `memory` and `service`: every row is in the table, and its figures mean what they say."""

import json
import re
import sys

import pytest

from hosl.bench import edge_memory, edge_step
from hosl.cli import main
from hosl.methods.variants import ON_ENGINE, VARIANTS, variants_called
from hosl.network.handshake import model_message
from tests.exported import client_folder

SIZES = ["--shape", "tiny", "--cut", "3", "--batch", "4", "--tokens", "16", "--directions", "2"]
FLOAT32 = 4
WIDTH = 64


def _measured(capsys, *words):
    assert main(["bench", *words, *SIZES, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    return found, {line["name"]: line for line in found["methods"]}


def test_a_step_of_every_method_is_measured(capsys):
    found, lines = _measured(capsys, "step", "--repeats", "2", "--memory-repeats", "0")
    assert list(lines) == [row.name for row in VARIANTS]
    assert (found["shape"], found["cut"], found["rows"], found["tokens"]) == ("tiny", 3, 4, 16)
    activation = 4 * 16 * WIDTH * FLOAT32
    for name, line in lines.items():
        phases = sum(line[f"{phase}_s"] for phase in ("forward", "probing", "backward", "update"))
        assert line["client_s"] == pytest.approx(phases, rel=0.5)  # medians of each do not quite add up
        assert line["hours_1500_steps"] == pytest.approx(line["client_s"] * 1500 / 3600)
        uploads = 4 if name.endswith("-plus") else {"hosl": 5, "zo-zo": 4}.get(name.split(",")[0], 1)
        in_bytes = activation // 2 if name == "hosl-gradient, bfloat16" else activation
        assert uploads * in_bytes < line["bytes_up"] < uploads * (in_bytes + 200)
    assert lines["frozen"]["probing_s"] == lines["frozen"]["update_s"] == lines["frozen"]["directions_s"] == 0
    assert lines["hosl"]["directions_s"] > 0
    assert lines["fo-fo"]["backward_s"] > 0
    assert lines["hosl"]["bytes_down"] < lines["hosl-gradient"]["bytes_down"]


@pytest.mark.slow
def test_memory_is_of_the_client_alone_and_beside_first_order(capsys):
    rows = "frozen;hosl;fo-fo;fo-fo, AdamW;hosl-gradient, bfloat16"
    _, lines = _measured(capsys, "memory", "--methods", rows)
    assert lines["frozen"]["tensors_over_forward"] == 1.0
    assert lines["frozen"]["held_mib"] == lines["hosl"]["held_mib"] == lines["fo-fo"]["held_mib"]
    assert lines["fo-fo"]["tensors_less_than_first_order"] == 1.0
    # AdamW holds two numbers for each trained one, bfloat16 half the bytes of every weight
    assert lines["fo-fo, AdamW"]["held_mib"] > 1.5 * lines["fo-fo"]["held_mib"]
    assert lines["hosl-gradient, bfloat16"]["held_mib"] < 0.7 * lines["frozen"]["held_mib"]
    assert all(line["process_peak_mib"] > line["tensor_peak_mib"] > 0 for line in lines.values())
    _, once = _measured(capsys, "memory", "--methods", "fo-fo", "--once")
    assert once["fo-fo"]["tensor_peak_mib"] == lines["fo-fo"]["tensor_peak_mib"]


@pytest.mark.slow  # each row has its memory measured in a process of its own
def test_a_table_is_printed_for_people(capsys):
    words = [
        "bench",
        "step",
        *SIZES,
        "--repeats",
        "1",
        "--memory-repeats",
        "1",
        "--methods",
        "frozen;hosl-node",
    ]
    assert main(words) == 0
    said = capsys.readouterr()
    head, columns, *lines = said.out.splitlines()
    assert head.startswith("shape tiny, cut 3")
    assert columns.split()[:2] == ["name", "client_s"]
    assert [line.split()[0] for line in lines] == ["frozen", "hosl-node"]
    assert "left" in said.err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            ["step", "--methods", "hosl;hosll"],
            "no variant is called 'hosll'; names are separated by semicolons, and there are: frozen; hosl;",
        ),
        (["step", "--shape", "opt-9b", "--repeats", "1"], "no shape is called 'opt-9b'"),
        (["steps"], "invalid choice: 'steps'"),
        ([], "the following arguments are required: what"),
    ],
)
def test_what_cannot_be_measured_is_one_line(capsys, words, said):
    assert main(["bench", *words]) in (1, 2)
    err = [line for line in capsys.readouterr().err.splitlines() if line.startswith("hosl:")]
    assert len(err) == 1
    assert said in err[0]


def test_rows_are_chosen_by_name():
    assert [row.name for row in variants_called("frozen; fo-fo")] == ["frozen", "fo-fo"]
    assert variants_called(None) == VARIANTS


@pytest.fixture
def with_graphs(request, monkeypatch):
    """Benchmarks take a tiny half that has its graphs already; making them takes a minute."""
    halves = client_folder(request.config, "opt", 2, edge_memory.GRAPHS).parent
    for module in (edge_memory, edge_step):
        monkeypatch.setattr(module, "random_halves", lambda *arguments: halves)
    return ["--runtime", "onnx", *SIZES, "--cut", "2"]


def _on_engine(capsys, benchmark, words):
    assert main(["bench", benchmark, *words, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    return found, {line["name"]: line for line in found["methods"]}


@pytest.mark.slow  # a minute for the graphs
@pytest.mark.usefixtures("unchecked")
def test_a_process_on_the_engine_is_measured_beside_torchs_and_the_plans(capsys, with_graphs):
    rows = "frozen;fo-recompute;fo-recompute, int8 + LoRA"
    found, lines = _on_engine(capsys, "memory", [*with_graphs, "--methods", rows])
    assert list(lines) == rows.split(";")
    assert found["onnxruntime"]
    for line in lines.values():
        pages = line["own_pages_mib"] + line["file_pages_mib"]
        assert 0 < pages <= line["onnx_process_mib"] + 1  # many looks, and none at the very peak
        assert line["planned_over_measured"] == pytest.approx(
            line["planned_mib"] / line["onnx_process_mib"], rel=0.01
        )
        # torch's libraries alone are more than all of a device without them
        assert line["torch_process_mib"] > 1.5 * line["onnx_process_mib"]
        assert line["times_less_than_torch"] > 1.5


@pytest.mark.slow
@pytest.mark.usefixtures("unchecked")
def test_a_step_on_the_engine_is_measured_beside_torchs(capsys, with_graphs):
    words = [*with_graphs, "--repeats", "1"]
    found, lines = _on_engine(capsys, "step", words)
    assert list(lines) == [row.name for row in ON_ENGINE]
    assert found["threads"] == 1
    for name, line in lines.items():
        assert line["over_torch"] == pytest.approx(line["client_s"] / line["torch_s"])
        assert all(line[key] > 0 for key in ("forward_over_torch", "step_over_forwards", "torch_step"))
        by_probes = name.split(",")[0] in ("hosl", "hosl-gradient")
        assert (line.get("pair_over_two_forwards", 0) > 0) == by_probes
    assert main(["bench", "step", *words, "--methods", "frozen"]) == 0
    _, columns, row = capsys.readouterr().out.splitlines()
    assert columns.split()[:2] == ["name", "client_s"]
    assert row.split()[0] == "frozen"


@pytest.mark.parametrize("benchmark", ["step", "memory"])
@pytest.mark.parametrize(
    ("without", "methods", "said"),
    [
        (True, "frozen", "the onnx runtime needs onnxruntime, which is not installed"),
        (False, "hosl-node", "the onnx runtime has no method: hosl-node"),
    ],
)
def test_what_the_engine_has_not_is_one_line(monkeypatch, capsys, benchmark, without, methods, said):
    if without:
        monkeypatch.setitem(sys.modules, "onnxruntime", None)
    assert main(["bench", benchmark, "--runtime", "onnx", "--methods", methods]) in (1, 2)
    err = [line for line in capsys.readouterr().err.splitlines() if line.startswith("hosl:")]
    assert len(err) == 1
    assert said in err[0]


class TestService:
    def test_simulated_devices_are_answered_in_rounds_and_questions(self, capsys, monkeypatch):
        monkeypatch.setattr("hosl.bench.service._DEVICES_OF_A_PROCESS", 2)
        monkeypatch.setattr("hosl.bench.service._CROWD", 2)
        assert (
            main(["bench", "service", "--clients", "3", "--seconds", "0.5", "--rounds", "2", "--json"]) == 0
        )
        printed = capsys.readouterr()
        found = json.loads(printed.out)
        assert found["clients"] == 3
        assert found["2_over_1"] == pytest.approx(
            found["questions_per_s_of_2"] / found["questions_per_s_of_1"]
        )
        assert 0 < found["fairness_least_over_most"] <= 1
        assert 0 < found["wait_p50_s"] <= found["wait_p99_s"]
        assert found["loop_cpu_s_per_gib"] > 0
        assert found["round_cpu_s"] > 0
        assert 0 < found["round_closing_s"] < found["round_s"]
        assert found["server_peak_mib"] > 100
        assert "bench: 2 rounds of 3 devices" in printed.err

    @pytest.mark.parametrize("words", [("--clients", "1"), ("--seconds", "0"), ("--rounds", "0")])
    def test_what_cannot_be_measured_is_refused(self, capsys, words):
        assert main(["bench", "service", *words]) == 2
        assert "hosl bench service wants 2 to 4096 clients" in capsys.readouterr().err

    def test_devices_that_fail_are_told_in_one_line(self, capsys, monkeypatch):
        def of_another_cut(facts, config):
            return model_message(facts | {"cut": 5}, config)

        monkeypatch.setattr("hosl.bench.service._CROWD", 1)
        monkeypatch.setattr("hosl.bench.service.model_message", of_another_cut)
        assert main(["bench", "service", "--clients", "2", "--seconds", "0.5"]) == 1
        last = capsys.readouterr().err.splitlines()[-1]
        assert re.fullmatch(r"hosl: the simulated devices failed: [A-Z_]+: .*cut.*", last), last

"""`hosl plan`: the table, its config and its picture; and budgets that refuse before a run or stop it."""

import dataclasses
import json
import re
from pathlib import Path

import pytest
import transformers as hf
import yaml

from hosl.cli import main
from hosl.config import load_config
from hosl.parties.engine.optimisers import OptimiserSpec
from hosl.planner.costs import client_cost_at
from hosl.planner.request import Planning
from hosl.planner.request import planned as planning
from hosl.planner.runtime_base import RUNTIME_BASE_BYTES
from hosl.system.byte_sizes import parse_bytes
from hosl.system.run_folder import read_lines
from hosl.training import local_session
from hosl.transport.link import LinkSpec
from tests.integration.languages import language_model, tuning
from tests.integration.network import Server, anew, finished, join, split

pytestmark = pytest.mark.usefixtures(
    "unchecked"
)  # thousands of small calls a step; test_planner.py verifies them


FEW = "frozen; hosl; hosl-residual; fo-fo"
"""A plan of all ways takes ten seconds."""


def planned(capsys, *words):
    assert main(["plan", *words, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_a_model_is_planned_from_its_config_alone(capsys, tmp_path):
    hf.LlamaConfig(hidden_size=64, intermediate_size=128, num_hidden_layers=4, num_attention_heads=4, vocab_size=500).save_pretrained(tmp_path)  # fmt: skip  # noqa: E501
    found = planned(capsys, str(tmp_path), "--tokens", "32", "--up", "10mbit", "--rtt", "50ms", "--ways", FEW)
    assert found["blocks"] == 4
    by_way = {(way["way"], way["cut"]): way for way in found["ways"]}
    assert {cut for _, cut in by_way} == {1, 2, 3, 4}
    fo, hosl, frozen = (by_way[name, 4] for name in ("fo-fo", "hosl", "frozen"))
    assert (
        fo["client_tensor_peak_bytes"] > hosl["client_tensor_peak_bytes"] > frozen["client_tensor_peak_bytes"]
    )
    assert hosl["client_tensor_peak_bytes"] > hosl["client_static_bytes"]
    activation = 16 * 32 * 64 * 4
    assert frozen["bytes_up"] == pytest.approx(activation, rel=0.02)
    assert hosl["bytes_up"] == pytest.approx(33 * activation, rel=0.02)
    assert frozen["wire_s"] == pytest.approx(0.05 + frozen["bytes_up"] * 8 / 10e6, rel=1e-3)
    assert found["recommended"]["way"] == "hosl-residual"


def test_what_fits_is_marked_and_the_recommended_row_is_a_config(capsys, tmp_path):
    words = ["tiny", "--tokens", "64", "--cuts", "2,5", "--ways", FEW]
    ways = planned(capsys, *words)["ways"]
    low, high = (w["client_process_bytes"] for w in ways if w["way"] == "hosl-residual")
    words += ["--device-memory", f"{(low + high) // 2}B"]
    files = tmp_path / "my.yaml", tmp_path / "p.svg"
    assert main(["plan", *words, "--write", str(files[0]), "--picture", str(files[1])]) == 0
    *lines, why = capsys.readouterr().out.splitlines()
    (arrow,) = [line for line in lines if line.startswith("->")]
    assert arrow.split()[:3] == ["->", "2", "hosl-residual"]
    assert "cut 3 was not compared" in why
    config = load_config(files[0])
    assert (config.method, config.model.cut, config.model.name) == ("hosl-residual", 2, "tiny")
    assert files[1].read_text().count("<path") > 20
    assert main(["plan", *words, "--write", str(files[0])]) == 2  # nothing is written over


@pytest.mark.slow
def test_a_device_without_torch_is_planned_beside_torch(capsys, tmp_path):
    words = ["tiny", "--batch", "1", "--tokens", "64", "--cuts", "2,3", "--runtime", "onnx"]
    assert main(["plan", *words, "--json"]) == 0
    said = capsys.readouterr()
    (without,) = [line for line in said.err.splitlines() if "the onnx runtime has no" in line]
    assert "hosl-node" in without
    assert "fo-fo" in without
    ways = json.loads(said.out)["ways"]
    assert {way["method"] for way in ways} == {
        "frozen", "hosl", "hosl-gradient", "hosl-residual", "fo-recompute",
    }  # fmt: skip
    for way in ways:
        pages = way["onnx_own_page_bytes"] + way["onnx_file_page_bytes"]
        assert way["onnx_process_bytes"] == pytest.approx(pages, abs=1)
        assert 0 < way["onnx_tensor_peak_bytes"] < way["onnx_process_bytes"] < way["client_process_bytes"]
    by_way = {(way["way"], way["cut"]): way["onnx_process_bytes"] for way in ways}
    assert by_way["fo-recompute", 2] < by_way["fo-recompute", 3]
    words += ["--ways", "frozen; fo-recompute; fo-recompute, last block; fo-fo"]
    limit = (by_way["fo-recompute", 3] + by_way["fo-recompute, last block", 3]) // 2
    assert main(["plan", *words, "--device-memory", f"{limit}B", "--write", str(tmp_path / "my.yaml")]) == 0
    *lines, why = capsys.readouterr().out.splitlines()
    (columns,) = [line for line in lines if line.split()[:1] == ["cut"]]
    assert "onnx process  torch tensors  torch process" in columns
    (arrow,) = [line for line in lines if line.startswith("->")]
    assert arrow.split()[1:5] == ["3", "fo-recompute,", "last", "block"]
    assert "exact gradients" in why
    config = load_config(tmp_path / "my.yaml")
    assert (config.method, config.client.trainable) == ("fo-recompute", "last-block")
    assert main(["plan", *words, "--device-memory", "50MiB"]) == 0
    assert "nothing fits" in capsys.readouterr().out


def test_a_config_is_planned_with_its_tasks_longest_batch(capsys, tiny_run):
    found = planned(capsys, str(tiny_run()), "--cuts", "1,2", "--ways", "frozen")
    assert (found["rows"], found["tokens"]) == (8, 2)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["opt-125m", "--device-memory", "2Gib/s"], "'2Gib/s' is no amount of memory such as 600MiB"),
        (["opt-125m", "--device-memory", "0MiB"], "a number above 0"),
        (["opt-125m", "--up", "10"], "'10' is not a rate such as 10mbit"),
        (["opt-125m", "--batch", "0"], "--batch must be above 0, got 0"),
        (["opt-125m", "--cuts", "13"], "cut=13 is outside 0..12"),
        (["opt-125m", "--cuts", "one"], "--cuts wants numbers"),
        (["opt-125m", "--tokens", "4096"], "reads 2048 positions at most"),
        (["nowhere"], "no such folder"),
    ],
)
def test_what_cannot_be_planned_is_one_line(capsys, words, said):
    assert main(["plan", *words]) in (1, 2)
    err = [line for line in capsys.readouterr().err.splitlines() if line.startswith("hosl:")]
    assert len(err) == 1
    assert said in err[0]


def test_ways_that_a_family_does_not_have_are_left_out_and_named(capsys, tmp_path):
    sizes = {
        "hidden_size": 32,
        "num_hidden_layers": 3,
        "vocab_size": 90,
        "num_attention_heads": 4,
        "head_dim": 8,
    }
    hf.HeliumConfig(**sizes, num_key_value_heads=4, intermediate_size=64).save_pretrained(tmp_path)
    assert main(["plan", str(tmp_path), "--json"]) == 0
    out, err = capsys.readouterr()
    ways = {row["way"] for row in json.loads(out)["ways"]}
    assert {"frozen", "hosl", "hosl-gradient", "fo-fo"} <= ways
    for left_out in ("hosl-node", "hosl-gradient, int8 + LoRA"):
        assert left_out not in ways
        assert f"without {left_out}: " in err


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{}", "has no model_type"),
        ("[1]", "has no model_type"),
        ("{", "cannot be read as JSON"),
        ('{"model_type": "xglm"}', "model_type xglm cannot be cut"),
        ('{"model_type": "opt", "hidden_size": 30, "num_attention_heads": 4}', "no model can be built from the config"),
        ('{"model_type": "llama", "hidden_size": -4}', "is no config that transformers takes"),
        ('{"model_type": "gemma2", "num_hidden_layers": 1000000000}', "num_hidden_layers must lie in 1..1000"),
        ('{"model_type": "gpt2", "n_layer": 0}', "n_layer must lie in 1..1000, got 0"),
        ('{"model_type": "frobnicator"}', "model_type 'frobnicator' is unknown to transformers"),
    ],
)  # fmt: skip
def test_a_config_without_what_a_plan_needs_is_refused(capsys, tmp_path, content, said):
    (tmp_path / "config.json").write_text(content)
    assert main(["plan", str(tmp_path)]) == 2
    assert said in capsys.readouterr().err


def test_a_quantised_model_is_not_planned_as_if_it_were_the_original(capsys, tmp_path):
    (tmp_path / "config.json").write_text(
        '{"model_type": "llama", "quantization_config": {"quant_method": "awq"}}'
    )
    assert main(["plan", str(tmp_path)]) == 1
    assert "is quantised (awq)" in capsys.readouterr().err


def mib(count):
    return f"{round(count / 2**20)}MiB"


def test_a_budget_that_cannot_be_met_is_refused_before_anything_is_made(capsys, tiny_run, tmp_path):
    below = RUNTIME_BASE_BYTES - 2**20
    assert main(["train", str(tiny_run(client={"memory_budget": mib(below)}))]) == 2
    said = capsys.readouterr().err
    assert "client.memory_budget is 344 MiB, but the client would take 345 MiB" in said
    assert not (tmp_path / "run").exists()


def test_the_nearest_setting_that_fits_is_named(capsys, tiny_run, monkeypatch, tmp_path):
    for module in ("planner.budget", "training.local_session"):
        monkeypatch.setattr(f"hosl.{module}.RUNTIME_BASE_BYTES", 0.0)
    settings = {"learning_rate": 1e-3, "memory_budget": "0.28MB"}
    config = tiny_run(client=settings, per_device_train_batch_size=64)
    assert main(["train", str(config)]) == 2
    said = capsys.readouterr().err
    assert "nearest setting that fits: client.micro_batch_size: " in said, said
    rows = int(said.partition("client.micro_batch_size: ")[2].split(",")[0])
    assert main(["train", str(config), "--client.micro-batch-rows", str(rows)]) == 0
    peaks = [line["client_peak_bytes"] for line in read_lines(tmp_path / "run" / "timings.jsonl")]
    assert max(peaks) <= 1.05 * parse_bytes("0.28MB")


def test_a_run_over_its_budget_is_stopped_with_its_state_saved(capsys, tiny_run, tmp_path, monkeypatch):
    monkeypatch.setattr(
        local_session, "RUNTIME_BASE_BYTES", 2 * RUNTIME_BASE_BYTES
    )  # what nobody could foresee
    config = tiny_run(client={"learning_rate": 1e-3, "memory_budget": "400MiB"})
    assert main(["train", str(config)]) == 1
    assert "after step 1 the client has taken 690 MiB; the state is saved" in capsys.readouterr().err
    monkeypatch.undo()
    assert main(["train", "--resume", str(tmp_path / "run")]) == 0


@pytest.mark.slow
def test_a_device_keeps_to_its_budget_for_200_steps(tiny_run, tmp_path):
    client = {"learning_rate": 1e-3, "memory_budget": mib(RUNTIME_BASE_BYTES + 53 * 2**20)}
    config = tiny_run(client=client, max_steps=200, eval_steps=100, save_steps=100)
    halves = split(tmp_path / "model-in", tmp_path / "halves")
    with Server(halves / "server", tmp_path / "service") as server:
        _, refused = join(halves / "client", server.line, config, start=anew).communicate(timeout=240)
        needed = refused.partition("would take ")[2].partition(" MiB (")[
            0
        ]  # on this machine, as said before a run
        limit = f"{int(needed) + 5}MiB"
        words = ("--output-dir", tmp_path / "joined", "--client.memory-budget", limit)
        assert finished(join(halves / "client", server.line, config, *words, start=anew))["finished"]
    lines = [ln for ln in read_lines(tmp_path / "joined" / "timings.jsonl") if "split" not in ln]
    assert len(lines) == 200
    assert max(line["process_peak_bytes"] for line in lines) <= 1.05 * parse_bytes(limit)
    assert all(0 < line["client_static_bytes"] < line["client_peak_bytes"] for line in lines)


def test_a_budget_is_an_amount_of_memory(capsys, tiny_run):
    config = tiny_run(client={"memory_budget": "600 megs"})
    assert main(["train", str(config)]) == 2
    assert "'600 megs' is no amount of memory" in capsys.readouterr().err
    assert yaml.safe_load(config.read_text())["client"] == {"memory_budget": "600 megs"}


@pytest.mark.parametrize("rate", ["auto", 0.5, None])
def test_a_config_whose_rate_is_auto_is_planned(capsys, tiny_run, tmp_path, rate):
    config = str(tiny_run(method="hosl-node", client={"learning_rate": rate}))
    words = ["--cuts", "2", "--ways", "hosl-node", "--write", str(tmp_path / "way.yaml")]
    assert planned(capsys, config, *words)["recommended"]
    assert load_config(tmp_path / "way.yaml").client.learning_rate == rate


def test_a_way_of_another_method_is_written_with_its_own_usual_rate(capsys, tiny_run, tmp_path):
    config = str(tiny_run(method="hosl", client={"learning_rate": 1e-5}))
    words = ["--cuts", "2", "--ways", "hosl-node", "--write", str(tmp_path / "way.yaml")]
    assert planned(capsys, config, *words)["recommended"]
    written = load_config(tmp_path / "way.yaml")
    assert (written.method, written.client_rate) == ("hosl-node", 1e-2)


def test_devices_that_share_their_half_are_planned_beside_ways_that_cannot(capsys, tiny_run):
    config = str(tiny_run(clients={"count": 3, "halves": "shared", "schedule": "synchronous"}))
    rows = planned(capsys, config, "--cuts", "2", "--ways", "hosl; frozen; zo-zo")["ways"]
    assert {row["way"] for row in rows} == {"hosl", "frozen", "zo-zo"}


@pytest.mark.parametrize(
    ("client", "residual"),
    [
        ({"optimiser": {"name": "adamw", "weight_decay": 0.1}, "learning_rate": 1e-4}, {"decay": 0.5}),
        ({"learning_rate": 1e-3}, {"blocks": 2, "slopes": "per-block"}),
        ({"learning_rate": 1e-3}, {"kept": "inputs"}),
    ],
    ids=["adamw", "slopes", "kept"],
)
def test_a_way_of_the_configs_own_method_is_planned_and_written_with_its_settings(tmp_path, client, residual):
    name = str(language_model(tmp_path / "model", "llama"))
    path = tuning(tmp_path, name, method="hosl-residual", zo={}, client=client, residual=residual)
    path.write_text(path.read_text().replace("cut: 1", "cut: 2"))
    asked = load_config(path)
    ways = "frozen", "hosl-residual", "fo-fo"
    found = planning(Planning(what=str(path), link=LinkSpec(), cuts=(2,), ways=ways), say=print)
    (row,) = [row for row in found.rows if row.config.method == "hosl-residual"]
    found = dataclasses.replace(found, chosen=row)  # a plan by itself recommends another method
    found.write(tmp_path / "way.yaml")
    written = load_config(tmp_path / "way.yaml")
    assert (written.client, written.residual) == (asked.client, asked.residual)
    shape, question = found.question.shape, found.question
    cost, _ = client_cost_at(written, shape, question.rows, question.tokens)
    assert (cost.static_bytes, cost.peak_bytes) == (row.client.static_bytes, row.client.peak_bytes)
    (backprop,) = [row for row in found.rows if row.name == "fo-fo"]
    assert backprop.config.client.optimiser == OptimiserSpec()  # of another method: its own
    assert backprop.config.residual.slopes == "none"


def test_a_plan_takes_the_overrides_of_train(capsys, tiny_run):
    words = [str(tiny_run()), "--cuts", "2", "--ways", "hosl"]
    plain = planned(capsys, *words)
    more = planned(
        capsys, *words, "--max-steps", "24", "--per-device-train-batch-size=4", "--zo.directions", "5"
    )
    assert (plain["steps"], more["steps"], more["rows"]) == (12, 24, 4)
    q2, q5 = ({w["way"]: w["round_trips"] for w in found["ways"]}["hosl"] for found in (plain, more))
    assert (q2, q5) == (3, 6)
    found = planned(capsys, "tiny", "--cuts", "2", "--tokens", "8", "--max-steps", "7", "--ways", "hosl")
    assert found["steps"] == 7
    assert main(["plan", *words, "--zo.direction", "5"]) == 2
    assert "--zo.directions" in capsys.readouterr().err


def test_the_reason_cites_what_was_measured_on_such_a_model(capsys, tiny_run):
    ways = "frozen; hosl-residual; hosl-node"
    classifier = planned(capsys, str(tiny_run()), "--cuts", "2", "--ways", ways)["why"]
    decoder = planned(capsys, "tiny", "--cuts", "2", "--tokens", "8", "--ways", ways)["why"]
    assert "hosl-node stands first on BANKING77, a classifier (docs/results/banking77.md)" in classifier
    assert (
        "hosl-residual learned most on a language model, SmolLM2-135M (docs/results/residual.md)" in decoder
    )
    next_best = planned(capsys, "tiny", "--cuts", "2", "--tokens", "8", "--ways", "frozen; hosl-node")["why"]
    assert "hosl-node comes next by what was measured (docs/results/index.md)" in next_best


def test_ways_that_are_asked_for_are_compared_alone_and_need_names(capsys):
    words = ["tiny", "--cuts", "2", "--tokens", "8", "--ways"]
    found = planned(capsys, *words, "fo-fo, AdamW; hosl-residual, AdamW")
    assert [way["way"] for way in found["ways"]] == ["fo-fo, AdamW", "hosl-residual, AdamW"]
    assert found["recommended"] is None  # backprop, and a way that was not compared with others
    assert "nothing to recommend: of the ways that were compared, fo-fo, AdamW; hosl-residual" in found["why"]
    assert main(["plan", *words, "fo-fo, SGD"]) == 2
    assert "no variant is called 'fo-fo, SGD'; names are separated by semicolons, and there are: frozen" in (
        capsys.readouterr().err
    )
    assert main(["plan", *words, "; ;"]) == 2
    assert "names are separated by semicolons" in capsys.readouterr().err
    assert main(["plan", *words, "fo-fo", "--runtime", "onnx"]) == 2
    assert "fo-fo" in capsys.readouterr().err
    for ways in ("frozen; fo-fo", "frozen;  frozen"):
        assert "only frozen fits, which trains nothing" in planned(capsys, *words, ways)["why"]
    on_engine = planned(capsys, *words, "frozen;hosl-residual", "--runtime", "onnx")
    assert (on_engine["recommended"], on_engine["why"][:20]) == (None, "nothing to recommend")


def test_the_table_is_folded_and_says_the_speeds_that_it_assumed(capsys, tiny_run):
    words = ["plan", str(tiny_run()), "--cores", "3", "--server-tflops", "7"]
    words += ["--ways", "frozen; hosl; hosl-node"]
    assert main(words) == 0
    folded = capsys.readouterr().out
    assert "device assumed: 3 cores at 40 GFLOP/s (--cores, --probe measures it)" in folded
    assert "server assumed: 7 TFLOP/s (--server-tflops)" in folded
    assert main([*words, "--all"]) == 0
    full = capsys.readouterr().out
    rows = [
        {line.split("  usual")[0].strip(" +->") for line in text.splitlines() if "usual" in line}
        for text in (folded, full)
    ]
    assert f"{len(rows[1] - rows[0])} more rows, of other cuts: --all" in folded
    assert rows[0] < rows[1]
    cuts_and_ways = [tuple(row.split(maxsplit=1)) for row in rows[0]]
    assert {cut for cut, way in cuts_and_ways if way != "hosl-node"} == {"2"}
    assert {cut for cut, way in cuts_and_ways if way == "hosl-node"} == {"1", "2", "3"}


@pytest.mark.slow
def test_the_pair_in_the_readme_runs_as_it_is_printed(capsys, tmp_path, monkeypatch):
    readme = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
    (config,) = re.findall(r"^```yaml\n# my.yaml.*?\n(.*?)^```", readme, re.DOTALL | re.MULTILINE)
    commands = [
        line.partition("#")[0].split()
        for line in re.findall(r"^\$ hosl (.*my\.yaml.*)$", readme, re.MULTILINE)
    ]
    monkeypatch.chdir(tmp_path)
    model = language_model(tmp_path / "model", "llama")
    assert config.count("SmolLM2-135M, cut: 10") == 1
    Path("my.yaml").write_text(
        config.replace("SmolLM2-135M, cut: 10", f"{model}, cut: 2")
    )  # a tiny one in its place
    rows = [{"prompt": f"w{number} w1", "completion": f" w{number % 7} w2"} for number in range(30)]
    Path("rows.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    assert commands[0][:2] == ["plan", "my.yaml"]
    assert main(commands[0]) == 0
    shown = capsys.readouterr().out
    assert "->    2  hosl-residual" in shown
    assert "device: 2 GiB" in shown
    assert commands[1] == ["train", "my.yaml"]
    assert main([*commands[1], "--max-steps", "1", "--zo.directions", "1"]) == 0
    assert Path("runs/my/report.html").is_file()


@pytest.mark.parametrize("labels", ["server", "client"])
def test_a_probe_says_how_far_residual_feedback_is_right(tmp_path, capsys, monkeypatch, labels):
    monkeypatch.setattr("hosl.planner.request._with_machine", lambda question, work: question)  # ten seconds
    path = tuning(
        tmp_path, language_model(tmp_path / "model", "llama"), method="hosl-residual", zo={}, model_cut=None,
        wire={"labels": labels}, residual={"blocks": 2},
    )  # fmt: skip
    settings = yaml.safe_load(path.read_text())
    del settings["model_cut"], settings["zo"]
    settings["model"]["cut"] = 2
    path.write_text(yaml.safe_dump(settings))
    few = ["--ways", "frozen"]
    rows = planned(capsys, str(path), "--probe", *few)["alignment"]
    layers = [f"model.layers.{i}.{name}" for i in (1, 0) for name in ("mlp.down_proj", "self_attn.o_proj")]
    assert [row["layer"] for row in rows] == layers
    assert rows[0]["cosine"] == pytest.approx(1.0, abs=1e-4)  # nothing stands above the last layer
    assert rows[0]["ratio"] == pytest.approx(1.0, abs=1e-3)
    assert all(-1 <= row["cosine"] < 0.999 for row in rows[1:])
    assert main(["plan", str(path), "--probe", *few]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [layers[0], "1.00", "1.00"] in lines
    assert not (tmp_path / "run").exists()
    assert "alignment" not in planned(capsys, str(path), "--probe", "--method", "frozen", *few)


@pytest.mark.parametrize(
    ("words", "note"),
    [
        (["--client.learning-rate", "auto"], "every layer is"),
        (["--residual.slopes", "one"], "residual.slopes: one scales these updates"),
        (["--client.trainable", "lora"], "of adapters: their second matrix (B)"),
        (["--client.trainable", "lora", "--client.dtype", "int8"], "of adapters: their second matrix (B)"),
    ],
)
def test_a_probe_measures_slopes_and_adapters_too(tmp_path, capsys, monkeypatch, words, note):
    monkeypatch.setattr("hosl.planner.request._with_machine", lambda question, work: question)
    path = tuning(tmp_path, language_model(tmp_path / "model", "llama"), method="hosl-residual", zo={})
    path.write_text(path.read_text().replace("cut: 1", "cut: 2") + "residual: {blocks: 2}\n")
    few = ["--ways", "frozen"]
    plain = planned(capsys, str(path), "--probe", *few)["alignment"]
    rows = planned(capsys, str(path), "--probe", *few, *words)["alignment"]
    assert [row["layer"] for row in rows] == [row["layer"] for row in plain]
    if "lora" in words:  # nothing stands above the last layer
        assert rows[0]["cosine"] == pytest.approx(1.0, abs=1e-4)
        assert all(0 < abs(row["cosine"]) < 0.999 for row in rows[1:])
    else:  # the same updates, which are then scaled
        assert rows == plain
    assert main(["plan", str(path), "--probe", *few, *words]) == 0
    said = capsys.readouterr().out
    assert note in said
    assert "cosine of each layer's update" in said

"""The command line from config to exported model, and what it says to wrong requests."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import yaml

import hosl
from hosl.cli import main
from hosl.core.methods import METHODS
from hosl.system.run_folder import read_lines


@pytest.mark.parametrize("method", METHODS)
def test_every_method_runs_from_config_to_report(tiny_run, tmp_path, capsys, method):
    assert main(["train", str(tiny_run(method=method)), "--json"]) == 0
    summary = json.loads(capsys.readouterr().out)
    run = tmp_path / "run"
    assert summary["finished"]
    assert summary["client_peak_bytes"] > 0
    assert summary["server_peak_bytes"] > 0
    lines = read_lines(run / "metrics.jsonl")
    assert [line["step"] for line in lines if "split" not in line] == list(range(1, 13))
    assert [line["step"] for line in lines if line.get("split") == "dev"] == [5, 10, 12]
    assert [line["step"] for line in lines if line.get("split") == "test"] == [12]
    page = (run / "report.html").read_text()
    assert "<svg" in page
    assert "http://" not in page
    assert "https://" not in page


def test_micro_batches_cost_less_memory_and_give_the_same_losses(tiny_run, tmp_path):
    config = str(tiny_run(method="fo-fo", client={"learning_rate": 1e-2, "trainable": "all"}))
    small = ["--method", "fo-recompute", "--client.micro-batch-rows", "3"]
    assert main(["train", config]) == 0
    assert main(["train", config, *small, "--output-dir", str(tmp_path / "small")]) == 0
    losses, peaks = [], []
    for run in (tmp_path / "run", tmp_path / "small"):
        lines = read_lines(run / "metrics.jsonl")
        losses.append([line["loss_nats"] for line in lines if "split" not in line])
        peaks.append(max(line["client_peak_bytes"] for line in read_lines(run / "timings.jsonl")))
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)  # rounding of float32 over twelve steps
    assert peaks[1] < peaks[0]


def test_the_exported_model_gives_the_runs_own_accuracy(tiny_run, tmp_path, capsys):
    config = tiny_run(max_steps=30)
    (tmp_path / "model-in" / "chat_template.jinja").write_text("template")
    assert main(["train", str(config), "--json"]) == 0
    assert (tmp_path / "run" / "model" / "chat_template.jinja").read_text() == "template"
    trained = json.loads(capsys.readouterr().out)
    assert main(["eval", str(tmp_path / "run"), "--split", "test", "--json"]) == 0
    again = json.loads(capsys.readouterr().out)
    assert again["accuracy"] == trained["test_accuracy"]
    session = hosl.load_run(tmp_path / "run")
    rows = [(example.rows[0], example.label) for example in session.task.test]
    script = (
        "import json, sys, torch, transformers\n"
        "rows = json.loads(sys.argv[2])\n"
        "model = transformers.AutoModelForSequenceClassification.from_pretrained(sys.argv[1]).eval()\n"
        "hits = [int(model(torch.tensor([ids])).logits.argmax()) == label for ids, label in rows]\n"
        "assert 'hosl' not in sys.modules\n"
        "assert model.config.id2label == {0: 'colour', 1: 'other'}\n"
        "print(sum(hits) / len(hits))\n"
    )
    asked = [sys.executable, "-c", script, str(tmp_path / "run" / "model"), json.dumps(rows)]
    ran = subprocess.run(asked, capture_output=True, text=True, check=True)
    assert float(ran.stdout) == pytest.approx(trained["test_accuracy"])


def test_adapters_are_exported_merged_and_on_their_own(tiny_run, tmp_path):
    lora = {"target_modules": ["query", "value"], "r": 4}
    config = tiny_run(
        client={"trainable": "lora", "learning_rate": 1e-2, "lora": lora},
        server={"trainable": "lora", "learning_rate": 1e-2, "lora": lora},
    )
    assert main(["train", str(config)]) == 0
    script = (
        "import sys, torch, transformers, peft\n"
        "auto = transformers.AutoModelForSequenceClassification\n"
        "ids = torch.tensor([[2, 3, 4], [5, 6, 7]])\n"
        "merged = auto.from_pretrained(sys.argv[1] + '/model').eval()\n"
        "head = {'num_labels': 2, 'ignore_mismatched_sizes': True}\n"
        "adapted = peft.AutoPeftModelForSequenceClassification.from_pretrained(\n"
        "    sys.argv[1] + '/model/adapter', **head\n"
        ").eval()\n"
        "plain = auto.from_pretrained(sys.argv[2], **head).eval()\n"
        "plain.classifier.load_state_dict(merged.classifier.state_dict())\n"
        "torch.testing.assert_close(adapted(ids).logits, merged(ids).logits, rtol=1e-4, atol=1e-5)\n"
        "assert not torch.allclose(plain(ids).logits, merged(ids).logits, rtol=1e-4, atol=1e-5)\n"
    )
    asked = [sys.executable, "-c", script, str(tmp_path / "run"), str(tmp_path / "model-in")]
    ran = subprocess.run(asked, capture_output=True, text=True, env=os.environ | {"HF_HUB_OFFLINE": "1"})
    assert ran.returncode == 0, ran.stderr


@pytest.mark.parametrize(
    ("method", "client", "server", "beyond"),
    [
        ("hosl", "lora", "all", "bert.encoder.layer.2."),
        ("fo-fo", "blocks", "lora", "bert.encoder.layer.0."),
        ("hosl-node", "blocks", "lora", "bert.encoder.layer.1."),
        ("frozen", "blocks", "lora", None),
        ("frozen", "lora", "all", ""),
        ("hosl", "lora", "lora", None),
    ],
)
def test_an_adapter_is_exported_only_where_it_holds_all_that_was_trained(
    tiny_run, tmp_path, capsys, method, client, server, beyond
):
    lora = {"target_modules": ["query", "value"], "r": 4}
    settings = {"client": {"lora": lora}, "server": {"trainable": server, "lora": lora}, "max_steps": 2}
    settings["client"] |= {} if method == "hosl-node" else {"trainable": client}
    assert main(["train", str(tiny_run(method=method, **settings))]) == 0
    said = capsys.readouterr().err
    assert (tmp_path / "run" / "model" / "adapter").is_dir() == (beyond is None)
    assert ("no adapter beside the model" in said) == bool(beyond)
    if beyond:
        assert f"were trained, such as {beyond}" in said


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"metod": "hosl"}, "unknown field `metod`; did you mean `method`?"),
        ({"zo": {"epsilom": 1.0}}, "did you mean `epsilon`?"),
        ({"zo": {"epsilon": "1e-3"}}, "YAML reads 1e-3 as text: write 1.0e-3"),
        ({"model": {"name": "all-MiniLM-L6-v2", "cut": -1}}, "model.cut must be >= 0, got -1"),
        ({"method": "sgd"}, "Invalid enum value 'sgd' - at `$.method`"),
        ({"max_steps": 0}, "max_steps must be >= 1, got 0"),
        (
            {"method": "fo-recompute", "client": {"micro_batch_size": 0}},
            "client.micro_batch_size must be >= 1 or null, got 0",
        ),
        (
            {"method": "fo-fo", "client": {"micro_batch_size": 2}},
            "client.micro_batch_size is not read by method fo-fo, got 2; methods that read it: frozen, zo-zo, hosl,",
        ),
        (
            {"method": "hosl-node", "client": {"optimiser": {"name": "adamw"}}},
            "client.optimiser is not read by method hosl-node, got name: adamw; methods that read it: "
            "hosl-residual, fo-zo, fo-recompute, fo-fo.",
        ),
        (
            {"method": "hosl-node", "client": {"optimiser": {"momentum": 0.9}}},
            "client.optimiser is not read by method hosl-node, got momentum: 0.9",
        ),
        (
            {"zo": {"guidance": "mixed"}},
            "zo.guidance: mixed is no more, because it gained nothing (docs/adr/0013-pruned-variants.md); leave it out",
        ),
        (
            {"method": "hosl-node", "client": {"trainable": "lora"}},
            "client.trainable is not read by method hosl-node, got lora; methods that read it: zo-zo, hosl,",
        ),
        (
            {"method": "hosl-residual", "client": {"trainable": "last-block"}},
            "client.trainable: last-block is not for method hosl-residual, which trains output projections of its last",
        ),
        (
            {
                "method": "hosl-residual",
                "residual": {"slopes": "one"},
                "client": {"optimiser": {"name": "adamw"}},
            },
            "residual.slopes: one measures a step of plain SGD on whole weights, got client.trainable: blocks, "
            "client.optimiser: adamw",
        ),
        (
            {"method": "hosl", "residual": {"decay": 0.5}},
            "residual.decay is not read by method hosl, got 0.5; methods that read it: hosl-residual.",
        ),
        (
            {"method": "hosl-residual", "residual": {"decay": 0.0}},
            "residual.decay must lie above 0 and up to 1, got 0.0",
        ),
        (
            {"method": "hosl-guided"},
            "method: hosl-guided is no more (docs/adr/0022-residual-feedback.md); take hosl-residual",
        ),
        (
            {"method": "hosl-node", "zo": {"clip": 5.0}},
            "zo.clip is not read by method hosl-node, got 5.0; methods that read it: zo-zo, hosl,",
        ),
        (
            {"method": "hosl-residual", "residual": {"blocks": 4}},
            "residual.blocks: 4 wants as many blocks on the client, model.cut is",
        ),
        ({"zo": {"guided_blocks": 4}}, "zo.guided_blocks: 4 is called residual.blocks now"),
        (
            {"method": "hosl-residual", "model": {"cut": 0}},
            "residual.blocks: 1 wants as many blocks on the client, model.cut is 0",
        ),
        (
            {"method": "fo-recompute", "clients": {"count": 2, "halves": "shared"}},
            "needs a client that is trained by random probes, method is fo-recompute",
        ),
        (
            {"method": "hosl-gradient", "zo": {"server_gradient_at": "first-plus"}},
            "zo.server_gradient_at is not read by method hosl-gradient, got first-plus; methods that read it: hosl.",
        ),
        (
            {"zo": {"server_gradient_at": "mean-plus"}},
            "Invalid enum value 'mean-plus' - at `$.zo.server_gradient_at`",
        ),
        ({"report_to": ["tensorbored"]}, "Invalid enum value 'tensorbored'"),
    ],
)
def test_a_wrong_setting_is_one_line_and_status_two(tiny_run, tmp_path, capsys, settings, said):
    assert main(["train", str(tiny_run(**settings))]) == 2
    err = capsys.readouterr().err
    assert said in err
    assert err.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_a_tracker_that_is_not_installed_is_refused_before_the_run(tiny_run, tmp_path, capsys):
    assert main(["train", str(tiny_run(report_to=["trackio"]))]) == 2
    assert "report_to asks for trackio, which is not installed" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_an_impossible_cut_names_the_blocks(tiny_run, tmp_path, capsys):
    assert main(["train", str(tiny_run()), "--model.cut", "9"]) == 2
    assert "cut=9 is outside 0..3: BertForSequenceClassification has 3 blocks" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_misspelt_override_is_refused_with_the_right_name(tiny_run, capsys):
    assert main(["train", str(tiny_run()), "--zo.epsilom", "1e-4"]) == 2
    assert "--zo.epsilon" in capsys.readouterr().err


def test_an_impossible_override_is_refused_as_in_the_file(tiny_run, capsys):
    assert main(["train", str(tiny_run()), "--zo.epsilon", "-1"]) == 2
    err = capsys.readouterr().err
    assert "zo.epsilon" in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "is empty"),
        (b"text,label\nred,\x00\x01\n", "not text in UTF-8: it holds NUL bytes"),
        (b"\xff\xfe\xfa", "text in UTF-16; save it as UTF-8"),
        (b"text,label\nred,\xfa\n", "not text in UTF-8"),
        (b"txet,label\nred,a\n", "no column `text`; there are txet, label; did you mean `txet`?"),
        (b"text,label\nred,\n", "row 1: `label` is empty"),
        (b"text,label\nred,a\nblue,a\n", "two labels or more, found only"),
    ],
)
def test_unusable_data_is_one_line_and_status_two(tiny_run, tmp_path, capsys, content, said):
    config = tiny_run()
    (tmp_path / "data.csv").write_bytes(content)
    assert main(["train", str(config)]) == 2
    err = capsys.readouterr().err
    assert said in err
    assert err.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_a_label_never_seen_in_training_is_named(tiny_run, tmp_path, capsys):
    (tmp_path / "test.csv").write_text("text,label\nred red,purple\n")
    config = yaml.safe_load(tiny_run().read_text())
    config["task"]["test"] = str(tmp_path / "test.csv")
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    assert main(["train", str(tmp_path / "config.yaml")]) == 2
    assert "row 1: label `purple` never occurs in training; known: colour, other" in capsys.readouterr().err


def test_a_model_without_a_tokenizer_is_refused(tiny_run, tmp_path, capsys):
    config = tiny_run()
    (tmp_path / "model-in" / "tokenizer.json").unlink()
    assert main(["train", str(config)]) == 2
    assert "has no tokenizer.json" in capsys.readouterr().err


def test_a_model_that_is_nowhere_is_refused_without_asking_the_hub(tiny_run, capsys):
    assert main(["train", str(tiny_run()), "--model.name", "/no/such/folder"]) == 1
    assert "no such folder, and no hub name either" in capsys.readouterr().err


def test_a_diverging_run_stops_with_one_line_and_keeps_its_last_checkpoint(tiny_run, tmp_path, capsys):
    config = tiny_run(server={"learning_rate": 1e30}, max_steps=40, save_steps=1)
    assert main(["train", str(config)]) == 3
    err = capsys.readouterr().err
    assert "must be finite" in err or "diverged" in err
    assert list((tmp_path / "run" / "checkpoints").glob("step-*"))
    assert not list((tmp_path / "run" / "checkpoints").glob(".partial*"))


def test_a_full_disk_keeps_the_checkpoint_before(tiny_run, tmp_path, capsys, monkeypatch):
    import safetensors.torch

    write = safetensors.torch.save_file

    def filling(*args, **kwargs):
        if (tmp_path / "run" / "checkpoints" / "step-00000004").is_dir():
            raise OSError(28, "No space left on device")
        return write(*args, **kwargs)

    config = tiny_run()
    monkeypatch.setattr(safetensors.torch, "save_file", filling)
    assert main(["train", str(config)]) == 1
    err = capsys.readouterr().err
    assert "No space left on device; nothing was left behind; the one before it is intact" in err
    assert [p.name for p in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-00000004"]


def test_help_is_quick_to_import():
    script = "import sys; from hosl.cli import main; main(['--help']); assert 'torch' not in sys.modules"
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr


def test_an_unknown_verb_lists_the_known_ones(capsys):
    assert main(["trian"]) == 2
    assert "unknown command `trian`; allowed: train, eval" in capsys.readouterr().err


def test_the_loop_in_the_documentation_runs():
    page = (Path(__file__).parents[2] / "docs" / "how-to" / "own-loop.md").read_text(encoding="utf-8")
    (loop,) = [block for block in page.split("```python\n")[1:] if "hosl_round(" in block]
    found = {}
    exec(loop.split("```")[0], found)
    assert found["result"].loss < found["first_loss"]


def test_hosl_split_writes_two_sides_and_says_how_large(tiny_run, tmp_path, capsys):
    tiny_run()
    out = tmp_path / "halves"
    words = [
        "split",
        str(tmp_path / "model-in"),
        str(out),
        "--cut",
        "2",
        "--head",
        "classification",
        "--labels",
        "5",
    ]
    capsys.readouterr()
    assert main([*words, "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["family"] == "bert"
    assert {path.name for path in (out / "server").iterdir()} == {
        "config.json",
        "half.json",
        "model.safetensors",
    }
    assert (out / "client" / "tokenizer.json").is_file()
    assert main(words) == 2
    assert "nothing is overwritten" in capsys.readouterr().err


def test_the_export_of_a_tied_model_says_by_how_much_it_grew_and_can_be_tied(
    tiny_run, tiny, tmp_path, capsys
):
    """The server trains its copy of the head; the embedding stays."""
    settings = tiny_run(max_steps=2)
    tiny("opt").save_pretrained(tmp_path / "model-in")
    for split, count in (("train", 40), ("validation", 8)):
        rows = [{"sentence": f"red {i} blue", "label": i % 2} for i in range(count)]
        file = tmp_path / "SST-2" / f"{split}.jsonl"
        file.parent.mkdir(exist_ok=True)
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = yaml.safe_load(settings.read_text())
    config["task"] = {
        "kind": "prompts",
        "name": "SST-2",
        "folder": str(tmp_path),
        "train_rows": 20,
        "dev_rows": 5,
    }
    settings.write_text(yaml.safe_dump(config))
    assert main(["train", str(settings)]) == 0
    said = [line for line in capsys.readouterr().err.splitlines() if "were one tensor" in line]
    assert len(said) == 1
    assert f"{97 * 32 * 4 / 1024:.1f} KiB larger than the model; `hosl export --tie embedding`" in said[0]
    assert main(["export", str(tmp_path / "run"), str(tmp_path / "tied"), "--tie", "head"]) == 0
    assert "were one tensor" not in capsys.readouterr().err
    two, one = (tmp_path / f / "model.safetensors" for f in ("run/model", "tied"))
    assert two.stat().st_size - one.stat().st_size >= 97 * 32 * 4
    assert main(["export", str(tmp_path / "run"), str(tmp_path / "two")]) == 0
    assert "were one tensor" in capsys.readouterr().err


@pytest.mark.parametrize("wrapper", ["module.", "_orig_mod."])
def test_train_refuses_a_wrapped_checkpoint_before_a_folder_is_made(tiny_run, tmp_path, capsys, wrapper):
    config, weights = tiny_run(), tmp_path / "model-in" / "model.safetensors"
    tensors = safetensors.torch.load_file(weights)
    safetensors.torch.save_file({wrapper + key: t for key, t in tensors.items()}, weights)
    assert main(["train", str(config)]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert f"its names hold {wrapper!r}: a wrapper was saved, save the model inside it" in line
    assert not (tmp_path / "run").exists()


def test_what_is_drawn_and_passed_over_is_said_before_the_first_step(tiny_run, tmp_path, capsys):
    config = tiny_run(max_steps=1, method="frozen")
    (tmp_path / "model-in" / "adapter_model.safetensors").write_bytes(b"of another training")
    assert main(["train", str(config)]) == 0
    lines = capsys.readouterr().err.splitlines()
    first = next(i for i, line in enumerate(lines) if " on data: " in line)
    said = "drawn from the seed: classifier.weight, classifier.bias, in place of the stored classifier.weight [5, 32]"
    assert any(said in line for line in lines[:first])
    assert any("adapter_model.safetensors beside the model is not applied" in line for line in lines[:first])
    assert main(["split", str(tmp_path / "model-in"), str(tmp_path / "out"), "--cut", "1",
                 "--head", "classification", "--num-labels", "2"]) == 0  # fmt: skip
    assert said in capsys.readouterr().err

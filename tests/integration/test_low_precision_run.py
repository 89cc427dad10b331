"""Whole runs over a low-precision base: trained, killed and resumed, joined over a network, exported."""

import signal
import time

import peft
import pytest
import safetensors.torch
import torch
import transformers as hf

import hosl
from hosl.cli import main
from hosl.split.quantised import Int8Linear
from hosl.system.run_folder import read_lines
from tests.integration.forked import Forked
from tests.integration.network import ENVIRONMENT, HOSL, Server, enrol, finished, join, newest, split

_LORA = {"target_modules": ["query", "value"], "r": 4}


def _client(dtype, **more):
    return {"trainable": "lora", "learning_rate": 1e-2, "lora": _LORA, "dtype": dtype} | more


_SERVER = {"trainable": "lora", "learning_rate": 1e-2, "lora": _LORA}


def _exact_bytes(run):
    files = [p for p in newest(run / "checkpoints").rglob("*") if p.is_file()]
    files += [run / "metrics.jsonl", run / "model" / "model.safetensors"]
    files += [run / "model" / "adapter" / "adapter_model.safetensors"]
    return {str(p.relative_to(run)): p.read_bytes() for p in files}


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("method", "dtype"),
    [
        ("hosl", "int8"),
        pytest.param("hosl-gradient", "int8", marks=pytest.mark.slow),
        ("fo-fo", "int8"),
        pytest.param("hosl", "bfloat16", marks=pytest.mark.slow),
    ],
)
def test_a_killed_run_resumes_to_the_same_bits(tiny_run, tmp_path, method, dtype):
    config = str(tiny_run(method=method, client=_client(dtype), server=_SERVER, max_steps=40))
    assert main(["train", config, "--output-dir", str(tmp_path / "whole")]) == 0
    killed = tmp_path / "killed"
    process = Forked([*HOSL, "train", config, "--output-dir", str(killed)], env=ENVIRONMENT)
    while not list((killed / "checkpoints").glob("step-*")):
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not (killed / "model").exists()
    assert main(["train", "--resume", str(killed)]) == 0
    assert _exact_bytes(killed) == _exact_bytes(tmp_path / "whole")


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
@pytest.mark.parametrize("dtype", ["int8", "bfloat16"])
def test_the_export_is_the_original_model_with_the_adapters(tiny_run, tmp_path, dtype):
    """Adapters are those of the run, bit for bit; every other weight but the head's is the model's own."""
    # a rate at which twelve steps move the logits by far more than the tolerance
    config = tiny_run(
        client=_client(dtype, learning_rate=1.0), server=_SERVER,
        model={"name": str(tmp_path / "model-in"), "cut": 2},
    )  # fmt: skip
    assert main(["train", str(config)]) == 0
    assert main(["export", str(tmp_path / "run"), str(tmp_path / "out")]) == 0
    session = hosl.load_run(tmp_path / "run")
    low = [m for m in session.client_half.model.modules() if isinstance(m, Int8Linear)]
    assert len(low) == {"int8": 12, "bfloat16": 0}[dtype]
    merged = safetensors.torch.load_file(tmp_path / "out" / "model.safetensors")
    assert merged.keys() == safetensors.torch.load_file(tmp_path / "run/model/model.safetensors").keys()
    original = safetensors.torch.load_file(tmp_path / "model-in" / "model.safetensors")
    adapter = safetensors.torch.load_file(tmp_path / "out" / "adapter" / "adapter_model.safetensors")
    trained = session.client.trained
    assert len(trained) == 8
    assert len(adapter) == 8 + 4 + 2  # the server's block, the head
    for name, p in trained.items():
        assert torch.equal(adapter[f"base_model.model.{name.replace('.default', '')}"], p)
    for name in (name for name in original if name.startswith("bert.")):
        adapted = "layer" in name and name.endswith(("query.weight", "value.weight"))
        assert torch.equal(merged[name], original[name]) != adapted, name
    base = hf.AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "model-in", num_labels=2, ignore_mismatched_sizes=True
    ).eval()
    ids = torch.tensor([[2, 3, 4], [5, 6, 7]])
    whole = hf.AutoModelForSequenceClassification.from_pretrained(tmp_path / "out").eval()
    with torch.no_grad():
        expected, plain = whole(ids).logits, base(ids).logits
        adapted = peft.PeftModel.from_pretrained(base, str(tmp_path / "out" / "adapter")).eval()(ids).logits
    torch.testing.assert_close(adapted, expected, rtol=1e-4, atol=1e-5)
    assert (plain - expected).abs().max() > 1e-3


@pytest.mark.parametrize("dtype", ["int8", "bfloat16"])
def test_a_low_precision_device_agrees_with_an_ordinary_server(tiny_run, tmp_path, dtype):
    """Digests are those of the split folder, h travels in the model's dtype: the same bits as in one process."""
    config = tiny_run(method="hosl", client=_client(dtype))
    assert main(["train", str(config)]) == 0
    halves = split(tmp_path / "model-in", tmp_path / "halves")
    with Server(halves / "server", tmp_path / "service") as server:
        assert finished(join(halves / "client", server.line, config, "--output-dir", tmp_path / "joined"))[
            "finished"
        ]
    metrics = [(tmp_path / run / "metrics.jsonl").read_bytes() for run in ("run", "joined")]
    assert metrics[0] == metrics[1]
    plain = tiny_run(method="hosl", client=_client("model"), output_dir=str(tmp_path / "plain"))
    assert main(["train", str(plain)]) == 0
    low, full = (
        [line["loss_nats"] for line in read_lines(tmp_path / run / "metrics.jsonl") if "split" not in line]
        for run in ("run", "plain")
    )
    assert low != full
    assert low == pytest.approx(full, rel=0.05)


def test_devices_of_different_bases_share_their_adapters(tiny_run, tmp_path, capsys):
    """client.dtype is each device's own: one journal moves the adapters of all of them by the same bits."""
    clients = {"count": 2, "halves": "shared", "schedule": "synchronous", "grace_s": 60.0}
    config = tiny_run(max_steps=4, clients=clients, client=_client("model"))
    halves = split(tmp_path / "model-in", tmp_path / "halves")
    with Server(halves / "server", tmp_path / "service") as server:
        joined = [
            join(
                halves / "client",
                line,
                config,
                "--client.dtype",
                dtype,
                "--output-dir",
                tmp_path / dtype / "run",
            )
            for line, dtype in (
                (server.line, "int8"),
                (enrol(tmp_path / "service", "second", capsys), "model"),
            )
        ]
        summaries = [finished(process) for process in joined]
    assert len({summary["client_digest"] for summary in summaries}) == 1
    assert (
        len({(tmp_path / dtype / "run" / "metrics.jsonl").read_bytes() for dtype in ("int8", "model")}) == 2
    )


def test_an_int8_device_keeps_its_labels_as_an_ordinary_one_does(tiny_run, tmp_path):
    config = tiny_run(wire={"labels": "client"}, client=_client("int8"))
    words = [
        "split",
        str(tmp_path / "model-in"),
        str(tmp_path / "halves"),
        "--cut",
        "2",
        "--head",
        "classification",
    ]
    assert main([*words, "--labels", "2", "--labels-at", "client"]) == 0
    losses = {}
    with Server(tmp_path / "halves" / "server", tmp_path / "service") as server:
        for dtype in ("int8", "model"):
            run = tmp_path / dtype / "run"
            process = join(
                tmp_path / "halves/client", server.line, config, "--client.dtype", dtype, "--output-dir", run
            )
            assert finished(process)["finished"]
            lines = read_lines(run / "metrics.jsonl")
            losses[dtype] = [line["loss_nats"] for line in lines if "split" not in line]
    assert losses["int8"] != losses["model"]
    assert losses["int8"] == pytest.approx(losses["model"], rel=0.05)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"client": {"dtype": "int8"}}, "set client.trainable: lora"),
        (
            {"method": "fo-fo", "client": {"dtype": "bfloat16", "trainable": "all"}},
            "method fo-fo trains them",
        ),
        (
            {"client": _client("bfloat16"), "wire": {"labels": "client"}},
            "bfloat16 does not go with wire.labels: client",
        ),
        ({"client": _client("int4")}, "Invalid enum value 'int4' - at `$.client.dtype`"),
    ],
)
def test_a_base_that_must_be_trained_is_refused(tiny_run, tmp_path, capsys, settings, said):
    assert main(["train", str(tiny_run(**settings))]) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_frozen_client_may_be_int8_without_adapters(tiny_run, tmp_path):
    config = tiny_run(method="frozen", client={"dtype": "int8"}, max_steps=4)
    assert main(["train", str(config)]) == 0
    merged = safetensors.torch.load_file(tmp_path / "run" / "model" / "model.safetensors")
    original = safetensors.torch.load_file(tmp_path / "model-in" / "model.safetensors")
    name = "bert.encoder.layer.0.attention.self.query.weight"
    assert torch.equal(merged[name], original[name])

"""One checkpoint out of the two halves of a run on two machines: on either, the bytes of the run in one process."""

import json

import pytest
import safetensors.torch
import torch
import transformers as hf
import yaml

from hosl.cli import main
from hosl.system.run_folder import read_record
from tests.integration.network import Server, enrol

LORA = {"trainable": "lora", "lora": {"r": 2, "target_modules": ["query", "value"]}}
CAUSAL = {"opt": "tied", "llama": "untied"}


@pytest.fixture
def causal_run(tiny_run, tiny, tmp_path):
    """`causal_run(family, **settings)`: as `tiny_run`, of a causal model and a prompt task of SST-2."""

    def make(family, **settings):
        config = tiny_run(**settings)
        model = tmp_path / "model-in"
        tiny(family).save_pretrained(model)
        (model / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content }}{% endfor %}")
        for split, count in (("train", 40), ("validation", 8)):
            rows = [{"sentence": f"red {i} blue", "label": i % 2} for i in range(count)]
            file = tmp_path / "SST-2" / f"{split}.jsonl"
            file.parent.mkdir(exist_ok=True)
            file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        written = yaml.safe_load(config.read_text())
        written["task"] = {
            "kind": "prompts", "name": "SST-2", "folder": str(tmp_path), "train_rows": 20, "dev_rows": 5
        }  # fmt: skip
        config.write_text(yaml.safe_dump(written))
        return config

    return make


class Machines:
    """A split model, a server and joins to it, all below one folder."""

    def __init__(self, folder, *words, labels_at="server"):
        self.folder, self.halves, self.service = folder, folder / "halves", folder / "service"
        head = ["--head", "causal"] if "causal" in words else ["--head", "classification", "--labels", "2"]
        cut = ["split", str(folder / "model-in"), str(self.halves), "--cut", "2", "--labels-at", labels_at]
        assert main([*cut, *head]) == 0

    def serve(self, *words):
        """`hosl serve`, with plaintext: a handshake of TLS less."""
        return Server(self.halves / "server", self.service, "--plaintext", *words)

    def join(self, line, config, *words, run="joined"):
        """`hosl join` in this process; returns the run's folder."""
        out = ["--output-dir", str(self.folder / run)]
        arguments = [str(self.halves / "client"), "--to", line, "--config", str(config), "--plaintext"]
        assert main(["join", *arguments, *map(str, words), *out]) == 0
        return self.folder / run

    def on_device(self, line, out, *words, run="joined"):
        """`hosl merge RUN --to LINE`; its exit status."""
        words = [str(self.folder / run), "--to", line, "--plaintext", "-o", str(out), *map(str, words)]
        return main(["merge", *words, "--json"])

    def on_server(self, out, *words, run="joined"):
        """`hosl merge SERVICE --run NAME`; its exit status."""
        name = read_record(self.folder / run)["run_id"]
        words = [str(self.service), "--run", name, "-o", str(out), *map(str, words)]
        return main(["merge", *words, "--json"])


def result(capsys):
    """The last result that a command printed."""
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def weights(folder):
    return (folder / "model.safetensors").read_bytes()


METHODS = {
    "a journal": {"method": "hosl", "client": {"learning_rate": 1e-3}},
    "a journal by the gradient, of all weights": {
        "method": "hosl-gradient", "client": {"learning_rate": 1e-3, "trainable": "all"}
    },
    "weights": {"method": "fo-fo", "client": {"learning_rate": 1e-2}},
    "weights of the last blocks": {"method": "hosl-node", "client": {"learning_rate": 1e-2}},
    "output projections by a journal": {
        "method": "hosl", "client": {"learning_rate": 1e-3, "trainable": "output-projections"},
        "residual": {"blocks": 1},
    },
    "adapters on output projections": {
        "method": "hosl-residual", "client": {"learning_rate": 1e-1, "trainable": "lora"}, "server": LORA,
    },
    "nothing": {"method": "frozen"},
    "adapters by a journal, on an int8 base": {
        "method": "hosl", "client": LORA | {"learning_rate": 1e-1, "dtype": "int8"},
        "server": LORA | {"learning_rate": 1e-1},
    },
    "adapters": {"method": "fo-fo", "client": LORA | {"learning_rate": 1e-1}, "server": LORA},
}  # fmt: skip


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("settings", METHODS.values(), ids=METHODS)
def test_both_machines_write_the_bytes_of_the_run_in_one_process(tiny_run, tmp_path, capsys, settings):
    config = tiny_run(max_steps=4, save_model=True, **settings)
    assert main(["train", str(config)]) == 0
    machines = Machines(tmp_path)
    with machines.serve("--give-half") as server:
        run = machines.join(server.line, config, "--give-half")
        capsys.readouterr()
        assert machines.on_device(server.line, tmp_path / "here") == 0
        here = result(capsys)
    assert machines.on_server(tmp_path / "there", "--base", tmp_path / "model-in") == 0
    said = capsys.readouterr()
    there = json.loads(said.out.splitlines()[-1])
    assert "digest" not in said.err  # the replayed half is the one that the device ended with
    assert here["digest"] == there["digest"]
    model = tmp_path / "run" / "model"
    assert weights(tmp_path / "here") == weights(tmp_path / "there") == weights(model)
    assert (tmp_path / "here" / "config.json").read_bytes() == (model / "config.json").read_bytes()
    names = {"server-half", "half.json"}
    assert not names & {path.name for path in (*run.iterdir(), *(tmp_path / "here").iterdir())}
    with_adapters = "lora" in str(settings)
    for out in (tmp_path / "here", tmp_path / "there"):
        assert (out / "adapter").is_dir() == with_adapters
        if with_adapters:
            adapters = (out / "adapter" / "adapter_model.safetensors").read_bytes()
            assert adapters == (model / "adapter" / "adapter_model.safetensors").read_bytes()


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("family", CAUSAL)
def test_a_language_model_is_merged_with_its_chat_template(causal_run, tmp_path, capsys, family):
    config = causal_run(family, max_steps=3, method="hosl", save_model=True)
    assert main(["train", str(config)]) == 0
    machines = Machines(tmp_path, "causal")
    with machines.serve("--give-half") as server:
        machines.join(server.line, config, "--give-half")
        capsys.readouterr()
        assert machines.on_device(server.line, tmp_path / "here") == 0
    assert machines.on_server(tmp_path / "there", "--client-half", machines.halves / "client") == 0
    grown = "`hosl merge --tie embedding`" in capsys.readouterr().err
    assert grown == (CAUSAL[family] == "tied")
    model = tmp_path / "run" / "model"
    for out in (tmp_path / "here", tmp_path / "there"):
        assert weights(out) == weights(model)
        for name in ("config.json", "generation_config.json", "chat_template.jinja"):
            assert (out / name).read_bytes() == (model / name).read_bytes(), name
    if CAUSAL[family] == "tied":
        assert machines.on_server(tmp_path / "tied", "--base", tmp_path / "model-in", "--tie", "head") == 0
        assert main(["export", str(tmp_path / "run"), str(tmp_path / "one"), "--tie", "head"]) == 0
        assert weights(tmp_path / "tied") == weights(tmp_path / "one")


@pytest.mark.usefixtures("unchecked")
def test_a_merged_model_is_also_written_as_a_gguf_file(causal_run, tmp_path, capsys):
    pytest.importorskip("gguf")
    config = causal_run("llama", max_steps=2, method="hosl")
    assert main(["train", str(config)]) == 0
    machines = Machines(tmp_path, "causal")
    file, alone = tmp_path / "merged" / "x.gguf", tmp_path / "alone" / "x.gguf"
    for folder in (file.parent, alone.parent):
        folder.mkdir()
    with machines.serve("--give-half") as server:
        machines.join(server.line, config)
        file.write_text("mine")
        assert machines.on_device(server.line, tmp_path / "here", "--gguf", file) == 2
        assert "x.gguf exists; nothing is overwritten" in capsys.readouterr().err
        assert not (tmp_path / "here").exists()
        file.unlink()
        assert machines.on_device(server.line, tmp_path / "here", "--gguf", file) == 0
    assert result(capsys)["gguf_bytes"] == file.stat().st_size
    assert main(["export", str(tmp_path / "run"), "--gguf", str(alone)]) == 0
    assert file.read_bytes() == alone.read_bytes()
    assert [path.name for path in alone.parent.iterdir()] == ["x.gguf"]
    found = hf.AutoModelForCausalLM.from_pretrained(file.parent, gguf_file="x.gguf", dtype=torch.float32)
    whole = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "here")
    for name, tensor in whole.state_dict().items():
        assert torch.equal(found.state_dict()[name], tensor), name


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("method", ["hosl-gradient", "fo-fo"])
def test_a_head_of_the_device_is_merged_with_the_trunk_of_the_server(tiny_run, tmp_path, capsys, method):
    config = tiny_run(max_steps=3, method=method, wire={"labels": "client"}, save_model=True)
    assert main(["train", str(config)]) == 0
    machines = Machines(tmp_path, labels_at="client")
    with machines.serve("--give-half") as server:
        machines.join(server.line, config, "--give-half")
        assert machines.on_device(server.line, tmp_path / "here") == 0
    assert machines.on_server(tmp_path / "there", "--base", tmp_path / "model-in") == 0
    assert weights(tmp_path / "here") == weights(tmp_path / "there")
    merged, model = (
        safetensors.torch.load_file(f / "model.safetensors")
        for f in (tmp_path / "here", tmp_path / "run/model")
    )
    assert merged.keys() == model.keys()
    for name in merged:
        assert torch.equal(merged[name], model[name]), name
    assert hf.AutoConfig.from_pretrained(tmp_path / "here").id2label == {0: "colour", 1: "other"}


@pytest.mark.usefixtures("unchecked")
def test_a_head_that_shares_the_devices_embedding_stays_tied(causal_run, tmp_path, capsys):
    client = {"learning_rate": 1e-3, "trainable": "all"}
    config = causal_run("opt", max_steps=3, method="hosl-gradient", wire={"labels": "client"}, client=client)
    machines = Machines(tmp_path, "causal", labels_at="client")
    with machines.serve("--give-half") as server:
        machines.join(server.line, config, "--give-half")
        assert machines.on_device(server.line, tmp_path / "here") == 0
    assert machines.on_server(tmp_path / "there", "--base", tmp_path / "model-in") == 0
    assert weights(tmp_path / "here") == weights(tmp_path / "there")
    assert "were one tensor" not in capsys.readouterr().err
    merged = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "here")
    base = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "model-in")
    embedding = merged.get_input_embeddings().weight
    assert merged.get_output_embeddings().weight is embedding
    assert not torch.equal(embedding, base.get_input_embeddings().weight)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("halves", ["shared", "personal"])
def test_two_devices_merge_one_half_by_the_servers_journal_or_each_its_own(
    tiny_run, tmp_path, capsys, halves
):
    config = tiny_run(max_steps=3, clients={"count": 2, "halves": halves})
    machines, shared = Machines(tmp_path), halves == "shared"
    with machines.serve("--give-half") as server:
        second = enrol(machines.service, "second", capsys)
        machines.join(server.line, config, "--give-half", run="a/run")
        machines.join(second, config, *([] if shared else ["--give-half"]), run="b/run")
        for name, line in (("a", server.line), ("b", second)):
            assert machines.on_device(line, tmp_path / f"from-{name}", run=f"{name}/run") == 0
    base = ["--base", tmp_path / "model-in"]
    if not shared:
        assert machines.on_server(tmp_path / "there", *base, run="a/run") == 2
        assert "has those of first, second: say whose by --client" in capsys.readouterr().err
        base += ["--client", "second"]
    assert machines.on_server(tmp_path / "there", *base, run="a/run") == 0
    assert weights(tmp_path / "from-b") == weights(tmp_path / "there")
    assert (weights(tmp_path / "from-a") == weights(tmp_path / "there")) == shared


@pytest.mark.usefixtures("unchecked")
def test_what_cannot_be_merged_is_refused_in_one_line(tiny_run, tiny, tmp_path, capsys):
    config = tiny_run(max_steps=2, method="hosl")
    machines = Machines(tmp_path)
    out, base = tmp_path / "out", ["--base", str(tmp_path / "model-in")]

    def refused(status, *expected):
        assert status in (1, 2)
        said = capsys.readouterr().err.splitlines()[-1]
        assert all(text in said for text in expected), said
        assert not out.exists()

    with machines.serve() as server:
        run = machines.join(server.line, config)
        capsys.readouterr()
        refused(machines.on_device(server.line, out), "this server keeps its half", "--give-half")
        refused(main(["merge", str(run), "-o", str(out)]), "needs --to")
        refused(main(["merge", str(run), "-o", str(out), "--run", "x"]), "--run is for", "on the server")
        refused(machines.on_server(out, *base), "needs its client's half, and this server has none")
        machines.join(server.line, config, "--give-half")  # the run is finished: the half is given now
        assert "the server has this device's half" in capsys.readouterr().err
    refused(machines.on_server(out), "give --base, the model that was split, or --client-half")
    refused(
        machines.on_server(out, *base, "--client", "second"), "client second gave no half", "there are first"
    )
    refused(machines.on_server(out, *base, "--labels", "other,colour"), "--labels are not the classes")
    refused(main(["merge", str(machines.service), "--run", "x", "-o", str(out)]), "no run is called x")
    refused(main(["merge", str(machines.service), "-o", str(out)]), "needs --run")
    refused(main(["merge", str(tmp_path / "data.csv"), "-o", str(out)]), "is neither a run of `hosl join`")
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "mine").write_text("kept")
    assert machines.on_server(tmp_path / "taken", *base) == 2
    assert "nothing is overwritten" in capsys.readouterr().err
    tiny("bert", seed=1).save_pretrained(tmp_path / "another")
    refused(
        machines.on_server(out, "--base", tmp_path / "another"), "--base", "give the model that was split"
    )
    assert not list(tmp_path.glob(".*"))

    given = machines.service / "runs" / read_record(run)["run_id"] / "given" / "first" / "given.json"
    facts, half = json.loads(given.read_text()), given.with_name("half.safetensors")
    journal = half.read_bytes()
    half.write_bytes(journal[: len(journal) // 2])
    refused(machines.on_server(out, *base), "half.safetensors cannot be read", "give or fetch the half again")
    half.write_bytes(journal)
    digest = read_record(run)["client_digest"]
    facts["given"]["digest"] = "A" * 43 + "="  # another machine's, say
    given.write_text(json.dumps(facts))
    assert machines.on_server(out, *base, "--labels", "colour,other") == 0
    said = capsys.readouterr().err
    assert f"has the digest {digest}, at the end of its run it had {'0' * 64}" in said
    assert hf.AutoConfig.from_pretrained(out).id2label == {0: "colour", 1: "other"}

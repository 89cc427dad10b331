"""Text is learned with the labels at the client: one process and two give the same bits, and no token crosses."""

import json
import random
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
import transformers
import yaml

from hosl.cli import main
from hosl.config import load_config
from hosl.core.targets import weight_of
from hosl.methods.schedule import batch_of_step
from hosl.methods.step import method_round
from hosl.methods.torch_parties import make_server
from hosl.network.torch_runtime import open_client, open_head
from hosl.parties.remote import torch_wire
from hosl.parties.remote.local_trunk import LocalTrunk
from hosl.split import load_half
from hosl.system.run_folder import read_record
from hosl.tasks import TextTokenizer, load_task
from hosl.training.local_session import LocalSession
from hosl.transport.join_line import JoinLine
from hosl.wire import hosl_pb2 as pb
from tests.conftest import MODELS
from tests.integration.network import Server, enrol, finished, join, newest, server_state, wait_until
from tests.integration.recorder import Recorder, messages
from tests.integration.test_data_boundary import _decoded
from tests.unit.test_chat_template import CHATML, saved_tokenizer

WORDS = ["red", "green", "blue", "round", "flat", "long", "warm", "cold", "old", "new"]


@pytest.fixture
def text_run(tmp_path):
    """`text_run(tied=..., **settings)` writes a tiny Llama, texts and config.yaml; returns the config's path."""

    def make(*, tied=False, rows=24, seed=0, **settings):
        _, config_class, sizes = MODELS["llama"]
        sizes = sizes | {"vocab_size": 320, "max_position_embeddings": 256, "tie_word_embeddings": tied}
        model = transformers.LlamaForCausalLM(
            config_class(**sizes | {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0})
        )
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for p in model.parameters():
                p.copy_(torch.randn(p.shape, generator=generator) * 0.1 + (1.0 if p.dim() == 1 else 0.0))
        model.save_pretrained(tmp_path / "model-in")
        saved_tokenizer(tmp_path / "model-in", CHATML)
        chance = random.Random(seed)

        def words(count):
            return " ".join(chance.choice(WORDS) for _ in range(count))

        file = tmp_path / f"rows-{seed}.jsonl"
        lines = [{"prompt": words(6) + ":", "completion": words(chance.randrange(2, 9))} for _ in range(rows)]
        file.write_text("".join(json.dumps(line) + "\n" for line in lines))
        config = {
            "output_dir": str(tmp_path / "run"), "method": "hosl",
            "model": {"name": str(tmp_path / "model-in"), "cut": 1}, "task": {"kind": "sft", "train": str(file)},
            "zo": {"directions": 2}, "client": {"learning_rate": 1e-3},
            "server": {"learning_rate": 1e-2, "optimiser": {"name": "adamw"}},
            "max_steps": 4, "per_device_train_batch_size": 4, "eval_steps": 2, "save_steps": 2, "snapshot_steps": 2,
        }  # fmt: skip
        path = tmp_path / f"config-{seed}.yaml"
        path.write_text(yaml.safe_dump(config | settings))
        return path

    return make


def split_for(config, out, *words):
    """`hosl split` for a config; returns the folder of the halves."""
    settings = yaml.safe_load(config.read_text())
    command = ["split", settings["model"]["name"], str(out), "--cut", str(settings["model"]["cut"]), *words]
    assert main(command) == 0
    return out


def trained_files(run):
    """The client's tensors and journal in a run's newest checkpoint."""
    folder = newest(run / "checkpoints") / "client"
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("method", "tied", "compression"), [("hosl", True, "int8"), ("hosl-gradient", False, "none")]
)
def test_a_run_of_texts_over_loopback_equals_one_process_and_no_token_crosses(
    text_run, tmp_path, capsys, method, tied, compression
):
    config = text_run(tied=tied, method=method, wire={"compression": compression})
    assert main(["train", str(config), "--json"]) == 0
    assert (
        "labels at the client; up cross activations, padding mask, scored positions"
        in capsys.readouterr().err
    )
    halves = split_for(config, tmp_path / "halves")
    assert "split for wire.labels: client" in capsys.readouterr().err
    with Server(halves / "server", tmp_path / "service", "--plaintext") as server:
        line = JoinLine.parse(server.line)
        recorder = Recorder((line.host, line.port))
        through = f"hosl://127.0.0.1:{recorder.port}#{line.token}"
        words = ["--plaintext", "--output-dir", tmp_path / "joined"]
        assert finished(join(halves / "client", through, config, *words))["finished"]
        recorder.close()
        assert server.stop() == 0
    run, joined = tmp_path / "run", tmp_path / "joined"
    assert (joined / "metrics.jsonl").read_bytes() == (run / "metrics.jsonl").read_bytes()
    assert trained_files(joined) == trained_files(run)
    there = safetensors.torch.load_file(newest(run / "checkpoints") / "server" / "trained.safetensors")
    here = server_state(tmp_path / "service")
    assert here.keys() == there.keys()
    assert all(torch.equal(here[name], there[name]) for name in here)
    for folder in (run, joined):
        assert read_record(folder)["crosses"].startswith("labels at the client")
        assert load_config(folder / "config.yaml").wire.labels == "client"
    model = transformers.AutoModelForCausalLM.from_pretrained(run / "model")
    assert model.config.tie_word_embeddings == tied  # a tied head is the client's embedding, and stays it
    assert not torch.equal(
        model.model.norm.weight,
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model-in").model.norm.weight,
    )  # the norm is the head's, and was trained on the device
    task = load_task(load_config(config).task, TextTokenizer.load(halves / "client"), seed=0)
    _check_capture(recorder, task, method)


def _check_capture(recorder, task, method):
    """All bytes decoded: no token id of prompt or completion, no text, no label; positions of each row as bits."""
    raw = b"".join(bytes(stream) for stream in recorder.sent)
    decoded = [_decoded(message) for stream in recorder.sent for message in messages(stream)]
    assert all(parsed is not None for parsed in decoded)
    uploads = [parsed for parsed in decoded if isinstance(parsed, pb.Upload)]
    kinds = {upload.WhichOneof("part") for upload in uploads}
    assert kinds == {"states", "step_states", "chunk"}  # evaluations ask for states, too
    asked = [getattr(u, u.WhichOneof("part")) for u in uploads if u.WhichOneof("part") != "chunk"]
    for question in asked:
        assert not hasattr(question, "targets")
        assert not question.positions.positions
        assert (
            question.positions.scored.rows == question.activations[0].shape[0]
            if isinstance(question, pb.AskStates)
            else question.activations.shape[0]
        )
    in_steps = [q for q in asked if isinstance(q, pb.AskStates) and len(q.activations) == 2]
    assert bool(in_steps) == (method == "hosl")
    searched = 0
    for example in (*task.train, *task.dev, *task.test):
        (row,) = example.rows
        ((start, stop),) = example.scored
        for ids in (row[:start], row[start:stop]):
            if len(ids) >= 8:  # fewer bytes may stand anywhere by chance
                for text in _encodings(ids):
                    assert text not in raw
                searched += 1
    assert searched > 24
    assert not any(word.encode() * 2 in raw or f" {word} ".encode() in raw for word in WORDS)


def _encodings(ids):
    """Token ids as anyone might write them: fixed-width integers, varints, text."""
    array = np.array(ids)
    yield from (array.astype(kind).tobytes() for kind in ("<i2", "<i4", "<i8", ">i2", ">i4", ">i8", "u1"))
    yield pb.Classes(labels=ids).SerializeToString()[2:]
    yield pb.Options(tokens=ids).SerializeToString()[2:]
    yield ",".join(map(str, ids)).encode()


class PartTrunk(LocalTrunk):
    """A device's way to the reference's trunk, whose round it is part of."""

    def step_states(self, activations, targets, answer, *, step, want_gradient):
        states, contribute = self._server.states_for_part(activations, targets)
        return contribute(answer(states), weight_of(targets), want_gradient)


def reference_of_rounds(configs, halves):
    """Two devices in rounds in this process: the trunk's weights, and each device's own, after the last step."""
    trunk = make_server(configs[0], load_half(halves / "server", torch.float32), [], synchronous=True)
    devices = []
    for config in configs:
        client = open_client(config, halves / "client")
        head = open_head(config, halves / "client", client, PartTrunk(trunk, torch_wire))
        task = load_task(config.task, TextTokenizer.load(halves / "client"), seed=config.seed)
        devices.append((config, client, head, task))
    for step in range(1, configs[0].max_steps + 1):
        for name, (config, client, head, task) in zip(("first", "second"), devices, strict=True):
            batch = batch_of_step(config, task, step)
            method_round(
                config, client, head, batch, step, half=f"client/{name}"
            )  # each draws its own directions
        trunk.apply(step)
    return dict(trunk.trained), [client.trained | head.trained for _, client, head, _ in devices]


def read_tensors(*files):
    """The tensors of files, by name."""
    return {name: t for file in files for name, t in safetensors.torch.load_file(file).items()}


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("method", ["fo-fo", pytest.param("hosl-node", marks=pytest.mark.slow)])
def test_two_devices_in_rounds_end_with_the_bits_of_one_process(text_run, tmp_path, capsys, method):
    """Each has its own texts, its own half and its own norm and head; the trunk is one."""
    clients = {"count": 2, "schedule": "synchronous", "grace_s": 60.0}
    server = {"learning_rate": 1e-2, "optimiser": {"name": "sgd"}}
    files = [
        text_run(seed=seed, method=method, clients=clients, server=server, max_steps=3) for seed in (0, 1)
    ]
    halves = split_for(files[0], tmp_path / "halves", "--config", str(files[0]))
    runs = [tmp_path / f"device-{place}" / "run" for place in range(2)]
    with Server(halves / "server", tmp_path / "service") as served:
        lines = [served.line, enrol(tmp_path / "service", "second", capsys)]
        joined = [
            join(halves / "client", line, file, "--output-dir", run)
            for line, file, run in zip(lines, files, runs, strict=True)
        ]
        for process in joined:
            assert finished(process)["finished"]
        assert served.stop() == 0
    trunk, devices = reference_of_rounds([load_config(file) for file in files], halves)
    here = server_state(tmp_path / "service")
    assert here.keys() == trunk.keys()
    assert all(torch.equal(here[name], trunk[name]) for name in here)
    for run, expected in zip(runs, devices, strict=True):
        folder = newest(run / "checkpoints") / "client"
        found = read_tensors(folder / "trained.safetensors", folder / "head.safetensors")
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in found)
    assert not torch.equal(devices[0]["lm_head.weight"], devices[1]["lm_head.weight"])


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("halves_are", "schedule"),
    [
        ("personal", "sequential"),
        ("shared", "synchronous"),
        pytest.param("shared", "sequential", marks=pytest.mark.slow),
    ],
)
def test_two_devices_keep_their_labels_in_either_schedule(text_run, tmp_path, capsys, halves_are, schedule):
    clients = {"count": 2, "halves": halves_are, "schedule": schedule, "grace_s": 60.0}
    files = [text_run(seed=seed, clients=clients, max_steps=4) for seed in (0, 1)]
    halves = split_for(files[0], tmp_path / "halves")
    runs = [tmp_path / f"device-{place}" / "run" for place in range(2)]
    with Server(halves / "server", tmp_path / "service") as served:
        lines = [served.line, enrol(tmp_path / "service", "second", capsys)]
        joined = [
            join(halves / "client", line, file, "--output-dir", run)
            for line, file, run in zip(lines, files, runs, strict=True)
        ]
        digests = [finished(process)["client_digest"] for process in joined]
        assert served.stop() == 0
    (folder,) = (tmp_path / "service" / "runs").iterdir()
    updates = 4 if schedule == "synchronous" else 8
    assert newest(folder / "checkpoints").name == f"step-{updates:08d}"
    heads = [newest(run / "checkpoints") / "client" / "head.safetensors" for run in runs]
    if halves_are == "shared":  # one journal, and a head that nobody trains
        assert schedule == "sequential" or len(set(digests)) == 1
        assert all(not read_tensors(head) for head in heads)
    else:
        norms = [read_tensors(head)["model.norm.weight"] for head in heads]
        assert not torch.equal(*norms)


@pytest.mark.usefixtures("unchecked")
def test_a_run_that_lost_power_goes_on_with_its_head_bit_for_bit(text_run, tmp_path, power_failure):
    config = text_run(method="hosl-gradient", save_model=False)
    assert main(["train", str(config), "--output-dir", str(tmp_path / "whole"), "--json"]) == 0
    with power_failure(LocalSession, 4):
        assert main(["train", str(config), "--json"]) != 0
    assert main(["train", "--resume", str(tmp_path / "run"), "--json"]) == 0
    whole, run = tmp_path / "whole", tmp_path / "run"
    assert (run / "metrics.jsonl").read_bytes() == (whole / "metrics.jsonl").read_bytes()
    assert trained_files(run) == trained_files(whole)


@pytest.mark.usefixtures("unchecked")
def test_a_device_that_is_killed_in_a_round_goes_on_with_the_others(text_run, tmp_path, capsys):
    clients = {"count": 2, "schedule": "synchronous", "grace_s": 3.0}
    files = [text_run(seed=seed, method="hosl-gradient", clients=clients, max_steps=12) for seed in (0, 1)]
    halves = split_for(files[0], tmp_path / "halves")
    runs = [tmp_path / f"device-{place}" / "run" for place in range(2)]
    with Server(halves / "server", tmp_path / "service") as served:
        lines = [served.line, enrol(tmp_path / "service", "second", capsys)]

        def joined(place):
            return join(halves / "client", lines[place], files[place], "--output-dir", runs[place])

        first, second = joined(0), joined(1)
        wait_until(lambda: any((runs[1] / "checkpoints").glob("step-*")), 200)
        second.kill()
        second.communicate()
        again = joined(1)
        for process in (first, again):
            assert finished(process)["finished"]
        assert served.stop() == 0
    (folder,) = (tmp_path / "service" / "runs").iterdir()
    assert newest(folder / "checkpoints").name == "step-00000012"


@pytest.mark.slow
@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("method", ["hosl-gradient", "fo-fo"])
@pytest.mark.parametrize("when", ["before", "after"])
def test_a_server_that_is_killed_under_two_devices_in_rounds_changes_nothing(
    text_run, tmp_path, capsys, method, when
):
    """SIGKILL at a step of either device, after the first checkpoint; `hosl serve` again at the same address."""
    clients = {"count": 2, "schedule": "synchronous", "grace_s": 60.0}
    files = [
        text_run(seed=seed, method=method, clients=clients, max_steps=8, save_steps=3, wire={"idle_s": 5.0})
        for seed in (0, 1)
    ]
    halves = split_for(files[0], tmp_path / "halves", "--config", str(files[0]))

    def trained_under(name, program=None):
        service = tmp_path / f"service-{name}"
        runs = [tmp_path / f"device-{place}" / name for place in range(2)]
        server = Server(halves / "server", service, program=program)
        lines = [server.line, enrol(service, "second", capsys)]
        joined = [
            join(halves / "client", line, file, "--output-dir", run)
            for line, file, run in zip(lines, files, runs, strict=True)
        ]
        if program:
            assert server.process.wait(200) == -signal.SIGKILL
            server.close()
            server = Server(halves / "server", service, listen=server.address)
        with server:
            for process in joined:
                assert finished(process)["finished"]
            assert server.stop() == 0
        return server_state(service), [trained_files(run) for run in runs], [metrics_of(run) for run in runs]

    dying = [sys.executable, str(Path(__file__).parent / "dying_server.py"), "StepStates", "9", when]
    trunk, devices, metrics = trained_under("whole")
    trunk_again, devices_again, metrics_again = trained_under("killed", dying)
    assert trunk_again.keys() == trunk.keys()
    assert all(torch.equal(trunk_again[name], trunk[name]) for name in trunk)
    assert devices_again == devices
    assert metrics_again == metrics


def metrics_of(run):
    """The exact measurements of a run."""
    return (run / "metrics.jsonl").read_bytes()

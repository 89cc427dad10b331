"""Clipping and noise on activations: what leaves is what the mechanism says; its gradient, its key, its epsilon."""

import math
from types import SimpleNamespace
from unittest.mock import create_autospec

import numpy as np
import pytest
import torch
from scipy.optimize import brentq
from scipy.stats import kstest, norm

from hosl.config import parse_config
from hosl.core.targets import ClassTargets, StepReply
from hosl.errors import ConfigError, FolderError, NonFiniteError
from hosl.parties.remote import torch_wire
from hosl.parties.remote.noisy import KEY_BYTES, ActivationNoise, NoisyServer, kept_key, simulated_key
from hosl.privacy.accounting import epsilon, spent
from hosl.tasks.base import Task
from hosl.wire.tensors import WireArray

KEY = simulated_key(0)


def activations(rows=3, seq=40, width=64, seed=0, dtype="float32"):
    """Tokens of norms from 0 to 4, one of them all zeros."""
    h = np.random.default_rng(seed).standard_normal((rows, seq, width))
    h *= np.linspace(0, 4, seq)[:, None] / np.linalg.norm(h, axis=-1, keepdims=True)
    return h.astype(dtype)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_no_token_leaves_with_a_larger_norm_and_smaller_ones_stay_as_they_are(dtype):
    h = activations(dtype=dtype)
    sent = ActivationNoise(1.5, 0.0, KEY).released(h, "1")
    before, after = (np.linalg.norm(x.astype(np.float64), axis=-1) for x in (h, sent))
    assert sent.dtype == h.dtype
    assert np.allclose(after, np.minimum(before, 1.5), rtol=1e-6)
    assert np.array_equal(sent[before <= 1.5], h[before <= 1.5])
    cosines = np.sum(h * sent, axis=-1)[:, 1:] / (before * after)[:, 1:]
    assert np.allclose(cosines, 1, rtol=1e-5)


def test_the_noise_is_gaussian_of_the_size_that_was_asked_for_and_independent_of_what_differs():
    h = activations(dtype="float64")
    noise = ActivationNoise(2.0, 0.25, KEY)
    plain = ActivationNoise(2.0, 0.0, KEY).released(h, "1")
    drawn = ((noise.released(h, "1") - plain) / 0.5).reshape(3, -1)
    assert kstest(drawn.ravel(), norm.cdf).pvalue > 0.01
    other = h.copy()
    other[0, 0, 0] = np.nextafter(h[0, 0, 0], 1)
    of_others = [
        *drawn[1:],
        ((noise.released(other, "1") - ActivationNoise(2.0, 0.0, KEY).released(other, "1")) / 0.5)[0].ravel(),
        ((ActivationNoise(2.0, 0.25, simulated_key(1)).released(h, "1") - plain) / 0.5)[0].ravel(),
    ]
    equal = ActivationNoise(2.0, 0.25, KEY).released(np.stack([h[0]] * 3), "1") - plain[0]
    of_others += [equal[1].ravel() / 0.5, ((noise.released(h, "2") - plain) / 0.5)[0].ravel()]
    # another row, one bit of a number, another key, an equal row of the message, another message
    for different in of_others:
        assert abs(np.corrcoef(drawn[0], different)[0, 1]) < 4 / math.sqrt(drawn[0].size)
    assert np.array_equal(noise.released(h, "1"), noise.released(h, "1"))


def test_the_gradient_is_that_of_clipping_by_autograd():
    h = torch.tensor(activations(dtype="float64")[:, 1:])  # not the zeros, where autograd has no norm
    h.requires_grad_(True)
    norms = h.norm(dim=-1, keepdim=True)
    clipped = h * (1.5 / norms).clamp(max=1)
    g = torch.randn(h.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    (exact,) = torch.autograd.grad(clipped, h, g)
    pulled = ActivationNoise(1.5, 0.5, KEY).pulled_back(g.numpy(), h.detach().numpy())
    assert np.allclose(pulled, exact.numpy(), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_server_behind_noise_gets_it_and_its_gradient_comes_back_through_clipping(dtype):
    got = []

    def step(h, targets, *, step, want_gradient):
        got.append(h)
        return StepReply(1.0, torch.ones_like(h) if want_gradient else None)

    server = SimpleNamespace(
        step=step,
        losses=lambda hs, targets: [*map(len, hs)],
        scores=lambda h, targets: got.append(h) or np.zeros((3, 2), dtype=np.float32),
    )
    noise = ActivationNoise(1.5, 0.1, KEY)
    h = torch.tensor(activations()).to(getattr(torch, dtype))
    targets = ClassTargets(mask=np.ones((3, 40), dtype=np.int8), labels=np.zeros(3, dtype=np.int64))

    def of_round():
        return NoisyServer(server, torch_wire, noise, "7/round")

    noisy = of_round()
    assert noisy.step(h, targets, step=8).gradient is None
    noisy.scores(h, targets)
    gradient = of_round().step(h, targets, step=8, want_gradient=True).gradient
    assert gradient.dtype == h.dtype
    assert torch.equal(got[0], got[2])  # the round is repeated: the same
    assert not torch.equal(got[0], got[1])  # another message
    plain = h.float().numpy()
    expected = torch.tensor(noise.released(plain, "7/round/1")).to(h.dtype)
    assert torch.equal(got[0], expected)
    pulled = torch.tensor(noise.pulled_back(np.ones_like(plain), plain)).to(h.dtype)
    assert torch.equal(gradient, pulled)

    h[1, 2, 3] = torch.inf
    assert all(math.isnan(loss) for loss in noisy.losses([h, h], targets))
    for call in (lambda: noisy.step(h, targets, step=8), lambda: noisy.scores(h, targets)):
        with pytest.raises(NonFiniteError, match="nothing was sent"):
            call()
    assert len(got) == 3


def test_a_key_is_drawn_once_for_its_owner_alone_and_a_damaged_one_is_refused(tmp_path):
    key = kept_key(tmp_path / "run")
    assert len(key) == KEY_BYTES
    assert kept_key(tmp_path / "run") == key
    assert kept_key(tmp_path / "other") != key
    file = tmp_path / "run" / "noise.key"
    assert file.stat().st_mode & 0o077 == 0
    file.write_bytes(key[:-1])
    with pytest.raises(FolderError, match="should have 32 bytes, found 31"):
        kept_key(tmp_path / "run")


@pytest.mark.parametrize("multiplier", [0.05, 0.5, 1.0, 5.0])
@pytest.mark.parametrize("messages", [1, 10])
def test_epsilon_bounds_the_exact_one_of_the_gaussian_mechanism_closely(multiplier, messages):
    """Exact: Balle and Wang, "Improving the Gaussian mechanism" (2018), theorem 8, at the composed multiplier."""
    z = multiplier / math.sqrt(messages)

    def delta(eps):
        above, below = norm.logcdf(0.5 / z - eps * z), norm.logcdf(-0.5 / z - eps * z)
        return math.exp(above) - math.exp(eps + below)

    exact = brentq(lambda eps: delta(eps) - 1e-5, 1e-6, 1e5)
    assert exact <= epsilon(multiplier, messages) <= 1.12 * exact


def test_no_two_texts_of_a_length_are_further_apart_than_the_sensitivity_and_some_are_as_far():
    """So sigma C / (2 C sqrt(T)) is the mechanism's multiplier, which `spent` takes."""
    clip = ActivationNoise(1.5, 0.0, KEY)
    sensitivity = 2 * 1.5 * math.sqrt(40)
    texts = [10.0 ** (seed - 2) * activations(rows=1, seed=seed, dtype="float64") for seed in range(5)]
    sent = [clip.released(text, "1") for text in texts]
    assert all(np.linalg.norm(a - b) <= sensitivity for a in sent for b in sent)
    large = 1e3 * np.ones((1, 40, 64))
    assert np.linalg.norm(clip.released(large, "1") - clip.released(-large, "1")) == pytest.approx(
        sensitivity
    )


def task_of(lengths, candidates=1):
    rows = tuple(tuple(range(length)) for length in lengths)
    examples = [SimpleNamespace(rows=rows)] * 20
    task = create_autospec(Task, instance=True)
    task.train, task.dev, task.test, task.head = examples, examples, [], "classification"
    task.rows_per_example.return_value = candidates
    return task


def test_the_messages_of_a_text_are_counted_and_a_trained_client_has_no_bound():
    settings = {"max_steps": 12, "per_device_train_batch_size": 8, "eval_steps": 5, "method": "frozen"}
    settings["wire"] = {"clip_norm": 1.0, "noise_multiplier": 20.0}
    train, dev = spent(parse_config(settings, where="test"), task_of([9, 16], candidates=4))
    assert (train.messages, dev.messages) == (5, 4)  # 96 rows of 20; after steps 5, 10 and 12, and one more
    assert train.of_message == pytest.approx(epsilon(20 / (2 * 4), 1))
    assert train.of_run == pytest.approx(epsilon(20 / (2 * 4), 5))
    assert dev.of_message == pytest.approx(epsilon(20 / (2 * 4 * 2), 1))  # four candidates repeat the text
    trained, _ = spent(parse_config(settings | {"method": "fo-fo"}, where="test"), task_of([9, 16]))
    assert (trained.of_message, trained.of_run) == (train.of_message, None)
    assert "no bound over the run" in trained.line()
    assert "over 5 messages" in train.line()


def test_texts_that_are_learned_have_no_epsilon():
    settings = {"method": "frozen", "wire": {"clip_norm": 1.0, "noise_multiplier": 20.0}}
    settings["task"] = {"kind": "sft", "train": "chats.jsonl"}
    task = task_of([9])
    task.head = "causal"
    with pytest.raises(ConfigError, match="the gradient at the last states crosses without noise"):
        spent(parse_config(settings, where="test"), task)


def test_an_epsilon_without_its_library_says_how_to_install_it(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "dp_accounting", None)
    with pytest.raises(Exception, match=r"pip install 'hosl\[privacy\]'"):
        epsilon(1.0, 1)


def test_bfloat16_on_the_wire_stays_bfloat16():
    array = torch_wire.to_wire(torch.tensor(activations()).bfloat16())
    sent = ActivationNoise(1.0, 0.1, KEY).released_array(array, "1")
    assert isinstance(sent, WireArray)
    assert (sent.dtype, sent.data.dtype) == ("bfloat16", np.uint16)

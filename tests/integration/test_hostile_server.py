"""A client against a broken or hostile server: a named end in one line or a bounded retry, never a traceback."""

import json
import math

import numpy as np
import pytest

from hosl.cli import main
from hosl.wire import hosl_pb2 as pb
from tests.integration.hostile import HandWritten, refused, step_reply
from tests.integration.network import split

# a session begins without its client, which the verified annotations do not have
pytestmark = pytest.mark.usefixtures("unchecked")

SHARED = {"clients": {"count": 2, "halves": "shared"}}
LABELS_STAY = {"wire": {"labels": "client"}}
NAN, LARGE = math.nan, 3e38


def _join(tiny_run, tmp_path, capsys, server, method, settings=None):
    """`hosl join` of three steps in this process: (exit status, the error's kind or None, what was said)."""
    settings = {"max_steps": 3, "eval_steps": 2, "save_steps": 2} | (settings or {})
    trainable = "blocks" if method in ("hosl-residual", "hosl-node") else "all"
    config = tiny_run(method=method, client={"learning_rate": 1e-3, "trainable": trainable}, **settings)
    where = settings.get("wire", {}).get("labels", "server")
    halves = split(tmp_path / "model-in", tmp_path / "halves", **{"labels-at": where})
    capsys.readouterr()
    status = main(
        [
            "join",
            str(halves / "client"),
            "--to",
            server.line,
            "--config",
            str(config),
            "--plaintext",
            "--json",
        ]
    )
    said = capsys.readouterr()
    answer = json.loads(said.out.splitlines()[-1])
    error = answer.get("error", {"kind": None, "message": said.err})
    return status, error["kind"], error["message"]


@pytest.mark.parametrize(
    ("method", "settings"),
    [("hosl", {}), ("fo-fo", {}), ("zo-zo", {}), ("fo-zo", {}), ("hosl", SHARED), ("hosl", LABELS_STAY)],
)
def test_an_honest_server_written_by_hand_is_trained_with(tiny_run, tmp_path, capsys, method, settings):
    with HandWritten() as server:
        status, kind, said = _join(tiny_run, tmp_path, capsys, server, method, settings)
        assert (status, kind) == (0, None), said


def _always(*replies):
    return lambda request, honest, context: replies


def _named(name):
    return lambda request, honest, context: refused(context, name)


def _endless_journal(request, honest, context):
    update = pb.Update(step=1, seeds=[1] * 1000, scales=[0.0] * 1000)
    for number in range(request.have + 1, 4000):
        update.step = number
        yield pb.JournalReply(step=1, updates=[update] * 1)


def _endless_nothing(request, honest, context):
    return (pb.JournalReply(step=1) for _ in range(4000))


def _journal(*updates):
    return _always(pb.JournalReply(step=1, updates=updates))


def _gradient(header=None, value=0.0):
    def reply(request, honest, context):
        shape = header or request.activations
        return step_reply(shape, value)

    return reply


def _gradient_without(request, honest, context):
    return step_reply(None)


def _cut_short(request, honest, context):
    return honest[:1]


def _twice(request, honest, context):
    return [*honest, *honest]


def _scores(rows=None, width=2, value=-0.7, scores=None):
    def reply(request, honest, context):
        n = rows or request.activations.shape[0]
        values = np.full(n * width, value, "<f4").tobytes()
        return [pb.ScoresReply(rows=n, scores=scores or width, values=values)]

    return reply


def _hello(**changed):
    def reply(request, honest, context):
        (whole,) = honest
        for name, value in changed.items():
            setattr(whole, name, value)
        return [whole]

    return reply


def _escapes(request, honest, context):
    refused(context, "StepError", "\x1b[2Jgone")


SLOW = pb.LossesReply(losses=[0.7, 0.7], server_s=NAN)
TORN = pb.ScoresReply(rows=2, scores=2, values=b"123")

CASES = {
    # ---- losses and steps ----
    "losses-none": ("hosl", "Losses", _always(), "WireError", "the reply to Losses is empty"),
    "losses-garbage": ("hosl", "Losses", _always(b"\xff\xfe\xfd"), "WireError", "3 bytes, no LossesReply"),
    "losses-nan": ("hosl", "Losses", _always(pb.LossesReply(losses=[NAN, NAN])), "NonFiniteError", "probes"),
    "losses-infinite": ("hosl", "Losses", _always(pb.LossesReply(losses=[math.inf, 0.7])), "NonFiniteError", "probes"),
    "losses-huge": ("hosl", "Losses", _always(pb.LossesReply(losses=[1e300, 0.7])), "NonFiniteError", "would move"),
    "losses-one": ("hosl", "Losses", _always(pb.LossesReply(losses=[0.7])), "WireError", "asked for 2 losses"),
    "losses-seconds": ("hosl", "Losses", _always(SLOW), "WireError", "nan s"),
    "probe-none": ("zo-zo", "Probe", _always(), "WireError", "the reply to Probe is empty"),
    "probe-nan": ("zo-zo", "Probe", _always(pb.LossesReply(losses=[NAN, NAN])), "NonFiniteError", "probes"),
    "descend-none": ("zo-zo", "Descend", _always(), "WireError", "the reply to Descend is empty"),
    "step-none": ("hosl", "Step", _always(), "WireError", "should go on with `done`, got `None`"),
    "step-empty": ("hosl", "Step", _always(b""), "WireError", "should go on with `done`, got `None`"),
    "step-chunk": ("hosl", "Step", _always(pb.StepReply(chunk=b"1234")), "WireError", "got `chunk`"),
    "step-loss-nan": ("frozen", "Step", lambda *_: step_reply(None, loss=NAN), "NonFiniteError", "the loss nan"),
    "step-loss-infinite": ("hosl", "Step", lambda *_: step_reply(None, loss=math.inf), "NonFiniteError", "loss inf"),
    "step-gradient-unasked": ("hosl", "Step", _gradient(), "WireError", "has a gradient, which was not asked for"),
    "step-twice": ("hosl", "Step", _twice, "WireError", "more parts than it announced"),
    "step-huge-message": ("hosl", "Step", _always(b"\0" * (8 << 20)), "LimitError", "larger than max"),
    # ---- gradients ----
    "gradient-missing": ("fo-fo", "Step", _gradient_without, "WireError", "lacks the gradient, which was asked for"),
    "gradient-cut": ("fo-fo", "Step", _cut_short, "WireError", "an empty chunk"),
    "gradient-shape": ("fo-fo", "Step", _gradient(pb.Tensor(shape=[1, 2, 3], dtype=1)), "WireError", "[1, 2, 3]"),
    "gradient-nan": ("fo-fo", "Step", _gradient(value=NAN), "WireError", "NaN or Inf"),
    "gradient-large": ("fo-fo", "Step", _gradient(value=LARGE), "NonFiniteError", "a number of 3e+38"),
    "gradient-large-recompute": ("fo-recompute", "Step", _gradient(value=LARGE), "NonFiniteError", "3e+38"),
    "gradient-large-probes": ("hosl-gradient", "Step", _gradient(value=-LARGE), "NonFiniteError", "3e+38"),
    "gradient-large-node": ("hosl-node", "Step", _gradient(value=LARGE), "NonFiniteError", "3e+38"),
    "gradient-missing-node": ("hosl-node", "Step", _gradient_without, "WireError", "lacks the gradient"),
    "gradient-missing-fo-zo": ("fo-zo", "Gradient", _gradient_without, "WireError", "lacks the gradient"),
    # ---- scores, saves, hello ----
    "scores-narrow": ("frozen", "Scores", _scores(width=1), "WireError", "asked for scores ["),
    "scores-wide": ("frozen", "Scores", _scores(width=40), "WireError", ", 40] in"),
    "scores-rows": ("frozen", "Scores", _scores(rows=1), "WireError", "sent [1, 2]"),
    "scores-torn": ("frozen", "Scores", _always(TORN), "WireError", "in 3 bytes"),
    "scores-nan": ("frozen", "Scores", _scores(value=NAN), "NonFiniteError", "NaN or infinite"),
    "scores-infinite": ("frozen", "Scores", _scores(value=-math.inf), "NonFiniteError", "NaN or infinite"),
    "save-none": ("frozen", "Save", _always(), "WireError", "the reply to Save is empty"),
    "hello-none": ("frozen", "Hello", _always(), "WireError", "the reply to Hello is empty"),
    "hello-future": ("frozen", "Hello", _hello(start=4_000_000_000), "WireError", "goes on from step 4000000000"),
    "hello-elsewhere": ("frozen", "Hello", _hello(start=2), "WireError", "this client can from [0]"),
    # ---- errors by name ----
    "named-steers-the-loop": ("frozen", "Step", _named("StepMoved"), "SessionError", "forgot 10 sessions"),
    "named-root": ("frozen", "Step", _named("HoslError"), "SessionError", "forgot 10 sessions"),
    "named-unknown": ("frozen", "Step", _named("KeyboardInterrupt"), "SessionError", "forgot 10 sessions"),
    "endless-sessions": ("frozen", "Step", _named("SessionError"), "SessionError", "forgot 10 sessions"),
    "named-step": ("frozen", "Step", _named("StepError"), "StepError", "no (said by server 127.0.0.1"),
    "text-of-a-terminal": ("frozen", "Step", _escapes, "StepError", "[2Jgone (said by"),
}  # fmt: skip

OF_A_JOURNAL = {
    "endless": (_endless_journal, "WireError", "updates ascend up to 6"),
    "endless-nothing": (_endless_nothing, "WireError", "has no end"),
    "falls": (_journal(pb.Update(step=2), pb.Update(step=1)), "WireError", "has update 1 after 2"),
    "scale-nan": (_journal(pb.Update(step=1, seeds=[1], scales=[NAN])), "WireError", "NaN, Inf"),
    "scale-large": (_journal(pb.Update(step=1, seeds=[1], scales=[LARGE])), "WireError", "beyond 1e+18"),
    "lengths": (_journal(pb.Update(step=1, seeds=[1, 2, 3], scales=[0.1])), "WireError", "3 seeds and 1 numbers"),
    "directions": (
        _journal(pb.Update(step=1, seeds=[1] * 10_000, scales=[0.0] * 10_000)), "LimitError", "got 10000"
    ),
}  # fmt: skip

OF_STATES = {
    "states-none": ("States", _always(), "WireError", "should go on with `done`"),
    "states-cut": ("States", _cut_short, "WireError", "an empty chunk"),
    "states-wide": (
        "States",
        lambda r, h, c: [
            pb.StatesReply(done=pb.StatesDone(states=[pb.Tensor(shape=[8, 1, 2**20], dtype=1)] * len(r.activations)))
        ],
        "WireError",
        "sends a tensor [8, 1, 1048576]",
    ),
    "step-states-none": ("StepStates", _always(), "WireError", "should go on with `states`"),
}  # fmt: skip


def _check(server, result, kind, says):
    status, found, said = result
    assert (found, says in said, "\x1b" in said) == (kind, True, False), (found, said)
    assert status in (1, 2, 3)
    assert not server.exhausted


@pytest.mark.parametrize("case", CASES)
def test_a_server_that_answers_nonsense_ends_the_run_with_a_named_error(tiny_run, tmp_path, capsys, case):
    method, call, change, kind, says = CASES[case]
    with HandWritten(**{call: change}) as server:
        _check(server, _join(tiny_run, tmp_path, capsys, server, method), kind, says)


@pytest.mark.parametrize("case", OF_A_JOURNAL)
def test_a_journal_that_cannot_be_one_ends_the_run_with_a_named_error(tiny_run, tmp_path, capsys, case):
    change, kind, says = OF_A_JOURNAL[case]
    with HandWritten(Journal=change) as server:
        _check(server, _join(tiny_run, tmp_path, capsys, server, "hosl", SHARED), kind, says)
        assert server.sent_bytes < 32 << 20


@pytest.mark.parametrize("case", OF_STATES)
def test_states_that_cannot_be_those_asked_for_end_the_run(tiny_run, tmp_path, capsys, case):
    call, change, kind, says = OF_STATES[case]
    with HandWritten(**{call: change}) as server:
        _check(server, _join(tiny_run, tmp_path, capsys, server, "hosl", LABELS_STAY), kind, says)


def test_a_server_that_goes_back_without_end_is_given_up(tiny_run, tmp_path, capsys):
    """Every Hello after the first step says 0, and every session is then forgotten."""

    def forget_later(request, honest, context):
        if request.where.step > 1:
            refused(context, "SessionError")
        return honest

    with HandWritten(Hello=_hello(start=0), Step=forget_later) as server:
        status, kind, said = _join(tiny_run, tmp_path, capsys, server, "frozen")
        assert (status, kind, "went back" in said) == (1, "SessionError", True), (kind, said)


def test_a_server_that_goes_back_after_the_last_step_ends_the_run_with_a_named_error(
    tiny_run, tmp_path, capsys
):
    """The dev split has been scored at step 3; the test split finds the server at step 0."""
    asked = []

    def forget_later(request, honest, context):
        asked.append(request.where.step)
        if asked.count(3) > 1:
            refused(context, "SessionError")
        return honest

    with HandWritten(Hello=_hello(start=0), Scores=forget_later) as server:
        status, kind, said = _join(tiny_run, tmp_path, capsys, server, "frozen")
        assert (status, kind) == (1, "SessionError"), said
        assert "went to step 0 after the last one, 3; go on with: the same command" in said


def test_a_damaged_gradient_leaves_the_client_as_it_was(tiny_run, tmp_path, capsys):
    """The third step's gradient is 3e38: the checkpoint of step 2 is the newest, and finite."""
    import safetensors.torch
    import torch

    def later(request, honest, context):
        return step_reply(request.activations, LARGE if request.where.step == 3 else 1e-3)

    with HandWritten(Step=later) as server:
        _, kind, _ = _join(tiny_run, tmp_path, capsys, server, "fo-fo")
        assert kind == "NonFiniteError"
    (saved,) = (tmp_path / "run" / "checkpoints").glob("step-*")
    weights = safetensors.torch.load_file(saved / "client" / "trained.safetensors")
    assert saved.name == "step-00000002"
    assert all(torch.isfinite(w).all() for w in weights.values())

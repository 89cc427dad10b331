"""Several ranks as forked processes on loopback: rank 0 runs a scenario, the others follow it."""

import multiprocessing
import tempfile
import traceback
from datetime import timedelta
from pathlib import Path

import msgspec
import numpy as np
import safetensors.torch
import torch

from hosl.config import Config, ServerConfig
from hosl.core.targets import ClassTargets, OptionTargets
from hosl.network.torch_hosting import TorchHosted
from hosl.parties.engine.optimisers import OptimiserSpec
from hosl.parties.remote.torch_wire import to_wire
from hosl.ranks.layout import Layout, Place
from hosl.split import load_half, split_folder
from tests.conftest import build

_PARENT = multiprocessing.get_context("forkserver")
_PARENT.set_forkserver_preload(
    ["hosl.network.serve", "hosl.ranks.hosting", "tests.ranks", "transformers.models.opt.modeling_opt"]
)


def on_ranks(scenario, layout, folder, *args, wait_s=None, followers=None):
    """What `scenario(ranks, *args)` returns on rank 0, all ranks reading the half in `folder`.

    Args:
        scenario: a function of a module.
        layout: the layout of the ranks.
        folder: the server's folder of a split model.
        args: further arguments.
        wait_s: how long the ranks wait for each other's numbers; None: as usual.
        followers: a function of a module that the other ranks run in place of following.
    """
    with tempfile.TemporaryDirectory() as store:
        ends = [_PARENT.Pipe() for _ in range(layout.ranks)]
        processes = []
        for rank, (_, end) in enumerate(ends):
            place = Place(rank=rank, local_rank=rank, ranks=layout.ranks, store=Path(store) / "store")
            work = scenario if rank == 0 else followers
            process = _PARENT.Process(target=_rank, args=(place, layout, folder, end, wait_s, work, args))
            process.start()
            end.close()
            processes.append(process)
        try:
            kind, answer = ends[0][0].recv()
        except EOFError:
            kind, answer = "error", "rank 0 ended without an answer"
        for process in processes:
            process.join(60)
            process.kill()
        assert kind == "result", answer
        assert [p.exitcode for p in processes] == [0] * layout.ranks
        return answer


def _rank(place, layout, folder, end, wait_s, work, args):
    torch.set_num_threads(1)

    from hosl.ranks.group import Group
    from hosl.ranks.hosting import Ranks

    options = {} if wait_s is None else {"numbers_wait": timedelta(seconds=wait_s)}
    ranks = Ranks(Group(place, layout, torch.device("cpu"), **options), Path(folder))
    if place.rank:
        if work is not None:
            work(ranks, *args)
        ranks.follow()
        return
    try:
        answer = "result", work(ranks, *args)
    except Exception:
        answer = "error", traceback.format_exc()
    end.send(answer)
    ranks.stop()


def halves_of(folder, family, **changed):
    """The server's folder of a tiny model of a family that was split after block 0."""
    if not (folder / family).exists():
        build(family, **changed).save_pretrained(folder / f"{family}-in")
        head = "classification" if family == "bert" else "causal"
        split_folder(folder / f"{family}-in", 1, folder / family, head=head)
    return folder / family / "server"


def settings(family, trainable="all", optimiser="sgd", **more):
    """The config of a run of a server half."""
    base = Config(
        server=ServerConfig(
            trainable=trainable, learning_rate=1e-2, optimiser=OptimiserSpec(name=optimiser),
        ),
        max_steps=10,
        **more,
    )  # fmt: skip
    return msgspec.structs.replace(base, model=msgspec.structs.replace(base.model, cut=1))


def questions(family, rows, steps=3, seed=0):
    """(activations, targets) of so many steps."""
    generator = np.random.default_rng(seed)
    asked = []
    for _ in range(steps):
        h = generator.normal(0, 1, (rows, 7, 32)).astype(np.float32)
        mask = np.ones((rows, 7), np.int8)
        mask[0, 5:] = 0 if family == "bert" else 1
        if family == "bert":
            targets = ClassTargets(mask, generator.integers(0, 5, rows))
        else:
            positions = np.tile(np.array([[4, 5]], np.int32), (rows, 1))
            tokens = generator.integers(3, 97, (rows, 2)).astype(np.int32)
            tokens[-1, 1] = -1 if rows > 1 else tokens[-1, 1]
            positions[-1, 1] = 0 if rows > 1 else positions[-1, 1]
            targets = OptionTargets(mask, positions, tokens)
        asked.append((to_wire(torch.from_numpy(h)), targets))
    return asked


def answers(hosted, asked, out, from_step=0):
    """The answers of a half to questions and steps, and its checkpoint after them, below `out`."""
    said = {}
    for number, (h, targets) in enumerate(asked, start=from_step + 1):
        said[f"losses{number}"] = np.array(hosted.losses([h, h], targets))
        said[f"scores{number}"] = hosted.scores(h, targets).copy()
        gradient = hosted.gradient(h, targets)
        stepped = hosted.step(h, targets, number, True)
        for name, reply in (("gradient", gradient), ("step", stepped)):
            said[f"{name}-loss{number}"] = np.array(reply.loss)
            said[f"{name}-at-cut{number}"] = reply.gradient.data.copy()
    step = from_step + len(asked)
    hosted.save(out, step, {"steps": {"first": step}}, None, [])
    return said | checkpoint_tensors(out)


def checkpoint_tensors(folder):
    """The tensors of the newest checkpoint of a half."""
    newest = max(folder.glob("step-*"))
    tensors = {}
    for part in ("trained", "optimiser"):
        file = newest / "server" / f"{part}.safetensors"
        if file.exists():
            of_file = safetensors.torch.load_file(file)
            tensors |= {f"{part}: {name}": tensor.numpy().copy() for name, tensor in of_file.items()}
    return tensors


def one_process(config, folder, synchronous=False):
    """The half of a run in this process."""
    return TorchHosted(config, lambda: load_half(folder, torch.float32), [], synchronous=synchronous)


def ranked(ranks, config, synchronous=False):
    """The half of a run on all ranks."""
    from hosl.ranks.hosting import RankedHosted

    return RankedHosted(ranks, config, [], synchronous=synchronous)


def cases(ranks, named):
    """A scenario: the answers of several cases, (config, questions, folder of checkpoints) by name."""
    said = {}
    for name, (config, asked, out) in named.items():
        said[name] = answers(ranked(ranks, config), asked, out)
    return said


def layout(ranks, per_copy=None, **more):
    """A layout; by default one copy."""
    return Layout(ranks=ranks, per_copy=per_copy or ranks, **more)

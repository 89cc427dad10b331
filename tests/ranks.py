"""Several ranks as forked processes on loopback: rank 0 runs a scenario, the others follow it."""

import gc
import tempfile
import time
import traceback
from datetime import timedelta
from pathlib import Path

import msgspec
import numpy as np
import safetensors.torch
import torch
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from hosl.config import Config, ServerConfig
from hosl.core.layout import Layout
from hosl.core.targets import ClassTargets, OptionTargets, weight_of
from hosl.errors import NonFiniteError
from hosl.methods.torch_parties import make_server
from hosl.network.torch_hosting import TorchHosted
from hosl.parties.engine.optimisers import OptimiserSpec
from hosl.parties.remote.torch_wire import to_wire
from hosl.ranks import hosting
from hosl.ranks.group import Group
from hosl.ranks.hosting import RankedHosted, Ranks
from hosl.ranks.place import Place
from hosl.service.hosted_half import Asked
from hosl.split import load_half, split_folder
from hosl.system.allocator import return_freed_memory
from hosl.system.machine import begin_peak, peak_since_begin_bytes, process_bytes
from hosl.wire.tensors import WireArray
from tests.conftest import build
from tests.integration.forked import PARENT


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
        ends = [PARENT.Pipe() for _ in range(layout.ranks)]
        processes = []
        for rank, (_, end) in enumerate(ends):
            place = Place(rank=rank, local_rank=rank, ranks=layout.ranks, store=Path(store) / "store")
            work = scenario if rank == 0 else followers
            process = PARENT.Process(target=_rank, args=(place, layout, folder, end, wait_s, work, args))
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
    gc.freeze()  # what was loaded before the fork is not looked through at each collection

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


def halves_of(folder, family, name=None, **changed):
    """The server's folder of a tiny model of a family that was split after block 0; `name`: one with other sizes."""
    out = folder / (name or family)
    if not out.exists():
        build(family, **changed).save_pretrained(folder / f"{out.name}-in")
        head = "classification" if family == "bert" else "causal"
        split_folder(folder / f"{out.name}-in", 1, out, head=head)
    return out / "server"


def settings(family, trainable="all", optimiser="sgd", **more):
    """The config of a run of a server half."""
    rate = 1e-2 if optimiser == "sgd" else 1e-3
    server = ServerConfig(trainable=trainable, learning_rate=rate, optimiser=OptimiserSpec(name=optimiser))
    base = Config(server=server, max_steps=10, **more)
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

    def fresh():
        return make_server(config, load_half(folder, torch.float32), [], synchronous=synchronous)

    return TorchHosted(config, fresh)


def ranked(ranks, config, synchronous=False):
    """The half of a run on all ranks."""
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


def half_over(ranks, config, synchronous=False):
    """The half of a run on all ranks; in this process, if `ranks` is the folder of the split model."""
    if isinstance(ranks, Path):
        return one_process(config, ranks, synchronous)
    return ranked(ranks, config, synchronous)


def gone_on(ranks, config, parts, out):
    """A scenario: each part's (questions, step from which it goes on): the answers, each on a half that is restored."""
    said = []
    for asked, step in parts:
        hosted = half_over(ranks, config)
        hosted.restore(out, step)
        said.append(answers(hosted, asked, out, step))
    return said


def rounds(ranks, config, asked, out):
    """A scenario: rounds with several contributions each."""
    hosted = half_over(ranks, config, True)
    said = {}
    for number in (1, 2):
        for part, (h, targets) in enumerate(asked):
            reply = hosted.contribute(h, targets, len(targets.mask), True)
            said[f"loss{number}-{part}"] = np.array(reply.loss)
            said[f"at-cut{number}-{part}"] = reply.gradient.data.copy()
        hosted.apply(number)
    hosted.save(out, 2, {}, None, [])
    return said | checkpoint_tensors(out)


def ruined(ranks, config, asked, out):
    """A scenario: a step with NaN in one row, a contribution of the like, then a step as if nothing had been."""
    hosted = ranked(ranks, config, True)
    (h, targets), _ = asked
    data = h.data.copy()
    data[1] = np.nan
    refused = []
    for call in (hosted.step, hosted.contribute):
        try:
            call(WireArray(data, "float32"), targets, 1, True)
        except NonFiniteError as error:
            refused.append(str(error))
    return refused, answers(hosted, asked, out)


def texts(ranks, config, states):
    """A scenario: what the half says to the hidden states of two texts at once, and the sizes of a text."""
    hosted = half_over(ranks, config)
    sizes = hosted.text_sizes()
    both = [hosted.open_text(5), hosted.open_text(0)]
    said = []
    for state in states:
        first, second = (text.go_on(to_wire(torch.from_numpy(state))) for text in both)
        said += [first.tokens, first.logits, second.tensor.data.copy()]
    held = [text.size_bytes for text in both]
    for text in both:
        text.close()
    hosted.losses(*questions_of_text())
    left = len(getattr(hosted, "ranks", None).texts) if not isinstance(ranks, Path) else 0
    return (sizes, held, left), said


def questions_of_text():
    """A question for losses, whatever it is about."""
    ((h, targets),) = questions("opt", 2, steps=1)
    return [h], targets


def idle(ranks, config, asked, seconds):
    """A scenario: two questions with a pause between them."""
    hosted = ranked(ranks, config)
    (h, targets), *_ = asked
    first = hosted.losses([h], targets)
    time.sleep(seconds)
    return first, hosted.losses([h], targets)


def dropped_parties(ranks, config):
    """A scenario: how many parties there are after a half was let go of and another was opened, and what is shared out.

    Returns:
        The number of parties, and the weights that are shared out over the ranks and those that are whole, by name.
    """
    first = ranked(ranks, config)
    del first
    gc.collect()
    second = ranked(ranks, config)
    second.losses(*questions_of_text())
    (party,) = ranks.parties.values()
    weights = dict(party.half.named_parameters())
    shared_out = {name for name, p in weights.items() if isinstance(p, DTensor)}
    return len(ranks.parties), shared_out, weights.keys() - shared_out


def loaded(ranks, config, warm_folder, out):
    """A scenario: every rank opens a half of `warm_folder`, then this one, and writes by how much its memory rose."""
    warm = Ranks(ranks.group, warm_folder)
    ranked(warm, config)
    warm.stop()
    watch_opening(ranks, out)
    ranked(ranks, config)


def follow_loaded(ranks, config, warm_folder, out):
    """What the other ranks do in `loaded`, before they follow."""
    Ranks(ranks.group, warm_folder).follow()
    watch_opening(ranks, out)


def watch_opening(ranks, out):
    """Have `out` told the bytes by which the memory of this rank rises at most, while a half is opened."""
    open_half = hosting.ranked_server

    def watched(*args, **options):
        gc.collect()
        begin_peak()
        before = process_bytes()
        party = open_half(*args, **options)
        (out / str(ranks.group.rank)).write_text(str(peak_since_begin_bytes() - before))
        return party

    hosting.ranked_server = watched


def _same_everywhere(ranks, of):
    party = ranks.parties[of]
    tensors = [*party.trained.values(), *(t for s in party.optimiser.state.values() for t in s.values())]
    own = torch.cat([tensor.detach().reshape(-1) for tensor in tensors])
    everyone = ranks.group.gathered(own[None])
    return bool((everyone == own).all())


hosting._COMMANDS["same-everywhere"] = _same_everywhere  # every rank has this module


def copies(ranks, config, asked, out):
    """A scenario: whether copies of the weights are the same on every rank, after steps and a round."""
    hosted = ranked(ranks, config, True)
    answers(hosted, asked, out)
    (h, targets), *_ = asked
    hosted.contribute(h, targets, 1, False)
    hosted.apply(len(asked) + 1)
    return ranks.lead("same-everywhere", hosted._number)


def planned_work(ranks, config, asked):
    """A scenario: what rank 0 holds after a step, and what it gathers in the next one, the losses of probes before it.

    Returns:
        The bytes of weights, buffers and optimiser state on this rank; the bytes gathered over those of all weights
        that are shared out.
    """
    hosted = ranked(ranks, config)
    (h, targets), *_ = asked
    hosted.step(h, targets, 1, True)
    party = hosted.party
    state = [t for of_weight in party.optimiser.state.values() for t in of_weight.values()]
    tensors = [*party.half.parameters(), *party.half.model.buffers(), *state]
    local = [t.to_local() if isinstance(t, DTensor) else t for t in tensors]
    shared_out = sum(p.numel() * p.element_size() for p in party.half.parameters() if isinstance(p, DTensor))
    with _Gathers() as counted:
        for _ in range(config.zo.directions):
            hosted.losses([h, h], targets)
        hosted.step(h, targets, 2, True)
    return sum(t.untyped_storage().nbytes() for t in local), counted.bytes / shared_out


class _Gathers(TorchDispatchMode):
    """Counts the bytes of weights that are put together."""

    bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if "_allgather_base_" in str(func):
            self.bytes += args[0].nbytes
        return func(*args, **(kwargs or {}))


def watched_step(ranks, config, warm_folder, asked, out):
    """A scenario: steps of a half of `warm_folder`, then of this one, whose last step each rank watches."""
    warm = Ranks(ranks.group, warm_folder)
    ((h, targets),) = questions("opt", 4, steps=1)
    ranked(warm, config).step(h, targets, 1, True)
    warm.stop()
    watch_steps(ranks, out)
    hosted = ranked(ranks, config)
    for number, (h, targets) in enumerate(asked, start=1):
        hosted.step(h, targets, number, True)


def follow_watched_step(ranks, config, warm_folder, asked, out):
    """What the other ranks do in `watched_step`, before they follow."""
    Ranks(ranks.group, warm_folder).follow()
    watch_steps(ranks, out)


def watch_steps(ranks, out):
    """Have `out` told by how many bytes this rank's memory, at its peak in a step, is above that before the half."""
    return_freed_memory()  # so that what the process has is what its tensors have
    open_half = hosting.ranked_server

    def watched(*args, **options):
        gc.collect()
        before = process_bytes()
        party = open_half(*args, **options)
        step = party.step

        def stepped(*args, **options):
            begin_peak()
            reply = step(*args, **options)
            (out / str(ranks.group.rank)).write_text(str(peak_since_begin_bytes() - before))
            return reply

        party.step = stepped
        return party

    hosting.ranked_server = watched


def merged(ranks, config, asked, out):
    """A scenario: losses of several clients' questions, and rounds of their contributions, each in one call."""
    hosted = half_over(ranks, config, True)
    said = {}
    for number in (1, 2):
        questions = [Asked([h, h], targets) for h, targets in asked]
        said[f"losses{number}"] = np.array(hosted.losses_together(questions))
        parts = [
            Asked([h], targets, weight_of(targets), index != 1) for index, (h, targets) in enumerate(asked)
        ]
        for part, reply in enumerate(hosted.contribute_together(parts)):
            said[f"loss{number}-{part}"] = np.array(reply.loss)
            if part != 1:
                said[f"at-cut{number}-{part}"] = reply.gradient.data.copy()
            assert (reply.gradient is None) == (part == 1)
        hosted.apply(number)
    hosted.save(out, 2, {}, None, [])
    return said | checkpoint_tensors(out)


def merged_with_nan(ranks, config, asked, out):
    """A scenario: contributions of which one has NaN are refused together; then `merged`, as if nothing had been."""
    hosted = half_over(ranks, config, True)
    (h, targets), *others = asked
    ruined = WireArray(np.full_like(h.data, np.nan), "float32")
    parts = [Asked([h], targets, 1, True) for h, targets in [*others, (ruined, targets)]]
    try:
        hosted.contribute_together(parts)
    except NonFiniteError as error:
        refused = str(error)
    for part in parts[:-1]:
        hosted.contribute(part.activations[0], part.targets, 1, True)
    hosted.apply(1)
    hosted.save(out, 1, {}, None, [])
    return refused, checkpoint_tensors(out)

"""What a report says in words: titles, the sentence below, cards, notes, the commands that make its runs again."""

import shlex
from collections.abc import Sequence
from pathlib import Path

from hosl.report.groups import Comparison, Group, PlannedLine
from hosl.report.html import amount, duration, listed
from hosl.report.runs import Run
from hosl.system.run_folder import MEMORY_STEPS

MEASURED = f"Memory is measured in the first two steps of a process and in every {MEMORY_STEPS}th."


def title(found: Sequence[Comparison]) -> str:
    """Of a page of many runs: how many ways to train, on what."""
    ways = list(dict.fromkeys(way for comparison in found for way in comparison.ways))
    places = dict.fromkeys(f"{task(comparison.first)} with {model(comparison.first)}" for comparison in found)
    return f"{f'{len(ways)} ways to train' if len(ways) > 1 else ways[0]} on {listed(list(places))}"


def how_chosen(*, finished: bool) -> str:
    """Of a study's runs."""
    if finished:
        return (
            "Learning rates were chosen by dev loss on the first seed, with equally many tries for every method; test "
            "was read from the chosen runs only."
        )
    return "The study is not finished: these are all its runs so far, rates that were only tried among them."


def place(runs: Sequence[Run]) -> str:
    """The folder that all runs lie below, or how many there are."""
    parents = {run.folder.parent for run in runs}
    return str(parents.pop()) if len(parents) == 1 else f"{len(runs)} runs"


def run_sentence(run: Run) -> str:
    """What was trained, and how far."""
    trained = [f"{count:,} on the {side}" for side, count in run.record.get("trained_parameters", {}).items()]
    done, wanted = run.steps[-1]["step"] if run.steps else 0, run.config["max_steps"]
    steps = f"{wanted:,} steps" if run.test else f"stopped after {done:,} of {wanted:,} steps"
    where = ", the server in another process" if run.joined else ""
    return (
        f"{model(run)}, cut so that the client has {_blocks([run.cut])}{where}; {steps} of "
        f"{run.config['per_device_train_batch_size']} examples; trained parameters: {listed(trained)}."
    )


def comparison_sentence(runs: Sequence[Run], found: Sequence[Comparison]) -> str:
    """What is compared, and over which cuts, steps and seeds."""
    methods = dict.fromkeys(c.method_of(way) for c in found for way in c.ways)
    cuts, seeds = (sorted({getattr(run, what) for run in runs}) for what in ("cut", "seed"))
    steps, rows = (
        listed([f"{number:,}" for number in sorted({run.config[name] for run in runs})])
        for name in ("max_steps", "per_device_train_batch_size")
    )
    said_seeds = f"seed{'s' * (len(seeds) > 1)} {listed([str(seed) for seed in seeds])}"
    kept = sum(len(group.runs) for comparison in found for group in comparison.groups)
    dropped = (
        f" Of a seed that ran more than once the last finished run counts: {len(runs) - kept} left out."
        if kept < len(runs)
        else ""
    )
    return (
        f"{listed(list(methods))}; the client has {_blocks(cuts)}; {steps} steps of {rows} examples; {said_seeds}."
        f"{dropped}"
    )


def headings(found: Sequence[Comparison]) -> list[str]:
    """Of the parts of a page: task and model, and the data where that tells them apart."""
    names = [f"{task(comparison.first)}, {model(comparison.first)}" for comparison in found]
    digests = [comparison.first.record["task"].get("digest", "")[:8] for comparison in found]
    return [
        f"{name}, data with digest {digest}" if names.count(name) > 1 else name
        for name, digest in zip(names, digests, strict=True)
    ]


def run_cards(group: Group, planned: Sequence[PlannedLine]) -> list[tuple[str, str]]:
    """What a single run reached and cost."""
    run, shown = group.runs[0], list[tuple[str, str]]()
    if run.test:
        of = f"test accuracy, {run.test['examples']:,} rows; loss {run.test['loss_nats']:.4f} nats"
        shown.append((f"{100 * run.test['accuracy']:.2f} %", of))
    if run.steps:
        rows = run.config["per_device_train_batch_size"]
        shown.append((f"{run.steps[-1]['step']:,}", f"steps of {rows} examples"))
    if run.timings:
        peaks = [line.peak_bytes.get(run.cut) for line in planned if line.method == "fo-fo" != run.method]
        beside = f"; plain backprop would take {amount(peaks[0])}" if peaks and peaks[0] else ""
        shown.append((amount(group.peak_bytes), f"client peak, tensors{beside}"))
        server = max(line["server_peak_bytes"] for line in run.timings)
        if server:  # one elsewhere measures its own
            shown.append((amount(server), "server peak, tensors"))
        shown.append((duration(group.median_step_s), "a step, median"))
    if run.steps:
        up, down = (amount(group.bytes_per_step(way)) for way in ("up", "down"))
        shown.append((up, f"up in a step, {down} down"))
    return shown


def comparison_cards(found: Sequence[Comparison], runs: int) -> list[tuple[str, str]]:
    """How many runs, and of one task and model the two ends of what they reach and cost."""
    groups = [group for comparison in found for group in comparison.groups]
    shown = [(f"{runs}", f"run{'s' * (runs > 1)} in {len(groups)} group{'s' * (len(groups) > 1)}")]
    finished = [group for group in groups if group.finished]
    if len(found) > 1 or not finished:
        return shown
    best = max(finished, key=_accuracy)
    shown.append((f"{100 * _accuracy(best):.2f} %", f"highest mean test accuracy: {best.label}"))
    measured = [group for group in finished if group.timed]
    if measured:
        least = min(measured, key=lambda group: group.peak_bytes)
        shown.append((amount(least.peak_bytes), f"least client memory: {least.label}"))
    return shown


def results_note(comparison: Comparison, chosen: str, timed_on: str, gap_ends: Sequence[str]) -> str:
    """How to read the table of results; `gap_ends` are what is 0 and what is 1 of gap closure, if there is any."""
    said = [chosen] if chosen else []
    if any(len(group.finished) > 1 for group in comparison.groups):
        said.append("Mean ± standard deviation over seeds [95 % interval of the mean, Student's t].")
    if gap_ends:
        zero, one = gap_ends
        said.append(
            f"G: gap closure, (method - {zero}) / ({one} - {zero}) over the same seeds at the same cut [95 % "
            "interval, delta method with Student's t]; gap not resolved: it is under two standard errors."
        )
    said += [f"Client peak: tensors of the client's half. {MEASURED}", f"Steps were timed on {timed_on}."]
    return " ".join(said)


def again(run: Run) -> list[str]:
    """What makes the run again, and what can be done with it while its weights are there."""
    config, folder = shlex.quote(str(run.folder / "config.yaml")), shlex.quote(str(run.folder))
    if run.joined:
        half = shlex.quote(run.record["model"]["source"])
        return [f"hosl join {half} --to JOIN_LINE --config {config}"]
    # sums are rounded by how many threads share them: the same bits want as many
    train = f"{'OMP_NUM_THREADS=1 ' * (run.record.get('machine', {}).get('threads') == 1)}hosl train"
    found = [f"{train} {config}"]
    if (run.folder / "checkpoints").is_dir():
        found += [] if run.test else [f"{train} --resume {folder}"]
        found += [f"hosl eval {folder} --split test", f"hosl export {folder} OUT"]
    return found


def task(run: Run) -> str:
    """Its name."""
    return run.record["task"]["name"]


def model(run: Run) -> str:
    """Its name and family."""
    source = run.record["model"]["source"]
    return f"{Path(source).name if Path(source).is_absolute() else source} ({run.record['model']['family']})"


def _accuracy(group: Group) -> float:
    values = group.tested("accuracy").values()
    return sum(values) / len(values)


def _blocks(cuts: Sequence[int]) -> str:
    """What a client has at a cut, or at one of several."""
    if len(cuts) > 1:
        return f"the first {', '.join(map(str, cuts[:-1]))} or {cuts[-1]} blocks"
    return {0: "the embeddings alone", 1: "the first block"}.get(cuts[0], f"the first {cuts[0]} blocks")

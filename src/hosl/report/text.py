"""Prose of a report: titles, the sentence below, cards, notes, the commands that make its runs again."""

import shlex
from collections.abc import Sequence

from hosl.report.comparison import Comparison, learns_texts
from hosl.report.groups import Group, PlannedLine, TaskGroups
from hosl.report.runs import Run
from hosl.report.statistics import GapClosure, NoGap, p_floor
from hosl.system.readable import readable_bytes, readable_count, readable_seconds
from hosl.system.run_folder import MEMORY_STEPS

MEASURED = f"Memory is measured in the first two steps of a process and in every {MEMORY_STEPS}th."


def title(parts: Sequence[TaskGroups]) -> str:
    """Title of a page of many runs: how many ways to train, on what."""
    ways = list(dict.fromkeys(way for part in parts for way in part.methods))
    subjects = dict.fromkeys(f"{part.first.task_name} with {part.first.model_name}" for part in parts)
    return f"{f'{len(ways)} ways to train' if len(ways) > 1 else ways[0]} on {listed(list(subjects))}"


def how_chosen(*, finished: bool) -> str:
    """Sentence about the choice of a study's runs."""
    if finished:
        return (
            "Learning rates were chosen by dev loss on the first seed, with equally many tries for every method; test "
            "was read from the chosen runs only."
        )
    return "The study is not finished: these are all its runs so far, rates that were only tried among them."


def common_folder(runs: Sequence[Run]) -> str:
    """The folder that all runs lie below, or how many there are."""
    parents = {run.folder.parent for run in runs}
    return str(parents.pop()) if len(parents) == 1 else readable_count(len(runs), "run")


def run_sentence(run: Run) -> str:
    """Model, cut, steps and trained parameters of a run."""
    trained = [
        f"{readable_count(n)} on the {side}" for side, n in run.record.get("trained_parameters", {}).items()
    ]
    done, wanted = run.steps[-1]["step"] if run.steps else 0, readable_count(run.config["max_steps"], "step")
    steps = wanted if run.test else f"stopped after {readable_count(done)} of {wanted}"
    where = ", the server in another process" if run.joined else ""
    rows = readable_count(run.config["per_device_train_batch_size"], "example")
    return (
        f"{run.model_name}, cut so that the client has {_blocks([run.cut])}{where}; {steps} of {rows}; trained "
        f"parameters: {listed(trained)}."
    )


def comparison_sentence(runs: Sequence[Run], parts: Sequence[TaskGroups]) -> str:
    """Methods, cuts, steps and seeds of a page of many runs; and how many runs were left out."""
    methods = dict.fromkeys(method for part in parts for method in part.methods.values())
    cuts, seeds = (sorted({getattr(run, what) for run in runs}) for what in ("cut", "seed"))
    steps, rows = (
        listed([readable_count(number) for number in sorted({run.config[name] for run in runs})])
        for name in ("max_steps", "per_device_train_batch_size")
    )
    kept = sum(len(group.runs) for part in parts for group in part.groups)
    dropped = (
        f" Of a seed that ran more than once the last finished run counts: {len(runs) - kept} left out."
        if kept < len(runs)
        else ""
    )
    return (
        f"{listed(list(methods))}; the client has {_blocks(cuts)}; {steps} steps of {rows} examples; "
        f"seed{'s' * (len(seeds) > 1)} {listed([str(seed) for seed in seeds])}.{dropped}"
    )


def headings(parts: Sequence[TaskGroups]) -> list[str]:
    """Task and model of each part of a page, and the data where that tells them apart."""
    names = [f"{part.first.task_name}, {part.first.model_name}" for part in parts]
    digests = [part.first.record["task"].get("digest", "")[:8] for part in parts]
    return [
        f"{name}, data with digest {digest}" if names.count(name) > 1 else name
        for name, digest in zip(names, digests, strict=True)
    ]


def reached(part: TaskGroups) -> str:
    """What is reached beside a loss, for headings: accuracy; where texts are learned, tokens right."""
    return "tokens right" if learns_texts(part.groups[0].runs[0].settings) else "accuracy"


def run_cards(group: Group, planned: Sequence[PlannedLine]) -> list[tuple[str, str]]:
    """Cards of a single run, what it reached and cost: (number, what it is)."""
    run, costs, cards = group.runs[0], group.arm.costs, list[tuple[str, str]]()
    if run.test:
        rows, loss = readable_count(run.test["examples"], "row"), f"{run.test['loss_nats']:.4f} nats"
        share = f"{100 * run.test['accuracy']:.2f} %"
        if learns_texts(run.settings):
            loss = f"{run.test['loss_nats']:.3f} nats"
            more = f"perplexity {run.test['perplexity']:.4g}, {share} of tokens right"
            cards.append((loss, f"test loss, {rows}; {more}"))
        else:
            cards.append((share, f"test accuracy, {rows}; loss {loss}"))
    for name, value in run.own_metric.get("figures", {}).items():
        cards.append(
            (f"{value:.4g}", f"{name} of the answers to {readable_count(run.own_metric['rows'], 'row')}")
        )
    if run.steps:
        rows = readable_count(run.config["per_device_train_batch_size"], "example")
        cards.append((readable_count(run.steps[-1]["step"]), f"steps of {rows}"))
    if costs.peak_bytes is not None and costs.step_s is not None:
        peaks = [line.peak_bytes.get(run.cut) for line in planned if line.method == "fo-fo" != run.method]
        backprop = f"; plain backprop would take {readable_bytes(peaks[0])}" if peaks and peaks[0] else ""
        cards.append((readable_bytes(costs.peak_bytes), f"client peak, tensors{backprop}"))
        server = max(line["server_peak_bytes"] for line in run.timings)
        if server:  # one elsewhere measures its own
            cards.append((readable_bytes(server), "server peak, tensors"))
        cards.append((readable_seconds(costs.step_s), "a step, median"))
    if run.steps:
        cards.append(
            (readable_bytes(costs.bytes_up), f"up in a step, {readable_bytes(costs.bytes_down)} down")
        )
    if costs.eval_bytes_up:
        down = readable_bytes(costs.eval_bytes_down)
        cards.append((readable_bytes(costs.eval_bytes_up), f"up in all evaluations, {down} down"))
    return cards


def comparison_cards(parts: Sequence[TaskGroups], runs: int) -> list[tuple[str, str]]:
    """Cards of many runs: their number, and for one task and model the two ends of what they reach and cost."""
    groups = [group for part in parts for group in part.groups]
    cards = [(f"{runs}", f"run{'s' * (runs > 1)} in {readable_count(len(groups), 'group')}")]
    finished = [group for group in groups if group.finished]
    if len(parts) > 1 or not finished:
        return cards
    if learns_texts(finished[0].arm.settings):
        best = min(finished, key=lambda group: _test_mean(group, "test_loss_nats"))
        cards.append(
            (f"{_test_mean(best, 'test_loss_nats'):.4f} nats", f"lowest mean test loss: {best.label}")
        )
    else:
        best = max(finished, key=lambda group: _test_mean(group, "test_accuracy"))
        share = f"{100 * _test_mean(best, 'test_accuracy'):.2f} %"
        cards.append((share, f"highest mean test accuracy: {best.label}"))
    peaks = {group.label: group.arm.costs.peak_bytes for group in groups if group.finished}
    measured = {label: peak for label, peak in peaks.items() if peak is not None}
    if measured:
        least = min(measured, key=lambda label: measured[label])
        cards.append((readable_bytes(measured[least]), f"least client memory: {least}"))
    return cards


def statistics_note(comparison: Comparison) -> str:
    """Guide to the spread, p and G of a comparison's table; where there is no G, the reason."""
    seeds = max((len(measure.numbers) for measure in comparison.measures), default=0)
    reasons = [r.removeprefix("n/a (").removesuffix(")") for r in comparison.reasons]
    if seeds < 2:
        either = f" With more there would be none either: {listed(reasons)}." * (
            NoGap.NO_FROZEN in comparison.reasons
        )
        return f"One seed: no spread, no p, no gap closure.{either}" if seeds else ""
    whole = [row for row in comparison.rows if row.frozen and row.first_order] or comparison.rows
    frozen = " or ".join(dict.fromkeys(row.frozen.way for row in whole if row.frozen))
    first_order = " or ".join(dict.fromkeys(row.first_order.way for row in whole if row.first_order))
    sentences = [f"Mean ± sd over {seeds} seeds [95 % interval of the mean, Student's t]."]
    if any(isinstance(measure.p, float) for measure in comparison.measures):
        sentences.append(
            f"p: paired against {frozen}, two-sided sign-flip permutation test over seeds, never under "
            f"{p_floor(seeds):.2g} with so many seeds."
        )
    if any(isinstance(measure.gap, GapClosure) for measure in comparison.measures):
        sentences.append(
            "G: gap closure, the share of the performance gap recovered, "
            f"(method - {frozen}) / ({first_order} - {frozen}), ratio of means over paired seeds at the same cut [95 % "
            "interval, delta method with Student's t]; n/a (gap not resolved): the gap is under two standard errors."
        )
    else:
        sentences.append(f"No gap closure: {listed(reasons)}.")
    return " ".join(sentences)


def again(run: Run) -> list[str]:
    """Commands that make the run again, and that use its weights while they are there."""
    config, folder = shlex.quote(str(run.folder / "config.yaml")), shlex.quote(str(run.folder))
    if run.joined:
        half = shlex.quote(run.record["model"]["source"])
        return [f"hosl join {half} --to JOIN_LINE --config {config}"]
    # sums are rounded by how many threads share them: the same bits want as many
    train = f"{'OMP_NUM_THREADS=1 ' * (run.record.get('machine', {}).get('threads') == 1)}hosl train"
    commands = [f"{train} {config}"]
    if (run.folder / "checkpoints").is_dir():
        commands += [] if run.test else [f"{train} --resume {folder}"]
        commands += [f"hosl eval {folder} --split test", f"hosl export {folder} OUT"]
    return commands


def listed(names: Sequence[str]) -> str:
    """`a, b and c`."""
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def _test_mean(group: Group, key: str) -> float:
    values = group.arm.values[key].values()
    return sum(values) / len(values)


def _blocks(cuts: Sequence[int]) -> str:
    """Blocks of a client at a cut, or at one of several."""
    if len(cuts) > 1:
        return f"the first {', '.join(map(str, cuts[:-1]))} or {cuts[-1]} blocks"
    return {0: "the embeddings alone", 1: "the first block"}.get(cuts[0], f"the first {cuts[0]} blocks")

"""`hosl bench step|memory|plan|link ...`: costs measured, as ratios within one run."""

import sys
from typing import Any, get_args

from hosl.cli.answers import Parser, answer, verb_parser
from hosl.config import Config, Method, ModelConfig, WireConfig, ZOConfig


def run(words: list[str]) -> int:
    """Measure and print; nothing is kept."""
    parser = verb_parser(
        "bench", "Measure what a client costs, or steps across an emulated link.", as_json=False
    )
    measured = {"step": _step, "memory": _memory, "plan": _plan, "link": _link}
    parser.add_argument("what", choices=measured, help="each has settings of its own: hosl bench step --help")
    known, rest = (parser.parse_args(words[:1]), words[1:]) if words else (parser.parse_args(words), [])
    return measured[known.what](rest)


def _sizes(what: str, description: str) -> Parser:
    parser = verb_parser(f"bench {what}", description)
    parser.add_argument(
        "--shape", default="opt-125m", help="random weights in this shape: tiny, opt-125m, opt-1.3b"
    )
    parser.add_argument("--cut", type=int, default=5)
    parser.add_argument("--batch", type=int, default=16, help="rows")
    parser.add_argument("--tokens", type=int, default=64, help="per row")
    return parser


def _step(words: list[str]) -> int:
    parser = _sizes(
        "step", "A client's step, for every method, against plain forward passes of the same half."
    )
    _rows(parser)
    parser.add_argument("--repeats", type=int, default=5, help="of every step, after one that warms up")
    parser.add_argument("--memory-repeats", type=int, default=1, help="each in a process of its own; 0: none")
    known = parser.parse_args(words)

    from hosl.bench.step import StepBench, bench_step
    from hosl.methods.rows import rows_called

    bench = StepBench(
        shape=known.shape, cut=known.cut, rows=known.batch, tokens=known.tokens, directions=known.directions,
        repeats=known.repeats, memory_repeats=known.memory_repeats,
    )  # fmt: skip
    return _show(bench_step(bench, rows_called(known.methods), _say), known.json)


def _memory(words: list[str]) -> int:
    parser = _sizes("memory", "Peak memory of a client's step, for every method, against plain first-order.")
    _rows(parser)
    parser.add_argument(
        "--once",
        action="store_true",
        help="one step instead of two; process peaks then hold the profiler, too",
    )
    known = parser.parse_args(words)

    from hosl.bench.memory import bench_memory
    from hosl.methods.rows import rows_called

    rows = rows_called(known.methods)
    steps = 0 if known.once else 1
    found = bench_memory(
        known.shape, known.cut, known.batch, known.tokens, known.directions, rows, _say, steps=steps
    )
    return _show(found, known.json)


def _plan(words: list[str]) -> int:
    parser = verb_parser("bench plan", "The planner's predictions against measurements, 28 configurations.")
    parser.add_argument(
        "--probe-seconds", type=float, default=3.0, help="of measuring this machine, for each"
    )
    known = parser.parse_args(words)

    from hosl.bench.plan_accuracy import bench_plan

    return _show(bench_plan(say=_say, probe_s=known.probe_seconds), known.json)


def _rows(parser: Parser) -> None:
    parser.add_argument("--directions", type=int, default=10, help="Q")
    parser.add_argument("--methods", help="rows of the table, separated by semicolons; default: all")


def _say(text: str) -> None:
    sys.stderr.write(f"bench: {text}\n")


def _show(found: dict[str, Any], as_json: bool) -> int:
    """One JSON object, or the settings in a line and a table below."""
    if as_json:
        answer(found, as_json=True)
        return 0
    lines: list[dict[str, Any]] = found.pop("methods")
    sys.stdout.write(", ".join(f"{key} {value}" for key, value in found.items()) + "\n")
    columns = list(dict.fromkeys(key for line in lines for key in line))
    table = [columns, *([_cell(line.get(key, "")) for key in columns] for line in lines)]
    widths = [max(len(line[place]) for line in table) for place in range(len(columns))]
    for line in table:
        cells = (cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True))
        sys.stdout.write("  ".join([line[0].ljust(widths[0]), *cells]) + "\n")
    return 0


def _cell(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _link(words: list[str]) -> int:
    parser = _sizes("link", "Steps across an emulated link, by client, wire and server.")
    parser.add_argument("--steps", type=int, default=5, help="measured, after one that warms up")
    parser.add_argument("--method", default="hosl", choices=get_args(Method))
    parser.add_argument("--directions", type=int, default=2)
    parser.add_argument("--distribution", default="rademacher", choices=("gaussian", "rademacher"))
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--compression", default="none", choices=("none", "bf16", "int8"))
    parser.add_argument("--rtt", default="0ms", help="such as 50ms")
    parser.add_argument("--up", help="such as 10mbit; default: no limit")
    parser.add_argument("--down", help="such as 100mbit; default: no limit")
    known = parser.parse_args(words)

    from hosl.bench.link import LinkBench, bench_link
    from hosl.transport.link import LinkSpec, parse_duration, parse_rate

    config = Config(
        method=known.method, model=ModelConfig(cut=known.cut, dtype=known.dtype),
        zo=ZOConfig(directions=known.directions, distribution=known.distribution),
        wire=WireConfig(compression=known.compression),
    )  # fmt: skip
    link = LinkSpec(
        rtt_s=parse_duration(known.rtt), up_bits_per_s=parse_rate(known.up) if known.up else None,
        down_bits_per_s=parse_rate(known.down) if known.down else None,
    )  # fmt: skip
    bench = LinkBench(
        shape=known.shape, cut=known.cut, rows=known.batch, tokens=known.tokens, steps=known.steps, link=link
    )
    answer(bench_link(config, bench), as_json=known.json)
    return 0

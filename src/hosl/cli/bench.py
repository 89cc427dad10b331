"""`hosl bench step|memory|plan|link|service|merging ...`: measured costs, as ratios within one run."""

import sys
from argparse import Namespace
from functools import partial
from typing import TYPE_CHECKING, Any

from hosl.cli.answers import Parser, answer, command_parser, need_torch, say
from hosl.config import Config, ModelConfig, WireConfig, ZOConfig
from hosl.core.methods import METHODS
from hosl.errors import ConfigError
from hosl.system.readable import aligned

if TYPE_CHECKING:
    from hosl.bench.random_halves import BenchSizes

_say = partial(say, by="bench")


def run(arguments: list[str]) -> int:
    """Measure and print; no file stays. Returns the exit status.

    Raises:
        ConfigError: if an argument is unknown or impossible.
        FailureError: if the measurement fails.
    """
    parser = command_parser(
        "bench",
        "Measure what a client costs, steps across an emulated link, or a server of many.",
        as_json=False,
    )
    benchmarks = {
        "step": _step, "memory": _memory, "plan": _plan, "link": _link, "service": _service, "merging": _merging,
    }  # fmt: skip
    parser.add_argument(
        "what", choices=benchmarks, help="each has settings of its own: hosl bench step --help"
    )
    options = parser.parse_args(arguments[:1])
    return benchmarks[options.what](arguments[1:])


def _step(arguments: list[str]) -> int:
    parser = _parser_with_sizes(
        "step", "A client's step, for every method, against plain forward passes of the same half."
    )
    _add_methods(parser)
    parser.add_argument("--repeats", type=int, default=5, help="of every step, after one that warms up")
    parser.add_argument("--memory-repeats", type=int, default=1, help="each in a process of its own; 0: none")
    options = parser.parse_args(arguments)
    need_torch()

    from hosl.bench.step import StepBench, bench_step
    from hosl.methods.variants import ON_ENGINE, variants_called

    if options.runtime == "onnx":
        from hosl.bench.edge_step import bench_edge_step

        chosen = variants_called(options.methods, ON_ENGINE)
        result = bench_edge_step(_sizes(options), options.directions, options.repeats, chosen, _say)
        return _show(result, options.json)
    bench = StepBench(_sizes(options), options.directions, options.repeats, options.memory_repeats)
    return _show(bench_step(bench, variants_called(options.methods), _say), options.json)


def _memory(arguments: list[str]) -> int:
    parser = _parser_with_sizes(
        "memory", "Peak memory of a client's step, for every method, against plain first-order."
    )
    _add_methods(parser)
    parser.add_argument(
        "--once",
        action="store_true",
        help="one step instead of two; process peaks then hold the profiler, too",
    )
    options = parser.parse_args(arguments)
    need_torch()

    from hosl.bench.memory import bench_memory
    from hosl.methods.variants import ON_ENGINE, variants_called

    if options.runtime == "onnx":
        from hosl.bench.edge_memory import bench_edge_memory

        chosen = variants_called(options.methods, ON_ENGINE)
        return _show(bench_edge_memory(_sizes(options), options.directions, chosen, _say), options.json)
    sizes, variants = _sizes(options), variants_called(options.methods)
    result = bench_memory(sizes, options.directions, variants, _say, steps=0 if options.once else 1)
    return _show(result, options.json)


def _plan(arguments: list[str]) -> int:
    parser = command_parser(
        "bench plan", "The planner's predictions against measurements, 28 configurations."
    )
    parser.add_argument(
        "--probe-seconds", type=float, default=3.0, help="of measuring this machine, for each"
    )
    options = parser.parse_args(arguments)

    from hosl.bench.plan_accuracy import bench_plan

    return _show(bench_plan(say=_say, probe_s=options.probe_seconds), options.json)


def _link(arguments: list[str]) -> int:
    parser = _parser_with_sizes("link", "Steps across an emulated link, by client, wire and server.")
    parser.add_argument("--steps", type=int, default=5, help="measured, after one that warms up")
    parser.add_argument("--method", default="hosl", choices=list(METHODS))
    parser.add_argument("--directions", type=int, default=2)
    parser.add_argument("--distribution", default="rademacher", choices=("gaussian", "rademacher"))
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--compression", default="none", choices=("none", "bf16", "int8"))
    parser.add_argument("--rtt", default="0ms", help="such as 50ms")
    parser.add_argument("--up", help="such as 10mbit; default: no limit")
    parser.add_argument("--down", help="such as 100mbit; default: no limit")
    options = parser.parse_args(arguments)

    from hosl.bench.link import bench_link
    from hosl.transport.link import LinkSpec, parse_duration, parse_rate

    config = Config(
        method=options.method, model=ModelConfig(cut=options.cut, dtype=options.dtype),
        zo=ZOConfig(directions=options.directions, distribution=options.distribution),
        wire=WireConfig(compression=options.compression),
    )  # fmt: skip
    link = LinkSpec(
        rtt_s=parse_duration(options.rtt), up_bits_per_s=parse_rate(options.up) if options.up else None,
        down_bits_per_s=parse_rate(options.down) if options.down else None,
    )  # fmt: skip
    answer(bench_link(config, _sizes(options), link, options.steps), as_json=options.json)
    return 0


def _service(arguments: list[str]) -> int:
    parser = command_parser("bench service", "A server of many simulated devices, on loopback.")
    parser.add_argument("--clients", type=int, default=1000, help="devices that take part in rounds")
    parser.add_argument("--seconds", type=float, default=10.0, help="of each part in which devices only ask")
    parser.add_argument("--rounds", type=int, default=5, help="of all devices")
    options = parser.parse_args(arguments)
    if not 2 <= options.clients <= 4096 or not options.seconds > 0 or options.rounds < 1:
        raise ConfigError(
            f"hosl bench service wants 2 to 4096 clients, more than 0 seconds and 1 round at least, got "
            f"--clients {options.clients} --seconds {options.seconds:g} --rounds {options.rounds}"
        )
    need_torch()

    from hosl.bench.service import bench_service

    answer(
        bench_service(options.clients, seconds=options.seconds, rounds=options.rounds, say=_say),
        as_json=options.json,
    )
    return 0


def _merging(arguments: list[str]) -> int:
    parser = command_parser(
        "bench merging", "Questions of several clients in one forward pass, against each alone; CPU seconds."
    )
    parser.add_argument("--shape", default="opt-125m", help="tiny, opt-125m, opt-1.3b")
    parser.add_argument("--cut", type=int, default=5)
    parser.add_argument("--crowds", help="CLIENTSxROWSxTOKENS, separated by commas; default: five of them")
    parser.add_argument(
        "--merge-tokens", type=int, default=1024, help="tokens of a pass, at most, as of hosl serve"
    )
    parser.add_argument("--repeats", type=int, default=3, help="after one that warms up")
    options = parser.parse_args(arguments)
    need_torch()

    from hosl.bench.merging import CROWDS, Crowd, bench_merging

    crowds = CROWDS
    if options.crowds:
        try:
            crowds = tuple(Crowd(*map(int, crowd.split("x"))) for crowd in options.crowds.split(","))
        except (ValueError, TypeError):
            raise ConfigError(
                f"--crowds {options.crowds}: wants CLIENTSxROWSxTOKENS, separated by commas, such as 8x1x16,8x4x64"
            ) from None
        if any(crowd.clients < 1 or crowd.rows < 1 or crowd.tokens < 8 for crowd in crowds):
            raise ConfigError(f"--crowds {options.crowds}: a crowd has a client, a row and 8 tokens at least")
    if options.repeats < 1:
        raise ConfigError(f"--repeats must be 1 at least, got {options.repeats}")
    result = bench_merging(
        options.shape, options.cut, crowds,
        merge_tokens=options.merge_tokens, repeats=options.repeats, say=_say,
    )  # fmt: skip
    return _show(result, options.json)


def _parser_with_sizes(benchmark: str, description: str) -> Parser:
    parser = command_parser(f"bench {benchmark}", description)
    parser.add_argument(
        "--shape", default="opt-125m", help="random weights in this shape: tiny, opt-125m, opt-1.3b"
    )
    parser.add_argument("--cut", type=int, default=5)
    parser.add_argument("--batch", type=int, default=16, help="rows")
    parser.add_argument("--tokens", type=int, default=64, help="per row")
    return parser


def _sizes(options: Namespace) -> "BenchSizes":
    from hosl.bench.random_halves import BenchSizes

    return BenchSizes(options.shape, options.cut, options.batch, options.tokens)


def _add_methods(parser: Parser) -> None:
    parser.add_argument("--directions", type=int, default=10, help="Q")
    parser.add_argument("--methods", help="rows of the table, separated by semicolons; default: all")
    parser.add_argument(
        "--runtime",
        choices=("torch", "onnx"),
        default="torch",
        help="onnx: of clients without torch, on an inference engine, with torch's figures beside them",
    )


def _show(result: dict[str, Any], as_json: bool) -> int:
    """Print one JSON object, or the settings in a line and a table below."""
    if as_json:
        answer(result, as_json=True)
        return 0
    rows: list[dict[str, Any]] = result.pop("methods")
    sys.stdout.write(", ".join(f"{key} {value}" for key, value in result.items()) + "\n")
    columns = list(dict.fromkeys(key for row in rows for key in row))
    table = [columns, *([_cell(row.get(key, "")) for key in columns] for row in rows)]
    sys.stdout.write("\n".join([*aligned(table, left=columns[0]), ""]))
    return 0


def _cell(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)

"""`hosl plan CONFIG.yaml | MODEL`: memory, bytes and hours of every cut and way to train, before a run."""

import sys
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from hosl.cli.answers import Parser, answer, check_default, command_parser, options_and_settings, say
from hosl.cli.train import overridden
from hosl.errors import ConfigError

_say = partial(say, by="plan")


def run(arguments: list[str]) -> int:
    """Print the table, or one JSON object; on request, write the recommended row as a config, and a picture.

    Returns the exit status.

    Raises:
        RequestError, ModelError: if an argument is impossible, or the model cannot be planned.
    """
    parser = _parser()
    options, overrides = options_and_settings(parser, arguments, "what")
    _check(options, parser)

    from hosl.planner.request import planned
    from hosl.report.planned import draw_plan

    result = planned(_planning(options, overrides), say=_say)
    if options.write:
        result.write(Path(options.write))
    if options.picture:
        draw_plan(result, Path(options.picture))
    aligned = _alignment(result.asked) if options.probe and options.what.endswith((".yaml", ".yml")) else []
    if options.json:
        facts = {"alignment": [asdict(row) for row in aligned]} if aligned else {}
        answer(result.facts() | facts, as_json=True)
        return 0
    sys.stdout.write(result.table(every_row=options.all))
    if aligned:
        from hosl.training.alignment import alignment_lines

        sys.stdout.write("\n" + "\n".join(alignment_lines(aligned, result.asked)) + "\n")
    return 0


def _check(options: Any, parser: Parser) -> None:
    """Refuse options that say nothing, or that would overwrite a file."""
    if options.ranks is None:
        check_default(
            parser, options, ("rank_memory", "between_ranks"), "is about the processes of --ranks N"
        )
    for name in ("batch", "tokens", "cores", "server_tflops"):
        value = getattr(options, name)
        if value is not None and not value > 0:
            raise ConfigError(f"hosl plan --{name.replace('_', '-')} must be above 0, got {value}")
    if options.write and Path(options.write).exists():
        raise ConfigError(f"--write {options.write}: there is such a file already; choose another name")


def _planning(options: Any, overrides: Any) -> Any:
    """The question that the options ask."""
    from hosl.methods.variants import variants_called
    from hosl.planner.request import Planning
    from hosl.system.byte_sizes import parse_bytes
    from hosl.transport.link import LinkSpec, parse_duration, parse_rate

    down = options.down or options.up
    link = LinkSpec(
        rtt_s=parse_duration(options.rtt), up_bits_per_s=parse_rate(options.up) if options.up else None,
        down_bits_per_s=parse_rate(down) if down else None,
    )  # fmt: skip
    return Planning(
        what=options.what, settings=lambda base: overridden(base, overrides), link=link, rows=options.batch,
        device_memory_bytes=float(parse_bytes(options.device_memory)) if options.device_memory else None,
        tokens=options.tokens, cuts=_cuts(options.cuts), cores=options.cores, probe=options.probe,
        server_tera_flops=options.server_tflops, on_engine=options.runtime == "onnx",
        ways=None if options.ways is None else tuple(way.name for way in variants_called(options.ways)),
        ranks=options.ranks, between_ranks_bits_per_s=parse_rate(options.between_ranks),
        rank_memory_bytes=float(parse_bytes(options.rank_memory)) if options.rank_memory else None,
    )  # fmt: skip


def _alignment(config: Any) -> list[Any]:
    """How far residual feedback is right on the config's first batch; of another method, nothing."""
    if not config.method_row.keeps_by_blocks:
        return []
    from hosl.training.alignment import first_batch_alignment

    _say("comparing residual feedback with backprop on the first batch")
    return first_batch_alignment(config)


def _parser() -> Parser:
    """The options of `hosl plan`."""
    parser = command_parser(
        "plan",
        "What every way to train would take on this device, without running or loading any. Settings of the config "
        "as --a.b value.",
    )
    parser.add_argument(
        "what", help="a run's YAML file, or a model: folder, config.json, hub name or known shape"
    )
    parser.add_argument(
        "--device-memory", metavar="2GiB", help="what the client process may take; default: no limit"
    )
    parser.add_argument("--up", help="the device's uplink, such as 10mbit; default: no limit")
    parser.add_argument("--down", help="its downlink, such as 100mbit; default: as --up")
    parser.add_argument("--rtt", default="0ms", help="round trip to the server, such as 50ms")
    parser.add_argument("--batch", type=int, help="rows of a batch; default: the config's")
    parser.add_argument(
        "--tokens", type=int, help="per row; default: the longest of the config's task, or 256"
    )
    parser.add_argument("--cuts", help="such as 1,3,5; default: up to twelve over the model")
    parser.add_argument("--ways", help="to compare, separated by semicolons; default: the usual ones")
    parser.add_argument("--cores", type=int, default=1, help="of the device, where it is not measured")
    parser.add_argument(
        "--probe",
        action="store_true",
        help="measure this machine for ten seconds instead of assuming; with a "
        "hosl-residual config also how far its updates are the true gradients, by backprop on one batch",
    )
    parser.add_argument("--server-tflops", type=float, default=10.0, help="what the server's products reach")
    parser.add_argument(
        "--ranks", type=int, help="processes of the server, whose layouts are compared (hosl serve --ranks)"
    )
    parser.add_argument("--rank-memory", metavar="80GiB", help="memory of each; default: no limit")
    parser.add_argument(
        "--between-ranks",
        metavar="RATE",
        default="2800gbit",
        help="speed at which a rank gets data; default: %(default)s",
    )
    parser.add_argument(
        "--runtime",
        choices=("torch", "onnx"),
        default="torch",
        help="what computes the device's half; onnx: an inference engine, whose memory is planned beside torch's",
    )
    parser.add_argument("--all", action="store_true", help="every row, also those of other cuts")
    parser.add_argument("--write", metavar="FILE", help="the recommended row as a config")
    parser.add_argument("--picture", metavar="FILE", help="memory against cut, as SVG")
    return parser


def _cuts(text: str | None) -> tuple[int, ...] | None:
    if text is None:
        return None
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise ConfigError(f"hosl plan --cuts wants numbers such as 1,3,5, got {text!r}") from None

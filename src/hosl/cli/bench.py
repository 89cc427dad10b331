"""`hosl bench link ...`: costs measured, as ratios within one run."""

from hosl.cli.answers import answer, verb_parser
from hosl.config import Config, ModelConfig, WireConfig, ZOConfig


def run(words: list[str]) -> int:
    """Measure and print; nothing is kept."""
    parser = verb_parser("bench", "Measure. link: steps across an emulated link, by client, wire and server.")
    parser.add_argument("what", choices=("link",))
    parser.add_argument(
        "--shape", default="opt-125m", help="random weights in this shape: tiny, opt-125m, opt-1.3b"
    )
    parser.add_argument("--cut", type=int, default=5)
    parser.add_argument("--batch", type=int, default=16, help="rows")
    parser.add_argument("--tokens", type=int, default=64, help="per row")
    parser.add_argument("--steps", type=int, default=5, help="measured, after one that warms up")
    parser.add_argument(
        "--method",
        default="hosl",
        choices=("hosl", "hosl-gradient", "fo-fo", "fo-recompute", "zo-zo", "frozen"),
    )
    parser.add_argument("--directions", type=int, default=2)
    parser.add_argument("--law", default="rademacher", choices=("gaussian", "rademacher"))
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--compression", default="none", choices=("none", "bf16", "int8"))
    parser.add_argument("--rtt", default="0ms", help="such as 50ms")
    parser.add_argument("--up", help="such as 10mbit; default: no limit")
    parser.add_argument("--down", help="such as 100mbit; default: no limit")
    known = parser.parse_args(words)

    from hosl.run.bench_link import LinkBench, bench_link
    from hosl.transport.link import LinkSpec, parse_duration, parse_rate

    config = Config(
        method=known.method, model=ModelConfig(cut=known.cut, dtype=known.dtype),
        zo=ZOConfig(directions=known.directions, law=known.law), wire=WireConfig(compression=known.compression),
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

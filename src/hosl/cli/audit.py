"""`hosl audit OUT/client --config task.yaml`: the fields that leave the device in this run, one by one."""

from pathlib import Path

from hosl.cli.answers import answer, command_parser, options_and_settings
from hosl.cli.train import overridden
from hosl.config import load_config
from hosl.errors import ModelError


def run(arguments: list[str]) -> int:
    """Print the table; nothing is sent. Returns the exit status.

    Raises:
        RequestError, ModelError: if the config or the half cannot be read, or do not fit together.
    """
    parser = command_parser(
        "audit", "Every field that can leave the device. Settings of the config as --a.b value."
    )
    parser.add_argument("half", help="OUT/client of `hosl split`")
    parser.add_argument("--config", required=True, help="a YAML file, as for `hosl join`")
    options, overrides = options_and_settings(parser, arguments, "half")
    config = overridden(load_config(options.config), overrides)

    from hosl.network.audit import audit
    from hosl.split.reading.half_json import half_facts
    from hosl.system.model_limits import model_limits
    from hosl.tasks import TextTokenizer, load_task
    from hosl.training.crossing import what_crosses

    folder = Path(options.half)
    half_facts(folder, "client")
    width = model_limits(folder).width
    if width is None:
        raise ModelError(f"{folder}/config.json names no hidden_size, n_embd or dim; split the model again")
    task = load_task(config.task, TextTokenizer.load(folder), seed=config.seed)
    rows = audit(config, task, width=width)
    crosses = what_crosses(config, task.head)
    lines = {"crosses": crosses} | {
        row["field"]: f"{row['sent']}; {row['shape']}; {row['bytes_per_step']:,} bytes a step; "
        f"a curious server learns {row['a curious server learns']}"
        for row in rows
    }
    answer({"crosses": crosses, "fields": rows} if options.json else lines, as_json=options.json)
    return 0

"""A model of this machine, ready for use: a run's newest weights, the model it began as, or a model's folder."""

from dataclasses import dataclass
from pathlib import Path

from hosl.config import Config
from hosl.errors import ConfigError, FolderError
from hosl.inference.halves import TwoHalves
from hosl.methods.torch_parties import DTYPES
from hosl.split import load_model, resolve_model_folder, split_model
from hosl.system.checkpoint import intact_steps
from hosl.system.run_folder import read_record
from hosl.tasks import own_chat_template
from hosl.training.local_session import load_halves, run_config


@dataclass(frozen=True)
class ReadyModel:
    """A model that can go on with texts."""

    model: TwoHalves
    folder: Path
    """The folder of its tokenizer, and of what it says about the end of a text."""
    says: str
    """What it is, for a person: such as `run runs/sft after step 60`."""
    chat_template: Path | None = None
    """The chat template that the run was tuned with, where it is not the model's own."""


def ready_model(path: str, *, best: bool = False) -> ReadyModel:
    """The model of a run's folder with its newest weights, or of a model's folder or name.

    Args:
        path: the folder, or a name of a model.
        best: whether a run's weights are those of its best evaluation on dev.

    Raises:
        FolderError: if the folder is a run of `hosl join` or a half: the other half is elsewhere.
        ConfigError: if the model classifies.
        ModelError, CheckpointError: if weights are missing or damaged.
    """
    folder = Path(path)
    if (folder / "half.json").is_file() or "run_id" in (read_record(folder) or {}):
        raise FolderError(
            f"{path} holds one half of a model, the other is with a server: say which by --to 'hosl://...'"
        )
    if not (folder / "config.yaml").is_file():
        if best:
            raise ConfigError(f"--best is for the folder of a run, {path} is none; leave it out")
        return _whole_model(path)
    config, client_half, server_half, labels = load_halves(folder, best=best)
    if labels is not None:
        raise ConfigError(f"{path} classifies into {len(labels)} classes: it has no text to say")
    step = next(intact_steps(folder / ("best" if best else "checkpoints"), lambda text: None), 0)
    return ReadyModel(
        TwoHalves(client_half, server_half),
        resolve_model_folder(config.model.name),
        f"{path} after step {step}",
        own_chat_template(config.task),
    )


def check_has_before(path: str) -> None:
    """Refuse what began as nothing else.

    Raises:
        ConfigError: if `path` is no run.
    """
    if not (Path(path) / "config.yaml").is_file():
        raise ConfigError(f"--before is for the folder of a run, {path} is a model: leave it out")


def model_before(path: str) -> ReadyModel:
    """The model that a run began as.

    Raises:
        ConfigError: if `path` is no run.
    """
    check_has_before(path)
    config = run_config(Path(path))
    return _whole_model(config.model.name, config)


def _whole_model(name: str, config: Config | None = None) -> ReadyModel:
    config = config or Config()
    loaded = load_model(
        name, head="causal", num_labels=None, seed=config.seed, dtype=DTYPES[config.model.dtype]
    )
    return ReadyModel(
        TwoHalves(*split_model(loaded.model, 0)),
        resolve_model_folder(name),
        name,
        own_chat_template(config.task),
    )

"""The two parties that score rows, ready on this machine: of a run with its newest weights, or of a model's folder."""

from pathlib import Path

import msgspec

from hosl.config import ClientConfig, Config, ServerConfig
from hosl.core.protocols import ServerSide
from hosl.errors import ConfigError, FolderError
from hosl.inference.new_rows import check_has_labels
from hosl.inference.predicting import Scorer, known_labels
from hosl.methods.torch_parties import DTYPES, make_client, make_server
from hosl.split import load_model, resolve_model_folder, split_model
from hosl.split.reading.tokenizer import transformers_tokenizer
from hosl.system.run_folder import read_record
from hosl.tasks import PromptsConfig, TextTokenizer
from hosl.training.local_session import load_scoring, run_config


def scorer_here(path: str, config: Config | None, *, best: bool = False) -> Scorer:
    """The scorer of a run's folder, or with a config of a model's folder or name.

    Args:
        path: the folder, or a name of a model.
        config: the settings of the task of a model; None: `path` is a run, which has its own.
        best: whether a run's weights are those of its best evaluation on dev.

    Raises:
        FolderError: if the folder holds one half of a model, or no run and there is no config.
        ConfigError: if a run's settings are given, or it is not known what the classes are.
    """
    folder = Path(path)
    if (folder / "half.json").is_file() or "run_id" in (read_record(folder) or {}):
        raise FolderError(
            f"{path} holds one half of a model, the other is with a server: say which by --to 'hosl://...'"
        )
    if (folder / "config.yaml").is_file():
        if config is not None:
            raise ConfigError(f"{path} is a run and has its own config; leave --config out")
        return _of_run(folder, best=best)
    if config is None:
        raise ConfigError(
            f"{path} is no run's folder (it has no config.yaml); of a model say by --config what its task is"
        )
    if best:
        raise ConfigError(f"--best is for the folder of a run, {path} is none; leave it out")
    return _of_model(path, config)


def _of_run(run: Path, *, best: bool) -> Scorer:
    check_has_labels(run_config(run).task)
    loaded = load_scoring(run, best=best)
    folder = resolve_model_folder(loaded.config.model.name)
    tokenizer = TextTokenizer.load(folder, transformers_tokenizer)
    says = f"{run} after step {loaded.step}"
    return Scorer(loaded.config, loaded.labels, tokenizer, loaded.client, loaded.server, says)


def _of_model(name: str, config: Config) -> Scorer:
    check_has_labels(config.task)
    folder = resolve_model_folder(name)
    tokenizer = TextTokenizer.load(folder, transformers_tokenizer)
    labels, classifies = known_labels(config, tokenizer, folder), not isinstance(config.task, PromptsConfig)
    loaded = load_model(
        name, head="classification" if classifies else "causal", num_labels=len(labels) if classifies else None,
        seed=config.seed, dtype=DTYPES[config.model.dtype],
    )  # fmt: skip
    if loaded.initialised:
        raise ConfigError(
            f"{name} has no weights of {loaded.initialised[0]}: its head was never trained for these "
            f"{len(labels)} classes; give the folder of a run, or a model that was exported from one"
        )
    plain = Config(
        method="frozen", model=msgspec.structs.replace(config.model, name=name),
        client=ClientConfig(device=config.client.device, micro_batch_size=config.client.micro_batch_size),
        server=ServerConfig(device=config.server.device),
    )  # fmt: skip
    client_half, server_half = split_model(loaded.model, config.model.cut)
    server = make_server(plain, server_half, ())
    assert isinstance(server, ServerSide), "a server with its head, since the labels are here"
    return Scorer(config, labels, tokenizer, make_client(plain, client_half), server, name)

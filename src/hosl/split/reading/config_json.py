"""A model's config.json, checked and read; no code of its folder is executed."""

import json
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import transformers

from hosl.errors import ConfigError, ModelError, SplitError
from hosl.split.families import FAMILIES, known_types
from hosl.system.readable import one_line

_MOST_BLOCKS = 1000
PLAIN_CALLS = {"return_dict": True, "chunk_size_feed_forward": 0}
"""Settings of how a model is called, not of what it computes: other values are set aside, and that is said."""
_BLOCK_COUNTS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")


def read_config(path: Path, name: str) -> Any:
    """The config of a model folder, or of a config.json; that of its text model, where it reads more than text.

    No code of the folder is executed.

    Raises:
        ModelError: if the folder has none, or the weights are quantised.
        ConfigError: if it is not JSON, has no model_type, or transformers refuses its values.
        SplitError: if transformers does not know the model type.
    """
    file = path / "config.json" if path.is_dir() else path
    if not file.is_file():
        if (path / "adapter_config.json").is_file():
            raise ModelError(
                f"model {name}: {path} holds a PEFT adapter only; merge it into its base model first"
            )
        raise ModelError(f"model {name}: {path} has no config.json, so it is no Hugging Face model folder")
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as cause:
        raise ConfigError(f"{file} cannot be read as JSON: {cause}") from cause
    if not isinstance(content, dict) or not isinstance(content.get("model_type"), str):
        raise ConfigError(
            f"{file} has no model_type, so nobody can tell what model it is of; known: {known_types()}"
        )
    _refuse_quantised(content, name)
    inner = content.get("text_config")
    for key, value in [*content.items(), *(inner.items() if isinstance(inner, dict) else ())]:
        if key in _BLOCK_COUNTS and not _counts_blocks(value):
            raise ConfigError(f"{file}: {key} must lie in 1..{_MOST_BLOCKS}, got {value!r}")
    if content["model_type"] not in transformers.CONFIG_MAPPING:
        raise SplitError(
            f"model {name}: model_type {content['model_type']!r} is unknown to transformers "
            f"{transformers.__version__}, and code of a model folder is never executed; hosl can cut {known_types()}"
        )
    try:
        config = transformers.AutoConfig.from_pretrained(path, trust_remote_code=False)
    except Exception as cause:  # a config's checks may raise any error about its values
        keys = ", ".join(f"{key} {json.dumps(content[key])[:60]}" for key in _refused(content))
        reason = one_line(f"{type(cause).__name__}: {cause}")
        raise ConfigError(
            f"{file} is no config that transformers takes{f', for its {keys}' if keys else ''}: {reason}"
        ) from cause
    text = config.get_text_config()
    if not isinstance(text, transformers.PreTrainedConfig):
        key = next((key for key in content if getattr(config, key, None) is text), "text_config")
        raise ConfigError(f"{file}: {key} is no setting of a {content['model_type']}; take it out")
    return _of_text(config, content)


def _refused(content: dict[str, Any]) -> list[str]:
    """The keys of a refused config without any one of which transformers would take it."""
    kind = transformers.CONFIG_MAPPING[content["model_type"]]

    def is_taken(settings: dict[str, Any]) -> bool:
        try:
            kind.from_dict(settings)
        except Exception:  # as in read_config
            return False
        return True

    with quiet_transformers():
        return [key for key in content if is_taken({k: v for k, v in content.items() if k != key})]


@contextmanager
def quiet_transformers() -> Any:
    """Silence transformers' progress bars and advice inside the context; its settings are restored at the end."""
    verbosity = transformers.logging.get_verbosity()
    bars = transformers.logging.is_progress_bar_enabled()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers.logging.set_verbosity(verbosity)
        if bars:
            transformers.logging.enable_progress_bar()


def _of_text(config: Any, content: dict[str, Any]) -> Any:
    """The config of the text model inside one that hosl has no row for; else the config itself."""
    text = config.get_text_config(decoder=True)
    known = {model_type for model_type, _ in FAMILIES}
    if text is config or config.model_type in known or text.model_type not in known:
        return config
    if "tie_word_embeddings" in content:
        text.tie_word_embeddings = content["tie_word_embeddings"]
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
        if content.get(key) is not None:
            setattr(text, key, content[key])
    return text


def _refuse_quantised(content: dict[str, Any], name: str) -> None:
    settings = content.get("quantization_config") or content.get("compression_config")
    if settings:
        method = settings.get("quant_method") if isinstance(settings, dict) else None
        raise ModelError(
            f"model {name} is quantised ({method or 'compressed-tensors'}), which cannot be trained or cut; give the "
            "original model, and client.dtype: int8 where the device needs it"
        )
    if content.get("transformers_weights"):
        raise ModelError(
            f"model {name}: transformers_weights in config.json is not read; name the file model.safetensors"
        )


def _counts_blocks(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= _MOST_BLOCKS

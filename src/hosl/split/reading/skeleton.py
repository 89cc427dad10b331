"""A model without memory, on the meta device: shapes, names and dtypes; and how it is given its tensors."""

from copy import deepcopy
from typing import Any

import torch
import transformers

from hosl.errors import ConfigError, SplitError
from hosl.split.families import Family, Head, known_types
from hosl.split.structure import family_for
from hosl.system.readable import one_line


def skeleton(config: Any, head: Head, dtype: torch.dtype = torch.float32) -> tuple[Any, Family]:
    """The model of a config on the meta device: shapes, names and dtypes, without memory. `config` is left as it is.

    Raises:
        SplitError: if hosl has no such family, or transformers no such model.
        ConfigError: if no model can be built from the config's values.
    """
    auto: Any = transformers.AutoModelForCausalLM
    if head == "classification":
        auto = transformers.AutoModelForSequenceClassification
    if type(config) not in auto._model_mapping:
        raise SplitError(
            f"transformers has no {head} model of model_type {config.model_type!r}; known: {known_types()}"
        )
    try:
        with torch.device("meta"):
            model = auto.from_config(deepcopy(config), dtype=dtype, trust_remote_code=False)
    except Exception as cause:  # a model's constructor may raise any error about its numbers
        reason = one_line(f"{type(cause).__name__}: {cause}")
        raise ConfigError(
            f"no model can be built from the config of this {config.model_type}: {reason}; it must have what "
            f"transformers' own config of {config.model_type!r} has"
        ) from cause
    for tensor, p in model.named_parameters():
        if p.numel() == 0:
            raise ConfigError(
                f"by the config of this {config.model_type}, {tensor} would have the shape {list(p.shape)}; every size "
                "must be 1 or more"
            )
    return model, family_for(model)


def fill_(model: Any, tensors: dict[str, torch.Tensor]) -> None:
    """Give a skeleton its tensors and buffers, in place; every parameter can be trained afterwards."""
    restore_buffers_(model)
    model.load_state_dict(tensors, assign=True)
    for p in model.parameters():
        p.requires_grad_(True)


def tied_names(model: Any, config: Any) -> dict[str, str]:
    """The tensors that head and embedding share: name in the head -> name of the embedding; empty when untied."""
    return dict(type(model)._tied_weights_keys or {}) if getattr(config, "tie_word_embeddings", False) else {}


def restore_buffers_(model: Any) -> None:
    """Compute the buffers that no file holds (rotary frequencies, position ids): the meta device has none."""
    for module in model.modules():
        lost = [key for key, b in module._buffers.items() if b is not None and b.is_meta]
        for key in lost:
            b = module._buffers[key]
            module._buffers[key] = torch.zeros(b.shape, dtype=b.dtype)
        if lost:
            # transformers' own initialisation; parameters are still meta, so only buffers are filled
            model._init_weights(module)

"""The weights of a model: where each tensor is stored, under which name, or how it is drawn.

Every tensor of the model must be there, with its shape and as floats; only the head of a new task may be missing:
it is drawn from the seed.
"""

import math
from collections.abc import Callable, Collection, Iterator
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import torch
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    apply_converters,
    apply_renamings,
    dot_natural_key,
)

from hosl.errors import ConfigError, ModelError
from hosl.split.families import Family
from hosl.split.reading.seeded import seeded_generator
from hosl.split.reading.skeleton import tied_names
from hosl.split.reading.tensors import DTYPES, Source
from hosl.split.reading.weight_files import weights_files
from hosl.system.readable import one_line

_FLOATS = ("F64", "F32", "F16", "BF16")
_WRAPPERS = ("module.", "_orig_mod.", "base_model.model.")
"""What DataParallel, torch.compile and PEFT put before a tensor's name when their wrapper is saved."""
_BUFFERS = (
    "position_ids",
    "inv_freq",
    ".attn.bias",
    ".attn.masked_bias",
    ".attention.bias",
    ".attention.masked_bias",
)
"""The ends of the names of buffers that older versions of transformers stored and nobody reads."""
_TEXT_HALVES = ("language_model.", "text_model.")
"""What stands in the names of a text model's tensors that was saved inside a model for pictures or sound too."""


@dataclass(frozen=True, slots=True)
class Weights:
    """The weights of a model, by their names in it: where each is stored, or how it is drawn."""

    sources: dict[str, Source]
    new: tuple[str, ...]
    """The weights of a new head: the checkpoint does not hold them."""
    notes: tuple[str, ...]
    """What was passed over, replaced or drawn: lines for people."""
    untied: bool
    """Whether the config ties head and embedding, but the checkpoint has two different ones, which are both read."""


def find_weights(folder: Path, name: str, model: Any, family: Family, seed: int) -> Weights:
    """The place of every tensor of `model`, a skeleton of the whole; new heads are drawn from `seed`.

    Raises:
        ModelError: if any but a new head's is missing, has another shape, or is not stored as floats.
    """
    expected, checkpoint = model.state_dict(), _stored(folder, name, model)
    stored, unread = checkpoint.sources, checkpoint.unread
    ties = tied_names(model, model.config)
    sources = {**stored}
    for tied, source in ties.items():
        for there, absent in ((tied, source), (source, tied)):
            if there in stored and absent not in stored:
                sources[absent] = replace(stored[there], name=absent)
    untied = any(
        tied in stored and source in stored and not torch.equal(stored[tied].read(), stored[source].read())
        for tied, source in ties.items()
    )
    new = [key for key, tensor in expected.items() if _is_new(key, tensor, sources, model, family)]
    _refuse_lacking(name, model, sources, unread, new)
    notes = _passed_over(folder)
    if untied:
        notes.append(
            "config.json ties head and embedding, but the checkpoint has two different ones: both are read"
        )
    if checkpoint.inside and unread:
        others = sorted({key.removeprefix("model.").partition(".")[0] for key in unread})
        notes.append(
            f"only the text model of this checkpoint is read; left out: {', '.join(others)} ({len(unread)} tensors)"
        )
    elif unread:
        notes.append(
            f"{len(unread)} stored tensors are no part of {type(model).__name__} and not read: {_some(unread)}"
        )
    if new:
        replaced = [f"{key} {list(sources[key].shape)}" for key in new if key in sources]
        instead = f", in place of the stored {_some(replaced)}" if replaced else ""
        notes.append(f"drawn from the seed: {_some(new)}{instead}")
    for key in new:
        sources[key] = _drawn(key, tuple(expected[key].shape), model.config, seed)
    return Weights(sources, tuple(sorted(new)), tuple(notes), untied)


@dataclass(frozen=True, slots=True)
class _Stored:
    """The tensors of a checkpoint."""

    sources: dict[str, Source]
    """The stored tensors by their names in the model of today."""
    unread: list[str]
    """The names of those that it does not have."""
    inside: bool
    """Whether the model is the text half of another, whose tensors are among the unread."""


def _stored(folder: Path, name: str, model: Any) -> _Stored:
    conversions = get_model_conversion_mapping(model)
    renamings = [c for c in conversions if isinstance(c, WeightRenaming)]
    converters = [c for c in conversions if isinstance(c, WeightConverter)]
    expected, found, unread, inside = model.state_dict().keys(), {}, [], False
    parts: dict[str, dict[str, list[Source]]] = {}
    for key, dtype, shape, file in sorted(_slices(folder, name), key=lambda s: dot_natural_key(s[0])):
        source = Source(key, dtype, shape, _reader(file, key))
        today = _name_today(apply_renamings(key, renamings), expected, model)
        whole, pattern = apply_converters(today, converters)
        whole = _name_today(whole, expected, model)
        if pattern is not None and whole in expected and today not in expected:
            parts.setdefault(whole, {}).setdefault(pattern, []).append(source)
        elif today in found:
            raise ModelError(
                f"model {name}: {today} is stored twice, under a former name too; save the model anew"
            )
        elif today in expected:
            found[today] = replace(source, name=today)
            inside |= any(half in key for half in _TEXT_HALVES)
        elif not today.endswith(_BUFFERS):
            unread.append(today)
    for whole, by_pattern in parts.items():
        for source in _put_together(whole, by_pattern, converters, model, name):
            if source.name in found:
                raise ModelError(
                    f"model {name}: {source.name} is stored twice, in parts too; save the model anew"
                )
            found[source.name] = source
    return _Stored(found, unread, inside)


def _slices(folder: Path, name: str) -> Iterator[tuple[str, str, tuple[int, ...], Path]]:
    """Name, dtype, shape and file of every stored tensor."""
    for file, keys in weights_files(folder, name).items():
        try:
            with safetensors.safe_open(file, "pt") as content:
                slices = {
                    key: content.get_slice(key) for key in list(content.keys()) if keys is None or key in keys
                }
                facts = [
                    (key, part.get_dtype(), tuple(part.get_shape()), file) for key, part in slices.items()
                ]
        except safetensors.SafetensorError as cause:
            raise ModelError(
                f"model {name}: {file.name} is cut short or damaged ({cause}); an interrupted download? fetch it again"
            ) from cause
        yield from facts


def _name_today(key: str, expected: Collection[str], model: Any) -> str:
    """The name in `model` of a stored tensor: saved with it, without its head, or inside a model for more than text."""
    prefix = f"{model.base_model_prefix}."
    plain = [key, *(key.replace(half, "", 1) for half in _TEXT_HALVES if half in key)]
    return next((n for p in plain for n in (p, prefix + p) if n in expected), key)


def _put_together(
    whole: str, parts: dict[str, list[Source]], converters: list[WeightConverter], model: Any, name: str
) -> list[Source]:
    """The tensors that transformers makes of stored ones, such as all experts' weights of a layer in one."""
    (converter,) = (c for c in converters if set(parts) <= set(c.source_patterns))

    def converted(read: Callable[[Source], Any]) -> dict[str, torch.Tensor]:
        one = deepcopy(converter)
        for pattern, sources in parts.items():
            for source in sources:
                one.add_tensor(whole, source.name, pattern, read(source))
        made = one.convert(whole, model=model, config=model.config)
        return {key: value[0] if isinstance(value, list) else value for key, value in made.items()}

    first = next(iter(parts.values()))[0]
    try:
        shapes = converted(lambda s: torch.empty(s.shape, dtype=DTYPES[s.dtype], device="meta"))
    except Exception as cause:  # of torch, about parts that do not fit each other
        raise ModelError(
            f"model {name}: the parts of {whole} ({first.name}, ...) do not fit each other: {one_line(cause)}; "
            "fetch the checkpoint again"
        ) from cause
    return [
        Source(key, first.dtype, tuple(shape.shape), partial(_made, converted, key))
        for key, shape in shapes.items()
    ]


def _made(converted: Any, key: str) -> torch.Tensor:
    return converted(lambda source: source.read())[key]


def _reader(file: Path, key: str) -> Any:
    def read() -> torch.Tensor:
        with safetensors.safe_open(file, "pt") as content:
            return content.get_tensor(key)

    return read


def _is_new(key: str, tensor: torch.Tensor, stored: dict[str, Source], model: Any, family: Family) -> bool:
    """Whether a tensor is of a new task's head: nothing of a head is stored, or one for another number of labels."""
    heads = [
        m
        for m in family.server_only
        if not (family.is_decoder and m.startswith(model.base_model_prefix + "."))
    ]
    if family.head != "classification" or not key.startswith(tuple(f"{m}." for m in heads)):
        return False
    if key not in stored:
        return not any(k.startswith(f"{list(family.server_only)[-1]}.") for k in stored)
    expected, found = tuple(tensor.shape), stored[key].shape
    return found != expected and found[1:] == expected[1:] and expected[0] == model.config.num_labels


def _refuse_lacking(
    name: str, model: Any, sources: dict[str, Source], unread: list[str], new: Collection[str]
) -> None:
    """Refuse a checkpoint that lacks anything but a new head, or has it otherwise than the config says."""
    expected, kind = model.state_dict(), type(model).__name__
    for key, source in sources.items():
        if source.dtype not in _FLOATS:
            raise ModelError(
                f"model {name}: {key} is stored as {source.dtype}, so it is quantised; give the original model"
            )
        if key not in new and source.shape != tuple(expected[key].shape):
            raise ModelError(
                f"model {name}: {key} has another shape in the weights, {list(source.shape)}, than by config.json, "
                f"{list(expected[key].shape)}"
            )
    lost = [key for key in expected if key not in sources and key not in new]
    if not lost:
        return
    wrapper = next((w for w in _WRAPPERS if any(w in key for key in unread)), None)
    instead = f"; it holds {_some(unread)} instead" if unread else ""
    if wrapper:
        instead = f"; its names hold {wrapper!r}: a wrapper was saved, save the model inside it"
    raise ModelError(
        f"model {name}: the checkpoint lacks {lost[0]} and {len(lost) - 1} more tensors of its {kind}{instead}; "
        "only a new task's head is drawn at random"
    )


def _drawn(key: str, shape: tuple[int, ...], config: Any, seed: int) -> Source:
    """A new weight: normal, of standard deviation `initializer_range`; biases are 0, norms 1. float32."""
    std = getattr(config, "initializer_range", 0.02)
    if not isinstance(std, int | float) or not 0 <= std < math.inf:
        raise ConfigError(f"config.json: initializer_range must be a number >= 0, got {std!r}")

    def read() -> torch.Tensor:
        if key.endswith("bias"):
            return torch.zeros(shape)
        if len(shape) == 1:
            return torch.ones(shape)
        return torch.from_numpy(seeded_generator(seed, key).normal(0.0, std, shape).astype(np.float32))

    return Source(key, "F32", shape, read)


def _passed_over(folder: Path) -> list[str]:
    adapters = [
        file for file in ("adapter_model.safetensors", "adapter_model.bin") if (folder / file).is_file()
    ]
    return [f"{file} beside the model is not applied; merge it first if it is wanted" for file in adapters]


def _some(names: Collection[str]) -> str:
    shown = ", ".join(list(names)[:2])
    return shown if len(names) <= 2 else f"{shown} and {len(names) - 2} more"

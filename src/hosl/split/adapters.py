"""The trained weights of a half: all, the blocks, none, or low-rank adapters by peft's conventions."""

import math
import re
from typing import Any, Literal

import torch
from transformers.pytorch_utils import Conv1D

from hosl.errors import ConfigError, SplitError
from hosl.split.halves import Half
from hosl.split.reading.seeded import seeded_generator
from hosl.split.specs import LoraSpec

ADAPTER = "default"
"""The adapter's name inside peft's modules; peft's own default."""


def set_trainable(
    half: Half,
    which: Literal["all", "blocks", "last-block", "output-projections", "none"],
    *,
    blocks: int = 1,
) -> None:
    """Choose a half's trained weights; `blocks` leaves embeddings (and their norms) and the head frozen.

    What both halves have (`Half.shared`) stays frozen always: two copies of one tensor could not be put together again.

    `last-block` and `output-projections` are for a client half: block cut - 1, or of the last `blocks` blocks the
    layers that write to the residual stream (`ClientHalf.output_projections`); nothing where there is no block.
    """
    if which == "output-projections":
        set_trainable(half, "none")
        for block in list(half.model.get_submodule(half.blocks_name))[-blocks:]:
            for name in half.output_projections:
                for layer in (name, *half.norms_above.get(name, ())):
                    block.get_submodule(layer).requires_grad_(True)
        return
    prefix = f"{half.blocks_name}." + (f"{half.cut - 1}." if which == "last-block" else "")
    shared = tuple(f"{name}." for name in half.shared)
    for name, p in half.named_parameters():
        chosen = which == "all" or (which != "none" and name.startswith(prefix))
        p.requires_grad_(chosen and not name.startswith(shared))


def add_lora(
    half: Half, spec: LoraSpec, *, seed: int, dtype: torch.dtype | None = None, blocks: int | None = None
) -> None:
    """Put adapters into a half's blocks, in place, and train only them. They start like peft's, from `seed`.

    A half without blocks (cut 0 or n) gets none. `dtype` is that of the adapters; None: the weights' own, as in peft.
    `blocks`: into so many last blocks of a client half only, as with peft's layers_to_transform; None: into all.

    Raises:
        ConfigError: if peft is not installed, or no module has one of the targets' names.
    """
    set_trainable(half, "none")
    if not any(name.startswith(f"{half.blocks_name}.") for name, _ in half.named_parameters()):
        return
    peft = _peft()
    targets = _target_modules(half, spec, blocks)
    prefix = f"{half.blocks_name}."
    names_in_blocks = sorted(name.removeprefix(prefix) for name in targets)
    config = peft.LoraConfig(
        r=spec.r, lora_alpha=spec.alpha, target_modules=names_in_blocks, lora_dropout=0.0,
        fan_in_fan_out=isinstance(half.model.get_submodule(min(targets)), Conv1D),
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):  # peft draws A from the global state; drawn again below
        # not into the whole model: in a tied model peft looks for the embeddings, and a half may have none
        blocks = half.model.get_submodule(half.blocks_name)
        try:
            peft.inject_adapter_in_model(config, blocks, adapter_name=ADAPTER)
        except ValueError as cause:
            raise ConfigError(f"lora.target_modules {sorted(spec.target_modules or ())}: {cause}") from cause
    with torch.no_grad():
        for name, p in half.named_parameters():
            if ".lora_" in name and dtype is not None:
                p.data = p.data.to(dtype)
            if ".lora_A." in name:
                bound = 1 / math.sqrt(p.shape[1])  # Kaiming uniform with a = sqrt(5), as in peft
                p.copy_(torch.from_numpy(seeded_generator(seed, name).uniform(-bound, bound, p.shape)))
            elif ".lora_B." in name:
                p.zero_()
            p.requires_grad_(".lora_" in name)
    half.eval()


def lora_layers(half: Half) -> dict[str, Any]:
    """The peft layers of a half, by the name of the module that each wraps; empty without adapters."""
    return {
        name: m for name, m in half.model.named_modules() if hasattr(m, "lora_A") and hasattr(m, "base_layer")
    }


def _target_modules(half: Half, spec: LoraSpec, blocks: int | None) -> set[str]:
    """The full names of the modules to adapt: those in the (last) blocks whose last part is one of the targets."""
    targets = set(spec.target_modules or default_targets(half))
    first = 0 if blocks is None else half.cut - blocks
    in_block = re.compile(re.escape(half.blocks_name) + r"\.(\d+)\.")
    modules = {
        name
        for name, module in half.model.named_modules()
        if (block := in_block.match(name)) is not None
        and int(block[1]) >= first
        and name.rpartition(".")[2] in targets
        and hasattr(module, "weight")
    }
    if not modules:
        leaves = {
            name.rpartition(".")[2]
            for name, module in half.model.named_modules()
            if in_block.match(name) and getattr(getattr(module, "weight", None), "dim", lambda: 0)() == 2
        }
        raise ConfigError(
            f"lora.target_modules {sorted(targets)}: no such module in the blocks of a {half.family}; "
            f"there are {', '.join(sorted(leaves))}"
        )
    return modules


def default_targets(half: Half) -> list[str]:
    """The last parts of the names of layers that get adapters where none are named.

    They are peft's choice for the architecture; where it has none, as it chooses elsewhere: queries and values.

    Raises:
        ConfigError: if neither knows the architecture.
    """
    from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as MAPPING

    if half.family in MAPPING:
        return list(MAPPING[half.family])
    try:
        query = half.query.rpartition(".")[2]
    except SplitError:
        raise ConfigError(
            f"lora.target_modules: neither peft nor hosl has a default for {half.family}; name the modules to adapt"
        ) from None
    return [query, query.replace("query", "value", 1), re.sub("^q_", "v_", query)]


def _peft() -> Any:
    try:
        import peft
    except ImportError:
        raise ConfigError("LoRA needs peft, which is not installed; `pip install 'hosl[lora]'`") from None
    return peft

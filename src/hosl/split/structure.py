"""The family of a model: its row, or, where there is none, what a forward pass over a small model shows.

An architecture without a row is taken if it has one list of blocks, called one after the other, and everything else
that has weights is called either before them or after them; and if its halves then equal the whole, bit for bit, on
random input. The model looked at is a small one of the same class and kind of config, so that this takes a second.
"""

import json
from copy import deepcopy
from dataclasses import dataclass
from functools import lru_cache
from inspect import signature
from typing import Any

import torch
from torch import nn

from hosl.errors import SplitError
from hosl.split.families import Family, StandIn, family_of, head_of, row_of
from hosl.system.readable import one_line

_SMALL = {
    "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "vocab_size": 97, "head_dim": 8,
    "max_position_embeddings": 64, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16,
}  # fmt: skip
_NUMBERS = ("multiplier", "scale", "dropout")
"""What the names of numbers hold that a model applies to its embeddings."""
_ROWS, _TOKENS = 3, 9
_LEAST_BLOCKS = 3
_MOST_WEIGHTS = 200_000_000
"""The largest model that is built for a look: 800 MB in float32."""


def family_for(model: Any) -> Family:
    """The row of a Hugging Face model, or what its structure shows. `model` may be on the meta device.

    Raises:
        SplitError: if it has no row and cannot be cut by its structure, saying why.
    """
    row = row_of(model.config, type(model).__name__)
    if row is not None:
        return row
    family, reason = _by_structure(
        type(model), json.dumps(model.config.to_dict(), sort_keys=True, default=str)
    )
    if family is not None:
        return family
    try:
        return family_of(model.config, type(model).__name__)
    except SplitError as refusal:
        raise SplitError(f"{refusal}. By its structure it cannot be cut either: {reason}") from None


def submodule(model: Any, name: str) -> Any:
    """The module, or the multiplier, of this dotted name; None: this config has none."""
    parent, _, child = name.rpartition(".")
    return getattr(model.get_submodule(parent), child, None)


@lru_cache(maxsize=32)
def _by_structure(model_class: Any, config: str) -> tuple[Family | None, str]:
    """The family that a small model's forward pass shows, and that its halves confirm; or None and the reason."""
    if head_of(model_class.__name__) is None:
        return None, "its head is neither a language model's nor a classifier's"
    try:
        small = _small_model(model_class, model_class.config_class.from_dict(json.loads(config)))
        family = _seen(small)
        _check_halves(small, family)
    except _NotCut as cause:
        return None, str(cause)
    except Exception as cause:  # a model's forward may raise any error about what is missing in a half
        return None, one_line(f"its halves do not run: {type(cause).__name__}: {cause}")
    return family, ""


class _NotCut(Exception):  # noqa: N818  (always caught here)
    """The reason why a structure cannot be cut."""


def _small_model(model_class: Any, config: Any) -> Any:
    """A model of the class with few blocks and random weights: narrow if that works, else as wide as it is."""
    reason = ""
    for sizes in (_SMALL, {}):
        try:
            small = _small_config(config, sizes)
            with torch.device("meta"):
                count = sum(p.numel() for p in model_class(deepcopy(small)).parameters())
            if count > _MOST_WEIGHTS:
                raise _NotCut(
                    f"{_LEAST_BLOCKS} of its blocks have {count:,} weights, more than {_MOST_WEIGHTS:,}"
                )
            with torch.random.fork_rng(devices=[]), torch.no_grad():
                model = model_class(small).eval()
                generator = torch.Generator().manual_seed(0)
                for p in model.parameters():  # norms and biases too, so that none is trivial
                    p.copy_(torch.randn(p.shape, generator=generator) * 0.1 + (1.0 if p.dim() == 1 else 0.0))
                _whole(model, *_input(model, "none"))
            return model
        except Exception as cause:  # whatever the constructor finds wrong with these sizes
            reason = (
                str(cause) if isinstance(cause, _NotCut) else one_line(f"{type(cause).__name__}: {cause}")
            )
    raise _NotCut(f"no small model of it can be built ({reason})")


def with_blocks(config: Any, count: int) -> Any:
    """A copy of a config with its first `count` blocks only; settings with an entry for every block are cut too."""
    fewer = deepcopy(config)
    text = fewer.get_text_config()
    before = text.num_hidden_layers
    for name, value in list(vars(text).items()):
        if isinstance(value, list) and len(value) == before:
            setattr(text, name, value[:count])
    text.num_hidden_layers = count
    return fewer


def _small_config(config: Any, sizes: dict[str, int]) -> Any:
    """A copy of a config with few blocks, of every kind that it names, and with these sizes where it has them."""
    text = config.get_text_config()
    kinds = getattr(text, "layer_types", None) or [None] * text.num_hidden_layers
    first_of_each = [kinds.index(kind) for kind in set(kinds)]
    small = with_blocks(config, min(text.num_hidden_layers, max(_LEAST_BLOCKS, 1 + max(first_of_each))))
    text = small.get_text_config()
    for name, size in sizes.items():
        if isinstance(getattr(text, name, None), int) and not isinstance(
            getattr(type(text), name, 0), property
        ):
            setattr(text, name, size)
    if sizes and isinstance(getattr(text, "num_key_value_heads", None), int):
        grouped = text.num_key_value_heads < config.get_text_config().num_attention_heads
        text.num_key_value_heads = sizes["num_attention_heads"] // (2 if grouped else 1)
    for name in ("bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id"):
        if getattr(text, name, None) is not None:
            setattr(text, name, 1)
    text.pad_token_id = 1  # a decoder's classifier wants one
    return small


def _input(model: Any, padded: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Random ids and a mask, [rows, tokens], with that side padded: `none`, `left` or `right`."""
    vocabulary = min(model.config.get_text_config().vocab_size, 97)
    ids = torch.randint(2, vocabulary, (_ROWS, _TOKENS), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    for row in range(1, _ROWS):
        if padded == "left":
            mask[row, : 2 * row] = 0
        elif padded == "right":
            mask[row, -2 * row :] = 0
    return torch.where(mask == 1, ids, 1), mask


def _whole(model: Any, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    options = {"use_cache": False} if _is_decoder(model) else {}
    return model(input_ids=ids, attention_mask=mask, **options).logits


def _is_decoder(model: Any) -> bool:
    """Whether a language model, or a classifier made of one: transformers calls the head of those `score`."""
    return head_of(type(model).__name__) == "causal" or hasattr(model, "score")


@dataclass(frozen=True, slots=True)
class _Call:
    """A call of a module in a forward pass."""

    name: str
    module: nn.Module
    output: Any


def _seen(model: Any) -> Family:
    """The family that a forward pass over `model` shows.

    Raises:
        _NotCut: saying what stands in the way.
    """
    blocks_name, blocks = _blocks(model)
    head = head_of(type(model).__name__)
    assert head is not None, "looked at before"
    wanted = {"inputs_embeds"} | ({"logits_to_keep"} if head == "causal" else set())
    if lacking := wanted - signature(model.forward).parameters.keys():
        raise _NotCut(f"its forward has no argument {', '.join(sorted(lacking))}")
    above = [name for name, _ in model.named_modules() if name == "" or blocks_name.startswith(f"{name}.")]
    for name in above:
        if own := list(model.get_submodule(name)._parameters):
            raise _NotCut(f"{name or type(model).__name__} itself has a weight, {own[0]}")
    calls = _calls(model, blocks_name, above)
    of_blocks = [i for i, call in enumerate(calls) if call.name.startswith(f"{blocks_name}.")]
    if [calls[i].module for i in of_blocks] != blocks:
        raise _NotCut(f"the blocks {blocks_name} are not called once each, in their order")
    first, last = of_blocks[0], of_blocks[-1]
    before, after = calls[:first], calls[last + 1 :]
    if between := [c for c in calls[first:last] if c.module not in blocks and _has_weights(c.module)]:
        raise _NotCut(f"{between[0].name} is called between blocks")
    _refuse_unplaced(model, blocks_name, above, before, after)
    numbers: dict[str, StandIn] = {
        f"{name}.{key}": "zero" if "drop" in key else "one"
        for name in above
        if name
        for key, value in vars(model.get_submodule(name)).items()
        if "embed" in key and any(part in key for part in _NUMBERS) and isinstance(value, float)
    }
    return Family(
        model.config.model_type,
        head,
        blocks=blocks_name,
        client_only={**{c.name: _kind_before(c, model) for c in before if _is_on_the_way(c)}, **numbers},
        server_only={c.name: "identity" for c in after},
        blocks_return_tuples=isinstance(calls[first].output, tuple),
        needs_a_block=True,
        pools_last_token=head == "classification" and _is_decoder(model),
        guessed=True,
    )


def _blocks(model: Any) -> tuple[str, list[nn.Module]]:
    count = model.config.get_text_config().num_hidden_layers
    lists = {
        name: list(module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == count
    }
    outer = {n: m for n, m in lists.items() if not any(n.startswith(f"{other}.") for other in lists)}
    if len(outer) != 1:
        found = ", ".join(outer) if outer else "none"
        raise _NotCut(f"it must have one list of {count} blocks, found {found}")
    return next(iter(outer.items()))


def _calls(model: Any, blocks_name: str, above: list[str]) -> list[_Call]:
    """The calls of the blocks, and of the outermost modules beside them, in the order in which they end."""
    chosen: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        inside = any(name.startswith(f"{other}.") for other in chosen)
        if name not in above and name != blocks_name and not inside:
            chosen[name] = module
    calls: list[_Call] = []

    def note(name: str) -> Any:
        return lambda module, args, output: calls.append(_Call(name, module, output))

    hooks = [module.register_forward_hook(note(name)) for name, module in chosen.items()]
    try:
        with torch.no_grad():
            _whole(model, *_input(model, "none"))
    finally:
        for hook in hooks:
            hook.remove()
    return calls


def _refuse_unplaced(
    model: Any, blocks_name: str, above: list[str], before: list[_Call], after: list[_Call]
) -> None:
    """Refuse weights that are read on neither side of the blocks, or on both."""
    names = [c.name for c in (*before, *after) if _has_weights(c.module)]
    for name in names:
        if names.count(name) > 1:
            raise _NotCut(f"{name} is called more than once")
    for parameter in dict(model.named_parameters(remove_duplicate=False)):
        if not parameter.startswith((f"{blocks_name}.", *(f"{name}." for name in names))):
            raise _NotCut(f"{parameter} is read by no call of a module beside the blocks")


def _has_weights(module: nn.Module) -> bool:
    return next(module.parameters(), None) is not None


def _is_on_the_way(call: _Call) -> bool:
    """Whether a module before the blocks makes the hidden state, unlike rotary angles or masks."""
    like_hidden = isinstance(call.output, torch.Tensor) and call.output.shape[:2] == (_ROWS, _TOKENS)
    return _has_weights(call.module) or (like_hidden and call.output.dim() == 3)


def _kind_before(call: _Call, model: Any) -> StandIn:
    """The kind of stand-in for a module before the blocks."""
    embedding = model.get_input_embeddings()
    if call.module is embedding:
        return "none"
    if any(module is embedding for module in call.module.modules()):
        return "inputs_embeds"
    return "zeros" if isinstance(call.module, nn.Embedding) else "identity"


def _check_halves(model: Any, family: Family) -> None:
    """Refuse a family whose halves are not the whole, bit for bit: at several cuts, without padding and on either side.

    Raises:
        _NotCut: naming the first cut and padding at which they differ.
    """
    from hosl.split.halves import halves_of  # halves ask here for their family

    n = len(model.get_submodule(family.blocks))
    for padded in ("none", "left", "right"):
        ids, mask = _input(model, padded)
        with torch.no_grad():
            whole = _whole(model, ids, mask)
            for cut in sorted({0, 1, n // 2, n}):
                client, server = halves_of(model, family, cut)
                if not torch.equal(server(client(ids, mask), mask), whole):
                    side = "no padding" if padded == "none" else f"padding at the {padded}"
                    raise _NotCut(f"its halves are not the whole at cut {cut} with {side}")


def guess_note(family: Family) -> str:
    """A line for people on what was guessed of a family without a row."""
    return (
        f"{family.model_type} has no row in hosl/split/families; cut by its structure: blocks {family.blocks}, "
        f"before them {', '.join(family.client_only)}, after them {', '.join(family.server_only)}; the halves of a "
        "small model of its kind equal the whole bit for bit on random input"
    )

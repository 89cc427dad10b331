"""The arguments of a command as JSON and tensors, and back. Nothing is pickled: a rank runs no code that it is sent."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from hosl.core.targets import ClassTargets, OptionTargets
from hosl.parties.servers.synchronous import Contributed


def packed(value: Any, tensors: list[torch.Tensor]) -> Any:
    """`value` as plain data for JSON; its tensors are appended to `tensors`, and stand for themselves by number.

    Args:
        value: None, a number, a text, a tensor, targets, a part of a round, or lists and dicts of such.
        tensors: is made longer.
    """
    match value:
        case None | bool() | int() | float() | str():
            return value
        case torch.Tensor():
            tensors.append(value.detach().cpu().contiguous())
            return {"tensor": len(tensors) - 1}
        case ClassTargets():
            return {"classes": [_array(a, tensors) for a in (value.mask, value.labels)]}
        case OptionTargets():
            arrays = [_array(a, tensors) for a in (value.mask, value.positions, value.tokens)]
            return {"options": arrays, "mean_over": value.mean_over}
        case Contributed():
            parts = value.activations, value.targets, value.weight, value.want_gradient
            return {"contributed": [packed(part, tensors) for part in parts]}
        case dict():
            return {"dict": {key: packed(of_key, tensors) for key, of_key in value.items()}}
        case list() | tuple():
            return [packed(element, tensors) for element in value]
        case _:
            raise AssertionError(f"no command carries a {type(value).__name__}")


def unpacked(data: Any, tensors: Sequence[torch.Tensor]) -> Any:
    """The value of `packed`; tuples come back as lists."""
    match data:
        case {"tensor": int(index)}:
            return tensors[index]
        case {"classes": [mask, labels]}:
            return ClassTargets(tensors[mask].numpy(), tensors[labels].numpy())
        case {"options": [mask, positions, tokens], "mean_over": mean_over}:
            return OptionTargets(
                tensors[mask].numpy(), tensors[positions].numpy(), tensors[tokens].numpy(), mean_over
            )
        case {"contributed": list(parts)}:
            return Contributed(*(unpacked(part, tensors) for part in parts))
        case {"dict": dict(items)}:
            return {key: unpacked(value, tensors) for key, value in items.items()}
        case list():
            return [unpacked(element, tensors) for element in data]
        case _:
            return data


def _array(array: np.ndarray, tensors: list[torch.Tensor]) -> int:
    tensors.append(torch.from_numpy(np.ascontiguousarray(array)))
    return len(tensors) - 1

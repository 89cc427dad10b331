"""client.memory_budget against the process, at every step; against the plan, before a run: `torch_budget`. No torch.

What the budget is of: the client process. `hosl join` has one to itself; `hosl train` has both halves in one, and what
the client would take alone is its tensors' peak and what Python with torch takes.
"""

from typing import Any

from hosl.planner.runtime_base import RUNTIME_BASE_BYTES
from hosl.system.byte_sizes import parse_bytes, told_bytes

_LEEWAY = 1.05
"""How far over its budget a run may be seen before it is stopped: pages of a file, an allocator's fragments."""


def over_budget(session: Any) -> str | None:
    """What a person is told when a run's client has been seen over its budget; None: it has not, or has none."""
    budget = session.config.client.memory_budget
    if budget is None:
        return None
    taken, limit = session.client_bytes(), parse_bytes(budget)
    if taken <= _LEEWAY * limit:
        return None
    return (
        f"client.memory_budget is {told_bytes(limit)}, but after step {session.step} the client has taken "
        f"{told_bytes(taken)}; the state is saved: go on with a larger budget, or start again with a smaller "
        "client.micro_batch_size, per_device_eval_batch_size or model.cut"
    )


def beside_server_bytes(client_peak_bytes: int) -> float:
    """What the client of a run in one process would take by itself."""
    return RUNTIME_BASE_BYTES + client_peak_bytes

"""client.memory_budget against the client's process, at every step; before a run: `planner.budget`. No torch."""

from typing import Any

from hosl.system.byte_sizes import parse_bytes
from hosl.system.readable import readable_bytes

_LEEWAY = 1.05
"""The factor by which a run may exceed its budget before it is stopped: pages of a file, an allocator's fragments."""


def over_budget(session: Any) -> str | None:
    """The message for a run whose client has exceeded its budget; None: it has not, or there is no budget."""
    budget = session.config.client.memory_budget
    if budget is None:
        return None
    taken, limit = session.client_bytes(), parse_bytes(budget)
    if taken <= _LEEWAY * limit:
        return None
    return (
        f"client.memory_budget is {readable_bytes(limit)}, but after step {session.step} the client has taken "
        f"{readable_bytes(taken)}; the state is saved: go on with a larger budget, or start again with a smaller "
        "client.micro_batch_size, per_device_eval_batch_size or model.cut"
    )

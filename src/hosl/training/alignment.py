"""A check of residual feedback before a run: how far the returned gradient is that of the blocks below the cut.

One batch of the task, both halves in this process, autograd on the client's blocks; nothing is kept or written.
"""

from collections.abc import Sequence
from typing import Any

from hosl.config import Config
from hosl.methods.schedule import batch_of_step
from hosl.parties.clients.residual import ResidualClient
from hosl.parties.engine.alignment import Alignment, alignment
from hosl.training.local_session import new_session

ENOUGH = 0.3
"""The cosine below which a block learns hardly anything by residual feedback (docs/concepts/residual-feedback.md)."""


def first_batch_alignment(config: Config) -> list[Alignment]:
    """The alignment of every layer that the config's residual feedback trains, from the cut down, on its first batch.

    Raises:
        RequestError, ModelError: see `new_session`.
    """
    session = new_session(config)
    client = session.client
    assert isinstance(client, ResidualClient), (
        "only residual feedback without measured slopes has an alignment"
    )
    batch = batch_of_step(session.config, session.task, 1)
    server: Any = session.server_to_call(in_round=False)
    reply = server.step(client.forward(batch), batch.targets, step=1, want_gradient=True)
    return alignment(client, batch, reply.gradient)


def alignment_lines(rows: Sequence[Alignment]) -> list[str]:
    """The table for people, with a verdict."""
    width = max(len(row.layer) for row in rows)
    lines = [
        "residual feedback on the first batch: cosine of each layer's update with its true gradient, and the ratio of "
        "their lengths"
    ]
    lines += [f"  {row.layer:<{width}}  {row.cosine:5.2f}  {row.ratio:6.2f}" for row in rows]
    blocks = [row for row in rows if row.cosine >= ENOUGH]
    if len(blocks) == len(rows):
        lines.append(f"every layer is at {ENOUGH} or above: residual feedback teaches all of them")
    else:
        lines.append(
            f"{len(rows) - len(blocks)} of {len(rows)} layers are below {ENOUGH} and learn hardly anything: set "
            "residual.blocks to fewer, cut lower so that more of the server's blocks stand above the cut, or take "
            "method: fo-recompute"
        )
    return lines

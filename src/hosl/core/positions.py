"""What of a batch's targets a server may see when the labels stay with the client: where the scored positions are."""

import numpy as np

from hosl.core.parties import ClassTargets, PositionTargets, Targets


def positions_of(targets: Targets) -> PositionTargets:
    """The scored positions of any row, ascending; position 0 for a classification head."""
    if isinstance(targets, ClassTargets):
        return PositionTargets(targets.mask, np.zeros(1, np.int64))
    return PositionTargets(targets.mask, np.unique(targets.positions[targets.tokens >= 0]).astype(np.int64))

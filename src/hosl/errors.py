"""The errors that hosl raises on purpose, and the exit status that each becomes.

Every message answers four questions: what was asked, what was found, what is allowed, what to do. With --json a failed
command prints {"error": {"kind": the name below, "message": ...}} on standard output.

    HoslError
    |-- RequestError (also a ValueError)     the request cannot be met as it stands      exit 2
    |   |-- ConfigError                        a setting, or two that contradict each other
    |   |-- SplitError                         a model, a family or a cut
    |   |-- TaskError                          data, labels or a tokenizer
    |   |-- FolderError                        a folder that is in use, occupied, missing or no run
    |   |-- AccessError                        a token, a fingerprint or a certificate
    |   |-- HandshakeError                     two sides that do not fit: version, model, settings
    |   `-- BudgetError                        a run that would take more memory than it may
    `-- FailureError                         the request was fine, the work failed         exit 1
        |-- NonFiniteError                     NaN or Inf where a number is needed: diverged      exit 3
        |-- JournalError                       a journal that cannot be replayed
        |-- CheckpointError                    a checkpoint that cannot be written or read
        |-- ModelError                         weights that are missing, cut short or not the expected ones
        |-- LinkError                          a peer that cannot be reached, or went away
        |-- WireError                          bytes from a peer that cannot be what was meant
        |-- LimitError                         more than a peer may ask for
        |   `-- BusyError                      more at once, or per second; a moment later it is allowed
        |-- StepError                          a step from the past or the future
        |-- OverBudgetError                    a run that takes more memory than it may
        `-- SessionError                       a peer that does not know us (any more): say hello again
"""


class HoslError(Exception):
    """The root of the tree: catch this to catch everything that hosl raises on purpose."""

    exit_status = 1


class RequestError(HoslError, ValueError):
    """The request is wrong; nothing was started. A ValueError too, so that msgspec adds the path to it."""

    exit_status = 2


class ConfigError(RequestError):
    """A setting is unknown, impossible, or contradicts another."""


class SplitError(RequestError):
    """The model cannot be cut as asked."""


class TaskError(RequestError):
    """The data, its labels or the tokenizer cannot serve as asked."""


class FolderError(RequestError):
    """A folder is in use, occupied, missing, or not a run's folder."""


class AccessError(RequestError):
    """A token, a fingerprint or a certificate that is not accepted."""


class HandshakeError(RequestError):
    """The two sides do not fit together: protocol version, model, halves, settings."""


class BudgetError(RequestError):
    """The client would take more memory than its budget; nothing was started."""


class FailureError(HoslError):
    """The request was fine; the work failed."""


class NonFiniteError(FailureError):
    """A loss, a coefficient or an activation is NaN or infinite: the run has diverged."""

    exit_status = 3


class JournalError(FailureError):
    """A journal whose bytes cannot be what was written."""


class CheckpointError(FailureError):
    """A checkpoint that cannot be written, or whose files do not belong together."""


class ModelError(FailureError):
    """Weights that are missing, cut short, or not those that were expected."""


class LinkError(FailureError):
    """A peer that cannot be reached, or went away in the middle."""


class WireError(FailureError):
    """Bytes from a peer that cannot be what was meant; nothing was changed by them."""


class LimitError(FailureError):
    """More than a peer may ask for."""


class BusyError(LimitError):
    """More at once, or per second, than a peer may ask for: a moment later it is allowed."""


class StepError(FailureError):
    """A step from the past or the future; nothing was changed by it."""


class SessionError(FailureError):
    """The peer does not know this session (any more): say hello again."""


class OverBudgetError(FailureError):
    """The client takes more memory than its budget; the run was stopped after a checkpoint."""


class StepMoved(HoslError):  # noqa: N818  (no error: the run's loop hears of it and goes there)
    """The other side goes on from another step than the one at hand; never reaches a person."""

    def __init__(self, step: int) -> None:
        super().__init__(f"the run goes on from the state after step {step}")
        self.step = step

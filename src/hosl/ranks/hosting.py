"""The half of a run on rank 0, which has all ranks do what the service asks of it; and the other ranks' side of that.

A command is told to the others, then done here too. All ranks must come to the same outcome: an error of the request
is raised on all of them, anything else ends the group.
"""

import gc
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import msgspec
import torch

from hosl.config import Config
from hosl.core.journal import Journal
from hosl.errors import HandshakeError, HoslError, ModelError
from hosl.inference.halves import at_the_end
from hosl.network.torch_hosting import TorchHosted, next_token
from hosl.parties.remote.torch_wire import from_wire
from hosl.ranks.group import Group, end_broken
from hosl.ranks.messages import packed, unpacked
from hosl.ranks.sharding import (
    let_go_,
    optimiser_state,
    ranked_server,
    set_,
    set_state_,
    whole,
)
from hosl.service.hosted_half import HostedText, NextToken
from hosl.split.caches import HalfCache
from hosl.split.reading.row_ranges import each_tensor, names_of
from hosl.split.reading.tensors import DTYPES, Source, write_tensors
from hosl.system.checkpoint import (
    Checkpoint,
    checkpoint_path,
    drop_checkpoints_after,
    read_without_tensors,
    write_checkpoint,
)
from hosl.training.client_part import check_same_names
from hosl.wire.tensors import WireArray

_CALLS = (
    "losses", "losses_together", "scores", "gradient", "step", "contribute", "contribute_together", "apply",
)  # fmt: skip
"""The methods of a server that a command may name."""
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


class Ranks:
    """This rank's parties and texts, and the commands that all ranks do together."""

    def __init__(self, group: Group, folder: Path) -> None:
        """`folder`: that of the server half, on this machine."""
        self.group, self._folder = group, folder
        self.parties: dict[int, Any] = {}
        self.texts: dict[int, HalfCache] = {}
        self.dropped: deque[tuple[str, int]] = deque()
        """What rank 0 has let go of since the last command: ("party" or "text", its number)."""
        self._numbers = count()

    def new_number(self) -> int:
        """A number that no party and no text has had."""
        return next(self._numbers)

    # ---- rank 0 ----

    def lead(self, do: str, of: int, *args: Any, **options: Any) -> Any:
        """Have all ranks do a command, this one too; returns this one's result.

        Raises:
            HoslError: if the command raises one, on all ranks.
        """
        try:
            dropped = [
                self.dropped.popleft() for _ in range(len(self.dropped))
            ]  # others may append meanwhile
            tensors: list[torch.Tensor] = []
            data = {"args": packed(args, tensors), "options": packed(options, tensors)}
            self.group.tell({"do": do, "of": of, "dropped": dropped, **data}, tensors)
            return self._done(do, of, dropped, args, options)
        except HoslError:
            raise
        except BaseException as cause:
            end_broken(self.group.place, cause)

    def stop(self) -> None:
        """Let the others end, in order."""
        self.group.tell({"do": "stop"}, [])

    # ---- the others ----

    def follow(self) -> None:
        """Do what rank 0 tells, until it says stop."""
        try:
            while True:
                command, tensors = self.group.hear()
                if command["do"] == "stop":
                    return
                args, options = (unpacked(command[key], tensors) for key in ("args", "options"))
                try:
                    self._done(command["do"], command["of"], command["dropped"], args, options)
                except HoslError:
                    continue  # rank 0 raises it too, and answers
        except BaseException as cause:
            end_broken(self.group.place, cause)

    # ---- every rank ----

    def _done(self, do: str, of: int, dropped: Sequence[Any], args: Any, options: Any) -> Any:
        for kind, number in dropped:
            (self.parties if kind == "party" else self.texts).pop(number, None)
        result, error = None, None
        try:
            result = _COMMANDS[do](self, of, *args, **options) if do in _COMMANDS else self._call(
                do, of, args, options
            )  # fmt: skip
        except HoslError as raised:
            error = raised
        outcomes = self.group.outcomes("" if error is None else f"{type(error).__name__}: {error}")
        kinds = {outcome.partition(":")[0] for outcome in outcomes}
        if len(kinds) > 1 and do == "open":  # such as a file that is damaged on one machine
            self.parties.pop(of, None)
            rank, what = next((r, o) for r, o in enumerate(outcomes) if o)
            raise ModelError(f"rank {rank} could not read its part of the half: {what}")
        if len(kinds) > 1:
            end_broken(self.group.place, f"the ranks do not agree about {do}: {outcomes}")
        if error is not None:
            raise error
        return result

    def _call(self, do: str, of: int, args: Any, options: Any) -> Any:
        assert do in _CALLS, f"no server has a call {do}"
        return getattr(self.parties[of], do)(*args, **options)

    def _open(self, of: int, config_json: str, new_weights: list[str], synchronous: bool) -> None:
        self.parties.pop(of, None)
        gc.collect()  # FSDP's modules are in cycles: the old half goes before the new one is loaded
        config = msgspec.json.decode(config_json, type=Config)
        try:
            self.parties[of] = ranked_server(
                config, self._folder, new_weights, self.group, synchronous=synchronous
            )
        except HoslError:
            raise
        except (
            Exception
        ) as cause:  # such as too little memory: no rank waits for another yet, so it can be answered
            raise ModelError(f"the half cannot be opened: {type(cause).__name__}: {cause}") from cause

    def _whole(self, of: int, name: str, entry: str) -> torch.Tensor:
        """All of a weight, or of an entry of its optimiser state."""
        party = self.parties[of]
        return whole(party.optimiser.state[party.trained[name]][entry] if entry else party.trained[name])

    def _set(self, of: int, name: str, entry: str, tensor: torch.Tensor) -> None:
        party = self.parties[of]
        let_go_(party.half)
        if entry:
            set_state_(party, name, entry, tensor)
        else:
            set_(party.trained[name], tensor)

    def _token(self, of: int, text: int, hidden: torch.Tensor) -> torch.Tensor:
        half = self.parties[of].half
        cache = self.texts.setdefault(text, half.new_cache())
        return at_the_end(half, hidden, cache)


_COMMANDS: dict[str, Callable[..., Any]] = {
    "open": Ranks._open, "whole": Ranks._whole, "set": Ranks._set, "token": Ranks._token,
}  # fmt: skip


class RankedHosted(TorchHosted):
    """Implements `service.hosted_half.HostedHalf` on rank 0, over all ranks."""

    def __init__(
        self, ranks: Ranks, config: Config, new_weights: Sequence[str], *, synchronous: bool
    ) -> None:
        """Load the half at its base weights, on every rank.

        Raises:
            HandshakeError: if the run's server needs one process.
        """
        check_server(config)
        self._ranks, self._number = ranks, ranks.new_number()
        weakref.finalize(self, ranks.dropped.append, ("party", self._number))
        number, settings = self._number, msgspec.json.encode(config).decode()

        def opened() -> (
            Any
        ):  # knows nothing of this object, which else would stay until cycles are looked for
            ranks.lead("open", number, settings, list(new_weights), synchronous)
            return ranks.parties[number]

        super().__init__(config, opened)

    def save(
        self,
        folder: Path,
        step: int,
        facts: dict[str, object],
        journal: Journal | None,
        beside: Sequence[int],
    ) -> None:
        """See `HostedHalf`. One tensor is in memory at a time."""
        checkpoint = Checkpoint(step=step, state=dict(facts))
        parts = {"trained": self.party.trained, "optimiser": optimiser_state(self.party)}
        for part, tensors in parts.items():
            sources = [self._source(name, part == "optimiser", tensor) for name, tensor in tensors.items()]
            checkpoint.written[f"server/{part}"] = partial(write_tensors, sources=sources)
        checkpoint.journal = journal.to_bytes() if journal is not None else None
        write_checkpoint(folder, checkpoint, beside=beside)

    def restore(self, folder: Path, step: int) -> tuple[dict[str, object], Journal]:
        """See `HostedHalf`. Every rank takes its rows of the tensors that rank 0 reads.

        Raises:
            CheckpointError: if the checkpoint is missing or damaged.
        """
        checkpoint, files = Checkpoint(step=0), dict[str, Path]()
        if step:
            checkpoint, files = read_without_tensors(checkpoint_path(folder, step))
        self._renew()
        if step:
            check_same_names(self.party.trained, dict.fromkeys(names_of(files["server/trained"])))
        for part, file in files.items():
            for key, tensor in each_tensor(file):
                name, _, entry = key.rpartition("/") if part == "server/optimiser" else (key, "", "")
                self._ranks.lead("set", self._number, name, entry, tensor)
        drop_checkpoints_after(folder, step)
        return checkpoint.state, Journal.from_bytes(checkpoint.journal or b"")

    def open_text(self, candidates: int) -> HostedText:
        """See `HostedHalf`."""
        return _RankedText(self, candidates)

    def next_token(self, text: int, hidden: torch.Tensor) -> torch.Tensor:
        """The logits [1, 1, vocabulary] after a hidden state that a text goes on with, on every rank."""
        return self._ranks.lead("token", self._number, text, hidden)

    @property
    def ranks(self) -> Ranks:
        """All ranks, as rank 0 leads them."""
        return self._ranks

    def _source(self, name: str, of_optimiser: bool, tensor: torch.Tensor) -> Source:
        weight, entry = name.rsplit("/", 1) if of_optimiser else (name, "")

        def read() -> torch.Tensor:
            return self._ranks.lead("whole", self._number, weight, entry).detach().cpu().contiguous()

        return Source(name, _NAMES[tensor.dtype], tuple(tensor.shape), read)

    def _token_bytes(self, hidden: torch.Tensor) -> int:
        text = self._ranks.new_number()
        self.next_token(text, hidden)
        self._ranks.dropped.append(("text", text))
        return self._ranks.texts[text].size_bytes

    def _method(self, call: str) -> Any:
        super()._method(call)  # refuses a call that this server does not have
        return partial(self._ranks.lead, call, self._number)


class _RankedText(HostedText):
    """One text in a half over several ranks, each of which keeps its keys and values."""

    def __init__(self, hosted: RankedHosted, candidates: int) -> None:
        self._hosted, self._candidates = hosted, candidates
        self._text = hosted.ranks.new_number()

    def go_on(self, hidden: WireArray) -> NextToken:
        """See `HostedText`."""
        return next_token(self._hosted.next_token(self._text, from_wire(hidden)), self._candidates)

    @property
    def size_bytes(self) -> int:
        """See `HostedText`."""
        cache = self._hosted.ranks.texts.get(self._text)
        return 0 if cache is None else cache.size_bytes

    def close(self) -> None:
        """See `HostedText`. The other ranks hear of it with the next command."""
        self._hosted.ranks.dropped.append(("text", self._text))


def check_server(config: Config) -> None:
    """Refuse runs that one process alone can serve; the authors' profile is never served over a network.

    Raises:
        HandshakeError: naming the setting.
    """
    if config.method_row.server == "zeroth-order":
        raise HandshakeError(
            f"method {config.method} probes the server's half, and this server has several ranks, which train by "
            "backprop alone; choose a method with a first-order server, such as hosl, or serve without --ranks"
        )
    if config.clients.server == "personal":
        raise HandshakeError(
            "clients.server: personal gives each device server adapters of its own, and this server has several ranks, "
            "which train one set of weights; set clients.server: shared, or serve without --ranks"
        )

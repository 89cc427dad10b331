"""`hosl audit --attack`: what a server that knows the public model rebuilds of this device's texts, measured.

The texts are encoded and sent through the half, and through the wire's compression, as `hosl join` does it; then three
attackers read what came; of models that are not causal two. They know the half before training, the tokenizer, and
other text; the search may know the whole model. Nothing leaves this machine.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from hosl.config import Config
from hosl.errors import ConfigError, TaskError
from hosl.methods.torch_parties import DTYPES, prepare_client_half_
from hosl.parties.remote.noisy import simulated_key
from hosl.parties.remote.torch_wire import from_wire, to_wire
from hosl.privacy.expectation import Expectation, expectation
from hosl.privacy.inversion import Seen, better, nearest, ridge, right_padded, share
from hosl.privacy.search import TRIES, Search
from hosl.split import ClientHalf, load_half
from hosl.system.readable import readable_count
from hosl.tasks import Task, TextTokenizer
from hosl.tasks.docstrings import library_texts
from hosl.tasks.rows import read_rows, text_of_file
from hosl.training.crossing import noise_of
from hosl.wire.tensors import Unpacking, pack

_ROWS_AT_ONCE = 16
_ANY_LENGTH = 1 << 30
_RARE = 5
"""A token is rare that the attacker's own text has fewer times."""
_OVERLAP = 30
"""The letters from which on a shared text is taken out of the attacker's own."""


@dataclass(frozen=True, kw_only=True)
class Rebuilt:
    """The outcome of one attack."""

    name: str
    tokens: float
    """The share of all tokens that was rebuilt, special ones left out."""
    rare: float | None
    """The same of rare tokens; None: there are none."""
    whole: float
    """The share of rows rebuilt without a mistake."""
    texts: tuple[str, ...]
    """The first rows, as rebuilt."""


@dataclass(frozen=True, kw_only=True)
class Attacked:
    """The outcome of all attacks on one half."""

    cut: int
    rows: int
    tokens: int
    rare_tokens: int
    own_tokens: int
    """The size of the attacker's own text."""
    norms: tuple[float, float]
    """The median and the largest L2 norm of what crosses for a token, by which `wire.clip_norm` can be chosen."""
    attacks: tuple[Rebuilt, ...]
    texts: tuple[str, ...]
    """The first rows, as they are."""

    def facts(self) -> dict[str, Any]:
        """Plain data for --json."""
        return {
            "cut": self.cut, "rows": self.rows, "tokens": self.tokens, "rare_tokens": self.rare_tokens,
            "own_tokens": self.own_tokens, "norms": list(self.norms), "texts": list(self.texts),
            "attacks": [
                {
                    "name": a.name, "tokens_share": a.tokens, "rare_share": a.rare, "rows_share": a.whole,
                    "texts": list(a.texts),
                }
                for a in self.attacks
            ],
        }  # fmt: skip

    def lines(self) -> list[str]:
        """What people read: a line for each attack, and the first rows side by side with the best of them."""
        best = max(self.attacks, key=lambda attack: attack.tokens)
        lines = [
            f"attacks on the activations of {readable_count(self.rows, 'row')} at cut {self.cut}, "
            f"{readable_count(self.tokens, 'token')}, {self.rare_tokens:,} of them rare; the attacker knows the public "
            f"model and {readable_count(self.own_tokens, 'token')} of other text",
            f"norms of what crosses for a token: median {self.norms[0]:.3g}, largest {self.norms[1]:.3g}",
        ]
        for attack in self.attacks:
            rare = "" if attack.rare is None else f", {100 * attack.rare:.1f} % of rare ones"
            lines.append(
                f"{attack.name}: {100 * attack.tokens:.1f} % of tokens{rare}, {100 * attack.whole:.1f} % of rows "
                "without a mistake"
            )
        for text, rebuilt in zip(self.texts, best.texts, strict=True):
            lines += ["", f"text:    {text}", f"rebuilt: {rebuilt}  ({best.name})"]
        return lines


def attacked(
    folder: Path,
    config: Config,
    task: Task,
    *,
    file: Path | None = None,
    own_file: Path | None = None,
    rows: int = 100,
    own_rows: int = 500,
    tries: int = TRIES,
    public_model: str | None = None,
    samples: int = 3,
    say: Callable[[str], None] = lambda text: None,
) -> Attacked:
    """Attack a client's half as it is before training, on a config's data.

    Args:
        folder: the client's folder of a split model.
        config: the settings of the run: the half's dtype and the wire's compression count.
        task: its data, of which the test rows are attacked, or the dev rows where it has none.
        file: rows to attack in their place.
        own_file: the attacker's own text; None: docstrings of Python's standard library that are not attacked.
        rows: the rows that are attacked, at most.
        own_rows: the rows of the attacker's own text, at most.
        tries: the tokens that the search tries at a position, at most; a whole vocabulary makes it complete.
        public_model: the whole language model, whose expectation gives the search candidates; None: it does without.
        samples: the rows that are shown.
        say: is called with lines of progress.

    Raises:
        ModelError, SplitError, TaskError: if the half, the model or a file cannot be read.
        ConfigError: if there is nothing to attack, or the public model is not that of the half.
    """
    tokenizer = TextTokenizer.load(folder)
    expects = None if public_model is None else _expectation(folder, config, public_model, say)
    limit = _limit(config, tokenizer)
    texts = _attacked_texts(task, tokenizer, file, limit, say)[:rows]
    if not texts:
        what = (
            "the task has neither test nor dev rows; give --rows FILE"
            if file is None
            else f"{file} has no text"
        )
        raise ConfigError(f"there are no rows to attack: {what}")
    own = _own_texts(tokenizer, own_file, limit, texts, most=own_rows)
    say(f"encoding {readable_count(len(texts), 'row')}, and {len(own)} of the attacker's own")
    seen = _seen(_half(folder, config, prepared=True), texts, config, simulated_key(config.seed))
    half = _half(folder, config)  # one half at a time: it may be large
    # what leaves the device is blurred by a key that nobody else has: the attacker blurs by one of its own
    known = _seen(half, own, config, simulated_key(config.seed + 1))
    table = _table(half)
    found = dict(_attacks(half, table, known, seen, partial(Search, tries=tries, expectation=expects), say))
    return _scored(found, seen, known, tokenizer, half.cut, samples)


def _expectation(folder: Path, config: Config, name: str, say: Callable[[str], None]) -> Expectation:
    """What the public model expects, before anything is encoded."""
    half = _half(folder, config)
    if not half.causal:
        raise ConfigError(
            f"--public-model {name} helps the search, which is for causal models alone; leave it out for this half"
        )
    say(f"loading {name}, for what it expects")
    return expectation(name, len(_table(half)))


def _attacks(
    half: ClientHalf,
    table: torch.Tensor,
    known: Seen,
    seen: Seen,
    search: Callable[[ClientHalf, torch.Tensor, Seen], Search],
    say: Callable[[str], None],
) -> Iterator[tuple[str, torch.Tensor]]:
    for name, make in (("nearest embedding", nearest), ("ridge regression", ridge)):
        say(name)
        yield name, make(table, known)(seen.states, 1)[:, 0]
    if not half.causal:
        say("search: left out, it is for causal models alone")
        return
    yield "search", search(half, table, known).found(seen, better(table, known), _every_tenth(say))


def _every_tenth(say: Callable[[str], None]) -> Callable[[int, int], None]:
    said = [0]

    def settled(done: int, of: int) -> None:
        if 10 * done // of > said[0]:
            said[0] = 10 * done // of
            say(f"search: {done:,} of {of:,} positions")

    return settled


def _scored(
    found: dict[str, torch.Tensor], seen: Seen, known: Seen, tokenizer: TextTokenizer, cut: int, samples: int
) -> Attacked:
    special = torch.tensor([token in tokenizer.special_ids for token in seen.tokens.tolist()])
    counts = torch.bincount(known.tokens, minlength=int(seen.tokens.max()) + 1)
    rare = (counts[seen.tokens] < _RARE) & ~special
    attacks = []
    for name, tokens in found.items():
        right = (tokens == seen.tokens) | special
        of_rows = right.split(seen.lengths)
        attacks.append(
            Rebuilt(
                name=name, tokens=share(tokens[~special], seen.tokens[~special]),
                rare=share(tokens[rare], seen.tokens[rare]) if bool(rare.any()) else None,
                whole=sum(bool(row.all()) for row in of_rows) / len(of_rows),
                texts=tuple(tokenizer.text(row.tolist()) for row in tokens.split(seen.lengths)[:samples]),
            )
        )  # fmt: skip
    sizes = seen.states.norm(dim=-1)
    norms = float(sizes.median()), float(sizes.max())
    return Attacked(
        cut=cut, norms=norms, rows=len(seen.lengths), tokens=int((~special).sum()), rare_tokens=int(rare.sum()),
        own_tokens=len(known.tokens), attacks=tuple(attacks),
        texts=tuple(tokenizer.text(row.tolist()) for row in seen.tokens.split(seen.lengths)[:samples]),
    )  # fmt: skip


def _half(folder: Path, config: Config, *, prepared: bool = False) -> ClientHalf:
    """The public half; `prepared`: as the device computes with it."""
    half = load_half(folder, DTYPES[config.model.dtype])
    assert isinstance(half, ClientHalf), "half.json says that it is the client's"
    half.eval()
    if prepared:
        prepare_client_half_(config, half)
    for p in half.parameters():
        p.requires_grad_(False)
    return half


def _table(half: ClientHalf) -> torch.Tensor:
    """The embeddings of all tokens [vocabulary, width], as the half's embedding layer has them.

    Raises:
        ConfigError: if the model widens them, so that they cannot be compared with activations.
    """
    embedding: Any = half.model.get_input_embeddings()
    with torch.no_grad():
        table = embedding(torch.arange(embedding.weight.shape[0])).float()
    width = half.config.get_text_config().hidden_size
    if table.shape[1] != width:
        raise ConfigError(
            f"the embeddings of this model are {table.shape[1]} wide and its activations {width}: the attacks compare "
            "both, so they do not know such a model; its activations are not private for that"
        )
    return table


def _seen(half: ClientHalf, rows: Sequence[tuple[int, ...]], config: Config, key: bytes) -> Seen:
    """The activations that cross for these rows, and their tokens."""
    states, texts = list[torch.Tensor](), [torch.tensor(row) for row in rows]
    for first in range(0, len(rows), _ROWS_AT_ONCE):
        some = texts[first : first + _ROWS_AT_ONCE]
        with torch.no_grad():
            sent = _crossed(half(*right_padded(some)), config, key, f"attack-{first}")
        states += [h[: len(row)] for h, row in zip(sent, some, strict=True)]
    return Seen(torch.cat(states).float(), torch.cat(texts), tuple(map(len, rows)))


def _crossed(h: torch.Tensor, config: Config, key: bytes, place: str) -> torch.Tensor:
    """Activations as the server unpacks them."""
    array = to_wire(h)
    blur = noise_of(config, key)
    if blur is not None:
        array = blur.released_array(array, place)
    packed = pack(array, config.wire.compression, noise=place)
    arriving = Unpacking(packed.header, tensor_bytes=1 << 40)
    for chunk in packed.chunks():
        arriving.add(chunk)
    return from_wire(arriving.array())


def _limit(config: Config, tokenizer: TextTokenizer) -> int:
    """The most tokens of a row: those of the task, and no more than the model reads."""
    positions = tokenizer.limits.positions
    wanted = config.task.max_tokens
    if not isinstance(wanted, int):
        wanted = positions or 512
    return wanted if positions is None else min(wanted, positions)


def _attacked_texts(
    task: Task, tokenizer: TextTokenizer, file: Path | None, limit: int, say: Callable[[str], None]
) -> list[tuple[int, ...]]:
    if file is None:
        examples = task.test or task.dev
        return [example.rows[example.label if len(example.rows) > 1 else 0] for example in examples]
    rows = [tokenizer.encode(text, _ANY_LENGTH) for text in _texts_of(file)]
    empty, cut = sum(not row for row in rows), sum(len(row) > limit for row in rows)
    if empty or cut:
        say(
            f"{file}: {empty} of {len(rows)} rows without tokens are left out, {cut} are cut to {limit} tokens"
        )
    return [tokenizer.cut(row, limit) for row in rows if row]


def _own_texts(
    tokenizer: TextTokenizer,
    file: Path | None,
    limit: int,
    attacked_rows: Sequence[tuple[int, ...]],
    *,
    most: int | None = None,
) -> list[tuple[int, ...]]:
    """The attacker's own rows, `most` at most: none that an attacked row has, or that has an attacked row."""
    texts = library_texts() if file is None else list(_texts_of(file))
    attacked_texts = [tokenizer.text(row) for row in attacked_rows]
    together, own = "\n".join(attacked_texts), []
    for row in (tokenizer.encode(text, limit) for text in texts):
        if len(own) == most:
            break
        text = tokenizer.text(row)  # as the tokenizer spells it, which may drop capitals
        known = text[:_OVERLAP] in together or any(other in text for other in attacked_texts if other)
        if text and not known:
            own.append(row)
    if not own:
        raise TaskError("the attacker has no text that is not attacked, too; give --own FILE with other text")
    return own


def _texts_of(file: Path) -> Iterator[str]:
    """The text of each row of a file: its lines, or its `text`, its prompt and completion, or its messages."""
    if not file.exists():
        raise TaskError(f"{file}: no such file; --rows and --own name files with texts")
    if file.suffix.lower() == ".txt":
        yield from (line for line in re.split(r"\r\n?|\n", text_of_file(file)) if line.strip())
        return
    for number, row in enumerate(read_rows(file).rows, start=1):
        match dict(row):
            case {"text": str(text)}:
                yield text
            case {"prompt": str(prompt), "completion": str(completion)}:
                yield prompt + completion
            case {"messages": [*messages]} if all(isinstance(_content(m), str) for m in messages):
                yield "\n".join(map(_content, messages))
            case other:
                raise TaskError(
                    f"{file}, row {number} has {', '.join(map(str, other))}, or not as texts; wanted is `text`, "
                    "`prompt` with `completion`, or `messages`; or a .txt file with a text in each line"
                )


def _content(message: Any) -> Any:
    return message.get("content") if isinstance(message, dict) else None

"""The task of own text: read, split by content, encoded; a training loss over the tokens that are learned."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from hosl.core.targets import Batch
from hosl.errors import TaskError
from hosl.tasks.base import Example
from hosl.tasks.classification import carve
from hosl.tasks.collate import token_batch
from hosl.tasks.configs import SftConfig, TaskConfig
from hosl.tasks.docstrings import PYTHON_DOCSTRINGS, documented_functions, documented_functions_note
from hosl.tasks.encoding import Encoder
from hosl.tasks.rows import expanded_path, read_rows
from hosl.tasks.sft.formats import Chat, Question, SftRow, SftRows, Text, question_of, sft_rows
from hosl.tasks.sft.spans import RowEncoder
from hosl.tasks.tokenizer import TextTokenizer

_PARTS = ("train", "dev", "test")
_SHARE = 0.1
"""Of the training rows, for dev and for test where no file is named."""


@dataclass(frozen=True)
class SftTask:
    """Texts to learn; implements `Task`."""

    name: str
    train: Sequence[Example]
    dev: Sequence[Example]
    test: Sequence[Example]
    pad_id: int
    labels: tuple[str, ...] = ()
    head: Literal["classification", "causal"] = "causal"
    notes: tuple[str, ...] = ()

    def collate(self, examples: Sequence[Example]) -> Batch:
        """One left-padded row per text; the loss is the mean over all tokens that are learned."""
        return token_batch(examples, self.pad_id)

    def collate_candidates(self, examples: Sequence[Example]) -> Batch:
        """The same batch as `collate`."""
        return token_batch(examples, self.pad_id)

    def rows_per_example(self) -> int:
        """1: a text is one row."""
        return 1

    def predict(self, examples: Sequence[Example], scores: np.ndarray) -> np.ndarray:
        """0 for every text: it is its only candidate."""
        return np.zeros(len(examples), np.int64)

    def losses(self, examples: Sequence[Example], scores: np.ndarray) -> np.ndarray:
        """The mean negative log-likelihood of each text's learned tokens, nats."""
        return -scores[:, 0]


def sft_task(config: SftConfig, tokenizer: TextTokenizer, *, seed: int) -> SftTask:
    """Read, check, split and encode. Parts are disjoint by content and do not depend on the seed.

    Raises:
        TaskError: if a file is missing, or a row is of no known format or cannot be learned; if a part is left empty;
            if the model cannot read a row.
    """
    files = _files(config)
    parts, notes = _split(config, {part: of_file.rows for part, of_file in files.items()}, seed)
    encoder = Encoder(tokenizer, config.max_tokens)
    rows = RowEncoder(
        tokenizer,
        encoder,
        config.loss_on,
        own_chat_template(config),
    )
    try:
        rows.loss_on(files["train"].rows[0].content)
    except TaskError as cause:
        raise TaskError(f"{config.train}: {cause}") from None
    if config.chat_template and not isinstance(files["train"].rows[0].content, Chat):
        raise TaskError(
            f"task.chat_template is for chats, the rows of {config.train} are none: nothing would read "
            f"{config.chat_template}; leave it out, or give rows of `messages`"
        )
    encoded = {part: [rows.example(row) for row in of_part] for part, of_part in parts.items()}
    encoder.check(encoded)
    formats = dict.fromkeys(note for of_file in files.values() for note in of_file.notes)
    said = _said(rows, parts["train"][0], encoded, encoder, tokenizer)
    return SftTask(
        Path(config.train).stem, *encoded.values(), pad_id=tokenizer.pad_id, notes=(*formats, *notes, *said)
    )


def held_out_questions(config: SftConfig, *, seed: int, part: Literal["dev", "test"]) -> list[Question]:
    """The questions of a part that is held out, with the answers that its rows have, in the order of `sft_task`.

    Raises:
        TaskError: as `sft_task`; if the rows are texts, which ask nothing.
    """
    files = _files(config)
    parts, _ = _split(config, {name: of_file.rows for name, of_file in files.items()}, seed)
    asked = [question_of(row.content) for row in parts[part]]
    if not all(asked):
        raise TaskError(
            f"task.metric judges answers, the rows of {config.train} are texts, which ask nothing: give rows of "
            "`prompt` and `completion` or of `messages`, or leave task.metric out"
        )
    return [question for question in asked if question is not None]


def own_chat_template(config: TaskConfig) -> Path | None:
    """The chat template that a task takes in place of the model's; None: the model's, or it has no chats."""
    named = config.chat_template if isinstance(config, SftConfig) else None
    return expanded_path(named) if named else None


def _files(config: SftConfig) -> dict[str, SftRows]:
    files = {}
    if config.train == PYTHON_DOCSTRINGS:
        note, embedded = documented_functions_note(), documented_functions()
        files = {part: sft_rows(embedded[part], config.train, (note,)) for part in _PARTS}
    for part in _PARTS[len(files) > 0 :]:
        name = getattr(config, part)
        if name is not None:
            read = read_rows(expanded_path(name), part)
            files[part] = sft_rows(read.rows, name, read.notes)
    return files


def _split(
    config: SftConfig, given: Mapping[str, list[SftRow]], seed: int
) -> tuple[dict[str, list[SftRow]], list[str]]:
    """Train, dev and test, disjoint by content, and the lines about what was drawn or dropped."""
    rows = {row.key: row for part in reversed(_PARTS) for row in reversed(given.get(part, []))}
    held = {part: [row.key for row in given[part]] for part in ("dev", "test") if part in given}
    train, notes = [row.key for row in given["train"]], list[str]()
    drawn = [part for part in ("test", "dev") if part not in given]
    if drawn or config.train_rows is not None:
        unique = list(dict.fromkeys(train))
        if len(unique) < len(train):
            notes.append(f"{len(train) - len(unique)} rows of train are dropped: they repeat another row")
        train = unique
    size = max(1, round(_SHARE * len(train)))
    for part in drawn:
        held[part], train = _carved(train, size, seed=0)
    known = {*held["dev"], *held["test"]}
    dev = [key for key in held["dev"] if key not in {*held["test"]}]
    kept = [key for key in train if key not in known]
    if dropped := len(train) - len(kept) + len(held["dev"]) - len(dev):
        notes.append(f"{dropped} rows are dropped: they are in dev or test as well")
    if config.train_rows is not None:
        kept, _ = _carved(kept, config.train_rows, seed)
    parts = {"train": kept, "dev": dev, "test": held["test"]}
    for part, keys in parts.items():
        if not keys:
            raise TaskError(
                f"{config.train}: no row is left for {part} once the parts are disjoint: there are {len(rows)} "
                "different rows in all; give more rows"
            )
    if drawn:
        counts = " and ".join(f"{part} ({len(parts[part])} rows)" for part in drawn)
        notes.append(f"{counts} drawn from {config.train}, by content")
    return {part: [rows[key] for key in keys] for part, keys in parts.items()}, notes


def _carved(keys: Sequence[str], size: int, seed: int) -> tuple[list[str], list[str]]:
    first, rest = carve([(key, 0) for key in keys], [size], seed)
    return [key for key, _ in first], [key for key, _ in rest]


def _said(
    rows: RowEncoder,
    first: SftRow,
    encoded: Mapping[str, Sequence[Example]],
    encoder: Encoder,
    tokenizer: TextTokenizer,
) -> list[str]:
    """The lines about what is learned, added and cut."""
    total = sum(len(example.rows[0]) for example in encoded["train"])
    learned = sum(stop - start for example in encoded["train"] for start, stop in example.scored)
    notes = [f"loss_on: {rows.loss_on(first.content)}: {learned:,} of {total:,} tokens of train are learned"]
    eos = None if tokenizer.eos_id is None else tokenizer.token(tokenizer.eos_id)
    kind = "text" if isinstance(first.content, Text) else "completion"
    if isinstance(first.content, Chat):
        if rows.template.asks_for_the_time:
            notes.append(
                "the chat template writes the present time into the rows (strftime_now): on another day the data is "
                "another, and a run does not resume; name a file without it in task.chat_template"
            )
    elif eos is None:
        notes.append(f"the model's files name no eos token: no {kind} ends with one")
    elif rows.ended:
        notes.append(f"{rows.ended:,} rows get the eos token `{eos}`, with which a {kind} ends")
    cut = encoder.notes()
    if cut:
        side = "at their end" if isinstance(first.content, Text) else "at their beginning"
        if rows.loss_on(first.content) == "all" and isinstance(first.content, Chat):
            side = "at their end"
        notes += [f"{cut[0]}; they are cut {side}"]
    if rows.cut_answers:
        notes.append(
            f"{rows.cut_answers:,} answers alone are longer than max_tokens allows and lose their end"
        )
    return notes

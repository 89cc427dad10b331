"""Rows as prompts: a template and candidate answers, the options, scored by a language model.

The loss is taken on the tokens of the right option only. The prediction is the option with the highest mean
log-likelihood per token.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from hosl.core.targets import Batch
from hosl.errors import TaskError
from hosl.tasks.base import Example, content_order
from hosl.tasks.classification import LabelledText, carve
from hosl.tasks.collate import option_batch
from hosl.tasks.configs import PromptsConfig
from hosl.tasks.encoding import Encoder
from hosl.tasks.files import split_rows
from hosl.tasks.labels import class_counts, near_name
from hosl.tasks.rows import expanded_path, read_rows
from hosl.tasks.templates import Template
from hosl.tasks.tokenizer import TextTokenizer


@dataclass(frozen=True)
class PromptTask:
    """Prompts with candidate answers; implements `Task`."""

    name: str
    labels: tuple[str, ...]
    train: Sequence[Example]
    dev: Sequence[Example]
    test: Sequence[Example]
    pad_id: int
    head: Literal["classification", "causal"] = "causal"
    notes: tuple[str, ...] = ()

    def collate(self, examples: Sequence[Example]) -> Batch:
        """One left-padded row per example: the prompt with its right answer."""
        rows = [example.rows[example.label] for example in examples]
        return option_batch(rows, [e.option_lengths[e.label] for e in examples], self.pad_id)

    def collate_candidates(self, examples: Sequence[Example]) -> Batch:
        """One left-padded row per candidate, an example's candidates one after the other."""
        rows = [row for example in examples for row in example.rows]
        return option_batch(rows, [n for example in examples for n in example.option_lengths], self.pad_id)

    def rows_per_example(self) -> int:
        """The number of candidates."""
        return len(self.labels)

    def predict(self, examples: Sequence[Example], scores: np.ndarray) -> np.ndarray:
        """The candidate with the highest mean log-likelihood per token."""
        return self._by_candidate(examples, scores).argmax(axis=1).astype(np.int64)

    def losses(self, examples: Sequence[Example], scores: np.ndarray) -> np.ndarray:
        """The negative mean log-likelihood per token of the right candidate, nats."""
        right = [example.label for example in examples]
        return -self._by_candidate(examples, scores)[np.arange(len(examples)), right]

    def _by_candidate(self, examples: Sequence[Example], scores: np.ndarray) -> np.ndarray:
        return scores.reshape(len(examples), len(self.labels))


def prompts_task(config: PromptsConfig, tokenizer: TextTokenizer, *, seed: int) -> PromptTask:
    """Read, check, split and encode the rows.

    Of a folder of the paper's tasks, train and dev are from the official train split, test from the official
    validation split: rows of train and dev whose prompt is in test are dropped, and rows of train whose prompt is in
    dev. Where the train split is small (CB has 250 rows), dev takes at most a third of it. Own files are split as those
    of kind: files.

    Raises:
        TaskError: if a file is missing, or a row lacks a column, has an unknown label or cannot be read by the model.
    """
    template = config.as_template()
    read = _read(config, template)
    parts, notes = (
        _official_parts(config, read, seed) if config.folder is not None else _own_parts(config, read, seed)
    )
    encoder = Encoder(tokenizer, config.max_tokens)
    places = {pair: f"{file}, row {number}" for file, number, pair in reversed([*read.rows()])}
    encoded = {
        name: [encode_prompt(*pair, template.options, tokenizer, encoder, places[pair]) for pair in part]
        for name, part in parts.items()
    }
    counts = class_counts(
        template.labels, {name: [label for _, label in part] for name, part in parts.items()}
    )
    name = config.name or Path(str(config.train)).stem
    notes = (*read.notes, *notes, *counts, *encoder.notes())
    return PromptTask(name, template.labels, *encoded.values(), pad_id=tokenizer.pad_id, notes=notes)


@dataclass(frozen=True)
class _Read:
    """The prompts of each split's file, with the index of the right option."""

    files: Mapping[str, str]
    pairs: Mapping[str, list[LabelledText]]
    notes: Sequence[str]

    def rows(self) -> Iterable[tuple[str, int, LabelledText]]:
        """File, row number and pair of every row."""
        for split, pairs in self.pairs.items():
            yield from ((self.files[split], number, pair) for number, pair in enumerate(pairs, start=1))


def _read(config: PromptsConfig, template: Template) -> _Read:
    names = ("train", "dev", "test")
    own = {name: (str(getattr(config, name)), name) for name in names if getattr(config, name) is not None}
    sources = own or {"train": _official(config, "train"), "test": _official(config, "validation")}
    pairs, notes = {}, list[str]()
    for split, (file, name) in sources.items():
        pairs[split], said = _prompts(file, name, template, config.label_column)
        notes += said
    return _Read({split: file for split, (file, _) in sources.items()}, pairs, notes)


def _official(config: PromptsConfig, split: str) -> tuple[str, str]:
    """The file of a split of the paper's task, or the folder of a saved dataset; and the split's name in it."""
    folder = expanded_path(str(config.folder))
    folder = folder / str(config.name) if (folder / str(config.name)).is_dir() else folder
    files = [folder / f"{split}.jsonl", folder / f"{split}.parquet"]
    found = next(
        (file for file in files if file.is_file()), folder if (folder / split).is_dir() else files[0]
    )
    return str(found), split


def _official_parts(
    config: PromptsConfig, read: _Read, seed: int
) -> tuple[dict[str, list[LabelledText]], list[str]]:
    official, test = read.pairs["train"], read.pairs["test"]
    held_out = {prompt for prompt, _ in test}
    pool = [pair for pair in dict.fromkeys(official) if pair[0] not in held_out]
    order = content_order([prompt for prompt, _ in pool], seed)
    dev_rows = min(config.rows_of("dev") or len(pool), len(pool) // 3)
    dev = [pool[i] for i in order[:dev_rows]]
    in_dev = {prompt for prompt, _ in dev}
    train = [pool[i] for i in order[dev_rows:] if pool[i][0] not in in_dev][: config.rows_of("train")]
    if config.test_rows is not None:
        test = [test[i] for i in content_order([prompt for prompt, _ in test], seed=0)[: config.test_rows]]
    parts = {"train": train, "dev": dev, "test": test}
    for name, part in parts.items():
        if not part:
            raise TaskError(f"{config.folder}: no row is left for {name} once the splits are disjoint")
    return parts, []


def _own_parts(
    config: PromptsConfig, read: _Read, seed: int
) -> tuple[dict[str, list[LabelledText]], list[str]]:
    parts, notes = split_rows(str(config.train), config.rows_of("train"), read.pairs, seed)
    for name in ("dev", "test"):
        rows = config.rows_of(name)
        if rows is not None and rows < len(parts[name]):
            notes.append(f"task.{name}_rows keeps {rows} of {len(parts[name])} rows, by label and content")
            parts[name] = carve(parts[name], [rows], seed=0, leave=0)[0]
    return parts, notes


def _prompts(
    file: str, split: str, template: Template, label_column: str
) -> tuple[list[LabelledText], Sequence[str]]:
    """(prompt, index of the right option) of every row of a file, and what was guessed in reading."""
    read, prompts = read_rows(expanded_path(file), split), []
    names = read.class_names.get(label_column)
    for number, row in enumerate(read.rows, start=1):
        try:
            prompt = template.prompt(row)
            if label_column not in row:
                raise TaskError(
                    f"no column `{label_column}`; there are {', '.join(map(str, row))}{near_name(label_column, row)}"
                )
            prompts.append((prompt, template.option_of(row[label_column], names)))
        except TaskError as cause:
            raise TaskError(f"{file}, row {number}: {cause}") from None
    if not prompts:
        raise TaskError(f"{file} holds no rows; it should hold one example per row")
    return prompts, [note for note in read.notes if note]


def encode_prompt(
    prompt: str,
    label: int,
    options: Mapping[str, str],
    tokenizer: TextTokenizer,
    encoder: Encoder,
    where: str,
) -> Example:
    """A prompt with each of its options, as rows of tokens. A long prompt loses its beginning: its end asks.

    Args:
        prompt: the text.
        label: the index of the right option.
        options: label -> continuation.
        tokenizer: the model's.
        encoder: counts what is cut.
        where: the file and the row, for errors.

    Raises:
        TaskError: if an option gives no token of its own, or leaves no room for a token before it, or the model cannot
            read the row.
    """
    rows, lengths, wholes = [], [], []
    prompt_ids = tokenizer.encode_open(prompt)
    for name, option in options.items():
        whole = ids = tokenizer.encode_open(prompt + option)
        if ids == prompt_ids[: len(ids)]:
            raise TaskError(
                f"{where}: the option {option!r} of `{name}` gives no token of its own after this prompt: the "
                "tokenizer drops it; write it otherwise"
            )
        shared = _shared_prefix(prompt_ids, ids)
        length = len(ids) - shared
        if len(ids) > encoder.max_tokens:
            keep = encoder.max_tokens - tokenizer.opening
            ids = (*ids[: tokenizer.opening], *ids[len(ids) - keep :])
        if length >= len(ids):
            raise TaskError(
                f"{where}: the option {option!r} of `{name}` has {length} tokens, which leaves none before it of the "
                f"{len(ids)} that the row has; raise task.max_tokens, or let the prompt end with a space or a line end"
            )
        rows.append(ids)
        wholes.append(whole)
        lengths.append(length)
    longest = max(range(len(wholes)), key=lambda index: len(wholes[index]))
    encoder.counted(wholes[longest], rows[longest])  # one row of the file, whatever its options
    example = Example(rows=tuple(rows), label=label, option_lengths=tuple(lengths))
    encoder.check({where: [example]})
    return example


def _shared_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """The number of tokens that a and b both begin with, less than all of b: a tokenizer may join prompt and answer."""
    limit = min(len(a), len(b) - 1)
    return next((index for index in range(limit) if a[index] != b[index]), limit)

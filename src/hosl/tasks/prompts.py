"""The paper's six tasks as prompts: a template and candidate answers per task, scored by a language model.

Templates follow MeZO's (arXiv 2305.17333). The loss is taken on the tokens of the right candidate only. The prediction
is the candidate with the highest mean log-likelihood per token. Rows come from a folder, in the fields of GLUE and
SuperGLUE.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from hosl.core.targets import Batch
from hosl.errors import TaskError
from hosl.tasks.base import Example, content_order
from hosl.tasks.collate import option_batch
from hosl.tasks.configs import PromptsConfig
from hosl.tasks.encoding import Encoder
from hosl.tasks.labels import class_counts, text_of
from hosl.tasks.rows import expanded_path, read_rows
from hosl.tasks.tokenizer import TextTokenizer


@dataclass(frozen=True, slots=True)
class Template:
    """The prompt of a row, and the candidate answers."""

    prompt: Callable[[dict[str, Any]], str]
    options: tuple[str, ...]
    """The answers, in the order of the labels; each follows the prompt directly."""
    labels: tuple[Any, ...]
    """The values of the row's `label`, in the same order."""


TEMPLATES: dict[str, Template] = {
    "SST-2": Template(lambda r: f"{r['sentence'].strip()} It was", (" terrible", " great"), (0, 1)),
    "CB": Template(
        lambda r: f'Suppose {r["premise"]} Can we infer that "{r["hypothesis"]}"? Yes, No, or Maybe?\n',
        ("Yes", "No", "Maybe"),
        ("entailment", "contradiction", "neutral"),
    ),
    "RTE": Template(
        lambda r: f'{r["premise"]}\nDoes this mean that "{r["hypothesis"]}" is true? Yes or No?\n',
        ("Yes", "No"),
        ("entailment", "not_entailment"),
    ),
    "WiC": Template(
        lambda r: (
            f'Does the word "{r["word"]}" have the same meaning in these two sentences? Yes, No?\n'
            f"{r['sentence1']}\n{r['sentence2']}\n"
        ),
        ("No", "Yes"),
        (False, True),
    ),
    "WSC": Template(
        lambda r: (
            f'{r["text"]}\nIn the previous sentence, does the pronoun "{r["target"]["span2_text"].lower()}" '
            f"refer to {r['target']['span1_text']}? Yes or No?\n"
        ),
        ("No", "Yes"),
        (False, True),
    ),
    "BoolQ": Template(
        lambda r: f"{r['passage']} {r['question'][:1].upper()}{r['question'][1:].rstrip('?')}?\n",
        ("No", "Yes"),
        (False, True),
    ),
}


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
    """Read, sample and encode: train and dev from the official train split, test from the official validation split.

    Rows of train and dev whose prompt is in test are dropped, and rows of train whose prompt is in dev. Where the train
    split is small (CB has 250 rows), dev takes at most a third of it.

    Raises:
        TaskError: if a file is missing, or a row lacks a field or has an unknown label.
    """
    folder, template = expanded_path(config.folder), TEMPLATES[config.name]
    task_folder = folder / config.name if (folder / config.name).is_dir() else folder
    official = _prompts(task_folder / "train.jsonl", template)
    test = _prompts(task_folder / "validation.jsonl", template)
    held_out = {prompt for prompt, _ in test}
    pool = [pair for pair in dict.fromkeys(official) if pair[0] not in held_out]
    order = content_order([prompt for prompt, _ in pool], seed)
    dev_rows = min(config.dev_rows or len(pool), len(pool) // 3)
    dev = [pool[i] for i in order[:dev_rows]]
    in_dev = {prompt for prompt, _ in dev}
    train = [pool[i] for i in order[dev_rows:] if pool[i][0] not in in_dev][: config.train_rows]
    if config.test_rows is not None:
        test = [test[i] for i in content_order([prompt for prompt, _ in test], seed=0)[: config.test_rows]]
    for name, part in (("train", train), ("dev", dev), ("test", test)):
        if not part:
            raise TaskError(f"{task_folder}: no row is left for {name} once the splits are disjoint")
    parts, encoder = {"train": train, "dev": dev, "test": test}, Encoder(tokenizer, config.max_tokens)
    encoded = {
        name: [_encode(prompt, label, template, tokenizer, encoder) for prompt, label in part]
        for name, part in parts.items()
    }
    encoder.check(encoded)
    labels = tuple(option.strip() for option in template.options)
    counts = class_counts(labels, {name: [label for _, label in part] for name, part in parts.items()})
    notes = (*counts, *encoder.notes())
    return PromptTask(config.name, labels, *encoded.values(), pad_id=tokenizer.pad_id, notes=notes)


class _Texts(dict[str, Any]):
    """A row whose values are texts, or rows of texts; anything else would become text unseen."""

    def __getitem__(self, key: str) -> Any:
        value = super().__getitem__(key)
        if isinstance(value, dict):
            return _Texts(value)
        try:
            return text_of(value)
        except TaskError as cause:
            raise TaskError(f"`{key}` {cause}") from None

    def __format__(self, spec: str) -> str:
        raise TaskError("an object is where text is wanted")


def _prompts(path: Path, template: Template) -> list[tuple[str, int]]:
    """(prompt, index of the right candidate) of every row of a file."""
    prompts = []
    for number, row in enumerate(read_rows(path).rows, start=1):
        try:
            prompt, label = template.prompt(_Texts(row)), row["label"]
        except (KeyError, AttributeError, TypeError, TaskError) as cause:
            fault = str(cause) if isinstance(cause, TaskError) else repr(cause)
            raise TaskError(
                f"{path}, row {number} lacks what the task needs: {fault}; it has {', '.join(row)}"
            ) from cause
        if label not in template.labels:
            raise TaskError(f"{path}, row {number}: label {label!r} is none of {template.labels}")
        prompts.append((prompt, template.labels.index(label)))
    return prompts


def _encode(
    prompt: str, label: int, template: Template, tokenizer: TextTokenizer, encoder: Encoder
) -> Example:
    rows, lengths = [], []
    prompt_ids = tokenizer.encode_open(prompt)
    for option in template.options:
        whole = ids = tokenizer.encode_open(prompt + option)
        shared = _shared_prefix(prompt_ids, ids)
        length = len(ids) - shared
        if len(ids) > encoder.max_tokens:  # cut the prompt's beginning: its end asks the question
            keep = encoder.max_tokens - tokenizer.opening
            ids = (*ids[: tokenizer.opening], *ids[len(ids) - keep :])
        rows.append(encoder.counted(whole, ids))
        lengths.append(length)
    return Example(rows=tuple(rows), label=label, option_lengths=tuple(lengths))


def _shared_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """The number of tokens that a and b both begin with, less than all of b: a tokenizer may join prompt and answer."""
    limit = min(len(a), len(b) - 1)
    return next((index for index in range(limit) if a[index] != b[index]), limit)

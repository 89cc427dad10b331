"""The settings of a task in a config. No tokenizer and no data is read here."""

from typing import Literal, TypeAlias

import msgspec

from hosl.errors import ConfigError


class _Sizes(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    max_tokens: int | Literal["auto"] = 64
    """The largest number of tokens of a text, special tokens included; longer texts are cut. auto: no text is cut that
    fits the model's positions."""

    def __post_init__(self) -> None:
        if self.max_tokens != "auto" and self.max_tokens < 8:
            raise ConfigError(f"task.max_tokens must be >= 8 or auto, got {self.max_tokens}")
        for name in ("train_rows", "dev_rows", "test_rows"):
            rows = getattr(self, name, None)
            if rows is not None and rows < 1:
                raise ConfigError(f"task.{name} must be >= 1, got {rows}; leave it out for all rows")


class DocstringsConfig(_Sizes, frozen=True, kw_only=True, tag_field="kind", tag="docstrings"):
    """The embedded task: which package of Python's standard library does a docstring come from? It needs no data."""

    train_rows: int | None = None
    """The number of training rows, chosen by the seed; default: all."""


class FilesConfig(_Sizes, frozen=True, kw_only=True, tag_field="kind", tag="files"):
    """Your own labelled text: CSV, TSV, JSON, JSON Lines, Parquet, or the folder of a Hugging Face dataset."""

    train: str
    """The file or folder to train on."""
    dev: str | None = None
    """The file or folder to choose by; default: a tenth of the training rows, by label and content hash."""
    test: str | None = None
    """The file or folder to report on; default: 15 % of the training rows, by label and content hash."""
    text_column: str = "text"
    """The column of the text."""
    label_column: str = "label"
    """The column of the label, a string or an integer."""
    labels: tuple[str | int, ...] | None = None
    """The classes in their order, the same on every device; data with others is refused. Default: the names that a
    dataset has of its own, else the labels of training, whole numbers by value and other text sorted."""
    train_rows: int | None = None
    """The number of training rows, chosen by the seed; default: all."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.labels is not None and len(self.labels) < 2:
            raise ConfigError(f"task.labels needs two classes or more, got {len(self.labels)}")


class PromptsConfig(_Sizes, frozen=True, kw_only=True, tag_field="kind", tag="prompts"):
    """One of the paper's six tasks as prompts, candidates scored by a language model."""

    name: Literal["SST-2", "CB", "RTE", "WiC", "WSC", "BoolQ"]
    """The task's name in the paper."""
    folder: str
    """The folder of NAME/train.jsonl and NAME/validation.jsonl, in the fields of GLUE and SuperGLUE; it may contain
    environment variables."""
    train_rows: int | None = 1000
    """The number of rows from the official train split, chosen by the seed (MeZO's protocol: 1,000)."""
    dev_rows: int | None = 500
    """The number of other rows from the official train split; at most a third of that split."""
    test_rows: int | None = None
    """The number of rows from the official validation split; default: all."""


class SftConfig(_Sizes, frozen=True, kw_only=True, tag_field="kind", tag="sft"):
    """Your own text, instructions or chats to learn: rows of `text`, of `prompt` and `completion`, or of `messages`."""

    train: str
    """The file or folder to train on; python-docstrings: functions of this Python's library and their docstrings."""
    dev: str | None = None
    """The file or folder to choose by; default: a tenth of the training rows, by content hash."""
    test: str | None = None
    """The file or folder to report on; default: a tenth of the training rows, by content hash."""
    max_tokens: int | Literal["auto"] = 512
    """The largest number of tokens of a row. Longer rows are cut: a prompt or a chat at its beginning, a text at its
    end. auto: no row is cut that fits the model's positions."""
    loss_on: Literal["completion", "assistant", "all"] | None = None
    """The tokens that are learned; default: those of the completion where there is one, of the assistant's turns in
    messages, all of a text."""
    chat_template: str | None = None
    """A file with a chat template in Jinja2; default: the tokenizer's own."""
    group_by_length: bool = True
    """Whether a batch has rows of like lengths, which pads less; which rows share a step is drawn all the same."""
    train_rows: int | None = None
    """The number of training rows, chosen by the seed; default: all."""


TaskConfig: TypeAlias = DocstringsConfig | FilesConfig | PromptsConfig | SftConfig

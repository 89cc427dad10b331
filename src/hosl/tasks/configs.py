"""What a config can say of a task. No tokenizer and no data is touched here."""

from typing import Literal, TypeAlias

import msgspec

from hosl.errors import ConfigError


class _Sizes(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    max_tokens: int = 64
    """Longer texts are cut, special tokens included."""

    def __post_init__(self) -> None:
        if self.max_tokens < 8:
            raise ConfigError(f"task.max_tokens must be >= 8, got {self.max_tokens}")
        for name in ("train_rows", "dev_rows", "test_rows"):
            rows = getattr(self, name, None)
            if rows is not None and rows < 1:
                raise ConfigError(f"task.{name} must be >= 1, got {rows}; leave it out for all rows")


class DocstringsConfig(_Sizes, frozen=True, kw_only=True, tag_field="kind", tag="docstrings"):
    """Which package of Python's standard library a docstring comes from; needs no data."""

    train_rows: int | None = None
    """Training rows, chosen by the seed; default: all."""


class FilesConfig(_Sizes, frozen=True, kw_only=True, tag_field="kind", tag="files"):
    """Your own labelled text: CSV, JSONL, Parquet, or the folder of a Hugging Face dataset."""

    train: str
    """The file or folder to train on."""
    dev: str | None = None
    """Default: a tenth of train, by content hash."""
    test: str | None = None
    """Default: 15 % of train, by content hash."""
    text_column: str = "text"
    """Where the text stands."""
    label_column: str = "label"
    """Where the label stands; strings or integers."""
    train_rows: int | None = None
    """Training rows, chosen by the seed; default: all."""


class PromptsConfig(_Sizes, frozen=True, kw_only=True, tag_field="kind", tag="prompts"):
    """One of the paper's six tasks as prompts, candidates scored by a language model."""

    name: Literal["SST-2", "CB", "RTE", "WiC", "WSC", "BoolQ"]
    """Which task."""
    folder: str
    """Holds NAME/train.jsonl and NAME/validation.jsonl in GLUE's and SuperGLUE's own fields; variables allowed."""
    train_rows: int | None = 1000
    """From the official train split, chosen by the seed (MeZO's protocol: 1,000)."""
    dev_rows: int | None = 500
    """From the official train split, other rows; at most a third of them."""
    test_rows: int | None = None
    """From the official validation split; default: all."""


TaskConfig: TypeAlias = DocstringsConfig | FilesConfig | PromptsConfig

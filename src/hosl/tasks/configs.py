"""The settings of a task in a config. No tokenizer and no data is read here."""

import re
from typing import Literal, TypeAlias

import msgspec

from hosl.errors import ConfigError
from hosl.tasks.templates import TEMPLATES, Template


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


class _Options(dict[str, str]):
    """Options in their order, which counts when two configs are compared; hashable, as settings are. Never changed."""

    def __hash__(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        return hash(tuple(self.items()))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, dict) and list(self.items()) == list(other.items())


class PromptsConfig(_Sizes, frozen=True, kw_only=True, tag_field="kind", tag="prompts"):
    """Prompts made of your own columns, whose options a language model scores; or one of the paper's six tasks."""

    template: str | None = None
    """The prompt of a row, such as "{text}\\nSentiment:": columns in braces, a brace of the text itself twice."""
    options: dict[str | int, str] | None = None
    """The continuation that stands for each label, such as {negative: " negative", positive: " positive"}, the labels
    in their order; it follows the prompt directly, its space included."""
    name: Literal["SST-2", "CB", "RTE", "WiC", "WSC", "BoolQ"] | None = None
    """A task of the paper, in place of template and options."""
    folder: str | None = None
    """The folder of a task of the paper: NAME/train.jsonl and NAME/validation.jsonl (or .parquet, or a saved dataset),
    in the fields of GLUE and SuperGLUE; environment variables allowed."""
    train: str | None = None
    """The file or folder to train on, in place of `folder`; formats as in kind: files."""
    dev: str | None = None
    """The file or folder to choose by; default: a tenth of the training rows, by label and content hash."""
    test: str | None = None
    """The file or folder to report on; default: 15 % of the training rows, by label and content hash."""
    label_column: str = "label"
    """The column of the label: a key of `options`, or in the paper's tasks also an option's number from 0."""
    train_rows: int | Literal["auto"] | None = "auto"
    """The number of training rows, chosen by the seed; auto: 1000 of a `folder` (MeZO's protocol), else all."""
    dev_rows: int | Literal["auto"] | None = "auto"
    """The number of dev rows, chosen by content; auto: 500 of a `folder`, else all. Of a `folder` at most a
    third of its train split."""
    test_rows: int | None = None
    """The number of test rows, chosen by content; default: all."""

    def __post_init__(self) -> None:
        for name, usual in (("train_rows", 1000), ("dev_rows", 500)):
            if getattr(self, name) == "auto":
                msgspec.structs.force_setattr(self, name, None if self.folder is None else usual)
        super().__post_init__()
        self._check_source()
        if self.name is not None:
            if self.template is not None or self.options is not None:
                raise ConfigError(
                    f"task.name: {self.name} has a template and options of its own; leave out task.template and "
                    "task.options, or task.name"
                )
            return
        if self.template is None or self.options is None:
            lacking = "template" if self.template is None else "options"
            raise ConfigError(
                f"task.kind: prompts needs a template and options, {lacking} is missing; or task.name, a task of the "
                f"paper: {', '.join(TEMPLATES)}"
            )
        self._check_own(self.template, self.options)

    def _check_source(self) -> None:
        """Refuse a task without data, or with two sources of them."""
        files = [name for name in ("train", "dev", "test") if getattr(self, name) is not None]
        if self.folder is not None and (files or self.name is None):
            wrong = f"task.{files[0]}" if files else "task.template"
            raise ConfigError(
                f"task.folder is for a task of the paper, by task.name, and does not go with {wrong}; name your own "
                "files in task.train, task.dev and task.test"
            )
        if self.folder is None and self.train is None:
            other = "" if self.name is None else ", or task.folder"
            raise ConfigError(f"task.kind: prompts has no data; set task.train{other}")

    def _check_own(self, template: str, options: dict[str | int, str]) -> None:
        columns = Template(template, {}).columns
        if self.label_column in columns:
            raise ConfigError(
                f"task.template names the column of the label, {{{self.label_column}}}: the prompt would hold the "
                "answer; take it out, or set task.label_column"
            )
        named = {str(key): text for key, text in options.items()}  # as they are read back from JSON
        if len(named) < 2 or len({*named.values()}) < len(options):
            raise ConfigError(
                f"task.options needs two options or more, each with a continuation of its own, got {options}"
            )
        empty = [key for key, text in named.items() if not text or not key.strip()]
        if empty:
            raise ConfigError(f"task.options: `{empty[0]}` is empty, or its continuation is; write some text")
        msgspec.structs.force_setattr(self, "options", _Options(named))

    def rows_of(self, part: Literal["train", "dev", "test"]) -> int | None:
        """The number of rows of a part; None: all."""
        rows: int | None = getattr(self, f"{part}_rows")  # auto is a number since the config was made
        return rows

    def as_template(self) -> Template:
        """The prompt and its options."""
        if self.name is not None:
            return TEMPLATES[self.name]
        assert self.template is not None, "checked when the config was made"
        return Template(self.template, {str(key): text for key, text in (self.options or {}).items()})


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
    metric: str | None = None
    """module:function, a metric of your own over the answers to held-out rows, in `hosl train` and `hosl eval`: a
    function of the answers and the references, two lists of texts, to a number or a mapping of names to numbers."""
    metric_rows: int = 50
    """The most rows that are answered for `metric`."""
    metric_tokens: int = 64
    """The largest number of tokens of such an answer."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.metric is not None and not re.fullmatch(r"[\w.]+:\w+", self.metric):
            raise ConfigError(
                f"task.metric must be module:function, such as my_metrics:exact_match, got {self.metric!r}"
            )
        for name in ("metric_rows", "metric_tokens"):
            if getattr(self, name) < 1:
                raise ConfigError(f"task.{name} must be >= 1, got {getattr(self, name)}")


TaskConfig: TypeAlias = DocstringsConfig | FilesConfig | PromptsConfig | SftConfig

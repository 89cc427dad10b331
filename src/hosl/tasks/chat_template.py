"""A tokenizer's chat template: messages -> the text that the model was tuned to read, in Jinja2's sandbox.

Templates come with a model and are not trusted: they see plain data alone and reach none of Python's objects, as
transformers has it (`transformers.utils.chat_template_utils`), which is not needed here.
"""

import json
import re
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any

from hosl.errors import TaskError
from hosl.system.own_files import own_file
from hosl.tasks.model_settings import model_settings, token_text

_SPECIAL = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_BEGIN, _END = "\0hosl begins an answer\0", "\0hosl ends an answer\0"
"""What stands around the text of `{% generation %}` while answers are looked for; no text of a row has NUL in it."""
_REASONING = ("reasoning_content", "thinking", "reasoning")
"""Names under which a message may carry its reasoning; transformers gives templates all of them."""


class ChatTemplate:
    """The chat template of a model's folder."""

    def __init__(self, source: str, special_tokens: Mapping[str, str]) -> None:
        """Compile a template.

        Args:
            source: the template, in Jinja2.
            special_tokens: the tokens that it may name, such as bos_token.

        Raises:
            TaskError: if it is no template, or Jinja2 is not installed.
        """
        self._source, self._special_tokens = source, dict(special_tokens)
        self._template = _compiled(source, marked=False)

    @classmethod
    def load(cls, folder: Path, file: Path | None = None) -> "ChatTemplate":
        """The template of a file, else of the folder's chat_template.jinja, else of its tokenizer_config.json.

        Args:
            folder: the folder of a model, or of a half.
            file: a template to take in place of the model's.

        Raises:
            TaskError: if there is none, or a file is damaged.
        """
        settings = model_settings(folder, "special_tokens_map.json")
        settings |= model_settings(folder, "tokenizer_config.json")
        template = settings.get("chat_template")
        if isinstance(template, list):  # several, each with a name
            named = {t.get("name"): t.get("template") for t in template if isinstance(t, dict)}
            template = named.get("default")
        own = own_file(folder, "chat_template.jinja") if file is None else file
        if file is not None or own.is_file():
            try:
                template = own.read_text(encoding="utf-8")
            except (OSError, ValueError) as cause:
                raise TaskError(f"chat template {own} cannot be read as text: {cause}") from cause
        if not isinstance(template, str):
            raise TaskError(
                f"{folder} has no chat template: the model was not made for chats; name a file in task.chat_template, "
                "or give plain text"
            )
        texts = {name: token_text(settings.get(name)) for name in _SPECIAL}
        return cls(template, {name: text for name, text in texts.items() if text is not None})

    @property
    def marks_answers(self) -> bool:
        """Whether the template says by `{% generation %}` which text is the assistant's."""
        return re.search(r"\{%-?\s*generation\s*-?%\}", self._source) is not None

    @property
    def asks_for_the_time(self) -> bool:
        """Whether the text of a chat may be another tomorrow."""
        return "strftime_now" in self._source

    def text(
        self, messages: Sequence[Mapping[str, Any]], *, answer_follows: bool, tools: object = None
    ) -> str:
        """The text of a chat; with the opening of the assistant's next turn if `answer_follows`.

        Raises:
            TaskError: if the template refuses the messages, or fails.
        """
        return self._rendered(self._template, messages, answer_follows, tools)

    def answers(
        self, messages: Sequence[Mapping[str, Any]], *, tools: object = None
    ) -> tuple[str, list[tuple[int, int]]]:
        """The text of a chat, and the spans [start, stop) of its characters within `{% generation %}`.

        Raises:
            TaskError: if the template refuses the messages, or fails.
        """
        pieces = re.split(f"({_BEGIN}|{_END})", self._rendered(self._marked, messages, False, tools))
        text, spans, start = "", [], 0
        for piece in pieces:
            if piece == _BEGIN:
                start = len(text)
            elif piece == _END:
                spans.append((start, len(text)))
            else:
                text += piece
        return text, [span for span in spans if span[0] < span[1]]

    @cached_property
    def _marked(self) -> Any:
        return _compiled(self._source, marked=True)

    def _rendered(
        self, template: Any, messages: Sequence[Mapping[str, Any]], answer_follows: bool, tools: object
    ) -> str:
        chat = [_named_reasoning({k: v for k, v in m.items() if v is not None}) for m in messages]
        try:
            return template.render(
                messages=_plain(chat), tools=_plain(tools), documents=None, add_generation_prompt=answer_follows,
                **self._special_tokens,
            )  # fmt: skip
        except Exception as cause:  # a template may raise anything
            raise TaskError(f"the chat template fails on these messages: {cause}") from cause


def _named_reasoning(message: dict[str, Any]) -> dict[str, Any]:
    reasoning = next((message[key] for key in _REASONING if key in message), None)
    if reasoning is None:
        return message
    return {"thinking": reasoning, **message, "reasoning_content": reasoning}


def _plain(value: Any) -> Any:
    """Data of plain types: other objects, such as dates of a Parquet file, have methods that no sandbox knows."""
    if isinstance(value, Mapping):
        return {_plain(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value if value is None or type(value) in (str, int, float, bool) else f"<{type(value).__name__}>"


def _compiled(source: str, *, marked: bool) -> Any:
    """A template in the sandbox, with what transformers gives to chat templates.

    Args:
        source: the template.
        marked: whether `_BEGIN` and `_END` stand around the text of `{% generation %}`.
    """
    try:
        import jinja2
    except ImportError:
        raise TaskError("chats need jinja2: `pip install 'hosl[chat]'`") from None
    from jinja2 import nodes
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """`{% generation %}`: a template marks the assistant's words by it."""

        tags = {"generation"}  # noqa: RUF012  (Jinja2 reads it from the class)

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.CallBlock(self.call_method("_around"), [], [], body).set_lineno(line)

        def _around(self, caller: Any) -> str:
            return f"{_BEGIN}{caller()}{_END}" if marked else caller()

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    environment: Any = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = _json
    environment.globals |= {
        "raise_exception": raise_exception, "strftime_now": _strftime_now, "dict": _Dict(), "namespace": _namespace(),
    }  # fmt: skip
    try:
        return environment.from_string(source)
    except jinja2.TemplateError as cause:
        raise TaskError(f"the chat template is no Jinja2 template: {cause}; fetch it again") from cause


def _json(
    value: Any,
    ensure_ascii: bool = False,
    indent: Any = None,
    separators: Any = None,
    sort_keys: bool = False,
) -> str:
    """JSON as it is: Jinja2's own filter escapes HTML."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)


class _Dict:
    """`dict` in a template, without the class's attributes."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args)


def _namespace() -> Any:
    """`namespace` in a template, which keeps no name that begins with an underscore."""
    import jinja2

    def check(name: object) -> None:
        if isinstance(name, str) and name.startswith("_"):
            raise jinja2.TemplateError(f"a namespace keeps no {name!r}: its name begins with an underscore")

    class Namespace(jinja2.utils.Namespace):
        """Jinja2's own, checked."""

        def __init__(*args: Any, **kwargs: Any) -> None:  # as Jinja2 has it: `self` is a name, too
            attributes = dict(*args[1:], **kwargs)
            for name in attributes:
                check(name)
            jinja2.utils.Namespace.__init__(args[0], attributes)

        def __setitem__(self, name: str, value: Any) -> None:
            check(name)
            super().__setitem__(name, value)

    return Namespace

"""A tokenizer's chat template: messages -> the text that the model was tuned to read, in Jinja2's sandbox.

Templates come with a model and are not trusted: they run without access to Python's objects, as transformers has it.
"""

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from hosl.errors import TaskError
from hosl.system.own_files import own_file

_SPECIAL = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


class ChatTemplate:
    """The chat template of a model's folder."""

    def __init__(self, source: str, special_tokens: Mapping[str, str]) -> None:
        """Compile a template.

        Args:
            source: the template, in Jinja2.
            special_tokens: the tokens that it may name, such as bos_token.

        Raises:
            TaskError: if it is no template.
            ModuleNotFoundError: without Jinja2; `hosl.cli.main` says what to install.
        """
        import jinja2

        self._special_tokens = dict(special_tokens)
        try:
            self._template = _sandbox().from_string(source)
        except jinja2.TemplateError as cause:
            raise TaskError(f"the chat template is no Jinja2 template: {cause}; fetch it again") from cause

    @classmethod
    def load(cls, folder: Path) -> "ChatTemplate":
        """The template of chat_template.jinja, else of tokenizer_config.json.

        Raises:
            TaskError: if there is none, or a file is damaged.
        """
        settings = _settings(folder)
        file = own_file(folder, "chat_template.jinja")
        template = settings.get("chat_template")
        if isinstance(template, list):  # several, each with a name
            named = {t.get("name"): t.get("template") for t in template if isinstance(t, dict)}
            template = named.get("default")
        if file.is_file():
            template = file.read_text(encoding="utf-8")
        if not isinstance(template, str):
            raise TaskError(
                f"{folder} has no chat template: the model was not made for chats; give the prompt as plain text"
            )
        tokens = {name: settings.get(name) for name in _SPECIAL}
        texts = {name: t.get("content") if isinstance(t, dict) else t for name, t in tokens.items()}
        return cls(template, {name: text for name, text in texts.items() if isinstance(text, str)})

    def text(self, messages: Sequence[Mapping[str, Any]], *, answer_follows: bool) -> str:
        """The text of a chat; with the opening of the assistant's next turn if `answer_follows`.

        Raises:
            TaskError: if the template refuses the messages, or fails.
        """
        try:
            return self._template.render(
                messages=[dict(message) for message in messages], tools=None, documents=None,
                add_generation_prompt=answer_follows, **self._special_tokens,
            )  # fmt: skip
        except Exception as cause:  # a template may raise anything
            raise TaskError(f"the chat template fails on these messages: {cause}") from cause


def _settings(folder: Path) -> dict[str, Any]:
    file = own_file(folder, "tokenizer_config.json")
    if not file.is_file():
        return {}
    try:
        settings = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as cause:
        raise TaskError(f"{file} cannot be read as JSON: {cause}; fetch it again") from cause
    return settings if isinstance(settings, dict) else {}


def _sandbox() -> Any:
    """Jinja2's sandbox with what transformers gives to chat templates."""
    import jinja2
    from jinja2 import nodes
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """`{% generation %}`: a template marks the assistant's words by it."""

        tags = {"generation"}  # noqa: RUF012  (Jinja2 reads it from the class)

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.Scope(body, lineno=line)

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    def tojson(value: Any, indent: int | None = None, ensure_ascii: bool = False) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent)  # Jinja2's own escapes HTML

    environment: Any = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals |= {"raise_exception": raise_exception, "strftime_now": datetime.now().strftime}
    return environment

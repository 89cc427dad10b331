"""The prompts of `hosl generate`, with the answers that are wanted where a file tells them."""

import sys
from dataclasses import dataclass
from pathlib import Path

import msgspec

from hosl.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt."""

    text: str
    wanted: str | None = None
    """The answer that its row holds; None: not known."""


_NOT_READ = frozenset({".csv", ".tsv", ".json", ".parquet", ".gz", ".arrow"})
"""The endings of files of rows, each line of which would be taken for a prompt."""


class _Row(msgspec.Struct):
    prompt: str
    completion: str | None = None


def read_prompts(texts: list[str], file: str | None) -> list[Prompt]:
    """The prompts of a command, in order: those given, then those of a file.

    Args:
        texts: `--prompt`; - stands for standard input.
        file: `--prompts`: a text file with a prompt per line, or rows `prompt`, `completion` as JSON Lines (.jsonl).

    Raises:
        ConfigError: if there is none, or the file cannot be read; of rows with the number of the line.
    """
    prompts = [Prompt(sys.stdin.read() if text == "-" else text) for text in texts]
    if file is not None:
        prompts += _of_file(Path(file))
    if not prompts:
        raise ConfigError(
            "there is no prompt; give --prompt TEXT, --prompt - or --prompts FILE with one per line"
        )
    return prompts


def _of_file(file: Path) -> list[Prompt]:
    if file.suffix.lower() in _NOT_READ:
        raise ConfigError(
            f"--prompts {file}: rows of {file.suffix} are not read as prompts; allowed: .jsonl or .ndjson with rows of "
            "`prompt`, or a text file with a prompt per line"
        )
    try:
        lines = file.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as cause:
        raise ConfigError(
            f"--prompts {file} cannot be read: {cause}; give a text file in UTF-8, a prompt per line"
        ) from cause
    if file.suffix not in (".jsonl", ".ndjson"):
        return [Prompt(line.rstrip("\r")) for line in lines if line.strip()]
    prompts = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = msgspec.json.decode(line.encode(), type=_Row)
        except msgspec.MsgspecError as cause:
            raise ConfigError(
                f'--prompts {file}, row {number}: {cause}; a row reads {{"prompt": "...", "completion": "..."}}, '
                "the completion only where it is known"
            ) from cause
        prompts.append(Prompt(row.prompt, row.completion))
    return prompts

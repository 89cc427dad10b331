"""The option --gguf of the commands that write a model: also as one GGUF file, for llama.cpp."""

from pathlib import Path
from typing import Any

from hosl.cli.answers import Parser, say


def add_gguf(parser: Parser) -> None:
    """Add the options."""
    parser.add_argument("--gguf", metavar="FILE", help="also as a GGUF file; models of the Llama family")
    parser.add_argument(
        "--gguf-dtype", choices=("float32", "float16"), default="float32", help="of the file's matrices"
    )


def gguf_written(folder: Path, file: Path, dtype: Any) -> dict[str, Any]:
    """Write the model in `folder` as a GGUF file; returns what is told of it.

    Raises:
        ConfigError, FolderError, FailureError: see `hosl.split.gguf_export.write_gguf`.
    """
    from hosl.split.gguf_export import write_gguf

    size = write_gguf(folder, file, say, dtype=dtype)
    return {"gguf": str(file), "gguf_bytes": size}

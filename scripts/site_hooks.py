"""Hooks of the documentation's site (mkdocs.yml): a relative link that leaves docs/ becomes one to the repository.

So pages can link to sources as they do on any host of the repository, `[rounds.py](../../src/hosl/core/rounds.py)`, and
a link to a file that is gone fails a strict build. A page without parts has no table of contents: its tables take the
place.
"""

import logging
import os
import re
from pathlib import Path
from typing import Any

_LINK = re.compile(r"(\]\()((?:\.\./)+[^)\s#]*)((?:#[^)\s]*)?\))")
_FENCE = re.compile(r"(^```.*?^```)", re.DOTALL | re.MULTILINE)
log = logging.getLogger("mkdocs.hooks.site")


def on_page_markdown(markdown: str, *, page: Any, config: Any, files: Any) -> str:
    """Called by mkdocs with each page's source; fenced code stays as it is."""
    if not re.search(r"^##", markdown, re.MULTILINE):
        page.meta.setdefault("hide", ["toc"])
    docs = Path(config.docs_dir)
    folder = Path(page.file.abs_src_path).parent

    def to_repository(match: re.Match[str]) -> str:
        target = Path(os.path.normpath(folder / match[2]))
        if target.is_relative_to(docs):
            return match[0]
        path = os.path.relpath(target, docs.parent)
        if not target.exists():
            log.warning(
                "Doc file '%s' links to '%s', but the repository has no such file", page.file.src_uri, path
            )
        kind = "tree" if target.is_dir() else "blob"
        return f"{match[1]}{config.extra['repository']}/{kind}/main/{path}{match[3]}"

    pieces = _FENCE.split(markdown)
    return "".join(p if p.startswith("```") else _LINK.sub(to_repository, p) for p in pieces)

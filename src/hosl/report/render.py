"""Templates filled in: HTML pages, Markdown and LaTeX tables. Needs Jinja2, of the extra `report`."""

import importlib.util
from typing import Any

from hosl.errors import ConfigError
from hosl.report.style import css_variables
from hosl.system.readable import readable_bytes, readable_seconds

_INSTALL = "pip install 'hosl[report]'"
_LATEX = str.maketrans({
    "\\": r"\textbackslash ", "±": r"$\pm$", **{sign: f"\\{sign}" for sign in "&%_#{}"},
})  # fmt: skip


def can_render() -> bool:
    """Whether Jinja2 and what statistics need are there."""
    return all(importlib.util.find_spec(name) is not None for name in ("jinja2", "scipy"))


def check_can_render() -> None:
    """Refuse to begin what would end without a page.

    Raises:
        ConfigError: if the extra `report` is not installed.
    """
    if not can_render():
        raise ConfigError(f"pages and tables need Jinja2 and scipy: {_INSTALL}")


def no_page(run: object) -> str:
    """Line that stands for the page of a run where the extra is missing."""
    return f"report.html was not written: {_INSTALL}, then hosl report {run}"


def rendered(template: str, **content: Any) -> str:
    """The file `template` of the folder templates, filled with `content`; text is escaped in HTML."""
    import jinja2

    loader, undefined = jinja2.PackageLoader("hosl.report"), jinja2.StrictUndefined
    if template.endswith(".tex.jinja"):  # braces are LaTeX's own
        environment = jinja2.Environment(
            "<%", "%>", "<<", ">>", "<#", "#>", trim_blocks=True, loader=loader, undefined=undefined
        )
    else:
        environment = jinja2.Environment(
            trim_blocks=True, lstrip_blocks=True, loader=loader, undefined=undefined,
            autoescape=template.endswith(".html.jinja"),
        )  # fmt: skip
    environment.filters |= {
        "bytes": readable_bytes, "seconds": readable_seconds, "latex": lambda text: text.translate(_LATEX),
    }  # fmt: skip
    palette = css_variables(dark=False), css_variables(dark=True)
    return environment.get_template(template).render(content, palette=palette)

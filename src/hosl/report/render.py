"""Templates filled in: HTML pages, Markdown and LaTeX tables. Needs Jinja2; so does torch, but a device has neither."""

import importlib.util
from typing import Any

from hosl.errors import ConfigError
from hosl.report.style import css_variables
from hosl.system.readable import readable_bytes, readable_seconds

_INSTALL = "pip install 'hosl[report]'"
_LATEX = str.maketrans({
    "\\": r"\textbackslash ", "±": r"$\pm$", **{sign: f"\\{sign}" for sign in "&%_#{}"},
})  # fmt: skip


def installed() -> bool:
    """Whether there is Jinja2, which every page and table is written with."""
    return importlib.util.find_spec("jinja2") is not None


def check_installed() -> None:
    """Refuse to begin what would end without its page.

    Raises:
        ConfigError: if Jinja2 is not installed.
    """
    if not installed():
        raise ConfigError(f"reports need jinja2: {_INSTALL}")


def no_page(run: object) -> str:
    """Line that stands for the page of a run where Jinja2 is missing."""
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

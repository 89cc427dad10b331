"""The page around a report: one HTML file without an outside resource or a script; how amounts are written on it."""

import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hosl.report.style import css_variables

_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>{title}</title>
<style>{style}</style></head>
<body>
<header><p class="over">{over}</p><h1>{title}</h1><p class="lead">{sentence}</p></header>
{content}
</body></html>
"""

_STYLE = """
:root { color-scheme: light dark; LIGHT }
@media screen and (prefers-color-scheme: dark) { :root { DARK } }
* { box-sizing: border-box }
body { font: 15px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif;
  color: var(--ink); background: var(--page); max-width: 62rem; margin: 0 auto; padding: 2.5rem 1.25rem 4rem }
header { margin-bottom: 1.75rem }
h1 { font-size: 1.75rem; line-height: 1.2; font-weight: 650; letter-spacing: -.015em; margin: 0 0 .5rem }
h2 { font-size: 1.1rem; font-weight: 650; letter-spacing: -.005em; margin: 0 0 .6rem }
h3 { font-size: .95rem; font-weight: 600; margin: 1.2rem 0 .4rem }
.over { color: var(--quiet); font-size: .83rem; margin: 0 0 .35rem; overflow-wrap: anywhere }
.lead { color: var(--quiet); font-size: 1.02rem; margin: 0; max-width: 48rem }
section { margin: 2.6rem 0 0; padding-top: 1.1rem; border-top: 1px solid var(--line) }
section.part { border-top-width: 2px; border-color: var(--ink) } section.part h2 { font-size: 1.35rem }
.note { color: var(--quiet); font-size: .85rem; margin: .5rem 0 0; max-width: 50rem }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(8.75rem, 1fr)); gap: .7rem }
.card { background: var(--card); border-radius: .5rem; padding: .75rem .9rem; font-size: .83rem; line-height: 1.4;
  color: var(--quiet) }
.card b { display: block; color: var(--ink); font-size: 1.35rem; font-weight: 600; line-height: 1.3;
  font-variant-numeric: tabular-nums; letter-spacing: -.01em; white-space: nowrap }
.wide { overflow-x: auto }
table { border-collapse: collapse; width: 100%; font-size: .87rem; line-height: 1.4 }
th { font-weight: 500; text-align: left } thead th { color: var(--quiet); vertical-align: bottom; font-size: .8rem }
td, th { padding: .38rem .8rem .38rem 0; border-bottom: 1px solid var(--line); vertical-align: top }
td:last-child, th:last-child { padding-right: 0 }
.n { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap }
td small { display: block; color: var(--quiet); font-size: .76rem }
tr.group th { padding-top: .9rem; font-weight: 600 } tr.group span { color: var(--quiet); font-weight: 400 }
td .name { display: block; min-width: 7rem }
.key { width: 1.75rem; height: .75rem; vertical-align: -.05rem; margin-right: .3rem; min-width: 0 }
.legend { list-style: none; display: flex; flex-wrap: wrap; gap: .2rem 1.4rem; padding: 0; margin: 0 0 .6rem;
  font-size: .87rem }
.bars td, .bars th { border: 0; padding-top: .16rem; padding-bottom: .16rem; vertical-align: middle }
.bars th { white-space: nowrap; width: 1% } .bars .n { width: 1% } .bars .track { min-width: 7rem }
.track.two i { height: .5rem; margin: 2px 0 } .bars .two + .n { font-size: .92em; line-height: 1.3 }
.facts { display: grid; grid-template-columns: repeat(auto-fill, minmax(10.5rem, 1fr)); gap: .7rem 1.2rem; margin: 0 }
.facts dt { color: var(--quiet); font-size: .78rem } .facts dd { margin: 0; overflow-wrap: anywhere; font-size: .87rem }
.track i { display: block; height: .85rem; min-width: 2px; border-radius: 2px }
.ticks { position: relative; height: 1.1rem; font-size: .74rem; color: var(--quiet) }
.ticks span { position: absolute; border-left: 1px solid var(--line); padding-left: .25rem; white-space: nowrap }
.party { display: inline-block; width: 3.6rem }
.picture { overflow-x: auto } .picture > svg { display: block; width: 100%; min-width: 38rem; height: auto }
.picture svg text { font-family: inherit; }
.picture svg * { stroke-linejoin: round }
pre, code { font-family: ui-monospace, "SF Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace; font-size: .8rem }
pre { background: var(--card); border-radius: .5rem; padding: .7rem .9rem; margin: .4rem 0 0; overflow-x: auto }
.commands code { display: block; user-select: all; -webkit-user-select: all; padding: .1rem 0 }
.commands span { color: var(--quiet); user-select: none; -webkit-user-select: none }
details { margin-top: .6rem } summary { cursor: pointer; color: var(--quiet); font-size: .9rem }
@page { margin: 14mm }
@media print {
  body { max-width: none; padding: 0; font-size: 10.5pt } .card, pre { border: 1px solid var(--line) }
  section, tbody, .picture, .cards { break-inside: avoid } section.long { break-inside: auto }
  h2, h3, thead { break-after: avoid } pre { white-space: pre-wrap; overflow-wrap: anywhere }
  .wide, .picture { overflow: visible } .picture > svg { min-width: 0 } table { font-size: 8.5pt }
  td, th { padding-right: .5rem } * { print-color-adjust: exact; -webkit-print-color-adjust: exact }
}
"""


@dataclass(frozen=True)
class Section:
    """A heading and what stands under it; without content it is left out."""

    title: str
    content: str
    note: str = ""
    """How to read it, as HTML."""
    long: bool = False
    """Whether a printed page may break within."""

    def __str__(self) -> str:
        if not self.content:
            return ""
        note = f'<p class="note">{self.note}</p>' if self.note else ""
        kind = ' class="long"' if self.long else ""
        return f"<section{kind}><h2>{html.escape(self.title)}</h2>{self.content}{note}</section>\n"


def page(title: str, over: str, sentence: str, content: Sequence[object]) -> str:
    """A whole page: a title with a line over it and a sentence below, then `content`, HTML or sections."""
    style = _STYLE.replace("LIGHT", css_variables(dark=False)).replace("DARK", css_variables(dark=True))
    return _PAGE.format(
        title=html.escape(title), over=html.escape(over), sentence=html.escape(sentence), style=style,
        content="".join(str(part) for part in content),
    )  # fmt: skip


def table(head: Sequence[str], rows: Sequence[Sequence[str]], *, words: int = 1) -> str:
    """A table that scrolls sideways; the first `words` columns hold words, the others numbers. Cells are HTML."""

    def cells(kind: str, row: Sequence[str]) -> str:
        return "".join(
            f"<{kind}{' class=n' if place >= words else ''}>{cell}</{kind}>" for place, cell in enumerate(row)
        )

    body = "".join(f"<tr>{cells('td', row)}</tr>" for row in rows)
    return f'<div class="wide"><table><thead><tr>{cells("th", head)}</tr></thead><tbody>{body}</tbody></table></div>'


def facts_list(facts: Mapping[str, Any]) -> str:
    """Names over values, side by side."""
    return '<dl class="facts">' + "".join(
        f"<div><dt>{html.escape(name)}</dt><dd>{html.escape(str(value))}</dd></div>" for name, value in facts.items()
    ) + "</dl>"  # fmt: skip


def cards(shown: Sequence[tuple[str, str]]) -> str:
    """Values with what they are of."""
    return '<div class="cards">' + "".join(
        f'<div class="card"><b>{html.escape(value)}</b>{html.escape(name)}</div>' for value, name in shown
    ) + "</div>\n"  # fmt: skip


def commands(shown: Sequence[tuple[str, str]]) -> str:
    """Commands under what they make; a click takes one whole."""
    lines = "".join(
        (f"<span># {html.escape(what)}</span>" if what else "") + f"<code>{html.escape(command)}</code>"
        for what, command in shown
    )
    return f'<pre class="commands">{lines}</pre>'


def folded(title: str, text: str) -> str:
    """Text that is shown when asked for."""
    return f"<details><summary>{html.escape(title)}</summary><pre>{html.escape(text)}</pre></details>"


def picture(svg: str) -> str:
    """A drawing in its frame; none without one."""
    return f'<div class="picture">{svg}</div>' if svg else ""


def amount(size_bytes: float | int) -> str:
    """Bytes for people: `4 B`, `1.01 MiB`."""
    for limit, unit in ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if size_bytes >= limit:
            return (
                f"{size_bytes / limit:.3g} {unit}"
                if size_bytes < 999.5 * limit
                else f"{size_bytes / limit:.0f} {unit}"
            )
    return f"{size_bytes:.0f} B"


def duration(seconds: float) -> str:
    """Seconds for people: `1.24 s`, `35 ms`."""
    if seconds >= 0.9995:
        return f"{seconds:.2f} s"
    return f"{1000 * seconds:.0f} ms" if seconds >= 0.00995 else f"{1000 * seconds:.1f} ms"


def listed(names: Sequence[str]) -> str:
    """`a, b and c`."""
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)

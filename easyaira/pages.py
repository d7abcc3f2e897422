"""HTML pages: a document in light and dark, and tables. Jinja escapes every text."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
{% if reload %}<meta http-equiv="refresh" content="{{ reload }}">
{% endif %}<title>{{ title }}</title>
<style>
:root { --ink: #1a1a1a; --paper: #fff; --soft: #f3f4f6; --rule: #d8dade; --quiet: #5c6370; }
:root { --c1: #2563a8; --c2: #c2570c; --c3: #23803f; --c4: #c22f3d; color-scheme: light dark; }
:root { --trained: #cdebd0; --masked: #e9eaec; --cut: #f6cccc; --warn: #fff3cd; }
@media (prefers-color-scheme: dark) { :root {
--ink: #e4e6ea; --paper: #16181c; --soft: #22252b; --rule: #3a3e46; --quiet: #9aa1ac;
--c1: #6fa8e8; --c2: #f0a35e; --c3: #6fc98a; --c4: #f08a93;
--trained: #1d4a2a; --masked: #33373e; --cut: #5c2429; --warn: #4a3d10; } }
body { font: 16px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); }
body { max-width: 62rem; margin: 1.5rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2rem; } h3 { font-size: 1rem; }
a { color: var(--c1); }
table { border-collapse: collapse; width: 100%; }
th, td { text-align: left; vertical-align: top; padding: .35rem .6rem; }
th, td { border-bottom: 1px solid var(--rule); }
th { font-weight: 600; white-space: nowrap; }
td.text { white-space: pre-wrap; overflow-wrap: anywhere; }
table.facts td:first-child { white-space: nowrap; color: var(--quiet); padding-left: 0; }
table.facts td:first-child { width: 1%; padding-right: 2rem; }
.wide { overflow-x: auto; } .wide td { min-width: 12rem; }
.wide td:first-child { position: sticky; left: 0; background: var(--paper); }
.figures { display: flex; flex-wrap: wrap; gap: .6rem; margin: 1rem 0; }
.figures div { background: var(--soft); border-radius: .5rem; padding: .5rem .9rem; }
.figures b { display: block; font-size: 1.15rem; } .figures span, .quiet { color: var(--quiet); }
.plots { display: grid; grid-template-columns: repeat(auto-fill, minmax(19rem, 1fr)); gap: 1rem; }
.plots { align-items: end; }
figure { margin: 0; } figcaption { font-size: .85rem; } figcaption span { white-space: nowrap; }
svg { width: 100%; height: auto; } svg text { font-size: 10px; fill: var(--quiet); }
.c1 { color: var(--c1); stroke: var(--c1); } .c2 { color: var(--c2); stroke: var(--c2); }
.c3 { color: var(--c3); stroke: var(--c3); } .c4 { color: var(--c4); stroke: var(--c4); }
.grid { stroke: var(--rule); stroke-width: .5; } .line { fill: none; stroke-width: 1.5; }
.dots { stroke-width: 4.5; stroke-linecap: round; fill: none; } .bar { stroke: none; }
.whole { fill: var(--c1); } .lost { fill: var(--c4); }
.mark { stroke: var(--ink); stroke-dasharray: 4 3; }
.card { background: var(--soft); border-radius: .5rem; padding: .6rem .9rem; margin: .6rem 0; }
.card p { margin: .3rem 0; white-space: pre-wrap; overflow-wrap: anywhere; }
.warning { background: var(--warn); border-radius: .5rem; padding: .5rem .9rem; }
pre { background: var(--soft); padding: 1rem; overflow-x: auto; font-size: .85rem; }
code { overflow-wrap: anywhere; }
</style>
<h1>{{ title }}</h1>
{{ body }}
</html>
"""
TABLE = """<table{% if not head %} class="facts"{% endif %}>
{%- if head %}<tr>{% for name in head %}<th>{{ name }}</th>{% endfor %}</tr>{% endif %}
{%- for row in rows -%}
<tr>{% for cell in row %}<td class="text">{{ cell }}</td>{% endfor %}</tr>
{%- endfor %}</table>"""

_jinja = Environment(autoescape=True, undefined=StrictUndefined, keep_trailing_newline=True)
_compiled = cache(_jinja.from_string)


def render(template: str, **values: Any) -> Markup:
    """Fill a Jinja template. Values are escaped, unless they are Markup."""
    return Markup(_compiled(template).render(values))


def table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> Markup:
    """An HTML table; without a head, its first column holds names."""
    return render(TABLE, head=head, rows=rows)


def page(title: str, template: str, *, reload: int = 0, **values: Any) -> str:
    """A complete HTML document whose body is a filled template.

    Args:
        reload: seconds after which a browser reads the page again; 0: never.
    """
    body = render(template, **values, table=table)
    return str(render(PAGE, title=title, body=body, reload=reload))

"""HTML pages: a document, tables, and figures as SVG. Jinja escapes every text."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>{{ title }}</title>
<style>
body { font: 16px/1.5 system-ui, sans-serif; color: #1a1a1a; }
body { max-width: 62rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2rem; }
table { border-collapse: collapse; width: 100%; }
th, td { text-align: left; vertical-align: top; padding: .35rem .6rem; }
th, td { border-bottom: 1px solid #ddd; }
th { font-weight: 600; white-space: nowrap; }
td.text { white-space: pre-wrap; overflow-wrap: anywhere; }
.wide { overflow-x: auto; } .wide td { min-width: 12rem; }
.wide td:first-child { position: sticky; left: 0; background: #fff; }
.warning { border-left: .3rem solid #c60; padding-left: .8rem; }
svg { max-width: 100%; height: auto; }
pre { background: #f5f5f5; padding: 1rem; overflow-x: auto; font-size: .85rem; }
</style>
<h1>{{ title }}</h1>
{{ body }}
</html>
"""
TABLE = """<table><tr>{% for name in head %}<th>{{ name }}</th>{% endfor %}</tr>
{%- for row in rows -%}
<tr>{% for cell in row %}<td class="text">{{ cell }}</td>{% endfor %}</tr>
{%- endfor %}</table>"""

_jinja = Environment(autoescape=True, undefined=StrictUndefined, keep_trailing_newline=True)


def render(template: str, **values: Any) -> Markup:
    """Fill a Jinja template. Values are escaped, unless they are Markup."""
    return Markup(_jinja.from_string(template).render(values))


def svg(drawn: Any) -> Markup:
    """Render a matplotlib figure as an <svg> element."""
    text = io.StringIO()
    drawn.savefig(text, format="svg", metadata={"Date": None})
    return Markup("".join(text.getvalue().partition("<svg")[1:]))


def table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> Markup:
    """An HTML table."""
    return render(TABLE, head=head, rows=rows)


def page(title: str, template: str, **values: Any) -> str:
    """A complete HTML document whose body is a filled template."""
    return str(render(PAGE, title=title, body=render(template, **values, table=table)))

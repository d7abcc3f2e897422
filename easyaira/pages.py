"""HTML pages: a document, tables, and figures as SVG."""

from __future__ import annotations

import html
import io
from collections.abc import Sequence
from typing import Any

PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>{title}</title>
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; color: #1a1a1a; }}
body {{ max-width: 62rem; margin: 2rem auto; padding: 0 1rem; }}
h1 {{ font-size: 1.5rem; }} h2 {{ font-size: 1.15rem; margin-top: 2rem; }}
table {{ border-collapse: collapse; width: 100%; }}
th, td {{ text-align: left; vertical-align: top; padding: .35rem .6rem; }}
th, td {{ border-bottom: 1px solid #ddd; }}
th {{ font-weight: 600; white-space: nowrap; }}
td.text {{ white-space: pre-wrap; overflow-wrap: anywhere; }}
svg {{ max-width: 100%; height: auto; }}
pre {{ background: #f5f5f5; padding: 1rem; overflow-x: auto; font-size: .85rem; }}
</style>
<h1>{title}</h1>
{body}
</html>
"""


def svg(drawn: Any) -> str:
    """Render a matplotlib figure as an <svg> element."""
    text = io.StringIO()
    drawn.savefig(text, format="svg", metadata={"Date": None})
    return text.getvalue().partition("<svg")[1] + text.getvalue().partition("<svg")[2]


def table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """An HTML table. Cells are escaped, so no cell is read as HTML."""
    cells = "".join(f"<th>{html.escape(str(name))}</th>" for name in head)
    body = "".join(
        "<tr>"
        + "".join(f'<td class="text">{html.escape(str(cell))}</td>' for cell in row)
        + "</tr>"
        for row in rows
    )
    return f"<table><tr>{cells}</tr>{body}</table>"


def page(title: str, *parts: str) -> str:
    """A complete HTML document."""
    return PAGE.format(title=html.escape(title), body="\n".join(parts))

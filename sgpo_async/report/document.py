"""The frame of every page of the report: one HTML file that needs neither a network nor a script."""

from __future__ import annotations

import re
from collections.abc import Sequence
from html import escape

from sgpo_async.report.style import STYLE


def with_code(text: str) -> str:
    """Escaped, with `...` as code."""
    return re.sub(r"`([^`]*)`", r"<code>\1</code>", escape(text))


def document(title: str, body: Sequence[str]) -> str:
    """A whole page; `body` is HTML, `title` a text."""
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{escape(title)}</title>'
    return f'<!doctype html>\n<html lang="en"><head>{head}<style>{STYLE}</style></head>\n<body><main>\n' + (
        "\n".join(body) + "\n</main></body></html>\n"
    )

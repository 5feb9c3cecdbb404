"""Figures of matplotlib as SVG: the same file for the same figures, and as small as it can be."""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

STYLE: Any = {  # matplotlib settings
    "svg.hashsalt": "sgpo",  # makes the file reproducible
    "svg.fonttype": "none",  # keeps text as text: outlines of letters would be most of the file
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans", "Verdana", "Arial"],  # every label repeats the whole list
}


def figure_svg(size: tuple[float, float], draw: Callable[[Figure], None], **style: Any) -> str:
    """What `draw` draws into an empty figure of `size` (width, height; inches), with more matplotlib settings if given.

    It needs matplotlib, which `sgpo-async[experiments]` installs.
    """
    import matplotlib as mpl
    from matplotlib.figure import Figure

    with mpl.rc_context(STYLE | style):
        figure = Figure(figsize=size, layout="constrained")
        draw(figure)
        file = io.StringIO()
        figure.savefig(file, format="svg", metadata={"Date": None})
    return lighter(file.getvalue())


def lighter(svg: str) -> str:
    """The same picture in a fifth less: no indentation, and coordinates of a tenth of a point in place of a millionth.

    Coordinates are numbers in attributes with at least four decimals; texts stay as they are.
    """

    def rounded(attribute: re.Match[str]) -> str:
        return re.sub(r"\d+\.\d{4,}", lambda number: f"{float(number[0]):.1f}", attribute[0])

    return re.sub(r"\n\s+", "\n", re.sub(r'"[^"]*"', rounded, svg))

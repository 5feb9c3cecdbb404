"""Figures of matplotlib as SVG."""

import re

from matplotlib.figure import Figure

from sgpo_async.report.figure import figure_svg, lighter


def test_a_figure_is_the_same_file_each_time_with_text_as_text_and_settings_of_its_own() -> None:
    def draw(figure: Figure) -> None:
        figure.subplots().set_title("A title")

    first, again, large = (
        figure_svg((4, 3), draw),
        figure_svg((4, 3), draw),
        figure_svg((4, 3), draw, **{"font.size": 20}),
    )
    assert first == again
    assert ">A title</text>" in first
    assert re.search(r'width="288(\.0)?pt" height="216(\.0)?pt"', first)
    assert ("24px" in first, "24px" in large) == (False, True)  # the size of a title is 1.2 of the font's


def test_a_lighter_picture_has_the_same_texts_and_styles_and_coordinates_of_a_tenth_of_a_point() -> None:
    svg = """<svg>
  <g style="opacity: 0.125">
    <path d="M 43.088521 267.996624
L -5.25 6 
"/>
    <text x="7.654321">0.02575</text>
  </g>
</svg>
"""
    assert lighter(svg).splitlines() == [
        "<svg>",
        '<g style="opacity: 0.125">',
        '<path d="M 43.1 268.0',
        "L -5.25 6 ",
        '"/>',
        '<text x="7.7">0.02575</text>',
        "</g>",
        "</svg>",
    ]

"""Format numbers for people."""

from __future__ import annotations

import math
from typing import Any

NONE = "–"
SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def number(value: Any, digits: int = 3) -> str:
    """Format with three significant digits, large numbers with k, M or G: 12.3 k."""
    if not isinstance(value, int | float) or not math.isfinite(value):
        return NONE
    if isinstance(value, int) and abs(value) < 10_000:
        return str(value)
    for power, letter in ((9, " G"), (6, " M"), (3, " k")):
        if abs(value) >= 10 ** (power + (power == 3)):
            return f"{_significant(value / 10**power, digits)}{letter}"
    return _significant(value, digits)


def _significant(value: float, digits: int) -> str:
    if value == 0:
        return "0"
    if abs(value) < 1e-3:
        return f"{value:.{digits - 1}g}"
    whole = math.floor(math.log10(abs(value))) + 1
    return f"{value:.{max(0, digits - whole)}f}"


def short(value: float) -> str:
    """Format without trailing zeros, for the ticks of an axis: 1.0025 lies between 1 and 1.005, and 1.002 would not."""
    return number(value) if abs(value) >= 10_000 else f"{value:.6g}"


def scientific(value: Any) -> str:
    """Format with two digits, small numbers with a power of ten: 3.2·10⁻⁶, 10⁻⁴, 0.05."""
    if not isinstance(value, int | float) or not math.isfinite(value):
        return NONE
    if value == 0 or abs(value) >= 0.01:
        return short(float(f"{value:.2g}"))
    digits, _, power = f"{value:.1e}".partition("e")
    raised = str(int(power)).translate(SUPERSCRIPT)
    return f"10{raised}" if digits == "1.0" else f"{digits}·10{raised}"


def percent(value: Any) -> str:
    """Format a share in [0, 1] as 12.3 %."""
    if not isinstance(value, int | float) or not math.isfinite(value):
        return NONE
    return f"{100 * value:.1f} %"


def clock(seconds: Any) -> str:
    """Format a duration as 1:05 or 2:03:04."""
    if not isinstance(seconds, int | float) or not math.isfinite(seconds):
        return NONE
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"

"""What every target checks of an error, and how it reports an input."""

from __future__ import annotations

from collections.abc import Callable

Record = Callable[[str], None]  # how an input was taken: "accepted", or the name of the error
LONGEST = 2000  # characters of an error


def refusal(error: Exception) -> str:
    """The name of an error that refuses an input. Asserts that its text is one short line that a terminal can show."""
    text = str(error)
    assert text, f"{type(error).__name__} without a text"
    assert len(text) <= LONGEST, f"an error must have at most {LONGEST} characters, got {len(text)}: {text[:200]!r}"
    assert text.isprintable(), f"an error must be one line that can be printed, got {text!r:.300}"
    return type(error).__name__

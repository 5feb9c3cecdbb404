r"""Keeps LaTeX commands in JSON whose writer did not double the backslashes. Pure functions.

JSON reads \b, \f, \n, \r and \t as control characters: of `"\frac{1}{2}"` a form feed and `rac{1}{2}` would be left.
"""

from __future__ import annotations

import re

# A backslash and what belongs to it: an escape of four hexadecimal digits, a word, or one character.
_BACKSLASH = re.compile(r"\\(u[0-9a-fA-F]{4}|[A-Za-z]+|.)", re.DOTALL)
_UNICODE = re.compile("u[0-9a-fA-F]{4}")
# LaTeX commands that begin like \n or \t, which texts really contain before a word: these are listed, while \b, \f and
# \r before a letter always begin a command. Left out are commands whose other letters are a frequent word (\ni, \the).
_LIKE_LINE_BREAK = re.compile(
    r"nabla|natural|ncong|nearrow|neg|neq?|newcommand|newline|nexists|ngeq\w*|ngtr|nleft\w+|nleq\w*|nless|nLeft\w+"
    r"|nmid|noindent|nolimits|nonumber|norm|normalsize|not|notin|nparallel|nprec\w*|nright\w+|nRight\w+|nsim|nsubset\w*"
    r"|nsucc\w*|nsupset\w*|nu|nvdash|nVdash|nwarrow"
)
_LIKE_TAB = re.compile(
    r"tag|tanh?|tau|tbinom|text\w*|tfrac|therefore|theta|thick\w+|thinspace|tilde|times|tiny|to|top|triangle\w*|tt"
    r"|twohead\w+"
)


def keep_commands(text: str) -> str:
    r"""JSON in which every backslash of a LaTeX command is doubled, as is every other one that JSON does not allow.

    Escapes of JSON stay as they are (`\"`, `\\`, `\/`, `\n`, `\u00e9`), and so do backslashes that were doubled.
    """
    return _BACKSLASH.sub(lambda match: match[0] if _is_escape(match[1]) else "\\" + match[0], text)


def _is_escape(after: str) -> bool:
    """Whether a backslash before these characters is an escape of JSON and not the beginning of a command."""
    first = after[0]
    if first == "n":
        return not _LIKE_LINE_BREAK.fullmatch(after)
    if first == "t":
        return not _LIKE_TAB.fullmatch(after)
    if first in "bfr":
        return len(after) == 1
    return first in '"\\/' or _UNICODE.fullmatch(after) is not None

"""`python -m sgpo_async.report FOLDER` writes FOLDER/report.html and prints its path."""

import sys

from sgpo_async.errors import SgpoError
from sgpo_async.report.page import write_report


def main() -> int:
    """Exit code 2 and one line for anything but one readable folder."""
    if len(sys.argv) != 2:
        print("usage: python -m sgpo_async.report FOLDER", file=sys.stderr)
        return 2
    try:
        print(write_report(sys.argv[1]))
    except SgpoError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

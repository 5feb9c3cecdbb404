"""`python -m sgpo_async.report FOLDER` writes FOLDER/report.html and prints its path."""

import sys

from sgpo_async.errors import SgpoError
from sgpo_async.report.page import write_report


def main() -> int:
    """Write the report; on any error print one line and return exit code 2."""
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

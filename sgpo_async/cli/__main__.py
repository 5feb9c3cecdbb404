"""`python -m sgpo_async.cli` is the `sgpo-async` command."""

from sgpo_async.cli.main import main

if __name__ == "__main__":
    raise SystemExit(main())

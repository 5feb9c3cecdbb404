"""The `sgpo-async` command: parse, validate, start processes. Nothing here imports torch before a role runs."""

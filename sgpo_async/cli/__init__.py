"""The `sgpo-async` command: parse, validate, start processes. Nothing here imports torch until a role starts."""

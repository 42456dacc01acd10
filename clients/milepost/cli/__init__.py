"""The command `milepost`: one module a subcommand, each with `add(subparsers)` and what runs it."""

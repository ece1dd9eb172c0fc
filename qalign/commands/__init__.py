"""The subcommands of `python -m qalign`, one module each: add_arguments(parser) and run(arguments) -> exit status."""

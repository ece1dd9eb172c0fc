"""The stages of a GPU run, each a module with a `main` that a process of its own calls, and what they measure with."""

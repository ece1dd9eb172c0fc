"""The stages of a GPU run. Each is a module with a `main` that runs in a process of its own."""

"""The choices of string arguments. This module needs no torch, so a command line can list them at once."""

REFINEMENTS = ("rearranged", "guided", "topk", "warped_values", "warped_output", "soft", "none")

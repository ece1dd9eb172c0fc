"""Validation: every op on every backend and dtype of this machine, compared with float64.

`draw` makes the inputs, `cases` lists the calls, `command` runs them and prints the table.
"""

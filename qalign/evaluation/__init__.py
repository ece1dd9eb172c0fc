"""Measurements of leakage, matches and methods, and their plots. They return numbers and print nothing."""

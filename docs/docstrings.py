"""Griffe extension for mkdocstrings: examples become code blocks, labelled last lines become paragraphs."""

import inspect
import re

from griffe import Extension, Object

LABEL = re.compile(r"^(Cost|Memory|Not here|Not included|Notes?|Precision|Source): (?=\S)", re.MULTILINE)
SECTION = re.compile(r"^Example:$", re.MULTILINE)  # griffe knows the plural alone
OUTSIDE_SECTIONS = re.compile(r"^>>> .*\n?(?:^(?!\s*$).*\n?)*", re.MULTILINE)


class Docstrings(Extension):
    def on_object(self, *, obj: Object, **_: object) -> None:
        if obj.docstring is not None:
            obj.docstring.value = readable(inspect.cleandoc(obj.docstring.value))


def readable(text: str) -> str:
    """Name example sections as griffe does, fence examples elsewhere, set "Source:" and the like apart."""
    text = SECTION.sub("Examples:", LABEL.sub(r"\n**\1:** ", text))
    return OUTSIDE_SECTIONS.sub(lambda found: f"\n```pycon\n{found[0].rstrip()}\n```\n", text)

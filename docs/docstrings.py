"""Griffe extension for mkdocstrings: examples become code blocks, labelled last lines become paragraphs."""

import re

from griffe import Extension, Object

LABEL = re.compile(r"^(Cost|Memory|Not here|Notes?|Precision|Source): (?=\S)", re.MULTILINE)
EXAMPLE = re.compile(r"^( *)>>> .*\n?(?:^(?!\s*$).*\n?)*", re.MULTILINE)


class Docstrings(Extension):
    def on_object(self, *, obj: Object, **_: object) -> None:
        if obj.docstring is not None:
            obj.docstring.value = readable(obj.docstring.value)


def readable(text: str) -> str:
    """Fence examples, and give "Source:" and the like paragraphs of their own."""
    text = LABEL.sub(r"\n**\1:** ", text)
    return EXAMPLE.sub(lambda found: f"\n{found[1]}```pycon\n{found[0].rstrip()}\n{found[1]}```\n", text)

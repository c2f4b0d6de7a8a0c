"""Lets docstrings, which are written to be read in the source, render as Markdown."""

import re

import griffe

RULES = (
    # `title <url>`_ is a link.
    (re.compile(r"`([^`<]+?)\s*<(\S+?)>`_"), lambda found: f"[{' '.join(found[1].split())}]({found[2]})"),
    # `text::` opens a block of formulas.
    (re.compile(r"::$", re.MULTILINE), lambda found: ":"),
    # `Example:` holds a doctest.
    (re.compile(r"^(\s*)Example:$", re.MULTILINE), lambda found: f"{found[1]}Examples:"),
)


class Docstrings(griffe.Extension):
    """Rewrites every docstring before it is parsed."""

    def on_object(self, *, obj: griffe.Object, **kwargs: object) -> None:
        """Applies the rules to one object."""
        if obj.docstring:
            for pattern, replacement in RULES:
                obj.docstring.value = pattern.sub(replacement, obj.docstring.value)

"""Griffe extension: docstrings are marked up for a terminal; this turns their marks into the site's
Markdown.
"""

import re

import griffe

INLINE = re.compile(r":math:`([^`]+)`")
# The rest of the line, and what is indented more deeply below it.
DISPLAYED = re.compile(r"^( *)\.\. math:: *(.*(?:\n\1 {2,}\S.*)*)$", re.MULTILINE)


class Docstrings(griffe.Extension):
    def on_object(self, *, obj, **kwargs):
        if obj.docstring is not None:
            text = DISPLAYED.sub(r"\1$$\n\1\2\n\1$$", obj.docstring.value)
            text = INLINE.sub(lambda found: f"${' '.join(found[1].split())}$", text)
            obj.docstring.value = text.replace("\nExample:\n", "\nExamples:\n")

"""Griffe extension: read a docstring's ``Example:`` as the section of examples that it is."""

import griffe


class Examples(griffe.Extension):
    def on_object(self, *, obj, **kwargs):
        if obj.docstring is not None:
            obj.docstring.value = obj.docstring.value.replace("\nExample:\n", "\nExamples:\n")

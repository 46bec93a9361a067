"""The tree of errors."""

from __future__ import annotations

import inspect

from embedkit import errors


def test_all_names_every_class_of_the_module_in_order():
    classes = [name for name, item in vars(errors).items() if inspect.isclass(item)]
    assert errors.__all__ == sorted(classes)
    assert all(issubclass(getattr(errors, name), errors.EmbedkitError) for name in classes)

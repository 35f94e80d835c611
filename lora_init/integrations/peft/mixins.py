"""Classes made at run time: an object's own class with a mixin before it.

A mixin, not patched methods: `copy.deepcopy` and `pickle` keep it, and `isinstance` and the class'
name stay what other code looks for.
"""

from __future__ import annotations

from typing import Any

# One class for all objects of a kind: torch.compile guards on it.
_classes: dict[tuple[type, type], Any] = {}


class Mixin:
    """Base of what is mixed in: has objects copied and unpickled by their own class."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        state = object.__reduce_ex__(self, 2)[2]
        return _new, type(self).__bases__, state


def mixed(mixin: type, cls: type) -> Any:
    """`cls` with `mixin` before it."""
    key = (mixin, cls)
    if key not in _classes:
        likeness = {"__module__": cls.__module__, "__doc__": cls.__doc__}
        _classes[key] = type(cls.__name__, key, likeness)
    return _classes[key]


def unmixed(obj: Any, mixin: type) -> type | None:
    """The class that `mixed` put `mixin` before to make the object's; None where something else
    changed its class since.
    """
    first, *others = type(obj).__bases__
    return others[0] if others and issubclass(first, mixin) else None


def _new(mixin: type, cls: type) -> Any:
    return object.__new__(mixed(mixin, cls))

"""Named implementations found by import: a new selector, labeler, scorer or format is one new file."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from typing import Generic, TypeVar

from autointerp.errors import InputError

T = TypeVar("T")


class Registry(Generic[T]):
    """Maps a name to an implementation; modules of `package` register themselves when they are first asked for.

    >>> SELECTORS: Registry[Selector] = Registry("selector", "autointerp.evidence.selectors")
    >>> @SELECTORS.register("change")
    ... class ChangeMap: ...
    """

    def __init__(self, kind: str, package: str):
        self.kind = kind
        self.package = package
        self._items: dict[str, T] = {}
        self._loaded = False

    def register(self, name: str) -> Callable[[T], T]:
        """Decorator. A second registration under one name is a bug and raises ValueError."""

        def add(item: T) -> T:
            if name in self._items:
                raise ValueError(f"{self.kind} {name!r} is registered twice")
            self._items[name] = item
            return item

        return add

    def names(self) -> list[str]:
        """Registered names, sorted."""
        self._load()
        return sorted(self._items)

    def get(self, name: str) -> T:
        """The implementation under `name`; InputError naming the choices when there is none."""
        self._load()
        if name not in self._items:
            raise InputError(f"unknown {self.kind} {name!r}: choose one of {', '.join(self.names())}")
        return self._items[name]

    def items(self) -> list[tuple[str, T]]:
        """(name, implementation) pairs, sorted by name."""
        return [(name, self.get(name)) for name in self.names()]

    def _load(self) -> None:
        if self._loaded:
            return
        package = importlib.import_module(self.package)
        for module in pkgutil.iter_modules(package.__path__):
            importlib.import_module(f"{self.package}.{module.name}")
        self._loaded = True

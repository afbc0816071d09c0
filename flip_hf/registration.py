"""Registers FLIP with Transformers' Auto classes as soon as Transformers is imported, whichever is imported first.

Registering takes the classes of the models, and these take torch and Transformers: seconds, which `flip-hf --help` and
a mistake in an option should not wait for. So `import flip_hf` leaves a finder on `sys.meta_path`, and the entries are
made when Transformers, or the models of this package, have been imported: nobody can use an Auto class before that.
"""

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

# The second imports the first: what is registered must be whole by then.
AWAITED = ("transformers", "flip_hf.modeling")


class _Awaiting(MetaPathFinder):
    """Finds the awaited modules as the other finders do, and registers FLIP when the outermost one is there."""

    def __init__(self) -> None:
        self._loading: list[str] = []

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Finds an awaited module, and no other."""
        if fullname not in AWAITED:
            return None
        others = (finder for finder in sys.meta_path if finder is not self)
        spec = next(filter(None, (finder.find_spec(fullname, path, target) for finder in others)), None)
        if spec is not None and spec.loader is not None:
            spec.loader = _RegisteringLoader(spec.loader, self)
        return spec

    def load(self, loader: Loader, module: ModuleType) -> None:
        """Executes an awaited module, and registers unless another one waits for it."""
        self._loading.append(module.__name__)
        try:
            loader.exec_module(module)
        finally:
            self._loading.remove(module.__name__)
        if not self._loading and self in sys.meta_path:
            sys.meta_path.remove(self)
            import_module("flip_hf.auto_classes")


class _RegisteringLoader(Loader):
    """Stands before the loader of an awaited module until it is executed."""

    def __init__(self, loader: Loader, awaiting: _Awaiting) -> None:
        self._loader = loader
        self._awaiting = awaiting

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        """Makes the module as its own loader does."""
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        """Executes the module, which then knows its own loader alone."""
        module.__loader__ = self._loader
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader
        self._awaiting.load(self._loader, module)


def register_with_transformers() -> None:
    """Registers FLIP now if Transformers is there, and else when it is imported."""
    if "transformers" in sys.modules:
        import_module("flip_hf.auto_classes")
    else:
        sys.meta_path.insert(0, _Awaiting())

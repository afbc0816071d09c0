"""Completes docstrings for the reference, with links and with tables of what is in a package (an extension of Griffe).

A reference is written [`Name`] or [`~Class.method`], as in Transformers. The name is looked up where the docstring
stands, then in all modules. A name that is nowhere is left to autorefs, which warns.
"""

import re
from collections.abc import Iterator
from functools import partial
from typing import Any

from griffe import Alias, Class, Extension, Module, Object

# `~` asks for the last part of the name.
REFERENCE = re.compile(r"\[`(?P<short>~?)(?P<name>[\w.]+)`\](?![(\[])")


class Reference(Extension):
    """Rewrites the docstrings of a package once all of it is loaded."""

    def on_package(self, *, pkg: Module, **kwargs: Any) -> None:
        """Gives each reference its target, and each package a table of what is inside."""
        names = Names(pkg)
        for place in walk(pkg):
            if place.docstring is not None:
                place.docstring.value = REFERENCE.sub(partial(names.link, place), place.docstring.value)
        for place in walk(pkg):
            if isinstance(place, Module) and place.is_init_module and place.docstring is not None:
                place.docstring.value += "".join(tables_of(place))


def tables_of(package: Module) -> Iterator[str]:
    """Yields tables of the public names of a package, and of its modules."""
    names = [package[name] for name in package.exports or () if isinstance(name, str)]
    modules = [module for module in package.modules.values() if not module.name.startswith("_")]  # not `__main__`
    for title, members in (("name", names), ("module", modules)):
        if members:
            yield f"\n\n| {title} | |\n|---|---|"
            for member in members:
                summary = member.docstring.value.partition("\n\n")[0].replace("\n", " ") if member.docstring else ""
                yield f"\n| [`{member.name}`][{member.canonical_path}] | {summary} |"


class Names:
    """The definitions of a package, by path and by name.

    Args:
        package: a loaded package.
    """

    def __init__(self, package: Module):
        self._by_path = {place.path: place for place in walk(package)}
        self._by_name: dict[str, Object] = {}
        for place in self._by_path.values():
            module = place.module.path
            name = place.path[len(module) + 1 :]
            # `papers.published`, too
            for written in (name, f"{module.rpartition('.')[2]}.{name}".rstrip(".")):
                self._by_name.setdefault(written, place)

    def link(self, place: Object, reference: re.Match) -> str:
        """A reference in the docstring of `place`, with its target as autorefs reads it."""
        name = reference["name"]
        shown = name.rpartition(".")[2] if reference["short"] else name
        target = self._in_scope(name, place) or self._by_name.get(name)
        # What has no docstring has no entry of its own; what holds it has.
        while target is not None and target.docstring is None:
            target = target.parent
        return f"[`{shown}`][{name if target is None else target.path}]"

    def _in_scope(self, name: str, place: Object) -> Object | None:
        first, _, rest = name.partition(".")
        scope: Object | None = place
        while scope is not None:
            member = scope.members.get(first)
            if member is not None:
                path = member.target_path if isinstance(member, Alias) else member.path
                found = self._by_path.get(f"{path}.{rest}".rstrip("."))
                if found is not None:
                    return found
            scope = scope.parent
        return None


def walk(place: Object) -> Iterator[Object]:
    """An object and all that is defined inside it."""
    yield place
    for member in place.members.values():
        if isinstance(member, (Module, Class)):
            yield from walk(member)
        elif isinstance(member, Object):
            yield member

"""YAML of plain values: a mapping of names to numbers, texts, lists and mappings, within bounds.

PyYAML's safe loader runs no code, but reads a few hundred bytes of references to references as billions of values, and
takes the second of two equal keys without a word.
"""

from dataclasses import dataclass
from typing import Any

import yaml

# Values with all references written out, and mappings within mappings.
MAX_VALUES = 10_000
MAX_DEPTH = 16


@dataclass(frozen=True)
class Plain:
    """A value of a YAML file.

    Attributes:
        value: as YAML reads it.
        written: as it is written, of each of several values; None for a mapping or a list within.
    """

    value: Any
    written: list[str | None]


def read_yaml(text: str, name: str) -> dict[str, Plain]:
    """The mapping that a file holds; empty where it is.

    Args:
        text: of the file.
        name: of the file, for messages.

    Raises:
        ValueError: it is not YAML, no mapping, has a key twice, a tag, or more values than [`MAX_VALUES`].
    """
    try:
        return _read(yaml.SafeLoader(text), name)
    except yaml.MarkedYAMLError as error:
        where = f", line {error.problem_mark.line + 1}" if error.problem_mark is not None else ""
        raise ValueError(f"{name}{where}: {_in_words(error)}.") from error
    except yaml.YAMLError as error:
        raise ValueError(f"{name} is not YAML: {' '.join(str(error).split())}.") from error
    except RecursionError:
        raise ValueError(f"{name} is nested too deeply for a recipe.") from None


def _read(loader: yaml.SafeLoader, name: str) -> dict[str, Plain]:
    node = loader.get_single_node()
    if node is None:
        return {}
    _bounded(node, name)
    if not isinstance(node, yaml.MappingNode):
        raise ValueError(f"{name} is not a recipe: it must map option names to values.")
    loader.flatten_mapping(node)
    return {str(key.value): _plain(loader, value, name) for key, value in node.value}


def _in_words(error: yaml.MarkedYAMLError) -> str:
    said = " ".join(part for part in (error.context, error.problem) if part)
    if "could not determine a constructor for the tag" in said:
        return f"a tag ({said.split(' tag ', 1)[1]}), where a recipe holds plain values"
    return said


def _plain(loader: yaml.SafeLoader, node: yaml.Node, name: str) -> Plain:
    written = node.value if isinstance(node, yaml.SequenceNode) else [node]
    try:
        value = loader.construct_object(node, deep=True)
    except (ValueError, OverflowError) as error:  # a 13th month, a number of 5000 digits
        if not isinstance(node, yaml.ScalarNode):
            raise ValueError(f"{name}, line {node.start_mark.line + 1}: {error}.") from error
        value = node.value
    return Plain(value, [each.value if isinstance(each, yaml.ScalarNode) else None for each in written])


def _bounded(root: yaml.Node, name: str) -> None:
    """Counts the values with all references written out, and looks for keys that stand twice.

    Raises:
        ValueError: there are too many, or they are nested too deeply, or a key stands twice.
    """
    count = 0
    waiting = [(root, 0)]
    while waiting:
        node, depth = waiting.pop()
        count += 1
        if count > MAX_VALUES or depth > MAX_DEPTH:
            raise ValueError(f"{name} holds more than a recipe: over {MAX_VALUES:,} values, or {MAX_DEPTH} levels.")
        if isinstance(node, yaml.MappingNode):
            keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode) and key.value != "<<"]
            if len(set(keys)) < len(keys):
                twice = next(key for key in keys if keys.count(key) > 1)
                raise ValueError(f"{name}, line {node.start_mark.line + 1}: {twice!r} stands there twice.")
            waiting += [(each, depth + 1) for pair in node.value for each in pair]
        elif isinstance(node, yaml.SequenceNode):
            waiting += [(each, depth + 1) for each in node.value]

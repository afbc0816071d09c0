"""YAML of plain values: a mapping from names to numbers, texts, lists and mappings, within bounds.

PyYAML's safe loader runs no code, but expands a few hundred bytes of nested references into billions of values, and
silently takes the second of two equal keys.
"""

from dataclasses import dataclass
from typing import Any

import yaml

# Values with all references expanded, and levels of nesting.
MAX_VALUES = 10_000
MAX_DEPTH = 16


@dataclass(frozen=True)
class Plain:
    """A value of a YAML file.

    Attributes:
        value: the value that YAML reads.
        written: the text of each value as written; None for a nested mapping or list.
    """

    value: Any
    written: list[str | None]


def read_yaml(text: str, name: str) -> dict[str, Plain]:
    """Reads the mapping in a file; empty for an empty file.

    Args:
        text: the file's text.
        name: the file's name, for messages.

    Raises:
        ValueError: it is not YAML or not a mapping, has a repeated key, a tag, or more than [`MAX_VALUES`] values.
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
    """Counts the values with all references expanded, and looks for repeated keys.

    Raises:
        ValueError: there are too many, or they are nested too deeply, or a key is repeated.
    """
    count = 0
    waiting = [(root, 0)]
    while waiting:
        node, depth = waiting.pop()
        count += 1
        if count > MAX_VALUES or depth > MAX_DEPTH:
            raise ValueError(f"{name} is too large for a recipe: over {MAX_VALUES:,} values, or {MAX_DEPTH} levels.")
        if isinstance(node, yaml.MappingNode):
            keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode) and key.value != "<<"]
            if len(set(keys)) < len(keys):
                twice = next(key for key in keys if keys.count(key) > 1)
                raise ValueError(f"{name}, line {node.start_mark.line + 1}: {twice!r} is given twice.")
            waiting += [(each, depth + 1) for pair in node.value for each in pair]
        elif isinstance(node, yaml.SequenceNode):
            waiting += [(each, depth + 1) for each in node.value]

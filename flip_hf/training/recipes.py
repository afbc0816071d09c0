"""From a recipe and the command line to a run's arguments, and back.

Values come from the dataclasses' defaults (the paper's), then the recipe, then the command line; one parser types all
of them, and an unknown key is an error.
"""

import dataclasses
import json
from argparse import ArgumentTypeError
from collections.abc import Sequence
from contextlib import suppress
from importlib import resources
from pathlib import Path
from typing import Any, get_type_hints

import yaml

from flip_hf.console.fields import JSON, Kind, complaint, kind_of
from flip_hf.console.files import read_text
from flip_hf.console.json_types import JsonObject
from flip_hf.console.parsers import Heading, OptionsParser, boolean, heading_of, nearest
from flip_hf.console.plain_yaml import Plain, read_yaml
from flip_hf.training.arguments import (
    Arguments,
    DataArguments,
    ModelArguments,
    ObjectiveArguments,
    OptimizationArguments,
    RunArguments,
)
from flip_hf.training.hub_arguments import HubArguments
from flip_hf.training.retention_arguments import RetentionArguments
from flip_hf.training.stages import REPLACED

# Named recipes, which come with the package.
RECIPES = Path(str(resources.files("flip_hf") / "recipes"))
GROUPS = (
    *(ModelArguments, ObjectiveArguments, DataArguments, OptimizationArguments, RunArguments, HubArguments),
    RetentionArguments,
)
# What a person sets first; the beginning of `--help`.
MOST_USED = (
    *("train_data", "eval_data", "model_name_or_path", "mask_ratio", "train_samples", "batch_size"),
    *("micro_batch_size", "base_lr", "output_dir", "resume_from_checkpoint"),
)
# Of the model's options, those that say which patches and tokens are dropped.
MASKS = (
    *(
        "mask_strategy",
        "mask_edge_strength",
        "mask_edge_strength_end",
        "mask_ratio_end",
        "mask_ratio_schedule",
        "mask_ratio_steps",
    ),
    *("text_mask_ratio", "text_mask_strategy"),
)
# Of a recipe; the longest one here has 2 kB. And of recipes that are each other's base.
MAX_RECIPE_BYTES = 2**18
MAX_BASES = 16


def headings() -> list[Heading]:
    """The parts of `--help`: what is set first, then the dataclasses, the masks apart from the model."""
    most_used = Heading("most used", "The options that most runs give. All others have defaults.", MOST_USED)
    masks = Heading("masks", "What is dropped beside --mask_ratio, and how that changes on the way.", MASKS)
    model, *others = (heading_of(group, without={*MOST_USED, *MASKS}) for group in GROUPS)
    return [most_used, model, masks, *others]


def make_parser(recipe_folder: Path, default_recipe: str, more_options: Sequence[str] = ()) -> OptionsParser:
    """The parser of all options; its help says what RECIPE is. For `more_options` see [`parse_arguments`]."""
    known = ", ".join(sorted(path.stem for path in recipe_folder.glob("*.yaml")))
    return OptionsParser(
        GROUPS,
        headings(),
        prog="flip-hf pretrain",
        usage="%(prog)s [RECIPE] [--OPTION VALUE ...]",
        description="Pre-trains FLIP. RECIPE stands first: the name of a recipe, or a YAML file of options. Options "
        f"that are given count more than the recipe's. Without RECIPE and --train_data it is {default_recipe}; with "
        f"--train_data alone, the defaults below hold, which are the paper's. Recipes are {known}.",
        more_options=more_options,
    )


def option_names() -> list[str]:
    """Every option, in the order of the dataclasses."""
    return [field.name for group in GROUPS for field in dataclasses.fields(group)]


def recipe_options(name: str, *folders: Path, above: tuple[Path, ...] = ()) -> JsonObject:
    """The values of a recipe over those of its `base`, another recipe: one beside it, or else a named one.

    Args:
        name: a YAML file, or the name of one in a folder.
        folders: where named recipes lie; the first one that has the name counts.
        above: files that have this one as their base.

    Raises:
        FileNotFoundError: there is no such recipe.
        ValueError: it is not a mapping of plain values, has itself as its base, or has an option that is unknown, of
            another type or out of range.
    """
    path = _find_recipe(name, folders)
    recipe = read_yaml(read_text(path, "a recipe", MAX_RECIPE_BYTES), str(path))
    seen = [each.resolve() for each in above]
    if path.resolve() in seen or len(seen) >= MAX_BASES:
        raise ValueError(f"{path} has itself as its base." if path.resolve() in seen else f"{path} has too many bases.")
    base = recipe.pop("base", None)
    if base is not None and not isinstance(base.value, str):
        raise ValueError(f"{path}: base must be the name of a recipe, got {base.value!r}.")
    options = {key: _checked(path, key, plain) for key, plain in recipe.items() if plain.value is not None}
    if base is None or not base.value:
        return options
    below = dict.fromkeys((path.parent, *folders))  # each folder once
    found = recipe_options(base.value, *below, above=(*above, path))
    return (_without_phases(found) if "stages" in options else found) | options


def _without_phases(options: JsonObject) -> JsonObject:
    """Returns a recipe's options without those that stages given over it take the place of."""
    return {name: value for name, value in options.items() if name not in REPLACED}


def _declared(name: str) -> tuple[dataclasses.Field, Kind] | None:
    """An option's field, and what its type says."""
    for group in GROUPS:
        for field in dataclasses.fields(group):
            if field.name == name:
                return field, kind_of(get_type_hints(group)[name])
    return None


def _checked(path: Path, key: str, plain: Plain) -> Any:
    """The value of an option, checked where its file can be named.

    Text is taken as it is written: YAML would read `on` as true, and 1.10 as 1.1.

    Raises:
        ValueError: there is no such option, or the value is of another type or out of range.
    """
    declared = _declared(key)
    if declared is None:
        raise ValueError(f"{path}: there is no option {key!r}.{nearest(key, option_names())}")
    field, kind = declared
    if field.metadata[JSON] and (isinstance(plain.value, dict) or _is_list_of_mappings(plain.value)):
        try:
            json.dumps(plain.value)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path}: {key} must hold numbers and texts alone: {error}.") from error
        return json.dumps(plain.value) if isinstance(plain.value, list) else plain.value
    given = plain.value if isinstance(plain.value, list) else [plain.value]
    if isinstance(plain.value, list) and not (kind.several and plain.value):
        raise ValueError(
            f"{path}: {key} takes {'at least one value' if kind.several else 'one value'}, got {plain.value}."
        )
    found: list[Any] = []
    for value, written in zip(given, plain.written, strict=True):
        # YAML reads 010 as 8, and 4e-6 as text; what is meant is what is written.
        read = _as_written(kind.value, written, value)
        no_value = written is None or value is None
        fault = f"must be one value, got {value!r}." if no_value else complaint(field, kind, read)
        if fault is not None:
            raise ValueError(f"{path}: {key} {fault}")
        same = not isinstance(value, (int, float)) or isinstance(value, bool) or read == value
        found.append(value if kind.value is not str and same else read)
    return found if isinstance(plain.value, list) else found[0]


def _is_list_of_mappings(value: object) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(each, dict) for each in value)


def _as_written(kind: type, written: str | None, value: object) -> object:
    """Parses a written value as the command line would; returns the text where it is of another type."""
    if kind is str or written is None:
        return written
    try:
        if kind is bool:
            return value if isinstance(value, bool) else boolean(written)
        return kind({".inf": "inf", "-.inf": "-inf", ".nan": "nan"}.get(written.lower(), written))
    except (ValueError, ArgumentTypeError):
        return written


def _as_argv(options: JsonObject) -> list[str]:
    """Options as command-line words, so that one parser types both (YAML reads 4e-6 as text)."""
    argv = []
    for key, value in options.items():
        words = value if isinstance(value, list) else [json.dumps(value) if isinstance(value, dict) else value]
        argv += [f"--{key}", *(str(word) for word in words)]
    return argv


def _find_recipe(name: str, folders: Sequence[Path]) -> Path:
    with suppress(OSError):  # no name that a file can have
        if not Path(name).is_file():
            for folder in folders:
                # A path counts from the recipe that names it, with or without its ending.
                for found in (folder / f"{name}.yaml", folder / name):
                    if found.is_file():
                        return found
        if Path(name).exists():
            return Path(name)
    known = sorted({path.stem for folder in folders for path in folder.glob("*.yaml")})
    near = nearest(name, known)
    raise FileNotFoundError(
        f"There is no recipe {name!r} in {' or '.join(str(folder) for folder in folders)}.{near} Give a YAML file, or "
        f"one of: {', '.join(known)}."
    )


def parse_arguments(
    argv: Sequence[str],
    recipe_folder: Path = RECIPES,
    default_recipe: str = "shapes",
    more_options: Sequence[str] = (),
) -> Arguments:
    """Reads `[RECIPE] [--option value ...]`.

    Args:
        argv: the command line without the program's name. RECIPE is a YAML file or the name of one in `recipe_folder`.
        recipe_folder: where named recipes lie.
        default_recipe: the recipe where neither RECIPE nor --train_data is given. With --train_data alone the
            dataclasses' defaults hold, which are the paper's.
        more_options: names of options that a script has besides, for hints.

    Raises:
        FileNotFoundError: there is no such recipe.
        ValueError: an unknown option, or a value that is out of range or of the wrong type; of the command line, it is
            an `OptionError`.
    """
    argv = list(argv)
    names_data = any(word.split("=")[0] == "--train_data" for word in argv)
    recipe = argv.pop(0) if argv and not argv[0].startswith("-") else None if names_data else default_recipe
    options = recipe_options(recipe, recipe_folder) if recipe else {}
    gives_stages = any(word.split("=")[0] == "--stages" for word in argv)
    words = _as_argv(_without_phases(options) if gives_stages else options)
    return Arguments(*make_parser(recipe_folder, default_recipe, more_options).parse(words + argv))


def write_recipe(arguments: Arguments, path: Path) -> None:
    """Writes the resolved run as a recipe that reproduces it."""
    path.write_text(yaml.safe_dump(arguments.to_recipe(), sort_keys=False), encoding="utf-8")

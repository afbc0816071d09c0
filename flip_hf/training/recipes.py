"""From a recipe and the command line to a run's arguments, and back.

Values come from the dataclasses' defaults (the paper's), then the recipe, then the command line; one parser types all
of them, and an unknown key is an error.
"""

import dataclasses
import difflib
import json
from pathlib import Path
from typing import Any

import yaml
from transformers import HfArgumentParser

from flip_hf.training.arguments import (
    Arguments,
    DataArguments,
    HubArguments,
    ModelArguments,
    ObjectiveArguments,
    OptimizationArguments,
    RunArguments,
    require,
)

GROUPS = (ModelArguments, ObjectiveArguments, DataArguments, OptimizationArguments, RunArguments, HubArguments)


def make_parser() -> HfArgumentParser:
    """The parser of all options."""
    return HfArgumentParser(GROUPS, description="Pre-trains FLIP.", allow_abbrev=False)  # pyright: ignore


def option_names() -> list[str]:
    """Every option, in the order of the dataclasses."""
    return [field.name for group in GROUPS for field in dataclasses.fields(group)]


def recipe_options(name: str, folder: Path, above: tuple[Path, ...] = ()) -> dict[str, Any]:
    """What a recipe says, over what its `base`, another recipe of the same folder, says.

    Args:
        name: a YAML file, or the name of one in `folder`.
        folder: where named recipes lie.
        above: files that have this one as their base.

    Raises:
        FileNotFoundError: there is no such recipe.
        ValueError: it is no mapping, has itself as its base, or has an unknown option.
    """
    path = _find_recipe(name, folder)
    recipe = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    require(isinstance(recipe, dict), f"{path} is not a recipe: it must map option names to values.")
    require(path not in above, f"{path} has itself as its base.")
    base = recipe.pop("base", None)
    for key in recipe:
        if key not in option_names():
            close = difflib.get_close_matches(str(key), option_names(), n=1)
            hint = f" Did you mean {close[0]!r}?" if close else ""
            raise ValueError(f"{path}: there is no option {key!r}.{hint}")
    below = recipe_options(str(base), path.parent, (*above, path)) if base else {}
    return below | {key: value for key, value in recipe.items() if value is not None}


def _as_argv(options: dict[str, Any]) -> list[str]:
    """Options as command-line words, so that one parser types both (YAML reads 4e-6 as text)."""
    argv = []
    for key, value in options.items():
        words = value if isinstance(value, list) else [json.dumps(value) if isinstance(value, dict) else value]
        argv += [f"--{key}", *(str(word) for word in words)]
    return argv


def _find_recipe(name: str, folder: Path) -> Path:
    for path in (Path(name), folder / f"{name}.yaml"):
        if path.is_file():
            return path
    known = ", ".join(sorted(path.stem for path in folder.glob("*.yaml")))
    raise FileNotFoundError(f"There is no recipe {name!r}. Give a YAML file, or one of: {known}.")


def parse_arguments(argv: list[str], recipe_folder: Path, default_recipe: str) -> Arguments:
    """Reads `[RECIPE] [--option value ...]`.

    Args:
        argv: the command line without the program's name. RECIPE is a YAML file or the name of one in `recipe_folder`.
        recipe_folder: where named recipes lie.
        default_recipe: the recipe where neither RECIPE nor --train_data is given. With --train_data alone the
            dataclasses' defaults hold, which are the paper's.

    Raises:
        FileNotFoundError: there is no such recipe.
        ValueError: an unknown option, or a value that is out of range or of the wrong type.
    """
    argv = list(argv)
    names_data = any(word.split("=")[0] == "--train_data" for word in argv)
    recipe = argv.pop(0) if argv and not argv[0].startswith("-") else None if names_data else default_recipe
    words = _as_argv(recipe_options(recipe, recipe_folder)) if recipe else []
    return Arguments(*make_parser().parse_args_into_dataclasses(args=words + argv))


def write_recipe(arguments: Arguments, path: Path) -> None:
    """Writes the resolved run as a recipe that reproduces it."""
    path.write_text(yaml.safe_dump(arguments.to_recipe(), sort_keys=False), encoding="utf-8")

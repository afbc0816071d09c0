"""Reads the facts about a model from the files of its folder."""

import json
from dataclasses import dataclass
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any

import yaml
from safetensors import safe_open
from transformers import AutoConfig

from flip_hf.console.json_types import JsonObject
from flip_hf.console.names import is_hub_id
from flip_hf.conversion.lineage import base_model_of


@dataclass(frozen=True)
class PublishedRun:
    """The facts about a model in its folder.

    Attributes:
        folder: the folder.
        recipe: recipe of its run, by option; empty if there is none.
        results: results of its run; empty if there are none.
        config: the model's configuration.
    """

    folder: Path
    recipe: JsonObject
    results: JsonObject
    config: Any

    @classmethod
    def read(cls, folder: Path) -> "PublishedRun":
        recipe = folder / "recipe.yaml"
        results = folder / "results.json"
        return cls(
            folder,
            yaml.safe_load(recipe.read_text(encoding="utf-8")) if recipe.is_file() else {},
            json.loads(results.read_text(encoding="utf-8")) if results.is_file() else {},
            AutoConfig.from_pretrained(folder, trust_remote_code=False),
        )

    @property
    def is_flip(self) -> bool:
        """True for a model of this package, which needs the code beside the weights; False for a CLIPModel."""
        return self.config.model_type.startswith("flip")

    @property
    def reconstructs(self) -> bool:
        """True for a FlipForPreTraining, with a decoder."""
        return self.config.model_type == "flip_pretraining"

    @property
    def contrasts(self) -> bool:
        """True for a model trained to compare images with texts."""
        return not self.reconstructs or self.config.objective != "reconstruction"

    @property
    def towers(self) -> Any:
        """The configuration of the towers, whatever surrounds them."""
        return self.config.flip_config if self.reconstructs else self.config

    @property
    def kind_of_samples(self) -> str:
        """The kind of training samples."""
        return "pairs" if self.contrasts else "images"

    @cached_property
    def parameters(self) -> int:
        """Number of parameters in the folder's weights."""
        total = 0
        for path in self.folder.glob("model*.safetensors"):
            with safe_open(path, framework="pt") as file:
                total += sum(prod(file.get_slice(name).get_shape()) for name in file.keys())
        return total

    @property
    def samples(self) -> int | None:
        """Samples seen in training; None without a recipe that says so."""
        if not self.recipe:
            return None
        if "samples" in self.results:
            return self.results["samples"]
        if self.stages:
            return sum(stage["samples"] for stage in self.stages)
        return self.recipe["train_samples"] + self.recipe["unmasked_samples"]

    @property
    def stages(self) -> list[JsonObject]:
        """The stages that the recipe lists; empty without `--stages`."""
        return self.recipe.get("stages") or []

    @property
    def mask_ratios(self) -> list[float]:
        """The mask ratios that training began and ended with, or those of its stages; empty without a recipe."""
        if not self.recipe:
            return []
        usual = self.recipe["mask_ratio"]
        if self.stages:
            return [stage.get("mask_ratio", usual) for stage in self.stages]
        return [usual, *([0.0] if self.recipe["unmasked_samples"] else [])]

    @property
    def source(self) -> str | None:
        """The model that the run, or its image tower, was initialised from; None for a new one."""
        return self.recipe.get("model_name_or_path") or self.recipe.get("init_vision_from")

    @property
    def base_model(self) -> str | None:
        """The Hub id of the model that it is derived from, through any conversions and runs; None if unknown."""
        known = self.results.get("base_model")
        if known is not None or self.source is None:
            return known
        return base_model_of(self.source)

    @property
    def hub_data(self) -> list[str]:
        """Training data on the Hub."""
        return [name for name in self.recipe.get("train_data") or [] if is_hub_id(name)]

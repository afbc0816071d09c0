"""The options about data on which a fine-tuned model is to keep what the model that it started from could do."""

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING

from flip_hf.console.fields import OptionError, check_options, option, require
from flip_hf.console.ranges import number
from flip_hf.evaluation.templates import read_templates

if TYPE_CHECKING:
    from flip_hf.training.arguments import Arguments


@dataclass
class RetentionArguments:
    """Data that the run must not forget, measured before the first step and with every evaluation."""

    retain_data: str | None = option(
        None,
        "labelled data or pairs, as --eval_data, on which the model of --model_name_or_path should stay as good",
    )
    retain_config: str | None = option(None, "configuration name of the retained data set")
    retain_split: str = option("test", "split of the retained data")
    retain_image_column: str | None = option(None, "image column of the retained data")
    retain_label_column: str | None = option(None, "label column of the retained data: indices or names")
    retain_caption_column: str | None = option(None, "caption column of the retained data, if they are pairs")
    retain_class_names: str | None = option(
        None, "file with one class a line, as --class_names, for labels that the retained data do not name"
    )
    retain_templates: list[str] | None = option(
        None, "prompts for the retained labels, as --templates; 'a photo of a {}.' if not given"
    )
    retain_warning: float = option(
        0.1,
        "fall of top-1 or mean recall that is warned of, as a share of its value before the run: on the retained data, "
        "or the run's own where there are none",
        number(0, 1, says="is a share of the value before the run, {range}", note="1 never warns"),
    )

    def __post_init__(self):
        check_options(self)
        for field in dataclasses.fields(self):
            is_of_data = field.name != "retain_warning"
            require(
                self.retain_data is not None or not is_of_data or getattr(self, field.name) == field.default,
                f"--{field.name} is about the data of --retain_data; give that too.",
            )
        require(
            not (self.retain_caption_column and (self.retain_label_column or self.retain_class_names)),
            "--retain_label_column and --retain_class_names are for labelled --retain_data, --retain_caption_column "
            "for pairs; give one kind.",
        )
        if self.retain_templates is None:
            return
        try:
            read_templates(self.retain_templates)
        except (ValueError, FileNotFoundError) as error:
            raise OptionError(f"--retain_templates: {error}") from None


def starts_trained(arguments: "Arguments") -> bool:
    """Returns whether a run starts from a model that can compare images with texts already, and trains it further."""
    return arguments.model.model_name_or_path is not None and arguments.objective.contrasts


def check_retention(arguments: "Arguments") -> None:
    """Checks that the run starts from a model with abilities to retain, and still compares images with texts.

    Raises:
        OptionError: it does not.
    """
    given = arguments.retention.retain_data is not None
    require(
        not given or arguments.model.model_name_or_path is not None,
        "--retain_data measures what a model that was trained before keeps, and this run starts with a new one. Name "
        "the model to start from with --model_name_or_path, or leave --retain_data out.",
    )
    require(
        not given or arguments.objective.contrasts,
        "--retain_data is measured by comparing images with texts, which --objective reconstruction does not train. "
        "Leave it out.",
    )

"""Every option of pretrain.py and evaluate.py: its range, its choices, and what is said about another value."""

import dataclasses
import json
import math
from pathlib import Path
from typing import get_type_hints

import pytest

from flip_hf.console.counterparts import COUNTERPARTS
from flip_hf.console.fields import RANGE, OptionError, kind_of
from flip_hf.evaluation.options import EvaluationOptions, parse_options
from flip_hf.evaluation.registry import METRICS
from flip_hf.modeling.configuration_pretraining_flip import OBJECTIVES
from flip_hf.training.models import make_config
from flip_hf.training.recipes import GROUPS, option_names
from tests.helpers.arguments import parse

RECIPES = Path(__file__).parents[2] / "flip_hf" / "recipes"
FIELDS = [(group, field) for group in (*GROUPS, EvaluationOptions) for field in dataclasses.fields(group)]
KINDS = {(group, field.name): kind_of(get_type_hints(group)[field.name]) for group, field in FIELDS}
NUMBERS = [each for each in FIELDS if KINDS[each[0], each[1].name].value in (int, float)]
CHOOSING = [each for each in FIELDS if KINDS[each[0], each[1].name].choices]


def name_of(each) -> str | None:
    return each.name if isinstance(each, dataclasses.Field) else None


def outside(within) -> list[float]:
    """Numbers that a range does not hold."""
    bounds = [within.low] if within.open_low else [within.low - 1]
    if within.high is not None:
        bounds.append(within.high if within.open_high else within.high + 1)
    return [*bounds, math.nan, math.inf, -math.inf, -1e300]


@pytest.mark.parametrize(("group", "field"), NUMBERS, ids=name_of)
def test_every_number_has_a_range_that_holds_everywhere(group, field, tmp_path):
    within = field.metadata[RANGE]
    kind = KINDS[group, field.name]
    several = kind.several
    assert within is not None and within.kind is kind.value
    default = field.default_factory() if field.default is dataclasses.MISSING else field.default
    assert all(each in within for each in (default if several and default else [default]) if each is not None)
    base = {"train_data": ["x"]} if "train_data" in {each.name for each in dataclasses.fields(group)} else {}
    base = {"datasets": ["cifar10"]} if group is EvaluationOptions else base
    for value in [*outside(within), "1", True, None if default is not None else "x"]:
        with pytest.raises(OptionError, match=f"--{field.name} "):
            group(**base, **{field.name: [value] if several else value})
    for value in outside(within):
        with pytest.raises(OptionError, match=f"^--{field.name} ") as caught:
            if group is EvaluationOptions:
                parse_options(["--datasets", "cifar10", f"--{field.name}", str(value)])
            else:
                parse(f"--{field.name}", str(value))
        assert str(value) in str(caught.value) and "\n" not in str(caught.value)
        if group is not EvaluationOptions:
            written = {math.inf: ".inf", -math.inf: "-.inf"}.get(value, ".nan" if value != value else value)
            (tmp_path / "r.yaml").write_text(f"{field.name}: {[written] if several else written}\n".replace("'", ""))
            with pytest.raises(ValueError, match=f"r.yaml: {field.name} ") as caught:
                parse(str(tmp_path / "r.yaml"))
            assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("group", "field"), CHOOSING, ids=name_of)
def test_every_choice_is_one_of_those(group, field):
    kind = KINDS[group, field.name]
    base = {"train_data": ["x"]} if "train_data" in {each.name for each in dataclasses.fields(group)} else {}
    base = {"datasets": ["cifar10"]} if group is EvaluationOptions else base
    with pytest.raises(OptionError, match=f"--{field.name} is one of {', '.join(kind.choices)}, got 'x'"):
        group(**base, **{field.name: ["x"] if kind.several else "x"})


def test_the_choices_are_read_from_the_types():
    chosen = {name: kind.choices for (_, name), kind in KINDS.items() if kind.choices}
    assert set(chosen) == {
        *("mask_strategy", "mask_ratio_schedule", "text_mask_strategy", "objective", "loss", "positives"),
        *("optimizer", "precision", "speed_ups"),
        *("tasks", "caption_form", "text_labels", "metric", "probe", "recipe"),
    }
    assert chosen["objective"] == OBJECTIVES
    assert chosen["metric"] == METRICS["classification"]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--base_lr", "nan"], "^--base_lr must be a number between 0 and 1,000, got nan.$"),
        (["--base_lr=-inf"], "^--base_lr must be a number between 0 and 1,000, got -inf.$"),
        (["--base_lr", "-1e-5"], "^--base_lr must be between 0 and 1,000, got -1e-05.$"),
        (["--batch_size", "abc"], "^--batch_size must be an integer between 2 and .*, got 'abc': one pair has no neg"),
        (["--batch_size", "64.0"], "^--batch_size must be an integer"),
        (["--train_samples", "9" * 5000], "^--train_samples must be an integer"),
        (["--compile", "maybe"], "^--compile must be true or false, got 'maybe'.$"),
        (["--batch_size"], "^--batch_size needs a value.$"),
        (["--logit_scale_init_value", "nan"], "^--logit_scale_init_value must be a number between 0 and 4.6052"),
        (["--mask-ration", "0.5"], "^there is no option --mask-ration. Did you mean '--mask_ratio'?"),
        (["--lr", "1e-3"], "^there is no option --lr. Here it is '--base_lr': the rate for 256 samples a step"),
        (["--per-device-train-batch-size", "8"], "Here it is '--batch_size': the samples of all processes.$"),
        (["--bf16"], "^there is no option --bf16. Here it is '--precision'.$"),
        (["--dataset_type", "webdataset"], "^there is no option --dataset_type.$"),
        (["--train_samples", "63"], "^--train_samples 63 is less than a step's --batch_size 64.$"),
        (["--no_export_clip"], "^there is no option --no_export_clip. Did you mean '--export_clip'"),
        (["shapes", "scenes"], "^'scenes' belongs to no option. RECIPE comes before all options.$"),
        (["--seed", "1", "shapes"], "^'shapes' belongs to no option. RECIPE comes before all options.$"),
        (["--vision_config", '{"hidden_sice": 64}'], "no field 'hidden_sice'. Did you mean 'hidden_size'"),
        (["--text_config", '{"context": 64}'], "^--text_config has no field 'context'."),
        (["--decoder_config", '{"image_size": 64}'], "^--decoder_config has no field 'image_size'."),
        (["--vision_config", '{"mask_ratio": 0.9}'], "^--vision_config: mask_ratio is set by --mask_ratio"),
        (["--vision_config", '{"hidden_size": 64, "hidden_size": 65}'], "is given twice"),
        (["--vision_config", "[" * 100_000], "^--vision_config must be JSON such as"),
        (["--vision_config", "1" * 5000], "^--vision_config must be JSON such as"),
    ],
)  # fmt: skip
def test_mistakes_of_the_command_line_are_one_line(argv, message):
    with pytest.raises(OptionError, match=message) as caught:
        parse(*argv)
    assert "\n" not in str(caught.value)


def test_counterparts_of_other_programs_options_are_options_and_their_names_are_not():
    known = set(option_names())
    assert {counterpart.option for counterpart in COUNTERPARTS.values()} <= known
    assert not known & set(COUNTERPARTS)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"hidden_size": -3}, "hidden_size must be between 1"),
        ({"hidden_size": "64"}, "'hidden_size' expected int, got str"),
        ({"hidden_size": True}, "'hidden_size' expected int, got bool"),
        ({"hidden_size": 1e9}, "'hidden_size' expected int, got float"),
        ({"hidden_size": 10**9}, "hidden_size must be between 1"),
        ({"hidden_size": [64]}, "'hidden_size' expected int, got list"),
        ({"layer_norm_eps": math.nan}, "layer_norm_eps must be between 0 and 1, got nan"),
        ({"num_attention_heads": 7}, "must be a multiple of num_attention_heads .7."),
        ({"image_size": 225}, "image_size .225. must be a multiple of patch_size .16."),
        ({"hidden_act": "sinus"}, "hidden_act is one of"),
    ],
)
def test_a_configuration_that_cannot_be_is_one_line_before_memory_is_asked_for(fields, message):
    with pytest.raises(ValueError, match=message) as caught:
        make_config(parse("--train_data", "x", "--vision_config", json.dumps(fields)).model)
    assert str(caught.value).startswith("--vision_config: ") and "\n" not in str(caught.value)


def test_all_options_are_declared_with_their_help():
    for group, field in FIELDS:
        assert field.metadata["help"] and RANGE in field.metadata, (group, field.name)
    assert len(option_names()) > 70
    first = EvaluationOptions(datasets=["x"])
    second = EvaluationOptions(datasets=["y"])
    first.shots.append(3)
    assert 3 not in second.shots and 3 not in EvaluationOptions(datasets=["z"]).shots

"""Recipes that are none: files that are no text, and YAML that is more than plain values."""

import os
from pathlib import Path

import pytest

from flip_hf.console.fields import OptionError
from flip_hf.training.recipes import MAX_RECIPE_BYTES, recipe_options
from tests.helpers.arguments import parse

RECIPES = Path(__file__).parents[2] / "flip_hf" / "recipes"


# Nine references to nine references ...: 300 bytes that are 10^9 values where they are written out.
REFERENCES = "".join(
    f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9 if n else ['x'] * 9)}]\n" for n in range(10)
) + "report_to: *a9\n"  # fmt: skip


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (REFERENCES, "is too large for a recipe"),
        ("report_to: &a [x, *a]\n", "is too large for a recipe"),
        ("vision_config: " + "{a: " * 40 + "1" + "}" * 40, "is too large for a recipe"),
        ("report_to: " + "[" * 20_000, "nested too deeply"),
        ("seed: !!python/object/apply:os.getpid []\n", "line 1: a tag .*os.getpid.*plain values"),
        ("seed: !mine 3\n", "a tag .*mine"),
        ("seed: 1\nbase_lr: 1e-5\nseed: 2\n", "'seed' is given twice"),
        ("vision_config: {hidden_size: 8, hidden_size: 16}\n", "'hidden_size' is given twice"),
        ("seed: 3\n base_lr: 1\n", "r.yaml, line 2: "),
        ("seed: [1\n", "r.yaml, line 2: "),
        ("seed: '1\n", "r.yaml, line 2: "),
        ("\tseed: 1\n", "r.yaml, line 1: "),
        ("seed: *nobody\n", "r.yaml, line 1: "),
        ("a: 1\n---\nb: 2\n", "r.yaml, line 2: "),
        ("- seed\n", "must map option names to values"),
        ("seed", "must map option names to values"),
        ("seed: 2001-99-99\n", "r.yaml: seed must be an integer"),
        ("seed: 2001-01-01\n", "r.yaml: seed must be an integer between 0 and .*, got '2001-01-01'"),
        (f"seed: {'9' * 5000}\n", "r.yaml"),
        ("seed: 1:30\n", "r.yaml: seed must be an integer"),
        ("seed: true\n", "r.yaml: seed must be an integer between .*, got 'true'"),
        ("seed: [1, 2]\n", "r.yaml: seed takes one value"),
        ("seed: {a: 1}\n", "r.yaml: seed must be one value"),
        ("report_to: []\n", "r.yaml: report_to takes at least one value"),
        ("report_to: [[x]]\n", "r.yaml: report_to must be one value"),
        ("output_dir: {a: 1}\n", "r.yaml: output_dir must be one value"),
        ("templates: ['a {}', ~]\n", "r.yaml: templates must be one value, got None"),
        ("compile: maybe\n", "r.yaml: compile must be true or false"),
        ("vision_config: {hidden_size: 2001-01-01}\n", "r.yaml: vision_config must hold numbers and texts"),
        ("vision_config: {hidden_sice: 8}\n", "no field 'hidden_sice'. Did you mean 'hidden_size'"),
        ("vision_config: 8\n", "--vision_config must be a JSON object"),
        ("3: 4\n", "there is no option '3'"),
        ("? [a, b]\n: 4\n", "r.yaml: there is no option"),
        ("base: 3\n", "r.yaml: base must be the name of a recipe"),
        ("base: ./r.yaml\n", "has itself as its base|There is no recipe"),
        ("train_data: \"a\\0b\"\n", "must not hold a null character"),
        ("\x07seed: 1\n", "r.yaml is not YAML"),
    ],
)  # fmt: skip
def test_invalid_recipes_are_refused_in_one_line(text, message, tmp_path, monkeypatch):
    (tmp_path / "r.yaml").write_text(text)
    with pytest.raises((ValueError, FileNotFoundError), match=message) as caught:
        parse(tmp_path / "r.yaml")
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 600


def test_files_that_are_no_text_are_not_read(tmp_path):
    (tmp_path / "binary").write_bytes(bytes(range(256)))
    (tmp_path / "null").write_bytes(b"seed: 1\0\n")
    (tmp_path / "large").write_text("#" * (MAX_RECIPE_BYTES + 1))
    with open(tmp_path / "huge", "wb") as file:
        file.truncate(2 * 2**30)  # sparse
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    cases = {
        "binary": "not UTF-8 text",
        "null": "is a binary file",
        "large": "is too large for a recipe",
        "huge": "is too large for a recipe",
        "pipe": "is not a regular file but a pipe",
        ".": "is a folder; name the file",
        "loop": "There is no recipe",
        "x" * 300: "There is no recipe",
    }
    for name, message in cases.items():
        with pytest.raises((ValueError, FileNotFoundError), match=message) as caught:
            parse(tmp_path / name)
        assert "\n" not in str(caught.value)


def test_bases_end(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "r.yaml").write_text("base: ../a/r.yaml\n")
    with pytest.raises((ValueError, FileNotFoundError), match="itself as its base|no recipe"):
        recipe_options("r", tmp_path / "a")
    for number in range(40):
        (tmp_path / f"r{number}.yaml").write_text(f"base: r{number + 1}\n")
    with pytest.raises(ValueError, match="too many bases"):
        recipe_options("r0", tmp_path)


def test_text_is_read_literally_and_good_recipes_are_unchanged(tmp_path):
    (tmp_path / "r.yaml").write_bytes(
        b"\xef\xbb\xbftrain_data: [on, 1.10]\ntrain_split: 012\neval_split: yes\ncompile: on\nseed: 010\n"
        b"base_lr: 4e-6\nspecial_tokens: 1\nflip: '0.25'\ngradient_checkpointing: 'no'\nclass_names: ~\n"
        b"report_to: &r [none]\nvision_config: &v {hidden_size: 96}\ndecoder_config: *v\n"
    )
    arguments = parse(tmp_path / "r.yaml")
    assert arguments.data.train_data == ["on", "1.10"] and arguments.data.train_split == "012"
    assert arguments.data.eval_split == "yes" and arguments.data.class_names is None
    assert arguments.optimization.compile is True and arguments.data.special_tokens is True
    assert arguments.data.flip == 0.25 and arguments.model.gradient_checkpointing is False and arguments.run.seed == 10
    assert arguments.optimization.base_lr == 4e-6 and arguments.model.tower_configs()["vision_config"] == {
        "hidden_size": 96
    }
    for path in RECIPES.glob("*.yaml"):
        import yaml

        said = yaml.safe_load(path.read_text())
        base = recipe_options(said.pop("base"), RECIPES) if "base" in said else {}
        assert recipe_options(path.stem, RECIPES) == base | said


def test_a_value_of_the_recipe_is_named_by_its_file_and_one_of_the_command_line_by_its_option(tmp_path):
    (tmp_path / "r.yaml").write_text("train_data: x\nbase_lr: -1\n")
    with pytest.raises(ValueError, match="r.yaml: base_lr must be between 0 and 1,000, got -1") as caught:
        parse(tmp_path / "r.yaml", "--base_lr", "1e-5")
    assert not isinstance(caught.value, OptionError)
    (tmp_path / "r.yaml").write_text("train_data: x\nbase_lr: 1\n")
    with pytest.raises(OptionError, match="^--base_lr must be between 0 and 1,000, got -1.0.$"):
        parse(tmp_path / "r.yaml", "--base_lr", "-1")

"""Starting points that are not available: one line, before anything is computed."""

import copy
import json
import os
from pathlib import Path

import pytest
from tokenizers.processors import TemplateProcessing
from transformers import BlipConfig

from flip_hf import FlipModel
from flip_hf.data.sources import open_source
from flip_hf.data.tokenization import check_pooling
from flip_hf.training.memory_limit import check_memory, parameters_at_least
from flip_hf.training.models import make_config, make_model, make_processor, make_tokenizer
from tests.helpers.arguments import parse
from tests.helpers.models import tiny_config

RECIPES = Path(__file__).parents[2] / "flip_hf" / "recipes"


def parse_start(*argv: object):
    return parse("--train_data", "x", *argv)


def start(*argv: object) -> None:
    """All that a run does with what it starts from."""
    arguments = parse_start(*argv)
    config = make_config(arguments.model, arguments.objective)
    tokenizer = make_tokenizer(arguments, [], 16) if "--init_vision_from" not in argv else None
    make_model(arguments, config, tokenizer)
    make_processor(config, tokenizer, arguments.model)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def fewer_layers(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["vision_config"]["num_hidden_layers"] = 1
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda folder: cut(folder / "model.safetensors"), "model.safetensors is damaged"),
        (lambda folder: (folder / "model.safetensors").unlink(), "it has no weights"),
        (lambda folder: cut(folder / "config.json"), "config.json is damaged"),
        (fewer_layers, "do not fit its config.json|has another shape|has no weights|does not fit"),
    ],
)
@pytest.mark.parametrize("option", ["--model_name_or_path", "--init_vision_from"])
def test_a_damaged_start_is_named(saved, spoil, message, option):
    start(option, saved)
    spoil(saved)
    if option == "--init_vision_from" and spoil is fewer_layers:
        return  # a tower of fewer blocks is one
    with pytest.raises(ValueError, match=message) as caught:
        start(option, saved)
    assert "\n" not in str(caught.value) and str(saved) in str(caught.value)


def test_a_damaged_tokenizer_or_processor_is_named(saved):
    text = (saved / "processor_config.json").read_text()
    (saved / "processor_config.json").write_text("{")
    with pytest.raises(ValueError, match="processor_config.json is damaged"):
        start("--model_name_or_path", saved)
    (saved / "processor_config.json").write_text(text)
    cut(saved / "tokenizer.json")
    with pytest.raises(ValueError, match="The tokenizer .* cannot be loaded: tokenizer.json is damaged"):
        start("--model_name_or_path", saved)


def test_a_model_of_another_kind_is_not_taken_for_a_flip(tmp_path):
    BlipConfig().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="of type 'blip', neither a FLIP nor a CLIP nor a SigLIP. `flip-hf convert`"):
        make_config(parse_start("--model_name_or_path", tmp_path).model)


@pytest.mark.parametrize("option", ["--model_name_or_path", "--init_vision_from", "--tokenizer"])
def test_a_model_missing_offline_is_refused_in_one_line_with_the_fix(option):
    with pytest.raises(ValueError, match="HF_HUB_OFFLINE.*`hf download some-body/something`") as caught:
        start(option, "some-body/something")
    assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="cannot be loaded: there is no such folder.$"):
        start(option, "/nowhere/something")


def test_every_recipe_of_the_paper_names_its_missing_tokenizer_in_one_line():
    said = set()
    for path in RECIPES.glob("vit_*.yaml"):
        arguments = parse(path.stem, "--train_data", "x")
        if arguments.data.tokenizer is None:
            continue
        with pytest.raises(ValueError, match="HF_HUB_OFFLINE.*`hf download ") as caught:
            make_tokenizer(arguments, [], 32)
        said.add("\n" in str(caught.value))
    assert said == {False}


def test_a_model_larger_than_the_memory_is_refused_before_it_is_made():
    config = tiny_config()
    small = parameters_at_least(config)
    assert 0.8 < small / FlipModel(config).num_parameters() < 1.05
    check_memory(config)
    wide = json.dumps({"hidden_size": 2**16, "intermediate_size": 2**18, "num_hidden_layers": 1000})
    arguments = parse_start("--vision_config", json.dumps({**json.loads(wide), "num_attention_heads": 64}))
    config = make_config(arguments.model)
    assert parameters_at_least(config) * 4 > os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    with pytest.raises(ValueError, match="billion parameters takes .* GB for its weights; this machine has"):
        make_model(arguments, config, None)


def test_a_run_reports_the_share_of_captions_its_tokenizer_loses(saved, capsys):
    sources = [open_source("shapes")]
    learned = make_tokenizer(parse_start("--tokenizer_samples", 2000), sources, 8)
    line = capsys.readouterr().out
    assert line.startswith(f"Tokenizer learned: {len(learned):,} tokens; of 1,000 captions, 0 contain an unknown word")
    make_tokenizer(parse_start("--model_name_or_path", saved), sources, 16)
    assert capsys.readouterr().out.startswith(f"Tokenizer {saved}: ")


def test_a_feature_that_the_tokenizer_never_gives_is_refused(tokenizer, tmp_path):
    """Pooling would read the first token of every text, without a word."""
    config = tiny_config(text={"vocab_size": 600, "pooling_type": "eos", "eos_token_id": 3}).text_config
    with pytest.raises(ValueError, match='pooling_type="eos" reads .* at token 3, .*--special_tokens'):
        check_pooling(tokenizer, config)
    config.pooling_type = "argmax"
    with pytest.raises(ValueError, match='pooling_type="argmax" reads'):
        check_pooling(tokenizer, config)
    config.pooling_type = "first"
    check_pooling(tokenizer, config)
    ended = copy.deepcopy(tokenizer)
    ended.add_special_tokens({"eos_token": "<end>"})
    end = ended.convert_tokens_to_ids("<end>")
    ended.backend_tokenizer.post_processor = TemplateProcessing(single="$A <end>", special_tokens=[("<end>", end)])
    for pooling in ("eos", "argmax"):
        config.pooling_type = pooling
        config.eos_token_id = end
        check_pooling(ended, config)
    config.pooling_type = "eos"
    config.eos_token_id = 3
    with pytest.raises(ValueError, match="at token 3"):
        check_pooling(ended, config)

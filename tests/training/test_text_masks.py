"""Text masks of a run: drawn with its samples, packed, the same again, and by the words of its own captions."""

import itertools
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from flip_hf import FlipModel
from flip_hf.data.frequencies import FILE, WordFrequencies, read_frequencies
from flip_hf.data.tokenization import train_wordpiece
from flip_hf.modeling.masking_flip import TEXT_MASK_STRATEGIES
from flip_hf.training.arguments import ModelArguments
from flip_hf.training.build import build_trainer
from flip_hf.training.encoder import PairEncoder
from flip_hf.training.masks import TextMasks
from flip_hf.training.packing import Tokenize
from tests.helpers.arguments import parse
from tests.helpers.models import randomize, tiny_config
from tests.helpers.pairs import write_tar
from tests.helpers.pretraining import SHORT, TINY, pretrain
from tests.helpers.tokenizers import with_ends
from tests.helpers.trainers import make_trainer, trainer_of

CAPTIONS = [
    "a red circle above a blue square",
    "the green triangle",
    "a photo of a large purple cross and a small cross in the middle of a black background",
    "",
]
COMMON = {"a": 0.2, "the": 0.1, "of": 0.1, "cross": 0.01, "red": 0.001}


@pytest.fixture
def clip_tokenizer():
    return with_ends(train_wordpiece(CAPTIONS * 3, vocab_size=600, context_length=16))


def counted(tokenizer) -> WordFrequencies:
    return WordFrequencies({(tokenizer.convert_tokens_to_ids(w),): f for w, f in COMMON.items()}, 1e-6, ())


def masks_of(strategy: str, text_config, tokenizer) -> TextMasks:
    options = ModelArguments(text_mask_strategy=strategy)
    return TextMasks(options, text_config, tokenizer, counted(tokenizer) if strategy == "frequency" else None)


@pytest.mark.parametrize("strategy", TEXT_MASK_STRATEGIES)
@pytest.mark.parametrize("pooling", ["first", "mean", "eos", "argmax"])
def test_the_count_is_exact_and_the_first_and_pooled_tokens_survive(pooling, strategy, clip_tokenizer):
    text = {"pooling_type": pooling, "eos_token_id": clip_tokenizer.eos_token_id}
    masks = masks_of(strategy, tiny_config(text=text).get_text_config(), clip_tokenizer)
    encoded = clip_tokenizer(CAPTIONS * 20, padding=True, truncation=True, return_tensors="pt")
    masked = masks(encoded, torch.rand(80, 16), kept=3)
    assert masked["input_ids"].shape == (80, 3) and (masked["input_ids"][:, 0] == clip_tokenizer.bos_token_id).all()
    if pooling in ("eos", "argmax"):
        assert (masked["input_ids"] == clip_tokenizer.eos_token_id).any(1).all()
    if strategy != "random":
        assert torch.equal(masked["attention_mask"].sum(1), encoded["attention_mask"].sum(1).clamp(max=3))


def test_rare_words_stay_and_common_ones_go(clip_tokenizer):
    masks = masks_of("frequency", tiny_config().get_text_config(), clip_tokenizer)
    encoded = clip_tokenizer([CAPTIONS[0]] * 2000, padding=True, return_tensors="pt")
    masked = masks(encoded, torch.rand(2000, 16), kept=4)
    kept = {
        word: (masked["input_ids"] == encoded["input_ids"][0, place]).float().mean().item() * 4
        for word, place in (("a", 1), ("red", 2), ("circle", 3), ("blue", 6))
    }
    assert kept["a"] < 0.01 < kept["red"] < 0.05  # though `a` comes twice
    assert abs(kept["circle"] - 0.5) < 0.05 and abs(kept["blue"] - 0.5) < 0.05  # neither was counted
    assert (masked["input_ids"] == clip_tokenizer.eos_token_id).any(1).all()  # not pooled here, but no word


@pytest.mark.parametrize("strategy", TEXT_MASK_STRATEGIES)
@pytest.mark.parametrize("pooling", ["first", "eos"])
def test_packed_masked_texts_have_the_features_of_padded_ones(pooling, strategy, clip_tokenizer):
    text = {"pooling_type": pooling, "causal": pooling == "eos", "eos_token_id": clip_tokenizer.eos_token_id}
    model = randomize(FlipModel(tiny_config(text=text))).double().eval()
    text_config = model.config.get_text_config()
    tokenize = Tokenize(clip_tokenizer, text_config, masks_of(strategy, text_config, clip_tokenizer), True)
    noise = torch.rand(40, 16)
    packed = tokenize(CAPTIONS * 10, None, noise, 6)
    tokenize.packs = False
    padded = tokenize(CAPTIONS * 10, None, noise, 6)
    assert packed["input_ids"].numel() < 0.9 * tokenize(CAPTIONS * 10)["input_ids"].numel()
    assert torch.equal(packed.pop("caption_ids"), padded.pop("caption_ids"))  # of the whole captions
    pixels = torch.randn(40, 3, 32, 32).double()
    one, other = (
        PairEncoder(model)(**each, pixel_values=pixels, mask_ratio=0).text_embeds for each in (packed, padded)
    )
    torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


# -- real runs --------------------------------------------------------------------------------------------------------

MASKED = [
    "--text_mask_ratio",
    "0.5",
    "--micro_batch_size",
    "16",
    "--checkpoint_samples",
    "64",
    "--keep_checkpoints",
    "9",
]


def texts_of(batches) -> list[dict[str, torch.Tensor]]:
    return [{name: value for name, value in batch.items() if name != "patches"} for batch in batches]


def are_equal(ones: list[dict], others: list[dict]) -> bool:
    pairs = zip(ones, others, strict=True)
    return all(one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one) for one, other in pairs)


@pytest.mark.parametrize(
    ("strategy", "workers"), [("random", "0"), ("prioritized", "2"), ("block", "0"), ("frequency", "2")]
)
def test_the_loader_draws_the_same_masks_again_and_after_resuming(strategy, workers, tar_folder, tmp_path):
    options = [*MASKED, "--text_mask_strategy", strategy, "--num_workers", workers]
    loader = make_trainer(tmp_path / "run", tar_folder, *options).loader
    first = texts_of(itertools.islice(loader, 3))
    state = json.loads(json.dumps(loader.state_dict()))
    rest = texts_of(itertools.islice(loader, 4))
    again = make_trainer(tmp_path / "again", tar_folder, *options).loader
    assert are_equal(texts_of(itertools.islice(again, 7)), first + rest)
    again._restore([state])
    assert are_equal(texts_of(itertools.islice(again, 4)), rest)


def test_masked_texts_leave_captions_and_patches_as_they_were(tar_folder, tmp_path):
    """And another seed draws others."""
    options = ["--text_mask_strategy", "block", "--micro_batch_size", "16", "--shuffle_block", "1"]
    masked = list(itertools.islice(make_trainer(tmp_path / "a", tar_folder, *options, *MASKED).loader, 3))
    whole = list(itertools.islice(make_trainer(tmp_path / "b", tar_folder, *options).loader, 3))
    for one, other in zip(masked, whole, strict=True):
        assert torch.equal(one["ids_keep"], other["ids_keep"]) and torch.equal(one["patches"], other["patches"])
        assert one["input_ids"].numel() < other["input_ids"].numel()
    other_seed = make_trainer(tmp_path / "c", tar_folder, *options, *MASKED, "--seed", "7").loader
    assert not are_equal(texts_of(itertools.islice(other_seed, 3)), texts_of(masked))


@pytest.mark.parametrize("strategy", TEXT_MASK_STRATEGIES)
def test_a_run_resumes_to_the_same_bits(strategy, tar_folder, tmp_path):
    options = [*MASKED, "--text_mask_strategy", strategy, "--unmasked_samples", "32"]
    make_trainer(tmp_path / "straight", tar_folder, *options).run()
    checkpoint = tmp_path / "straight" / "checkpoint-000000000128"
    shutil.copytree(checkpoint, tmp_path / "resumed" / checkpoint.name)
    trainer = make_trainer(tmp_path / "resumed", tar_folder, *options, "--resume_from_checkpoint", "latest")
    assert trainer.state.samples == 128
    trainer.run()
    expected, found = (load_file(tmp_path / name / "model.safetensors") for name in ("straight", "resumed"))
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    assert (checkpoint / FILE).is_file() == (strategy == "frequency")


@pytest.fixture(scope="module")
def by_frequency(samples, tmp_path_factory) -> tuple[Path, list[str]]:
    """The folder of a run of two processes on a mixture that masks by frequency, and its arguments."""
    folder = tmp_path_factory.mktemp("frequency")
    for name, first, last in (("a", 0, 96), ("b", 96, 160)):
        (folder / name).mkdir()
        for start in range(first, last, 16):
            write_tar(folder / name / f"{start:03d}.tar", samples[start : start + 16])
    argv = ["--train_data", str(folder / "a"), str(folder / "b"), "--train_weights", "3", "1", *TINY, *SHORT]
    argv += ["--text_mask_ratio", "0.5", "--text_mask_strategy", "frequency", "--num_workers", "0"]
    argv += ["--train_samples", "128", "--unmasked_samples", "0", "--checkpoint_samples", "64"]
    run = pretrain(*argv, "--output_dir", str(folder / "run"), processes=2)
    assert run.returncode == 0, run.stderr[-3000:]
    assert run.stdout.count("Word frequencies: ") == 1
    return folder, argv


def built(folder: Path, argv: list[str], *more: str):
    return build_trainer(parse(*argv, "--output_dir", str(folder), *more))


def test_two_processes_count_what_one_counts(by_frequency, tmp_path):
    folder, argv = by_frequency
    built(tmp_path / "alone", argv)
    table = (folder / "run" / FILE).read_bytes()
    assert (tmp_path / "alone" / FILE).read_bytes() == table
    assert (folder / "run" / "checkpoint-000000000128" / FILE).read_bytes() == table
    found = read_frequencies(folder / "run").sources
    assert [(source.weight, source.captions) for source in found] == [(0.75, 96), (0.25, 64)]


def test_a_resumed_run_keeps_the_words_of_its_checkpoint(by_frequency, tmp_path, caplog, capsys):
    folder, argv = by_frequency
    checkpoint = tmp_path / "checkpoint-000000000064"
    shutil.copytree(folder / "run" / "checkpoint-000000000064", checkpoint)
    other = ["--train_weights", "1", "1", "--resume_from_checkpoint", str(checkpoint)]
    trainer = built(tmp_path / "other", [*argv, "--train_samples", "256"], *other)
    assert trainer.frequencies == read_frequencies(checkpoint)
    assert (tmp_path / "other" / FILE).read_bytes() == (checkpoint / FILE).read_bytes()
    assert "in 160 captions, from checkpoint-000000000064." in capsys.readouterr().out
    message = next(record.getMessage() for record in caplog.records if "were counted in" in record.getMessage())
    assert f"were counted in 0.75 x {folder / 'a'}, 0.25 x {folder / 'b'}, and this run reads 0.5 x" in message
    assert f"start a new run from its weights: --model_name_or_path {checkpoint}" in message


def test_a_run_that_begins_to_mask_by_frequency_counts_then(tar_folder, tmp_path, caplog):
    make_trainer(tmp_path / "whole", tar_folder, "--checkpoint_samples", "64", "--keep_checkpoints", "9").run()
    options = ["--text_mask_ratio", "0.5", "--text_mask_strategy", "frequency", "--train_samples", "320"]
    options += ["--resume_from_checkpoint", str(tmp_path / "whole" / "checkpoint-000000000128")]
    trainer = make_trainer(tmp_path / "resumed", tar_folder, *options)
    assert trainer.frequencies is not None and (tmp_path / "resumed" / FILE).is_file()
    assert any("has no word frequencies: they are counted now" in record.getMessage() for record in caplog.records)


def test_texts_are_masked_beside_a_reconstruction_and_not_read_for_one_alone(tar_folder, tmp_path):
    options = [*MASKED, "--text_mask_strategy", "frequency"]
    both = trainer_of(tmp_path / "both", tar_folder, "both", *options)
    batch = next(iter(both.loader))
    assert both.frequencies is not None and batch["patches"].shape[1] > batch["ids_keep"].shape[1]
    assert (batch["position_ids"] > 0).sum() < 16 * 8  # 8 of 16 tokens of 16 texts
    alone = trainer_of(tmp_path / "alone", tar_folder, "reconstruction", *options)
    assert alone.frequencies is None and not (tmp_path / "alone" / FILE).exists()
    assert set(next(iter(alone.loader))) == {"patches", "ids_keep"}

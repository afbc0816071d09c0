"""Packed texts: the same features and gradients as padded ones, every token once, few shapes."""

import pytest
import torch

from flip_hf import FlipConfig, FlipModel
from flip_hf.data.tokenization import train_wordpiece
from flip_hf.training.encoder import PairEncoder
from flip_hf.training.packing import STEPS, Tokenize, can_pack, pack_texts, padded_rows

CONTEXT = 12
EOS = 49
FLIP = {"pooling_type": "first"}
CLIP = {"causal": True, "pooling_type": "eos", "eos_token_id": EOS, "pad_token_id": EOS}
OLD_CLIP = {"causal": True, "pooling_type": "argmax", "pad_token_id": 0}


def make_model(text: dict) -> FlipModel:
    torch.manual_seed(0)
    size = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = FlipConfig(
        text_config={**size, "vocab_size": EOS + 1, "max_position_embeddings": CONTEXT, **text},
        vision_config={**size, "image_size": 32, "patch_size": 8},
        projection_dim=16,
    )
    return FlipModel(config).double().train()


def make_texts(lengths: list[int], pad: int) -> dict[str, torch.Tensor]:
    attention_mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
    input_ids = torch.randint(1, EOS, attention_mask.shape).where(attention_mask.bool(), torch.tensor(pad))
    for row, length in enumerate(lengths):
        if length:
            input_ids[row, length - 1] = EOS
    return {"input_ids": input_ids, "attention_mask": attention_mask}


def features_and_gradients(model: FlipModel, batch: dict, weights: torch.Tensor) -> list[torch.Tensor]:
    texts = PairEncoder(model)(**batch, mask_ratio=0).text_embeds
    model.zero_grad()
    (texts * weights).sum().backward()
    gradients = [p.grad for name, p in sorted(model.named_parameters()) if name.startswith("text_")]
    return [texts.detach(), *gradients]


@pytest.mark.parametrize("text", [FLIP, CLIP, OLD_CLIP], ids=["flip", "clip", "argmax"])
def test_packed_texts_have_the_features_and_gradients_of_padded_ones(text):
    model = make_model(text)
    config = model.config.get_text_config()
    assert can_pack(config)
    lengths = [3, 12, 1, 7, 2, 5, 9, 1, 4, 4] + [0] * (not config.causal)
    texts = make_texts(lengths, config.pad_token_id)
    packed = pack_texts(**texts, text_config=config)
    assert len(packed["input_ids"]) < len(lengths) / 2
    pixels, weights = (torch.randn(len(lengths), *shape).double() for shape in ((3, 32, 32), (16,)))
    expected = features_and_gradients(model, {**texts, "pixel_values": pixels}, weights)
    actual = features_and_gradients(model, {**packed, "pixel_values": pixels}, weights)
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


def test_every_token_comes_once_in_rows_that_are_nearly_full():
    config = make_model(FLIP).config.get_text_config()
    lengths = torch.randint(1, CONTEXT + 1, (600,)).tolist()
    texts = make_texts(lengths, 0)
    packed = pack_texts(**texts, text_config=config)
    rows, width = packed["input_ids"].shape
    assert width == CONTEXT and rows % -(-600 // STEPS) == 0
    assert sum(lengths) / (rows * width) > 0.95
    starts = packed["pooled_tokens"]
    ids = packed["input_ids"].flatten()
    positions = packed["position_ids"].flatten()
    for start, length, text in zip(starts.tolist(), lengths, texts["input_ids"], strict=True):
        assert start // width == (start + length - 1) // width  # no text goes over the end of a row
        assert torch.equal(ids[start : start + length], text[:length])
        assert torch.equal(positions[start : start + length], torch.arange(length))
    assert (ids != 0).sum() == sum(lengths)


def test_texts_are_padded_where_packing_would_change_something():
    config = make_model(FLIP).config.get_text_config()
    for field, value in (("attend_to_padding", True), ("pooling_type", "mean"), ("_attn_implementation", "eager")):
        config = make_model(FLIP).config.get_text_config()
        setattr(config, field, value)
        assert not can_pack(config), field


@pytest.mark.parametrize(
    ("num_rows", "batch_size", "few", "fewest"),
    [(5, 16, 5, 8), (33, 64, 33, 40), (131, 256, 132, 136), (520, 1024, 528, 544), (33_000, 65_536, 33_792, 34_816)],
)
def test_batches_of_a_size_share_their_numbers_of_rows(num_rows, batch_size, few, fewest):
    assert padded_rows(num_rows, batch_size) == few
    assert padded_rows(num_rows, batch_size, fewest_shapes=True) == fewest


def draw_captions(batch_size: int) -> list[str]:
    """Captions of log-normal lengths, cut to the context by the tokenizer."""
    lengths = (4 * (0.5 * torch.randn(batch_size)).exp()).round().clamp(min=1).int().tolist()
    return [" ".join(["square"] * length) for length in lengths]


@pytest.mark.parametrize("text", [FLIP, {"pooling_type": "mean"}], ids=["packed", "padded"])
def test_200_batches_have_a_handful_of_shapes_and_the_same_features(text):
    model = make_model(text)
    config = model.config.get_text_config()
    tokenizer = train_wordpiece(["square"] * 9, vocab_size=EOS + 1, context_length=CONTEXT)
    plain, fewest = (Tokenize(tokenizer, config, fewest_shapes=few) for few in (False, True))
    shapes = {True: set(), False: set()}
    for number in range(200):
        captions = draw_captions(64)
        batches = {few: tokenize(captions) for few, tokenize in ((False, plain), (True, fewest))}
        for few, batch in batches.items():
            shapes[few].add(tuple((name, tuple(value.shape)) for name, value in batch.items()))
        if number % 50 == 0:
            one, other = (PairEncoder(model).get_text_features(**batch).pooler_output for batch in batches.values())
            torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)
    assert len(shapes[True]) <= (3 if plain.packs else 1) and len(shapes[True]) < len(shapes[False])

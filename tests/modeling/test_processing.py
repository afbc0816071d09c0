import json

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoProcessor, AutoTokenizer, CLIPVisionConfig, CLIPVisionModel

from flip_hf import FlipImageProcessorPil, FlipProcessor
from flip_hf.data.tokenization import check_vocabulary, load_tokenizer, train_wordpiece
from flip_hf.data.transforms import EvalTransform
from flip_hf.modeling.masking_flip import cut_patches
from flip_hf.training.arguments import IMAGE_MEAN, IMAGE_STD
from flip_hf.training.models import make_processor
from flip_hf.training.patches import Normalize
from tests.helpers.models import IMAGE_SIZE, PATCH_SIZE, tiny_config


@pytest.fixture
def image() -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (40, 56, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((112, 80), Image.Resampling.BICUBIC)


def test_a_call_is_clipprocessors(processor, image):
    inputs = processor(
        text=["a red circle", "a large blue star on a black background"], images=image, return_tensors="pt"
    )
    assert inputs.pixel_values.shape == (1, 3, IMAGE_SIZE, IMAGE_SIZE)
    assert inputs.input_ids.shape == inputs.attention_mask.shape
    assert inputs.attention_mask.sum(1).tolist()[0] == 3
    assert processor.tokenizer.convert_ids_to_tokens(inputs.input_ids[0].tolist())[:3] == ["a", "red", "circle"]
    assert set(processor(images=image, return_tensors="pt")) == {"pixel_values"}
    assert set(processor(text="a red circle", return_tensors="pt")) == {"input_ids", "attention_mask"}


def test_overlong_text_is_cut_to_the_context(processor):
    inputs = processor(text=["a very " + "very " * 40 + "long text"], return_tensors="pt")
    assert inputs.input_ids.shape == (1, 16)


def test_a_call_may_override_the_defaults(processor):
    inputs = processor(text=["a red circle"], padding="max_length", return_tensors="pt")
    assert inputs.input_ids.shape == (1, 16)


def test_processor_is_the_same_after_saving(processor, image, tmp_path):
    processor.save_pretrained(tmp_path)
    loaded = AutoProcessor.from_pretrained(tmp_path)
    assert isinstance(loaded, FlipProcessor)
    call = {"text": ["a red circle", "a tiny star"], "images": image, "return_tensors": "pt"}
    before = processor(**call)
    after = loaded(**call)
    assert torch.equal(before.input_ids, after.input_ids)
    # Where torchvision is installed, loading picks its backend: one grey level apart.
    assert (before.pixel_values - after.pixel_values).abs().max() < 0.02
    assert AutoTokenizer.from_pretrained(tmp_path)("a red circle").input_ids == before.input_ids[0, :3].tolist()


@pytest.mark.parametrize("official", [False, True])
def test_the_processors_code_is_named_for_the_processor_alone(processor, tokenizer, image, official, tmp_path):
    """Image processor and tokenizer saved elsewhere must not ask for a file that is not there."""
    if official:
        processor = FlipProcessor(FlipImageProcessorPil(), tokenizer)
    processor.save_pretrained(tmp_path / "flip")
    loaded = AutoProcessor.from_pretrained(tmp_path / "flip")
    whole = json.loads((tmp_path / "flip" / "processor_config.json").read_text())
    assert whole["auto_map"] == {"AutoProcessor": "processing_flip.FlipProcessor"}
    assert (tmp_path / "flip" / "processing_flip.py").is_file()
    assert "auto_map" not in (tmp_path / "flip" / "tokenizer_config.json").read_text()
    assert whole["image_processor"].get("auto_map", {}).keys() == ({"AutoImageProcessor"} if official else set())
    for number, part in enumerate([processor, loaded]):
        tower = tmp_path / f"tower-{number}"
        CLIPVisionModel(CLIPVisionConfig(hidden_size=8, num_attention_heads=2, num_hidden_layers=1)).save_pretrained(
            tower
        )
        part.image_processor.save_pretrained(tower)
        assert "AutoProcessor" not in (tower / "preprocessor_config.json").read_text()
        again = AutoProcessor.from_pretrained(tower)
        expected = part.image_processor(image, return_tensors="pt").pixel_values
        # Where torchvision is installed, loading picks its backend: one grey level apart.
        assert (again(image, return_tensors="pt").pixel_values - expected).abs().max() < 0.02
        part.tokenizer.save_pretrained(tmp_path / "words")
        assert "auto_map" not in (tmp_path / "words" / "tokenizer_config.json").read_text()
        # Saving did not change what is published next.
        part.save_pretrained(tmp_path / "again")
        assert json.loads((tmp_path / "again" / "processor_config.json").read_text())["auto_map"] == whole["auto_map"]


def test_training_evaluates_on_the_processors_images(processor, image):
    ours = Normalize(IMAGE_MEAN, IMAGE_STD)(cut_patches(EvalTransform(IMAGE_SIZE)(image)[None], PATCH_SIZE))
    theirs = cut_patches(processor(images=image, return_tensors="pt").pixel_values, PATCH_SIZE)
    assert (ours - theirs).abs().max() < 1e-5


@pytest.mark.parametrize("mode", ["L", "LA", "RGBA", "P", "CMYK", "1"])
def test_every_image_mode_becomes_three_channels(processor, image, mode):
    assert processor(images=image.convert("L").convert(mode), return_tensors="pt").pixel_values.shape[1] == 3


def test_a_tokenizer_that_pads_on_the_left_is_refused(processor, tokenizer):
    left = train_wordpiece(["a red circle"], context_length=16)
    left.padding_side = "left"
    with pytest.raises(ValueError, match="pads on the right"):
        FlipProcessor(processor.image_processor, left)


def test_learned_word_pieces_have_no_special_tokens_and_pad_with_zero(tokenizer):
    assert tokenizer.tokenize("A Red circle.") == ["a", "red", "circle", "."]
    assert tokenizer(["a red circle", "red"], padding=True).input_ids[1][1:] == [0, 0]
    assert tokenizer.model_input_names == ["input_ids", "attention_mask"]


def test_a_bert_tokenizer_is_taken_without_its_special_tokens(tmp_path):
    """Saved and loaded again, neither [CLS] nor [SEP] comes back."""
    from transformers import BertTokenizer

    vocab = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "red", "circle", "##s"]
    bert = BertTokenizer(vocab={token: i for i, token in enumerate(vocab)})
    bert.save_pretrained(tmp_path / "bert")
    assert len(bert("a red circles").input_ids) == 6
    tokenizer = load_tokenizer(str(tmp_path / "bert"), context_length=8, special_tokens=False)
    assert tokenizer("a red circles").input_ids == [5, 6, 7, 8]
    make_processor(tiny_config(), tokenizer).save_pretrained(tmp_path / "flip")
    loaded = AutoProcessor.from_pretrained(tmp_path / "flip").tokenizer
    assert loaded("a red circles").input_ids == [5, 6, 7, 8]
    assert loaded.model_max_length == 8
    with_special = load_tokenizer(str(tmp_path / "bert"), context_length=8, special_tokens=True)
    assert with_special("a red circles").input_ids == [2, 5, 6, 7, 8, 3]


def test_a_vocabulary_larger_than_the_models_is_refused(tokenizer):
    check_vocabulary(tokenizer, len(tokenizer))
    with pytest.raises(ValueError, match=f"{len(tokenizer)} tokens, the model's table only 50"):
        check_vocabulary(tokenizer, 50)

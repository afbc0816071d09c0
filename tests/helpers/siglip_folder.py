"""A SigLIP as people have it: a folder with a processor, whose tokenizer pads with another token than the model's."""

import io
from pathlib import Path

from transformers import PreTrainedTokenizerBase, SiglipConfig, SiglipModel, SiglipProcessor
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from flip_hf.data.tokenization import train_wordpiece
from tests.helpers.models import randomize
from tests.helpers.pairs import shapes_rows


def make_siglip_folder(folder, image_size: int = 32) -> None:
    """A tiny SigLIP with a processor; its configuration does not name the padding token, as SigLIP 2's does not."""
    tokenizer = train_wordpiece((row["caption"] for row in shapes_rows(500)), vocab_size=600, context_length=16)
    config = save_siglip(folder, tokenizer, image_size)
    assert config.text_config.pad_token_id != tokenizer.pad_token_id


def save_siglip(folder, tokenizer: PreTrainedTokenizerBase, image_size: int = 32) -> SiglipConfig:
    """Saves a tiny SigLIP with a processor; returns its configuration."""
    size = {"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = SiglipConfig(
        text_config={**size, "vocab_size": len(tokenizer), "max_position_embeddings": 16},
        vision_config={**size, "image_size": image_size, "patch_size": 8},
    )
    randomize(SiglipModel(config), std=0.02).save_pretrained(folder)
    image_processor = SiglipImageProcessorPil(size={"height": image_size, "width": image_size})
    SiglipProcessor(image_processor, tokenizer).save_pretrained(folder)
    return config


def train_sentencepiece(folder: Path, **options) -> Path:
    """A `spiece.model` of captions and of other scripts, with SigLIP 1's first pieces: <pad>, </s> and <unk>."""
    import sentencepiece

    texts = [row["caption"] for row in shapes_rows(500)]
    texts += 30 * [
        "Hållo, naïve café!",
        "a quick brown fox jumps over 1,234 (lazy) dogs",
        "日本語 русский Σίσυφος",
    ]
    made = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts),
        model_writer=made,
        **{
            "vocab_size": 300,
            "pad_id": 0,
            "eos_id": 1,
            "unk_id": 2,
            "bos_id": -1,
            "character_coverage": 1.0,
            **options,
        },
        hard_vocab_limit=False,
        minloglevel=2,
    )
    path = folder / "spiece.model"
    path.write_bytes(made.getvalue())
    return path


def save_siglip_1(folder: Path) -> None:
    """Saves a tiny SigLIP 1 with the sentencepiece tokenizer of its kind in a folder that exists."""
    from transformers import SiglipTokenizer

    vocabulary = str(train_sentencepiece(folder))
    save_siglip(folder, SiglipTokenizer(vocabulary, model_max_length=16, model_input_names=["input_ids"]))

"""A SigLIP as people have it: a folder with a processor, whose tokenizer pads with another token than the model's."""

from transformers import SiglipConfig, SiglipModel, SiglipProcessor
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from flip_hf.data.tokenization import train_wordpiece
from tests.helpers.models import randomize
from tests.helpers.pairs import shapes_rows


def make_siglip_folder(folder, image_size: int = 32) -> None:
    """A tiny SigLIP with a processor; its configuration does not name the padding token, as SigLIP 2's does not."""
    tokenizer = train_wordpiece((row["caption"] for row in shapes_rows(500)), vocab_size=600, context_length=16)
    size = {"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = SiglipConfig(
        text_config={**size, "vocab_size": len(tokenizer), "max_position_embeddings": 16},
        vision_config={**size, "image_size": image_size, "patch_size": 8},
    )
    assert config.text_config.pad_token_id != tokenizer.pad_token_id
    randomize(SiglipModel(config), std=0.02).save_pretrained(folder)
    image_processor = SiglipImageProcessorPil(size={"height": image_size, "width": image_size})
    SiglipProcessor(image_processor, tokenizer).save_pretrained(folder)

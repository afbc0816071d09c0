"""A CLIP as people have it: a folder with a processor."""

from tokenizers.processors import TemplateProcessing
from transformers import CLIPConfig, CLIPModel, CLIPProcessor
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from flip_hf.data.tokenization import train_wordpiece
from tests.helpers.pairs import shapes_rows


def make_clip_folder(folder) -> None:
    """A tiny CLIP with a processor; its texts begin and end with a special token, as CLIP's do."""
    tokenizer = train_wordpiece((row["caption"] for row in shapes_rows(500)), vocab_size=600, context_length=20)
    tokenizer.add_special_tokens({"bos_token": "<start>", "eos_token": "<end>"})
    start = tokenizer.bos_token_id
    end = tokenizer.eos_token_id
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<start> $A <end>", special_tokens=[("<start>", start), ("<end>", end)]
    )
    size = {"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    ids = {"bos_token_id": start, "eos_token_id": end, "pad_token_id": tokenizer.pad_token_id}
    config = CLIPConfig(
        text_config={**size, **ids, "vocab_size": len(tokenizer), "max_position_embeddings": 20},
        vision_config={**size, "image_size": 32, "patch_size": 8},
        projection_dim=32,
    )
    CLIPModel(config).save_pretrained(folder)
    square = {"height": 32, "width": 32}
    image_processor = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size=square)
    CLIPProcessor(image_processor, tokenizer).save_pretrained(folder)

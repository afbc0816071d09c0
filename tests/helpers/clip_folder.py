"""A CLIP as people have it: a folder with a processor."""

from transformers import CLIPConfig, CLIPModel, CLIPProcessor
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from flip_hf.data.tokenization import train_wordpiece
from tests.helpers.pairs import shapes_rows
from tests.helpers.tokenizers import with_ends


def make_clip_folder(folder) -> None:
    """A tiny CLIP with a processor; its texts begin and end with a special token, as CLIP's do."""
    tokenizer = train_wordpiece((row["caption"] for row in shapes_rows(500)), vocab_size=600, context_length=20)
    tokenizer = with_ends(tokenizer)
    size = {"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    config = CLIPConfig(
        text_config={**size, **ids, "vocab_size": len(tokenizer), "max_position_embeddings": 20},
        vision_config={**size, "image_size": 32, "patch_size": 8},
        projection_dim=32,
    )
    CLIPModel(config).save_pretrained(folder)
    square = {"height": 32, "width": 32}
    image_processor = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size=square)
    CLIPProcessor(image_processor, tokenizer).save_pretrained(folder)

"""Tokenizers of every kind, tiny, whose words are of several pieces."""

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from flip_hf.data.tokenization import train_wordpiece

SPECIAL = ["<pad>", "<unk>", "<start>", "<end>"]
KINDS = ("wordpiece", "clip", "bytes", "unigram", "unsplit")


def make_tokenizer(kind: str, texts: list[str], context_length: int = 128, vocab_size: int = 60):
    """Learns a tokenizer from texts.

    `wordpiece` is FLIP's. The others put `<start>` and `<end>` around a text: `clip` ends words with `</w>`, `bytes`
    begins them with a space, as GPT-2's, `unigram` with SentencePiece's mark, and `unsplit` has that mark, too, but
    does not split texts into words, as Gemma's and SigLIP 2's.
    """
    if kind == "wordpiece":
        return train_wordpiece(texts, vocab_size=vocab_size, context_length=context_length)
    special = {"special_tokens": SPECIAL, "vocab_size": vocab_size, "show_progress": False}
    if kind == "clip":
        backend = Tokenizer(models.BPE(unk_token="<unk>", end_of_word_suffix="</w>"))
        backend.pre_tokenizer = pre_tokenizers.Whitespace()
        trainer = trainers.BpeTrainer(end_of_word_suffix="</w>", **special)
    elif kind == "bytes":
        backend = Tokenizer(models.BPE(unk_token="<unk>"))
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
        trainer = trainers.BpeTrainer(**special)
    else:
        backend = Tokenizer(models.Unigram())
        backend.pre_tokenizer = pre_tokenizers.Metaspace()
        trainer = trainers.UnigramTrainer(unk_token="<unk>", **special)
    backend.train_from_iterator(texts, trainer=trainer)
    if kind == "unsplit":
        backend.pre_tokenizer = None
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.BPEDecoder("</w>") if kind == "clip" else decoders.Metaspace()
    backend.post_processor = TemplateProcessing(
        single="<start> $A <end>", special_tokens=[("<start>", 2), ("<end>", 3)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        model_max_length=context_length,
        model_input_names=["input_ids", "attention_mask"],
        padding_side="right",
        **dict(zip(("pad_token", "unk_token", "bos_token", "eos_token"), SPECIAL, strict=True)),
    )


def with_ends(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """Adds a special token before and after every text, as CLIP has them: the last one has the highest id."""
    tokenizer.add_special_tokens({"bos_token": "<start>", "eos_token": "<end>"})
    ends = [("<start>", tokenizer.bos_token_id), ("<end>", tokenizer.eos_token_id)]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<start> $A <end>", special_tokens=ends)
    return tokenizer

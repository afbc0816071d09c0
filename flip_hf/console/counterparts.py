"""Options by the names that they have in other programs: open_clip, timm, Transformers' Trainer and its examples."""

from collections.abc import Collection
from typing import NamedTuple


class Counterpart(NamedTuple):
    """An option of ours: its name, and how it differs from those of other programs; the latter may be empty."""

    option: str
    difference: str


def _named(names: str, option: str, difference: str = "") -> dict[str, Counterpart]:
    return dict.fromkeys(names.split(), Counterpart(option, difference))


_EPOCHS = "the samples of all epochs"
_SAMPLES = "in samples, which are steps times --batch_size"
_PIECES = "the samples that a process encodes at once"

# By their names elsewhere, with underscores and without leading dashes.
COUNTERPARTS = {
    **_named("accum_freq grad_accum_steps gradient_accumulation_steps", "micro_batch_size", _PIECES),
    **_named("amp bf16 dtype fp16 mixed_precision torch_dtype", "precision"),
    **_named("beta1", "adam_beta1"),
    **_named("beta2", "adam_beta2"),
    **_named("caption_column_name caption_key csv_caption_key text_column", "caption_column"),
    **_named("checkpoint resume", "resume_from_checkpoint"),
    **_named("checkpointing_steps save_frequency save_steps", "checkpoint_samples", _SAMPLES),
    **_named("clip_grad grad_clip_norm gradient_clip_val", "max_grad_norm"),
    **_named("csv_img_key image_column_name image_key", "image_column"),
    **_named("data data_dir data_path dataset dataset_name train_dir train_file", "train_data"),
    **_named("dataset_config dataset_config_name", "train_config"),
    **_named("epochs num_epochs num_train_epochs", "train_samples", _EPOCHS),
    **_named("eval_steps val_frequency zeroshot_frequency", "eval_samples", _SAMPLES),
    **_named("finetune model model_name pretrained", "model_name_or_path"),
    **_named("force_patch_dropout patch_dropout", "mask_ratio"),
    **_named("freeze_text_model freeze_vision_model lock_image lock_text", "freeze", "image, text or both"),
    **_named("grad_checkpointing", "gradient_checkpointing"),
    **_named("imagenet_val val_data validation_dir validation_file", "eval_data"),
    **_named("learning_rate lr", "base_lr", "the rate for 256 samples a step, scaled with --batch_size"),
    **_named("log_dir logs out", "output_dir"),
    **_named("log_every_n_steps log_interval logging_steps", "log_samples", _SAMPLES),
    **_named("lr_warmup_steps warmup warmup_ratio warmup_steps", "warmup_samples", _SAMPLES),
    **_named("max_steps max_train_steps num_steps", "train_samples", _SAMPLES),
    **_named("max_train_samples train_num_samples", "train_samples", _EPOCHS),
    **_named("opt optim", "optimizer"),
    **_named("per_device_train_batch_size train_batch_size", "batch_size", "the samples of all processes"),
    **_named("save_total_limit", "keep_checkpoints"),
    **_named("siglip", "loss", "sigmoid"),
    **_named("torch_compile torchcompile", "compile"),
    **_named("train_data_upsampling_factors", "train_weights"),
    **_named("wd", "weight_decay"),
}


def counterpart(name: str, known: Collection[str]) -> str:
    """Tells what another program's option is called here, in a sentence with a leading space.

    Args:
        name: of the other program's option, with or without leading dashes.
        known: names of the options here, written likewise; without the counterpart among them, the sentence is empty.
    """
    bare = name.lstrip("-")
    dashes = name[: len(name) - len(bare)]
    found = COUNTERPARTS.get(bare)
    if found is None or dashes + found.option not in known:
        return ""
    difference = f": {found.difference}" if found.difference else ""
    return f" Here it is {dashes + found.option!r}{difference}."

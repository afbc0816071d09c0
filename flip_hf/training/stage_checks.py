"""The check that the stages of a run fit its model."""

from transformers import PreTrainedTokenizerBase

from flip_hf.modeling import FlipConfig, FlipTextConfig
from flip_hf.modeling.masking_flip import num_kept
from flip_hf.training.arguments import Arguments
from flip_hf.training.masks import check_text_mask
from flip_hf.training.phases import Phase, plan_phases
from flip_hf.training.resizing import new_sizes


def check_stages_fit(arguments: Arguments, config: FlipConfig) -> None:
    """Checks the stages of a run, if it has any, against the model that it starts with.

    Args:
        arguments: the run's arguments.
        config: configuration of the model, as it is before it is resized to the run's own sizes.

    Raises:
        ValueError: a learning rate would only warm up, patches do not fill the images of a stage, a mask keeps too
            little of them or of its texts, images are of another size at the end than the model's, or there is a
            decoder, which has one size; the message names the stage.
    """
    if arguments.optimization.stages is None:
        return
    sizes = new_sizes(arguments.model, config)
    phases = plan_phases(arguments)
    for phase in phases:
        where = f"--stages, {phase.name}"
        _check_images(where, phase, sizes, config.vision_config.ignore_remainder)
        if phase.text_length is not None:
            _check_text_length(where, phase.text_length, arguments.objective.contrasts, config.text_config)
        check_text_mask(f"{where}: text_mask_ratio", phase.text_mask_ratio, config.text_config, phase.text_length)
        if arguments.objective.reconstructs and phase.image_size not in (None, sizes["image_size"]):
            raise ValueError(
                f"{where}: the decoder of --objective {arguments.objective.objective} is made for images of "
                f"{sizes['image_size']} pixels. Leave image_size out."
            )
    for phase in phases[1:]:
        length = phase.curve.end - phase.curve.start
        if phase.begins_curve and phase.curve.warmup_samples >= length:
            raise ValueError(
                f"--stages, {phase.name}: the warm-up of its learning rate, {phase.curve.warmup_samples:,} samples, is "
                f"not shorter than the {length:,} samples of its curve. Give the stage its own warmup_samples."
            )
    last = phases[-1]
    if last.image_size not in (None, sizes["image_size"]):
        resized = arguments.model.model_name_or_path or arguments.model.init_vision_from
        option = f"--image_size {last.image_size}" if resized else "image_size in --vision_config"
        raise ValueError(
            f"--stages, {last.name}: its images of {last.image_size} pixels are the last ones, and the model is made "
            f"for {sizes['image_size']}. Give it that size by {option}, or leave the stage's image_size out."
        )


def _check_images(where: str, phase: Phase, sizes: dict[str, int], ignores_remainder: bool) -> None:
    """Checks the images of a stage, of a model with these `image_size` and `patch_size`.

    Raises:
        ValueError: patches do not fill them, or the mask keeps none.
    """
    patch_size = sizes["patch_size"]
    size = phase.image_size or sizes["image_size"]
    if size < patch_size or (size % patch_size and not ignores_remainder):
        near = max(1, round(size / patch_size)) * patch_size
        raise ValueError(f"{where}: image_size {size} is not a multiple of the patch size, {patch_size}; use {near}.")
    try:
        num_kept((size // patch_size) ** 2, phase.mask_ratio)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


def _check_text_length(where: str, text_length: int, reads_texts: bool, text_config: FlipTextConfig) -> None:
    """Checks the length that texts are cut to in a stage.

    Raises:
        ValueError: it has no effect, or is beyond the model's context.
    """
    if not reads_texts:
        raise ValueError(f"{where}: --objective reconstruction reads no texts. Leave text_length out.")
    if text_config.attend_to_padding:
        raise ValueError(
            f"{where}: text_length has no effect on a model that pads its texts again (attend_to_padding in its text "
            "configuration). Leave it out."
        )
    context = text_config.max_position_embeddings
    if text_length > context:
        raise ValueError(f"{where}: text_length {text_length} is beyond the model's context of {context} tokens.")


def check_text_lengths(phases: list[Phase], tokenizer: PreTrainedTokenizerBase) -> None:
    """Checks that texts which are cut have room for a word.

    Raises:
        ValueError: the tokenizer's special tokens take all of a stage's `text_length`.
    """
    special = tokenizer.num_special_tokens_to_add()
    for phase in phases:
        if phase.text_length is not None and phase.text_length <= special:
            raise ValueError(
                f"--stages, {phase.name}: text_length {phase.text_length} leaves no room for a word beside the "
                f"tokenizer's {special} special tokens; use at least {special + 1}."
            )

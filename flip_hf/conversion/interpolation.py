"""Interpolates between the weights of two models (WiSE-FT, Wortsman et al., CVPR 2022, arXiv 2109.01903).

A fine-tuned model gains where it was tuned and loses elsewhere; between its weights and those that it started from lie
models that keep more of both. Both ends are loaded whole, and compared, before anything is computed.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPProcessor,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    SiglipConfig,
    SiglipModel,
    SiglipProcessor,
)

from flip_hf.conversion.errors import ConversionError
from flip_hf.conversion.files import read_json
from flip_hf.conversion.folder import Converted, card_data
from flip_hf.conversion.pretrained import CONFIG, load_pretrained, local_folder, read_config
from flip_hf.conversion.processors import find_image_processor, find_tokenizer, join
from flip_hf.conversion.siglip import fit_padding
from flip_hf.modeling import FlipConfig, FlipForPreTraining, FlipModel, FlipPreTrainingConfig, FlipProcessor

_CLASSES: dict[str, tuple[type[PreTrainedModel], type[PreTrainedConfig]]] = {
    FlipConfig.model_type: (FlipModel, FlipConfig),
    FlipPreTrainingConfig.model_type: (FlipForPreTraining, FlipPreTrainingConfig),
    CLIPConfig.model_type: (CLIPModel, CLIPConfig),
    SiglipConfig.model_type: (SiglipModel, SiglipConfig),
}
# Fields of a configuration that do not change what given weights compute for whole images.
_MAY_DIFFER = {
    *("mask_ratio", "mask_strategy", "attention_dropout", "initializer_range", "initializer_factor"),
    *("logit_scale_init_value", "architectures", "auto_map", "dtype", "transformers_version", "_name_or_path"),
    *("objective", "reconstruction_weight", "norm_pixel_target", "return_dict", "bos_token_id"),
}
# Texts that two tokenizers must encode alike: words, case, digits, marks, accents.
_PROBES: list[str] = ["a photo of a cat.", "Two DOGS, 12 birds & a café -- isn't it?", "naïve façade; 100% of 3.5 km_h"]


@dataclass(frozen=True)
class Ends:
    """Two models of one architecture.

    Attributes:
        names: their folders or Hub ids.
        model: a model of their class, with the second one's weights and configuration, in evaluation mode.
        first, second: their tensors.
        processor: the second one's processor; None if it has none.
    """

    names: tuple[str, str]
    model: PreTrainedModel
    first: Mapping[str, Tensor]
    second: Mapping[str, Tensor]
    processor: Any

    def set_alpha(self, alpha: float) -> PreTrainedModel:
        """Gives `model` the weights at `alpha` between the two, and returns it."""
        self.model.load_state_dict(interpolate(self.first, self.second, alpha))
        return self.model

    def converted(self, alpha: float) -> Converted:
        """Makes what a folder of the model at `alpha` holds."""
        first, second = self.names
        return Converted(
            model=self.set_alpha(alpha),
            processor=self.processor,
            title="An interpolation of two models",
            about=(
                f"Made with `flip-hf interpolate`: {1 - alpha:g} times the weights of `{first}` and {alpha:g} times "
                f"those of `{second}` (WiSE-FT, arXiv 2109.01903). The licences are those of the two."
            ),
            data=card_data(second),
        )


def interpolate(first: Mapping[str, Tensor], second: Mapping[str, Tensor], alpha: float) -> dict[str, Tensor]:
    """Computes `(1 - alpha) * first + alpha * second` of each tensor, in float32 or wider, in the tensors' dtype.

    At 0 and 1, and where both are equal, as in a tower that was frozen, tensors keep their bits.

    Args:
        first, second: tensors of the same names, shapes and dtypes; those of integers are equal.
        alpha: the share of the second, in [0, 1].
    """
    mixed = {}
    for name, theirs in second.items():
        ours = first[name]
        if alpha in (0, 1) or torch.equal(ours, theirs):
            mixed[name] = ours if alpha == 0 else theirs
            continue
        dtype = torch.promote_types(theirs.dtype, torch.float32)
        mixed[name] = ((1 - alpha) * ours.to(dtype) + alpha * theirs.to(dtype)).to(theirs.dtype)
    return mixed


def load_ends(first: str, second: str) -> Ends:
    """Loads two models, FlipModels, FlipForPreTrainings, CLIPModels or SiglipModels, by folder or Hub id.

    A CLIPModel or SiglipModel beside a FlipModel, such as the one that the other was tuned from, is taken as a
    FlipModel.

    Raises:
        ConversionError: one cannot be loaded, or they differ in class, architecture, shapes, dtypes, tokenizer or the
            normalisation of images; the message names the first difference.
    """
    models = [_load(first), _load(second)]
    if any(type(model) is FlipModel for model in models):
        models = [_as_flip(model, name) for model, name in zip(models, (first, second), strict=True)]
    one, other = models
    if type(one) is not type(other):
        raise ConversionError(
            f"{first} is a {type(one).__name__} and {second} a {type(other).__name__}: only models of one class can be "
            "interpolated. A run with a decoder leaves one without it in its folder."
        )
    tensors = [{name: value.clone() for name, value in model.state_dict().items()} for model in models]
    _check_tensors((first, second), *tensors)
    _check_configs((first, second), one.config.to_dict(), other.config.to_dict())
    return Ends((first, second), other, *tensors, processor=_shared_processor((first, second), models))


def _as_flip(model: PreTrainedModel, source: str) -> PreTrainedModel:
    """Makes a FlipModel of a CLIPModel or a SiglipModel."""
    if isinstance(model, CLIPModel):
        return FlipModel.from_clip(model)
    if not isinstance(model, SiglipModel):
        return model
    flip = FlipModel.from_siglip(model)
    text = flip.config.text_config
    tokenizer = find_tokenizer(source, text.max_position_embeddings)
    if tokenizer is not None:
        fit_padding(text, tokenizer)
    return flip


def _load(source: str) -> PreTrainedModel:
    folder = local_folder(source)
    kind = read_json(folder / CONFIG, root=folder).get("model_type") if (folder / CONFIG).is_file() else None
    if kind not in _CLASSES:
        raise ConversionError(
            f"{source} is not the folder or Hub id of a FlipModel, a FlipForPreTraining, a CLIPModel or a SiglipModel "
            f"(its model type is {kind!r:.80}). `flip-hf convert` converts some others."
        )
    model_class, config_class = _CLASSES[kind]
    return load_pretrained(model_class, folder, read_config(folder, config_class, model=model_class.__name__))


def _check_tensors(names: tuple[str, str], first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> None:
    """Checks that tensors can be added.

    Raises:
        ConversionError: they differ in names, shapes or dtypes, or integers in their values.
    """
    for name in {**first, **second}:
        ours = first.get(name)
        theirs = second.get(name)
        if ours is None or theirs is None or ours.shape != theirs.shape:
            shapes = ("absent" if value is None else tuple(value.shape) for value in (ours, theirs))
            raise ConversionError(
                "The models have different shapes: {} is {} in {} and {} in {}. Only a model and one that was tuned "
                "from it, at the same sizes, can be interpolated.".format(name, *_pairs(shapes, names))
            )
        if ours.dtype != theirs.dtype:
            raise ConversionError(
                "The models have different precisions: {} is {} in {} and {} in {}. Save both in one dtype.".format(
                    name, *_pairs((ours.dtype, theirs.dtype), names)
                )
            )
        if not theirs.is_floating_point() and not torch.equal(ours, theirs):
            raise ConversionError(f"The integers of {name} differ between {names[0]} and {names[1]}.")


def _pairs(values: Any, names: tuple[str, str]) -> list[Any]:
    return [word for pair in zip(values, names, strict=True) for word in pair]


def _check_configs(names: tuple[str, str], first: dict[str, Any], second: dict[str, Any], inside: str = "") -> None:
    """Checks that two configurations let the same weights compute the same.

    Raises:
        ConversionError: a field differs that says how weights are used.
    """
    for name in {**first, **second}:
        ours = first.get(name)
        theirs = second.get(name)
        if isinstance(ours, dict) and isinstance(theirs, dict):
            _check_configs(names, ours, theirs, f"{inside}{name}.")
        elif name not in _MAY_DIFFER and ours != theirs:
            raise ConversionError(
                f"The models have different architectures: {inside}{name} is {ours!r:.80} in {names[0]} and "
                f"{theirs!r:.80} in {names[1]}."
            )


def _shared_processor(names: tuple[str, str], models: list[PreTrainedModel]) -> Any:
    """Returns the second model's processor.

    Raises:
        ConversionError: the first one's splits texts or normalises images in another way.
    """
    config: Any = models[1].config
    context = getattr(config, "flip_config", config).text_config.max_position_embeddings
    tokenizers = [find_tokenizer(name, context) for name in names]
    image_processors = [find_image_processor(name) for name in names]
    _check_tokenizers(names, *tokenizers)
    if None not in image_processors:
        for field in ("image_mean", "image_std"):
            ours, theirs = (list(getattr(found, field, None) or ()) for found in image_processors)
            if ours != theirs:
                raise ConversionError(
                    f"{names[0]} and {names[1]} normalise images differently: {field} is {ours} and {theirs}."
                )
    stock = {CLIPModel: CLIPProcessor, SiglipModel: SiglipProcessor}
    return join(image_processors[1], tokenizers[1], stock.get(type(models[1]), FlipProcessor))


def _check_tokenizers(
    names: tuple[str, str], first: PreTrainedTokenizerBase | None, second: PreTrainedTokenizerBase | None
) -> None:
    """Checks that two tokenizers, which models without texts do not have, split texts alike.

    Raises:
        ConversionError: they do not, or there is only one.
    """
    if first is None and second is None:
        return
    if first is None or second is None:
        without = names[0] if first is None else names[1]
        raise ConversionError(
            f"{without} has no tokenizer, so nothing tells whether both models read the "
            "same tokens. Put the files of its tokenizer into its folder."
        )
    encoded = [tokenizer(_PROBES)["input_ids"] for tokenizer in (first, second)]
    if first.get_vocab() != second.get_vocab() or encoded[0] != encoded[1]:
        raise ConversionError(
            f"{names[0]} and {names[1]} have different tokenizers, so their text towers read different tokens. Only a "
            "model and one that was tuned from it can be interpolated."
        )

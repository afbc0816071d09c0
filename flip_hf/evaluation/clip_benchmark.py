"""LAION's CLIP_benchmark on a saved model: its own command, data sets and metrics, for FLIP and any CLIPModel.

CLIP_benchmark 1.6 loads open_clip's models and has no plug-in point; another kind of model is a function in its
`TYPE2FUNC`. This module has that function, and a command that adds it and leaves all else to CLIP_benchmark:

python -m flip_hf.evaluation.clip_benchmark eval --model_type flip_hf --model runs/shapes \
    --dataset wds/vtab/cifar10 \
    --dataset_root 'https://huggingface.co/datasets/clip-benchmark/wds_{dataset_cleaned}/tree/main'
"""

import re
import sys
from argparse import Namespace
from collections.abc import Callable, Mapping
from functools import partial
from importlib import import_module
from types import ModuleType
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from flip_hf.evaluation.encoder import Encoder, ImageTransform
from flip_hf.evaluation.zero_shot import TextInputs
from flip_hf.redaction import install

T = TypeVar("T")

MODEL_TYPE = "flip_hf"
# CLIP_benchmark's default of --pretrained: a name in open_clip, not a revision.
OPEN_CLIP_DEFAULT = "laion400m_e32"


class BenchmarkModel(nn.Module):
    """A model with open_clip's interface; a module, since the linear probe replicates it over the GPUs."""

    def __init__(self, model: Any):
        super().__init__()
        self.model = model

    def encode_image(self, images: Tensor) -> Tensor:
        """Encodes images (B, 3, H, W) to embeddings (B, E), not normalised."""
        return self.model.get_image_features(pixel_values=images).pooler_output

    def encode_text(self, texts: Mapping[str, Tensor]) -> Tensor:
        """Encodes [`TextInputs`]' output for B texts to embeddings (B, E), not normalised."""
        return self.model.get_text_features(**texts).pooler_output


def load_flip(
    model_name: str, pretrained: str = "main", cache_dir: str | None = None, device: str | torch.device = "cpu"
) -> tuple[BenchmarkModel, ImageTransform, TextInputs]:
    """Loads a model for CLIP_benchmark, in float32 like open_clip's; `--no_amp` computes in it too.

    Args:
        model_name: a folder or Hub id of a FlipModel, CLIPModel, SiglipModel or similar, with its processor.
        pretrained: the Hub's revision (branch, tag, commit); a folder has none.
        cache_dir: folder for downloads.
        device: device of the model.

    Returns:
        The model in evaluation mode, the image transform and the tokenizer.

    Raises:
        OSError: there is no such folder or repository, or it has no processor.
        ValueError: it is not a complete model of images and texts, or does not take plain images.
    """
    revision = "main" if pretrained == OPEN_CLIP_DEFAULT else pretrained
    encoder = Encoder.from_pretrained(model_name, device=device, revision=revision, cache_dir=cache_dir)
    if not encoder.knows_texts:
        raise ValueError(f"{model_name} is only a vision tower; `flip-hf evaluate` can probe it.")
    return BenchmarkModel(encoder.model), encoder.transform, encoder.text_inputs


def _run(run: Callable[[Namespace], T], args: Namespace) -> T:
    """Runs one evaluation, of one model on one data set, with no slash of the model's name in that of the result file.

    CLIP_benchmark would otherwise look for a folder `DATASET_main_runs/`, after the last image.
    """
    if args.model_type == MODEL_TYPE:
        args.pretrained = "main" if args.pretrained == OPEN_CLIP_DEFAULT else args.pretrained
        for field in ("model", "pretrained"):
            name = re.sub(r"[^\w.-]+", "_", getattr(args, field)).strip("_.")
            args.output = args.output.replace(f"{{{field}}}", name)
    return run(args)


def register() -> ModuleType:
    """Registers the model type `flip_hf` in CLIP_benchmark, for this process; a second call changes nothing.

    Returns:
        `clip_benchmark.cli`, whose `main` is the command `clip_benchmark`.

    Raises:
        ImportError: CLIP_benchmark or a dependency is missing or in a version that does not work.

    Example:

    ```python
    >>> from flip_hf.evaluation.clip_benchmark import register
    >>> register().main()  # `clip_benchmark`, with --model_type flip_hf
    ```
    """
    try:
        cli: Any = import_module("clip_benchmark.cli")
        models = import_module("clip_benchmark.models")
        metrics = import_module("clip_benchmark.metrics.zeroshot_classification")
    except ImportError as error:
        raise ImportError(
            f"CLIP_benchmark cannot be imported ({error}). Install it with: pip install clip-benchmark"
        ) from error
    try:
        metrics.accuracy(torch.eye(2), torch.arange(2))
    except TypeError as error:  # CLIP_benchmark's issue 147; it would show after the last image
        raise ImportError(
            f"CLIP_benchmark does not work with NumPy {np.__version__}. Install an older one with: pip install "
            "'numpy<2.4'"
        ) from error
    if MODEL_TYPE not in models.TYPE2FUNC:
        models.TYPE2FUNC[MODEL_TYPE] = load_flip
        models.MODEL_TYPES.append(MODEL_TYPE)  # the list that its parser takes the choices from
        cli.run = partial(_run, cli.run)
    return cli


def main() -> None:
    """Runs CLIP_benchmark's command with `--model_type flip_hf` available."""
    install()
    try:
        cli = register()
    except ImportError as error:
        sys.exit(f"error: {error}")
    cli.main()


if __name__ == "__main__":
    main()

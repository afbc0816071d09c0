"""LAION's CLIP_benchmark on a saved folder: its own command, data sets and figures, for FLIP and any CLIPModel.

CLIP_benchmark 1.6 loads models of open_clip, and has no plug-in point; a further kind of model is a function in its
`TYPE2FUNC`. Here is that function, and a command that adds it and leaves everything else to CLIP_benchmark:

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
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from flip_hf.evaluation.encoder import Encoder, ImageTransform
from flip_hf.evaluation.zero_shot import TextInputs
from flip_hf.redaction import install

MODEL_TYPE = "flip_hf"
# What --pretrained says in CLIP_benchmark when nobody gave it: a name of open_clip's, and no revision of a folder.
OPEN_CLIP_DEFAULT = "laion400m_e32"


class BenchmarkModel(nn.Module):
    """A model under open_clip's names. It is a module because the linear probe replicates it over the GPUs."""

    def __init__(self, model: Any):
        super().__init__()
        self.model = model

    def encode_image(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) to embeddings (B, E), not normalised."""
        return self.model.get_image_features(pixel_values=images).pooler_output

    def encode_text(self, texts: Mapping[str, Tensor]) -> Tensor:
        """What [`TextInputs`] gives for B texts to embeddings (B, E), not normalised."""
        return self.model.get_text_features(**texts).pooler_output


def load_flip(
    model_name: str, pretrained: str = "main", cache_dir: str | None = None, device: str | torch.device = "cpu"
) -> tuple[BenchmarkModel, ImageTransform, TextInputs]:
    """Loads a model the way CLIP_benchmark asks for one. Weights are float32, as open_clip's; `--no_amp` keeps them so.

    Args:
        model_name: a folder or Hub id of a FlipModel, CLIPModel, SiglipModel or their like, with its processor.
        pretrained: the Hub's revision (branch, tag, commit); a folder has none.
        cache_dir: where downloads are kept.
        device: where the model goes.

    Returns:
        The model in evaluation mode, the image transform and the tokenizer.

    Raises:
        OSError: there is no such folder or repository, or its processor was not saved with it.
        ValueError: it is not a whole model of images and texts, or does not take plain images.
    """
    revision = "main" if pretrained == OPEN_CLIP_DEFAULT else pretrained
    encoder = Encoder.from_pretrained(model_name, device=device, revision=revision, cache_dir=cache_dir)
    if not encoder.knows_texts:
        raise ValueError(f"{model_name} is a vision tower alone; `flip-hf evaluate` probes it.")
    return BenchmarkModel(encoder.model), encoder.transform, encoder.text_inputs


def _run(run: Callable[[Namespace], Any], args: Namespace) -> Any:
    """Runs one evaluation, of one model on one data set, with a result file whose name has no slash of the model's.

    CLIP_benchmark would look for a folder `DATASET_main_runs/`, and only after the last image.
    """
    if args.model_type == MODEL_TYPE:
        args.pretrained = "main" if args.pretrained == OPEN_CLIP_DEFAULT else args.pretrained
        for field in ("model", "pretrained"):
            name = re.sub(r"[^\w.-]+", "_", getattr(args, field)).strip("_.")
            args.output = args.output.replace(f"{{{field}}}", name)
    return run(args)


def register() -> Any:
    """Makes CLIP_benchmark know the model type `flip_hf` in this process; a second call changes nothing.

    Returns:
        `clip_benchmark.cli`, whose `main` is the command `clip_benchmark`.

    Raises:
        ImportError: CLIP_benchmark, or something that it needs, is not installed, or not in a version that it can use.

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
            f"CLIP_benchmark cannot count with NumPy {np.__version__}. Install an older one with: pip install "
            "'numpy<2.4'"
        ) from error
    if MODEL_TYPE not in models.TYPE2FUNC:
        models.TYPE2FUNC[MODEL_TYPE] = load_flip
        models.MODEL_TYPES.append(MODEL_TYPE)  # the very list from which its parser takes the choices
        cli.run = partial(_run, cli.run)
    return cli


def main() -> None:
    """CLIP_benchmark's command, which then takes `--model_type flip_hf`."""
    install()
    try:
        cli = register()
    except ImportError as error:
        sys.exit(f"error: {error}")
    cli.main()


if __name__ == "__main__":
    main()

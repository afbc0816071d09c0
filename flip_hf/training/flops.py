"""Floating-point operations per training sample, counted from the configuration.

Matrix products and attention are counted, a multiply-add as two operations, as `torch.utils.flop_counter` does;
norms, activations and softmax are not (below 1 %).

MFU, model FLOPs utilisation, is PaLM's (Chowdhery et al. 2022, appendix B): the operations of one forward and one
backward pass, as the mathematics needs them, over the hardware's peak in that time. What is computed twice to
save memory (activation checkpointing, the first pass of gradient caching, flash attention's scores in backward, tiles
of the loss) takes time but does not count.

Letters: D width, S tokens with the class token, if there is one, K kept patches, T text tokens, E shared embedding,
N pairs per step.
"""

from dataclasses import dataclass, replace

from accelerate import Accelerator

from flip_hf.modeling import FlipConfig, FlipPreTrainingConfig, FlipVisionConfig
from flip_hf.modeling.masking_flip import num_kept
from flip_hf.training.accelerators import peak_flops
from flip_hf.training.freezing import Frozen
from flip_hf.training.lora import Ranks


@dataclass(frozen=True)
class SampleFlops:
    """Forward FLOPs of one image-text pair, by part.

    Attributes:
        vision_blocks, text_blocks: the Transformer blocks of a tower, attention included.
        attention: the two products of attention in both towers, already included above.
        patch_embedding: the projection of the kept patches.
        pooling: the attention that pools an image, if any.
        projections: from both features to the shared embedding.
        loss: similarities of all pairs, each computed once (2 N E a pair).
        decoder: MAE's decoder over all patches, if any, attention included.
    """

    vision_blocks: int
    text_blocks: int
    attention: int
    patch_embedding: int
    projections: int
    loss: int
    decoder: int = 0
    pooling: int = 0

    @property
    def encoders(self) -> int:
        """FLOPs of one forward pass through both towers, without the loss."""
        return self.vision_blocks + self.text_blocks + self.patch_embedding + self.pooling + self.projections

    @property
    def forward(self) -> int:
        """FLOPs of one forward pass, loss and decoder included."""
        return self.encoders + self.loss + self.decoder

    @property
    def training(self) -> int:
        """FLOPs of forward and backward: each product has two in backward, but pixels need no gradient."""
        return 3 * self.forward - self.patch_embedding

    def executed(self, cached: bool, checkpointing: bool) -> int:
        """Counts the FLOPs executed in a training step, recomputation included; `training` has the model's FLOPs.

        Args:
            cached: a step has several micro-batches, and gradient caching encodes everything once more.
            checkpointing: activation checkpointing runs every block forward once more.
        """
        return self.training + cached * self.encoders + checkpointing * (self.vision_blocks + self.text_blocks)


def _attention(width: int, blocks: int, tokens: int) -> int:
    return blocks * 4 * tokens**2 * width  # queries by keys (2 S^2 D), weights by values (2 S^2 D)


def _blocks(width: int, hidden: int, blocks: int, tokens: int) -> int:
    linear = 8 * width**2 + 4 * width * hidden  # four projections of attention, two of the MLP; a token
    return blocks * tokens * linear + _attention(width, blocks, tokens)


def _image_tokens(config: FlipConfig, kept_patches: int) -> int:
    return kept_patches + config.vision_config.use_class_token


def _text_tokens(config: FlipConfig, text_tokens: int) -> int:
    text = config.text_config
    return text.max_position_embeddings if text.attend_to_padding else text_tokens


def _pooling(vision: FlipVisionConfig, tokens: int) -> int:
    """Counts the FLOPs of attention pooling: keys and values of all tokens, one query, its MLP."""
    if vision.pooling_type != "attention":
        return 0
    width = vision.hidden_size
    return 4 * tokens * width**2 + 4 * width**2 + 4 * tokens * width + 4 * width * vision.intermediate_size


def sample_flops(
    config: FlipConfig, mask_ratio: float, text_tokens: int, batch_size: int, *, kept_patches: int | None = None
) -> SampleFlops:
    """Counts the FLOPs of one pair.

    Args:
        config: the model's configuration.
        mask_ratio: fraction of the patches dropped.
        text_tokens: length T that the texts are padded to.
        batch_size: pairs N that each is contrasted with, over all processes.
        kept_patches: K, where it is not given by the mask ratio, as with smaller images.

    Raises:
        ValueError: the mask keeps no patch.
    """
    vision = config.vision_config
    text = config.text_config
    kept = kept_patches or num_kept(vision.num_patches, mask_ratio)
    images = (vision.hidden_size, vision.intermediate_size, vision.num_hidden_layers)
    texts = (text.hidden_size, text.intermediate_size, text.num_hidden_layers)
    tokens = _text_tokens(config, text_tokens)
    pixels = vision.num_channels * vision.patch_size**2
    image_tokens = _image_tokens(config, kept)
    return SampleFlops(
        vision_blocks=_blocks(*images, image_tokens),
        text_blocks=_blocks(*texts, tokens),
        attention=_attention(images[0], images[2], image_tokens) + _attention(texts[0], texts[2], tokens),
        patch_embedding=2 * kept * pixels * images[0],
        projections=2 * config.projection_dim * (vision.use_projection * images[0] + texts[0]),
        loss=2 * batch_size * config.projection_dim,
        pooling=_pooling(vision, image_tokens),
    )


def with_decoder(counted: SampleFlops, config: FlipPreTrainingConfig, kept_patches: int) -> SampleFlops:
    """Adds MAE's decoder, and removes what the objective does not compute.

    Args:
        counted: [`sample_flops`] of the model's FlipModel, with no text tokens where there are no texts.
        config: configuration of the model with its decoder.
        kept_patches: K.
    """
    decoder = config.decoder_config
    vision = config.flip_config.vision_config
    pixels = vision.num_channels * vision.patch_size**2
    tokens = kept_patches + vision.use_class_token
    linear = 2 * decoder.hidden_size * (tokens * vision.hidden_size + vision.num_patches * pixels)
    size = (decoder.hidden_size, decoder.intermediate_size, decoder.num_hidden_layers)
    counted = replace(counted, decoder=linear + _blocks(*size, vision.num_positions))
    return replace(counted, projections=0, loss=0, pooling=0) if config.objective == "reconstruction" else counted


def spared_flops(counted: SampleFlops, config: FlipConfig, frozen: Frozen, new_projection: bool = False) -> int:
    """Counts the FLOPs of a pair's backward pass that are not needed where parts are frozen.

    Args:
        counted: the pair's FLOPs.
        config: the model's configuration, without a decoder.
        frozen, new_projection: as for [`freeze`][flip_hf.training.freezing.freeze].
    """
    spared = 0
    for tower, blocks in frozen.items():
        is_image = tower == "image"
        part = config.vision_config if is_image else config.text_config
        depth = part.num_hidden_layers
        of_blocks = counted.vision_blocks if is_image else counted.text_blocks
        spared += 2 * of_blocks * (depth if blocks is None else blocks) // depth
        spared += counted.patch_embedding if is_image else 0
        if blocks is None:
            has_projection = not is_image or config.vision_config.use_projection
            projection = 2 * config.projection_dim * part.hidden_size * has_projection
            spared += 2 * counted.pooling if is_image else 0
            # A new one has a gradient of its own, and only its input's is spared.
            spared += projection if is_image and new_projection else 2 * projection + counted.loss
    return spared


def adapted_flops(
    counted: SampleFlops,
    config: FlipConfig,
    ranks: Ranks,
    kept_patches: int,
    text_tokens: int,
    new_projection: bool = False,
) -> int:
    """Counts the FLOPs of a pair's training that adapters add, less those of the weights that they leave as they are.

    A frozen layer below a trained one has one product in backward, that of its input's gradient.

    Args:
        counted: the pair's FLOPs without adapters.
        config: the model's configuration, without a decoder.
        ranks: the ranks of the adapters, by tower.
        kept_patches, text_tokens: K and T.
        new_projection: as for [`freeze`][flip_hf.training.freezing.freeze].
    """
    change = 0
    for tower, rank in ranks.items():
        is_image = tower == "image"
        part = config.vision_config if is_image else config.text_config
        tokens = _image_tokens(config, kept_patches) if is_image else _text_tokens(config, text_tokens)
        size = (part.hidden_size, part.intermediate_size, part.num_hidden_layers)
        width, hidden, depth = size
        weights = _blocks(*size, tokens) - _attention(width, depth, tokens)
        adapters = 2 * rank * tokens * depth * (10 * width + 2 * hidden)  # inputs and outputs of six layers a block
        # Nothing below the first queries, keys and values is trained.
        first = 3 * 2 * tokens * width * (width + rank)
        change += 3 * adapters - weights - first
        change -= counted.patch_embedding + counted.pooling if is_image else 0
        if counted.projections and not (is_image and new_projection):
            has_projection = not is_image or config.vision_config.use_projection
            change -= 2 * config.projection_dim * width * has_projection
    return change


def step_flops(
    config: FlipConfig | FlipPreTrainingConfig,
    kept_patches: int,
    text_tokens: int,
    batch_size: int,
    frozen: Frozen | None = None,
    new_projection: bool = False,
    ranks: Ranks | None = None,
) -> int:
    """Counts forward and backward FLOPs per sample of a training step.

    The arguments are those of [`sample_flops`], [`with_decoder`], [`spared_flops`] and [`adapted_flops`].
    """
    flip = config.flip_config if isinstance(config, FlipPreTrainingConfig) else config
    counted = sample_flops(flip, 0, text_tokens, batch_size, kept_patches=kept_patches)
    if isinstance(config, FlipPreTrainingConfig):
        counted = with_decoder(counted, config, kept_patches)
    spared = spared_flops(counted, flip, frozen or {}, new_projection)
    return (
        counted.training - spared + adapted_flops(counted, flip, ranks or {}, kept_patches, text_tokens, new_projection)
    )


def utilization(
    flops_per_sample: float, samples_per_second: float, accelerator: Accelerator, bf16: bool
) -> dict[str, float]:
    """Returns the MFU of a run as `{"mfu": fraction}`; empty where the hardware's peak is unknown.

    Args:
        flops_per_sample: model FLOPs per training sample.
        samples_per_second: over all processes.
        accelerator: the process layer, with their number and device.
        bf16: whether matrix products are computed in bfloat16.
    """
    peak = peak_flops(accelerator.device, "bf16" if bf16 else "fp32")
    if peak is None:
        return {}
    return {"mfu": flops_per_sample * samples_per_second / (peak * accelerator.num_processes)}

"""Everything a run can be told: six dataclasses that are the command line and the YAML recipe at once (recipes.py).

A bad value is an error before any device is touched.
"""

import dataclasses
import json
import math
from dataclasses import dataclass, field
from typing import Any

from flip_hf.redaction import redacted

# ImageNet's statistics, which the official FLIP normalises with.
IMAGE_MEAN = (0.485, 0.456, 0.406)
IMAGE_STD = (0.229, 0.224, 0.225)
GENERIC_TEMPLATE = "a photo of a {}."


def _option(default: Any, help: str) -> Any:
    if isinstance(default, (list, dict)):
        return field(default_factory=lambda: default, metadata={"help": help})
    return field(default=default, metadata={"help": help})


def require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def _json_object(text: str | None, name: str) -> dict:
    try:
        value = json.loads(text or "{}")
    except json.JSONDecodeError as error:
        raise ValueError(f"--{name} must be JSON such as '{{\"hidden_size\": 512}}': {error}.") from error
    require(isinstance(value, dict), f"--{name} must be a JSON object, got {text}.")
    return value


@dataclass
class ModelArguments:
    """The model: a new one from its configuration, or a saved one to go on with."""

    model_name_or_path: str | None = _option(None, "FLIP folder or Hub id to start from; a new model if not given")
    init_vision_from: str | None = _option(
        None, "folder or Hub id whose vision tower a new model starts with: a ViTMAE, an MAE run, a FLIP"
    )
    text_config: str | None = _option(None, "FlipTextConfig fields, as JSON; the paper's B/16 if not given")
    vision_config: str | None = _option(None, "FlipVisionConfig fields, as JSON; the paper's B/16 if not given")
    projection_dim: int = _option(512, "length of the shared embedding")
    logit_scale_init_value: float = _option(2.6592600369, "start value of log(1 / temperature)")
    image_size: int | None = _option(None, "go on with what was started from at images of this size")
    patch_size: int | None = _option(None, "and patches of this size, as the paper's L/14 was made from L/16")
    mask_ratio: float = _option(0.5, "fraction of the patches dropped in the masked phase")
    mask_strategy: str = _option(
        "random", "which patches stay: random, block, grid or gaussian; or resize, all of a smaller image"
    )
    mask_ratio_end: float | None = _option(None, "mask ratio at the end of the masked phase; constant if not given")
    mask_ratio_schedule: str = _option("linear", "linear or cosine, from --mask_ratio to --mask_ratio_end")
    mask_ratio_steps: int = _option(4, "different mask ratios on that way, both ends included")
    text_mask_ratio: float = _option(0.0, "fraction of the text's context dropped in the masked phase")
    text_mask_strategy: str = _option("prioritized", "random, or prioritized: padding is dropped first")
    attn_implementation: str = _option("sdpa", "eager, sdpa, flex_attention or flash_attention_2")
    gradient_checkpointing: bool = _option(False, "recompute activations in backward to save memory")

    def __post_init__(self):
        self.tower_configs()  # an error in the JSON belongs here
        require(
            0 <= self.mask_ratio < 1,
            f"--mask_ratio is the fraction of patches dropped and must be in [0, 1), got {self.mask_ratio}. Use 0 to "
            "train on whole images, 0.5 or 0.75 for the paper's settings.",
        )
        self._check_masks()
        both = self.model_name_or_path and (self.text_config or self.vision_config)
        require(not both, "Give --model_name_or_path or the configuration of a new model, not both.")
        require(
            not (self.model_name_or_path and self.init_vision_from),
            "--init_vision_from gives a new model its vision tower; --model_name_or_path has one. Give one of them.",
        )
        for name in ("image_size", "patch_size"):
            size = getattr(self, name)
            require(size is None or size >= 1, f"--{name} counts pixels and must be at least 1, got {size}.")
            require(
                size is None or self.model_name_or_path is not None or self.init_vision_from is not None,
                f"--{name} changes the model of --model_name_or_path, or the vision tower of --init_vision_from; give "
                "that of a new one in --vision_config.",
            )

    @property
    def drawn_strategy(self) -> str:
        """The model's own `mask_strategy`, for masks that it draws itself: only the trainer resizes."""
        return "random" if self.mask_strategy == "resize" else self.mask_strategy

    def _check_masks(self) -> None:
        choices = {
            "mask_strategy": ("random", "block", "grid", "gaussian", "resize"),
            "mask_ratio_schedule": ("linear", "cosine"),
            "text_mask_strategy": ("random", "prioritized"),
        }
        for name, allowed in choices.items():
            value = getattr(self, name)
            require(value in allowed, f"--{name} is one of {', '.join(allowed)}, got {value!r}.")
        for name in ("mask_ratio_end", "text_mask_ratio"):
            value = getattr(self, name)
            require(value is None or 0 <= value < 1, f"--{name} is a fraction dropped, in [0, 1), got {value}.")
        steps = self.mask_ratio_steps
        require(2 <= steps <= 32, f"--mask_ratio_steps must be between 2 and 32, both ends included, got {steps}.")

    def tower_configs(self) -> dict[str, dict]:
        """The fields given for the two towers, under `text_config` and `vision_config`."""
        return {name: _json_object(getattr(self, name), name) for name in ("text_config", "vision_config")}


@dataclass
class ObjectiveArguments:
    """What is trained on: image against text, the pixels of dropped patches (MAE), or both."""

    objective: str = _option("contrastive", "contrastive (FLIP), reconstruction (MAE; needs no captions) or both")
    reconstruction_weight: float = _option(1.0, "factor on the reconstruction loss where it is added to the other")
    decoder_config: str | None = _option(None, "FlipDecoderConfig fields, as JSON; MAE's 8 x 512 if not given")
    norm_pixel_target: bool = _option(True, "reconstruct each patch on the scale of its own mean and deviation")
    grid_samples: int = _option(
        64_000_000, "samples between two pictures of reconstructed images, in the run's folder and tracker; 0: none"
    )

    def __post_init__(self):
        choices = ("contrastive", "reconstruction", "both")
        require(self.objective in choices, f"--objective is one of {', '.join(choices)}, got {self.objective!r}.")
        weight = self.reconstruction_weight
        require(0 < weight < math.inf, f"--reconstruction_weight must be above 0, got {weight}.")
        require(self.grid_samples >= 0, "--grid_samples cannot be negative; 0 draws none.")
        self.decoder_fields()  # an error in the JSON belongs here

    @property
    def contrasts(self) -> bool:
        """Whether images are compared with texts."""
        return self.objective != "reconstruction"

    @property
    def reconstructs(self) -> bool:
        """Whether dropped patches are reconstructed."""
        return self.objective != "contrastive"

    def decoder_fields(self) -> dict[str, Any]:
        """The fields given for the decoder."""
        return _json_object(self.decoder_config, "decoder_config")


@dataclass
class DataArguments:
    """What is trained on, what is evaluated on, and how it is read."""

    train_data: list[str] | None = _option(
        None, "shapes (embedded), Hub id, folder, or .tar / .parquet files (path, URL, pattern); several are mixed"
    )
    train_weights: list[float] | None = _option(
        None, "how often each of several --train_data is drawn from, in any unit; equally often if not given"
    )
    train_config: list[str] | None = _option(None, "configuration name of the Hub data set; one, or one for each")
    train_split: str = _option("train", "split to train on")
    image_column: list[str] | None = _option(
        None, "image column, one or one for each data; found by its usual names if not given"
    )
    caption_column: list[str] | None = _option(
        None, "caption column, one or one for each data (json.caption looks into JSON); found if not given"
    )
    max_bad_fraction: float = _option(0.5, "share of unusable samples that ends the run; 1 never does")
    tokenizer: str | None = _option(None, "tokenizer folder or Hub id; learned from the captions if not given")
    special_tokens: bool = _option(False, "keep the tokenizer's special tokens; the paper's text has none")
    tokenizer_vocab_size: int = _option(30522, "size of a learned vocabulary, at most")
    tokenizer_samples: int = _option(100_000, "captions that a vocabulary is learned from, at most")
    crop_area: list[float] = _option([0.5, 1.0], "smallest and largest fraction of the area that a random crop keeps")
    flip: float = _option(0.5, "probability of a horizontal flip")
    shuffle_block: int = _option(4096, "samples of a source that each worker shuffles together; 1 keeps their order")
    num_workers: int | None = _option(None, "loader processes a training process; by the cores if not given")
    eval_data: str | None = _option(None, "labelled data for zero-shot evaluation, as train_data")
    eval_config: str | None = _option(None, "configuration name of the evaluation data set")
    eval_split: str = _option("test", "split to evaluate on")
    eval_image_column: str | None = _option(None, "image column of the evaluation data")
    label_column: str | None = _option(None, "label column of the evaluation data: indices or names")
    class_names: str | None = _option(None, "file with one class name a line, if the data set does not know them")
    templates: list[str] = _option([GENERIC_TEMPLATE], "prompts, averaged; {} is the class name")
    eval_batch_size: int = _option(256, "images evaluated at once, by each process")

    def __post_init__(self):
        require(bool(self.train_data), "Name the training data with --train_data: a folder, files, or a Hub id.")
        self._check_sources(self.train_data or [])
        require(
            0 < self.max_bad_fraction <= 1,
            f"--max_bad_fraction is a share of the samples, above 0 and at most 1, got {self.max_bad_fraction}.",
        )
        low, high = (self.crop_area * 2)[:2]
        require(
            len(self.crop_area) == 2 and 0 < low <= high <= 1,
            f"--crop_area needs two fractions, 0 < smallest <= largest <= 1, got {self.crop_area}.",
        )
        require(0 <= self.flip <= 1, f"--flip is a probability, got {self.flip}.")
        require(self.shuffle_block >= 1, f"--shuffle_block must be at least 1, got {self.shuffle_block}.")
        require(self.eval_batch_size >= 1, f"--eval_batch_size must be at least 1, got {self.eval_batch_size}.")
        for template in self.templates:
            require("{}" in template, f"--templates: {template!r} has no {{}} for the class name.")

    def _check_sources(self, names: list[str]) -> None:
        twice = next((name for name in names if names.count(name) > 1), None)
        require(twice is None, f"--train_data names {twice!r} twice; give it a larger share with --train_weights.")
        weights = self.train_weights
        require(
            weights is None or (len(weights) == len(names) and all(0 < weight < math.inf for weight in weights)),
            f"--train_weights needs a positive number for each of the {len(names)} --train_data, got {weights}.",
        )
        for option in ("train_config", "image_column", "caption_column"):
            given = getattr(self, option)
            require(
                given is None or len(given) in (1, len(names)),
                f"--{option} takes one name, or one for each of the {len(names)} --train_data, got {given}.",
            )


@dataclass
class OptimizationArguments:
    """The paper's optimisation, counted in samples."""

    train_samples: int = _option(12_800_000_000, "samples seen in the masked phase")
    batch_size: int = _option(65_536, "samples a step, over all processes; all are contrasted with each other")
    micro_batch_size: int | None = _option(None, "samples a process encodes at once; exact whatever it is, less memory")
    base_lr: float = _option(4e-6, "peak learning rate for 256 samples a step; scaled with the batch")
    weight_decay: float = _option(0.2, "decoupled weight decay")
    adam_beta1: float = _option(0.9, "AdamW's first momentum")
    adam_beta2: float = _option(0.95, "AdamW's second momentum")
    adam_epsilon: float = _option(1e-8, "AdamW's epsilon")
    warmup_samples: int = _option(51_200_000, "samples of linear warm-up, before the cosine")
    max_grad_norm: float | None = _option(None, "clip the gradient's norm; the paper does not")
    ema_half_life: int | None = _option(
        None, "samples that halve a weight's share in a moving average, which is then what is evaluated and saved"
    )
    unmasked_samples: int = _option(0, "samples of tuning on whole images that follow; the paper: 0.32 of an epoch")
    unmasked_base_lr: float = _option(4e-8, "its peak learning rate for 256 samples a step")
    unmasked_warmup_samples: int = _option(25_600_000, "its warm-up")
    precision: str = _option("auto", "auto (bf16 where the hardware has it), fp32 or bf16")
    compile: bool = _option(False, "torch.compile the model: minutes at the start, faster steps on a GPU")

    def __post_init__(self):
        for name in ("train_samples", "unmasked_samples", "warmup_samples", "unmasked_warmup_samples"):
            require(getattr(self, name) >= 0, f"--{name} counts samples and cannot be negative.")
        require(self.train_samples + self.unmasked_samples > 0, "Nothing to train: --train_samples is 0.")
        require(
            self.batch_size >= 2, f"--batch_size must be at least 2: one pair has no negatives ({self.batch_size})."
        )
        micro = self.micro_batch_size
        require(micro is None or micro >= 1, f"--micro_batch_size must be at least 1, got {micro}.")
        half_life = self.ema_half_life
        require(half_life is None or half_life >= 1, f"--ema_half_life counts samples, at least 1, got {half_life}.")
        norm = self.max_grad_norm
        require(norm is None or norm > 0, f"--max_grad_norm must be above 0, got {norm}; leave it out not to clip.")
        choices = ("auto", "fp32", "bf16")
        require(self.precision in choices, f"--precision is one of {', '.join(choices)}, got {self.precision!r}.")


@dataclass
class RunArguments:
    """Where the run writes, and how often."""

    output_dir: str = _option("runs/pretrain", "folder of the model, its checkpoints and logs")
    seed: int = _option(0, "of initialisation, masks, order and augmentation")
    log_samples: int = _option(1_000_000, "samples between two log lines")
    eval_samples: int = _option(64_000_000, "samples between two evaluations; the end is always evaluated")
    checkpoint_samples: int = _option(64_000_000, "samples between two checkpoints; 0: only when told to stop")
    keep_checkpoints: int = _option(2, "checkpoints kept")
    max_skipped_steps: int = _option(10, "steps in a row that are not finite before going back to a checkpoint")
    resume_from_checkpoint: str | None = _option(
        None, "auto (the newest good one, or a new run where there is none), latest, or a checkpoint folder"
    )
    report_to: list[str] = _option(["tensorboard"], "trackers, as Accelerate names them; none for none")

    def __post_init__(self):
        for name in ("log_samples", "eval_samples", "keep_checkpoints", "max_skipped_steps"):
            require(getattr(self, name) >= 1, f"--{name} must be at least 1, got {getattr(self, name)}.")
        require(self.checkpoint_samples >= 0, "--checkpoint_samples cannot be negative.")


@dataclass
class HubArguments:
    """What is published on the way and at the end; the first three are named as in Transformers' TrainingArguments."""

    push_to_hub: bool = _option(False, "push the model to the Hub every --hub_push_samples and at the end")
    hub_model_id: str | None = _option(None, "owner/name on the Hub; the name of --output_dir, of yours, if not given")
    hub_private_repo: bool = _option(True, "whether a new repository is private; False makes it public")
    hub_push_samples: int = _option(64_000_000, "samples between two pushes; 0: only at the end")
    export_clip: bool = _option(False, "push a stock CLIPModel, where the model can be one")

    def __post_init__(self):
        require(self.hub_push_samples >= 0, "--hub_push_samples cannot be negative; 0 pushes only at the end.")
        for name in ("hub_model_id", "export_clip"):
            require(self.push_to_hub or not getattr(self, name), f"--{name} says what --push_to_hub does; give that.")


@dataclass
class Arguments:
    """One run, completely described."""

    model: ModelArguments
    objective: ObjectiveArguments
    data: DataArguments
    optimization: OptimizationArguments
    run: RunArguments
    hub: HubArguments

    def __post_init__(self):
        if not self.objective.reconstructs:
            return
        model, named = self.model, f"--objective {self.objective.objective}"
        masked = model.mask_ratio > 0 and model.mask_ratio_end != 0 and model.mask_strategy != "resize"
        require(
            masked,
            f"{named} reconstructs dropped patches: give a --mask_ratio (and --mask_ratio_end) above 0 and a "
            "--mask_strategy other than resize.",
        )
        require(
            self.optimization.unmasked_samples == 0,
            f"On whole images {named} has nothing to reconstruct. Set --unmasked_samples 0, and tune what comes out: "
            f"--model_name_or_path {self.run.output_dir} --mask_ratio 0.",
        )

    def to_recipe(self) -> dict[str, Any]:
        """All values under their option names: what a recipe file holds, and trackers are told.

        Credentials in URLs are removed. A recipe that names a variable instead, `https://${USER}:${PASSWORD}@host/...`,
        keeps it, and can be run again as it is.
        """
        groups = (getattr(self, field.name) for field in dataclasses.fields(self))
        values = {key: value for group in groups for key, value in dataclasses.asdict(group).items()}
        fields = {**self.model.tower_configs(), "decoder_config": self.objective.decoder_fields()}
        return redacted({**values, **{name: given or None for name, given in fields.items()}})

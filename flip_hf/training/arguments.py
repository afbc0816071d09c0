"""All options of a run: seven dataclasses that are the command line and the YAML recipe at once (recipes.py).

A bad value is an error before any device is touched.
"""

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

from flip_hf.console.fields import OptionError, check_options, option, require
from flip_hf.console.ranges import POSITIVE, SEED, integer, number
from flip_hf.data.rendering import Colour, read_colour
from flip_hf.evaluation.templates import PROMPT_SETS, read_templates
from flip_hf.redaction import redacted
from flip_hf.training.config_fields import config_fields
from flip_hf.training.freezing import check_trained_parts, read_frozen
from flip_hf.training.hub_arguments import HubArguments
from flip_hf.training.lora import check_adapters, read_ranks
from flip_hf.training.retention_arguments import RetentionArguments, check_retention
from flip_hf.training.speed_ups import SpeedUp, check_speed_ups
from flip_hf.training.stages import REPLACED, check_stages, read_stages

# ImageNet's statistics, which the official FLIP normalises with.
IMAGE_MEAN = (0.485, 0.456, 0.406)
IMAGE_STD = (0.229, 0.224, 0.225)
GENERIC_TEMPLATE = "a photo of a {}."

# log(100), CLIP's largest scale, rounded up: the model clips the scale to [1, 100], outside which it gets no gradient.
_MAX_LOGIT_SCALE = 4.6052
_DROPPED = number(0, 1, open_high=True, says="is a fraction dropped, {range}")
_LEARNING_RATE = number(0, 1000)
_LR_SCALE = number(0, 1000, open_low=True, note="--freeze keeps a tower as it is")
_SAMPLES = integer(0)
_SIDE = integer(1, 2**14, says="counts pixels and must be {range}")
_BETA = number(0, 1, open_high=True)
_STRENGTH = number(0, 4)
_EDGE_STRENGTH = 0.5


@dataclass
class ModelArguments:
    """The model: a new one from its configuration, or a saved one to continue from."""

    model_name_or_path: str | None = option(
        None, "folder or Hub id of a FLIP or a CLIPModel to start from; a new model if not given"
    )
    init_vision_from: str | None = option(
        None, "folder or Hub id whose vision tower a new model starts with: a ViTMAE, an MAE run, a FLIP"
    )
    text_config: str | None = option(None, "FlipTextConfig fields, as JSON; the paper's B/16 if not given", json=True)
    vision_config: str | None = option(
        None, "FlipVisionConfig fields, as JSON; the paper's B/16 if not given", json=True
    )
    projection_dim: int = option(512, "length of the shared embedding", integer(1, 2**16))
    logit_scale_init_value: float | None = option(
        None,
        "start value of log(1 / temperature) of a new model; 2.6593 if not given, 2.3026 for --loss sigmoid",
        number(0, _MAX_LOGIT_SCALE),
    )
    image_size: int | None = option(None, "image size to continue training the starting model at", _SIDE)
    patch_size: int | None = option(None, "patch size to continue at, as the paper made L/14 from L/16", _SIDE)
    mask_ratio: float = option(
        0.5,
        "fraction of the patches dropped in the masked phase",
        number(
            0,
            1,
            open_high=True,
            says="is the fraction of patches dropped and must be {range}",
            note="use 0 to train on whole images, 0.5 or 0.75 for the paper's settings",
        ),
    )
    mask_strategy: Literal["random", "block", "grid", "gaussian", "edges", "resize"] = option(
        "random",
        "which patches stay: random, block, grid or gaussian; edges (strong gradients more often); or resize, all of a "
        "smaller image",
    )
    mask_edge_strength: float = option(
        _EDGE_STRENGTH,
        "preference of edges: patches are drawn in proportion to this power of their gradient; 0: at random",
        _STRENGTH,
    )
    mask_edge_strength_end: float | None = option(
        None, "that preference at the end of the masked phase, reached linearly; constant if not given", _STRENGTH
    )
    mask_ratio_end: float | None = option(
        None, "mask ratio at the end of the masked phase; constant if not given", _DROPPED
    )
    mask_ratio_schedule: Literal["linear", "cosine"] = option(
        "linear", "linear or cosine, from --mask_ratio to --mask_ratio_end"
    )
    mask_ratio_steps: int = option(4, "distinct mask ratios along the schedule, both ends included", integer(2, 32))
    text_mask_ratio: float = option(0.0, "fraction of the text's context dropped in the masked phase", _DROPPED)
    text_mask_strategy: Literal["random", "prioritized", "block", "frequency"] = option(
        "prioritized",
        "random, or padding first and then: prioritized (any tokens), block (all but a run of tokens) or frequency "
        "(common words more often than rare ones)",
    )
    attn_implementation: str = option("sdpa", "eager, sdpa, flex_attention or flash_attention_2")
    gradient_checkpointing: bool = option(False, "recompute activations in backward to save memory")
    freeze: list[str] | None = option(
        None,
        "parts that are not trained: image, text (a tower with its projection), or image:8 (embeddings and 8 blocks)",
    )
    lora: list[str] | None = option(
        None,
        "towers that keep their weights and learn by low-rank adapters, with the rank: image:16, text:8; needs PEFT",
    )

    def __post_init__(self):
        check_options(self)
        read_frozen(self.freeze)  # raises on an unknown part
        read_ranks(self.lora)  # raises on an unknown tower
        self.tower_configs()  # raises on bad JSON
        edges = (self.mask_edge_strength, self.mask_edge_strength_end)
        require(
            self.mask_strategy == "edges" or edges == (_EDGE_STRENGTH, None),
            "--mask_edge_strength and --mask_edge_strength_end need --mask_strategy edges; give that too.",
        )
        both = self.model_name_or_path and (self.text_config or self.vision_config)
        require(not both, "Give --model_name_or_path or the configuration of a new model, not both.")
        require(
            not (self.model_name_or_path and self.init_vision_from),
            "--init_vision_from gives a new model its vision tower; --model_name_or_path has one. Give one of them.",
        )
        for name in ("image_size", "patch_size"):
            size = getattr(self, name)
            require(
                size is None or self.model_name_or_path is not None or self.init_vision_from is not None,
                f"--{name} changes the model of --model_name_or_path or the vision tower of --init_vision_from; set "
                "that of a new model in --vision_config.",
            )

    @property
    def drawn_strategy(self) -> Literal["random", "block", "grid", "gaussian"]:
        """The `mask_strategy` of the model's configuration, for masks it draws itself.

        Only the trainer resizes, and only its loader has the pixels that `edges` looks at.
        """
        return "random" if self.mask_strategy in ("edges", "resize") else self.mask_strategy

    def tower_configs(self) -> dict[str, dict]:
        """Returns the fields given for the two towers, under `text_config` and `vision_config`."""
        return {
            "text_config": config_fields(self.text_config, "text_config", "FlipTextConfig"),
            "vision_config": config_fields(self.vision_config, "vision_config", "FlipVisionConfig"),
        }


@dataclass
class ObjectiveArguments:
    """The objective: image against text, the pixels of dropped patches (MAE), or both."""

    objective: Literal["contrastive", "reconstruction", "both"] = option(
        "contrastive", "contrastive (FLIP), reconstruction (MAE; needs no captions) or both"
    )
    reconstruction_weight: float = option(
        1.0,
        "weight of the reconstruction loss where it is added to the contrastive one",
        number(0, 1_000_000, open_low=True),
    )
    loss: Literal["softmax", "sigmoid"] | None = option(
        None,
        "how images are compared with texts: by softmax (CLIP) or sigmoid (SigLIP); if not given, as the starting "
        "model was, and softmax for a new one",
    )
    positives: Literal["pair", "caption"] | None = option(
        None,
        "texts that an image is drawn to: its own (pair), or all of the batch that equal it (caption); if not given, "
        "caption where captions are made of labels",
    )
    decoder_config: str | None = option(
        None, "FlipDecoderConfig fields, as JSON; MAE's 8 x 512 if not given", json=True
    )
    norm_pixel_target: bool = option(True, "reconstruct each patch on the scale of its own mean and deviation")
    grid_samples: int = option(
        64_000_000,
        "samples between pictures of reconstructed images, in the run's folder and tracker; 0: none",
        integer(0, note="0 draws none"),
    )

    def __post_init__(self):
        check_options(self)
        self.decoder_fields()  # raises on bad JSON
        for name in ("loss", "positives"):
            value = getattr(self, name)
            require(
                value is None or self.contrasts,
                f"--{name} {value} is about texts, and --objective reconstruction reads none. Leave it out.",
            )

    @property
    def contrasts(self) -> bool:
        """True if images are compared with texts."""
        return self.objective != "reconstruction"

    @property
    def reconstructs(self) -> bool:
        """True if dropped patches are reconstructed."""
        return self.objective != "contrastive"

    def decoder_fields(self) -> dict[str, Any]:
        """Returns the fields given for the decoder."""
        return config_fields(self.decoder_config, "decoder_config", "FlipDecoderConfig")


@dataclass
class DataArguments:
    """The data for training and evaluation, and how they are read."""

    train_data: list[str] | None = option(
        None, "shapes (embedded), Hub id, folder, or .tar / .parquet / .csv / .jsonl files, as path, URL or pattern"
    )
    train_weights: list[float] | None = option(
        None,
        "relative sampling weights of several --train_data; equal if not given",
        number(0, 1e12, open_low=True, says="needs positive numbers, {range}"),
    )
    train_config: list[str] | None = option(
        None, "configuration name, on the Hub or in a folder with a card; one, or one for each"
    )
    train_split: str = option("train", "split to train on")
    image_column: list[str] | None = option(
        None, "image column, one or one for each data; found by its usual names if not given"
    )
    caption_column: list[str] | None = option(
        None,
        "column of captions or labels, one or one for each data; json.caption looks into JSON, and 'caption:3 alt:1' "
        "draws by weight; found if not given",
    )
    caption_templates: list[str] | None = option(
        None,
        f"prompts that make captions of labels: {', '.join(PROMPT_SETS)}, a file, or templates with {{}} for the "
        f"class; {GENERIC_TEMPLATE!r} if not given",
    )
    max_bad_fraction: float = option(
        0.5,
        "fraction of unusable samples above which the run ends; 1: never",
        number(0, 1, open_low=True, says="is a share of the samples, {range}"),
    )
    tokenizer: str | None = option(None, "tokenizer folder or Hub id; learned from the captions if not given")
    special_tokens: bool = option(False, "keep the tokenizer's special tokens; the paper's text has none")
    tokenizer_vocab_size: int = option(30522, "maximum size of a learned vocabulary", integer(2, 2**24))
    tokenizer_samples: int = option(100_000, "maximum number of captions that a vocabulary is learned from", POSITIVE)
    crop_area: list[float] = option(
        [0.5, 1.0],
        "smallest and largest fraction of the area that a random crop keeps",
        number(0, 1, open_low=True, says="needs two fractions, each {range}"),
    )
    background: str = option("white", "background colour for transparent pictures, such as white or #808080")
    flip: float = option(0.5, "probability of a horizontal flip", number(0, 1, says="is a probability, {range}"))
    shuffle_block: int = option(
        4096, "samples of a source that each worker shuffles together; 1 keeps the order", integer(1, 2**24)
    )
    holdout: float = option(
        0.0,
        "fraction of the training pairs held out of training, to validate the run on",
        number(0, 0.5, says="is a share of the pairs, {range}", note="0 holds none out"),
    )
    num_workers: int | None = option(
        None, "data loader workers per process; chosen by the number of cores if not given", integer(0, 1024)
    )
    eval_data: str | None = option(
        None, "held-out pairs, or labelled data for zero-shot evaluation, as --train_data; its columns decide which"
    )
    eval_config: str | None = option(None, "configuration name of the evaluation data set")
    eval_split: str = option("test", "split to evaluate on")
    eval_image_column: str | None = option(None, "image column of the evaluation data")
    label_column: str | None = option(None, "label column of the evaluation data: indices or names")
    eval_caption_column: str | None = option(None, "caption column of the evaluation data, if it holds pairs")
    eval_pairs: int = option(
        1000, "maximum number of held-out images to evaluate, with their captions", integer(2, 2**20)
    )
    class_names: str | None = option(
        None, "file with one class a line, synonyms after semicolons, for labels that the data do not name"
    )
    templates: list[str] = option(
        [GENERIC_TEMPLATE], "prompts of the evaluation, averaged, as --caption_templates, which are taken if given"
    )
    eval_batch_size: int = option(256, "evaluation batch size of each process", integer(1, 2**20))

    def __post_init__(self):
        check_options(self)
        require(bool(self.train_data), "Name the training data with --train_data: a folder, files, or a Hub id.")
        self._check_sources(self.train_data or [])
        self._check_evaluation()
        low, high = (self.crop_area * 2)[:2]
        require(
            len(self.crop_area) == 2 and 0 < low <= high <= 1,
            f"--crop_area needs two fractions, 0 < smallest <= largest <= 1, got {self.crop_area}.",
        )
        self.background_colour()  # raises on a bad colour
        self.read_prompts("templates")  # raises on a bad template
        self.read_prompts("caption_templates")

    def read_prompts(self, option: str) -> tuple[str, ...]:
        """Reads the templates of `templates` or `caption_templates`; the generic one where none are given."""
        try:
            return read_templates(getattr(self, option) or [GENERIC_TEMPLATE])
        except (ValueError, FileNotFoundError) as error:
            raise OptionError(f"--{option}: {error}") from None

    def background_colour(self) -> Colour:
        """Returns red, green and blue of `background`."""
        try:
            return read_colour(self.background)
        except ValueError as error:
            raise OptionError(f"--background: {error}") from None

    def _check_evaluation(self) -> None:
        # Labels of the training data are in a column that is named.
        labelled = self.label_column or (self.class_names and not self.caption_column)
        require(
            not (labelled and self.eval_caption_column),
            "--label_column and --class_names are for labelled --eval_data, --eval_caption_column for pairs; give one "
            "kind.",
        )
        for name in ("label_column", "eval_caption_column"):
            require(
                self.eval_data is not None or getattr(self, name) is None,
                f"--{name} names a column of --eval_data; give that too.",
            )
        require(
            not (self.holdout and self.eval_caption_column),
            "--holdout takes held-out pairs from the training data, and --eval_data with --eval_caption_column "
            "names others; give one of them.",
        )

    def _check_sources(self, names: list[str]) -> None:
        twice = next((name for name in names if names.count(name) > 1), None)
        require(twice is None, f"--train_data names {twice!r} twice; give it a larger share with --train_weights.")
        weights = self.train_weights
        require(
            weights is None or len(weights) == len(names),
            f"--train_weights needs a positive number for each of the {len(names)} --train_data, got {weights}.",
        )
        for name in ("train_config", "image_column", "caption_column"):
            given = getattr(self, name)
            require(
                given is None or len(given) in (1, len(names)),
                f"--{name} takes one name, or one for each of the {len(names)} --train_data, got {given}.",
            )


@dataclass
class OptimizationArguments:
    """The paper's optimisation, counted in samples."""

    train_samples: int = option(12_800_000_000, "samples seen in the masked phase", _SAMPLES)
    batch_size: int = option(
        65_536,
        "samples per step over all processes, all contrasted with each other",
        integer(2, 2**30, note="one pair has no negatives"),
    )
    micro_batch_size: int | None = option(
        None, "samples a process encodes at once; saves memory, and the gradient stays exact", integer(1, 2**30)
    )
    base_lr: float = option(4e-6, "peak learning rate for 256 samples a step; scaled with the batch", _LEARNING_RATE)
    optimizer: Literal["adamw", "muon"] = option(
        "adamw", "adamw, or muon for the matrices of the Transformer blocks and adamw for the rest"
    )
    muon_lr_scale: float = option(
        1.0, "factor on the learning rate of muon's matrices; 1: updates as large as adamw's", _LEARNING_RATE
    )
    image_lr_scale: float = option(1.0, "factor on the learning rate of the image tower", _LR_SCALE)
    text_lr_scale: float = option(1.0, "factor on the learning rate of the text tower", _LR_SCALE)
    layer_decay: float = option(
        1.0, "factor on the learning rate per layer from a tower's projection down", number(0, 1, open_low=True)
    )
    weight_decay: float = option(0.2, "decoupled weight decay", number(0, 1000))
    adam_beta1: float = option(0.9, "AdamW's first momentum", _BETA)
    adam_beta2: float = option(0.95, "AdamW's second momentum", _BETA)
    adam_epsilon: float = option(1e-8, "AdamW's epsilon", number(0, 1, open_low=True))
    warmup_samples: int = option(51_200_000, "samples of linear warm-up, before the cosine", _SAMPLES)
    max_grad_norm: float | None = option(
        None,
        "clip the gradient's norm; the paper does not",
        number(0, 1e12, open_low=True, note="leave it out not to clip"),
    )
    ema_half_life: int | None = option(
        None,
        "half-life, in samples, of a moving average of the weights, which is then evaluated and saved",
        integer(1, says="counts samples, {range}"),
    )
    unmasked_samples: int = option(
        0, "samples of unmasked tuning that follow, on whole images; the paper: 0.32 of an epoch", _SAMPLES
    )
    unmasked_base_lr: float = option(
        4e-8, "peak learning rate of unmasked tuning, for 256 samples a step", _LEARNING_RATE
    )
    unmasked_warmup_samples: int = option(25_600_000, "samples of warm-up in unmasked tuning", _SAMPLES)
    stages: str | None = option(
        None,
        "stages of the run, as JSON: a list of {samples, image_size, mask_ratio, text_length, text_mask_ratio, "
        "base_lr, warmup_samples}, in place of --train_samples, --mask_ratio_end, --mask_edge_strength_end and "
        "--unmasked_...",
        json=True,
    )
    precision: Literal["auto", "fp32", "bf16"] = option("auto", "auto (bf16 where the hardware has it), fp32 or bf16")
    compile: bool = option(
        False, "compile the model with torch.compile: takes minutes at the start, may make steps faster on a GPU"
    )
    speed_ups: list[SpeedUp] | None = option(
        None, "fused_qkv, bf16_residual, cuda_graphs, fp8: faster arithmetic and launches; none is measured yet"
    )

    def __post_init__(self):
        check_options(self)
        require(self.train_samples + self.unmasked_samples > 0, "Nothing to train: --train_samples is 0.")
        require(
            self.stages is not None or not 0 < self.train_samples < self.batch_size,
            f"--train_samples {self.train_samples:,} is less than a step's --batch_size {self.batch_size:,}.",
        )


@dataclass
class RunArguments:
    """The output of the run: where it writes, and how often."""

    output_dir: str = option("runs/pretrain", "folder of the model, its checkpoints and logs")
    seed: int = option(0, "seed of initialisation, masks, order and augmentation", SEED)
    log_samples: int = option(1_000_000, "samples between log lines", POSITIVE)
    eval_samples: int = option(64_000_000, "samples between evaluations; the end is always evaluated", POSITIVE)
    early_stopping_patience: int | None = option(
        None,
        "evaluations in a row without improvement before the run ends",
        integer(1, 1_000_000, note="leave it out to train to the end"),
    )
    checkpoint_samples: int = option(64_000_000, "samples between checkpoints; 0: by the clock alone", _SAMPLES)
    checkpoint_minutes: float = option(30.0, "minutes between checkpoints; 0: by samples alone", number(0, 525_600))
    keep_checkpoints: int = option(2, "number of checkpoints kept", integer(1, 1_000_000))
    max_skipped_steps: int = option(
        10,
        "non-finite steps in a row, counted at log lines, after which the run goes back to a checkpoint",
        integer(1, 1_000_000),
    )
    resume_from_checkpoint: str | None = option(
        None, "auto (the newest good one, or a new run where there is none), latest, or a checkpoint folder"
    )
    report_to: list[str] = option(["tensorboard"], "trackers, as Accelerate names them; none disables them")

    def __post_init__(self):
        check_options(self)


@dataclass
class Arguments:
    """One run, completely described."""

    model: ModelArguments
    objective: ObjectiveArguments
    data: DataArguments
    optimization: OptimizationArguments
    run: RunArguments
    hub: HubArguments
    retention: RetentionArguments

    def __post_init__(self):
        require(
            self.run.early_stopping_patience is None or self.optimization.unmasked_samples == 0,
            "--early_stopping_patience would skip the tuning on whole images. Set --unmasked_samples 0, and tune the "
            f"result afterwards: --model_name_or_path {self.run.output_dir} --mask_ratio 0.",
        )
        check_trained_parts(self)
        check_adapters(self)
        check_retention(self)
        check_speed_ups(self)
        check_stages(self)
        if not self.objective.reconstructs:
            return
        model = self.model
        named = f"--objective {self.objective.objective}"
        masked = model.mask_ratio > 0 and model.mask_ratio_end != 0 and model.mask_strategy != "resize"
        require(
            masked,
            f"{named} reconstructs dropped patches: give a --mask_ratio (and --mask_ratio_end) above 0 and a "
            "--mask_strategy other than resize.",
        )
        require(
            self.optimization.unmasked_samples == 0,
            f"On whole images {named} has nothing to reconstruct. Set --unmasked_samples 0, and tune the result "
            f"afterwards: --model_name_or_path {self.run.output_dir} --mask_ratio 0.",
        )

    def to_recipe(self) -> dict[str, Any]:
        """Returns all values under their option names, for a recipe file and for trackers.

        Credentials in URLs are removed. A recipe that names variables instead, `https://${USER}:${PASSWORD}@host/...`,
        keeps them and can be run again unchanged.
        """
        groups = (getattr(self, field.name) for field in dataclasses.fields(self))
        values = {key: value for group in groups for key, value in dataclasses.asdict(group).items()}
        fields = {**self.model.tower_configs(), "decoder_config": self.objective.decoder_fields()}
        stages = self.optimization.stages
        if stages is not None:
            fields["stages"] = [stage.to_recipe() for stage in read_stages(stages)]
            values = {name: value for name, value in values.items() if name not in REPLACED}
        return redacted({**values, **{name: given or None for name, given in fields.items()}})

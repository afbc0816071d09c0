"""Low-rank adapters on a tower (`--lora`), by PEFT: the tower's own weights stay, and small matrices beside them learn.

LoRA (Hu et al., 2021, arXiv 2106.09685) computes a linear layer as `W x + B A x`, with A (r, D_in) random and B
(D_out, r) zero at the start. Here every linear layer of a tower's blocks has adapters, those of attention and of the
MLP: QLoRA (Dettmers et al., 2023, arXiv 2305.14314) found that this is what it takes to match full fine-tuning. PEFT's
factor alpha / r on `B A` is 1: the paper sets alpha to the first rank that it tries, and tunes the learning rate alone.

Adapters are separate only while they are trained. A saved model has the product added to its weights, under their own
names; beside it lie the adapters, as PEFT reads them.

Options are read without torch, as all of arguments.py.
"""

import copy
from argparse import ArgumentTypeError
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from flip_hf.console.fields import OptionError, require
from flip_hf.console.ranges import integer
from flip_hf.redaction import redact
from flip_hf.training.freezing import TOWERS, require_weights

if TYPE_CHECKING:
    from accelerate import Accelerator
    from peft import LoraConfig
    from torch import Tensor

    from flip_hf.modeling import FlipConfig, FlipModel
    from flip_hf.training.arguments import Arguments

# The rank of the adapters of each tower that has some.
Ranks = Mapping[str, int]
# The folder, in that of a saved model, of its adapters in PEFT's format.
ADAPTERS = "adapters"
_RANK = integer(1, 4096, says="must be {range}", note="leave the tower out to train all of it")
_PARTS = {"image": "vision_model", "text": "text_model"}
_LAYERS = r"encoder\.layers\.\d+\.(self_attn\.(q|k|v|out)_proj|mlp\.fc[12])"
# PEFT's name of the one set of adapters, and of the layers that it wraps.
_NAME = "default"
_BASE = ".base_layer."


def read_ranks(values: Sequence[str] | None) -> dict[str, int]:
    """Reads the towers and ranks that `--lora` names, such as `image:16`, by tower; None names none.

    Raises:
        OptionError: there is no such tower, one is named twice, or a rank is missing or not positive.
    """
    ranks: dict[str, int] = {}
    for value in values or ():
        tower, colon, rank = value.partition(":")
        require(
            tower in TOWERS and bool(colon),
            f"--lora takes a tower, image or text, and the rank of its adapters, as image:16, got {value!r}.",
        )
        require(tower not in ranks, f"--lora names the {tower} tower twice, {' '.join(values or ())}; name it once.")
        try:
            ranks[tower] = int(_RANK(rank))
        except ArgumentTypeError as error:
            raise OptionError(f"--lora {value}: the rank {error}") from None
    return ranks


def check_adapters(arguments: "Arguments") -> None:
    """Checks that the towers with adapters have weights to keep, and that nothing else freezes them.

    Raises:
        OptionError: such a tower would be new, unused or frozen as well, or PEFT is not installed.
    """
    model = arguments.model
    ranks = read_ranks(model.lora)
    frozen = {part.partition(":")[0]: part for part in model.freeze or ()}
    for tower, rank in ranks.items():
        require_weights(model, tower, f"--lora {tower}:{rank}")
        require(
            tower not in frozen,
            f"--freeze {frozen.get(tower)} and --lora {tower}:{rank} are about the same tower: with adapters, its own "
            "weights are frozen already, and adapters are what it learns by. Leave one of them out.",
        )
    require(
        arguments.objective.contrasts or "text" not in ranks,
        "--lora text is about texts, and --objective reconstruction reads none. Leave it out.",
    )
    require(
        not ranks or find_spec("peft") is not None,
        "--lora needs PEFT, which is not installed: pip install 'peft>=0.20'.",
    )


def check_ranks(ranks: Ranks, config: "FlipConfig") -> None:
    """Checks that adapters are smaller than the layers beside which they are.

    Raises:
        OptionError: a rank is larger than a layer's narrower side.
    """
    parts = {"image": config.vision_config, "text": config.text_config}
    for tower, rank in ranks.items():
        width = min(parts[tower].hidden_size, parts[tower].intermediate_size)
        require(
            rank <= width,
            f"--lora {tower}:{rank}: the layers of the {tower} tower have {width} inputs or outputs, and no higher "
            f"rank. Give at most so many, or leave {tower} out to train all of the tower.",
        )


def check_processes(ranks: Ranks, accelerator: "Accelerator") -> None:
    """Checks that each process has whole weights, which adapters are merged into.

    Raises:
        ValueError: weights or optimizer are sharded.
    """
    from accelerate.utils import DistributedType

    if ranks and accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED):
        raise ValueError(
            "--lora needs whole weights on each process; leave it out, or launch by `accelerate launch --multi_gpu`, "
            "which shards nothing."
        )


def add_adapters(flip: "FlipModel", ranks: Ranks) -> None:
    """Adds new adapters to a model whose towers are frozen where they get some; the rest is trained as before.

    The first matrices are drawn from torch's generator.
    """
    if not ranks:
        return
    from peft import inject_adapter_in_model

    trained = [parameter for parameter in flip.parameters() if parameter.requires_grad]
    inject_adapter_in_model(_configuration(ranks), flip, adapter_name=_NAME)  # freezes all but its own
    for parameter in trained:
        parameter.requires_grad_(True)


def _configuration(ranks: Ranks) -> "LoraConfig":
    from peft import LoraConfig

    by_part = {rf"{_PARTS[tower]}\..*": rank for tower, rank in ranks.items()}
    first = next(iter(ranks.values()))
    return LoraConfig(
        target_modules=rf"({'|'.join(_PARTS[tower] for tower in ranks)})\.{_LAYERS}",
        r=first,
        lora_alpha=first,
        rank_pattern=by_part,
        alpha_pattern=dict(by_part),
    )


def adapters_in_words(flip: "FlipModel", ranks: Ranks) -> str:
    """Says in a sentence which adapters a model has."""
    names = [f"of rank {rank} on the {tower} tower" for tower, rank in ranks.items()]
    sizes = {name: parameter.numel() for name, parameter in flip.named_parameters()}
    added = sum(size for name, size in sizes.items() if is_adapter(name))
    kept = sum(size for name, size in sizes.items() if any(name.startswith(f"{_PARTS[tower]}.") for tower in ranks))
    whose = "the tower's" if len(ranks) == 1 else "the towers'"
    return f"LoRA: adapters {' and '.join(names)}; {added:,} parameters beside {whose} {kept - added:,}, which stay."


# ---------------------------------------------------------------------------------------------------------------------
# Names and weights, also of models without adapters
# ---------------------------------------------------------------------------------------------------------------------


def is_adapter(name: str) -> bool:
    """Returns whether a parameter of this name belongs to an adapter."""
    return ".lora_A." in name or ".lora_B." in name


def own_tensors(tensors: Mapping[str, "Tensor"]) -> dict[str, "Tensor"]:
    """Leaves the adapters out of a model's tensors, and gives the others the names that they have without adapters."""
    return {name.replace(_BASE, "."): value for name, value in tensors.items() if not is_adapter(name)}


def adapted_tensors(tensors: Mapping[str, "Tensor"]) -> dict[str, "Tensor"]:
    """Selects the adapters of a model's tensors, and the weights beside them, under PEFT's names."""
    return {name: value for name, value in tensors.items() if is_adapter(name) or name.endswith(f"{_BASE}weight")}


def merged(weights: Mapping[str, "Tensor"]) -> dict[str, "Tensor"]:
    """Adds the product of each layer's adapters to its weight, `W + B A`, in new tensors with the model's own names.

    The bits are those of PEFT's `merge_and_unload`, which would change the model in training, and not its weights on
    their way to a file.
    """
    own = own_tensors(weights)
    for name in weights:
        layer, base, kind = name.rpartition(_BASE)
        if base and kind == "weight":
            product = weights[f"{layer}.lora_B.{_NAME}.weight"] @ weights[f"{layer}.lora_A.{_NAME}.weight"]
            own[f"{layer}.weight"] = weights[name] + product
    return own


def save_adapters(flip: "FlipModel", weights: Mapping[str, "Tensor"], folder: Path, start: str) -> None:
    """Writes adapters as `PeftModel.from_pretrained(start, folder)` reads them.

    Args:
        flip: the model, which knows how its adapters are configured.
        weights: its weights, or an average of them, or those of a model around it.
        folder: the folder to write.
        start: the name of the model that the adapters belong to.
    """
    from peft import get_peft_model_state_dict
    from peft.utils import SAFETENSORS_WEIGHTS_NAME

    from flip_hf.training.states import write_tensors

    of_flip = {name.removeprefix("flip."): value for name, value in weights.items() if is_adapter(name)}
    tensors = get_peft_model_state_dict(flip, of_flip, adapter_name=_NAME, save_embedding_layers=False)
    folder.mkdir(parents=True, exist_ok=True)
    named = {f"base_model.model.{name}": value for name, value in tensors.items()}
    write_tensors(named, folder / SAFETENSORS_WEIGHTS_NAME, {"format": "pt"})
    config = copy.copy(flip.peft_config[_NAME])
    config.base_model_name_or_path = redact(start)
    config.inference_mode = True  # as PEFT writes it: loaded adapters are not trained unless that is asked for
    config.save_pretrained(str(folder))

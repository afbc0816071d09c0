"""Writes the paragraphs and tables of a model card from the files of a run."""

from collections.abc import Iterable

from huggingface_hub import EvalResult

from flip_hf.console.json_types import JsonObject
from flip_hf.console.names import is_hub_id, short_name
from flip_hf.data import scenes, shapes
from flip_hf.hub.carbon import Compute
from flip_hf.hub.run import PublishedRun

PAPER_SAMPLES = "12.8 billion"
CODE_LICENCE = "[Apache-2.0](https://www.apache.org/licenses/LICENSE-2.0)"
EMBEDDED = (shapes.DATA.name, scenes.DATA.name)
NOT_KNOWN = "Not known: no recipe lies beside the weights."


def _rows(rows: Iterable[tuple[str, str]]) -> str:
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows)])


def about(run: PublishedRun) -> str:
    """Describes the model in two sentences."""
    if run.reconstructs:
        return _about_pretraining(run)
    method = "[FLIP](https://arxiv.org/abs/2212.00794)"
    most = max(run.mask_ratios, default=0.0)
    if most > 0:
        share = f"up to {most:.0%}" if run.stages else f"{most:.0%}"
        how = f"trained while {share} of the patches of every image were dropped ({method})"
    else:
        how = f"of the kind of {method}, CLIP trained on masked images" if run.is_flip else "of CLIP's kind"
    kind = "A FlipModel" if run.is_flip else "A stock CLIPModel, which needs no code but Transformers',"
    return (
        f"{kind} {how}. It scores how well images and texts match, for zero-shot classification, search and "
        "features; at test time it sees whole images."
    )


def _about_pretraining(run: PublishedRun) -> str:
    beside = " beside comparing what is left with captions" if run.contrasts else ", without captions"
    return (
        "A FlipForPreTraining: a vision Transformer that was trained to reconstruct the dropped "
        f"{run.towers.mask_ratio:.0%} of the patches of every image{beside}, with the decoder of "
        "[MAE](https://arxiv.org/abs/2111.06377). It is a starting point for fine-tuning, for probes, or for the "
        "vision tower of a FLIP."
    )


def architecture(run: PublishedRun) -> str:
    """Makes a table of the towers."""
    vision = run.towers.vision_config
    text = run.towers.text_config
    columns = {"images": (vision, f"{vision.image_size} pixels, patches of {vision.patch_size}")}
    if run.contrasts:
        columns["texts"] = (text, f"{text.max_position_embeddings} tokens of {text.vocab_size:,}")
    if run.reconstructs:
        columns["decoder"] = (run.config.decoder_config, "all patches, dropped ones as one learned token")
    sizes = [f"{t.num_hidden_layers} x {t.hidden_size}, {t.num_attention_heads} heads" for t, _ in columns.values()]
    embeddings = f", embeddings of {run.towers.projection_dim}" if run.contrasts else ""
    return "\n".join(
        (
            f"| | {' | '.join(columns)} |",
            f"|---|{'---|' * len(columns)}",
            f"| blocks x width | {' | '.join(sizes)} |",
            f"| input | {' | '.join(read for _, read in columns.values())} |",
            "",
            f"{run.parameters / 1e6:,.1f} M parameters{embeddings}.",
        )
    )


def data(run: PublishedRun) -> str:
    """Describes the training data, and what was skipped."""
    if not run.recipe:
        return NOT_KNOWN
    counted = run.results.get("sources", {})
    lines = []
    for name in run.recipe["train_data"]:
        shown = f"[{name}](https://huggingface.co/datasets/{name})" if is_hub_id(name) else f"`{short_name(name)}`"
        if name in EMBEDDED:
            shown += ", drawn by flip_hf itself: coloured shapes with captions"
        seen = counted.get(name, {})
        refused = ", ".join(f"{count:,} x {reason}" for reason, count in seen.get("refused", {}).items())
        lines.append(
            f"- {shown}"
            + (f": {seen['samples']:,} {run.kind_of_samples} seen" if "samples" in seen else "")
            + (f"; skipped: {refused}" if refused else "")
        )
    return "\n".join(lines)


def _optimizer(recipe: JsonObject) -> str:
    peak = recipe["base_lr"] * recipe["batch_size"] / 256
    rate = "" if recipe.get("stages") else f"peak learning rate {peak:.3g}, "  # of stages, each names its own
    adamw = (
        f"AdamW, {rate}weight decay {recipe['weight_decay']:g}, betas {recipe['adam_beta1']:g} and "
        f"{recipe['adam_beta2']:g}"
    )
    if recipe.get("optimizer") != "muon":
        return adamw
    return f"Muon for the blocks' matrices, {recipe['muon_lr_scale']:g} times the learning rate; else {adamw}"


def _frozen(part: str) -> str:
    """Says which part of a tower `--freeze` names."""
    tower, _, blocks = part.partition(":")
    if not blocks:
        return f"the {tower} tower"
    return f"the embeddings and the first {f'{blocks} blocks' if int(blocks) > 1 else 'block'} of the {tower} tower"


def _adapted(ranks: list[str]) -> str:
    """Says which towers `--lora` names."""
    towers = [f"rank {rank} on the {tower} tower" for tower, _, rank in (each.partition(":") for each in ranks)]
    return f"LoRA of {' and of '.join(towers)}, merged into the weights"


def training(run: PublishedRun) -> str:
    """Makes a table of the recipe's main values."""
    if not run.recipe:
        return NOT_KNOWN
    recipe = run.recipe
    batch = recipe["batch_size"]
    scale = recipe["batch_size"] / 256
    contrasted = ", all contrasted with each other" if run.contrasts else ""
    rows = [
        ("began from", _origin(run)),
        (f"{run.kind_of_samples} seen", f"{run.samples:,}, {batch:,} per step{contrasted}"),
        *(_stages(run) if run.stages else _masks(recipe)),
        ("optimizer", _optimizer(recipe)),
        *([] if run.stages else [("schedule", f"{recipe['warmup_samples']:,} samples of warm-up, then a cosine")]),
    ]
    if recipe.get("freeze"):
        rows.append(("not trained", ", ".join(map(_frozen, recipe["freeze"]))))
    if recipe.get("lora"):
        rows.append(("learned by", _adapted(recipe["lora"])))
    if recipe.get("unmasked_samples"):
        peak = recipe["unmasked_base_lr"] * scale
        rows.append(("tuned on whole images", f"{recipe['unmasked_samples']:,} pairs, peak learning rate {peak:.3g}"))
    if run.contrasts and getattr(run.towers, "logit_bias_init_value", None) is not None:  # a CLIPModel has none
        rows.append(("loss", "sigmoid, as SigLIP's"))
    if run.reconstructs:
        scaled = "of each patch's own mean and deviation" if recipe["norm_pixel_target"] else "as they are"
        weight = f", {recipe['reconstruction_weight']:g} times, beside the contrastive loss" if run.contrasts else ""
        rows.append(("reconstructed", f"pixels of dropped patches, {scaled}{weight}"))
    if recipe["ema_half_life"]:
        rows.append(("weights", f"a moving average, half of it the last {recipe['ema_half_life']:,} pairs"))
    if run.results.get("skipped_steps"):
        rows.append(("steps skipped", f"{run.results['skipped_steps']:,}, which were not finite"))
    return f"{_rows(rows)}\n\nAll other options are in `recipe.yaml`, which `flip-hf pretrain` runs again."


def _origin(run: PublishedRun) -> str:
    """Names the model that the run began from, and the Hub model that this one is derived from."""
    if run.source is None:
        return "a new model"
    base = run.base_model
    named = f"`{short_name(run.source)}`" if run.source != base else ""
    linked = f"[{base}](https://huggingface.co/{base})" if base else ""
    origin = f"{named}, which came from {linked}" if named and linked else named or linked
    return origin if run.recipe.get("model_name_or_path") else f"a new model with the image tower of {origin}"


def _masks(recipe: JsonObject) -> list[tuple[str, str]]:
    return [
        ("patches dropped", _masking(recipe, "mask_ratio", "mask_strategy")),
        ("text dropped", _masking(recipe, "text_mask_ratio", "text_mask_strategy")),
    ]


def _stages(run: PublishedRun) -> list[tuple[str, str]]:
    """Describes each stage in a row."""
    rows = []
    for number, stage in enumerate(run.stages, start=1):
        values = {**run.recipe, **stage}
        said = [f"{stage['samples']:,} {run.kind_of_samples}"]
        if "image_size" in stage:
            said.append(f"images of {stage['image_size']} pixels")
        if "text_length" in stage:
            said.append(f"texts of {stage['text_length']} tokens")
        said.append(f"patches dropped: {_masking(values, 'mask_ratio', 'mask_strategy')}")
        if values["text_mask_ratio"]:
            said.append(f"text dropped: {_masking(values, 'text_mask_ratio', 'text_mask_strategy')}")
        if number == 1 or "base_lr" in stage:
            peak = values["base_lr"] * run.recipe["batch_size"] / 256
            said.append(f"peak learning rate {peak:.3g} after {values['warmup_samples']:,} of warm-up, then a cosine")
        rows.append((f"stage {number}", "; ".join(said)))
    return rows


def _masking(recipe: JsonObject, ratio: str, strategy: str) -> str:
    if not recipe[ratio]:
        return "none"
    end = recipe.get(f"{ratio}_end")
    to = "" if end is None else f" to {end:.0%}"
    return f"{recipe[ratio]:.0%}{to}, {recipe[strategy]}{_strength(recipe) if recipe[strategy] == 'edges' else ''}"


def _strength(recipe: JsonObject) -> str:
    """Describes how much masks by content prefer edges."""
    end = recipe.get("mask_edge_strength_end")
    return f" at a strength of {recipe['mask_edge_strength']:g}" + ("" if end is None else f" to {end:g}")


def compute(run: PublishedRun) -> str:
    """Describes device, time, speed, and the carbon estimate."""
    found = Compute.from_results(run.results)
    if found is None:
        return NOT_KNOWN
    on = f"{found.processes} x {found.device}" if found.processes and found.device else "devices that were not recorded"
    speed = f", {run.samples / found.seconds:,.0f} {run.kind_of_samples}/s" if run.samples and found.seconds else ""
    return f"{found.duration} of training on {on}{speed}.\n\n{found.estimate()}"


def evaluation(run: PublishedRun, entries: list[EvalResult]) -> str:
    """Makes a table of the results, which are also in the metadata; adds what the run changed, and its error."""
    described = [text for text in (_retention(run.results), _reconstruction(run.results)) if text]
    if not entries:
        return "\n\n".join(described) or "Not evaluated yet."
    lines = ["| data set | split | task | metric | % |", "|---|---|---|---|---|"]
    for entry in entries:
        split = entry.dataset_split or ""
        task = _task_of(entry)
        lines.append(
            f"| {entry.dataset_name} | {split} | {task} | {entry.metric_type} | {float(entry.metric_value):.1f} |"
        )
    return "\n\n".join(["\n".join(lines), *described])


def _task_of(entry: EvalResult) -> str:
    """Returns the task of a result.

    A saved model-index keeps one name for all tasks of a type, and each metric's own beside it: `linear-probe, top1`.
    """
    task = (entry.metric_name or "").removesuffix(f", {entry.metric_type}")
    return task if task and task != entry.metric_name else entry.task_name or entry.task_type


def _retention(results: JsonObject) -> str:
    """Makes a table of what the run changed in its own metric and in that of the retained data."""
    retention = results.get("retention")
    if retention is None:
        return ""
    names = {"own": "the run's own"}
    if retention["data"] is not None:
        names["retained"] = f"{short_name(retention['data'])}, retained"
    rows = [
        f"| {name} | {change['metric']} | {_percent(change['before'])} | {_percent(change['after'])} |"
        for which, name in names.items()
        if (change := retention[which]) is not None
    ]
    watched = "retained metric" if "retained" in names else "metric of the model that it began from"
    lost = f"The run lost more of the {watched} than it allowed itself." if retention["warned"] else ""
    table = ["| evaluation data | metric | before the run, % | after it, % |", "|---|---|---|---|", *rows]
    return "\n".join([*table, *(["", lost] if lost else [])]) if rows else ""


def _percent(share: float | None) -> str:
    return "not measured" if share is None else f"{100 * share:.1f}"


def _reconstruction(results: JsonObject) -> str:
    """Describes the error at the run's end, and baselines without learning."""
    if "reconstruction_error" not in results:
        return ""
    return (
        f"Error of the reconstructed patches on {results['images']:,.0f} images: "
        f"**{results['reconstruction_error']:.3f}** (mean square, on the scale of training). Baselines that are not "
        f"learned: each patch's own mean colour, which the model cannot see, {results['patch_mean_error']:.3f}; a copy "
        f"of the nearest visible patch, {results['nearest_patch_error']:.3f}."
    )


def limitations(run: PublishedRun) -> str:
    """Describes what the model must not be expected to do."""
    text = run.towers.text_config
    vision = run.towers.vision_config
    size = f"{vision.image_size} x {vision.image_size} pixels"
    lines = [
        "It knows what its captions say, in their language. Counting, small objects, fine differences and text in "
        "pictures are weak points of models of this kind.",
        "Scores compare the given labels; they are not probabilities that a label is right, and they depend on how "
        "labels are worded.",
        f"Images are resized to {size}, and texts are truncated to {text.max_position_embeddings} tokens.",
        "Pairs from the web carry the prejudices and errors of the web. It was tested neither for fairness nor for "
        "safety: do not use it to recognise or judge people, for surveillance, or where an error does harm.",
    ]
    if not run.contrasts:
        lines = [
            "Nothing was learned from texts, and the text tower of this class is untrained. Its features are meant for "
            "fine-tuning; as they are, they are weaker than a contrastive model's.",
            f"Images are resized to {size}. Reconstructions are blurred, and invented where no visible patch helps.",
            "It was tested neither for fairness nor for safety.",
        ]
    if run.samples and run.contrasts:
        seen = f"It has seen {run.samples:,} pairs"
        lines.append(f"{seen}; the longest runs of the FLIP paper saw {PAPER_SAMPLES} and more.")
    if run.contrasts and run.mask_ratios and run.mask_ratios[-1] > 0:
        lines.append("It was not tuned on whole images after masked training, which gained accuracy in the paper.")
    return "\n".join(f"- {line}" for line in lines)


def licence(run: PublishedRun, identifier: str | None) -> str:
    """States the licences of weights and code."""
    weights = f"Weights: `{identifier}`." if identifier else "No licence was given for the weights."
    if run.source and not identifier:
        weights += f" They are derived from {run.base_model or short_name(run.source)}, whose terms still apply."
    return f"{weights} The Python files beside them: {CODE_LICENCE}." if run.is_flip else weights

"""The plan as JSON and as Markdown, with everything that it assumes."""

from dataclasses import asdict

from flip_hf.console.json_types import JsonObject
from flip_hf.planning.cost import schedule
from flip_hf.planning.phases import plan_run
from flip_hf.planning.plan import (
    CONTEXT_BYTES,
    FRAGMENTS,
    PARTS,
    Choice,
    Cluster,
    MemoryModel,
    PlannedRun,
    choices,
)
from flip_hf.training.flops import sample_flops
from flip_hf.training.phases import Phase

# Samples seen in the paper's two schedules (FLIP, Table 3).
DATA_SETS = {"LAION-400M": 12.8e9, "LAION-2B": 25.6e9}
# FLIP, Fig. 1: CLIP ViT-L/16, whole images, 12.8 G samples, batch 16k; a TPU v3 chip of two cores does 123 TFLOP/s.
PAPER_DAYS = 2500
TPU_CORE_FLOPS = 61.5e12
PAPER = (
    "The paper's own figures: CLIP ViT-L/16 on whole images, 12.8 G samples: about 2,500 TPU-v3-core-days (10 days on "
    "256 cores); time at masks 50 % and 75 %: 0.50 and 0.33 of it (FLOPs 0.52 and 0.28); a saving of about 1,800 "
    "TPU-days."
)


def make_report(
    run: PlannedRun, cluster: Cluster, mask_ratios: list[float], phases: list[Phase], describe: JsonObject
) -> JsonObject:
    """Plans every mask ratio, and the run's own phases.

    Args:
        run: the training to plan.
        cluster: the hardware.
        mask_ratios: fractions of the patches dropped.
        phases: phases of the run.
        describe: entries for the head of the report.

    Returns:
        The report, JSON-serialisable; in bytes, seconds, FLOPs, dollars.

    Raises:
        ValueError: the batch cannot be divided, the mask keeps no patch, or the GPU lacks bfloat16.
    """
    memory = MemoryModel(run)
    masks = []
    for mask_ratio in mask_ratios:
        tried = list(choices(memory, cluster, mask_ratio))
        fitting = [choice for choice in tried if choice.fits]
        rows = [_choice_row(choice) for choice in tried]
        masks.append({"mask_ratio": mask_ratio, "memory": rows, **_fastest(memory, cluster, fitting, mask_ratio)})
    whole = sample_flops(run.config, 0.0, run.text_tokens, run.batch_size)
    paper_mfu = whole.training * DATA_SETS["LAION-400M"] / (PAPER_DAYS * 86_400 * TPU_CORE_FLOPS)
    own = plan_run(phases, memory, cluster)
    return {**describe, "masks": masks, "run": own, "paper_mfu_if_this_were_its_model": paper_mfu}


def _choice_row(choice: Choice) -> JsonObject:
    row = {"strategy": choice.strategy, "checkpointing": choice.checkpointing, "micro_batch_size": choice.micro}
    return {**row, "fits": choice.fits, "bytes": choice.parts, "total": choice.total}


def _fastest(memory: MemoryModel, cluster: Cluster, fitting: list[Choice], mask_ratio: float) -> JsonObject:
    """Returns time and cost of the choice that executes the fewest FLOPs; of equal ones, the simplest strategy."""
    if not fitting:
        return {"chosen": None}
    plans = [(choice, schedule(memory, cluster, choice, mask_ratio)) for choice in fitting]
    choice, best = min(plans, key=lambda pair: pair[1].executed)
    data = {
        name: {"days": best.days(samples), "dollars": best.days(samples) * 24 * cluster.gpus * cluster.dollars}
        for name, samples in DATA_SETS.items()
    }
    row = {k: v for k, v in _choice_row(choice).items() if k != "bytes"}
    return {"chosen": row, **asdict(best), "flops_per_sample": best.flops.training, "data_sets": data}


def _table(head: tuple[str, ...], rows: list[tuple]) -> list[str]:
    lines = [head, tuple("---" for _ in head), *rows]
    return ["| " + " | ".join(str(cell) for cell in line) + " |" for line in lines]


def _memory_table(mask: JsonObject) -> list[str]:
    rows = []
    for choice in mask["memory"]:
        cells = (f"{choice['bytes'][part] / 1e9:.1f}" for part in PARTS)
        verdict = f"{choice['total'] / 1e9:.1f}" + ("" if choice["fits"] else " (too much)")
        again = "yes" if choice["checkpointing"] else "no"
        rows.append((choice["strategy"], again, f"{choice['micro_batch_size']:,}", *cells, verdict))
    return _table(("strategy", "checkpointing", "micro-batch", *PARTS, "total"), rows)


def _time_table(report: JsonObject) -> list[str]:
    head = (
        *("mask", "chosen", "GFLOP a pair", "executed", "samples/s", "step, s", "MFU"),
        *("loader cores", "storage MB/s", "network GB a step", "GB/s"),
        *(f"{name} ({samples / 1e9:g} G): days, cost" for name, samples in DATA_SETS.items()),
    )
    rows = []
    for mask in report["masks"]:
        ratio = f"{mask['mask_ratio']:.0%}"
        chosen = mask["chosen"]
        if chosen is None:
            rows.append((ratio, "nothing fits", *("-" for _ in head[2:])))
            continue
        again = ", checkpointing" if chosen["checkpointing"] else ""
        rows.append(
            (
                *(ratio, f"{chosen['strategy']}, micro-batch {chosen['micro_batch_size']:,}{again}"),
                *(f"{mask['flops_per_sample'] / 1e9:.1f}", f"{mask['executed'] / 1e9:.1f}"),
                *(f"{mask['samples_per_second']:,.0f}", f"{mask['seconds']:.2f}", f"{mask['mfu']:.2f}"),
                *(f"{mask['loader_cores']:,}", f"{mask['storage_rate'] / 1e6:,.0f}"),
                *(f"{mask['network'] / 1e9:.1f}", f"{mask['network'] / 1e9 / mask['seconds']:.1f}"),
                *(f"{data['days']:,.1f}, ${data['dollars']:,.0f}" for data in mask["data_sets"].values()),
            )
        )
    return _table(head, rows)


def _run_table(planned: JsonObject) -> list[str]:
    """Tabulates the phases of the run itself, and their sum."""
    chosen = planned["chosen"]
    if chosen is None:
        return ["The run itself: nothing fits in all of its phases."]
    again = ", checkpointing" if chosen["checkpointing"] else ""
    how = f"{chosen['strategy']}, micro-batch {chosen['micro_batch_size']:,}{again}"
    head = ("phase", "samples", "pixels", "mask", "tokens", "GFLOP a pair", "samples/s", "loader cores", "days, cost")
    rows = [
        (
            *(row["phase"], f"{row['samples']:,.0f}", row["image_size"], f"{row['mask_ratio']:.0%}"),
            *(row["text_tokens"], f"{row['flops_per_sample'] / 1e9:.1f}", f"{row['samples_per_second']:,.0f}"),
            *(f"{row['loader_cores']:,}", f"{row['days']:,.2f}, ${row['dollars']:,.0f}"),
        )
        for row in planned["phases"]
    ]
    cost = f"{planned['days']:,.2f}, ${planned['dollars']:,.0f}"
    mean = planned["flops"] / planned["samples"] / 1e9
    rows.append(("all", f"{planned['samples']:,.0f}", "", "", "", f"{mean:.1f}", "", "", cost))
    return [f"The run itself, {how}:", "", *_table(head, rows)]


def _about_speed_ups(run: PlannedRun) -> list[str]:
    """Says what of the run's speed-ups is counted, a sentence or none."""
    counted = {
        "fused_qkv": "fused_qkv: the concatenated weights are traced.",
        "bf16_residual": "bf16_residual: hidden states in bfloat16 are traced.",
        "cuda_graphs": "cuda_graphs: the inputs are counted twice, as they are copied to where the recorded step reads "
        "them; what the graphs' own pool cannot share with the loss and with other shapes is not counted.",
        "fp8": "fp8: planned as bfloat16, and float8 copies are not counted.",
    }
    told = [counted[name] for name in run.speed_ups]
    return [" ".join([*told, "What torch.compile fuses or recomputes is not counted, and takes less."])] if told else []


def to_markdown(report: JsonObject, run: PlannedRun, cluster: Cluster) -> str:
    """Renders the report as a Markdown page."""
    lines = [f"# Plan of {report['recipe']}", "", report["model"], "", report["hardware"], ""]
    for mask in report["masks"]:
        title = "largest micro-batch that fits" if run.micro_batch_size is None else "the recipe's micro-batch"
        lines += [f"Memory of one GPU in GB, mask {mask['mask_ratio']:.0%}, {title}:", "", *_memory_table(mask), ""]
    lines += [*_run_table(report["run"]), ""]
    lines += ["Time, data and cost of the choice that computes least:", "", *_time_table(report), "", PAPER, ""]
    if report["is_paper_model"]:
        lines += [f"By this count of FLOPs, that was an MFU of {report['paper_mfu_if_this_were_its_model']:.2f}.", ""]
    ratios = (f" at {ratio:.0%} masked" if len(cluster.mfu) > 1 else "" for ratio in cluster.mfu)
    rates = ", ".join(f"{mfu:.2f}{ratio}" for mfu, ratio in zip(cluster.mfu.values(), ratios, strict=True))
    assumed = (
        f"Operations are executed at {rates} of the GPU's peak ({report['mfu_source']}). What is computed twice takes "
        "time at this rate, but does not count in the table's MFU.",
        f"A loader core prepares {cluster.samples_per_core:,.0f} pairs a second ({report['loader_source']}).",
        f"A pair takes {cluster.sample_bytes / 1e3:g} kB in storage (LAION-400M as published: 10 TB at 256 pixels).",
        f"A GPU-hour costs ${cluster.dollars:g}. Storage, network and processors cost nothing here.",
        "All weights are trained: --freeze and --lora take less time and memory.",
        f"Texts take {run.text_tokens} tokens each, the whole context; training packs short ones and takes less.",
        f"`other`: {CONTEXT_BYTES / 1e9:g} GB for context and libraries, {FRAGMENTS:.0%} of activations for fragments.",
        "`inputs`: the prepared patches of one micro-batch, float32, where the peak still holds them. `buffers`: "
        "what the strategy communicates with. DDP: float32 weights and moments, bfloat16 by autocast. FSDP2: blocks "
        "sharded, resharded after forward. ZeRO-2: bfloat16 weights, DeepSpeed's default buckets.",
        *_about_speed_ups(run),
        "Weights, inputs, activations and loss are traced on the real step; what sharded strategies keep follows "
        "their authors' formulas. Network volumes are those of ring algorithms; evaluation, checkpoints and "
        "failures take no time.",
        "The run itself has one strategy and micro-batch for all phases, the largest that fits in each; smaller images "
        "run at the rate of a mask that leaves as many patches. The other tables are of one mask all the time.",
    )
    return "\n".join([*lines, "Assumed:", "", *(f"- {line}" for line in assumed)]) + "\n"

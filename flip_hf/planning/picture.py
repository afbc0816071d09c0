"""The plan as a picture."""

from pathlib import Path

from matplotlib.figure import Figure

from flip_hf.console.json_types import JsonObject


def draw_plan(report: JsonObject, path: Path) -> None:
    """Draws days on either data set, and the chosen step's memory, over mask ratios."""
    figure = Figure(figsize=(8, 3.4), layout="constrained")
    days, memory = figure.subplots(1, 2)
    masks = [mask for mask in report["masks"] if mask["chosen"]]
    names = [f"{mask['mask_ratio']:.0%}" for mask in masks]
    for name in masks[0]["data_sets"] if masks else ():
        days.plot(names, [mask["data_sets"][name]["days"] for mask in masks], marker="o", label=name)
    memory.bar(names, [mask["chosen"]["total"] / 1e9 for mask in masks], color="0.6")
    for panel, label in ((days, "days (fewer are better)"), (memory, "memory of one GPU, GB (less is better)")):
        panel.set(xlabel="mask ratio", ylabel=label, ylim=(0, None))
    if masks:
        figure.legend(*days.get_legend_handles_labels(), loc="outside lower center", ncols=2, fontsize=8, frameon=False)
    figure.savefig(path, dpi=120)

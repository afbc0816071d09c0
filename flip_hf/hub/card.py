"""Writes the model card: a template filled from the run, with a model-index of the measured results."""

import json
import re
from importlib import resources
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from flip_hf.console.names import is_hub_id, short_name
from flip_hf.conversion.folder import card_data
from flip_hf.evaluation.model_index import read_eval_results
from flip_hf.hub import facts
from flip_hf.hub.carbon import GRID_SOURCE, Compute
from flip_hf.hub.run import PublishedRun
from flip_hf.redaction import redact

CARD = "README.md"
MODELS = ("FlipModel", "FlipForPreTraining", "CLIPModel")
MARK = "<!-- Written by flip_hf from the files of the run. To keep what you write here, remove this line. -->"
# Characters that the Hub does not allow in the id of a data set.
_NOT_IN_ID = re.compile(r"[^\w.-]+")


def write_card(folder: str | Path, *, repo_id: str | None = None, license: str | None = None) -> None:
    """Writes the card of a model folder from its config, recipe, results and evaluation.

    A card written by a person or a conversion is left unchanged. When an earlier card is rewritten, metadata that the
    run does not determine, and results of other evaluations, are kept.

    Args:
        folder: a folder with one of `MODELS`.
        repo_id: the repository named in the examples; by default the folder's own path.
        license: identifier of the weights' licence; by default that of the existing card, or of the model that the run
            began from.

    Raises:
        ValueError: there is neither a card nor one of these models.
    """
    folder = Path(folder)
    old = _read(folder / CARD)
    if old is not None and not _is_ours(old):
        return
    run = PublishedRun.read(folder)
    kind = (run.config.architectures or ["model of unknown class"])[0]
    if kind not in MODELS:
        raise ValueError(f"A card can be made for {', '.join(MODELS)}, not for a {kind}. Write {folder / CARD}.")
    data = _metadata(run, old.data if old is not None else None, repo_id, license)
    name = repo_id or folder.resolve().name
    card = ModelCard.from_template(
        data,
        template_str=(resources.files("flip_hf.hub") / "template.md").read_text(encoding="utf-8"),
        mark=MARK,
        name=name.split("/")[-1],
        model=repo_id or folder.as_posix(),
        reconstructs=run.reconstructs,
        trust=", trust_remote_code=True" if run.is_flip else "",
        about=facts.about(run),
        architecture=facts.architecture(run),
        data=facts.data(run),
        training=facts.training(run),
        curves="training_curves.png" if (folder / "training_curves.png").is_file() else None,
        compute=facts.compute(run),
        evaluation=facts.evaluation(run, data.eval_results or []),
        limitations=facts.limitations(run),
        licence=facts.licence(run, data.license),
    )
    (folder / CARD).write_text(redact(str(card)), encoding="utf-8")


def forget_text(folder: Path) -> None:
    """Strips a folder's card to its metadata, so that its text is rewritten."""
    old = _read(folder / CARD)
    if old is not None:
        ModelCard(f"---\n{old.data.to_yaml()}\n---\n\n{MARK}\n").save(folder / CARD)


def _read(path: Path) -> Any:
    return ModelCard.load(path, ignore_metadata_errors=True) if path.is_file() else None


def _is_ours(card: ModelCard) -> bool:
    """Returns whether a card's text may be rewritten: it is this module's, or only a title (evaluate.py --card)."""
    return MARK in card.text or all(line.startswith("#") for line in card.text.strip().splitlines())


def _metadata(run: PublishedRun, old: Any, repo_id: str | None, license: str | None) -> ModelCardData:
    """Makes the metadata for the Hub: the old card's, updated with the run's own."""
    made: Any = card_data(
        run.base_model,
        datasets=run.hub_data or None,
        license=license or (old and old.license) or _inherited_license(run),
        model_name=(repo_id or run.folder.resolve().name).split("/")[-1],
        eval_results=_eval_results(run, old) or None,
    )
    if run.reconstructs:
        made.pipeline_tag = "image-feature-extraction"
        made.tags = [*made.tags, "mae"]
    found = Compute.from_results(run.results)
    if found is not None and found.kilograms is not None:
        made.co2_eq_emissions = {
            "emissions": round(1000 * found.kilograms, 3),  # grams
            "source": f"estimated from the power in the data sheet and {GRID_SOURCE}",
            "training_type": "fine-tuning" if run.source else "pre-training",
            "hardware_used": f"{found.processes} x {found.device}",
        }
    if old is not None:
        made.tags = list(dict.fromkeys([*made.tags, *(old.tags or [])]))
        for key, value in vars(old).items():
            if getattr(made, key, None) is None:
                setattr(made, key, value)
    return made


def _inherited_license(run: PublishedRun) -> str | None:
    """Returns the licence of the folder that the run began from."""
    source = _read(Path(run.source) / CARD) if run.source else None
    return source.data.license if source is not None else None


# ---------------------------------------------------------------------------------------------------------------------
# Measured results
# ---------------------------------------------------------------------------------------------------------------------


def _eval_results(run: PublishedRun, old: Any) -> list[EvalResult]:
    """Returns results of the old card, of `flip-hf evaluate` and of the run's end; later ones replace earlier ones."""
    entries = [*((old and old.eval_results) or []), *_evaluated(run.folder), *_measured_in_training(run)]
    return list({(entry.dataset_name, entry.metric_name): entry for entry in entries}.values())


def _evaluated(folder: Path) -> list[EvalResult]:
    path = folder / "evaluation" / "results.json"
    if not path.is_file():
        return []
    return read_eval_results(json.loads(path.read_text(encoding="utf-8")))


def _measured_in_training(run: PublishedRun) -> list[EvalResult]:
    """Returns zero-shot accuracy, and retrieval of held-out pairs, at the run's end."""
    return [*_zero_shot(run), *_retrieval(run)]


def _retrieval(run: PublishedRun) -> list[EvalResult]:
    """Returns recalls on the held-out pairs; the name of the data set says so, with the number of images."""
    name = run.recipe.get("eval_data") if not run.recipe.get("holdout") else None
    name = name or (run.recipe.get("train_data") or ["unknown"])[0]
    short = short_name(name)
    recalls = [metric for metric in run.results if "_retrieval_recall@" in metric]
    return [
        EvalResult(
            task_type="image-text-retrieval",
            task_name="retrieval",
            dataset_type=name if is_hub_id(name) else _NOT_IN_ID.sub("-", short).strip("-"),
            dataset_name=f"{short}, held-out pairs ({run.results['pairs']:,.0f} images)",
            metric_type=metric,
            metric_name=f"retrieval, {metric}",
            metric_value=round(100 * run.results[metric], 2),
        )
        for metric in recalls
    ]


def _zero_shot(run: PublishedRun) -> list[EvalResult]:
    if "top1" not in run.results:
        return []
    name = run.recipe.get("eval_data") or (run.recipe.get("train_data") or ["unknown"])[0]
    short = short_name(name)
    return [
        EvalResult(
            task_type="zero-shot-image-classification",
            task_name="zero-shot",
            dataset_type=name if is_hub_id(name) else _NOT_IN_ID.sub("-", short).strip("-"),
            dataset_name=short,
            dataset_split=run.recipe.get("eval_split"),
            metric_type=metric,
            metric_name=f"zero-shot, {metric}",
            metric_value=round(100 * run.results[metric], 2),
        )
        for metric in ("top1", "top5")
        if metric in run.results
    ]

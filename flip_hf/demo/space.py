"""Writes the folder of a Space on the Hub: the page, the subpackages that it needs, and the model."""

import shutil
from pathlib import Path
from typing import Any

import gradio
from huggingface_hub import ModelCard, SpaceCard, SpaceCardData

from flip_hf.data.files import StoredFile
from flip_hf.demo.model import DemoModel
from flip_hf.demo.search import pictures_below
from flip_hf.redaction import redact

CODE_LICENCE = "apache-2.0"
PACKAGE = Path(__file__).parents[1]
# The page's own subpackage and those that it may use, and the modules beside them that these import.
ROOMS = ("console", "data", "demo", "evaluation", "modeling")
MODULES = ("__init__.py", "auto_classes.py", "redaction.py", "registration.py")
# Those in pyproject.toml, with `demo`; the Space installs Gradio in the version of its card.
REQUIREMENTS = (
    "accelerate>=1.10",
    "huggingface_hub>=1.5",
    "matplotlib>=3.8",
    "pillow>=10",
    "safetensors>=0.5",
    "torch>=2.11",
    "transformers>=5.17",
)
APP = '''\
"""The page, as `flip-hf demo` serves it."""

from pathlib import Path

from flip_hf.data.files import StoredFile
from flip_hf.demo.model import DemoModel
from flip_hf.demo.page import make_page, serve
from flip_hf.demo.search import {pictures}

HERE = Path(__file__).parent

serve(make_page(DemoModel.from_pretrained({model}, title={title!r}), {pictures}({folder})))
'''


def write_space(folder: Path, name_or_path: str, *, images: str | None = None, license: str | None = None) -> None:
    """Writes a Space: its card, `app.py`, requirements, this package's files, and a local model.

    Args:
        folder: an empty folder.
        name_or_path: a model folder, which is copied, or a Hub id, which is referenced.
        images: folder of the pictures to search, which are copied; the embedded ones if None.
        license: identifier of the licence, for the card; by default that of a copied model's card, or of the code.

    Raises:
        OSError, ValueError: the model cannot be loaded, or the folder has no pictures; see
            [`DemoModel.from_pretrained`] and [`pictures_below`].
    """
    pictures = [] if images is None else [picture.value for picture in pictures_below(images)]
    copied = Path(name_or_path).is_dir()
    model = DemoModel.from_pretrained(name_or_path)
    card = Path(name_or_path) / "README.md"
    if copied:
        model.save_pretrained(folder / "model")
        if card.is_file():
            _check_no_link(card, Path(name_or_path))
            (folder / "model" / card.name).write_text(redact(card.read_text(encoding="utf-8")), encoding="utf-8")
    for picture in pictures:
        assert isinstance(picture, StoredFile)
        path = Path(picture.path)
        target = folder / "images" / path.relative_to(images or "")
        target.parent.mkdir(parents=True, exist_ok=True)
        _check_no_link(path, Path(images or ""))
        shutil.copyfile(path, target)
    (folder / "app.py").write_text(
        APP.format(
            pictures="embedded_pictures" if images is None else "pictures_below",
            folder="" if images is None else 'HERE / "images"',
            model='HERE / "model"' if copied else repr(name_or_path),
            title=model.title,
        ),
        encoding="utf-8",
    )
    (folder / "requirements.txt").write_text("\n".join(REQUIREMENTS) + "\n", encoding="utf-8")
    _copy_package(folder / PACKAGE.name)
    if license is None and card.is_file():
        of_model: Any = ModelCard.load(card, ignore_metadata_errors=True).data
        license = of_model.license
    _card(model.title, None if copied else name_or_path, license or CODE_LICENCE).save(folder / "README.md")


def _check_no_link(path: Path, root: Path) -> None:
    """Checks that no part of a path below `root` is a link, whose target a Space would publish.

    Raises:
        ValueError: a part of it is a link.
    """
    links = [each for each in (path, *path.parents) if each != root and root in each.parents and each.is_symlink()]
    if links:
        raise ValueError(f"{links[0]} is a link, whose target would be published: put a copy in its place.")


def _copy_package(target: Path) -> None:
    target.mkdir()
    for path in (*(PACKAGE / name for name in MODULES), PACKAGE.parent / "LICENSE"):
        if path.is_file():
            shutil.copyfile(path, target / path.name)
    for room in ROOMS:
        shutil.copytree(PACKAGE / room, target / room, ignore=shutil.ignore_patterns("__pycache__"))


def _card(title: str, hub_id: str | None, license: str) -> SpaceCard:
    data = SpaceCardData(
        title=f"Try {title}",
        emoji="🔎",
        colorFrom="indigo",
        colorTo="gray",
        sdk="gradio",
        sdk_version=gradio.__version__,
        app_file="app.py",
        license=license,
        models=None if hub_id is None else [hub_id],
    )
    where = "in `model/`" if hub_id is None else f"[{hub_id}](https://huggingface.co/{hub_id})"
    return SpaceCard(
        f"---\n{data.to_yaml()}\n---\n\n# {data.title}\n\nLabels for an image, images for a text, and how the "
        f"answers change when the model sees a part of the image. The model is {where}, under its own licence. The "
        "code in `flip_hf/` is part of the package flip_hf, Apache-2.0.\n\nLocally: `pip install gradio -r "
        "requirements.txt`, then `python app.py`.\n"
    )

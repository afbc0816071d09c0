"""The folder that a document's blocks run in, with small stand-ins under the very names that the text uses."""

import itertools
import json
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import ViTImageProcessor, ViTMAEConfig, ViTMAEForPreTraining

from flip_hf import FlipForPreTraining, FlipPreTrainingConfig
from flip_hf.conversion.clip import convert_from_clip
from flip_hf.conversion.open_clip import convert_from_open_clip
from flip_hf.conversion.siglip import convert_from_siglip
from flip_hf.data.files import expand_braces
from flip_hf.data.shapes import CLASS_NAMES, generate_test
from flip_hf.data.tokenization import train_wordpiece
from flip_hf.hub.folder import prepare
from tests.helpers.clip_folder import make_clip_folder
from tests.helpers.labelled import labelled_pictures
from tests.helpers.models import tiny_config
from tests.helpers.pairs import shapes_rows, write_tar
from tests.helpers.pretraining import TINY
from tests.helpers.programs import ROOT
from tests.helpers.siglip_folder import make_siglip_folder

FIXTURES = ROOT / "tests" / "fixtures"
VISION: dict[str, Any] = json.loads(
    TINY[TINY.index("--vision_config") + 1]
)  # of what is trained here, and of what it starts from
SQUARE = {"height": 32, "width": 32}
LABELS = sorted(CLASS_NAMES[:4])  # of the small data sets; of others the first four


class Workspace:
    """A folder with copies of `scripts` and `model_cards`, filled on demand.

    Args:
        folder: an empty one.
        trained: a folder as training leaves it, which is only read.
    """

    def __init__(self, folder: Path, trained: Path):
        self.folder = folder
        self.trained = trained
        for name in ("scripts", "model_cards"):
            shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))

    def provide(self, names: Iterable[str]) -> None:
        """Makes the stand-ins of those names that have one, and of which no earlier block has made the thing itself."""
        for name in names:
            for path in (Path(name), *Path(name).parents):
                make = next((make for pattern, make in STAND_INS.items() if _fits(path, pattern)), None)
                if make is not None and not (self.folder / path).exists():
                    (self.folder / path).parent.mkdir(parents=True, exist_ok=True)
                    make(self, self.folder / path)


def _fits(path: Path, pattern: str) -> bool:
    """Tells whether a whole path fits; a pattern without `/` is one of the last part."""
    return path.match(pattern) and ("/" not in pattern or len(path.parts) == pattern.count("/") + 1)


def trained_run(workspace: Workspace, folder: Path) -> None:
    shutil.copytree(workspace.trained, folder)


def published(workspace: Workspace, folder: Path) -> None:
    """As `scripts/push_to_hub.py` publishes a run: with the code that loads it without this package."""
    prepare(workspace.trained, folder, repo_id=f"{folder.parent.name}/{folder.name}")


def clip(workspace: Workspace, folder: Path) -> None:
    make_clip_folder(folder)


def flip_of_clip(workspace: Workspace, folder: Path) -> None:
    """A FLIP that a CLIP was made into, and that can be one again."""
    workspace.provide(["openai/clip-vit-base-patch16"])
    convert_from_clip(str(workspace.folder / "openai" / "clip-vit-base-patch16")).save(folder)


def siglip(workspace: Workspace, folder: Path) -> None:
    make_siglip_folder(folder)


def flip_of_siglip(workspace: Workspace, folder: Path) -> None:
    """A FLIP that a SigLIP was made into, and that can be one again."""
    workspace.provide(["google/siglip2-base-patch16-224"])
    convert_from_siglip(str(workspace.folder / "google" / "siglip2-base-patch16-224")).save(folder)


def open_clip(workspace: Workspace, folder: Path) -> None:
    """As open_clip's models lie on the Hub."""
    folder.mkdir()
    with safe_open(FIXTURES / "open_clip_tiny.safetensors", "pt") as file:
        names = [name for name in file.keys() if name.startswith("model/")]
        weights = {name.removeprefix("model/"): file.get_tensor(name) for name in names}
        config = {"model_cfg": json.loads(file.metadata()["model_cfg"])}
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    save_file(weights, folder / "open_clip_model.safetensors")


def flip_of_open_clip(workspace: Workspace, folder: Path) -> None:
    workspace.provide(["laion/CLIP-tiny"])
    convert_from_open_clip(str(workspace.folder / "laion" / "CLIP-tiny")).save(folder)


def official(workspace: Workspace, file: Path) -> None:
    shutil.copyfile(FIXTURES / "official_flip_tiny.zip", file)


def vit_mae(workspace: Workspace, folder: Path) -> None:
    decoder: dict[str, Any] = {
        "decoder_hidden_size": 16,
        "decoder_num_hidden_layers": 1,
        "decoder_num_attention_heads": 2,
    }
    ViTMAEForPreTraining(ViTMAEConfig(**VISION, **decoder)).save_pretrained(folder)
    ViTImageProcessor(size=SQUARE).save_pretrained(folder)


def pretraining(workspace: Workspace, folder: Path) -> None:
    """A run of MAE."""
    decoder = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = FlipPreTrainingConfig(
        flip_config=tiny_config(vision=VISION), decoder_config=decoder, objective="reconstruction"
    )
    FlipForPreTraining(config).save_pretrained(folder)
    ViTImageProcessor(size=SQUARE).save_pretrained(folder)


def tokenizer(workspace: Workspace, folder: Path) -> None:
    """BERT's place, with a vocabulary of the embedded captions."""
    made = train_wordpiece((row["caption"] for row in shapes_rows(200)), vocab_size=400, context_length=16)
    made.save_pretrained(folder)
    pieces = sorted(made.get_vocab().items(), key=lambda item: item[1])
    (folder / "vocab.txt").write_text("".join(f"{piece}\n" for piece, _ in pieces), encoding="utf-8")


def picture(workspace: Workspace, file: Path) -> None:
    row = next(iter(generate_test([0], 1, image_size=64, seed=0)))
    file.write_bytes(row["image"]["bytes"])


def class_names(workspace: Workspace, file: Path) -> None:
    file.write_text("".join(f"{name}\n" for name in LABELS))


def shards(workspace: Workspace, pattern: Path) -> None:
    """All files of a pattern such as `{000..146}.tar`, as links to one."""
    rows = enumerate(shapes_rows(16))
    first, *others = map(Path, expand_braces(str(pattern)))
    write_tar(first, [(f"{i:05d}", row["image"]["bytes"], row["caption"].encode()) for i, row in rows])
    for other in others:
        if not other.exists():
            other.symlink_to(first)


def shard_folder(workspace: Workspace, folder: Path) -> None:
    folder.mkdir()
    shards(workspace, folder / "{00000..00003}.tar")


def small_pictures(count: int) -> Iterator[tuple[int, Image.Image]]:
    """Labels and images; each class has a colour of its own, under noise."""
    rng = np.random.default_rng(0)
    for number in range(count):
        label = number % len(LABELS)
        pixels = rng.integers(0, 60, (32, 32, 3)) + [60 * label, 190 - 60 * label, 100]
        yield label, Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def class_folders(workspace: Workspace, folder: Path) -> None:
    """Images in a folder of each split and class."""
    for split, label in itertools.product(("train", "test"), LABELS):
        (folder / split / label).mkdir(parents=True)
    for number, (label, image) in enumerate(small_pictures(40)):
        for split in ("train", "test"):
            image.save(folder / split / LABELS[label] / f"{number}.png")


def labelled_parquet(workspace: Workspace, file: Path) -> None:
    labelled_pictures(40).to_parquet(str(file))


def copies(workspace: Workspace, folder: Path) -> None:
    """Local copies of a few known data sets; of the others it is said that they are not there."""
    for name in ("cifar10", "imagenet", "imagenet_r", "flickr30k", "mscoco"):
        for split in ("train", "validation" if name == "imagenet" else "test"):
            (folder / name / split).mkdir(parents=True)
            with (folder / name / split / "metadata.jsonl").open("w") as metadata:
                for number, (label, image) in enumerate(small_pictures(40)):
                    image.save(folder / name / split / f"{number}.png")
                    row = {"file_name": f"{number}.png", "label": label, "caption": LABELS[label]}
                    metadata.write(json.dumps(row) + "\n")


# Whatever a document calls by a name that fits; the first pattern that does.
STAND_INS: dict[str, Callable[[Workspace, Path], None]] = {
    "openai/clip-*": clip,
    "google/siglip*": siglip,
    "laion/CLIP-*": open_clip,
    "facebook/vit-mae-*": vit_mae,
    "google-bert/bert-*": tokenizer,
    "*.zip": official,
    "you/*": published,
    "runs/mae*": pretraining,
    "runs/tuned": flip_of_clip,
    "runs/siglip": flip_of_siglip,
    "runs/*": trained_run,
    "models/mae*": pretraining,
    "models/flip-b16": flip_of_open_clip,
    "models/flip-siglip": flip_of_siglip,
    "models/flip*": flip_of_clip,
    "*.jpg": picture,
    "*.png": picture,
    "classes.txt": class_names,
    "my/images": class_folders,
    "my/everyday": class_folders,
    "copies": copies,
    "*.tar": shards,
    "*.parquet": labelled_parquet,
    "...": shard_folder,
}

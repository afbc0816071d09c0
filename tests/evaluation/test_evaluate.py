"""evaluate.py on real tiny models, against what plain Transformers say of every sample."""

import io
import json
import tarfile
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard
from PIL import Image
from transformers import AutoProcessor, CLIPModel, SiglipConfig, SiglipModel

from flip_hf.evaluation.encoder import Encoder
from flip_hf.evaluation.registry import data_set
from flip_hf.evaluation.scoring import map_11_points
from tests.helpers.clip_folder import make_clip_folder
from tests.helpers.evaluating import evaluated
from tests.helpers.labelled import labelled_pictures
from tests.helpers.models import NUM_PATCHES
from tests.helpers.pretraining import pretrain
from tests.helpers.programs import ROOT, run_program

CLASSES = ("red circle", "blue square", "green star")
WORDS = "a of on the large small red blue green circle square star triangle below above striped dotted".split()
TEMPLATES = ("a photo of a {}.", "this is a {}.")


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "clip"
    torch.manual_seed(0)
    make_clip_folder(folder)
    return folder


@pytest.fixture(scope="module")
def labelled(tmp_path_factory):
    """Forty noisy images of three classes with one, two or three captions each, and their names."""
    folder = tmp_path_factory.mktemp("labelled")
    rng = np.random.default_rng(0)
    (folder / "images" / "test").mkdir(parents=True)
    rows = []
    for number in range(40):
        pixels = rng.integers(0, 256, (40 + number % 7, 48, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "images" / "test" / f"{number:02d}.png")
        texts = [" ".join(rng.choice(WORDS, 6)) for _ in range(1 + number % 3)]
        rows.append({"file_name": f"{number:02d}.png", "label": int(rng.integers(3)), "captions": texts})
    lines = [json.dumps(row) + "\n" for row in rows]
    (folder / "images" / "test" / "metadata.jsonl").write_text("".join(lines))
    (folder / "classes.txt").write_text("\n".join(CLASSES))
    return folder, rows


def evaluated_by_two(out, *argv) -> dict:
    """The report of the script, run by two processes."""
    done = run_program(ROOT / "scripts" / "evaluate.py", *argv, "--output_dir", out, processes=2)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads((out / "results.json").read_text())


class Plain:
    """The same model by Transformers alone, one sample at a time."""

    def __init__(self, folder, data):
        self.model = CLIPModel.from_pretrained(folder).eval()
        self.processor = AutoProcessor.from_pretrained(folder)
        self.data = data

    def image(self, number: int) -> torch.Tensor:
        return self.embedded(Image.open(self.data / "images" / "test" / f"{number:02d}.png"))

    @torch.no_grad()
    def embedded(self, image: Image.Image) -> torch.Tensor:
        pixel_values = self.processor.image_processor(image, return_tensors="pt")["pixel_values"]
        embeds = self.model.get_image_features(pixel_values=pixel_values).pooler_output[0]
        return embeds / embeds.norm()

    @torch.no_grad()
    def text(self, text: str) -> torch.Tensor:
        inputs = self.processor.tokenizer([text], truncation=True, return_tensors="pt")
        embeds = self.model.get_text_features(**inputs).pooler_output[0]
        return embeds / embeds.norm()

    def scores(self, number: int) -> list[float]:
        image = self.image(number)
        means = [sum(self.text(template.format(name)) for template in TEMPLATES) for name in CLASSES]
        return [float(image @ (mean / mean.norm())) for mean in means]


def test_zero_shot_of_a_clip_equals_plain_transformers_on_one_process_and_two(clip, labelled, tmp_path):
    data, rows = labelled
    argv = [clip, "--data", data / "images", "--class_names", data / "classes.txt", "--templates", *TEMPLATES]
    one = evaluated(tmp_path / "one", *argv, "--batch_size", "7")
    plain = Plain(clip, data)
    hits = [int(np.argmax(plain.scores(number))) == row["label"] for number, row in enumerate(rows)]
    (result,) = one["results"]
    assert result["metrics"]["top1"] == sum(hits) / 40 and result["metrics"]["top5"] == 1.0
    by_class = [[hit for hit, row in zip(hits, rows, strict=True) if row["label"] == label] for label in range(3)]
    assert result["metrics"]["mean_per_class"] == pytest.approx(np.mean([np.mean(each) for each in by_class]))
    assert result["samples"] == 40 and result["refused"] == {} and one["skipped"] == {}
    two = evaluated_by_two(tmp_path / "two", *argv, "--batch_size", "7")
    assert two["results"] == one["results"]
    table = (tmp_path / "one" / "results.md").read_text()
    assert f"| zero-shot | top1 | {100 * result['metrics']['top1']:.1f} | " in table
    for name in ("zero_shot.png", "confusion_images.png"):
        with Image.open(tmp_path / "one" / name) as picture:
            assert min(picture.size) > 200


def test_retrieval_counts_any_caption_of_an_image_and_two_processes_agree(clip, labelled, tmp_path):
    data, rows = labelled
    argv = [clip, "--tasks", "retrieval", "--data", data / "images", "--caption_column", "captions", "--batch_size", 9]
    one = evaluated(tmp_path / "one", *argv)
    plain = Plain(clip, data)
    images = [plain.image(number) for number in range(40)]
    texts = [(number, plain.text(text)) for number, row in enumerate(rows) for text in row["captions"]]
    expected = {}
    for k in (1, 5, 10):
        found = 0
        for number, image in enumerate(images):
            best = sorted(texts, key=lambda text: -float(image @ text[1]))[:k]
            found += number in [owner for owner, _ in best]
        expected[f"text_retrieval_recall@{k}"] = found / 40
        found = 0
        for owner, text in texts:
            best = sorted(range(40), key=lambda number: -float(images[number] @ text))[:k]
            found += owner in best
        expected[f"image_retrieval_recall@{k}"] = found / len(texts)
    (result,) = one["results"]
    assert {name: result["metrics"][name] for name in expected} == pytest.approx(expected)
    assert 0 < result["metrics"]["image_retrieval_recall@10"] < 1 and result["details"]["captions"] == len(texts)
    assert evaluated_by_two(tmp_path / "two", *argv)["results"] == one["results"]
    assert (tmp_path / "one" / "retrieval_images_of_texts_images.png").exists()


def test_retrieval_by_class_ranks_all_images_for_the_prompts_of_each_class(clip, labelled, tmp_path):
    data, rows = labelled
    argv = [clip, "--tasks", "class-retrieval", "--data", data / "images", "--class_names", data / "classes.txt"]
    report = evaluated(tmp_path / "one", *argv, "--templates", *TEMPLATES)
    plain = Plain(clip, data)
    scores = np.array([plain.scores(number) for number in range(40)])
    precisions = []
    for label in range(3):
        hits = np.array([rows[image]["label"] == label for image in np.argsort(-scores[:, label])])
        precisions.append((hits.cumsum() / np.arange(1, 41))[hits].mean())
    (result,) = report["results"]
    assert result["metrics"]["mean_average_precision"] == pytest.approx(np.mean(precisions))
    assert 0 < result["metrics"]["precision@10"] < 1 and result["samples"] == 40
    assert (tmp_path / "one" / "retrieval_images_of_classes_images.png").exists()


def test_masked_views_and_their_ensemble_are_measured_and_go_into_the_card(saved, labelled, tmp_path):
    data, _ = labelled
    argv = [saved, "--tasks", "zero-shot", "masked", "--data", data / "images", "--class_names", data / "classes.txt"]
    report = evaluated(tmp_path / "one", *argv, "--mask_ratio", "0.7", "--card")
    whole, views = report["results"]
    assert (
        views["metrics"]["whole, top1"] == whole["metrics"]["top1"] and views["details"]["views"] == 4
    )  # of 4 patches each
    assert set(views["metrics"]) >= {"one view, top1", "ensemble, top1"} and views["metric"] == "ensemble, top1"
    (entry, *_) = ModelCard.load(saved / "README.md").data.eval_results
    assert entry.metric_type == "top1" and entry.metric_value == round(100 * whole["metrics"]["top1"], 2)
    before = len(ModelCard.load(saved / "README.md").data.eval_results)
    evaluated(tmp_path / "again", *argv, "--mask_ratio", "0.7", "--card")
    assert len(ModelCard.load(saved / "README.md").data.eval_results) == before  # replaced, not added


def test_complementary_views_share_an_image_out_and_depend_on_its_place_alone():
    from flip_hf.evaluation.encoder import complementary_masks

    places = [(0, 3), (1, 0), (1, 1)]
    masks = complementary_masks(places, NUM_PATCHES, 0.75, seed=0)
    assert masks.shape == (4, 3, NUM_PATCHES // 4)
    assert (masks.transpose(0, 1).flatten(1).sort(dim=1).values == torch.arange(NUM_PATCHES)).all()
    assert torch.equal(complementary_masks(places[1:], NUM_PATCHES, 0.75, seed=0), masks[:, 1:])
    assert not torch.equal(masks[:, 0], masks[:, 1])
    with pytest.raises(ValueError, match="not a masked view"):
        complementary_masks(places, NUM_PATCHES, 0, seed=0)
    with pytest.raises(ValueError, match=f"keeps none of the {NUM_PATCHES} patches"):
        complementary_masks(places, NUM_PATCHES, 0.99, seed=0)


def test_a_local_copy_of_a_known_data_set_is_measured_by_its_own_metric(clip, tmp_path):
    """VOC 2007: tar shards, several classes an image, 11-point mAP; one image is none."""
    rng = np.random.default_rng(0)
    folder = tmp_path / "copies" / "voc2007" / "test"
    folder.mkdir(parents=True)
    labels = rng.integers(-1, 2, (12, 20))
    images = []
    with tarfile.open(folder / "0.tar", "w") as archive:
        for number in range(12):
            image = io.BytesIO()
            classes = io.BytesIO()
            images.append(Image.fromarray(rng.integers(0, 256, (40, 40, 3), dtype=np.uint8)))
            images[-1].save(image, "PNG")
            np.save(classes, labels[number].astype(np.float32))
            for extension, data in (("png", image.getvalue() if number else b"no image"), ("npy", classes.getvalue())):
                member = tarfile.TarInfo(f"{number:02d}.{extension}")
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))
    report = evaluated(tmp_path / "out", clip, "--datasets", "voc2007", "--data_dir", tmp_path / "copies")
    (result,) = report["results"]
    assert result["refused"] == {"not an image": 1} and result["samples"] == 11 and result["metric"] == "map_11_points"

    plain = Plain(clip, None)
    described = data_set("voc2007")
    weights = torch.stack([plain.text(described.templates[0].format(name)) for name in described.class_names])
    scores = torch.stack([weights @ plain.embedded(image) for image in images[1:]]).numpy()
    assert result["metrics"] == {"map_11_points": pytest.approx(map_11_points(scores, labels[1:]))}


def test_siglip_reads_texts_padded_to_its_context(tokenizer, processor):
    size = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = SiglipConfig(
        text_config={**size, "vocab_size": 600, "max_position_embeddings": 16, "projection_size": 32},
        vision_config={**size, "image_size": 32, "patch_size": 8},
    )
    encoder = Encoder(SiglipModel(config).eval(), processor)
    texts = ["a red circle", "a large blue square above a star"]
    inputs = tokenizer(texts, padding="max_length", max_length=16, return_tensors="pt")
    with torch.no_grad():
        expected = encoder.model.get_text_features(**inputs).pooler_output
    assert torch.allclose(encoder.texts(texts), torch.nn.functional.normalize(expected), atol=1e-6)
    pixels = torch.randn(2, 3, 32, 32)
    assert encoder.trunk(pixels).shape == encoder.images(pixels).shape == (2, 32)


@pytest.mark.long
def test_digits_from_captions_to_figures_by_one_command_each(tmp_path):
    """scikit-learn's scanned digits: FLIP trained on captions, then zero-shot, linear-probe and few-shot figures."""
    write_digits(tmp_path / "digits")
    trained = pretrain(
        *(
            "--train_data",
            str(tmp_path / "digits"),
            "--caption_column",
            "caption",
            "--output_dir",
            str(tmp_path / "flip"),
        ),
        *("--vision_config", json.dumps(DIGIT_TOWER | {"image_size": 16, "patch_size": 4})),
        *("--text_config", json.dumps(DIGIT_TOWER | {"max_position_embeddings": 16})),
        *("--train_samples", "6000", "--batch_size", "60", "--base_lr", "0.008", "--warmup_samples", "600"),
        *("--mask_ratio", "0.5", "--unmasked_samples", "600", "--unmasked_base_lr", "0.0004"),
        *("--unmasked_warmup_samples", "60", "--log_samples", "3000", "--report_to", "none", "--precision", "fp32"),
        *("--crop_area", "0.8", "1", "--flip", "0", "--num_workers", "1"),
    )
    assert trained.returncode == 0, trained.stderr[-3000:]
    (tmp_path / "names.txt").write_text("\n".join(DIGITS))
    report = evaluated(
        tmp_path / "out",
        *(tmp_path / "flip", "--tasks", "zero-shot", "linear-probe", "few-shot", "--data", tmp_path / "digits"),
        *("--label_column", "label", "--class_names", tmp_path / "names.txt", "--train_split", "train"),
        *("--templates", "the digit {}", "--shots", 1, 4, "--repeats", 2),
    )
    zero_shot, linear, few = report["results"]
    assert zero_shot["metrics"]["top1"] > 0.4  # chance: 0.1
    assert linear["metrics"]["top1"] > 0.8 > few["metrics"]["1-shot"]
    assert few["metrics"]["4-shot"] > few["metrics"]["1-shot"] and len(few["details"]["4-shot"]["scores"]) == 2
    assert (tmp_path / "out" / "probes_digits.png").exists()
    if find_spec("torchvision") is None:
        return
    tuned = evaluated(
        tmp_path / "tuned",
        *(tmp_path / "flip", "--tasks", "fine-tune", "--data", tmp_path / "digits", "--train_split", "train"),
        *("--label_column", "label", "--class_names", tmp_path / "names.txt"),
        *("--epochs", 2, "--train_batch_size", 128, "--train_base_lr", 0.02),
    )
    (result,) = tuned["results"]  # that it learns is seen in test_finetune.py: so short a run by MAE's recipe does not
    assert result["details"]["top1_by_epoch"][1] == result["metrics"]["top1"] and result["samples"] == 360
    assert (result["details"]["epochs"], result["details"]["base_lr"], result["details"]["layer_decay"]) == (
        2,
        0.02,
        0.75,
    )


DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
DIGIT_TOWER = {"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}


def write_digits(folder) -> None:
    """The 1,797 scans of 8 x 8 as an image folder with captions and labels, a fifth of them as its test."""
    from sklearn.datasets import load_digits

    digits: dict = load_digits()  # pyright: ignore[reportAssignmentType]
    lines: dict[str, list[str]] = {"train": [], "test": []}
    for split in lines:
        (folder / split).mkdir(parents=True)
    for number, (pixels, label) in enumerate(zip(digits["images"], digits["target"], strict=True)):
        split = "test" if number % 5 == 0 else "train"
        name = f"{number:04d}.png"
        Image.fromarray((pixels * 255 / 16).astype(np.uint8)).resize((16, 16)).save(folder / split / name)
        row = {"file_name": name, "label": int(label), "caption": f"the digit {DIGITS[label]}"}
        lines[split].append(json.dumps(row) + "\n")
    for split, rows in lines.items():
        (folder / split / "metadata.jsonl").write_text("".join(rows))


def test_bad_input_is_named_or_counted(clip, labelled, tmp_path, caplog):
    data, _ = labelled
    (tmp_path / "two.txt").write_text("a\nb\n")
    (tmp_path / "none.txt").write_text("\n")
    labelled_pictures(6).to_parquet(str(tmp_path / "test.parquet"))
    own = ["--data", data / "images"]
    names = ["--class_names", data / "classes.txt"]
    cases = [
        ([clip, *own, "--class_names", tmp_path / "none.txt"], "has no class names"),
        ([clip, *own, *names, "--test_split", "validation"], "Not measured: "),
        ([clip, *own], "Give --class_names FILE"),
        (
            [clip, *own, *names, "--tasks", "sing"],
            "--tasks is one of zero-shot, masked, retrieval, class-retrieval, linear-probe, few-shot",
        ),
        ([clip, *own, *names, "--tasks", "masked"], "encodes whole images only"),
        (["some/model", *own, *names, "--card"], "--card writes into a model folder"),
        ([clip, "--datasets", "food10"], "food101"),
        ([clip, "--datasets", "food101", "--data_dir", tmp_path], "There is no copy of 'food101'"),
        (
            [clip, "--data", tmp_path / "test.parquet", "--label_column", "fine_label", "--tasks", "linear-probe"],
            "test.parquet would be trained on and measured on",
        ),
        ([clip, *own, *names, "--templates", "no place"], "no {} for the label"),
        ([clip, "--datasets", "food101", "--tasks", "retrieval"], "needs data for retrieval"),
        ([tmp_path, *own, *names], "error: "),
        (["--tasks", "zero-shot"], "error: Name"),
    ]
    for argv, message in cases:
        caplog.clear()
        with pytest.raises(SystemExit) as ended:
            evaluated(tmp_path / "out", *argv)
        assert message in f"{ended.value}\n{caplog.text}", argv
    report = evaluated(tmp_path / "out", clip, *own, "--class_names", tmp_path / "two.txt")
    (result,) = report["results"]  # the third class's images have a label that is none
    assert result["refused"]["unknown label"] + result["samples"] == 40

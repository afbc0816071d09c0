"""The models inside transformers.Trainer, for users who train with it instead of with scripts/pretrain.py."""

import copy
import dataclasses

import numpy as np
import pytest
import torch
from torch.utils.data import IterableDataset
from transformers import Trainer, TrainingArguments

from flip_hf import FlipForImageClassification, FlipForPreTraining, FlipModel, FlipPreTrainingConfig
from tests.helpers.models import IMAGE_SIZE, NUM_PATCHES, tiny_config

pytest.importorskip("accelerate")  # Trainer needs it


@pytest.fixture
def pairs() -> list[dict]:
    """Eight images of noise, each with its own caption: small enough to learn by heart."""
    captions = [{"input_ids": [i + 1, i + 101, *[7] * (i % 3)]} for i in range(8)]
    return [{"pixel_values": torch.randn(3, IMAGE_SIZE, IMAGE_SIZE), **c, "url": "dropped"} for c in captions]


@pytest.fixture
def labelled(pairs) -> list[dict]:
    return [{"pixel_values": pair["pixel_values"], "labels": i % 4} for i, pair in enumerate(pairs)]


def pad(samples: list[dict]) -> dict:
    """A batch as a FlipModel takes it, asking for the loss."""
    ids = [torch.tensor(sample["input_ids"]) for sample in samples]
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in ids], batch_first=True)
    return {
        "pixel_values": torch.stack([sample["pixel_values"] for sample in samples]),
        "input_ids": torch.nn.utils.rnn.pad_sequence(ids, batch_first=True),
        "attention_mask": mask,
        "return_loss": True,
    }


# Transformers has renamed the argument.
NEW_NAME = "activation_checkpointing" in {field.name for field in dataclasses.fields(TrainingArguments)}
RECOMPUTE = {"activation_checkpointing" if NEW_NAME else "gradient_checkpointing": True}


def make_trainer(model, dataset, folder, collate=None, **settings) -> Trainer:
    fixed = {"output_dir": str(folder), "report_to": "none", "use_cpu": True, "disable_tqdm": True, "seed": 0}
    small = {"per_device_train_batch_size": 4, "per_device_eval_batch_size": 4, "save_strategy": "no"}
    metrics = settings.pop("compute_metrics", None)
    return Trainer(
        model=model,
        args=TrainingArguments(**{**fixed, **small, **settings}),
        train_dataset=dataset,
        eval_dataset=dataset,
        data_collator=collate,
        compute_metrics=metrics,
    )


def test_contrastive_training_learns_and_resumes(pairs, tmp_path):
    settings = {"learning_rate": 5e-3, "logging_steps": 1, "save_strategy": "steps", "save_steps": 20}
    torch.manual_seed(0)
    trainer = make_trainer(FlipModel(tiny_config()), pairs, tmp_path, pad, max_steps=40, **settings)
    before = trainer.evaluate()["eval_loss"]  # whole images
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < 0.2 * before
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 40 and np.mean(losses[-5:]) < 0.5 * np.mean(losses[:5])

    trainer.save_model(tmp_path / "saved")
    loaded = FlipModel.from_pretrained(tmp_path / "saved")
    batch = pad(pairs)
    with torch.no_grad():
        assert torch.equal(loaded(**batch).logits_per_image, trainer.model.eval()(**batch).logits_per_image)

    # Half of the same training, gone on with from its checkpoint, masks and all.
    resumed = make_trainer(FlipModel(tiny_config()), pairs, tmp_path, pad, max_steps=40, **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-20"))
    for name, parameter in resumed.model.named_parameters():
        assert torch.allclose(parameter, trainer.model.get_parameter(name), atol=1e-6), name


@pytest.mark.parametrize("objective", ["both", "reconstruction", "contrastive"])
def test_pre_training_with_a_decoder_learns_and_evaluates(pairs, tmp_path, objective):
    decoder = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    config = FlipPreTrainingConfig(flip_config=tiny_config(), decoder_config=decoder, objective=objective)
    trainer = make_trainer(
        FlipForPreTraining(config), pairs, tmp_path, pad, max_steps=20, learning_rate=5e-3, **RECOMPUTE
    )
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < 0.95 * before
    predicted = trainer.predict(pairs).predictions
    patches = [value for value in predicted if isinstance(value, np.ndarray) and value.shape == (8, NUM_PATCHES, 192)]
    assert len(patches) == (objective != "contrastive")


def accuracy(prediction) -> dict[str, float]:
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


def test_classification_learns_and_evaluates(labelled, tmp_path):
    model = FlipForImageClassification(tiny_config(num_labels=4))
    options = {"learning_rate": 5e-3, "compute_metrics": accuracy, "eval_strategy": "steps", "eval_steps": 20}
    trainer = make_trainer(model, labelled, tmp_path, max_steps=40, **RECOMPUTE, **options)
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    evaluated = [entry for entry in trainer.state.log_history if "eval_accuracy" in entry]
    assert len(evaluated) == 2 and evaluated[-1]["eval_loss"] < 0.2 * before
    assert evaluated[-1]["eval_accuracy"] == 1
    assert trainer.predict(labelled).predictions.shape == (8, 4)


DESCENT = {"optim": "sgd", "learning_rate": 0.1, "lr_scheduler_type": "constant", "max_grad_norm": 0.0}


@pytest.mark.parametrize("label_kind", ["classes", "several"])
def test_accumulated_gradients_are_those_of_the_whole_batch(labelled, tmp_path, label_kind):
    """Plain gradient descent tells: Adam would hide a factor on the loss."""
    if label_kind == "several":
        several = torch.eye(4)
        labelled = [{**row, "labels": several[row["labels"]]} for row in labelled]
    model = FlipForImageClassification(tiny_config(num_labels=4, mask_ratio=0))
    start = copy.deepcopy(model.state_dict())
    trained = []
    for batch_size, accumulation in ((8, 1), (2, 4)):
        model.load_state_dict(start)
        sizes = {"per_device_train_batch_size": batch_size, "gradient_accumulation_steps": accumulation}
        make_trainer(model, labelled, tmp_path, max_steps=2, **sizes, **DESCENT).train()
        trained.append(copy.deepcopy(model.state_dict()))
    assert not torch.equal(trained[0]["classifier.weight"], start["classifier.weight"])
    for name, value in trained[0].items():
        assert torch.allclose(trained[1][name], value, rtol=1e-5, atol=1e-6), name


class Stream(IterableDataset):
    """Rows in their order, which Trainer shuffles otherwise."""

    def __init__(self, rows: list[dict]):
        self.rows = rows

    def __iter__(self):
        return iter(self.rows)


def test_accumulated_contrastive_losses_are_averaged(pairs, tmp_path):
    """Twice the same four pairs in one step are one time those four pairs."""
    model = FlipModel(tiny_config(mask_ratio=0))
    start = copy.deepcopy(model.state_dict())
    trained = []
    for rows, accumulation in ((pairs[:4], 1), (pairs[:4] * 2, 2)):
        model.load_state_dict(start)
        options = {**DESCENT, "gradient_accumulation_steps": accumulation}
        make_trainer(model, Stream(rows), tmp_path, pad, max_steps=1, **options).train()
        trained.append(copy.deepcopy(model.state_dict()))
    assert not torch.equal(trained[0]["text_projection.weight"], start["text_projection.weight"])
    for name, value in trained[0].items():
        assert torch.allclose(trained[1][name], value, rtol=1e-5, atol=1e-6), name


def test_low_precision_training_keeps_its_loss_in_float32(pairs, tmp_path):
    trainer = make_trainer(FlipModel(tiny_config()), pairs, tmp_path, pad, max_steps=30, learning_rate=5e-3, bf16=True)
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < 0.3 * before
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert trainer.model(**pad(pairs)).loss.dtype == torch.float32


def test_evaluation_can_return_predictions(pairs, tmp_path):
    """Without prediction_loss_only: the nested outputs must pass through Trainer's gathering."""
    model = FlipModel(tiny_config())
    trainer = make_trainer(model, pairs, tmp_path, pad)
    predicted = trainer.predict(pairs)
    with torch.no_grad():
        expected = model.eval()(**pad(pairs[:4])).logits_per_image
    assert np.allclose(predicted.predictions[0][:4], expected.numpy(), atol=1e-5)

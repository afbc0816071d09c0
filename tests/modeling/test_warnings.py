"""Nothing that this package does makes a library warn, in training, loading and pipelines.

Published files cannot be fixed later: everybody who loads them sees a library's deprecations. They are watched
as remote code in test_pipelines.py.
"""

import json

from tests.helpers.pretraining import SHORT, TINY
from tests.helpers.programs import ROOT, run_program

WATCHED = """
import json, sys
sys.path.insert(0, sys.argv[2])
from recorder import record
lines = record()
from pathlib import Path
import torch
from transformers import AutoModel, AutoModelForPreTraining, AutoModelForTextEncoding, AutoProcessor, pipeline
from flip_hf import FlipForImageClassification, FlipModel, FlipTextModel
from flip_hf.training.build import build_trainer
from flip_hf.training.recipes import parse_arguments
words, recipes, folders, picture = json.loads(sys.argv[1])
build_trainer(parse_arguments(words, Path(recipes), "shapes")).run()
run = words[words.index("--output_dir") + 1]
model = FlipModel.from_pretrained(run)
pretraining = AutoModelForPreTraining.from_pretrained(folders["pretraining"])
processor = AutoProcessor.from_pretrained(run)
inputs = processor(text=["a red circle", "a star"], images=[picture] * 2, return_tensors="pt")
assert pretraining(**inputs).loss.isfinite() and model(**inputs, return_loss=True).loss.isfinite()
model.save_pretrained(run + "-model")
processor.save_pretrained(run + "-model")
for folder in (run + "-model", folders["full"]):
    pipeline("zero-shot-image-classification", model=folder)(picture, candidate_labels=["a", "b"])
pipeline("image-classification", model=folders["classifier"])(picture)
pipeline("image-feature-extraction", model=folders["tower"])(picture)
AutoModelForTextEncoding.from_pretrained(folders["texts"])
print("WARNINGS " + json.dumps(lines))
"""


def test_nothing_of_ours_makes_a_library_warn(folders, tar_folder, image, tmp_path):
    """A causal text tower, a decoder, recomputed activations and held-out pairs take every branch of a run."""
    (tmp_path / "watched.py").write_text(WATCHED)
    causal = json.dumps({**json.loads(TINY[3]), "causal": True, "pooling_type": "mean"})
    decoder = json.dumps({"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32})
    words = [
        "--train_data",
        str(tar_folder),
        *TINY[:3],
        causal,
        *SHORT,
        "--num_workers",
        "0",
        "--unmasked_samples",
        "0",
    ]
    words += ["--objective", "both", "--decoder_config", decoder, "--gradient_checkpointing", "True"]
    words += ["--holdout", "0.2", "--output_dir", str(tmp_path / "run")]
    call = json.dumps([words, str(ROOT / "flip_hf" / "recipes"), folders, str(tmp_path / "image.png")])
    done = run_program(tmp_path / "watched.py", call, str(ROOT / "tests" / "helpers" / "recording"))
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(done.stdout.split("WARNINGS ")[1]) == []

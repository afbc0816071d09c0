"""The metrics against computations of another kind: by hand, sample by sample in plain Python, scikit-learn's."""

import subprocess
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from sklearn.metrics import balanced_accuracy_score, roc_auc_score, top_k_accuracy_score

from flip_hf.evaluation.metrics import METRICS
from flip_hf.evaluation.scoring import map_11_points, recall_at, retrieval_ranks, roc_auc, top_k_accuracy


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


@pytest.fixture
def metric(tmp_path):
    """A module by its name; what it may write goes into the test's folder."""
    return lambda name: METRICS[name](cache_dir=str(tmp_path / "cache"))


def ranked(row: list[float]) -> list[int]:
    """Indices by score, the greatest first, the earlier one of two equal ones first."""
    return sorted(range(len(row)), key=lambda i: (-row[i], i))


def test_accuracy_equals_a_count(metric, rng):
    scores = rng.normal(size=(300, 12)).astype(np.float32)
    labels = rng.integers(0, 12, 300)
    scores[np.arange(300), labels] += 1
    counted = [
        sum(label in ranked(row)[:k] for row, label in zip(scores.tolist(), labels, strict=True)) for k in (1, 5)
    ]
    result = metric("accuracy").compute(predictions=scores, references=labels)
    assert result == {"top1": counted[0] / 300, "top5": counted[1] / 300}
    for k in (1, 5):
        assert result[f"top{k}"] == pytest.approx(top_k_accuracy_score(labels, scores, k=k, labels=range(12)))


def test_the_first_of_equal_scores_is_the_guess():
    scores = np.array([[0.5, 0.5, 0.1], [0.5, 0.5, 0.1], [0.2, 0.2, 0.2]])
    assert top_k_accuracy(scores, np.array([0, 1, 2]), 1) == pytest.approx(1 / 3)
    assert top_k_accuracy(scores, np.array([0, 1, 2]), 2) == pytest.approx(2 / 3)
    assert (scores.argmax(axis=1) == [0, 0, 0]).all()
    # A model that says the same of every class is right as often as chance.
    assert top_k_accuracy(np.zeros((40, 10)), np.arange(40) % 10, 1) == pytest.approx(0.1)


def test_more_guesses_than_classes_are_always_right(metric, rng):
    scores = rng.normal(size=(20, 3))
    labels = rng.integers(0, 3, 20)
    assert metric("accuracy").compute(predictions=scores, references=labels)["top5"] == 1.0


def test_mean_per_class_leaves_out_classes_without_samples(metric, rng):
    labels = rng.choice([0, 1, 1, 1, 4, 6], size=200)
    scores = rng.normal(size=(200, 8))
    scores[np.arange(200), labels] += 1.5
    by_class = {c: [] for c in set(labels.tolist())}
    for row, label in zip(scores.tolist(), labels.tolist(), strict=True):
        by_class[label].append(ranked(row)[0] == label)
    expected = sum(sum(hits) / len(hits) for hits in by_class.values()) / 4
    result = metric("mean_per_class").compute(predictions=scores, references=labels)
    assert result == {"mean_per_class": pytest.approx(expected)}
    guesses = scores[:, [0, 1, 4, 6]].argmax(axis=1)
    only = np.array([0, 1, 4, 6])[guesses]  # scikit-learn warns of guesses that are nobody's class
    kept = metric("mean_per_class").compute(predictions=np.eye(8)[only], references=labels)
    assert kept["mean_per_class"] == pytest.approx(balanced_accuracy_score(labels, only))


def test_retrieval_by_class_equals_a_count_of_hits_at_each_rank(metric, rng):
    labels = rng.choice([0, 1, 1, 3], size=40)  # class 2 has no samples
    scores = rng.normal(size=(40, 4))
    scores[np.arange(40), labels] += 1
    precisions = []
    among_ten = []
    for c in (0, 1, 3):
        hits = [labels[i] == c for i in ranked(scores[:, c].tolist())]
        at_hits = [sum(hits[: rank + 1]) / (rank + 1) for rank, hit in enumerate(hits) if hit]
        precisions.append(sum(at_hits) / len(at_hits))
        among_ten.append(sum(hits[:10]) / 10)
    found = metric("mean_average_precision").compute(predictions=scores, references=labels)
    assert found["mean_average_precision"] == pytest.approx(sum(precisions) / 3)
    assert found["precision@10"] == pytest.approx(sum(among_ten) / 3)
    few = metric("mean_average_precision").compute(predictions=scores[:4], references=labels[:4])
    assert 0 <= few["precision@10"] <= 1  # of four images


def test_average_precision_of_eleven_points_by_hand():
    # Ranked: right, wrong, right, right, wrong; precision 1, 1/2, 2/3, 3/4, 3/5 at recall 1/3, 1/3, 2/3, 1, 1.
    # The greatest at recall >= 0 ... 0.3 is 1 (four points), at >= 0.4 ... 1 it is 3/4 (seven points).
    scores = np.array([[0.9], [0.8], [0.7], [0.6], [0.5]])
    labels = np.array([[1], [0], [1], [1], [0]])
    assert map_11_points(scores, labels) == pytest.approx((4 * 1 + 7 * 0.75) / 11)
    # The other way round: wrong, right, right, wrong, right; precision 0, 1/2, 2/3, 1/2, 3/5.
    # The greatest at recall >= 0 ... 0.6 is 2/3 (seven points), at >= 0.7 ... 1 it is 3/5 (four points).
    assert map_11_points(scores[::-1], labels) == pytest.approx((7 * 2 / 3 + 4 * 3 / 5) / 11)
    # The second sample is difficult: nothing wrong comes before anything right.
    labels[1] = -1
    assert map_11_points(scores, labels) == 1.0
    # A recall of exactly 3/10 counts at 0.3: precision 3/3 there, 10/17 at the end.
    scores = -np.arange(17.0)[:, None]
    labels = np.array([1] * 3 + [0] * 7 + [1] * 7)[:, None]
    assert map_11_points(scores, labels) == pytest.approx((4 * 1 + 7 * 10 / 17) / 11)


def precision_by_sample(scores: list[float], labels: list[int]) -> float:
    """The same in plain Python, with the precision at every cut looked at for every point."""
    order = [i for i in ranked(scores) if labels[i] >= 0]
    cuts = []
    for n in range(1, len(order) + 1):
        right = sum(labels[i] for i in order[:n])
        cuts.append((right, right / n))
    positives = cuts[-1][0]
    return sum(max(p for right, p in cuts if right * 10 >= t * positives) for t in range(11)) / 11


def test_mean_average_precision_equals_a_count(metric, rng):
    scores = rng.normal(size=(80, 6)).round(1)  # with equal ones
    labels = rng.choice([0, 0, 0, 1, -1], size=(80, 6))
    labels[:, 3] = np.minimum(labels[:, 3], 0)  # a class that nobody has
    each = [precision_by_sample(scores[:, c].tolist(), labels[:, c].tolist()) for c in (0, 1, 2, 4, 5)]
    result = metric("map_11_points").compute(predictions=scores, references=labels)
    assert result == {"map_11_points": pytest.approx(sum(each) / 5)}


def test_roc_auc_is_the_share_of_pairs_in_order(metric, rng):
    scores = rng.normal(size=100).round(1)
    labels = rng.integers(0, 2, 100)
    positive = scores[labels == 1].tolist()
    negative = scores[labels == 0].tolist()
    expected = sum((p > n) + 0.5 * (p == n) for p in positive for n in negative) / len(positive) / len(negative)
    assert roc_auc(scores, labels) == pytest.approx(expected)
    logits = rng.normal(size=(100, 2)).astype(np.float32) * 3
    probabilities = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    assert metric("roc_auc").compute(predictions=logits, references=labels) == {
        "roc_auc": pytest.approx(roc_auc_score(labels, probabilities[:, 1]))
    }


@pytest.fixture
def pairs(rng):
    """30 images with one to five texts each, in any order; embeddings of no certain length."""
    image_of_text = rng.permutation(np.concatenate([np.repeat(np.arange(30), 1), rng.integers(0, 30, 60)]))
    images = rng.normal(size=(30, 8)).astype(np.float32)
    texts = (images[image_of_text] + rng.normal(size=(90, 8)) * 1.5).astype(np.float32)
    return images * rng.uniform(0.5, 2, size=(30, 1)), texts, image_of_text


def test_ranks_equal_sorted_rows(pairs):
    images, texts, image_of_text = pairs
    unit = [x / np.linalg.norm(x, axis=1, keepdims=True) for x in (images, texts)]
    similarity = unit[0] @ unit[1].T
    of_images = [[image_of_text[t] == i for t in ranked(similarity[i].tolist())].index(True) for i in range(30)]
    of_texts = [ranked(similarity[:, t].tolist()).index(image_of_text[t]) for t in range(90)]
    for max_pairs in (1, 200, 2**24):  # a row at a time, blocks with a rest, all at once
        ranks = retrieval_ranks(images, texts, image_of_text, max_pairs=max_pairs)
        assert ranks[0].tolist() == of_images and ranks[1].tolist() == of_texts
    assert 0 < np.mean(ranks[0] == 0) < 1 and 0 < np.mean(ranks[1] == 0) < 1  # neither too easy nor too hard


def test_recall_counts_a_hit_for_any_of_an_images_texts(metric):
    images = np.eye(4)[:3]
    texts = np.array([[0, 0, 0, 1], [1, 0, 0, 0], [0, 1, 0, 0], [0.5, 1, 0, 0]])  # of the images 0, 0, 1, 2
    result = metric("recall").compute(predictions=texts, references=[0, 0, 1, 2], image_embeds=images)
    # Images: 0 finds its second text; 1 its own; 2 is as near to all, and texts 0, 1, 2 come before its own.
    assert result["text_retrieval_recall@1"] == pytest.approx(2 / 3)
    # Texts: 0 is as near to all images, and its own comes first; 3 is nearer to 1 and 0 than to its own.
    assert result["image_retrieval_recall@1"] == pytest.approx(3 / 4)
    assert result["text_retrieval_recall@5"] == result["image_retrieval_recall@10"] == 1.0


def test_a_model_that_embeds_all_alike_is_at_chance():
    images = np.tile([1.0, 0.0], (20, 1))
    texts = np.tile([1.0, 0.0], (100, 1))
    of_images, of_texts = retrieval_ranks(images, texts, np.repeat(np.arange(20), 5))
    assert recall_at(of_images, 1) == recall_at(of_texts, 1) == 1 / 20


def test_large_sets_are_ranked_in_blocks(rng):
    images = rng.normal(size=(400, 4))
    texts = rng.normal(size=(2000, 4))
    tracemalloc.start()
    retrieval_ranks(images, texts, np.arange(2000) // 5, max_pairs=20_000)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 400 * 2000  # bytes: less than even one for each pair


def test_batches_added_equal_one_call(metric, rng):
    inputs = {
        "accuracy": (rng.normal(size=(40, 7)), rng.integers(0, 7, 40)),
        "mean_per_class": (rng.normal(size=(40, 7)), rng.integers(0, 7, 40)),
        "map_11_points": (rng.normal(size=(40, 3)), rng.integers(-1, 2, (40, 3))),
        "roc_auc": (rng.normal(size=(40, 2)), rng.integers(0, 2, 40)),
    }
    for name, (scores, labels) in inputs.items():
        module = metric(name)
        once = module.compute(predictions=scores, references=labels)
        module.add_batch(predictions=scores[:25], references=labels[:25])
        assert module.compute(predictions=scores[25:], references=labels[25:]) == once


def test_tasks_without_a_metric_are_refused(metric, rng):
    scores = rng.normal(size=(4, 3))
    labels = np.array([0, 1, 2, 0])
    for bad_scores, bad_labels, message in (
        (scores, np.array([0, 1, 2, 3]), "from 0 to 2, one per column of scores; got int64 from 0 to 3"),
        (scores, labels - 1, "from -1 to 1"),
        (scores, labels[:3], r"got \(4, 3\) and \(3,\)"),
        (scores, labels.astype(float), "got float64"),
        (np.where(scores == scores[2, 1], np.nan, scores), labels, r"Scores hold NaN \(first in row 2\)"),
        (scores[:0], labels[:0], "one per row"),
    ):
        for name in ("accuracy", "mean_per_class"):
            with pytest.raises(ValueError, match=message):
                metric(name).compute(predictions=bad_scores, references=bad_labels)
    with pytest.raises(ValueError, match="No class has a positive"):
        map_11_points(scores, np.zeros((4, 3), int))
    with pytest.raises(ValueError, match="1, 0 or -1"):
        map_11_points(scores, np.full((4, 3), 2))
    with pytest.raises(ValueError, match="both present"):
        roc_auc(scores[:, 0], np.ones(4, int))
    with pytest.raises(ValueError, match=r"missing \[1\], unknown \[7\]"):
        retrieval_ranks(scores[:2], scores, np.array([0, 0, 0, 7]))
    with pytest.raises(ValueError, match="text_embeds hold NaN"):
        retrieval_ranks(scores, np.full((4, 3), np.nan), np.arange(4))


OFFLINE = """
import os, socket, sys

def refuse(*args):
    raise AssertionError(f"the network was asked for {args[1:]}")

socket.socket.connect = socket.socket.connect_ex = socket.getaddrinfo = refuse
import numpy as np
from flip_hf.evaluation.metrics import METRICS

for name, module in METRICS.items():
    rows = np.eye(4)[:, :2] if name == "roc_auc" else np.eye(4)
    references = np.eye(4, dtype=int) if name == "map_11_points" else np.array([0, 1, 0, 1])
    more = {"image_embeds": np.eye(4)[:2]} if name == "recall" else {}
    print(name, module().compute(predictions=rows, references=references, **more))
"""


def test_modules_need_no_network_and_leave_no_files(tmp_path):
    environment = {"HOME": str(tmp_path), "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    environment |= {"OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    run = subprocess.run([sys.executable, "-c", OFFLINE], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert [line.split()[0] for line in run.stdout.splitlines()] == list(METRICS)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []

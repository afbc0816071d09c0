"""Masks of texts: how many tokens are kept, which, and how often."""

from collections import Counter

import pytest
import torch

from flip_hf import FlipModel
from flip_hf.modeling.masking_flip import TEXT_MASK_STRATEGIES, mask_text, pooled_token
from tests.helpers.models import randomize, tiny_config


def padded_texts(lengths: list[int], eos: int = 599) -> tuple[torch.Tensor, torch.Tensor]:
    """Random texts that begin with 1 and end with `eos`, padded on the right with 0."""
    attention_mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
    input_ids = torch.randint(2, 590, attention_mask.shape) * attention_mask
    input_ids[:, 0] = 1
    input_ids.scatter_(1, torch.tensor(lengths)[:, None] - 1, eos)
    return input_ids, attention_mask


@pytest.mark.parametrize("strategy", ["random", "prioritized"])
def test_texts_are_shortened_as_one_by_one(strategy):
    """The reference: each text padded to the context, its places shuffled, the first `kept` of them taken in order."""
    lengths = [2, 3, 6, 9, 12, 12] * 50
    input_ids, attention_mask = padded_texts(lengths)
    pooled = pooled_token(input_ids, "eos", 599)
    drawn = torch.rand(300, 16)
    noise = drawn.tolist()
    masked = mask_text(input_ids, attention_mask, drawn, strategy=strategy, kept=6, pooled=pooled)
    assert {name: tuple(tensor.shape) for name, tensor in masked.items()} == dict.fromkeys(masked, (300, 6))
    for row, length in enumerate(lengths):
        drop_last = [0 if place in (0, length - 1) else 1 for place in range(16)]
        if strategy == "prioritized":
            drop_last = [drop + (place >= length) for place, drop in enumerate(drop_last)]
        order = sorted(range(16), key=lambda place: (drop_last[place], noise[row][place]))
        places = sorted(order[:6])
        text = [int(input_ids[row, place]) if place < length else 0 for place in places]
        assert masked["input_ids"][row].tolist() == text
        assert masked["position_ids"][row].tolist() == places
        assert masked["attention_mask"][row].tolist() == [int(place < length) for place in places]
    words = masked["attention_mask"].sum(1)
    if strategy == "prioritized":
        assert torch.equal(words, torch.tensor(lengths).clamp(max=6))  # no word is dropped while padding remains
    else:
        assert words[0] == 2 and (words[torch.tensor(lengths) == 9] < 6).any()


@pytest.mark.parametrize("strategy", TEXT_MASK_STRATEGIES)
@pytest.mark.parametrize(("pooling", "causal"), [("first", False), ("mean", False), ("eos", True), ("argmax", True)])
def test_a_masked_text_is_the_whole_text_with_tokens_hidden(pooling, causal, strategy):
    """And with it: the pooled token is still the pooled one, and the first is still there."""
    text = {"pooling_type": pooling, "causal": causal, "eos_token_id": 599, "bos_token_id": 1}
    model = randomize(FlipModel(tiny_config(text=text))).eval()
    input_ids, attention_mask = padded_texts([4, 9, 12, 3, 12, 7])
    pooled = None if pooling == "mean" else pooled_token(input_ids, pooling, 599)
    noise = torch.rand(6, 16)
    words = (
        {"word_begins": torch.rand(6, 12) < 0.6, "word_weights": torch.rand(6, 12)} if strategy == "frequency" else {}
    )
    masked = mask_text(input_ids, attention_mask, noise, strategy=strategy, kept=5, pooled=pooled, **words)
    assert (masked["input_ids"][:, 0] == 1).all()
    if causal:
        assert (masked["input_ids"] == 599).any(1).all()
    hidden = torch.zeros(6, 16, dtype=torch.long).scatter_(1, masked["position_ids"], masked["attention_mask"])
    whole = model.get_text_features(input_ids, attention_mask=hidden[:, :12]).pooler_output
    torch.testing.assert_close(model.get_text_features(**masked).pooler_output, whole, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("strategy", ["prioritized", "block", "frequency"])
def test_short_texts_stay_as_they_are_where_padding_is_dropped_first(strategy):
    input_ids, attention_mask = padded_texts([3, 5, 4])
    words = {"word_begins": attention_mask > 0, "word_weights": torch.ones(3, 5)} if strategy == "frequency" else {}
    masked = mask_text(input_ids, attention_mask, torch.rand(3, 16), strategy=strategy, kept=8, **words)
    assert torch.equal(masked["input_ids"], input_ids) and torch.equal(masked["attention_mask"], attention_mask)
    assert torch.equal(masked["position_ids"] * attention_mask, torch.arange(5) * attention_mask)


def test_a_random_mask_drops_words_of_short_texts_too():
    input_ids, attention_mask = padded_texts([5] * 50)
    masked = mask_text(input_ids, attention_mask, torch.rand(50, 16), strategy="random", kept=8)
    assert masked["input_ids"].shape == (50, 5) and (masked["attention_mask"].sum(1) < 5).any()


def test_masks_of_texts_that_cannot_be_drawn_are_refused():
    input_ids, attention_mask = padded_texts([3, 5, 4])
    with pytest.raises(ValueError, match="one of random, prioritized, block, frequency, got 'syntax'"):
        mask_text(input_ids, attention_mask, torch.rand(3, 16), strategy="syntax", kept=8)
    with pytest.raises(ValueError, match="needs word_begins and word_weights"):
        mask_text(input_ids, attention_mask, torch.rand(3, 16), strategy="frequency", kept=8)


# -- the distributions of texts' masks --------------------------------------------------------------------------------


def deviates(counts: Counter, probabilities: dict, draws: int) -> float:
    """Returns how unlikely right draws are to differ from the probabilities as much: 4 means once in 10,000 times."""
    assert set(counts) <= set(probabilities), set(counts) - set(probabilities)
    assert abs(sum(probabilities.values()) - 1) < 1e-9
    square = sum((counts[each] - draws * p) ** 2 / (draws * p) for each, p in probabilities.items())
    degrees = torch.tensor(len(probabilities) - 1.0, dtype=torch.float64)
    return -float(torch.special.gammaincc(degrees / 2, torch.tensor(square / 2, dtype=torch.float64)).log10())


def masked_places(strategy: str, length: int, kept: int, draws: int, pooled: bool, **words) -> Counter:
    """How often each set of places was kept of one text of this length."""
    input_ids, attention_mask = (each.expand(draws, -1) for each in padded_texts([length]))
    last = torch.full((draws,), length - 1) if pooled else None
    words = {name: values.expand(draws, -1) for name, values in words.items()}
    noise = torch.rand(draws, 16)
    masked = mask_text(input_ids, attention_mask, noise, strategy=strategy, kept=kept, pooled=last, **words)
    assert masked["attention_mask"].sum(1).eq(kept).all()  # never fewer, where the text has as many
    return Counter(map(tuple, masked["position_ids"].tolist()))


@pytest.mark.parametrize("pooled", [True, False])
def test_a_block_is_a_run_between_the_tokens_always_kept_at_any_place_alike(pooled):
    counts = masked_places("block", 12, 6, 20_000, pooled)
    if pooled:  # the first and the last token, and four of the ten others
        runs = [(0, *range(start, start + 4), 11) for start in range(1, 8)]
    else:
        runs = [(0, *range(start, start + 5)) for start in range(1, 8)]
    assert deviates(counts, dict.fromkeys(runs, 1 / 7), 20_000) < 4


def drawn_words(begins: list[int], weights: list[float], length: int, kept: int) -> dict[tuple[int, ...], float]:
    """The probability of each set of places, by drawing words one after another in every possible order.

    The first token and the last one, which is pooled, are kept, and so is the first word.
    """
    ends = [*begins[1:], length - 1]
    words = {begin: (list(range(begin, end)), p) for begin, end, p in zip(begins, ends, weights, strict=True)}
    found: dict[tuple[int, ...], float] = {}

    def draw(places: list[int], left: set[int], probability: float) -> None:
        if len(places) >= kept - 1 or not left:
            key = (*sorted(places[: kept - 1]), length - 1)
            found[key] = found.get(key, 0.0) + probability
            return
        total = sum(words[word][1] for word in left)
        for word in left:
            draw(places + words[word][0], left - {word}, probability * words[word][1] / total)

    draw(words[0][0], set(begins) - {0}, 1.0)
    return found


@pytest.mark.parametrize("kept", [4, 5, 6, 7, 8, 9])
def test_words_are_drawn_by_weight_and_whole_but_for_the_last_one(kept):
    begins = [0, 2, 3, 5, 8, 9]
    weights = [0.01, 1.0, 0.3, 0.05, 0.5, 0.1]
    is_begin = torch.isin(torch.arange(11), torch.tensor([*begins, 10]))
    by_token = torch.tensor(weights)[is_begin.cumsum(0).clamp(max=6) - 1]
    by_token[10] = torch.inf
    counts = masked_places("frequency", 11, kept, 40_000, True, word_begins=is_begin, word_weights=by_token)
    expected = drawn_words(begins, weights, 11, kept)
    assert len(expected) > 3
    assert deviates(counts, expected, 40_000) < 4


def test_special_tokens_are_kept_before_any_word():
    weights = torch.tensor([1.0, 1, 1, torch.inf, 1, 1, 1, 1])
    words = {"word_begins": torch.ones(8, dtype=torch.bool), "word_weights": weights}
    counts = masked_places("frequency", 8, 3, 500, False, **words)
    assert all(3 in places for places in counts) and len(counts) == 6

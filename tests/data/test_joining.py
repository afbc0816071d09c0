"""Batches arrive as they were sent, in few tensors."""

import torch

from flip_hf.data.joining import join, split


def test_a_batch_arrives_as_it_was_sent():
    batch = {
        "patches": torch.randint(0, 256, (3, 2, 12), dtype=torch.uint8),
        "ids_keep": torch.randint(0, 9, (3, 2)),
        "weights": torch.rand(3, 1),
        "input_ids": torch.randint(0, 9, (2, 4)).T,
        "empty": torch.zeros(0, 5, dtype=torch.int64),
        "scalar": torch.tensor(7),
    }
    message = join(batch)
    assert [flat.dtype for flat in message["joined"]] == [torch.uint8, torch.int64, torch.float32]
    assert message["joined"][0].data_ptr() == batch["patches"].data_ptr()  # alone, so it is not copied
    # The thread that pins a message makes lists of its tuples.
    message["parts"] = [[[name, list(shape)] for name, shape in parts] for parts in message["parts"]]
    arrived = split(message)
    assert list(arrived) == list(batch)
    for name, tensor in batch.items():
        assert arrived[name].dtype == tensor.dtype and torch.equal(arrived[name], tensor), name


def test_a_batch_of_nothing_arrives():
    assert split(join({})) == {}

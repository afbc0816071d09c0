"""Files of torch.save that would take memory or run something."""

import io
import zipfile

import pytest
import torch

from flip_hf.conversion.errors import ConversionError
from flip_hf.conversion.open_clip import read_state_dict
from flip_hf.conversion.pickled import read_pickled
from tests.helpers.bounded import outcome


def saved(value) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def with_pickle(pickle: bytes, *, method: int = zipfile.ZIP_STORED) -> bytes:
    """An archive like torch's with another pickle in it."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(saved({"a": torch.ones(2)}))) as source, zipfile.ZipFile(buffer, "w") as target:
        for info in source.infolist():
            data = pickle if info.filename.endswith("data.pkl") else source.read(info)
            target.writestr(info.filename, data, compress_type=method)
    return buffer.getvalue()


def test_a_byte_array_of_any_length_is_not_made(tmp_path):
    path = tmp_path / "a.pt"
    path.write_bytes(with_pickle(b"\x80\x02cbuiltins\nbytearray\n\x8a\x05\x00\x00\x00\x00\x01\x85R."))
    assert "needs 'builtins bytearray'" in outcome(lambda: read_pickled(path), megabytes=1024)


def test_a_compressed_archive_is_refused_unread(tmp_path):
    path = tmp_path / "a.pt"
    path.write_bytes(with_pickle(b"\x80\x02}." + bytes(1 << 26), method=zipfile.ZIP_DEFLATED))
    assert "its archive is compressed" in outcome(lambda: read_pickled(path), megabytes=48)


def test_a_tensor_has_its_numbers_in_the_file(tmp_path):
    torch.save({"wide": torch.ones(1).expand(1 << 20, 1 << 20)}, tmp_path / "a.pt")
    with pytest.raises(ConversionError, match="wide is not a plain tensor.*not all of its numbers are stored"):
        read_state_dict(tmp_path / "a.pt")


@pytest.mark.parametrize("value", [torch.eye(2).to_sparse(), 3, "text", [torch.ones(1)]])
def test_tensors_that_are_not_plain_are_refused(tmp_path, value):
    torch.save({"a": value}, tmp_path / "a.pt")
    with pytest.raises(ConversionError, match="a is no|a is a|cannot be read as weights"):
        read_state_dict(tmp_path / "a.pt")


def test_two_tensors_of_one_name_are_refused(tmp_path):
    torch.save({"module.a": torch.ones(1), "a": torch.zeros(1)}, tmp_path / "a.pt")
    with pytest.raises(ConversionError, match="two tensors called a"):
        read_state_dict(tmp_path / "a.pt")


def test_parameters_and_the_states_of_a_training_are_read(tmp_path):
    model = torch.nn.Linear(2, 2).half()
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 2).half()).sum().backward()
    optimizer.step()
    states = {"optimizer": optimizer.state_dict(), "scaler": {"scale": 1.0}, "seen": {1, 2}, "size": torch.Size([1])}
    torch.save({"epoch": 1, "state_dict": {"a": torch.nn.Parameter(torch.ones(2))}, **states}, tmp_path / "a.pt")
    assert torch.equal(read_state_dict(tmp_path / "a.pt")["a"], torch.ones(2))

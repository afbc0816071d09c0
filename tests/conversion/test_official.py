"""Official checkpoints: as released, in other layouts, and what is wrong with bad ones."""

import gzip
import json
import os
import shutil
import zipfile

import msgpack
import numpy as np
import pytest
import torch
from PIL import Image
from transformers import pipeline

from flip_hf import FlipImageProcessor, FlipImageProcessorPil, FlipModel
from flip_hf.conversion.folder import new_folder
from flip_hf.conversion.official import config_of, convert_official, read_official
from flip_hf.conversion.tables import ConversionError
from flip_hf.conversion.word_pieces import official_pieces
from tests.helpers.fixtures import FIXTURES, HEADS


def same(first: FlipModel, second: FlipModel) -> bool:
    return all(
        torch.equal(a, b) for a, b in zip(first.state_dict().values(), second.state_dict().values(), strict=True)
    )


# -- layouts ----------------------------------------------------------------------------------------------------------


def test_a_zip_and_its_folder_give_the_same_model(official_zip, official_folder):
    model = read_official(official_zip, **HEADS)
    assert same(model, read_official(official_folder, **HEADS))
    assert same(model, read_official(official_folder.parents[1], **HEADS))  # a folder with one somewhere inside
    assert not model.training and model.dtype == torch.float32
    assert model.config.vision_config.image_size == 64 and model.config.text_config.vocab_size == 500


def test_the_latest_step_of_several_is_taken(official_folder):
    older = official_folder.parent / "checkpoint_1"
    shutil.copytree(official_folder, older)
    (older / "checkpoint").write_bytes(b"not read")
    assert read_official(official_folder.parent, **HEADS)


def rewrite_structure(folder, change) -> None:
    path = folder / "checkpoint"
    tree = msgpack.unpackb(path.read_bytes(), strict_map_key=False)
    change(tree["optimizer"]["target"])
    path.write_bytes(msgpack.packb(tree))


def inline(array: np.ndarray) -> msgpack.ExtType:
    return msgpack.ExtType(1, msgpack.packb((array.shape, array.dtype.name, array.tobytes())))


def read_array(folder) -> np.ndarray:
    meta = json.loads((folder / ".zarray").read_text())
    (chunk,) = (p for p in folder.iterdir() if p.name != ".zarray")
    return np.frombuffer(gzip.decompress(chunk.read_bytes()), meta["dtype"]).reshape(meta["shape"])


def write_array(folder, array: np.ndarray, chunks: tuple[int, ...], compressor: dict | None) -> None:
    meta = json.loads((folder / ".zarray").read_text()) | {
        "chunks": chunks,
        "shape": array.shape,
        "compressor": compressor,
    }
    shutil.rmtree(folder)
    folder.mkdir()
    (folder / ".zarray").write_text(json.dumps(meta))
    for row in range(-(-array.shape[0] // chunks[0])):
        for column in range(-(-array.shape[1] // chunks[1])):
            block = np.full(chunks, np.nan, array.dtype)  # what sticks out of the array is never used
            part = array[row * chunks[0] : (row + 1) * chunks[0], column * chunks[1] : (column + 1) * chunks[1]]
            block[: part.shape[0], : part.shape[1]] = part
            data = block.tobytes()
            (folder / f"{row}.{column}").write_bytes(gzip.compress(data) if compressor else data)


@pytest.mark.parametrize("compressor", [{"id": "gzip", "level": 1}, None])
def test_arrays_in_many_chunks_are_joined(official_zip, official_folder, compressor):
    folder = official_folder / "target.txt_encoder.token_embedding.embedding"
    write_array(folder, read_array(folder), (233, 24), compressor)
    assert len(list(folder.iterdir())) == 1 + 3 * 3
    assert same(read_official(official_folder, **HEADS), read_official(official_zip, **HEADS))


def test_arrays_inside_the_structure_are_read(official_zip, official_folder):
    names = ["logit_scale", "txt_mlp1/kernel"]
    arrays = {name: read_array(official_folder / f"target.{name.replace('/', '.')}") for name in names}

    def change(target):
        target["logit_scale"] = inline(arrays["logit_scale"])
        kernel = arrays["txt_mlp1/kernel"]
        target["txt_mlp1"]["kernel"] = {  # as flax stores arrays above its limit for one piece
            "__msgpack_chunked_array__": True,
            "shape": {"0": kernel.shape[0], "1": kernel.shape[1]},
            "chunks": {"0": inline(kernel.flatten()[:1000]), "1": inline(kernel.flatten()[1000:])},
        }

    rewrite_structure(official_folder, change)
    for name in names:
        shutil.rmtree(official_folder / f"target.{name.replace('/', '.')}")
    assert same(read_official(official_folder, **HEADS), read_official(official_zip, **HEADS))


def test_options_of_other_trainings_follow_from_the_arrays(official_folder):
    """Projections with biases, a fixed temperature of 0.01, any values in the class token's row of positions."""

    def change(target):
        del target["logit_scale"]
        for tower in ("img_mlp1", "txt_mlp1"):
            target[tower]["bias"] = inline(np.arange(48, dtype=np.float32))

    rewrite_structure(official_folder, change)
    shutil.rmtree(official_folder / "target.logit_scale")
    folder = official_folder / "target.img_encoder.posembed_encoder.pos_embedding"
    table = read_array(folder).copy()
    table[0, 0] = 7
    (folder / "0.0.0").write_bytes(gzip.compress(table.tobytes()))
    model = read_official(official_folder, **HEADS, image_pooling="cls", text_pooling="mean")
    assert model.get_logit_scale().item() == pytest.approx(100)
    assert torch.equal(model.visual_projection.bias, torch.arange(48.0))
    assert model.config.vision_config.pooling_type == "cls" and model.config.text_config.pooling_type == "mean"
    assert not model.vision_model.embeddings.position_embedding.weight[0].any()


RELEASED = {"L16": ((24, 1024, 4096), (12, 768, 3072), 16, 197), "H14": ((32, 1280, 5120), (24, 1024, 4096), 14, 257)}


@pytest.mark.parametrize(("size", "heads"), [("L16", (16, 12)), ("H14", (16, 16))])
def test_released_sizes_are_recognised(size, heads):
    vision, text, patch, positions = RELEASED[size]
    shapes = {
        "img_encoder/posembed_encoder/pos_embedding": (1, positions, vision[1]),
        "img_encoder/embedding/kernel": (patch, patch, 3, vision[1]),
        "txt_encoder/token_embedding/embedding": (30523, text[1]),
        "txt_encoder/posembed_encoder/pos_embedding": (1, 32, text[1]),
        "img_mlp1/kernel": (vision[1], text[1]),
    }
    for tower, (count, width, hidden) in (("img_encoder", vision), ("txt_encoder", text)):
        for i in range(count):
            shapes[f"{tower}/Transformer/encoderblock_{i:02d}/MlpBlock_0/Dense_0/kernel"] = (width, hidden)
    config = config_of(shapes)
    assert (config.vision_config.num_attention_heads, config.text_config.num_attention_heads) == heads
    assert config.vision_config.image_size == 224 and config.text_config.max_position_embeddings == 32
    assert config.text_config.attend_to_padding and config.projection_dim == text[1]


# -- the folder -------------------------------------------------------------------------------------------------------


def test_the_converted_folder_answers_as_the_official_model(official_zip, vocab, tmp_path):
    """Through the pipeline: image processor and tokenizer from the folder, features as recorded for its inputs."""
    with new_folder(tmp_path / "out") as folder:
        convert_official(official_zip, str(vocab), **HEADS).save(folder)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "vocab.txt"]
    card = (tmp_path / "out" / "README.md").read_text()
    assert "license: cc-by-nc-4.0" in card and "CC-BY-NC 4.0" in card

    classifier = pipeline("zero-shot-image-classification", model=str(tmp_path / "out"))
    assert isinstance(classifier.image_processor, (FlipImageProcessor, FlipImageProcessorPil))
    official = np.load(FIXTURES / "official_flip_tiny.npz")
    pixels = official["input/image"].transpose(0, 3, 1, 2)
    input_ids = torch.from_numpy(official["input/txt"]).long()
    with torch.no_grad():
        image_embeds = classifier.model(pixel_values=torch.from_numpy(pixels), input_ids=input_ids).image_embeds
    assert np.abs(image_embeds.numpy() - official["out/z_img"]).max() < 5e-6

    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    labels = ["cats", "a dog (photo)", "12"]
    answer = {entry["label"]: entry["score"] for entry in classifier(image, candidate_labels=labels)}
    # Independently of processor and padding: pixels normalised by hand, ids padded to 32 as the official pipeline does.
    mean = np.array([0.485, 0.456, 0.406]) * 255
    std = np.array([0.229, 0.224, 0.225]) * 255
    pixel_values = torch.from_numpy(((np.asarray(image) - mean) / std).transpose(2, 0, 1)[None]).float()
    lines = vocab.read_text().split("\n")
    pieces = {"cats": ["cat", "##s"], "a dog (photo)": ["a", "dog", "(", "photo", ")"], "12": ["1", "##2"]}
    prefix = ["t", "##h", "##i", "##s", "i", "##s", "a", "photo", "of"]
    ids = [[lines.index(p) for p in [*prefix, *pieces[label], "."]] for label in labels]
    ids = torch.tensor([row + [0] * (32 - len(row)) for row in ids])
    with torch.no_grad():
        expected = FlipModel.from_pretrained(tmp_path / "out")(ids, pixel_values).logits_per_image.softmax(dim=1)[0]
    assert [answer[label] for label in labels] == pytest.approx(expected.tolist(), abs=1e-5)


def test_a_vocabulary_that_is_not_the_releases_is_refused(vocab):
    with pytest.raises(ConversionError, match="is not the released one"):
        official_pieces(str(vocab), 30523, released=True)
    assert len(official_pieces(str(vocab), 500, released=False)) == 499
    assert len(official_pieces(str(vocab), 400, released=False)) == 399  # cut to the table, with a warning


# -- bad files --------------------------------------------------------------------------------------------------------


def test_a_size_that_was_not_released_needs_its_heads(official_zip):
    with pytest.raises(ConversionError, match="3 blocks of width 96 .* give --vision_heads and --text_heads"):
        read_official(official_zip)


def test_a_truncated_zip_is_refused(official_zip, tmp_path):
    (tmp_path / "half.zip").write_bytes(official_zip.read_bytes()[:1_000_000])
    with pytest.raises(ConversionError, match="not a complete zip"):
        read_official(tmp_path / "half.zip", **HEADS)


def test_a_zip_with_a_damaged_member_is_refused(official_zip, tmp_path):
    data = bytearray(official_zip.read_bytes())
    with zipfile.ZipFile(official_zip) as archive:
        info = next(
            i for i in archive.infolist() if "token_embedding" in i.filename and not i.filename.endswith(".zarray")
        )
    data[info.header_offset + 500 : info.header_offset + 600] = bytes(100)
    (tmp_path / "bad.zip").write_bytes(data)
    with pytest.raises(ConversionError, match="token_embedding.*(cannot be read|damaged)"):
        read_official(tmp_path / "bad.zip", **HEADS)


@pytest.mark.parametrize("name", ["../escaped", "/escaped", "a/../../escaped", "..\\escaped"])
def test_a_zip_whose_members_lead_out_of_it_is_refused(official_zip, tmp_path, name):
    shutil.copy(official_zip, tmp_path / "slip.zip")
    with zipfile.ZipFile(tmp_path / "slip.zip", "a") as archive:
        archive.writestr(name, b"x")
    with pytest.raises(ConversionError, match="leads out of it"):
        read_official(tmp_path / "slip.zip", **HEADS)


def test_missing_and_surplus_arrays_are_both_named(official_folder):
    shutil.rmtree(official_folder / "target.img_encoder.cls")
    (official_folder / "target.extra").mkdir()
    (official_folder / "target.extra" / ".zarray").write_text("{}")
    with pytest.raises(ConversionError, match=r"Missing: 1 \(target.img_encoder.cls\). Left over: 1 \(target.extra\)"):
        read_official(official_folder, **HEADS)


def test_arrays_that_the_format_does_not_know_are_refused(official_folder):
    rewrite_structure(official_folder, lambda target: target.update(teacher=inline(np.zeros(3, np.float32))))
    with pytest.raises(ConversionError, match=r"Missing: none. Left over: 1 \(teacher\)"):
        read_official(official_folder, **HEADS)


def test_another_architecture_is_refused(official_folder):
    def change(target):
        target["encoder"] = target.pop("img_encoder")

    rewrite_structure(official_folder, change)
    for path in official_folder.glob("target.img_encoder*"):
        path.rename(path.with_name(path.name.replace("img_encoder", "encoder")))
    with pytest.raises(ConversionError, match=r"Missing: 6 \(img_encoder.*Left over: 54 \(encoder/"):
        read_official(official_folder, **HEADS)


def test_an_array_of_another_shape_is_named(official_folder):
    folder = official_folder / "target.img_mlp1.kernel"
    write_array(folder, read_array(folder)[:90], (90, 48), {"id": "gzip"})
    with pytest.raises(ConversionError, match=r"img_mlp1/kernel has the shape \(48, 90\).*expected \(48, 96\)"):
        read_official(official_folder, **HEADS)


def zarray(**changes):
    def change(folder):
        path = folder / "target.img_mlp1.kernel" / ".zarray"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return change


def chunk(data: bytes):
    return lambda folder: (folder / "target.img_mlp1.kernel" / "0.0").write_bytes(data)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (zarray(shape=[10**6, 10**6], chunks=[10**6, 10**6]), "claims 4,000,000,000,000 bytes"),
        (zarray(chunks=[48, 48]), "should have 2 chunk files, but has 1"),
        (zarray(dtype="|O"), "a kind of array that T5X does not write"),
        (zarray(compressor={"id": "pickle"}), "a kind of array that T5X does not write"),
        (zarray(shape=[-1, 48]), "a kind of array that T5X does not write"),
        (chunk(gzip.compress(bytes(96 * 48 * 4 + 1))), "holds 18,433 bytes, expected 18,432"),
        (chunk(gzip.compress(bytes(100))[:-20] * 9), "damaged|holds"),
        (chunk(b""), "can hold at most 0"),
        (
            lambda folder: (folder / "target.img_mlp1.kernel" / "0.0").rename(folder / "target.img_mlp1.kernel" / "1"),
            "0.0 is missing",
        ),
        (lambda folder: (folder / "target.img_mlp1.kernel" / ".zarray").write_text("{"), "cannot be read as JSON"),
        (lambda folder: (folder / "checkpoint").write_bytes(b"\x80\x04\x95."), "not the structure of a T5X checkpoint"),
        (lambda folder: (folder / "checkpoint").write_bytes(b"\x91" * 5000), "not the structure of a T5X checkpoint"),
        (lambda folder: (folder / "checkpoint").unlink(), "no T5X checkpoint"),
    ],
)
def test_a_damaged_or_hostile_checkpoint_is_refused(official_folder, spoil, message):
    spoil(official_folder)
    with pytest.raises(ConversionError, match=message):
        read_official(official_folder, **HEADS)


def test_an_inline_array_must_have_its_bytes(official_folder):
    lie = msgpack.ExtType(1, msgpack.packb(((10**9,), "float32", b"1234")))
    rewrite_structure(official_folder, lambda target: target.update(logit_scale=lie))
    with pytest.raises(ConversionError, match="needs 4,000,000,000 bytes, but the checkpoint has 4"):
        read_official(official_folder, **HEADS)


# -- the output -------------------------------------------------------------------------------------------------------


def test_a_folder_that_could_not_be_filled_leaves_nothing_above_it(tmp_path):
    with pytest.raises(OSError, match="disk full"):
        with new_folder(tmp_path / "a" / "b" / "out") as folder:
            (folder / "config.json").write_text("{}")
            raise OSError("disk full")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", ["file", "folder", "dangling", "link"])
def test_nothing_is_overwritten(tmp_path, kind):
    out = tmp_path / "out"
    if kind == "folder":
        (out / "kept").mkdir(parents=True)
    elif kind == "file":
        out.write_bytes(b"kept")
    else:
        if kind == "link":
            (tmp_path / "target").mkdir()
        out.symlink_to("target")
    with pytest.raises(ConversionError, match="exists already and is not an empty folder"):
        with new_folder(out):
            pass
    assert out.is_symlink() or out.exists()


def test_files_that_appear_in_the_meantime_are_not_overwritten(tmp_path):
    with pytest.raises(ConversionError, match="was created by something else in the meantime"):
        with new_folder(tmp_path / "out"):
            (tmp_path / "out" / "other").mkdir(parents=True)
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    assert (tmp_path / "out" / "other").is_dir()


def test_weights_that_cannot_be_written_are_an_error_of_files(official_zip, vocab, tmp_path):
    converted = convert_official(official_zip, str(vocab), **HEADS)
    (tmp_path / "out" / "model.safetensors").mkdir(parents=True)
    with pytest.raises(OSError):
        converted.save(tmp_path / "out")


def test_a_vocabulary_that_is_a_pipe_or_no_vocabulary_is_refused(official_zip, tmp_path):
    os.mkfifo(tmp_path / "vocab.txt")
    for vocab in (tmp_path / "vocab.txt", tmp_path):
        with pytest.raises(ConversionError, match="is a pipe"):
            convert_official(official_zip, str(vocab), **HEADS)
    (tmp_path / "lines.txt").write_text("[PAD]\n[UNK]\n" + "\n" * 2_000_000)
    with pytest.raises(ConversionError, match="has 2,000,003 lines"):
        convert_official(official_zip, str(tmp_path / "lines.txt"), **HEADS)


def test_a_checkpoint_without_blocks_or_with_odd_ranks_is_refused(official_folder):
    for path in official_folder.glob("target.*encoderblock_*"):
        shutil.rmtree(path)

    def change(target):
        for tower in ("img_encoder", "txt_encoder"):
            blocks = target[tower]["Transformer"]
            target[tower]["Transformer"] = {"encoder_norm": blocks["encoder_norm"]}

    rewrite_structure(official_folder, change)
    with pytest.raises(ConversionError, match="There is no img_encoder/Transformer/encoderblock_00"):
        read_official(official_folder, **HEADS)


def test_weights_that_are_not_finite_are_named(official_folder):
    for name in ("img_mlp1", "txt_mlp1"):
        folder = official_folder / f"target.{name}.kernel"
        values = read_array(folder).copy()
        values[0, 0] = np.nan
        write_array(folder, values, values.shape, {"id": "gzip"})
    with pytest.raises(ConversionError, match=r"NaN in its weights: 2 \(img_mlp1/kernel, txt_mlp1/kernel\)"):
        read_official(official_folder, **HEADS)

import io

import pytest
from datasets import Dataset, Image
from PIL import Image as PILImage

from flip_hf.data.decode import decode_image
from flip_hf.data.files import expand_braces
from flip_hf.data.reading import Reader, epoch_shards, read_rows
from flip_hf.data.sources import column_value, open_source


def fail(reason, detail):
    pytest.fail(f"{reason}: {detail}")


def captions(source, **kwargs) -> list[str]:
    options = {"epoch": 0, "seed": None, "report": fail, **kwargs}
    reader = options.pop("reader", Reader(0, 1))
    values = [source.target(row) for _, row in read_rows(source.shards, reader, **options)]
    return [v.decode() if isinstance(v, bytes) else v for v in values]


def test_every_kind_of_source_gives_the_same_samples(tar_folder, image_folder, parquet_folder, samples, tmp_path):
    expected = [caption.decode() for _, _, caption in samples]
    saved = tmp_path / "saved"
    Dataset.from_dict({"image": [s[1] for s in samples], "caption": expected}).cast_column(
        "image", Image()
    ).save_to_disk(str(saved))
    sources = [
        open_source(str(tar_folder)),
        open_source(str(tar_folder / "*.tar")),
        open_source(str(tar_folder / "shard-{0000..0004}.tar")),
        open_source(str(image_folder)),
        open_source(str(parquet_folder), image_column="picture", target_column="words"),
        open_source(str(parquet_folder / "*.parquet"), image_column="picture", target_column="words"),
        open_source(str(saved)),
    ]
    first = PILImage.open(io.BytesIO(samples[0][1])).convert("RGB")
    for source in sources:
        assert sorted(captions(source)) == expected, source.name
        assert decode_image(source.image(next(source.rows()))).tobytes() == first.tobytes()


def test_a_missing_column_names_the_ones_there_are(parquet_folder, tar_folder):
    with pytest.raises(
        ValueError, match="no image column with a usual name. Its columns are: picture, words.*--image_column"
    ):
        open_source(str(parquet_folder), target_column="words")
    with pytest.raises(ValueError, match="no caption column 'title'.*__key__.*--caption_column"):
        open_source(str(tar_folder), target_column="title")


def test_images_do_alone(tar_folder, image_folder, parquet_folder, samples, tmp_path):
    """Data without captions open as images; of those with captions, none is read."""
    bare = tmp_path / "bare"
    bare.mkdir()
    for key, image, _ in samples[:8]:
        (bare / f"{key}.jpg").write_bytes(image)
    first = PILImage.open(io.BytesIO(samples[0][1])).convert("RGB")
    for folder, column in ((bare, None), (tar_folder, None), (image_folder, None), (parquet_folder, "picture")):
        source = open_source(str(folder), image_column=column, kind="image")
        row = next(source.rows())
        assert source.target_column is source.target(row) is source.class_names is None
        assert decode_image(source.image(row)).tobytes() == first.tobytes(), folder
    with pytest.raises(ValueError, match="no caption column with a usual name. Its columns are: image"):
        open_source(str(bare))
    with pytest.raises(ValueError, match="no image column with a usual name. Its columns are: picture, words"):
        open_source(str(parquet_folder), kind="image")


def test_an_empty_data_set_is_refused(tmp_path):
    Dataset.from_dict({"image": [], "caption": []}).to_parquet(str(tmp_path / "empty.parquet"))
    with pytest.raises(ValueError, match="has no samples"):
        open_source(str(tmp_path / "empty.parquet"))


def test_a_path_without_data_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="no file or folder"):
        open_source(str(tmp_path / "nothing"))


def test_braces_and_nested_columns():
    assert expand_braces("a-{08..11}.tar") == ["a-08.tar", "a-09.tar", "a-10.tar", "a-11.tar"]
    assert expand_braces("{0..1}/{0..1}.tar") == ["0/0.tar", "0/1.tar", "1/0.tar", "1/1.tar"]
    row = {"json": {"meta": {"caption": "x"}}, "a.b": 3}
    assert column_value(row, "json.meta.caption") == "x" and column_value(row, "a.b") == 3
    assert column_value(row, "json.other.caption") is None


@pytest.mark.parametrize("count", [1, 2, 3, 5, 7])
def test_every_row_has_exactly_one_reader_an_epoch(tar_folder, samples, count):
    """Five shards: fewer than the readers, as many, and not divisible by them."""
    source = open_source(str(tar_folder))
    for epoch in (0, 1):
        parts = [captions(source, reader=Reader(r, count), epoch=epoch, seed=3) for r in range(count)]
        assert sorted(sum(parts, [])) == sorted(caption.decode() for _, _, caption in samples)
        assert min(len(part) for part in parts) > 0


def test_shards_are_shuffled_by_seed_and_epoch():
    orders = [epoch_shards(20, Reader(0, 1), epoch, seed)[0] for epoch, seed in ((0, 0), (1, 0), (0, 1), (0, 0))]
    assert orders[0] == orders[3] and orders[0] != orders[1] and orders[0] != orders[2]
    assert epoch_shards(20, Reader(0, 1), 0, None)[0] == list(range(20))


def test_reading_resumes_from_a_position(tar_folder):
    source = open_source(str(tar_folder))
    for reader in (Reader(0, 1), Reader(1, 2), Reader(3, 7)):
        rows = list(read_rows(source.shards, reader, epoch=0, seed=1, report=fail))
        for cut in (0, 1, len(rows) // 2, len(rows) - 1):
            start = rows[cut][0]
            again = list(read_rows(source.shards, reader, epoch=0, seed=1, start=start, report=fail))
            assert [r["__key__"] for _, r in again] == [r["__key__"] for _, r in rows[cut:]]


def test_a_truncated_shard_costs_its_rest_alone(tar_folder):
    broken = tar_folder / "shard-0002.tar"
    broken.write_bytes(broken.read_bytes()[:20_000])
    source = open_source(str(tar_folder))
    problems = []
    kept = captions(source, report=lambda *reasons: problems.append(reasons))
    assert problems == [("truncated shard", str(broken))]
    assert {caption[:5] for caption in kept} >= {f"{i:05d}" for i in (*range(64), *range(96, 160))}


def test_a_name_that_is_nowhere_is_an_error_without_the_hub_too():
    with pytest.raises(FileNotFoundError, match="There is no 'nobody/nothing' here, and it cannot be loaded"):
        open_source("nobody/nothing")


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ("a.tar::b/{0..9}.tar", "several data sets in one word: separate them by spaces, 'a.tar' 'b/{0..9}.tar'."),
        ("pipe:curl -s https://me:gu3ss-m3@host/a.tar", "'pipe:.*' is a command, and no command is run: give the path"),
    ],
)
def test_the_notation_of_other_programs_is_refused_and_translated(data, said):
    for given in (data, [data]):
        with pytest.raises(ValueError, match=said) as caught:
            open_source(given)
    assert "gu3ss-m3" not in str(caught.value)

"""Folders of vectors: every format, captions and pictures, and the sentence of what is wrong."""

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from refusals import refusal
from safetensors.torch import save_file

from gsae_core.lm import stored
from gsae_core.lm.stored import StoredVectors, open_vectors

# Halves and quarters, which float16 and bfloat16 hold: 5 vectors of width 3.
X = np.arange(15, dtype=np.float32).reshape(5, 3) / 4


def read(folder: Path, numbers: list[int] | None = None) -> np.ndarray:
    vectors = open_vectors(folder)
    at = np.arange(len(vectors)) if numbers is None else np.array(numbers)
    return np.concatenate(list(vectors.rows(at)))


def parquet(path: Path, **columns: Any) -> None:
    pq.write_table(pa.table(columns), path)


def lists(x: np.ndarray, kind: Any = None) -> pa.Array:
    return pa.array(list(x), kind or pa.list_(pa.float32()))


def write(path: Path, x: np.ndarray, dtype: str) -> None:
    if path.suffix == ".npy":
        np.save(path, x.astype(dtype))
    elif path.suffix == ".safetensors":
        save_file({"x": torch.from_numpy(x).to(getattr(torch, dtype))}, path)
    else:
        kind = {"float16": pa.float16(), "float32": pa.float32(), "float64": pa.float64()}[dtype]
        cells = pa.array(x.astype(dtype).reshape(-1), kind)
        parquet(path, embedding=pa.FixedSizeListArray.from_arrays(cells, x.shape[1]))


@pytest.mark.parametrize(
    ("suffix", "dtype"),
    [
        *((suffix, kind) for suffix in stored.SUFFIXES for kind in ("float16", "float32")),
        (".safetensors", "bfloat16"),
        (".npy", "float64"),
        (".parquet", "float64"),
    ],
)
def test_every_format_gives_the_vectors_that_were_written(
    tmp_path: Path, suffix: str, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stored, "PART_BYTES", 2 * 3 * 4)  # two vectors at a time
    # In the order of numbers: 2 before 10.
    write(tmp_path / f"shard-2{suffix}", X[:2], dtype)
    write(tmp_path / f"shard-10{suffix}", X[2:], dtype)
    found = read(tmp_path)
    assert found.dtype == np.float32
    assert (found == X).all()
    assert (read(tmp_path, [1, 2, 4]) == X[[1, 2, 4]]).all()


def test_the_only_tensor_or_column_of_vectors_needs_no_name(tmp_path: Path) -> None:
    (one := tmp_path / "one").mkdir()
    (two := tmp_path / "two").mkdir()
    tensors = {"hidden": torch.from_numpy(X), "labels": torch.arange(5), "scale": torch.ones(3)}
    save_file(tensors, one / "a.safetensors")
    parquet(two / "a.parquet", clip=lists(X, pa.large_list(pa.float32())), label=pa.array(range(5)))
    assert (read(one) == X).all()
    assert (read(two) == X).all()


def test_parquet_is_unpacked_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "a.parquet", X, "float32")
    read(tmp_path)
    monkeypatch.delattr(stored, "_unpack")
    assert (read(tmp_path) == X).all()


def nan() -> np.ndarray:
    x = X.copy()
    x[3, 1] = np.nan
    x[4, 0] = np.inf
    return x


def npy(x: np.ndarray) -> Callable[[Path], Any]:
    return lambda folder: np.save(folder / "a.npy", x)


def tensors(**found: torch.Tensor) -> Callable[[Path], Any]:
    return lambda folder: save_file(found, folder / "a.safetensors")


def text(name: str, content: str = "nothing of the kind") -> Callable[[Path], Any]:
    return lambda folder: (folder / name).write_text(content)


def cut_short(folder: Path) -> None:
    save_file({"x": torch.from_numpy(X)}, folder / "a.safetensors")
    data = (folder / "a.safetensors").read_bytes()
    (folder / "a.safetensors").write_bytes(data[:-1])


def two_widths(folder: Path) -> None:
    np.save(folder / "a.npy", X)
    np.save(folder / "b.npy", X[:, :2])


def two_kinds(folder: Path) -> None:
    np.save(folder / "a.npy", X)
    save_file({"x": torch.from_numpy(X)}, folder / "a.safetensors")


def unequal(folder: Path) -> None:
    parquet(folder / "a.parquet", x=pa.array([[1.0, 2.0], [3.0], None]))


T = torch.from_numpy(X)
WRONG: list[tuple[Callable[[Path], Any], str]] = [
    (lambda folder: None, "(.safetensors, .npy, .parquet) in {f}, got none"),
    (two_kinds, "expected shards of one kind (.safetensors, .npy, .parquet) in {f}, got .npy and"),
    (two_widths, "expected vectors of one width in {f}, got 3 in a.npy and 2 in b.npy"),
    (npy(X[:0]), "expected vectors in {f}/a.npy, got an array of shape (0, 3)"),
    (npy(X.astype(np.int32)), "in {f}/a.npy, got int32 of shape (5, 3)"),
    (npy(X[0]), "in {f}/a.npy, got float32 of shape (3,)"),
    (npy(X[None]), "in {f}/a.npy, got float32 of shape (1, 5, 3)"),
    (npy(np.array([[None]])), "expected a NumPy array in {f}/a.npy, got something else"),
    (npy(nan()), "in {f}/a.npy, got infinite or NaN entries in row 3 and 1 others"),
    (text("a.npy"), "expected a NumPy array in {f}/a.npy, got something else"),
    (text("a.safetensors"), "expected safetensors in {f}/a.safetensors, got something else"),
    (text("a.parquet"), "expected Parquet in {f}/a.parquet, got something else"),
    (cut_short, "expected safetensors in {f}/a.safetensors, got something else"),
    (tensors(a=T, b=T + 1), "or in one alone, got a (F32 (5, 3)), b (F32 (5, 3))"),
    (tensors(x=T[0].clone(), b=T), "or in one alone, got"),
    (tensors(x=torch.arange(4).view(2, 2)), "got x (I64 (2, 2))"),
    (tensors(x=T[:0].clone()), "in {f}/a.safetensors, got an array of shape (0, 3)"),
    (unequal, "in column x of {f}/a.parquet, got 1 numbers in row 1 and 2"),
    (
        lambda folder: parquet(folder / "a.parquet", a=lists(X), b=lists(X)),
        "called x, activations, embedding, embeddings in {f}/a.parquet, or one alone, got a (list<",
    ),
]


@pytest.mark.parametrize(("make", "sentence"), WRONG)
def test_what_cannot_be_read_is_one_sentence_with_the_file(
    tmp_path: Path, make: Callable[[Path], Any], sentence: str
) -> None:
    make(tmp_path)
    told = refusal(lambda: read(tmp_path))
    assert sentence.format(f=tmp_path) in told
    assert "\n" not in told


def test_a_folder_that_is_not_there_is_said(tmp_path: Path) -> None:
    told = refusal(lambda: open_vectors(tmp_path / "none"))
    assert (
        told == f"expected a folder of vectors, found none at {tmp_path / 'none'}; check the path"
    )


def test_the_digest_tells_of_other_files_and_other_content(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", X)
    first = open_vectors(tmp_path).digest
    assert open_vectors(tmp_path).digest == first
    np.save(tmp_path / "a.npy", X[::-1])
    assert open_vectors(tmp_path).digest != first
    np.save(tmp_path / "a.npy", X)
    assert open_vectors(tmp_path).digest == first
    (tmp_path / "a.npy").rename(tmp_path / "b.npy")
    assert open_vectors(tmp_path).digest != first


# Captions


def captioned(folder: Path, name: str, content: str) -> StoredVectors:
    np.save(folder / "a.npy", X[:2])
    np.save(folder / "b.npy", X[2:])
    (folder / name).write_text(content)
    return open_vectors(folder)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("captions.txt", "a cat\n\ntwo\tdogs\nx\ny\n"),
        ("captions.jsonl", '"a cat"\n{"image": null}\n{"text": ["two dogs", "b"]}\n"x"\n"y"'),
        ("captions.csv", 'id,caption\n1,a cat\n2,\n3,"two\ndogs"\n4,x\n5,y\n'),
        ("captions.tsv", "text\tid\na cat\t1\n\t2\ntwo  dogs\t3\nx\t4\ny\t5\n"),
    ],
)
def test_captions_beside_the_shards_count_through_all_of_them(
    tmp_path: Path, name: str, content: str
) -> None:
    vectors = captioned(tmp_path, name, content)
    assert vectors.captions(np.arange(5)) == ["a cat", "a.npy row 1", "two dogs", "x", "y"]
    assert vectors.captions(np.array([2, 4])) == ["two dogs", "y"]


def test_lines_of_json_may_be_captions_themselves(tmp_path: Path) -> None:
    vectors = captioned(tmp_path, "captions.jsonl", "\n".join(map(json.dumps, "vwxyz")))
    assert vectors.captions(np.arange(5)) == [*"vwxyz"]


def test_a_vector_without_a_caption_is_called_by_its_file_and_row(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", X)
    assert open_vectors(tmp_path).captions(np.array([0, 3])) == ["a.npy row 0", "a.npy row 3"]


@pytest.mark.parametrize("column", stored.TEXTS)
def test_a_parquet_shard_has_its_captions_in_a_column(tmp_path: Path, column: str) -> None:
    for name, part in (("a", slice(0, 2)), ("b", slice(2, 5))):
        parquet(tmp_path / f"{name}.parquet", x=lists(X[part]), **{column: [*"vwxyz"][part]})
    assert open_vectors(tmp_path).captions(np.array([1, 2, 4])) == [*"wxz"]


def test_a_long_caption_is_cut(tmp_path: Path) -> None:
    vectors = captioned(tmp_path, "captions.txt", "y" * 1000 + "\na\nb\nc\nd")
    assert vectors.captions(np.array([0])) == ["y" * 300 + "…"]


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("captions.txt", "a\nb\nc\nd\n", "expected a row for each of the 5 vectors in {f}, got 4"),
        ("captions.csv", "id\n1\n2\n3\n4\n5\n", "or image in {f}, got id"),
        ("captions.jsonl", "a\nb\n", "expected captions in {f}, got: Expecting value"),
        ("captions.doc", "a", "expected captions in {f}, got: .doc without rows"),
        ("captions.parquet", "a", "expected captions in {f}, got: "),
    ],
)
def test_captions_that_do_not_fit_are_refused(
    tmp_path: Path, name: str, content: str, sentence: str
) -> None:
    vectors = captioned(tmp_path, name, content)
    assert sentence.format(f=tmp_path / name) in refusal(lambda: vectors.captions(np.arange(5)))


def test_two_files_of_captions_are_refused(tmp_path: Path) -> None:
    captioned(tmp_path, "captions.txt", "a")
    vectors = captioned(tmp_path, "captions.csv", "a")
    told = refusal(lambda: vectors.captions(np.arange(5)))
    assert told == (f"expected captions of {tmp_path} in one file, got captions.csv, captions.txt")


# Pictures


def png(colour: tuple[int, int, int] = (255, 0, 0), size: int = 200) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (size, size // 2), colour).save(out, "PNG")
    return out.getvalue()


def shown(address: str | None) -> Image.Image:
    import base64

    assert address is not None
    head, _, data = address.partition(",")
    assert head == "data:image/jpeg;base64"
    return Image.open(io.BytesIO(base64.b64decode(data)))


def test_pictures_are_made_small_from_bytes_and_from_files_of_the_folder(tmp_path: Path) -> None:
    (tmp_path / "red.png").write_bytes(png())
    cells = pa.array(
        [{"bytes": png((0, 255, 0)), "path": None}, {"bytes": None, "path": "red.png"}],
        pa.struct({"bytes": pa.binary(), "path": pa.string()}),
    )
    parquet(tmp_path / "a.parquet", x=lists(X[:2]), image=cells)
    parquet(tmp_path / "b.parquet", x=lists(X[2:3]), image=pa.array([png((0, 0, 255))]))
    vectors = open_vectors(tmp_path)
    pictures = [shown(vectors.thumbnail(i)) for i in range(3)]
    assert [picture.size for picture in pictures] == [(96, 48)] * 3
    colours = [np.asarray(picture)[20, 40] for picture in pictures]
    assert [int(colour.argmax()) for colour in colours] == [1, 0, 2]


def test_nothing_but_pictures_inside_the_folder_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder := tmp_path / "folder").mkdir()
    (tmp_path / "outside.png").write_bytes(png())
    (folder / "red.png").write_bytes(png())
    (folder / "page.svg").write_text("<svg onload='alert(1)'/>")
    (folder / "bomb.png").write_bytes(png(size=400))
    (folder / "out.png").symlink_to(tmp_path / "outside.png")
    monkeypatch.setattr(stored, "PIXELS", 200 * 100)
    names = ["red.png", "../outside.png", str(tmp_path / "outside.png"), "http://a.b/c.png"]
    names += ["page.svg", "bomb.png", "out.png", "none.png", "nul\0.png", ""]
    np.save(folder / "a.npy", np.ones((len(names), 3), np.float32))
    lines = [json.dumps({"image": name, "text": "a"}) for name in names]
    (folder / "captions.jsonl").write_text("\n".join(lines))
    vectors = open_vectors(folder)
    assert shown(vectors.thumbnail(0)).size == (96, 48)
    assert [vectors.thumbnail(i) for i in range(1, len(names))] == [None] * (len(names) - 1)


def test_a_group_of_rows_with_more_pictures_than_memory_should_hold_shows_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parquet(tmp_path / "a.parquet", x=lists(X[:1]), image=pa.array([png()]))
    assert open_vectors(tmp_path).thumbnail(0) is not None
    monkeypatch.setattr(stored, "GROUP_BYTES", 100)
    assert open_vectors(tmp_path).thumbnail(0) is None

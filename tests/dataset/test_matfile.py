"""The MAT-file reader: what scipy reads it reads too, and what brings scipy down it refuses."""

import io
import struct
import tarfile
import tracemalloc
import zlib

import numpy as np
import pytest
from scipy.io import loadmat, savemat

from tests.dataset.conftest import FIELDS
from vitdemo import data_path, devkit_of, val_tar
from vitdemo.dataset.imagenet import _gunzip, read_struct_array

CELL, STRUCT, CHAR, DOUBLE = 1, 2, 4, 6  # classes of arrays
FILE_HEADER = b"made by a test".ljust(124) + b"\0\1IM"


def element(kind: int, content: bytes) -> bytes:
    return struct.pack("<II", kind, len(content)) + content + bytes(-len(content) % 8)


def array_head(array_class: int, dimensions: tuple[int, int], name: bytes = b"") -> bytes:
    return (
        element(6, struct.pack("<II", array_class, 0)) + element(5, struct.pack("<2i", *dimensions)) + element(1, name)
    )


def struct_array(rows: int, fields: list[bytes], values: bytes) -> bytes:
    names = b"".join(field.ljust(32, b"\0") for field in fields)
    head = array_head(STRUCT, (rows, 1), b"synsets") + element(5, struct.pack("<i", 32)) + element(1, names)
    return FILE_HEADER + element(14, head + values)


def nested_cells(depth: int) -> bytes:
    """A cell in a cell in a cell …, written from the outside in."""
    head = array_head(CELL, (1, 1))
    content = array_head(DOUBLE, (1, 1)) + element(9, struct.pack("<d", 1))
    sizes = [len(content) + level * (len(head) + 8) for level in range(depth, -1, -1)]
    return b"".join(struct.pack("<II", 14, size) + head for size in sizes[:-1]) + element(14, content)


def compressed_zeros(size: int) -> bytes:
    """A variable of ``size`` characters, all zero, compressed."""
    head = array_head(CHAR, (1, size), b"synsets") + struct.pack("<II", 16, size)
    deflater = zlib.compressobj()
    parts = [deflater.compress(struct.pack("<II", 14, len(head) + size) + head)]
    parts += [deflater.compress(bytes(1 << 20)) for _ in range(size >> 20)]
    content = b"".join([*parts, deflater.flush()])
    return FILE_HEADER + struct.pack("<II", 15, len(content)) + content


@pytest.mark.parametrize("compress", [True, False])
def test_what_scipy_reads_is_read(compress):
    rng = np.random.default_rng(0)
    words = ["tench", "", "a", "abcd", "café, 山", "kit fox, Vulpes macrotis" * 20]
    numbers = [0, 1, 255, 70_000, -3, 2**40, 0.5, 1e300]
    rows = [
        (rng.choice(numbers), rng.choice(words), rng.choice(words), "gloss", k, np.arange(k), [], np.float32(k))
        for k in range(200)
    ]
    synsets = np.array(rows, dtype=[(field, object) for field in FIELDS]).reshape(-1, 1)
    buffer = io.BytesIO()
    savemat(buffer, {"first": 1.0, "text": "no struct", "synsets": synsets, "last": synsets}, do_compression=compress)
    theirs = loadmat(io.BytesIO(buffer.getvalue()), squeeze_me=True)["synsets"]
    ours = read_struct_array(buffer.getvalue(), "synsets")
    assert len(ours) == len(theirs) == 200 and list(ours[0]) == FIELDS
    for our, their in zip(ours, theirs, strict=True):
        for field in ("ILSVRC2012_ID", "num_children", "num_train_images"):
            assert our[field] == their[field]
        for field in ("WNID", "words", "gloss"):
            assert our[field] == (str(their[field]) if np.size(their[field]) else "")
        assert our["wordnet_height"] is None  # an empty array is neither a number nor a text


def test_the_bundled_devkit_is_read_as_scipy_reads_it():
    with tarfile.open(fileobj=io.BytesIO(_gunzip(devkit_of(val_tar(data_path("shapes20")))))) as tar:
        content = next(tar.extractfile(m).read() for m in tar.getmembers() if m.name.endswith("meta.mat"))
    theirs = loadmat(io.BytesIO(content), squeeze_me=True)["synsets"]
    ours = read_struct_array(content, "synsets")
    assert [row["WNID"] for row in ours] == theirs["WNID"].tolist()
    assert [row["ILSVRC2012_ID"] for row in ours] == theirs["ILSVRC2012_ID"].tolist()
    assert [row["words"] for row in ours] == theirs["words"].tolist()


@pytest.mark.parametrize("kind, text", [(4, "utf-16-le"), (16, "utf-8"), (17, "utf-16-le"), (2, "latin-1")])
def test_matlabs_encodings_of_text_are_read(kind, text):
    value = element(14, array_head(CHAR, (1, 4)) + element(kind, "café".encode(text)))
    assert read_struct_array(struct_array(1, [b"words"], value), "synsets") == [{"words": "café"}]


BOMBS = {
    "cells as deep as no stack": (lambda: FILE_HEADER + nested_cells(100_000), "no struct array synsets"),
    "cells in a field": (lambda: struct_array(1, [b"words"], nested_cells(100_000)), None),
    "two thousand million rows": (lambda: struct_array(2_000_000_000, [b"ID", b"WNID"], b""), None),
    "rows of nothing": (
        lambda: struct_array(1 << 20, [b"ID"], element(14, b"") * (1 << 20)),
        "more than 65,536 values",
    ),
    "zeros, compressed": (lambda: compressed_zeros(64 << 20), "too large"),
    "a size beyond the end": (lambda: FILE_HEADER + struct.pack("<II", 14, 1 << 31), "larger than its place"),
    "an older format": (lambda: bytes(200), "no MAT-file of level 5"),
    "a newer format": (lambda: b"MATLAB 7.3 MAT-file".ljust(124) + b"\0\2IM" + b"\x89HDF\r\n\x1a\n" + bytes(500), None),
}


@pytest.mark.parametrize("name", BOMBS)
def test_what_declares_more_than_it_holds_takes_no_memory(name):
    make, line = BOMBS[name]
    content = make()
    tracemalloc.start()
    try:
        rows = read_struct_array(content, "synsets")
        assert line is None and all(value is None for row in rows for value in row.values())
    except ValueError as error:
        assert line is None or line in str(error)
    finally:
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert peak < 100 << 20, f"{peak >> 20} MiB"

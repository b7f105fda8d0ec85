"""Hostile archives: each is refused in one line that names archive and member, or survived; and nothing is written
outside the target, whether the tar holds the images itself or in tars."""

import bz2
import gzip
import json
import lzma
import os
import random
import re
import resource
import shutil
import subprocess
import sys
import tarfile
import time
import tracemalloc
import zlib
from collections import Counter
from pathlib import Path

import psutil
import pytest

from tests.dataset.conftest import (
    GROUND_TRUTH,
    Archives,
    TrainArchives,
    enormous_jpeg,
    tar_bytes,
    tar_member,
    tiny_jpeg,
    val_name,
    watched_writes,
)
from tests.dataset.test_tars import refused
from vitdemo.dataset import imagenet
from vitdemo.dataset import tars as archives_module
from vitdemo.dataset.devkit import read_devkit
from vitdemo.dataset.extraction import extract
from vitdemo.dataset.imagenet import ImageNetTrain, ImageNetVal
from vitdemo.errors import VitdemoError
from vitdemo.paths import REPOSITORY

END = bytes(1024)


def header(name: str, **fields) -> bytes:
    return tar_member(name, format=tarfile.GNU_FORMAT, **fields)


def forged(name: str, start: int, content: bytes) -> bytes:
    """A header with other bytes from ``start`` on and the checksum put right."""
    block = bytearray(header(name))
    block[start : start + len(content)] = content
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def pax(name: str, content: bytes = b"", **records: str) -> bytes:
    """A member with an extended header."""
    headers = {key.replace("__", "."): value for key, value in records.items()}
    return tar_member(name, content, tarfile.PAX_FORMAT, pax_headers=headers)


def zstd(content: bytes) -> bytes:
    """A zstd frame that stores its content [RFC 8878], as Python has no zstd before 3.14."""
    blocks = [content[i : i + (1 << 17)] for i in range(0, len(content), 1 << 17)]
    stored = [(len(b) << 3 | (b is blocks[-1])).to_bytes(3, "little") + b for b in blocks]
    return b"\x28\xb5\x2f\xfd\xe0" + len(content).to_bytes(8, "little") + b"".join(stored)


# What follows the good members of a tar, and what the refusal says; a function is given the name of one of those.
MEMBERS = {
    "an absolute path": (header("/etc/cron.d/evil"), "'/etc/cron.d/evil' would lie outside"),
    "a path up": (header("../../evil.JPEG"), "'../../evil.JPEG' would lie outside"),
    "a path up in the middle": (header("a/../../evil.JPEG"), "'a/../../evil.JPEG' would lie outside"),
    "a path up in the prefix": (forged("evil.JPEG", 257, b"ustar\x0000" + bytes(80) + b"../.."), "would lie outside"),
    "a folder above": (header("..", type=tarfile.DIRTYPE), "'..' would lie outside"),
    "a symlink": (header("x", type=tarfile.SYMTYPE, linkname="/etc/passwd"), "'x' is not a plain file"),
    "a symlink, then a file through it": (
        header("val", type=tarfile.SYMTYPE, linkname="/tmp") + header("val/evil.JPEG"),
        "'val' is not a plain file",
    ),
    "a hard link": (header("x", type=tarfile.LNKTYPE, linkname="/etc/passwd"), "'x' is not a plain file"),
    "a character device": (header("x", type=tarfile.CHRTYPE, devmajor=1, devminor=5), "'x' is not a plain file"),
    "a block device": (header("x", type=tarfile.BLKTYPE, devmajor=8), "'x' is not a plain file"),
    "a FIFO": (header("x", type=tarfile.FIFOTYPE), "'x' is not a plain file"),
    "a contiguous file": (header("x", type=tarfile.CONTTYPE), "'x' is not a plain file"),
    "a type that nobody knows": (forged("x", 156, b"?"), "'x' is not a plain file"),
    "part of a file on several tapes": (forged("x", 156, b"M"), "'x' is not a plain file"),
    "GNU sparse": (header("x", type=tarfile.GNUTYPE_SPARSE), "'x' is not a plain file"),
    "PAX sparse 0.1": (pax("x", GNU__sparse__map="0,1", GNU__sparse__size="9999999"), "'x' is not a plain file"),
    "PAX sparse 1.0": (pax("x", GNU__sparse__major="1", GNU__sparse__realsize="9999999"), "'x' is not a plain file"),
    "a PAX path": (pax("x", path="../evil.JPEG"), "'../evil.JPEG' would lie outside"),
    "a PAX size": (pax("x", b"x", size="0"), "damaged after"),
    "a PAX link": (pax("x", linkpath="/etc/passwd"), "'x' is not named like"),
    "a PAX path for all": (
        tarfile.TarInfo.create_pax_global_header({"path": "../evil.JPEG"}) + header("x"),
        "'../evil.JPEG' would lie outside",
    ),
    "a PAX header without end": (pax("x", comment="c" * 100_000), "'x' is not named like"),
    "a GNU long name": (header("long/" * 40 + "x"), "'x' is not named like"),
    "a GNU long link": (header("x", type=tarfile.SYMTYPE, linkname="y" * 200), "is not a plain file"),
    "a name in the wrong case": (lambda good: header(good.swapcase()), "is not named like"),
    "a name twice": (header, "two members are named"),
    "a name twice, in another folder": (lambda good: header(f"other/{good}"), "two members are named"),
    "no name": (header(""), "'' is not a plain file"),
    "a name with a line break": (header("x\ny.JPEG"), r"'x\ny.JPEG' is not named like"),
    "a name that moves the cursor": (header("\x1b[2Kx.JPEG"), r"'\x1b[2Kx.JPEG' is not named like"),
    "a name that is not UTF-8": (forged("x", 0, b"caf\xe9.JPEG"), r"'caf\udce9.JPEG' is not named like"),
    "a size of 8 GB": (forged("x", 124, b"77777777777\0"), "truncated within 'x'"),
    "a size of 2 to the 80": (forged("x", 124, b"\x80" + bytes(1) + b"\x01" + bytes(9)), "truncated within 'x'"),
    "a negative size": (forged("x", 124, b"-0000000777\0"), "damaged after"),
    "a negative size in binary": (forged("x", 124, b"\xff" * 12), "damaged after"),
    "a size that is no number": (forged("x", 124, b"777777z7777\0"), "damaged after"),
    "a wrong checksum": (header("x").replace(b"x", b"y"), "damaged after"),
    "another tar after the end": (END + tar_bytes({"x.JPEG": b"x"}), "data follow the end"),
}
WHOLE = {
    "gzip": (gzip.compress, "compressed (gzip)"),
    "bzip2": (bz2.compress, "compressed (bzip2)"),
    "xz": (lzma.compress, "compressed (xz)"),
    "zstd": (zstd, "compressed (zstd)"),
    "zlib": (zlib.compress, "not a tar archive"),
    "nothing but zeros": (lambda content: bytes(1 << 20), "holds"),
    "cut in two": (lambda content: content[: len(content) // 2 + 1], "truncated"),
}


GOOD = {
    "val": {val_name(i): tiny_jpeg(i) for i in range(1, 13)},
    "train": {f"n90000001_{i}.JPEG": tiny_jpeg(i) for i in range(1, 4)},
}


def write_archive(split: str, folder: Path, tar: bytes) -> Path:
    """An archive in which ``tar`` holds images: the val tar, or a tar in the train tar."""
    if split == "val":
        archives = Archives(folder)
        archives.tar.write_bytes(tar)
        return archives.tar
    return TrainArchives(folder).write({"n90000001": tar})


def refuse(split: str, sandbox: Path, tar: bytes, line: str) -> None:
    path = write_archive(split, sandbox / "archives", tar)
    with watched_writes() as written, refused(path, *["n90000001.tar"] * (split == "train"), line):
        extract(path, sandbox / "out", split=split, unverified=True, progress=False)
    assert not written


@pytest.mark.parametrize("split", GOOD)
@pytest.mark.parametrize("case", MEMBERS)
def test_a_hostile_member_is_refused(tmp_path, split, case):
    content, line = MEMBERS[case]
    if callable(content):
        content = content(next(iter(GOOD[split])))
    refuse(split, tmp_path, tar_bytes(GOOD[split]).removesuffix(END) + content + END, line)


@pytest.mark.parametrize("split", GOOD)
@pytest.mark.parametrize("case", WHOLE)
def test_what_is_no_plain_tar_is_refused(tmp_path, split, case):
    change, line = WHOLE[case]
    refuse(split, tmp_path, change(tar_bytes(GOOD[split])), line)


@pytest.mark.parametrize("split", GOOD)
def test_a_tar_among_the_images_is_refused(tmp_path, split):
    files = GOOD[split] | {"n90000001.tar": tar_bytes(GOOD["train"])}
    refuse(split, tmp_path, tar_bytes(files), "'n90000001.tar' is not named like")


def test_more_files_than_any_data_set_has_are_refused(archives, train_archives, monkeypatch):
    monkeypatch.setattr(archives_module, "MEMBER_LIMIT", 5)
    with refused(archives.tar, f"more than 5 files, from {val_name(6)!r} on"):
        ImageNetVal(archives.tar)
    monkeypatch.setattr(imagenet, "MEMBER_LIMIT", 5)  # no tar in the train tar has more than three
    with refused(train_archives.tar, "more than 5 images, from 'n90000003_7.JPEG' on"):
        ImageNetTrain(train_archives.tar)


@pytest.mark.parametrize("split", GOOD)
def test_what_is_odd_but_harmless_is_survived(tmp_path, split):
    files = GOOD[split]
    first, *others = files
    harmless = [
        tarfile.TarInfo.create_pax_global_header({"comment": "what git archive writes"}),
        header("images", type=tarfile.DIRTYPE),
        header("images/", size=0),  # a folder in the oldest format
        pax(f"./images/{first}", files[first], mtime="1340000000.25"),
        *(tar_member(name, files[name]) for name in reversed(others)),
    ]
    path = write_archive(split, tmp_path / "archives", b"".join(harmless) + END)
    data = extract(path, tmp_path / "out", split=split, unverified=True, progress=False)
    assert {s.file: s.jpeg for s in data if s.file in files} == files


@pytest.mark.parametrize("split", GOOD)
def test_an_enormous_image_is_extracted_without_being_decoded(tmp_path, split):
    files = dict(GOOD[split])
    files[next(iter(files))] = enormous_jpeg()
    path = write_archive(split, tmp_path / "archives", tar_bytes(files))
    tracemalloc.start()
    data = extract(path, tmp_path / "out", split=split, unverified=True, progress=False)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 100 << 20  # bytes; its pixels would be 400 MB
    assert data[0].jpeg == enormous_jpeg()


# ---- random mutations


def mutated(tar: bytes, random: random.Random) -> bytes:
    """A tar with one to four damages of any kind; half of them keep a header's checksum right."""
    data = bytearray(tar)
    for _ in range(random.randint(1, 4)):
        blocks = max(1, len(data) // 512)
        here, there = (512 * random.randrange(blocks) for _ in range(2))
        junk = random.choice([bytes(512), b"\xff" * 512, random.randbytes(512), bytes(data[there : there + 512])])
        match random.choice(["bits", "cut", "overwrite", "insert", "delete", "append", *["header"] * 6]):
            case "bits":
                for at in random.choices(range(len(data)), k=random.randint(1, 20)) if data else ():
                    data[at] ^= 1 << random.randrange(8)
            case "cut":
                del data[random.randrange(len(data) + 1) :]
            case "overwrite":
                data[here : here + 512] = junk
            case "insert":
                data[here:here] = junk
            case "delete":
                del data[here : here + 512]
            case "append":
                data += junk
            case "header" if headers := [
                i for i in range(0, len(data) - 511, 512) if data[i + 257 : i + 262] == b"ustar"
            ]:
                at = random.choice(headers)
                start, length = random.choice([(0, 100), (124, 12), (156, 1), (157, 100), (257, 8), (345, 155)])
                content = random.choice(
                    [
                        random.randbytes(length),
                        b"../../../tmp/evil",
                        b"/etc/x",
                        b"77777777777",
                        b"\x80" + bytes(10) + b"\1",
                    ]
                )
                if length == 1:
                    content = random.choice(b"01234567ABDKLMNSVXgx\0").to_bytes()
                data[at + start : at + start + length] = content[:length].ljust(length, b"\0")
                data[at + 148 : at + 156] = b" " * 8
                data[at + 148 : at + 156] = b"%06o\0 " % sum(data[at : at + 512])
    return bytes(data)


def write_mutated(kind: str, folder: Path, random: random.Random) -> Path:
    """Good archives, of which the tar named by ``kind`` is mutated."""
    if kind == "train":
        archives = TrainArchives(folder)
        if random.random() < 0.5:
            archives.tar.write_bytes(mutated(archives.tar.read_bytes(), random))
        else:
            nested = {wnid: tar_bytes(images) for wnid, images in archives.images.items()}
            archives.write(nested | {"n90000003": mutated(nested["n90000003"], random)})
        return archives.tar
    archives = Archives(folder)
    if kind == "val":
        archives.tar.write_bytes(mutated(archives.tar.read_bytes(), random))
    else:
        archives.devkit.write_bytes(gzip.compress(mutated(gzip.decompress(archives.devkit.read_bytes()), random)))
    return archives.tar


def extract_mutated(kind: str, folder: Path, seeds: range) -> dict:
    """Extract an archive a seed. What must not happen is an AssertionError; returns what happened, and at what cost."""
    split, outcomes, seconds = "train" if kind == "train" else "val", Counter(), []
    for seed in seeds:
        sandbox = folder / str(seed)
        sandbox.mkdir()
        tar = write_mutated(kind, sandbox / "archives", random.Random(f"{kind} {seed}"))
        start = time.perf_counter()
        with watched_writes() as written:
            try:
                data = extract(tar, sandbox / "out", split=split, unverified=True, progress=False)
                outcomes["survived"] += 1
                assert all(len(sample.jpeg) < 1 << 20 for sample in data)
            except VitdemoError as error:
                assert "\n" not in str(error) and str(sandbox) in str(error), (seed, str(error))
                outcomes[re.sub(r"'.*?'|\d+|\S*/\S*", "…", str(error))] += 1
        seconds.append(time.perf_counter() - start)
        out = (
            sandbox / "out"
        )  # a relative path is one in out/val.part/, or else in the working folder, which stays empty
        assert all((out / os.fsdecode(path)).is_relative_to(out) and ".." not in str(path) for path in written), written
        shutil.rmtree(sandbox)
        if seed == seeds[0]:  # all is imported now: from here on there is little more memory to be had
            used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            limit = psutil.Process().memory_info().vms + (512 << 20)
            resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - used
    return {"outcomes": outcomes, "slowest_s": max(seconds), "grown_bytes": grown * 1024}


CHILD = """
import json, sys
from pathlib import Path
from tests.dataset.test_hostile import extract_mutated
print(json.dumps(extract_mutated(sys.argv[1], Path(sys.argv[2]), range(int(sys.argv[3])))))
"""


@pytest.mark.parametrize("count", [20, pytest.param(200, marks=pytest.mark.soak)])
@pytest.mark.parametrize("kind", ["val", "train", "devkit"])
def test_random_mutations_are_refused_or_survived(tmp_path, kind, count):
    command, empty = [sys.executable, "-c", CHILD, kind, tmp_path, str(count)], tmp_path / "empty"
    empty.mkdir()
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    run = subprocess.run(command, cwd=empty, env=environment, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    assert not list(empty.iterdir())
    result = json.loads(run.stdout)
    print(f"\n{kind}: {json.dumps(result, indent=1, ensure_ascii=False)}")
    assert sum(result["outcomes"].values()) == count and len(result["outcomes"]) > 4
    assert result["slowest_s"] < 10 and result["grown_bytes"] < 100 << 20


# ---- the devkit


@pytest.mark.parametrize("name", ["meta.mat", GROUND_TRUTH])
def test_a_file_of_the_devkit_that_is_too_large_is_refused_unread(archives, name):
    archives.devkit.write_bytes(gzip.compress(tar_bytes({f"data/{name}": b"1\n" * (5 << 20)})))
    tracemalloc.start()
    with refused(archives.devkit, f"'data/{name}' is larger than 8 MiB"):
        read_devkit(archives.devkit)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 100 << 20

"""Hostile archives: each is refused in one line that names archive and member, or survived; and nothing is written
outside the target, whether the tar holds the images itself or in tars."""

import gzip
import json
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
    Archives,
    TrainArchives,
    enormous_jpeg,
    extracted,
    mutated,
    refused,
    tar_bytes,
    tar_member,
    tiny_jpeg,
    val_name,
    watched_writes,
    write_devkit,
)
from vitdemo.dataset.devkit import read_devkit
from vitdemo.errors import VitdemoError
from vitdemo.paths import REPOSITORY

END = bytes(1024)


def header(name: str, **fields) -> bytes:
    return tar_member(name, format=tarfile.GNU_FORMAT, **fields)


def with_checksum(block: bytes) -> bytes:
    """A header whose checksum is right again."""
    block = block[:148] + b" " * 8 + block[156:]
    return block[:148] + b"%06o\0 " % sum(block) + block[156:]


def forged(name: str, start: int, content: bytes) -> bytes:
    """A header with other bytes from ``start`` on."""
    block = header(name)
    return with_checksum(block[:start] + content + block[start + len(content) :])


def pax(name: str, content: bytes = b"", **records: str) -> bytes:
    """A member with an extended header."""
    headers = {key.replace("__", "."): value for key, value in records.items()}
    return tar_member(name, content, tarfile.PAX_FORMAT, pax_headers=headers)


GLOBAL = tarfile.TarInfo.create_pax_global_header
# What follows the good members of a tar, and what the refusal says; a function is given the name of one of those.
MEMBERS = {
    "an absolute path": (header("/etc/cron.d/evil"), "'/etc/cron.d/evil' would lie outside"),
    "a path up": (header("../../evil.JPEG"), "'../../evil.JPEG' would lie outside"),
    "a path up in the prefix": (forged("evil.JPEG", 257, b"ustar\x0000" + bytes(80) + b"../.."), "would lie outside"),
    "a symlink": (header("x", type=tarfile.SYMTYPE, linkname="/etc/passwd"), "'x' is not a plain file"),
    "a hard link": (header("x", type=tarfile.LNKTYPE, linkname="/etc/passwd"), "'x' is not a plain file"),
    "a device": (header("x", type=tarfile.CHRTYPE, devmajor=1, devminor=5), "'x' is not a plain file"),
    "a FIFO": (header("x", type=tarfile.FIFOTYPE), "'x' is not a plain file"),
    "a type that nobody knows": (forged("x", 156, b"?"), "'x' is not a plain file"),
    "GNU sparse": (header("x", type=tarfile.GNUTYPE_SPARSE), "'x' is not a plain file"),
    "PAX sparse": (pax("x", GNU__sparse__major="1", GNU__sparse__realsize="9999999"), "'x' is not a plain file"),
    "a PAX path": (pax("x", path="../evil.JPEG"), "'../evil.JPEG' would lie outside"),
    "a PAX path for all": (GLOBAL({"path": "../evil.JPEG"}) + header("x"), "'../evil.JPEG' would lie outside"),
    "a PAX size": (pax("x", b"x", size="0"), "damaged after"),
    "a long PAX header": (pax("x", comment="c" * 100_000), "named 'x', not"),
    "a GNU long name": (header("long/" * 40 + "x"), "named 'x', not"),
    "a name in the wrong case": (lambda good: header(good.swapcase()), "named '"),
    "a name twice, in another folder": (lambda good: header(f"other/{good}"), "two members are named"),
    "no name": (header(""), "'' is not a plain file"),
    "a name with a line break": (header("x\ny.JPEG"), r"named 'x\ny.JPEG', not"),
    "a name that is not UTF-8": (forged("x", 0, b"caf\xe9.JPEG"), r"named 'caf\udce9.JPEG', not"),
    "a size of 8 GB": (forged("x", 124, b"77777777777\0"), "truncated within 'x'"),
    "a size of 2 to the 80": (forged("x", 124, b"\x80" + bytes(1) + b"\x01" + bytes(9)), "truncated within 'x'"),
    "a negative size": (forged("x", 124, b"\xff" * 12), "'x' is not a plain file"),
    "a size that is no number": (forged("x", 124, b"777777z7777\0"), "damaged after"),
    "a wrong checksum": (header("x").replace(b"x", b"y"), "damaged after"),
    "another tar after the end": (END + tar_bytes({"x.JPEG": b"x"}), "neither a member nor the archive's end"),
    "a tar": (header("n90000001.tar"), "named 'n90000001.tar', not"),
}
WHOLE = {
    "gzip": (gzip.compress, "compressed (gzip)"),
    "zstd": (lambda content: b"\x28\xb5\x2f\xfd" + content, "compressed (zstd)"),
    "zlib": (zlib.compress, "not a tar archive"),
    "nothing but zeros": (lambda content: bytes(1 << 20), "holds no files"),
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


@pytest.mark.parametrize("split", GOOD)
@pytest.mark.parametrize("case", [*MEMBERS, *WHOLE])
def test_a_hostile_archive_is_refused(tmp_path, split, case):
    good = tar_bytes(GOOD[split])
    if case in WHOLE:
        change, line = WHOLE[case]
        tar = change(good)
    else:
        content, line = MEMBERS[case]
        tar = good.removesuffix(END) + (content(next(iter(GOOD[split]))) if callable(content) else content) + END
    path = write_archive(split, tmp_path / "archives", tar)
    with watched_writes() as written, refused(path, *["n90000001.tar"] * (split == "train"), line):
        extracted(path, tmp_path / "out", split)
    assert not written


@pytest.mark.parametrize("split", GOOD)
def test_what_is_odd_but_harmless_is_survived(tmp_path, split):
    files = GOOD[split]
    first, *others = files
    harmless = [
        GLOBAL({"comment": "what git archive writes"}),
        header("images", type=tarfile.DIRTYPE),
        header("images/", size=0),  # a folder in the oldest format
        pax(f"./images/{first}", files[first], mtime="1340000000.25"),
        *(tar_member(name, files[name]) for name in reversed(others)),
    ]
    path = write_archive(split, tmp_path / "archives", b"".join(harmless) + END)
    data = extracted(path, tmp_path / "out", split)
    assert {s.file: s.image for s in data if s.file in files} == files


def test_an_enormous_image_is_extracted_without_being_decoded(tmp_path):
    path = write_archive("val", tmp_path / "archives", tar_bytes(GOOD["val"] | {val_name(1): enormous_jpeg()}))
    tracemalloc.start()
    data = extracted(path, tmp_path / "out")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 100 << 20  # bytes; its pixels would be 400 MB
    assert data[0].image == enormous_jpeg()


# ---- random mutations


def mutated_tar(tar: bytes, rng: random.Random) -> bytes:
    """A tar after accidents of any kind; in half of them a header says something else and its checksum is right."""
    headers = [i for i in range(0, len(tar) - 511, 512) if tar[i + 257 : i + 262] == b"ustar"]
    if not headers or rng.random() < 0.5:
        return mutated(tar, rng, block=rng.choice((1, 512)))
    at = rng.choice(headers)
    start, length = rng.choice([(0, 100), (124, 12), (156, 1), (157, 100), (257, 8), (345, 155)])
    evil = [rng.randbytes(length), b"../../../tmp/evil", b"/etc/x", b"77777777777", b"\x80" + bytes(10) + b"\1"]
    content = rng.choice(b"01234567ABDKLMNSVXgx\0").to_bytes() if length == 1 else rng.choice(evil)
    block = tar[at : at + start] + content[:length].ljust(length, b"\0") + tar[at + start + length : at + 512]
    return tar[:at] + with_checksum(block) + tar[at + 512 :]


def write_mutated(kind: str, folder: Path, rng: random.Random) -> Path:
    """Good archives, of which the tar named by ``kind`` is mutated."""
    if kind == "train":
        archives = TrainArchives(folder)
        if rng.random() < 0.5:
            archives.tar.write_bytes(mutated_tar(archives.tar.read_bytes(), rng))
        else:
            nested = {wnid: tar_bytes(images) for wnid, images in archives.images.items()}
            archives.write(nested | {"n90000003": mutated_tar(nested["n90000003"], rng)})
        return archives.tar
    archives = Archives(folder)
    if kind == "val":
        archives.tar.write_bytes(mutated_tar(archives.tar.read_bytes(), rng))
    else:
        archives.devkit.write_bytes(gzip.compress(mutated_tar(gzip.decompress(archives.devkit.read_bytes()), rng)))
    return archives.tar


def extract_mutated(kind: str, folder: Path, seeds: range) -> dict:
    """Extract an archive for each seed: what happened, at what cost. What must not happen is an AssertionError."""
    outcomes, seconds = Counter(), []
    for seed in seeds:
        sandbox = folder / str(seed)
        sandbox.mkdir()
        tar = write_mutated(kind, sandbox / "archives", random.Random(f"{kind} {seed}"))
        start, out = time.perf_counter(), sandbox / "out"
        with watched_writes() as written:
            try:
                data = extracted(tar, out, "train" if kind == "train" else "val")
                outcomes["survived"] += 1
                assert all(len(sample.image) < 1 << 20 for sample in data)
            except VitdemoError as error:
                assert "\n" not in str(error) and str(sandbox) in str(error), (seed, str(error))
                outcomes[re.sub(r"'.*?'|\d+|\S*/\S*", "…", str(error))] += 1
        seconds.append(time.perf_counter() - start)
        # a relative path is one in out/val.part/, or else in the working folder, which stays empty
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


@pytest.mark.parametrize("name", ["meta_mat", "ground_truth"])
def test_a_file_of_the_devkit_that_is_too_large_is_refused_unread(archives, name):
    write_devkit(archives.devkit, archives.ids, archives.truth, **{name: b"1\n" * (5 << 20)})
    with refused(archives.devkit, name.split("_")[0], "is larger than 8 MiB"):
        read_devkit(archives.devkit)

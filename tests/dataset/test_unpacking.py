"""Writing to a folder: whole or not at all, whatever interrupts it."""

import errno
import os
import subprocess
import sys
import tarfile

import pytest

from tests.dataset.conftest import largest_file, refused, tree
from vitdemo.dataset.extraction import extract_members
from vitdemo.dataset.tars import index_tar


@pytest.fixture
def targets(tar):
    return {f"x/{member.name}": member for member in index_tar(tar)}


EXPECTED = {f"x/{name}.bin": f"{name}.bin".encode() * 300 for name in "abc"}


def test_what_is_finished_may_lie_on_a_read_only_disk(tar, targets, tmp_path, monkeypatch):
    extract_members(tar, targets, tmp_path / "out", progress=False)

    def refuse(*args, **options):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr("vitdemo.dataset.extraction.FileLock", refuse)
    assert extract_members(tar, targets, tmp_path / "out", progress=False) == 0


def test_an_interrupted_extraction_is_finished_and_keeps_what_was_done(tar, targets, tmp_path):
    partial = tmp_path / "out.part"
    (partial / "x").mkdir(parents=True)
    (partial / "x/a.bin").write_bytes(EXPECTED["x/a.bin"])
    (partial / "x/b.bin").write_bytes(b"half")
    kept = (partial / "x/a.bin").stat().st_mtime_ns
    assert extract_members(tar, targets, tmp_path / "out", progress=False) == 2
    assert tree(tmp_path / "out") == EXPECTED and not partial.exists()
    assert (tmp_path / "out/x/a.bin").stat().st_mtime_ns == kept


@pytest.mark.parametrize("name", ["readme.txt", "x/other.bin", "y/a.bin"])
def test_a_folder_with_foreign_files_is_left_as_it_is(tar, targets, tmp_path, name):
    foreign = tmp_path / "out" / name
    foreign.parent.mkdir(parents=True)
    foreign.write_text("mine")
    with refused("not of this archive"):
        extract_members(tar, targets, tmp_path / "out", progress=False)
    assert tree(tmp_path / "out") == {name: b"mine"}


def test_a_planted_link_is_not_written_through(tar, targets, tmp_path):
    victim = tmp_path / "victim"
    victim.write_text("mine")
    (tmp_path / "out.part/x").mkdir(parents=True)
    (tmp_path / "out.part/x/a.bin").symlink_to(victim)
    with refused("x/a.bin", "not of this archive"):
        extract_members(tar, targets, tmp_path / "out", progress=False)
    assert victim.read_text() == "mine"


def test_too_little_room_is_seen_before_anything_is_written(tmp_path):
    tar = tmp_path / "huge.tar"
    info = tarfile.TarInfo("huge.bin")
    info.size = os.statvfs(tmp_path).f_bavail * os.statvfs(tmp_path).f_frsize + (10 << 30)
    tar.write_bytes(info.tobuf(tarfile.GNU_FORMAT))
    os.truncate(tar, 512 + info.size + 1024)  # a file of holes
    with refused(tmp_path, "free; make room"):
        extract_members(tar, {"x/huge.bin": index_tar(tar)[0]}, tmp_path / "out", progress=False)
    assert [path.name for path in tmp_path.iterdir()] == ["huge.tar"]


def test_a_write_that_the_system_refuses_ends_in_one_line_and_can_be_resumed(tar, targets, tmp_path):
    with largest_file(1000), refused("out", "run again"):
        extract_members(tar, targets, tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists()
    extract_members(tar, targets, tmp_path / "out", progress=False)
    assert tree(tmp_path / "out") == EXPECTED


HOLDING = """
import sys
from pathlib import Path
from vitdemo.dataset.tars import index_tar
from vitdemo.dataset import extraction as unpacking
tar, out = sys.argv[1:]
write = unpacking._write
def slow(*args):
    print("writing", flush=True)
    sys.stdin.readline()
    write(*args)
unpacking._write = slow
unpacking.extract_members(tar, {f"x/{m.name}": m for m in index_tar(tar)}, Path(out), progress=False)
"""


@pytest.mark.parametrize("state", ["new", "to be repaired"])
def test_of_two_extractions_at_once_the_second_is_refused(tar, targets, tmp_path, state):
    out = tmp_path / "out"
    if state != "new":
        extract_members(tar, targets, out, progress=False)
        (out / "x/b.bin").unlink()
    command = [sys.executable, "-c", HOLDING, str(tar), str(out)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as first:
        assert first.stdout.readline() == "writing\n"
        before = tree(tmp_path / "out.part")
        with refused(out, "another extraction to it runs"):
            extract_members(tar, targets, out, progress=False)
        assert tree(tmp_path / "out.part") == before and not out.exists()
        first.communicate("go on\n")
    assert first.returncode == 0 and tree(out) == EXPECTED
    assert extract_members(tar, targets, out, progress=False) == 0


def test_a_tar_that_shrinks_while_it_is_read_is_noticed(tar, targets, tmp_path):
    os.truncate(tar, 3000)
    with refused(tar, "became shorter", "b.bin"):
        extract_members(tar, targets, tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists()

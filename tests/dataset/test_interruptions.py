"""A real ``vitdemo extract``, killed at random moments or on a full disk, and then run again."""

import hashlib
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import pytest


class Undisturbed(NamedTuple):
    """What an extraction that nothing disturbs leaves, as path -> sha256, and how long it takes."""

    digests: dict[str, str]
    seconds: float


def command(archives: Path, out: Path) -> list:
    return [sys.executable, "-m", "vitdemo", "extract", "--unverified", "--archives", archives, "--out", out]


def digests(out: Path) -> dict[str, str]:
    return {str(p.relative_to(out)): hashlib.sha256(p.read_bytes()).hexdigest() for p in out.rglob("*") if p.is_file()}


@pytest.fixture(scope="module")
def undisturbed(thin_archives, tmp_path_factory) -> Undisturbed:
    out = tmp_path_factory.mktemp("undisturbed") / "out"
    seconds = []
    for _ in range(2):  # the first one also reads the program from the disk
        shutil.rmtree(out, ignore_errors=True)
        start = time.perf_counter()
        subprocess.run(command(thin_archives.folder, out), check=True, capture_output=True)
        seconds.append(time.perf_counter() - start)
    return Undisturbed(digests(out), min(seconds))


def state_of(out: Path) -> str:
    if not out.exists():
        return "before the first write"
    if (out / "val").exists():
        return "after the last rename"
    return "among the files" if (out / "val.part").exists() else "among the records"


@pytest.mark.parametrize("kills", [3, pytest.param(100, marks=pytest.mark.soak)])
def test_a_killed_extraction_is_finished_as_if_nothing_had_been(thin_archives, undisturbed, tmp_path, kills):
    moments, states, done = random.Random(kills), Counter(), 0
    attempts = iter(range(10 * kills))
    while done < kills:
        next(attempts)
        out = tmp_path / "out"
        child = subprocess.Popen(
            command(thin_archives.folder, out), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        time.sleep(moments.uniform(done, done + 1) / kills * undisturbed.seconds)  # a kill for each part of its time
        child.kill()
        if child.wait() == -signal.SIGKILL:
            done += 1
            states[state_of(out)] += 1
            if (out / "val.part").exists():
                assert not (out / "val").exists()
            again = subprocess.run(command(thin_archives.folder, out), capture_output=True, text=True)
            assert again.returncode == 0, again.stderr
            assert digests(out) == undisturbed.digests
        shutil.rmtree(out, ignore_errors=True)
    print(f"\n{done} kills within {undisturbed.seconds:.1f} s: {dict(states)}")
    assert kills < 100 or len(states) == 4 or states["among the files"] >= 10


# ---- a full disk


@pytest.fixture
def small_disk(tmp_path):
    """A disk of 60 MiB in memory; the files of the archives take 41."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=60m", "tmpfs", folder], capture_output=True, text=True
    )
    if mounted.returncode:
        pytest.skip(f"no small disk could be mounted: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)


def fill(disk: Path, leave: int = 0) -> Path:
    """Leave so many bytes of the disk free."""
    ballast = disk / "ballast"
    with open(ballast, "wb", buffering=0) as file:
        left = shutil.disk_usage(disk).free - leave
        while left > 0 and (written := file.write(bytes(min(left, 1 << 20)))):
            left -= written
    return ballast


def test_a_disk_that_is_too_small_is_refused_before_a_file_is_written(thin_archives, undisturbed, small_disk):
    ballast = fill(small_disk, leave=30 << 20)
    run = subprocess.run(command(thin_archives.folder, small_disk / "out"), capture_output=True, text=True)
    assert run.returncode == 2 and "needs 0.041 GB" in run.stderr.splitlines()[-1]
    assert not (small_disk / "out/val.part").exists()
    ballast.unlink()
    subprocess.run(command(thin_archives.folder, small_disk / "out"), check=True, capture_output=True)
    assert digests(small_disk / "out") == undisturbed.digests


def test_a_disk_that_others_fill_ends_in_one_line_and_goes_on_after_room_is_made(
    thin_archives, undisturbed, small_disk
):
    out = small_disk / "out"
    pipes = dict(stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    child = subprocess.Popen(command(thin_archives.folder, out), **pipes)
    while not any((out / "val.part").glob("*/*.JPEG")):
        assert child.poll() is None
        time.sleep(0.002)
    child.send_signal(signal.SIGSTOP)
    ballast = fill(small_disk)
    child.send_signal(signal.SIGCONT)
    _, stderr = child.communicate(timeout=60)
    assert child.returncode == 2 and "Traceback" not in stderr
    assert "the disk is full; make room and run again" in stderr.splitlines()[-1]
    kept = len(list((out / "val.part").glob("*/*.JPEG")))
    assert 0 < kept < 10_000 and not (out / "val").exists()
    ballast.unlink()
    again = subprocess.run(command(thin_archives.folder, out), capture_output=True, text=True, check=True)
    written = int(again.stdout.split(" written now")[0].split()[-1].replace(",", ""))
    assert 10_000 - kept <= written <= 10_001 - kept  # the file in hand may have been cut off
    assert digests(out) == undisturbed.digests

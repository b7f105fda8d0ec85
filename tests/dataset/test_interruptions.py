"""A real ``vitdemo extract``, killed or interrupted at random moments or on a full disk, and then run again."""

import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path

import pytest

from tests.dataset.conftest import tree


def command(archives: Path, out: Path) -> list:
    return [sys.executable, "-m", "vitdemo", "extract", "--unverified", "--archives", archives, "--out", out]


@pytest.fixture(scope="module")
def undisturbed(thin_archives, tmp_path_factory) -> tuple[dict[str, bytes], float]:
    """What an extraction that nothing disturbs leaves, and how many seconds it takes."""
    out = tmp_path_factory.mktemp("undisturbed") / "out"
    seconds = []
    for _ in range(2):  # the first one also reads the program from the disk
        shutil.rmtree(out, ignore_errors=True)
        start = time.perf_counter()
        subprocess.run(command(thin_archives.folder, out), check=True, capture_output=True)
        seconds.append(time.perf_counter() - start)
    return tree(out), min(seconds)


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
        time.sleep(moments.uniform(done, done + 1) / kills * undisturbed[1])  # a kill for each part of its time
        child.send_signal((signal.SIGKILL, signal.SIGINT)[done % 2])
        if child.wait() != 0:
            done += 1
            states[state_of(out)] += 1
            if (out / "val.part").exists():
                assert not (out / "val").exists()
            again = subprocess.run(command(thin_archives.folder, out), capture_output=True, text=True)
            assert again.returncode == 0, again.stderr
            assert tree(out) == undisturbed[0]
        shutil.rmtree(out, ignore_errors=True)
    print(f"\n{done} kills within {undisturbed[1]:.1f} s: {dict(states)}")
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
    ballast = small_disk / "ballast"
    with suppress(OSError), open(ballast, "wb", buffering=0) as file:
        while file.write(bytes(1 << 16)):
            pass
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
    assert tree(out) == undisturbed[0]

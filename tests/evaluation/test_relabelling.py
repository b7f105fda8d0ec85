"""What lies beside a data set to tell the orders of its classes."""

import shutil

import pytest

from tests.dataset.conftest import Archives, write_devkit
from vitdemo import extract
from vitdemo.evaluation.diagnosis import read_numbering


@pytest.fixture
def archives(tmp_path) -> Archives:
    return Archives(tmp_path / "archives")


@pytest.mark.parametrize("name", ["mini_devkit_t12.tar.gz", "devkit.tar.gz", "ILSVRC2012_devkit_t12.tar.gz"])
def test_a_devkit_beside_val_is_found_by_any_name(archives, tmp_path, name):
    data = extract(archives.folder, tmp_path / "out", unverified=True, progress=False)
    assert read_numbering(data).truth is None
    shutil.copy(archives.devkit, tmp_path / "out" / name)
    assert list(read_numbering(data).truth.values()) == archives.labels


def test_of_several_devkits_beside_val_ilsvrc2012s_is_taken(archives, tmp_path):
    data = extract(archives.folder, tmp_path / "out", unverified=True, progress=False)
    write_devkit(tmp_path / "out" / "a_devkit.tar.gz", archives.ids, [1] * 12)
    write_devkit(tmp_path / "out" / "z_devkit.tar.gz", archives.ids, [1] * 12)
    assert "it needs the devkit" in read_numbering(data).missing
    shutil.copy(archives.devkit, tmp_path / "out" / "ILSVRC2012_devkit_t12.tar.gz")
    assert list(read_numbering(data).truth.values()) == archives.labels

"""Opening large sets: 50,000 files within 5 s, 100,000 parquet rows within 3 s, 1 KB per image at most."""

import tracemalloc
from pathlib import Path

import pytest

from vitdemo.dataset.dataset import Dataset, open_data
from vitdemo.machine import now

pytestmark = pytest.mark.soak


def opened(path: Path, seconds: float) -> Dataset:
    start = now()
    data = open_data(path)
    took = now() - start
    del data
    tracemalloc.start()
    data = open_data(path)
    kept = tracemalloc.get_traced_memory()[0] / len(data)
    tracemalloc.stop()
    print(f"{path.name}: {len(data)} images opened in {took:.2f} s, {kept:.0f} bytes per image")
    assert took < seconds and kept < 1000
    return data


def test_fifty_thousand_files_in_a_thousand_folders(tmp_path):
    for k in range(1000):
        folder = tmp_path / "files" / f"class {k}"
        folder.mkdir(parents=True)
        for n in range(50):
            (folder / f"{n}.jpg").touch()
    assert len(opened(tmp_path / "files", 5)) == 50_000


def test_a_hundred_thousand_rows_of_parquet(tmp_path):
    pa = pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    import pyarrow.parquet

    image = {"bytes": b"jpeg" * 50}
    rows = [{"image": image | {"path": f"val_{k:08d}.JPEG"}, "label": k % 1000} for k in range(100_000)]
    pyarrow.parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet", row_group_size=1000)
    assert len(opened(tmp_path / "rows.parquet", 3)) == 100_000

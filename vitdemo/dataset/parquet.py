"""Parquet files of the Hugging Face hub (a column of image bytes, a column of labels), read one row group at a time."""

import json
import threading
from bisect import bisect_right
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from vitdemo.dataset.samples import Index, Item, counted
from vitdemo.dataset.trees import FOLDERS
from vitdemo.errors import VitdemoError, reason_of

PARQUET = ".parquet"
FOLDER = "data"  # the folder of the parquet files in a repository of the hub
LABEL_COLUMNS = ("label", "labels", "fine_label", "class", "target", "category")
INDEX = "__index_level_"  # how pandas names the column of its index
KEPT = 2  # row groups in memory: the current one and the next


def parquet_files(path: Path, split: str) -> list[Path]:
    """The parquet files of a split: ``path`` itself, or those in ``path`` or in its ``data/``.

    The files whose names begin with the split's name are taken; where there are none, those of no split are. Raises
    VitdemoError where all files belong to other splits.
    """
    if path.is_file():
        return [path] if path.suffix == PARQUET else []
    found = sorted(path.glob(f"*{PARQUET}")) or sorted((path / FOLDER).glob(f"*{PARQUET}"))
    found = [file for file in found if not file.name.startswith((".", "metadata"))]
    split_of = {file: file.name.replace(".", "-").partition("-")[0] for file in found}
    for folder in FOLDERS[split]:
        if own := [file for file in found if split_of[file] == folder]:
            return own
    others = [file for file in found if any(split_of[file] in folders for folders in FOLDERS.values())]
    if others and len(others) == len(found):
        raise VitdemoError(f"{path}: holds {others[0].name} …, and no parquet files of {split}; name one of them")
    return [file for file in found if file not in others]


def index_parquet(path: Path, files: list[Path]) -> Index:
    """Index the rows of parquet files as a data set.

    The image column holds bytes, or structs of ``bytes`` and ``path``. The label column is found by its name, or is the
    only other column of whole numbers or text. The names of the classes are in the schema's ``huggingface`` metadata
    [huggingface/datasets, ``Features`` and ``ClassLabel``]. An image is named by its path if every row has a different
    one, and otherwise by its file and row. The images stay in the order of the rows, because the hub's files are often
    shuffled, and each image in another order would read a whole row group again.

    Args:
        path: the user's path.
        files: the parquet files, in the order of their rows.

    Raises:
        VitdemoError: for files that lack such columns, have other columns than the first file, or are truncated, and
            where pyarrow is not installed.
    """
    rows = Rows(files)
    labels, paths = rows.columns()
    if names := rows.class_names():
        strange = next((label for label in labels if label is not None and not -1 <= label < len(names)), None)
        if strange is not None:
            raise VitdemoError(f"{path}: has the label {strange}, and names {len(names)} classes; get the files again")
        ids = [names[label] if label is not None and label >= 0 else "" for label in labels]
        classes = dict(zip(names, names, strict=True))
    else:
        ids = ["" if label in (None, -1) else str(label) for label in labels]
        classes = {name: name for name in sorted(set(ids) - {""})}
    if not all(paths) or len(set(paths)) < len(paths):
        paths = [f"{file.name}/{k:07d}" for file, count in zip(files, rows.counts, strict=True) for k in range(count)]
    items = [Item(file, class_id, -1, row) for row, (file, class_id) in enumerate(zip(paths, ids, strict=True))]
    if not items:
        raise VitdemoError(f"{path}: holds no rows; get the files again")
    notes = (f"read from {counted(len(files), 'parquet file')}, {files[0].name}{' …' if len(files) > 1 else ''}",)
    if rows.label is None and rows.unclear:
        notes += (f"no labels, as {', '.join(rows.unclear)} might all be; call the column label",)
    return Index(path, None, classes, items, notes, parquet=rows)


class Rows:
    """The rows of several parquet files, read one row group at a time. Threads may share it, and it can be pickled."""

    def __init__(self, files: Sequence[Path | str]):
        try:
            from pyarrow import parquet
        except ImportError:
            raise VitdemoError('parquet files need pyarrow: pip install "vitdemo[hf]"') from None
        self.files, self._handles, self._lock = [str(file) for file in files], [], threading.Lock()
        for file in self.files:
            try:
                self._handles.append(parquet.ParquetFile(file))
            except Exception as error:  # pyarrow's exceptions and OSError
                raise VitdemoError(f"{file}: not a complete parquet file ({reason_of(error)}); get it again") from None
        first = self._handles[0].schema_arrow
        for file, handle in zip(self.files, self._handles, strict=True):
            if handle.schema_arrow.names != first.names:
                other = f"has other columns than {Path(self.files[0]).name}"
                raise VitdemoError(f"{file}: {other}; give the files of one data set")
        self.image, self.label, self.unclear = self._columns_of(first)
        self.counts, self._groups, row = [handle.metadata.num_rows for handle in self._handles], [], 0
        for number, handle in enumerate(self._handles):
            for group in range(handle.metadata.num_row_groups):
                self._groups.append((row, number, group))
                row += handle.metadata.row_group(group).num_rows
        self.total_bytes = [Path(file).stat().st_size for file in self.files]
        self._images = lru_cache(KEPT)(self._read_group)

    def __reduce__(self) -> tuple:
        return Rows, (self.files,)

    def _columns_of(self, schema: Any) -> tuple[str, str | None, list[str]]:
        """The image column; the label column, None where there is none; and the columns among which it is unclear."""
        from pyarrow import types

        def holds_images(kind: Any) -> bool:
            inner = kind.field("bytes").type if types.is_struct(kind) and kind.get_field_index("bytes") >= 0 else kind
            return types.is_binary(inner) or types.is_large_binary(inner)

        def may_be_label(kind: Any) -> bool:
            text = types.is_string(kind) or types.is_large_string(kind) or types.is_dictionary(kind)
            return text or types.is_integer(kind) or types.is_boolean(kind)

        found = [field.name for field in schema if holds_images(field.type)]
        images = [name for name in found if name in ("image", "img", "jpg")] or found
        if len(images) != 1:
            hold = "several columns hold" if images else "no column holds"
            wrong = f"{hold} images as bytes, of {', '.join(schema.names)}"
            raise VitdemoError(f"{self.files[0]}: {wrong}; give files with one, called image")
        found = [field.name for field in schema if may_be_label(field.type) and not field.name.startswith(INDEX)]
        labels = [name for name in LABEL_COLUMNS if name in found] or found
        clear = len(labels) == 1 or labels and labels[0] in LABEL_COLUMNS
        return images[0], labels[0] if clear else None, found

    def class_names(self) -> list[str]:
        """The class name of each label, from the schema's metadata; [] where the metadata lacks them."""
        try:
            described = json.loads(self._handles[0].schema_arrow.metadata[b"huggingface"])
            return list(described["info"]["features"][self.label]["names"])
        except (TypeError, KeyError, ValueError):
            return []

    def columns(self) -> tuple[list, list]:
        """The labels and the paths of all rows, with None where a row has none."""
        labels, paths, inside = [], [], f"{self.image}.path"
        for file, handle in zip(self.files, self._handles, strict=True):
            try:
                table = handle.read(columns=[name for name in (self.label, inside) if name]).flatten()
            except Exception as error:
                raise VitdemoError(f"{file}: cannot be read ({reason_of(error)}); get it again") from None
            none = [None] * handle.metadata.num_rows
            labels += table.column(self.label).to_pylist() if self.label else none
            paths += table.column(inside).to_pylist() if inside in table.column_names else none
        return labels, [path and str(path).rpartition("/")[2] for path in paths]

    def image_bytes(self, row: int) -> bytes:
        """The image in a row. Raises VitdemoError where it cannot be read."""
        place = bisect_right(self._groups, row, key=lambda group: group[0]) - 1
        first, number, group = self._groups[place]
        with self._lock:
            cell = self._images(number, group)[row - first].as_py()
        cell = cell.get("bytes") if isinstance(cell, dict) else cell
        if cell is None:
            raise VitdemoError(f"{self.files[number]}: row {row - first} of row group {group} has no bytes")
        return cell

    def _read_group(self, number: int, group: int) -> Any:
        """The images of one row group of one file."""
        try:
            return self._handles[number].read_row_group(group, columns=[self.image]).column(0)
        except Exception as error:
            reason = reason_of(error)
            raise VitdemoError(f"{self.files[number]}: row group {group} cannot be read ({reason})") from None

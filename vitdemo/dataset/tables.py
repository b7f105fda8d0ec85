"""Labels from a table: of one's own, or the known ones of Kaggle, Tiny-ImageNet and Hugging Face's imagefolder."""

import io
import os
import re
from pathlib import Path

import pandas as pd

from vitdemo.dataset.samples import Index, Item, Listing, counted, image_suffixes, suffix_of
from vitdemo.dataset.trees import WNID, known_classes
from vitdemo.errors import VitdemoError, named_errors

TINY_IMAGENET = "val_annotations.txt"  # file, wnid and a box of four numbers, without a header
KNOWN = ("metadata.csv", "metadata.jsonl", TINY_IMAGENET)  # that lie among the images or above them
KAGGLE = "LOC_{split}_solution.csv"  # ImageId without suffix; PredictionString, which begins with the wnid
KAGGLE_ABOVE = 4  # folders between it and the images, at the most
LABEL_COLUMNS = "label labels class class_id class_name classname wnid synset category target y".split()
LABEL_COLUMNS += ["predictionstring"]
LOOKED_AT = 200  # rows by which the column of files is told


def index_by_table(listing: Listing, table: Path | str) -> Index:
    """The images that a table names, each with its label there.

    The column of files is the one whose values are files of the listing: by their paths in it, or in the table's
    folder, or with the listing's own folders before them; with or without a suffix. The column of labels is the one
    with a usual name for it (``label``, ``class``, ``wnid`` …), or the only one left.

    Args:
        listing: the images.
        table: a .csv, .tsv, .txt or .jsonl: a file, or the name of one in the listing.

    Raises:
        VitdemoError: for a table that cannot be read or understood, a row whose file is not there or whose label is
            empty, and two labels for one image.
    """
    if table in listing.others:
        where, rows = f"{listing.path}: {table}", read_table(listing.content(str(table)), str(table))
        prefix = str(table).rpartition("/")[0]
    else:
        with named_errors(table):
            where, rows = str(table), read_table(Path(table).read_bytes(), str(table))
        prefix = os.path.relpath(Path(table).absolute().parent, listing.path.absolute())
        prefix = "" if prefix == "." or prefix.startswith("..") else prefix
    names = _Names(listing, prefix)
    rows, files = _with_files(rows, names, listing, where)
    labels = rows[_label_column(rows, files, where)].str.strip()
    if str(files).lower() == "imageid":  # Kaggle's: a wnid, then a box of four numbers, again and again
        labels = labels.str.split().str[0].fillna("")
    label_of: dict[str, str] = {}
    for line, value, label in zip(rows.index, rows[files], labels, strict=True):
        name = names.find(value)
        if name is None:
            lost = sum(names.find(other) is None for other in rows[files])
            lacking = f"names {value!r}, which is not in {listing.path} ({counted(lost, 'such row')})"
            raise VitdemoError(f"{where}: row {line} {lacking}; correct the path, or take these rows out")
        if not label:
            raise VitdemoError(f"{where}: row {line}, {value!r}, has no label; give it one, or take it out")
        if label_of.setdefault(name, label) != label:
            raise VitdemoError(f"{where}: gives {name} two labels, {label_of[name]!r} and {label!r}; take one out")
    ids = sorted(set(label_of.values()))
    classes = known_classes(ids) if all(map(WNID.fullmatch, ids)) else {label: label for label in ids}
    items = [Item(name, label_of[name], *place) for name, place in listing.images.items() if name in label_of]
    rest = {name: place for name, place in listing.others.items() if name != str(table)}
    notes = [f"labels from {where}", *listing._replace(others=rest).notes()]
    if without := [name for name in listing.images if name not in label_of]:
        notes.append(f"left out: {counted(len(without), 'image')} that it does not name, such as {without[0]}")
    return Index(listing.path, listing.tar, classes, items, tuple(notes))


def known_table(listing: Listing, split: str) -> Path | str | None:
    """The table that comes with the images, by its name: in the listing, or Kaggle's above it; None without one."""
    for name in KNOWN:
        inside = sorted((other for other in listing.others if other.split("/")[-1] == name), key=len)
        if inside and inside[0].count("/") <= 1:
            first = listing.content(inside[0]).partition(b"\n")[0].decode("utf-8", "replace").lower()
            if name == TINY_IMAGENET or not set(re.findall(r"\w+", first)).isdisjoint(LABEL_COLUMNS):
                return inside[0]  # others may hold captions alone
    places = list(listing.path.absolute().parents)[:KAGGLE_ABOVE] if not listing.tar else []
    tables = (place / KAGGLE.format(split=split) for place in [listing.path, *places])
    return next((table for table in tables if table.is_file()), None)


def read_table(content: bytes, name: str) -> pd.DataFrame:
    """The cells of a table as text; its columns by the first row where that is a header, else by number.

    The index is the number of the row in the file, from 1.

    Args:
        content: the bytes of the file.
        name: the file's, whose suffix says the format: .jsonl, else text with commas, semicolons or tabs.

    Raises:
        VitdemoError: for what cannot be read as such.
    """
    try:
        text = content.decode("utf-8-sig")
        if suffix_of(name) in (".jsonl", ".ndjson"):
            table = pd.read_json(io.StringIO(text), lines=True, dtype=False).map(_text)
        else:
            separator = max("\t,;", key=text.partition("\n")[0].count)
            table = pd.read_csv(io.StringIO(text), sep=separator, header=None, dtype=str, keep_default_na=False)
    except UnicodeDecodeError:
        raise VitdemoError(f"{name}: is not text in UTF-8; save the table again as CSV in UTF-8") from None
    except ValueError as error:  # pandas' own are ValueErrors
        reason = f"cannot be read as a table ({' '.join(str(error).split())})"
        raise VitdemoError(f"{name}: {reason}; give one row per image, file and label") from None
    return table.set_axis(range(1, len(table) + 1))


def _text(value: object) -> str:
    return "" if value is None or value != value else str(value)


class _Names:
    """Finds the image that a table's cell means."""

    def __init__(self, listing: Listing, prefix: str):
        self.images, self.prefix = listing.images, prefix
        self.above = listing.path.absolute().parts
        self.short: dict[str, str | None] = {}  # base name or path without suffix -> path; None for several
        for name in listing.images:
            base = name.rpartition("/")[2]
            for short in {base, base.rpartition(".")[0], name.rpartition(".")[0]} - {name}:
                self.short[short] = name if self.short.get(short, name) == name else None

    def find(self, value: str) -> str | None:
        """The path in the listing, None where there is none, or where several images could be meant."""
        value = re.sub(r"^(\./)+", "", value.strip().replace("\\", "/"))
        tried = [f"{self.prefix}/{value}", value] if self.prefix else [value]
        steps = value.split("/")
        # The listing's own folders may stand before: of this machine, or only the last of them of another one.
        tried += ["/".join(steps[k:]) for k in range(len(steps) - 1, 0, -1) if steps[k - 1] == self.above[-1]]
        for path in tried:
            if path in self.images:
                return path
        return next((name for path in tried if (name := self.short.get(path))), None)


def _with_files(rows: pd.DataFrame, names: _Names, listing: Listing, where: str) -> tuple[pd.DataFrame, object]:
    """The rows without their header, and the column of files."""
    if rows.empty:
        raise VitdemoError(f"{where}: holds no rows; give one row per image, with its file and its label")

    def hits(column: pd.Series) -> int:
        return sum(names.find(value) is not None for value in column.iloc[:LOOKED_AT])

    found = {column: hits(rows[column]) for column in rows}
    files = max(found, key=found.get)
    if not found[files]:
        example = ", ".join(map(repr, rows.iloc[min(1, len(rows) - 1)].tolist()[:4]))
        image = next(iter(listing.images), "no image at all")
        wrong = f"no column names the images in {listing.path}, which are like {image!r}; a row of the table: {example}"
        raise VitdemoError(f"{where}: {wrong}; give paths that lie below the data set's folder")
    first = str(rows[files].iloc[0])
    if files in range(rows.shape[1]) and names.find(first) is None and suffix_of(first) not in image_suffixes():
        header = rows.iloc[0].str.strip()
        twice = header[header.duplicated()]
        if len(twice):
            raise VitdemoError(f"{where}: two columns have the name {twice.iloc[0]!r}; rename one")
        files, rows = header[files], rows.iloc[1:].set_axis(header, axis=1)
    return rows, files


def _label_column(rows: pd.DataFrame, files: object, where: str) -> object:
    others = [column for column in rows if column != files]
    named = [column for column in others if str(column).lower() in LABEL_COLUMNS]
    if where.endswith(TINY_IMAGENET):
        named = others[:1]
    if len(named) == 1 or len(others) == 1:
        return (named or others)[0]
    which = ", ".join(map(str, named or others)) or "none is left"
    raise VitdemoError(f"{where}: which column has the labels ({which})? call one `label`, and no other like it")

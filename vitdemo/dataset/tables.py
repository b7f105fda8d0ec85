"""Labels from a table: the user's own, or the known tables of Kaggle, Tiny-ImageNet and Hugging Face's imagefolder."""

import io
import os
import re
from pathlib import Path
from unicodedata import normalize

import pandas as pd

from vitdemo.dataset.samples import Index, Item, Listing, counted, image_suffixes, suffix_of
from vitdemo.dataset.trees import WNID, known_classes
from vitdemo.errors import VitdemoError, named_errors

TINY_IMAGENET = "val_annotations.txt"  # columns: file, wnid, and a box of four numbers; no header
KNOWN = ("metadata.csv", "metadata.jsonl", TINY_IMAGENET)  # tables that lie among the images or in a parent folder
KAGGLE = "LOC_{split}_solution.csv"  # columns: ImageId without suffix; PredictionString, which begins with the wnid
KAGGLE_ABOVE = 4  # the largest number of folders between this table and the images
LABEL_COLUMNS = "label labels class class_id classid class_name classname wnid synset category target y".split()
LABEL_COLUMNS += ["predictionstring"]
LOOKED_AT = 200  # the number of rows from which the column of files is found


def index_by_table(listing: Listing, table: Path | str) -> Index:
    """Index the images that a table names, each with its label from the table.

    The column of files is the one whose values are files of the listing. A value may be a path relative to the listing
    or to the table's folder, or may begin with the listing's own folders, and its suffix may be missing. The column of
    labels is the one with a usual name (``label``, ``class``, ``wnid`` …), or the only other column.

    Args:
        listing: the images.
        table: a .csv, .tsv, .txt or .jsonl: the path of a file, or the name of a file in the listing.

    Raises:
        VitdemoError: for a table that cannot be read or understood, a row with a missing file or an empty label, and
            two labels for one image.
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
    labels = rows[column := _label_column(rows, files, where)].str.strip()
    if str(column).lower() == "predictionstring":  # Kaggle's: a wnid and a box of four numbers, repeated
        labels = labels.str.split().str[0].fillna("")
    label_of: dict[str, str] = {}
    for line, value, label in zip(rows.index, rows[files], labels, strict=True):
        name = names.find(value)
        if name is None:
            lost = sum(names.find(other) is None for other in rows[files])
            base = re.split(r"[/\\]", value.strip())[-1]
            which = "of which there are several" if names.short.get(base, "") is None else "which is not"
            lacking = f"names {value!r}, {which} in {listing.path} ({counted(lost, 'such row')})"
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
    """The table with a known name that comes with the images: in the listing or, for Kaggle, above it; else None."""
    for name in KNOWN:
        inside = sorted((other for other in listing.others if other.split("/")[-1] == name), key=len)
        if inside and inside[0].count("/") <= 1:
            first = listing.content(inside[0]).partition(b"\n")[0].decode("utf-8", "replace").lower()
            if name == TINY_IMAGENET or not set(re.findall(r"\w+", first)).isdisjoint(LABEL_COLUMNS):
                return inside[0]  # a table without a label column may hold only captions
    places = list(listing.path.absolute().parents)[:KAGGLE_ABOVE] if not listing.tar else []
    if any("/" in name for name in listing.images):  # sorted into the classes' folders, as many users do
        return None
    tables = (place / KAGGLE.format(split=split) for place in [listing.path, *places])
    return next((table for table in tables if table.is_file()), None)


def read_table(content: bytes, name: str) -> pd.DataFrame:
    """Read the cells of a table as text; the columns of JSON lines have their names, all others have numbers.

    The index is the number of the row in the file, from 1.

    Args:
        content: the bytes of the file.
        name: the file's name, whose suffix gives the format: .json (a list of objects), .jsonl, or else text with
            commas, semicolons, tabs or blanks.

    Raises:
        VitdemoError: for a file that cannot be read as a table.
    """
    try:
        text = content.decode("utf-8-sig")
        if suffix_of(name) in (".json", ".jsonl", ".ndjson"):
            table = pd.read_json(io.StringIO(text), lines=suffix_of(name) != ".json", dtype=False)
        else:
            separator = max((r"\s+", "\t", ",", ";"), key=text.partition("\n")[0].count)  # blanks if there is no other
            table = pd.read_csv(io.StringIO(text), sep=separator, header=None, dtype=str, keep_default_na=False)
    except UnicodeDecodeError:
        raise VitdemoError(f"{name}: is not text in UTF-8; save the table again as CSV in UTF-8") from None
    except ValueError as error:  # the exceptions of pandas are ValueErrors
        reason = f"cannot be read as a table ({' '.join(str(error).split())})"
        raise VitdemoError(f"{name}: {reason}; give one row per image, file and label") from None
    table = table.map(lambda cell: "" if cell is None or cell != cell else str(cell))
    return table.set_axis(range(1, len(table) + 1))


class _Names:
    """Finds the image that a cell of a table names."""

    def __init__(self, listing: Listing, prefix: str):
        self.images = {normalize("NFC", name): name for name in listing.images}  # macOS writes é as two characters
        self.prefix = prefix
        self.above = listing.path.absolute().parts
        self.short: dict[str, str | None] = {}  # base name, or path without suffix -> path; None for several images
        for name in self.images:
            base = name.rpartition("/")[2]
            for short in {base, base.rpartition(".")[0], name.rpartition(".")[0]} - {name}:
                self.short[short] = name if self.short.get(short, name) == name else None

    def find(self, value: str) -> str | None:
        """The image's path in the listing; None where there is no such image, or several could be meant."""
        value = re.sub(r"^(\./)+", "", normalize("NFC", value.strip()).replace("\\", "/"))
        tried = [f"{self.prefix}/{value}", value] if self.prefix else [value]
        steps = value.split("/")
        # The value may begin with the listing's own folders, here or on another machine where only the last is equal.
        tried += ["/".join(steps[k:]) for k in range(len(steps) - 1, 0, -1) if steps[k - 1] == self.above[-1]]
        known = (path if path in self.images else self.short.get(path) for path in tried)
        return next((self.images[path] for path in known if path), None)


def _with_files(rows: pd.DataFrame, names: _Names, listing: Listing, where: str) -> tuple[pd.DataFrame, object]:
    """The rows without a header, and the name or number of the column of files."""
    if rows.empty:
        raise VitdemoError(f"{where}: holds no rows; give one row per image, with its file and its label")

    def points(column: pd.Series) -> int:
        """A name with its suffix counts twice, because the number of a row or class may name an image by chance."""
        hit = {value for value in column.iloc[:LOOKED_AT] if names.find(value) is not None}
        return len(hit) + sum(suffix_of(value.strip()) in image_suffixes() for value in hit)

    found = {column: points(rows[column]) for column in rows}
    files, *others = [column for column in found if found[column] == max(found.values())]
    for other in others if found[files] else ():
        if not rows[other].map(names.find).equals(rows[files].map(names.find)):
            both = f"{rows[files].iloc[0]!r} and {rows[other].iloc[0]!r} begin columns that both name images"
            raise VitdemoError(f"{where}: {both}, but not the same ones; leave out the one that holds no files")
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
    named = others[:1] if where.endswith(TINY_IMAGENET) else [c for c in others if str(c).lower() in LABEL_COLUMNS]
    named = [column for column in named if str(column).lower() != "classid"] or named  # a number, not the name
    if len(named) == 1 or len(others) == 1:
        return (named or others)[0]
    which = ", ".join(map(str, named or others)) or "none is left"
    raise VitdemoError(f"{where}: which column has the labels ({which})? call one `label`, and no other like it")

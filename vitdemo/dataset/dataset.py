"""``Dataset``, a labelled data set, and ``open_data``, which opens every supported format as one."""

import errno
import glob
import hashlib
import os
import weakref
from collections.abc import Iterator, Mapping, Sequence
from copy import copy
from functools import cached_property
from pathlib import Path

from vitdemo.dataset import trees
from vitdemo.dataset.imagenet import index_by_devkit, index_train_tar, index_val_tar
from vitdemo.dataset.parquet import PARQUET, index_parquet, parquet_files
from vitdemo.dataset.samples import Index, Item, Listing, Sample, UnreadableFile, counted, list_folder, list_tar
from vitdemo.dataset.tables import index_by_table, known_table
from vitdemo.dataset.tars import IMAGE_LIMIT, plain_tar
from vitdemo.dataset.trees import index_by_folder, index_by_name, of_split
from vitdemo.errors import VitdemoError, named_errors
from vitdemo.machine import message_stream
from vitdemo.paths import user_path

# These errors mean that a file was removed after indexing, or that the process has no file handles or memory left. They
# end the run, instead of being counted as an unreadable image.
NOT_THE_FILES_FAULT = {errno.ENOENT, errno.EMFILE, errno.ENFILE, errno.ENOMEM}
TAR_SUFFIXES = (".tar", ".tar.gz", ".tgz")
PACKED = (".zip", ".xz", ".bz2", ".zst", ".7z", ".rar")
TABLES = (".csv", ".tsv", ".txt", ".json", ".jsonl", ".ndjson")


class Dataset:
    """Samples in ascending order of ``file``, or of the rows in parquet files. ``open_data`` creates it.

    Several threads may read from one object at once. It can be pickled to a process that sees the same path.

    Attributes:
        path: the tar, the folder, or the folder or file of parquet data.
        source: "tar", "folder" or "parquet".
        classes: the ids of the classes (wnids, words or numbers) as text, in ascending order.
        class_names: the readable name of each class.
        files, sizes, labels: for each sample, its path in the data set; its size in bytes, -1 where it is unknown; the
            index of its class in ``classes``, -1 where it is unknown.
        offsets: for each sample, its offset in the tar in bytes, or its row in parquet files; 0 in a folder.
        decided: how the labels were matched with a model's outputs; "" before they are.
        matched_with: the sha256 of that model's weights.
        own_classes, own_names, own_labels: ``classes``, ``class_names`` and ``labels`` before they were matched.
    """

    def __init__(self, index: Index, opened: tuple = ()):
        self.path, self.opened, self.taken = index.path, opened, None
        self.source = "tar" if index.tar else "parquet" if index.parquet else "folder"
        self._file, self._parquet, self._in_folders = index.tar, index.parquet, index.in_folders
        self.classes, self.class_names, self.decided = list(index.classes), list(index.classes.values()), ""
        label = {class_id: position for position, class_id in enumerate(self.classes)} | {"": -1}
        items = index.items
        if enormous := next((item.file for item in items if item.size > IMAGE_LIMIT), None):
            limit = f"{IMAGE_LIMIT >> 20} MiB, and no image is"
            raise VitdemoError(f"{self.path}: {enormous!r} is larger than {limit}; take it out")
        self.files, self.sizes = [item.file for item in items], [item.size for item in items]
        self.labels, self.offsets = [label[item.class_id] for item in items], [item.offset for item in items]
        self.own_classes, self.own_names, self.own_labels = self.classes, self.class_names, self.labels
        self.matched_with = ""

    def take(self, indices: Sequence[int]) -> "Dataset":
        """The samples at ``indices``, which are ascending, as a data set."""
        other = copy(self)
        other.__dict__.pop("fingerprint", None)
        for name in ("files", "sizes", "labels", "offsets", "own_labels"):
            values = getattr(self, name)
            setattr(other, name, [values[i] for i in indices])
        other.taken = list(indices) if self.taken is None else [self.taken[i] for i in indices]
        return other

    def relabelled(
        self, classes: Sequence[str], class_names: Sequence[str], outputs: Mapping[int, int], decided: str, model: str
    ) -> "Dataset":
        """The same samples with a model's classes; each ``class_id`` stays the data set's own.

        Args:
            classes, class_names: the ids and names of the model's classes, by output.
            outputs: label of this data set -> output.
            decided: how the outputs were found.
            model: the sha256 of the model's weights.
        """
        other = copy(self)
        other.classes, other.class_names = list(classes), list(class_names)
        other.decided, other.matched_with = decided, model
        other.labels = [outputs[label] for label in self.labels]
        return other

    def unmatched(self) -> "Dataset":
        """The same samples with their own classes, before these were matched with a model's."""
        other = copy(self)
        other.decided = other.matched_with = ""
        other.classes, other.class_names, other.labels = self.own_classes, self.own_names, self.own_labels
        return other

    @cached_property
    def present(self) -> list[int] | None:
        """The labels that have images, ascending; None where all labels have some."""
        found = sorted(set(self.labels) - {-1})
        return found if len(found) < len(self.classes) else None

    @cached_property
    def _tar(self) -> int:
        """The file descriptor of the open tar. A process to which the data set was pickled opens its own."""
        with named_errors(self.path):
            descriptor = os.open(self._file, os.O_RDONLY)
        weakref.finalize(self, os.close, descriptor)
        return descriptor

    def __getstate__(self) -> dict:
        return {name: value for name, value in self.__dict__.items() if name not in ("_tar", "present")}

    def __repr__(self) -> str:
        counts = f"{len(self):,} images, {len(self.classes):,} classes"
        return f"{type(self).__name__}({counts}, {self.source} {self.path})"

    def __len__(self) -> int:
        return len(self.files)

    def __iter__(self) -> Iterator[Sample]:
        return (self[i] for i in range(len(self)))

    def __getitem__(self, i: int) -> Sample:
        file, size, own = self.files[i], self.sizes[i], self.own_labels[i]
        sample = Sample(file, b"", self.own_classes[own] if own >= 0 else "", self.labels[i])
        tar = self._tar if self._file else None
        try:
            with named_errors(self.path):  # pread needs no file position, which threads would share
                if tar is not None:
                    image = os.pread(tar, size, self.offsets[i])
                elif self._parquet:
                    image, size = self._parquet.image_bytes(self.offsets[i]), -1
                else:  # ILSVRC2012's images are named by their base names, see index_by_folder
                    folder = sample.class_id if self._in_folders and "/" not in file else ""
                    image = (self.path / folder / file).read_bytes()
        except VitdemoError as error:
            if getattr(error.__context__, "errno", None) in NOT_THE_FILES_FAULT:
                raise
            raise UnreadableFile(str(error), sample) from None
        if size not in (-1, len(image)):
            raise VitdemoError(f"{self.path}: {file} changed since it was indexed; open the data set again")
        return sample._replace(image=image)

    @cached_property
    def fingerprint(self) -> str:
        """The sha256 over name, size and label of all samples: equal for a tar and for the files extracted from it."""
        digest = hashlib.sha256()
        for row in zip(self.files, self.sizes, self.own_labels, strict=True):
            digest.update("{}\t{}\t{}\n".format(*row).encode("utf-8", "surrogateescape"))
        if self._parquet:
            digest.update(str(self._parquet.total_bytes).encode())
        return digest.hexdigest()

    @property
    def address(self) -> tuple:
        """The argument with which ``open_again`` opens this data set in another process, here or on another machine."""
        matched = self.classes, self.class_names, self.labels, self.decided, self.matched_with
        return self.opened, self.taken, self.fingerprint, matched


def open_again(address: tuple) -> Dataset:
    """Open the data set of an ``address`` from the same path on this process's machine.

    Raises:
        VitdemoError: where there is no data set, or one with other images.
    """
    (path, split, table), taken, fingerprint, matched = address
    data = open_data(path, split=split, labels=table, progress=False)
    data = data if taken is None or len(data) <= max(taken) else data.take(taken)
    if data.fingerprint != fingerprint:
        raise VitdemoError(f"{path}: holds other images here than on the first machine; copy it again")
    data.classes, data.class_names, data.labels, data.decided, data.matched_with = matched
    return data


def open_data(
    path: Path | str, *, split: str = "val", labels: Path | str | None = None, progress: bool = True
) -> Dataset:
    """Open a labelled data set. Which files are read and which are left out is printed.

    ``path`` is one of
    - a folder with one folder per class, with any names, or with such folders in its ``val/``, ``valid/``,
      ``validation/``, ``test/`` or ``testing/`` (``train/`` or ``training/`` for that split; the first that exists is
      read, in upper or lower case); or a tar or tar.gz of this;
    - a folder or tar of images whose labels are in a table (``labels``, or ``metadata.csv``, ``metadata.jsonl``,
      Tiny-ImageNet's ``val_annotations.txt``, or Kaggle's ``LOC_val_solution.csv`` at most four folders above), are the
      wnids at the ends of the file names, or are in ILSVRC2012's devkit next to its validation images;
    - parquet files of the Hugging Face hub, or a folder with them or with ``data/*.parquet``;
    - ILSVRC2012's archives ``<name>_img_val.tar`` (with ``<name>_devkit*.tar.gz`` next to it) and
      ``<name>_img_train.tar``, or a folder with them, or the folder that ``vitdemo extract`` wrote.

    Args:
        path: the file or folder.
        split: "val" or "train".
        labels: a table of labels, see ``index_by_table``.
        progress: show progress bars, and print what is read and left out.

    Raises:
        VitdemoError: when there is no data set, or it is unfinished or damaged.
    """
    if split not in trees.FOLDERS:
        known = ", ".join(trees.FOLDERS)
        raise VitdemoError(f"split: {split!r} is not one of {known}; give another split's folder as the data set")
    path = _local(path)
    labels = None if labels is None else _local(labels)
    with named_errors(path):
        path.stat()
        index, tree = _index(path, split, labels, progress)
    data = Dataset(index, (path, split, labels))
    record = trees.read_record(tree.parent, split) if tree and tree.name == split else None
    if record is not None and data.fingerprint != record.get("fingerprint"):
        counts = f"its {len(data)} images are not the {record.get('images')} that were extracted"
        raise VitdemoError(f"{data.path}: {counts}, names, sizes or labels differ; {trees.AGAIN}")
    notes = ([f"{tree.relative_to(path)}/ is read"] if tree and tree != path else []) + [*index.notes]
    if progress and notes and record is None:
        print(f"{path}: {'; '.join(notes)}", file=message_stream())
    return data


ImageNetVal = open_data  # the name that the notebooks use for ImageNet data


def _local(path: Path | str) -> Path:
    if "://" in str(path):
        raise VitdemoError(f"{path}: is a URL; download what is there, and give the file or folder")
    if Path(path).suffix.lower() in PACKED:
        raise VitdemoError(f"{path}: is packed; unpack it, and give what was in it")
    return user_path(path).absolute()


def _index(path: Path, split: str, labels: Path | None, progress: bool) -> tuple[Index, Path | None]:
    """The index of the data set at ``path``, and the folder that was read, None for archives."""
    tree = None if path.is_file() else trees.find_tree(path, split)
    own = path.name.endswith(("_img_val.tar", "_img_train.tar"))  # ILSVRC2012's
    if tree is None and (own or not path.is_file() or not path.name.endswith(TAR_SUFFIXES)):
        if path.suffix in TABLES:
            raise VitdemoError(f"{path}: is a table; give the folder of the images, and this as the labels (--labels)")
        tar = None if parquet_files(path, split) else trees.split_tar(path, split)
        if tar and labels:
            raise VitdemoError(f"{tar}: its format gives the labels; leave out {labels}")
        if tar:
            return index_val_tar(tar) if split == "val" else index_train_tar(tar, progress), None
    if files := parquet_files(path, split) or (tree and tree != path and parquet_files(tree, split)):
        if labels:
            raise VitdemoError(f"{path}: parquet files hold their labels; leave out {labels}")
        return index_parquet(path, files), None
    tested = labels and tree not in (None, path) and tree.name.casefold().startswith("test")
    train = trees.find_tree(path, "train") if tested and "test" not in labels.name.casefold() else path
    if train not in (path, None):  # numbers name images in both
        raise VitdemoError(f"{path}: give {train} or {tree}, whichever has the images that {labels.name} names")
    listing = list_folder(tree) if tree else list_tar(path, plain_tar(path, progress))
    notes = []
    if tree in (None, path) and not labels:
        listing, within = of_split(listing, split)
        notes = [f"{within} is read"] if within else []
    index = _labelled(listing, split, labels)
    index.notes = (*notes, *index.notes)
    return index, tree


def _labelled(listing: Listing, split: str, labels: Path | None) -> Index:
    if not listing.images:
        left = f"; {listing.notes()[0]}" if listing.unread or listing.broken else ""
        if packed := next((name for name in listing.others if name.endswith((*TAR_SUFFIXES, *PACKED, PARQUET))), None):
            cure = ", or give it" if packed.endswith(TAR_SUFFIXES) else ""
            left = f", but {packed}; " + ("give its folder" if packed.endswith(PARQUET) else f"unpack it{cure}")
        raise VitdemoError(f"{listing.path}: no data set, it holds no image{left}; {trees.expected(split)}")
    if table := labels or known_table(listing, split):
        return index_by_table(listing, table)
    index = index_by_folder(listing) or index_by_name(listing) or index_by_devkit(listing)
    if index is None:
        flat = f"{next(iter(listing.images))} and the other images lie flat in it, and nothing says their classes"
        cure = "give a table with one row per image, file and label (--labels FILE), or put the devkit next to them"
        raise VitdemoError(f"{listing.path}: {flat}; {cure}; `vitdemo predict` needs no labels")
    return index


def open_images(paths: Sequence[Path | str], *, progress: bool = True) -> Dataset:
    """Open images without labels as a data set.

    Args:
        paths: files, folders, tars, parquet files, and patterns such as ``photos/*.jpg``. A sample is named by its path
            relative to the common parent folder, or by its path in the tar.
        progress: show progress bars, and print what is left out.

    Raises:
        VitdemoError: for a path that does not exist, and where no path has an image.
    """
    places: list[Path] = []
    for given in paths:
        path = _local(given)
        matching = [path] if path.exists() else sorted(map(Path, glob.glob(str(path), recursive=True)))
        if not matching:
            raise VitdemoError(f"{given}: no such file or folder; check the path")
        places += matching
    if not places:
        raise VitdemoError("open_images: no paths were given; name files, folders or patterns")
    for place in places:
        is_tar = place.is_file() and place.name.endswith(TAR_SUFFIXES)
        with named_errors(place):
            files = [] if is_tar else parquet_files(place, "val")
            if (is_tar or files) and len(places) > 1:
                raise VitdemoError(f"{place}: an archive is read alone; give no other images with it")
            if files:
                if place.is_dir() and (images := list_folder(place).images):
                    both = f"holds {files[0].name} and {counted(len(images), 'image')}, such as {next(iter(images))}"
                    raise VitdemoError(f"{place}: {both}; give either of them alone")
                index = index_parquet(place, files)
                if progress:
                    print(f"{place}: {index.notes[0]}", file=message_stream())
                return Dataset(index)
            listing = list_tar(place, plain_tar(place, progress)) if is_tar else None
    if listing is None:
        folders = [place if place.is_dir() else place.parent for place in places]
        listing = list_folder(Path(os.path.commonpath(folders)), places)
    where, notes = f"{paths[0]}{' …' if len(paths) > 1 else ''}", "; ".join(listing.notes())
    if not listing.images:
        left = f" ({notes})" if notes else ""
        raise VitdemoError(f"{where}: holds no image that can be read here{left}; convert them to JPEG or PNG")
    if progress and notes:
        print(f"{where}: {notes}", file=message_stream())
    items = [Item(name, "", *place) for name, place in listing.images.items()]
    return Dataset(Index(listing.path, listing.tar, {}, items))

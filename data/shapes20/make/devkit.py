"""The development kit of shapes20, laid out as ILSVRC2012's: readme, ``meta.mat`` and the ground truth."""

import gzip
import io
import tarfile

import numpy as np
from scipy.io import savemat

from data.shapes20.make.classes import ANCESTORS, CLASSES
from data.shapes20.make.scenes import TRAIN_PICTURES, bundled_labels

TOP = "ILSVRC2012_devkit_t12"

README = """shapes20 development kit
========================

1,000 drawn pictures of 20 classes, 50 a class, in the layout of the ILSVRC2012 validation set. Nothing here
comes from ImageNet: the pictures are drawn by vitdemo/shapes20, and the WordNet IDs are invented (they lie
beyond every real one and mean nothing outside this data set).

data/meta.mat
    `synsets`: ILSVRC2012_ID, WNID, words, gloss, num_children, children, wordnet_height, num_train_images.
    IDs 1 to 20 are the classes (num_children is 0), higher ones their ancestors. An ID is not a class index:
    the class index is the rank of the WNID, from 0.
data/ILSVRC2012_validation_ground_truth.txt
    The ILSVRC2012_ID of every picture, one a line, in ascending order of the file names.
"""


def _meta_mat() -> bytes:
    fields = ["ILSVRC2012_ID", "WNID", "words", "gloss", "num_children", "children", "wordnet_height",
              "num_train_images"]  # fmt: skip
    none, each = np.zeros((0, 0), np.uint8), TRAIN_PICTURES // len(CLASSES)
    leaves = sorted(CLASSES, key=lambda leaf: leaf.ilsvrc_id)
    rows = [(leaf.ilsvrc_id, leaf.wnid, leaf.words, leaf.gloss, 0, none, 0, each) for leaf in leaves]
    for node in ANCESTORS:
        children = np.array([node.children], np.uint16)
        rows.append((node.ilsvrc_id, node.wnid, node.words, node.gloss, len(node.children), children, node.height, 0))
    synsets = np.zeros((len(rows), 1), [(field, object) for field in fields])
    synsets[:, 0] = rows
    buffer = io.BytesIO()
    savemat(buffer, {"synsets": synsets}, do_compression=True)
    # The first 116 bytes are free text, and scipy writes the date into it: the same file every time needs a constant.
    return b"MATLAB 5.0 MAT-file, shapes20".ljust(116) + buffer.getvalue()[116:]


def _ground_truth() -> bytes:
    return "".join(f"{CLASSES[label].ilsvrc_id}\n" for label in bundled_labels()).encode()


def tar_bytes(files: list[tuple[str, bytes]], folders: tuple[str, ...] = ()) -> bytes:
    """An uncompressed tar whose bytes depend on names and contents only: no date, no owner."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for folder in folders:
            entry = tarfile.TarInfo(folder)
            entry.type, entry.mode = tarfile.DIRTYPE, 0o755
            tar.addfile(entry)
        for name, content in files:
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    return buffer.getvalue()


def devkit_bytes() -> bytes:
    """``shapes20_devkit.tar.gz``."""
    files = [(f"{TOP}/readme.txt", README.encode()), (f"{TOP}/data/meta.mat", _meta_mat()),
             (f"{TOP}/data/ILSVRC2012_validation_ground_truth.txt", _ground_truth())]  # fmt: skip
    return gzip.compress(tar_bytes(files, (TOP, f"{TOP}/data")), mtime=0)

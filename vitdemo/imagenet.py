"""ILSVRC2012 from inside: its archives, the devkit, the train set, and what files say of themselves."""

from vitdemo import front

_HOME = {
    "ARCHIVE_MD5": "dataset.tars",
    "devkit_of": "dataset.devkit",
    "val_tar": "dataset.trees",
    "ImageNetTrain": "dataset.imagenet",
    "read_devkit": "dataset.devkit",
    "index_tar": "dataset.tars",
    "md5": "dataset.tars",
    "image_facts": "dataset.decoding",
}
__all__ = list(_HOME)
__getattr__, __dir__ = front("vitdemo.imagenet", _HOME)

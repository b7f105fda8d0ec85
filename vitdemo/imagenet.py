"""ILSVRC2012 from inside: its archives, the devkit, the train set, and what files say of themselves."""

from vitdemo import front

_NAMES_OF = {
    "dataset.tars": "ARCHIVE_MD5 index_tar md5",
    "dataset.devkit": "devkit_of read_devkit",
    "dataset.trees": "split_tar",
    "dataset.decoding": "image_facts",
}
__all__, __getattr__, __dir__ = front("vitdemo.imagenet", _NAMES_OF)

"""The namespace ``vitdemo.imagenet``: ILSVRC2012's archives and devkit, its train set, and facts from file headers."""

from vitdemo import front

_NAMES_OF = {
    "dataset.tars": "ARCHIVE_MD5 index_tar md5",
    "dataset.devkit": "devkit_of read_devkit",
    "dataset.trees": "split_tar",
    "dataset.decoding": "image_facts",
}
__all__, __getattr__, __dir__ = front("vitdemo.imagenet", _NAMES_OF)

"""A page of a data set: which images, and what their files say of themselves."""

import pandas as pd

from vitdemo.dataset.dataset import Dataset
from vitdemo.dataset.decoding import image_facts
from vitdemo.dataset.samples import Sample, UnreadableFile
from vitdemo.errors import VitdemoError
from vitdemo.plots.dataset import short_names


def pages_of(data: Dataset, label: int | None = None, per_page: int = 12) -> int:
    """How many pages ``browse`` has; at least 1."""
    return max(1, -(-len(_chosen(data, label)) // per_page))


def browse(data: Dataset, label: int | None = None, page: int = 1, per_page: int = 12) -> pd.DataFrame:
    """A page of the images of a class, or of all.

    Args:
        data: the data set.
        label: the class's index; None is all of them.
        page: which one, from 1.
        per_page: images on a page.

    Returns:
        One row per image, in the data set's order: index, class (its first name), and the columns of ``image_facts``.

    Raises:
        VitdemoError: for a page that is not there.
    """
    pages = pages_of(data, label, per_page)
    if not 1 <= page <= pages:
        raise VitdemoError(f"page {page}: there are 1 to {pages}")
    indices = _chosen(data, label)[(page - 1) * per_page : page * per_page]
    names = short_names(data)
    table = image_facts([sample_of(data, i) for i in indices])
    table.insert(0, "index", indices)
    table.insert(2, "class", [names[data.labels[i]] for i in indices])
    return table


def _chosen(data: Dataset, label: int | None) -> list[int]:
    return [i for i, own in enumerate(data.labels) if label is None or own == label]


def sample_of(data: Dataset, i: int) -> Sample:
    """``data[i]``, without bytes where the disk does not give them."""
    try:
        return data[i]
    except UnreadableFile as unreadable:
        return unreadable.sample

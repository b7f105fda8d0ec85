"""Matches a data set's classes with a model's outputs by their names."""

import csv
import io
import json
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from pathlib import Path
from unicodedata import normalize

from timm.utils.misc import natural_key

from vitdemo.dataset.dataset import Dataset
from vitdemo.dataset.samples import counted
from vitdemo.dataset.trees import WNID
from vitdemo.errors import VitdemoError, named_errors
from vitdemo.models.model import ModelInfo
from vitdemo.paths import user_path

ORDERS = ("sorted", "natural", "numbers")
HEADER = ["class", "output"]


def match_classes(info: ModelInfo, data: Dataset, class_map: Path | str | None = None) -> Dataset:
    """The data set with a model's outputs as labels. The data set may have only some of the model's classes.

    Classes are matched by names, and by position only where ``class_map`` says so. Equal ids match first, then ids and
    names that are equal without regard to case, blanks, hyphens and underscores. A name may be several synonyms with
    commas between them.

    Args:
        info: the model's info.
        data: the data set. One that is already matched, with this model or one with the same named classes, is returned
            unchanged if there is no ``class_map``.
        class_map: used instead of names: a file of rows ``class,output`` (.csv, .tsv) or a JSON object, with the data's
            class and the model's output by its name or number, where several classes may have the same output; or
            "sorted" for a checkpoint whose outputs are the folders sorted as text, as torchvision does; or "natural"
            for 2 before 10, as timm does; or "numbers" where a class's id is the output's number.

    Returns:
        The data set; its ``decided`` says how the classes were matched.

    Raises:
        VitdemoError: with the first class that has no output and the most similar outputs, or with the wrong row of
            ``class_map``.
    """
    if data.decided:
        named = info.classes is not None and data.classes == list(info.classes)
        if class_map is None and (named or data.matched_with == info.weights_sha256):
            return data
        data = data.unmatched()
    outputs = _Outputs(info, data)
    if -1 in data.labels:
        unlabelled = data.files[data.labels.index(-1)]
        raise VitdemoError(f"{data.path}: {unlabelled} has no label; `vitdemo predict` needs none")
    own = {label: data.classes[label] for label in sorted(set(data.labels))}
    if class_map is None:
        found, decided = _by_names(outputs, own, data)
    elif str(class_map) in ORDERS:
        found, decided = _by_order(outputs, str(class_map), own, data)
    else:
        found, decided = _by_file(outputs, user_path(class_map), own, data)
    names = outputs.names
    if not outputs.known and info.class_names is None:  # the data's classes name the outputs
        names = [f"output {k}" for k in range(info.outputs)]
        for output in set(found.values()):
            words = (data.class_names[label] for label in found if found[label] == output)
            names[output] = " or ".join(short_names(words))
    return data.relabelled(outputs.classes, names, found, decided, info.weights_sha256)


def plain(name: str) -> str:
    """A name in lower case, without blanks, hyphens and underscores; é is one character, which macOS writes as two."""
    return re.sub(r"[\s_-]+", "", normalize("NFC", name)).casefold()


def short_names(names: Iterable[str]) -> list[str]:
    """The first of each name's synonyms, which have ", " between them; the whole name where two would be the same."""
    pairs = [(name.split(", ")[0], name) for name in names]
    times = Counter(first for first, _ in pairs)
    return [first if times[first] == 1 else name for first, name in pairs]


class _Outputs:
    """A model's outputs, found by their ids and names."""

    def __init__(self, info: ModelInfo, data: Dataset):
        self.tag, self.known, self.count = info.tag, info.classes is not None, info.outputs
        self.classes = list(info.classes or map(str, range(self.count)))
        known = dict(zip(data.classes, data.class_names, strict=True))
        self.names = list(info.class_names or [known.get(class_id, class_id) for class_id in self.classes])
        self.by_id = {class_id: k for k, class_id in enumerate(self.classes)} if self.known else {}
        self.by_name: dict[str, set[int]] = {}
        for k, words in enumerate(zip(self.classes, self.names, strict=True) if self.known else ()):
            for word in (*words, *words[1].split(",")):
                self.by_name.setdefault(plain(word), set()).add(k)

    def find(self, *names: str) -> int | None:
        """The output for the first of these names that belongs to exactly one output; None where there is none."""
        if names and names[0] in self.by_id:
            return self.by_id[names[0]]
        for name in names:
            if len(found := self.by_name.get(plain(name), ())) == 1:
                return next(iter(found))
        return None

    def shared(self, name: str) -> list[str]:
        """The outputs that share a name; an empty list where only one output has it."""
        found = sorted(self.by_name.get(plain(name), ()))
        return [f"{self.classes[k]} (number {k})" for k in found] if len(found) > 1 else []

    def nearest(self, name: str) -> str:
        """The outputs with the names most similar to ``name``, for messages."""
        near = [] if WNID.fullmatch(name) else get_close_matches(plain(name), self.by_name, n=3)
        shown = dict.fromkeys(self.shown(min(self.by_name[word])) for word in near)
        return f"; the nearest: {', '.join(shown)}" if shown else f"; its outputs are {self.some()}"

    def shown(self, k: int) -> str:
        name = self.names[k].split(",")[0]
        return repr(self.classes[k]) + (f" ({name})" if name != self.classes[k] else "")

    def some(self) -> str:
        return ", ".join(map(self.shown, range(min(3, self.count)))) + (" …" if self.count > 3 else "")


def _by_names(outputs: _Outputs, own: dict[int, str], data: Dataset) -> tuple[dict[int, int], str]:
    advice = _advice(own.values())
    if not outputs.known:
        raise VitdemoError(f"{outputs.tag}: nothing says which class each of its {outputs.count} outputs is; {advice}")
    found = {k: outputs.find(own[k], data.class_names[k], *data.class_names[k].split(",")) for k in own}
    if missing := [own[k] for k in own if found[k] is None]:
        several = f" ({len(missing)} of {len(own)} have none)" if len(missing) > 1 else ""
        shared = outputs.shared(missing[0])
        why = f"; {' and '.join(shared)} share this name" if shared else outputs.nearest(missing[0])
        wrong = f"no output of {outputs.tag} is its class {missing[0]!r}{several}{why}"
        raise VitdemoError(f"{data.path}: {wrong}; {advice}")
    output, times = Counter(found.values()).most_common(1)[0] if found else (0, 0)
    if times > 1:
        both = " and ".join(repr(own[label]) for label, other in found.items() if other == output)
        wrong = f"its classes {both} are both output {outputs.shown(output)} of {outputs.tag} by name"
        raise VitdemoError(f"{data.path}: {wrong}; --class-map FILE may say so on purpose")
    equal = all(outputs.classes[output] == own[label] for label, output in found.items())
    return found, "by equal ids" if equal else "by names, without case, blanks, hyphens and underscores"


def _advice(ids: Iterable[str]) -> str:
    """The --class-map options that the user can give for class ids like these."""
    file = "give --class-map FILE with rows class,output"
    if all(map(str.isdecimal, ids)):
        return f"{file}, --class-map numbers if a class's number is its output, or natural for the numbers' order"
    return f"{file}, --class-map sorted if the outputs are the folders sorted as text, or natural for 2 before 10"


def _by_order(outputs: _Outputs, order: str, own: dict[int, str], data: Dataset) -> tuple[dict[int, int], str]:
    option = f"--class-map {order}"
    if order == "numbers":
        for class_id in own.values():
            if not class_id.isdecimal() or int(class_id) >= outputs.count:
                last = outputs.count - 1
                raise VitdemoError(f"{option}: the class {class_id!r} of {data.path} is no number from 0 to {last}")
        return {label: int(class_id) for label, class_id in own.items()}, "by numbers, the class's id is the output"
    some = len(data.classes) != outputs.count and WNID.fullmatch(data.classes[0])  # of ImageNet's, which are all known
    ids = sorted(own.values() if some else data.classes, key=natural_key if order == "natural" else None)
    if len(ids) != outputs.count:
        why = "an order needs all classes to be there; --class-map FILE may name only some"
        counts = f"{data.path} has {len(ids)} classes and {outputs.tag} {outputs.count} outputs"
        raise VitdemoError(f"{option}: {counts}; {why}")
    place = {class_id: k for k, class_id in enumerate(ids)}
    found = {label: place[class_id] for label, class_id in enumerate(data.classes) if class_id in place}
    return found, "by order, the folders " + ("as text" if order == "sorted" else "with 2 before 10")


def _by_file(outputs: _Outputs, path: Path, own: dict[int, str], data: Dataset) -> tuple[dict[int, int], str]:
    label_of, found, absent = {normalize("NFC", class_id): label for label, class_id in own.items()}, {}, []
    known_classes = {normalize("NFC", class_id) for class_id in data.classes}
    for number, class_id, output in _rows(path):
        if class_id not in known_classes:
            absent.append(class_id)
        at = outputs.find(output)
        if at is None and output.isdecimal() and int(output) < outputs.count:
            at = int(output)
        if at is None:
            many = outputs.shared(output)
            known = f"are {' and '.join(many)}; give the number" if many else f"0 to {outputs.count - 1}, or a name"
            near = "" if output.isdecimal() or many or not outputs.known else outputs.nearest(output)
            raise VitdemoError(f"{path}: row {number}: {output!r} is no output of {outputs.tag}: {known}{near}")
        if (label := label_of.get(class_id)) is not None and found.setdefault(label, at) != at:
            raise VitdemoError(f"{path}: row {number}: {class_id!r} has another output in a row before; take one out")
    if missing := [class_id for label, class_id in own.items() if label not in found]:
        near = f"; is {absent[0]!r}, which {data.path} has not, meant?" if absent else ""
        lack = f"has no row for the class {missing[0]!r} of {data.path} ({len(missing)} lack one){near}"
        raise VitdemoError(f"{path}: {lack}; give each class a row")
    beside = f", with {counted(len(absent), 'row')} for classes that are not in the data" if absent else ""
    return found, f"by the file {path.name}{beside}"


def _rows(path: Path) -> list[tuple[int, str, str]]:
    """The number, class and output of each row. Raises VitdemoError for a file in another format."""
    with named_errors(path, f"; or give one of {', '.join(ORDERS)}"):
        content = path.read_bytes()
    try:
        text = content.decode("utf-8-sig")
        if path.suffix == ".json":
            pairs: Sequence = list(dict(json.loads(text)).items())
        else:
            comma = max(",\t;", key=text.partition("\n")[0].count)
            pairs = [row for row in csv.reader(io.StringIO(text, newline=""), delimiter=comma) if row]
            pairs = pairs[1:] if pairs and [cell.strip().lower() for cell in pairs[0]] == HEADER else pairs
    except (ValueError, TypeError, csv.Error) as error:
        raise VitdemoError(f"{path}: cannot be read ({error}); give rows class,output, or a JSON object") from None
    for number, row in enumerate(pairs, start=1):
        if len(row) != 2:
            columns = f"{len(row)} columns, not two: {','.join(row)!r}"
            raise VitdemoError(f"{path}: row {number} has {columns}; see class,output")
    if not pairs:
        raise VitdemoError(f"{path}: is empty; give rows class,output")
    return [
        (number, *(normalize("NFC", str(cell).strip()) for cell in (a, b)))
        for number, (a, b) in enumerate(pairs, start=1)
    ]

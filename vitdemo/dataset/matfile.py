"""A struct array out of a MAT-file, read without trust.

``scipy.io.loadmat`` believes what a file declares: one of 1 MB that nests deeply ends the process, one of 300 bytes
takes gigabytes. Here nothing is followed but the two levels that a devkit has, and nothing is larger than its bytes.
Format: level 5, little-endian, which MATLAB has written since 1996 [MathWorks, "MAT-File Format", chapter 1].
"""

import struct
import zlib
from collections.abc import Iterator
from itertools import islice

LIMIT = 8 << 20  # bytes of all variables together, inflated; 1,860 synsets come to about 1.3 MB
VALUES_LIMIT = 1 << 16  # values in a struct array; 1,860 synsets have 14,880
COMPRESSED, MATRIX = 15, 14
STRUCT, CHAR = 2, 4  # classes of arrays; 6 to 15 are numeric
NUMBERS = {1: "b", 2: "B", 3: "h", 4: "H", 5: "i", 6: "I", 7: "f", 9: "d", 12: "q", 13: "Q"}
TEXTS = {1: "latin-1", 2: "latin-1", 4: "utf-16-le", 16: "utf-8", 17: "utf-16-le"}


def read_struct_array(content: bytes, variable: str) -> list[dict[str, str | float | None]]:
    """The elements of a struct array in a MAT-file, each as field -> value.

    A value is a str for a row of characters, a number for a scalar, and None for anything else, which is not
    looked into. Raises ValueError for a file that is damaged, of another format, or too large, and without the
    variable.
    """
    if len(content) < 128 or content[126:128] != b"IM":
        raise ValueError("no MAT-file of level 5, little-endian")
    left = LIMIT
    for kind, data in _elements(memoryview(content)[128:]):
        if kind == COMPRESSED:
            inflater = zlib.decompressobj()
            try:
                data = memoryview(inflater.decompress(data, left + 1))
            except zlib.error as error:
                raise ValueError(str(error)) from None
            left -= len(data)
            if left < 0 or not inflater.eof:
                raise ValueError("a variable that is cut off, or too large")
            kind, data = next(_elements(data), (0, data))
        if kind != MATRIX:
            continue
        array_class, name, body = _array(data)
        if name == variable and array_class == STRUCT:
            return _rows(body)
    raise ValueError(f"no struct array {variable}")


def _elements(data: memoryview) -> Iterator[tuple[int, memoryview]]:
    """Type and bytes of each data element; small ones share eight bytes with their tag."""
    offset = 0
    while offset < len(data):
        if offset + 8 > len(data):
            raise ValueError("an element without its tag")
        kind, size = struct.unpack_from("<II", data, offset)
        start, small = offset + 8, kind >> 16
        if small:
            kind, size, start = kind & 0xFFFF, small, offset + 4
        if start + size > len(data) or (small and size > 4):
            raise ValueError("an element that is larger than its place")
        yield kind, data[start : start + size]
        padded = size if kind == COMPRESSED else -(-size // 8) * 8
        offset += 8 if small else 8 + padded


def _array(data: memoryview) -> tuple[int, str, Iterator[tuple[int, memoryview]]]:
    """The class of an array, its name, and the elements that follow: flags, dimensions and name come first."""
    elements = _elements(data)
    head = [bytes(content) for _, content in (next(elements, (0, b"")) for _ in range(3))]
    if not head[0]:
        return 0, "", iter(())
    return head[0][0], head[2].decode("latin-1"), elements


def _rows(elements: Iterator[tuple[int, memoryview]]) -> list[dict]:
    """The elements of a struct array: a width, the fields' names in that width, then each element's values."""
    (_, width), (_, names) = next(elements, (0, b"")), next(elements, (0, b""))
    width = int.from_bytes(width, "little")
    if not 0 < width <= len(names):
        raise ValueError("a struct array without fields")
    fields = [bytes(names[i : i + width]).split(b"\0")[0].decode("latin-1") for i in range(0, len(names), width)]
    values = [_value(data) if kind == MATRIX else None for kind, data in islice(elements, VALUES_LIMIT + 1)]
    if len(values) > VALUES_LIMIT:
        raise ValueError(f"a struct array of more than {VALUES_LIMIT:,} values")
    if len(values) % len(fields):
        raise ValueError("a struct array whose last element is cut off")
    return [dict(zip(fields, values[i : i + len(fields)], strict=True)) for i in range(0, len(values), len(fields))]


def _value(data: memoryview) -> str | float | None:
    array_class, _, elements = _array(data)
    kind, content = next(elements, (0, b""))
    if array_class == CHAR:
        return bytes(content).decode(TEXTS.get(kind, "utf-8"))
    if 6 <= array_class <= 15 and kind in NUMBERS and len(content) == struct.calcsize(NUMBERS[kind]):
        return struct.unpack("<" + NUMBERS[kind], content)[0]
    return None

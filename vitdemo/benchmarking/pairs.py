"""Chooses the pairs of engine and precision that are measured."""

from collections.abc import Sequence
from typing import NamedTuple

from vitdemo.engines.contract import Engine, find_engines
from vitdemo.errors import VitdemoError

NULL_ENGINE = "null"  # it measures the harness, and is not compared with other engines


class Pair(NamedTuple):
    """An engine in a precision."""

    engine: str
    precision: str

    def __str__(self) -> str:
        return f"{self.engine}:{self.precision}"


EAGER = Pair("eager", "fp32")  # the reference


def choose_pairs(engines: Sequence[str] | str | None, device: str = "auto") -> list[Pair]:
    """The pairs that ``engines`` names, each once, after eager in fp32 and in each of their precisions that it has.

    Args:
        engines: names such as "openvino:int8", in a list or with commas. A name without a precision stands for the
            engine's native precisions here, and None stands for those of every engine. An emulated precision is
            measured only if it is named, and then without eager in the same precision if eager emulates it too.
        device: the device on which they have to be native, as in ``convert``.

    Raises:
        VitdemoError: for an unknown engine or precision, with a list of the known ones.
    """
    known = {name: cls for name, cls in find_engines().items() if name != NULL_ENGINE}
    every = [name for name, cls in known.items() if _native(cls, device)]
    names = engines.split(",") if isinstance(engines, str) else every if engines is None else engines
    chosen = [pair for name in names for pair in _pairs_of(name.strip(), known, device)]
    if not chosen:
        raise VitdemoError("engines: there are none; give some, such as eager:fp32,openvino:int8")
    asked = {EAGER.precision, *(pair.precision for pair in chosen)}
    eager = [Pair(EAGER.engine, precision) for precision in _native(known[EAGER.engine], device) if precision in asked]
    return list(dict.fromkeys([*eager, *chosen]))


def _pairs_of(name: str, known: dict[str, type[Engine]], device: str) -> list[Pair]:
    engine, colon, precision = name.partition(":")
    if engine not in known:
        raise VitdemoError(f"engines {name!r}: there is no such engine; there are {', '.join(known)}")
    if colon and precision not in known[engine].precisions:
        raise VitdemoError(f"engines {name!r}: the {engine} engine has {', '.join(known[engine].precisions)}")
    if not colon and not _native(known[engine], device):
        every = ", ".join(f"{engine}:{each}" for each in known[engine].precisions)
        raise VitdemoError(f"engines {name!r}: none of its precisions is native here; name {every} to have it emulated")
    return [Pair(engine, each) for each in ([precision] if colon else _native(known[engine], device))]


def _native(engine: type[Engine], device: str) -> tuple[str, ...]:
    """An engine's native precisions; all of them if its runtime does not start, so that its rows give the reason."""
    try:
        return engine.native(device)
    except VitdemoError:
        return engine.precisions

"""Engines and precisions as parameters of tests: those that this processor has to emulate are skipped, with the reason.

``tests/engines/test_masks.py`` runs emulated and absent ones on any processor, on small models.
"""

import os

import pytest

from vitdemo import find_engines


def is_native(engine: str, precision: str) -> bool:
    return precision in find_engines()[engine].native()


def unless_native(engine: str, precision: str):
    """The mark that skips a test."""
    return pytest.mark.skipif(not is_native(engine, precision), reason=f"{engine} {precision} is not native here")


def native_or_skip(engine: str, precision: str):
    """The parameters (engine, precision) of a test."""
    return pytest.param(engine, precision, marks=unless_native(engine, precision), id=f"{engine}-{precision}")


def precisions_of(engine: str) -> list:
    """The precisions of ``engine`` as parameters of a test."""
    precisions = find_engines()[engine].precisions
    return [pytest.param(each, marks=unless_native(engine, each), id=each) for each in precisions]


def name_in_precision_ran(engine: str, precision: str) -> str:
    """``bf16``, or ``bf16 emulated`` where it is."""
    return precision if is_native(engine, precision) else f"{precision} emulated"


def is_masked_to_avx2() -> bool:
    return os.environ.get("ONEDNN_MAX_CPU_ISA", "").startswith("AVX2")

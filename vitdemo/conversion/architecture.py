"""A fingerprint of what a module computes with its weights, which are fingerprinted apart."""

import hashlib
import inspect
from contextlib import suppress
from functools import partial
from types import CodeType

import torch
from torch import nn

OF_TORCH = set(vars(nn.Module())) - {"training"}  # what every module holds: parameters, hooks …


def architecture_sha256(module: nn.Module) -> str:
    """sha256 of what a module computes with its weights.

    That is its repr, its classes' source, and the values its parts hold: a LayerNorm's eps and the kind of a GELU are
    in no state dict. Of functions and classes typed into a notebook also the values and functions that they name.
    """
    digest = hashlib.sha256(repr(module).encode())
    own = {cls for part in module.modules() for cls in type(part).__mro__} - {nn.Module, object}
    for cls in sorted(own, key=lambda cls: (cls.__module__, cls.__qualname__)):
        digest.update(f"{cls.__module__}.{cls.__qualname__}\n{source_of(cls)}".encode())
    for name, part in module.named_modules():
        held = {key: value for key, value in vars(part).items() if key not in OF_TORCH}
        digest.update(f"{name} {_told(held)}\n".encode())
    return digest.hexdigest()


def source_of(thing: object) -> str:
    """The source of a class, a function or a module; of one that has none, as one typed into a notebook, its code."""
    return _source(thing, ())


def _source(thing: object, around: tuple) -> str:
    if getattr(thing, "__module__", None) != "__main__":  # for what is typed in, Python 3.13 gives another file's lines
        with suppress(OSError, TypeError):
            return inspect.getsource(thing)
    name = getattr(thing, "__qualname__", type(thing).__qualname__)
    if not inspect.isclass(thing):
        return name
    own = {key: value for key, value in vars(thing).items() if inspect.isfunction(value) or not key.startswith("__")}
    return f"{name} {_told(own, around)}"


def _told(value: object, around: tuple = ()) -> str:
    """What a value adds to what is computed, the same wherever it lies in memory; "" where that cannot be said.

    around: the ids of the values that this one lies in, as a function may name itself.
    """
    if id(value) in around:
        return ""
    around = (*around, id(value))
    if value is None or isinstance(value, (int, float, str, torch.dtype)):
        return repr(value)
    if isinstance(value, dict):
        return str(sorted((str(key), _told(each, around)) for key, each in value.items()))
    if isinstance(value, (list, tuple)):
        return str([_told(each, around) for each in value])
    if isinstance(value, torch.Tensor):
        return _sha256(value)
    if isinstance(value, property):
        return _told((value.fget, value.fset), around)
    if isinstance(value, partial):
        return _told((value.func, value.args, value.keywords), around)
    if isinstance(value, (staticmethod, classmethod)) or inspect.ismethod(value):
        return _told(value.__func__, around)
    if inspect.isfunction(value):
        held = value.__defaults__, value.__kwdefaults__, _closure(value), _named(value)
        return f"{_source(value, around)} {_code(value.__code__)} {_told(held, around)}"
    return _source(value, around) if callable(value) else ""


def _sha256(tensor: torch.Tensor) -> str:
    if tensor.dtype == torch.bfloat16:  # which numpy does not know
        tensor = tensor.float()
    return hashlib.sha256(tensor.numpy(force=True).tobytes()).hexdigest()


def _closure(function) -> list:
    """What a function takes from the functions around it, as far as it has a value."""
    held = []
    for cell in function.__closure__ or ():
        with suppress(ValueError):  # an empty one
            held.append(cell.cell_contents)
    return held


def _named(function) -> dict:
    """What a function typed into a notebook takes from other cells: a module's own source has it all."""
    if function.__module__ != "__main__":
        return {}
    return {name: function.__globals__[name] for name in _names(function.__code__) if name in function.__globals__}


def _names(code: CodeType) -> set[str]:
    inner = (value for value in code.co_consts if isinstance(value, CodeType))
    return set(code.co_names).union(*map(_names, inner))


def _code(code: CodeType) -> str:
    """A function's bytecode, names and constants, those of the functions in it included."""
    constants = [_code(value) if isinstance(value, CodeType) else _repr(value) for value in code.co_consts]
    return f"{code.co_code.hex()} {code.co_names} {constants}"


def _repr(value: object) -> str:
    return repr(sorted(map(repr, value))) if isinstance(value, frozenset) else repr(value)  # whose order is by chance

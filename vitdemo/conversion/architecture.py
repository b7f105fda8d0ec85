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

    That is its repr, its classes' source, and the plain values its parts hold: a LayerNorm's eps and the kind of a
    GELU are in no state dict.
    """
    digest = hashlib.sha256(repr(module).encode())
    own = {cls for part in module.modules() for cls in type(part).__mro__ if issubclass(cls, nn.Module)}
    for cls in sorted(own - {nn.Module}, key=lambda cls: (cls.__module__, cls.__qualname__)):
        digest.update(f"{cls.__module__}.{cls.__qualname__}\n{source_of(cls)}".encode())
    for name, part in module.named_modules():
        held = {key: value for key, value in vars(part).items() if key not in OF_TORCH}
        plain = {key: value for key, value in held.items() if _is_plain(value)}
        calls = {key: source_of(value) + _behaviour(value) for key, value in held.items() if callable(value)}
        tensors = {key: _sha256(value) for key, value in held.items() if _is_tensor(value)}
        digest.update(f"{name} {sorted(plain.items())} {sorted(calls.items())} {sorted(tensors.items())}\n".encode())
    return digest.hexdigest()


def _is_plain(value: object) -> bool:
    if isinstance(value, dict):
        return all(map(_is_plain, (*value, *value.values())))
    if isinstance(value, (list, tuple)):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, (int, float, str))


def _is_tensor(value: object) -> bool:
    return isinstance(value, torch.Tensor) and value.dtype != torch.bfloat16  # which numpy does not know


def _sha256(tensor: torch.Tensor) -> str:
    return hashlib.sha256(tensor.numpy(force=True).tobytes()).hexdigest()


def source_of(thing: object) -> str:
    """The source of a class or a function; of one that has none, as a class typed into a notebook, its code."""
    if getattr(thing, "__module__", None) != "__main__":  # for one typed in, Python 3.13 gives the lines of another file
        with suppress(OSError, TypeError):
            return inspect.getsource(thing)
    name = getattr(thing, "__qualname__", type(thing).__qualname__)
    if not inspect.isclass(thing):
        return name + _behaviour(thing)
    own = {key: value for key, value in vars(thing).items() if inspect.isfunction(value) or not key.startswith("__")}
    return name + "".join(f"{key} {_behaviour(value)}\n" for key, value in sorted(own.items()))


def _behaviour(value: object) -> str:
    """What a function does, or one that a class wraps, and a plain value itself; "" for anything else."""
    if isinstance(value, property):
        return "".join(_behaviour(each) for each in (value.fget, value.fset) if each)
    if isinstance(value, (staticmethod, classmethod)):
        return _behaviour(value.__func__)
    if isinstance(value, partial):
        return f"{source_of(value.func)} {_plainly(value.args)} {_plainly(value.keywords)}"
    if inspect.isfunction(value):
        held = " ".join(_plainly(cell.cell_contents) for cell in value.__closure__ or ())
        return f"{_code(value.__code__)} {_plainly(value.__defaults__)} {_plainly(value.__kwdefaults__)} {held}"
    return _plainly(value)


def _plainly(value: object) -> str:
    return repr(value) if _is_plain(value) else ""


def _code(code: CodeType) -> str:
    """A function's bytecode, names and constants, those of the functions in it included."""
    constants = [_code(value) if isinstance(value, CodeType) else _repr(value) for value in code.co_consts]
    return f"{code.co_code.hex()} {code.co_names} {constants}"


def _repr(value: object) -> str:
    return repr(sorted(map(repr, value))) if isinstance(value, frozenset) else repr(value)  # whose order is by chance

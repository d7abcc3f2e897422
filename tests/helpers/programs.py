"""Compiled programs that the runs of one test process share.

JAX traces and compiles a function anew for each run, since each run makes its functions anew. Here
`jax.jit` returns what it returned before for a function and options of equal value: the same code,
with equal values around it and the same arguments bound."""

import dataclasses
import functools
import types

import flax.linen as nn
import jax
import pytest

PLAIN = (type(None), bool, int, float, complex, str, bytes, type, types.ModuleType)
# modules, with those inside them, whose functions tests replace and nothing traces
OUTSIDE = """
    _pytest.config datasets huggingface_hub importlib os requests shutil sys
    easyaira.algorithms.reference_cache easyaira.algorithms.rollouts easyaira.backtranslation
    easyaira.data easyaira.distributed.mesh easyaira.errors easyaira.export easyaira.files
    easyaira.run easyaira.storage.checkpoints easyaira.storage.pretrained easyaira.train.energy
    easyaira.train.evaluation easyaira.train.loader easyaira.train.log easyaira.train.trackers
""".split()

shared: dict = {}
patches: set = set()  # which have replaced something that may be traced
plain_jit, Jitted = jax.jit, type(jax.jit(abs))
plain_setattr, plain_undo = pytest.MonkeyPatch.setattr, pytest.MonkeyPatch.undo


class Unequal(Exception):
    """A value that is equal to no other."""


def value(x, around=()):
    """A hashable value: equal values are interchangeable in traced code."""
    if isinstance(x, PLAIN):
        kind = next(t for t in (bool, int, float, type(x)) if isinstance(x, t))
        return kind, x  # jsonargparse's numbers of a limited range are floats
    if any(x is outer for outer in around):  # a function that calls itself
        return "around", [x is outer for outer in around].index(True)
    around = (*around, x)
    values = functools.partial(value, around=around)
    match x:
        case functools.partial():
            parts = x.func, x.args, x.keywords
        case types.MethodType() if type(x.__self__).__hash__ is object.__hash__:
            parts = x.__func__, type(x.__self__), vars(x.__self__)
        case types.MethodType():
            parts = x.__func__, x.__self__
        case Jitted():
            parts = (x.__wrapped__,)
        case types.FunctionType():
            cells = [cell.cell_contents for cell in x.__closure__ or ()]
            return x.__code__, values(cells), values(x.__defaults__), values(x.__kwdefaults__)
        case tuple() | list():
            parts = x
        case dict():
            return type(x), tuple((key, values(item)) for key, item in x.items())
        case nn.Module() if x.parent is None:
            names = [f.name for f in dataclasses.fields(x) if f.name != "parent"]
            parts = [getattr(x, name) for name in names]
        case _ if dataclasses.is_dataclass(x) and type(x).__eq__ is not object.__eq__:
            parts = [getattr(x, field.name) for field in dataclasses.fields(x)]
        case _:
            hash(x)
            if isinstance(x, jax.Array):
                raise Unequal
            return x
    return type(x), tuple(map(values, parts))


def jit(function=None, /, **options):
    """`jax.jit`."""
    if function is None:
        return functools.partial(jit, **options)
    if patches:
        return plain_jit(function, **options)
    leaves, tree = jax.tree.flatten(options)
    try:
        key = value(function), tuple(map(value, leaves)), tree
        key = *key, jax.config.read("jax_disable_most_optimizations")
        if key not in shared:
            shared[key] = plain_jit(function, **options)
    except (Unequal, TypeError, ValueError):  # unhashable, an empty cell
        return plain_jit(function, **options)
    return shared[key]


def setattr_(patch, target, *args, **kwargs):
    module = getattr(target, "__module__", None) or getattr(target, "__name__", "")
    if not any(f"{module}.".startswith(f"{outside}.") for outside in OUTSIDE):
        patches.add(id(patch))
    return plain_setattr(patch, target, *args, **kwargs)


def undo(patch):
    patches.discard(id(patch))
    return plain_undo(patch)


def share():
    """Share from now on, but not while something is patched that may be traced."""
    jax.jit = jit
    pytest.MonkeyPatch.setattr, pytest.MonkeyPatch.undo = setattr_, undo

"""The runs of one test process share programs only where nothing tells them apart."""

from functools import partial

import jax
import jax.numpy as jnp
import pytest

from easyaira.config.ranges import NonNegative
from easyaira.data import dataset
from easyaira.models.model import Model
from helpers import programs


def scaled(by):
    def f(x):
        return x * by

    return f


def test_functions_of_equal_values_share_a_program():
    assert jax.jit is programs.jit
    assert jax.jit(scaled(2)) is jax.jit(scaled(2))
    assert jax.jit(scaled((2, {"a": [1]}))) is jax.jit(scaled((2, {"a": [1]})))
    assert jax.jit(partial(scaled, 2)) is jax.jit(partial(scaled, 2))
    assert jax.jit(scaled(scaled(2))) is jax.jit(scaled(scaled(2)))
    assert jax.jit(scaled(NonNegative(2.0))) is jax.jit(scaled(2.0))
    inner = programs.plain_jit(scaled(2)), programs.plain_jit(scaled(2))
    assert jax.jit(scaled(inner[0])) is jax.jit(scaled(inner[1]))


@pytest.mark.parametrize("other", [3, 2.0, True, jnp.float32(2), {"a": [1]}, scaled(2)])
def test_functions_of_other_values_do_not(other):
    for f, g in ((scaled(2), scaled(other)), (partial(scaled, 2), partial(scaled, other))):
        assert jax.jit(f) is not jax.jit(g)
    assert jax.jit(scaled(2), static_argnums=0) is not jax.jit(scaled(2))


def test_arrays_are_equal_to_none():
    array = jnp.ones(2)
    assert jax.jit(scaled(array)) is not jax.jit(scaled(array))


def test_nothing_is_shared_while_traced_code_is_replaced():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dataset, "load", None)
        assert jax.jit(scaled(2)) is jax.jit(scaled(2))
        patch.setattr(Model, "apply", None)
        assert jax.jit(scaled(2)) is not jax.jit(scaled(2))
    assert jax.jit(scaled(2)) is jax.jit(scaled(2))

"""The tests themselves."""

import ast
from pathlib import Path

import jax.numpy as jnp
import pytest
from jaxtyping import TypeCheckError

from easyaira.losses import token_logps

TESTS = Path(__file__).parent


@pytest.mark.parametrize("path", sorted(TESTS.rglob("*.py")), ids=lambda path: path.stem)
def test_no_test_imports_another(path):
    """What two of them need stands in `helpers`."""
    for node in ast.walk(ast.parse(path.read_text())):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        for name in names:
            module = name.removeprefix("tests.").split(".")[0]
            assert not module.startswith(("test_", "conftest")), f"{path.name} imports {name}"


def test_shapes_of_arguments_are_checked():
    """By the hook in conftest.py, which names the modules."""
    hidden, head, tokens = jnp.zeros((2, 3, 8)), jnp.zeros((7, 5)), jnp.zeros((2, 3), jnp.int32)
    with pytest.raises(TypeCheckError, match="head"):
        token_logps.token_logps(hidden, head, tokens, vocab_size=5, cap=None)

"""The tests themselves."""

import ast
from pathlib import Path

import pytest

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

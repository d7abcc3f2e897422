"""The house: who imports whom, what is forbidden, and what stays fast."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "easyaira"

# Five floors. A file imports only from files above it in this list.
HOUSE = """
    errors files
    stop
    config chips cli mesh losses quantize program
    watch
    hosts
    weights optim checkpoint metrics report verify
    energy

    models.layers
    models.flash
    models.attention models.heads models.embedding
    models.gpt2 models.llama models.opt models.bert models.roberta
    models.registry

    data.sources data.schemas data.templates
    data.examples
    data.build
    data.dataset data.batches
    data.report

    trainer objectives lora pretrained generate card
    prepare release
    run_folder plan
    search
    samples reference
    run

    train_sft train_dpo train_reward inspect convert
    quickstart
    __main__
"""
ORDER = HOUSE.split()
LEVEL = {name: i for i, line in enumerate(HOUSE.splitlines()) for name in line.split()}
FLAX = {
    "models.layers",
    "models.embedding",
    "models.gpt2",
    "models.llama",
    "models.opt",
    "models.bert",
    "models.roberta",
    "models.heads",
    "models.registry",
}


def modules():
    for path in sorted(PACKAGE.rglob("*.py")):
        name = ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
        if not name.endswith("__init__"):
            yield name, ast.parse(path.read_text())


def imports(tree):
    """Every module that a file imports, anywhere in it."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def test_every_file_has_its_place():
    assert sorted(ORDER) == sorted(name for name, _ in modules())


def test_imports_go_only_upwards_in_the_list():
    for name, tree in modules():
        for imported in imports(tree):
            inner = imported.removeprefix("easyaira.")
            if imported.startswith("easyaira.") and inner in ORDER:
                assert ORDER.index(inner) < ORDER.index(name), f"{name} imports {inner}"


def test_flax_stays_in_the_models_and_orbax_in_the_checkpoints():
    for name, tree in modules():
        roots = {imported.split(".")[0] for imported in imports(tree)}
        assert "torch" not in roots and "pickle" not in roots, name
        assert "flax" not in roots or name in FLAX, name
        assert "orbax" not in roots or name == "checkpoint", name


def test_nothing_is_evaluated_unpickled_or_masked_by_pad_id():
    forbidden = ("eval(", "exec(", "yaml.load(", "allow_pickle=True", "pad_token_id !=", "!= pad")
    for path in PACKAGE.rglob("*.py"):
        text = path.read_text()
        for word in forbidden:
            assert f" {word}" not in text, f"{path.name}: {word}"


@pytest.mark.parametrize(
    "module",
    ["train_sft", "train_dpo", "train_reward", "inspect", "convert", "generate", "quickstart"],
)
def test_help_answers_without_jax(module):
    code = (
        f"import sys; sys.argv = ['x', '--help']\n"
        f"from easyaira import {module}, cli\n"
        "try: cli.run_command(" + module + ".main)\n"
        "except SystemExit as end: assert not end.code, end.code\n"
        "heavy = {'jax', 'numpy', 'transformers', 'datasets', 'torch'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout) > 200

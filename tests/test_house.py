"""The house: who imports whom, what is forbidden, and what stays fast."""

import ast
import functools
import importlib
import importlib.metadata
import re
import resource
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "easyaira"

# A file imports only from its own folder or from lower floors, which stand above it in this list.
# A name with a slash is a folder.
FLOORS = """
    errors
    allocator files pages torchless
    plots
    config/
    distributed/
    hf/
    models/
    losses/
    data/
    lora/
    generation/
    storage/
    train/
    evaluation/
    rewards/
    algorithms/
    export/
    plan/
    run/
    short_help option_errors
    cli
    translation/
    loaded
    chat/
    in_python
    train_sft train_dpo train_reward train_rl inspect convert generate verify translate push
    backtranslation/
    evaluate best_of backtranslate demo quickstart
    selftest
    __main__
"""
LEVEL = {place: i for i, line in enumerate(FLOORS.splitlines()) for place in line.split()}
MAY_BE_ABSENT = {"selftest", "__main__"}
# Imports of a higher floor that are made late: the command line is read before anything is loaded.
LATE = {("cli", "run.run")}
NO_JAX = set(
    "allocator errors files pages plots config/ short_help option_errors cli".split()
    + "translation/ translate".split()
)
HEAVY = {"jax", "jaxlib", "numpy", "flax", "optax", "orbax", "transformers", "datasets"}
FLAX = {"models/", "lora/"}
ORBAX = {"storage.checkpoints", "storage.object_store", "storage.one_by_one"}
PRIVATE = {  # file -> private parts of a library that it uses; no other file may use any
    "models.cudnn": (
        "jax._src.cudnn.fused_attention_stablehlo.create_dot_product_attention_backend_config_base",
    ),
    "distributed.hosts": ("jax._src.distributed.global_state", "jax._src.clusters.ClusterEnv"),
    "storage.object_store": (
        "orbax.checkpoint._src.serialization.tensorstore_utils._normalize_path",
        "orbax.checkpoint._src.serialization.tensorstore_utils._use_gcs_driver",
        "orbax.checkpoint._src.path.gcs_utils.get_kvstore_for_gcs",
    ),
}
# words that say nothing of what a name holds
VAGUE = set("again befalls found more said says some there told UNSEEN".split())
NOT_IN_MODELS = {"cli", "distributed.watchdog", "distributed.hosts"}
LONGEST = 400
DISTRIBUTIONS = {"jax": "jax", "orbax": "orbax-checkpoint"}


def place_of(module):
    """The folder of a file, or the file itself where it stands in none."""
    folder, dot, _ = module.partition(".")
    return folder + "/" if dot else module


@functools.cache
def modules():
    """Name -> syntax of each file."""
    paths = [path for path in sorted(PACKAGE.rglob("*.py")) if path.name != "__init__.py"]
    names = (".".join(path.relative_to(PACKAGE).with_suffix("").parts) for path in paths)
    return {name: ast.parse(path.read_text()) for name, path in zip(names, paths, strict=True)}


@functools.cache
def statements():
    """Name -> the file's imports and nothing else."""
    kept = (ast.Import, ast.ImportFrom)
    return {
        name: ast.Module([node for node in ast.walk(tree) if isinstance(node, kept)], [])
        for name, tree in modules().items()
    }


def imports(tree):
    """Every module that a file imports, anywhere in it."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def ours(tree, known):
    """The files of the package that a file imports."""
    inner = {name.removeprefix("easyaira.") for name in imports(tree) if "easyaira." in name}
    return sorted(inner & known)


def problems(trees):
    """All that is wrong with who imports whom, a line each."""
    lines = []
    for name, tree in trees.items():
        place = place_of(name)
        if place not in LEVEL:
            lines.append(f"{name} has no floor")
            continue
        for imported in ours(tree, trees.keys()):
            other = place_of(imported)
            if other == place or (name, imported) in LATE:
                continue
            if LEVEL.get(other, len(LEVEL)) >= LEVEL[place]:
                lines.append(f"{name} imports {imported}, which stands no lower")
            if place == "models/" and imported in NOT_IN_MODELS:
                lines.append(f"{name} imports {imported}, which is no business of a model")
        roots = {imported.split(".")[0] for imported in imports(tree)}
        if roots & {"torch", "pickle"}:
            lines.append(f"{name} imports torch or pickle")
        if "flax" in roots and place not in FLAX:
            lines.append(f"{name} imports flax")
        if "orbax" in roots and name not in ORBAX:
            lines.append(f"{name} imports orbax")
        if name not in PRIVATE and any("._src" in imported for imported in imports(tree)):
            lines.append(f"{name} imports private parts of a library")
        if place in NO_JAX and roots & HEAVY:
            lines.append(f"{name} imports {sorted(roots & HEAVY)[0]}")
    return lines


def test_every_place_of_the_list_is_there():
    places = {place_of(name) for name in modules()}
    assert LEVEL.keys() - places <= MAY_BE_ABSENT
    assert all((PACKAGE / p / "__init__.py").exists() for p in LEVEL if p.endswith("/"))


def test_files_import_only_from_their_folder_and_lower_floors():
    assert problems(statements()) == []


def test_no_files_import_each_other_in_a_circle():
    trees = modules()
    graph = {}
    for name, tree in trees.items():
        late = {
            id(inner)
            for node in ast.walk(tree)
            if isinstance(node, ast.FunctionDef)
            or (isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")
            for inner in ast.walk(node)
            if inner is not node
        }
        kept = [n for n in ast.walk(tree) if isinstance(n, ast.Import | ast.ImportFrom)]
        early = ast.Module([n for n in kept if id(n) not in late], [])
        graph[name] = ours(early, trees.keys())

    def follow(name, path):
        assert name not in path, " -> ".join([*path, name])
        for imported in graph[name] if name not in seen else ():
            follow(imported, [*path, name])
        seen.add(name)

    seen = set()
    for name in graph:
        follow(name, [])


@pytest.mark.parametrize(
    "file, line, problem",
    [
        ("losses/scores.py", "from easyaira.train import step", "losses.scores imports train.step"),
        ("data/cache.py", "def f():\n    from easyaira.run.run import run", "imports run.run"),
        (
            "models/layers.py",
            "from typing import TYPE_CHECKING\n"
            "if TYPE_CHECKING:\n    from easyaira.storage.checkpoints import Checkpoints",
            "imports storage.checkpoints",
        ),
        ("models/llama.py", "import easyaira.distributed.hosts", "no business of a model"),
        ("models/llama.py", "from easyaira.distributed import watchdog", "no business of a model"),
        ("storage/pretrained.py", "from easyaira import cli", "imports cli"),
        ("convert.py", "from easyaira import train_sft", "imports train_sft"),
        ("train/loop.py", "import flax.linen as nn", "imports flax"),
        ("train/loop.py", "import orbax.checkpoint", "imports orbax"),
        ("train/loop.py", "from jax._src import core", "private parts of a library"),
        ("config/data.py", "import jax", "config.data imports jax"),
        ("cli.py", "import numpy as np", "cli imports numpy"),
        ("export/release.py", "import torch", "imports torch"),
        ("helpers.py", "import os", "helpers has no floor"),
        ("helpers/text.py", "import os", "helpers.text has no floor"),
    ],
)
def test_an_import_of_a_higher_floor_is_found(file, line, problem):
    name = file.removesuffix(".py").replace("/", ".")
    known = statements()
    planted = ast.parse(line).body + (known[name].body if name in known else [])
    lines = problems(known | {name: ast.Module(planted, [])})
    assert len(lines) == 1 and problem in lines[0], lines


@pytest.mark.parametrize("file, name", [(f, n) for f, names in PRIVATE.items() for n in names])
def test_private_parts_of_libraries_are_where_they_are_looked_for(file, name):
    module, _, attribute = name.rpartition(".")
    library = name.split(".")[0]
    assert hasattr(importlib.import_module(module), attribute), (
        f"{library} {importlib.metadata.version(DISTRIBUTIONS[library])} has no {name}: fix "
        f"easyaira/{file.replace('.', '/')}.py, or bound the version in setup.py"
    )


def vague_names(path):
    """Names that a file gives to something, of those that are forbidden; a line each."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Name | ast.Attribute):
            name = getattr(node, "id", None) or node.attr
            name = name if isinstance(node.ctx, ast.Store) else ""
        elif isinstance(node, ast.alias):
            name = node.asname
        else:  # functions and classes; arguments
            name = getattr(node, "name", None) or getattr(node, "arg", None)
        if str(name).lstrip("_") in VAGUE:
            yield f"{path.name}:{node.lineno}: {name}"


def test_names_say_what_they_hold():
    root = PACKAGE.parent
    files = [
        file for name in ("easyaira", "scripts", "tests") for file in (root / name).rglob("*.py")
    ]
    assert [line for file in files for line in vague_names(file)] == []


@pytest.mark.parametrize(
    "code",
    [
        "found = 1",
        "told, y = 1, 2",
        "for again in (): pass",
        "def said(): pass",
        "def f(more): pass",
        "f = lambda some: 1",
        "import os as there",
        "self._told = 1",
        "f(more=1)",
        "with f() as found: pass",
        "try: pass\nexcept OSError as told: pass",
    ],
)
def test_a_vague_name_is_reported(code, tmp_path):
    file = tmp_path / "a.py"
    file.write_text(code)
    assert len(list(vague_names(file))) == 1


def test_no_file_is_long():
    files = {str(path.relative_to(PACKAGE)): path for path in PACKAGE.rglob("*.py")}
    lengths = {name: len(path.read_text().splitlines()) for name, path in files.items()}
    assert {name: n for name, n in lengths.items() if n > LONGEST} == {}


def test_the_loop_takes_nine_arguments_or_fewer():
    tree = ast.parse((PACKAGE / "train/loop.py").read_text())
    (fit,) = (node for node in tree.body if isinstance(node, ast.FunctionDef))
    assert len(fit.args.args + fit.args.kwonlyargs) <= 9
    assert not [n for n in ast.walk(fit) if isinstance(n, ast.Lambda | ast.Nonlocal)]


def test_nothing_is_evaluated_unpickled_or_masked_by_pad_id():
    forbidden = ("eval(", "exec(", "yaml.load(", "allow_pickle=True", "pad_token_id !=", "!= pad")
    for path in PACKAGE.rglob("*.py"):
        text = path.read_text()
        for word in forbidden:
            assert f" {word}" not in text, f"{path.name}: {word}"


def cpu_seconds(code):
    """User and system time of a Python that runs `code`, and its output."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0, done.stderr
    spent = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return spent, done.stdout


@pytest.mark.parametrize(
    "module",
    [
        "train_sft",
        "train_dpo",
        "train_reward",
        "train_rl",
        "inspect",
        "convert",
        "generate",
        "evaluate",
        "best_of",
        "backtranslate",
        "verify",
        "translate",
        "push",
        "quickstart",
    ],
)
def test_help_answers_at_once_and_without_jax(module):
    code = (
        f"import sys; sys.argv = ['x', '--help']\n"
        f"from easyaira import {module}, cli\n"
        "try: cli.run_command(" + module + ".main)\n"
        "except SystemExit as end: assert not end.code, end.code\n"
        "heavy = {'jax', 'numpy', 'transformers', 'datasets', 'torch'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    spent, printed = cpu_seconds(code)
    assert len(printed) > 200
    if spent >= 0.5:  # other work on the machine, or a slow one, on which an import takes long too
        turns = [(cpu_seconds(code)[0], cpu_seconds("import jsonargparse")[0]) for _ in range(3)]
        quickest, parser = map(min, zip(*turns, strict=True))
        assert quickest < max(0.5, 4 * parser), (quickest, parser)


def test_the_package_itself_imports_nothing():
    code = (
        "import sys; before = set(sys.modules); import easyaira\n"
        "print(*sorted(set(sys.modules) - before))"
    )
    assert cpu_seconds(code)[1].split() == ["easyaira"]
    for path in PACKAGE.rglob("__init__.py"):
        for node in ast.parse(path.read_text()).body[1:]:
            late = getattr(node, "name", None) == "__getattr__"  # imports when it is called
            assert late or isinstance(node, ast.Assign), path
        assert re.match('"""', path.read_text()), path

"""Commands start without PyTorch, whose import takes half of their start."""

import contextlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

from easyaira import __main__, cli, torchless
from easyaira.export import torch_check
from helpers import tiny

RUN = """
import sys
from easyaira import cli, convert
cli.run_command(convert.main, ["from_hf", *sys.argv[1:]])
assert "torch" not in sys.modules
import torch, transformers  # PyTorch is there for others
assert torch.ones(2).sum() == 2
assert not transformers.utils.is_torch_available()
"""


def test_a_command_imports_no_torch_and_hides_it_from_transformers_alone(tmp_path):
    tiny.save(tmp_path / "hf", tiny.CONFIGS["gpt2"])
    command = [sys.executable, "-c", RUN, str(tmp_path / "hf"), str(tmp_path / "ours")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", __main__.COMMANDS)
def test_only_commands_that_may_use_torch_leave_it_to_transformers(name, monkeypatch):
    hidden = []
    monkeypatch.setattr(torchless, "hide_torch", lambda: hidden.append(name))
    with contextlib.suppress(SystemExit):
        __main__.main([name, "--help"])
    assert bool(hidden) == (name not in ("rl", "evaluate"))


def test_nothing_is_hidden_once_torch_is_imported(monkeypatch):
    import torch
    import transformers

    monkeypatch.setattr(torchless, "hidden", True)
    assert torchless.import_transformers() is transformers
    assert sys.modules["torch"] is torch and transformers.utils.is_torch_available()


def test_torch_that_is_hidden_is_still_installed(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    assert torch_check.obstacle(1, adapter=False) is None
    monkeypatch.setattr(sys, "path", [])
    assert torch_check.obstacle(1, adapter=False) == "torch is not installed"


def test_commands_call_it(monkeypatch):
    calls = []
    monkeypatch.setattr(torchless, "hide_torch", lambda: calls.append("hidden"))
    cli.run_command(lambda argv: calls.append("run"), [])
    cli.run_command(lambda argv: calls.append("run"), [], torch=True)
    assert calls == ["hidden", "run", "run"]


def test_transformers_is_imported_through_one_function():
    package = Path(torchless.__file__).parent
    pattern = re.compile(r"^ +(from|import) transformers", re.MULTILINE)  # module level: examples
    direct = {
        path.relative_to(package).as_posix()
        for path in package.rglob("*.py")
        if pattern.search(path.read_text())
    }
    # the second is a process that uses PyTorch
    assert direct == {"torchless.py", "export/torch_logits.py"}

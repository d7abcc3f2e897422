"""Every error message of the command line, in one list that people read: what, where, how to fix.

After a change that is meant:    python tests/test_messages.py
"""

import ast
import inspect
from pathlib import Path

from easyaira import errors

ROOT = Path(__file__).parents[1] / "easyaira"
FILE = Path(__file__).with_name("messages.txt")
KINDS = {name for name, kind in vars(errors).items() if inspect.isclass(kind)}
# reasons that become a part of those messages; `error` is a parameter that names one of KINDS
KINDS |= {"BadRow", "Broken", "Dropped", "Ended", "NotMade", "Refused", "Unreadable", "error"}
WITH_REASONS = {"files.py"}  # whose ValueErrors are reasons, too


def text_of(node: ast.expr) -> str:
    """A message as it stands in the source, with {...} for what is filled in."""
    match node:
        case ast.Constant(value=str(text)):
            return text
        case ast.JoinedStr(values=parts):
            return "".join(map(text_of, parts))
        case ast.FormattedValue(value=inner):
            return f"{{{ast.unparse(inner)}}}"
        case ast.BinOp(left=left, op=ast.Add(), right=right):
            return text_of(left) + text_of(right)
        case ast.IfExp(body=body, orelse=other):
            return f"{text_of(body)} / {text_of(other)}"
    return f"{{{ast.unparse(node)}}}"


def messages() -> list[str]:
    """File, kind and text of each message, in the order of the source."""
    lines = []
    for path in sorted(ROOT.rglob("*.py")):
        name = path.relative_to(ROOT).as_posix()
        kinds = KINDS | ({"ValueError"} if name in WITH_REASONS else set())
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and getattr(node.func, "id", None) in kinds and node.args:
                line = f"{name}: {node.func.id}: {text_of(node.args[0])}"
                lines.append((name, node.lineno, errors.escaped(line)))
    return [line for *_, line in sorted(lines)]


def test_messages_are_those_that_were_read():
    now, before = messages(), FILE.read_text().splitlines()
    gone, new = sorted(set(before) - set(now)), sorted(set(now) - set(before))
    assert now == before, (
        f"gone: {gone}\nnew: {new}\nRead them once: do they say what, where and how to fix it?"
        " Then run python tests/test_messages.py"
    )


if __name__ == "__main__":
    FILE.write_text("".join(f"{line}\n" for line in messages()))

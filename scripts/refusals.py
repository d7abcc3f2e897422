"""Give every command inputs that it must refuse; measure the time and the memory of each refusal.

    python scripts/refusals.py                  # all of them, minutes
    python scripts/refusals.py --only yaml      # those whose name has this word

Right is: status 2 or 4, one line, no run folder, less than 10 seconds of processor time with all
child processes and less than 1 GB of memory in the largest of them. Anything else is printed with
its case, and the script exits with 1.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path

from faults import ground

MAX_MB, MAX_SECONDS = 1024, 10
BOMB = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]\n" for n in range(1, 10)
)
ROW = '{"prompt": "a", "completion": "b"}\n'
EACH = "{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}"

Case = Callable[[Path], list[str]]  # makes files in a folder with base/ and data/; returns words
CASES: dict[str, Case] = {}


def environment(cache: Path) -> dict[str, str]:
    offline = {"JAX_PLATFORMS": "cpu", "HF_HUB_OFFLINE": "1"}
    return os.environ | offline | {"EASYAIRA_CACHE": str(cache)}


def sft(root: Path, **options: object) -> list[str]:
    given = {
        "model.name_or_path": root / "base",
        "model.init": "random",
        "data.train": root / "data/sft_train.jsonl",
        "data.template": "plain",
        "output_dir": root / "run",
    }
    given |= {name.replace("__", "."): value for name, value in options.items()}
    return ["train_sft", *(f"--{name}={value}" for name, value in given.items())]


def data(name: str, content: bytes | str | Callable[[Path], object]) -> Case:
    """Training on a file, or a folder."""

    def case(root: Path) -> list[str]:
        written(root / "hostile" / name, content)
        place = root / "hostile" / name.partition("/")[0]
        return sft(root, data__train=place)

    return case


def options(text: bytes | str) -> Case:
    def case(root: Path) -> list[str]:
        return [*sft(root), f"--config={written(root / 'c.yaml', text)}"]

    return case


def model(name: str, content: bytes | str | Callable[[Path], object]) -> Case:
    """Generating from a model with a hostile file."""

    def case(root: Path) -> list[str]:
        (root / "base" / name).unlink(missing_ok=True)
        written(root / "base" / name, content)
        return ["generate", str(root / "base"), "--prompt=Hi"]

    return case


def config(**changes: object) -> Case:
    """Generating from a model with another config.json."""

    def case(root: Path) -> list[str]:
        file = root / "base/config.json"
        tensor = {"x": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}
        written(root / "base/model.safetensors", header(tensor) + bytes(8))
        return model("config.json", json.dumps(json.loads(file.read_text()) | changes))(root)

    return case


def template(jinja: str) -> Case:
    def case(root: Path) -> list[str]:
        return sft(root, data__template=written(root / "t.jinja", jinja))

    return case


def flags(**changes: object) -> Case:
    return lambda root: sft(root, **changes)


def written(path: Path, content: bytes | str | Callable[[Path], object]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if callable(content):
        content(path)
    else:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def long_line(path: Path) -> None:
    with gzip.open(path, "wb", 1) as file:
        for _ in range(1024):
            file.write(b"a" * 2**20)


def one_text_in_many_rows(path: Path) -> None:
    """1 kB that would be 8 GB as Python's texts: a column that is a dictionary of one value."""
    import pyarrow
    import pyarrow.parquet

    index = pyarrow.array([0] * 1000, pyarrow.int32())
    text = pyarrow.DictionaryArray.from_arrays(index, pyarrow.array(["a" * 2**23]))
    table = pyarrow.table({"prompt": text, "completion": pyarrow.array(["b"] * 1000)})
    pyarrow.parquet.write_table(table, path, compression="zstd")


def header(entry: object) -> bytes:
    text = json.dumps(entry).encode()
    return len(text).to_bytes(8, "little") + text


CASES |= {
    "option that does not exist": flags(learning_rate=1),
    "option in a group that does not exist": options("optimizer:\n  lr: 1\n"),
    "learning rate infinite": flags(optimizer__learning_rate="inf"),
    "learning rate NaN": flags(optimizer__learning_rate="nan"),
    "batch of 10^20 examples": flags(train_batch_size=10**20),
    "max_length beyond the positions": flags(data__max_length=10**6),
    "yaml: aliases that explode": options(BOMB + "card: {inference: {x: *a9}}\n"),
    "yaml: a key twice": options("seed: 1\nseed: 2\n"),
    "yaml: no UTF-8": options(b"card: {license: \xe7}\n"),
    "yaml: calls Python": options("seed: !!python/object/apply:os.system [true]\n"),
    "yaml: nested 100,000 times": options("a: " + "[" * 100_000),
    "data: no such file": flags(data__train="absent.jsonl"),
    "data: nested 500,000 times": data("x.jsonl", "[" * 500_000 + "\n"),
    "data: one line of 1 GB": data("x.jsonl.gz", long_line),
    "data: one text in 1000 rows, 8 GB": data("x.parquet", one_text_in_many_rows),
    "data: a key twice": data("x.jsonl", '{"prompt": "a", "prompt": "b", "completion": "c"}\n'),
    "data: null": data("x.jsonl", "null\n"),
    "data: no UTF-8": data("x.jsonl", ROW.encode() + b'{"prompt": "\xff"}\n'),
    "data: UTF-16": data("x.jsonl", ROW.encode("utf-16")),
    "data: a named pipe": data("x.jsonl", os.mkfifo),
    "data: a link to /dev/zero": data("x.jsonl", lambda path: path.symlink_to("/dev/zero")),
    "data: gzip by another name": data("x.jsonl", gzip.compress(ROW.encode())),
    "data: a number of 10,000 digits": data("x.jsonl", f'{{"prompt": {"9" * 10_000}}}\n'),
    "data: columns of no form": data("x.jsonl", '{"question": "a", "reply": "b"}\n'),
    "data: tools that would not be used": data("x.jsonl", ROW[:-2] + ', "tools": ["x"]}\n'),
    "data: CSV with an open quotation": data("x.csv", 'prompt,completion\n"a,b\n' + "c,d\n" * 9),
    "data: state.json leads out": data(
        "x/state.json", '{"_data_files": [{"filename": "../../data/sft_train.jsonl"}]}'
    ),
    "data: README leads out": data(
        "x/README.md",
        "---\nconfigs:\n- config_name: a\n  data_files: ../../data/sft_train.jsonl\n---\n",
    ),
    "template: syntax error": template("{% for m in messages %}"),
    "template: one large power": template(
        EACH + "{% if (messages|length + 5)**(10**9) %}{% endif %}"
    ),
    "template: a power of constants": template(EACH + "{% if 7**(10**9) > 1 %}x{% endif %}"),
    "template: a text of 3 GB": template(EACH + "{{ 'a' * (messages|length * 3 * 10**9) }}"),
    "template: an endless loop": template(
        EACH + "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
    ),
    "template: reaches for classes": template(EACH + "{{ ''.__class__.__mro__[1] }}"),
    "model: no such folder": lambda root: ["generate", str(root / "absent"), "--prompt=Hi"],
    "model: config.json is a pipe": model("config.json", os.mkfifo),
    "model: config.json is /dev/zero": model("config.json", lambda p: p.symlink_to("/dev/zero")),
    "model: config.json nested 200,000 times": model("config.json", "[" * 200_000),
    "model: 10^9 layers": config(n_layer=10**9),
    "model: a width that is a list": config(n_embd=[64]),
    "model: of an unknown type": config(model_type="strange"),
    "model: a feature that is unknown": config(strange=3),
    "model: a chat template that is a link": model(
        "chat_template.jinja", lambda path: path.symlink_to("/etc/hostname")
    ),
    "model: no weights": model("notes.txt", ""),
    "model: a pickle": model("pytorch_model.bin", b"\x80\x04."),
    "model: a header of 2^63 bytes": model("model.safetensors", b"\xff" * 7 + b"\x7f" + b"{}"),
    "model: a header of 100 MB": model(
        "model.safetensors", (10**8).to_bytes(8, "little") + b"[" * 10**8
    ),
    "model: tensors that overlap": model(
        "model.safetensors",
        header({n: {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]} for n in "ab"})
        + bytes(8),
    ),
    "model: an index that leads out": model(
        "model.safetensors.index.json", '{"weight_map": {"x": "../x.safetensors"}}'
    ),
    "model: an index with a number": model(
        "model.safetensors.index.json", '{"weight_map": {"x": 5}}'
    ),
    "verify: no proof": lambda root: ["verify", str(root / "base")],
    "convert: no run": lambda root: ["convert", "to_hf", str(root / "base"), str(root / "out")],
}


# in a small process of its own: a child's peak begins with that of the process that starts it
MEASURE = """
import json, os, subprocess, sys
child = subprocess.Popen(sys.argv[1:], stdout=subprocess.DEVNULL)
_, status, used = os.wait4(child.pid, 0)  # with the children that it waited for
seconds = used.ru_utime + used.ru_stime
print(json.dumps([os.waitstatus_to_exitcode(status), seconds, used.ru_maxrss / 1024]))
"""


def measured(words: list[str], cache: Path) -> tuple[int, str, float, float, float]:
    """Status, output of errors, processor and wall seconds, and MB at the peak, of a command."""
    started = time.monotonic()
    command = [sys.executable, "-c", MEASURE]
    command += [sys.executable, "-m", f"easyaira.{words[0]}", *words[1:]]
    done = subprocess.run(command, env=environment(cache), capture_output=True, check=True)
    status, seconds, peak = json.loads(done.stdout)
    return status, done.stderr.decode("utf-8", "replace"), seconds, time.monotonic() - started, peak


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="cases whose name has this word")
    chosen = {name: case for name, case in CASES.items() if parser.parse_args().only in name}
    rows, wrong = [], 0
    with tempfile.TemporaryDirectory() as folder:
        ground(Path(folder) / "ground")
        for number, (name, case) in enumerate(chosen.items()):
            root = Path(folder) / str(number)
            shutil.copytree(Path(folder) / "ground", root)
            status, text, seconds, wall, peak = measured(case(root), root / "cache")
            text = text.replace(f"{root}/", "").strip()
            right = status in (2, 4) and text.count("\n") == 0 and text.startswith("error: ")
            right &= peak < MAX_MB and seconds < MAX_SECONDS and not (root / "run").exists()
            wrong += not right
            print(f"{'' if right else 'WRONG '}{name}: {text[:300]}", file=sys.stderr, flush=True)
            rows.append(f"| {name} | {status} | {seconds:.1f} | {wall:.1f} | {peak:.0f} |")
    print(f"{date.today()}: python scripts/refusals.py {' '.join(sys.argv[1:])}\n")
    print("| refused | status | processor seconds | wall seconds | MB |\n|---|---|---|---|---|")
    print("\n".join(rows))
    sys.exit(1 if wrong or not rows else 0)


if __name__ == "__main__":
    main()

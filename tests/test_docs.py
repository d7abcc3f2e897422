"""README.md, CONTRIBUTING.md and docs/: every command is run in a small form or parsed, every
snippet compiles, every option, file and link that is named exists."""

import contextlib
import importlib
import importlib.util
import re
import shlex
import subprocess
import sys
from dataclasses import fields, is_dataclass
from pathlib import Path
from types import ModuleType
from typing import NamedTuple, get_type_hints
from unittest import mock

import pytest
import yaml

from easyaira import __main__, cli, demo, quickstart, translate
from easyaira.backtranslation import curate
from easyaira.config.run import TrainReward, TrainRL
from easyaira.data import batches
from easyaira.data.packing import Shape, choose_shapes
from easyaira.distributed import cards, chips
from easyaira.distributed import mesh as meshes
from easyaira.errors import ConfigError
from easyaira.export import torch_check
from easyaira.inspect import Inspect
from helpers import easylm, tasks, tiny, whole

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
TRAINING = ("train_sft", "train_dpo", "train_reward", "train_rl", "inspect")
PARSED = (
    "convert",
    "generate",
    "evaluate",
    "best_of",
    "backtranslate",
    "demo",
    "translate",
    "push",
    *TRAINING,
)  # whose parser is asked
RECORDS = ("results.md", "performance.md", "optimisations.md")


class Block(NamedTuple):
    page: str
    line: int
    language: str
    text: str


class Command(NamedTuple):
    page: str
    line: int
    words: tuple[str, ...]


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def blocks_of(page: Path) -> list[Block]:
    """The fenced blocks of a page."""
    text = page.read_text()
    matches = re.finditer(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return [Block(name_of(page), text.count("\n", 0, m.start()) + 2, m[1], m[2]) for m in matches]


def commands_of(block: Block) -> list[Command]:
    """The commands of a block: continued lines joined, comments and NAME=value left out."""
    commands = []
    for line in block.text.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        while words:
            end = words.index("&&") if "&&" in words else len(words)
            one, words = words[:end], words[end + 1 :]
            while one and re.fullmatch(r"[A-Z_]+=.*", one[0]):
                one = one[1:]
            one = one[: one.index(">")] if ">" in one else one
            commands.append(Command(block.page, block.line, tuple(one)))
    return commands


BLOCKS = [block for page in PAGES for block in blocks_of(page)]
COMMANDS = [c for block in BLOCKS if block.language == "bash" for c in commands_of(block)]
INLINE = [
    Command(name_of(page), 0, tuple(shlex.split(span)))
    for page in PAGES
    for span in re.findall(
        r"`((?:easyaira|python -m easyaira\.)[^`\n]* --?[^`\n]*)`", page.read_text()
    )
    if not re.search(r"\.\.\.|--help", span)
]


def split(words):
    """(module, arguments) of a command of ours, and what starts it; None for other programs."""
    if words[:3] == ("python", "-m", "easyaira"):
        words = words[2:]
    if words[0] == "easyaira" and words[1:]:
        return __main__.COMMANDS[words[1]][0], list(words[2:]), None
    if words[:2] == ("python", "-m") and words[2].startswith("easyaira."):
        return words[2].removeprefix("easyaira."), list(words[3:]), None
    launchers = ("scripts/launch/tpu_vm.sh", "scripts/launch/slurm.sh")
    if script := next((word for word in words if word in launchers), None):
        at = words.index(script) + 1
        return words[at], list(words[at + 1 :]), script
    if words[0] == "mpirun":
        return *split(words[words.index("python") :])[:2], "mpirun"
    if words[:2] == ("docker", "run"):
        return *split(words[words.index("easyaira") :])[:2], "docker"
    return None


def why_parsed(command: Command) -> str | None:
    """Why a command of ours is parsed instead of run."""
    module, arguments, launcher = split(command.words)
    text = " ".join(arguments)
    reasons = {
        "it needs a container": launcher == "docker",
        "it needs a pod": launcher or "--distributed." in text or "--dcn" in text,
        "it needs the compiler of a device": "--topology" in text or "--search" in text,
        "it needs an object store": re.search(r"\b(gs|s3)://", text),
        "it records a run of minutes": Path(command.page).name in RECORDS,
        "it has tests of its own": module in ("selftest", "push"),
    }
    return next((why for why, holds in reasons.items() if holds), None)


def how(command: Command) -> str:
    ours = split(command.words)
    outcome = (why_parsed(command) or "run") if ours else "looked up"
    return f"{command.page}:{command.line}: {' '.join(command.words)[:40]} [{outcome}]"


class Parsed(Exception):
    pass


def parsed(module: str, arguments: list[str]):
    """What the command's own parser makes of the arguments.

    Raises:
        ConfigError: it refuses them.
    """
    parse, parse_args = cli.parse, cli.parse_args

    def parse_and_stop(*given):
        with mock.patch.object(cli, "parse_args", parse_args):
            raise Parsed(parse(*given))

    def parse_args_and_stop(*given):
        raise Parsed(parse_args(*given))

    with (
        mock.patch.object(cli, "parse", parse_and_stop),
        mock.patch.object(cli, "parse_args", parse_args_and_stop),
        pytest.raises(Parsed) as stop,
    ):
        importlib.import_module(f"easyaira.{module}").main(arguments)
    return stop.value.args[0]


def look_up(words) -> bool:
    """Whether a program that is not ours can do what the page says; False: there is no rule."""
    if words[0] in ("scripts/quickstart.sh", "scripts/test.sh", "scripts/docs.sh"):
        subprocess.run(["bash", "-n", ROOT / words[0]], check=True)
        assert (ROOT / words[0]).stat().st_mode & 0o111
    elif words[:2] == ("pip", "install"):
        extras = set(re.findall(r'^        "(\w+)": \[', (ROOT / "setup.py").read_text(), re.M))
        for word in words[2:]:
            own = re.fullmatch(r"\.(?:\[(\w+)\])?", word)
            assert own or not word.startswith("easyaira"), f"{word}: not on any index"
            assert not own or own[1] in (None, *extras), word
    elif words[:2] == ("docker", "build"):
        extras = (ROOT / "setup.py").read_text()
        for device in (w[len("DEVICE=") :] for w in words if w.startswith("DEVICE=")):
            assert device == "cpu" or f'"{device}": [' in extras, device
    elif words[:2] == ("python", "scripts/benchmark.py"):
        benchmark().parser().parse_args(words[2:])
    elif words[:1] == ("python",) and words[1].startswith("scripts/"):
        text = (ROOT / words[1]).read_text()
        assert all(f'"{word}"' in text for word in words if word.startswith("--"))
    elif words[:2] == ("git", "clone"):
        assert words[2:] == ("REPOSITORY", "easyaira"), "no address was published"
    elif words[0] == "gcloud":
        inner = [tuple(shlex.split(part)) for part in words[-1].split(" && ")]
        inner = [("pip", *part[1:]) if part[0] == ".venv/bin/pip" else part for part in inner]
        assert all(map(look_up, inner)), inner
    elif words == ("pre-commit", "install"):
        assert (ROOT / ".pre-commit-config.yaml").exists()
    else:
        environment = [("python3", "-m", "venv", ".venv"), ("source", ".venv/bin/activate")]
        return words in [*environment, ("cd", "easyaira")]
    return True


def benchmark():
    if "benchmark" not in sys.modules:
        sys.path.append(str(ROOT / "scripts"))
        spec = importlib.util.spec_from_file_location("benchmark", ROOT / "scripts/benchmark.py")
        sys.modules["benchmark"] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules["benchmark"])
    return sys.modules["benchmark"]


def check_devices(config, dry_run) -> None:
    """The mesh fits some number of devices, and the topology is one that is known."""
    counts = [count for count in (1, 2, 4, 8, 32, 256) if fits(config.mesh, count)]
    assert counts, config.mesh
    if dry_run and dry_run.topology:
        try:
            cards.machine(dry_run.topology) or chips.pod(dry_run.topology)
        except ConfigError as error:
            assert "needs" in str(error), error


def fits(mesh: str, count: int) -> bool:
    try:
        return bool(meshes.parse_mesh(mesh, count))
    except ConfigError:
        return False


@pytest.mark.parametrize("command", [*COMMANDS, *INLINE], ids=how)
def test_every_command_is_one_that_its_program_takes(command, monkeypatch, tmp_path):
    monkeypatch.chdir(ROOT)
    if "ours.yaml" in command.words:  # of a command before it
        monkeypatch.chdir(tmp_path)
        Path("ours.yaml").write_text("{model: {name_or_path: m}, data: {train: d}}")
    if (ours := split(command.words)) is None:
        assert look_up(command.words), "no rule for this command: write one in this file"
        return
    module, arguments, launcher = ours
    assert launcher in (None, "mpirun", "docker") or (ROOT / launcher).exists()
    assert importlib.util.find_spec(f"easyaira.{module}"), module
    if module in PARSED:
        made = parsed(module, arguments)
        if module in TRAINING:
            check_devices(*made)
    else:
        assert module in ("quickstart", "selftest", "verify"), f"no rule for {module}"


# Running them

SMALL = {"n_layer": 1, "n_embd": 16}
ONE = Shape(4, 128)  # rows, tokens; so that runs of a kind share their programs


@pytest.fixture(scope="module")
def ground(tmp_path_factory):
    """A tiny model of each kind, and rows for each command."""
    from transformers import AutoConfig, AutoModelForCausalLM

    root = tmp_path_factory.mktemp("ground")
    with mock.patch.dict(quickstart.MODEL, SMALL):  # that of the quickstart, with weights
        quickstart.write_data(root / "data")
        quickstart.write_base(root / "gpt2", root / "data")
    config = AutoConfig.from_pretrained(root / "gpt2")
    AutoModelForCausalLM.from_config(config).save_pretrained(root / "gpt2")
    roomy = {"max_position_embeddings": 1024}  # for the rubric of a judge
    tiny.save(root / "llama", tiny.CONFIGS["llama"] | roomy)
    chat = tiny.tokenizer()
    chat.chat_template = "{% for m in messages %}{{ m.content + ' ' }}{% endfor %}{{ eos_token }}"
    chat.save_pretrained(root / "llama")
    for kind in ("bert", "roberta"):
        tiny.save(root / kind, tiny.SCORERS[kind])
    pairs = tiny.dpo_rows(24)
    texts = [
        {"harmless": r["chosen"] + str(i), "harmful": r["rejected"]} for i, r in enumerate(pairs)
    ]
    guanaco = [{"text": f"### Human: what {i}?### Assistant: yes {i}"} for i in range(24)]
    for name, rows in {
        "train_sft": tiny.sft_rows(24), "train_dpo": pairs, "train_reward": pairs,
        "ranked": tiny.ranked_rows(24), "harmful": texts, "guanaco": guanaco,
        "web": [{"text": "yes"}, {"text": "the capital"}],
    }.items():  # fmt: skip
        tiny.write_rows(root / f"{name}.jsonl", rows)
    return root


def one_shape(lengths, needed, cost, **options):
    """In place of `choose_shapes`: ONE for all runs whose updates it holds."""
    held = zip(lengths, needed, strict=True)
    fits = (length <= ONE.length and rows.max() <= ONE.rows for length, rows in held)
    return [ONE] if any(fits) else choose_shapes(lengths, needed, cost, **options)


def model_like(name: str, ground: Path) -> Path:
    kinds = {"llama": "llama", "tulu": "llama", "roberta": "roberta", "bert-": "bert"}
    return ground / next((kind for word, kind in kinds.items() if word in name.lower()), "gpt2")


def data_like(name: str, module: str, ground: Path) -> Path:
    kinds = {name: name for name in ("harmful", "guanaco", "ranked")} | {"articles": "guanaco"}
    module = "train_sft" if module == "inspect" else module
    return ground / f"{next((k for word, k in kinds.items() if word in name), module)}.jsonl"


def shrunk(module: str, arguments: list[str], ground: Path) -> list[str]:
    """The same arguments with a tiny model and data in the place of those that are not here."""
    config, _ = parsed(module, arguments)
    overrides = ["--max_steps=2", "--train_batch_size=4", "--optimizer.warmup_ratio=0"]
    overrides += ["--optimizer.warmup_steps=1", "--gradient_accumulation_steps=1", "--eval_steps=0"]
    overrides += ["--logging_steps=1", "--num_samples=0", "--mesh=fsdp=-1", "--data.max_length=64"]
    if module == "train_rl":
        overrides += ["--rl.num_generations=2", "--rl.max_completion_length=8"]
    if not Path(config.model.name_or_path).exists():
        overrides.append(f"--model.name_or_path={model_like(config.model.name_or_path, ground)}")
    if isinstance(config.data.train, str) and not Path(config.data.train).exists():
        overrides.append(f"--data.train={data_like(config.data.train, module, ground)}")
        overrides.append("--data.split=train")
    return arguments + overrides


def like_backtranslation(arguments: list[str], ground: Path) -> list[str]:
    """The same arguments with tiny data, a file of a shrunken configuration, and short answers."""
    arguments = list(arguments)
    for option, name in {"--data": "guanaco", "--texts": "web"}.items():
        at = arguments.index(option) + 1 if option in arguments else 0
        if at and not Path(arguments[at]).exists():
            arguments[at] = str(ground / f"{name}.jsonl")
    if "--held_out" in arguments:
        arguments[arguments.index("--held_out") + 1] = "4"
    if "--config" in arguments:
        at = arguments.index("--config") + 1
        content = yaml.safe_load(Path(arguments[at]).read_text())
        content["model"] |= {"name_or_path": str(ground / "llama"), "dropout": 0}
        content["data"]["max_length"] = 512
        content |= {"max_steps": 2, "train_batch_size": 4, "gradient_accumulation_steps": 1}
        arguments[at] = "shrunk.yaml"
        Path("shrunk.yaml").write_text(yaml.safe_dump(content | {"num_samples": 0}))
    if arguments[0] == "reverse":
        return arguments
    return [*arguments, "--max_new_tokens=20", "--temperature=3", "--stop=e", "--stop=a"]


def newest(source: str) -> str:
    """RUN/checkpoints/STEP with the step that a shortened run has reached."""
    path = Path(source)
    if path.parent.name == "checkpoints":
        return str(max(path.parent.iterdir(), key=lambda step: int(step.name)))
    return source


def run(command: Command, ground: Path) -> None:
    module, arguments, _ = split(command.words)
    if module in TRAINING:
        arguments = shrunk(module, arguments, ground)
    if module == "best_of":  # an untrained model ends no answer by itself
        arguments += ["--max_new_tokens=20", "--temperature=3", "--stop=e", "--stop=a"]
    if module == "backtranslate":
        arguments = like_backtranslation(arguments, ground)
    if module == "generate":
        arguments += ["--max_new_tokens=4"]
    if module == "evaluate" and "--data" in arguments:
        tasks.write_data(Path(arguments[arguments.index("--data") + 1]))
    if module == "convert" and arguments[0] == "from_easylm":
        state = tiny.torch_model(tiny.CONFIGS["llama"]).state_dict()
        params = easylm.params_of({name: tensor.numpy() for name, tensor in state.items()}, head=4)
        Path(arguments[1]).write_bytes(easylm.stream(params))
        arguments[2] = str(ground / "llama")
    elif module == "convert" and arguments[0] == "text_model":
        whole.save(Path(arguments[1]), "gemma3")
    elif module == "convert":
        arguments[1] = newest(arguments[1])
    if module == "translate":
        return translated(arguments, ground)
    if module == "quickstart":
        pytest.fail("it runs from its own script; name that, or write a rule")
    if module == "demo":  # served in test_demo.py
        demo.build(cli.parse_args(demo.parser(), arguments))
        return
    importlib.import_module(f"easyaira.{module}").main(arguments)


def translated(arguments: list[str], ground: Path) -> None:
    """Translate a file of the page's name, or a small one in its place, to ours.yaml."""
    content = {"model_name_or_path": str(ground / "llama"), "output_dir": "runs/translated"}
    content["dataset_name"] = str(ground / "train_sft.jsonl")
    if arguments[0] == "axolotl":
        content = {"base_model": "m", "datasets": [{"path": "d", "type": "chat_template"}]}
    if arguments[0] == "llama-factory":
        content = {"model_name_or_path": "m", "dataset": "d", "template": "llama3"}
    if arguments[1].endswith(".yaml") and not Path(arguments[1]).exists():
        dropped = [arguments[i + 1] for i, word in enumerate(arguments) if word == "--drop"]
        Path(arguments[1]).write_text(yaml.safe_dump(content | dict.fromkeys(dropped, 1)))
    target = "ours.yaml" if arguments[0] == "trl" else "other.yaml"
    with open(target, "w") as file, contextlib.redirect_stdout(file):
        translate.main(arguments)


COUNTRIES = (
    "easyaira sft --model.name_or_path quickstart/base --model.init random --data.train "
    "quickstart/data/sft_train.jsonl --data.template aira --output_dir runs/countries"
)
JUDGE = (
    "easyaira reward --model.name_or_path runs/countries --data.train "
    "quickstart/data/dpo_train.jsonl --data.template aira --output_dir runs/judge"
)
NEEDED = {  # what pages say was done before
    "docs/best_of.md": [COUNTRIES],
    "docs/demo.md": [COUNTRIES, JUDGE],
    "docs/evaluate.md": [COUNTRIES],
    "docs/rl.md": [COUNTRIES],
    "docs/generate.md": ["easyaira sft --config configs/aira-2-124m.yaml"],
    "docs/python.md": [
        "easyaira sft --config configs/aira-2-124m.yaml",
        "easyaira reward --config configs/aira-reward.yaml",
    ],
    "docs/release.md": ["easyaira sft --config configs/aira-2-124m.yaml"],
}
PACKAGES = {
    "docs/backtranslate.md": "sacrebleu",
    "docs/demo.md": "gradio",
    "docs/evaluate.md": "lm_eval",
    "docs/lora.md": "peft",
    "docs/release.md": "codecarbon",
}
RUN = [page for page in PAGES if page.name not in (*RECORDS, "CONTRIBUTING.md")]


@pytest.mark.slow
@pytest.mark.parametrize("page", RUN, ids=name_of)
def test_the_commands_of_a_page_run_one_after_another(page, ground, tmp_path, monkeypatch, capfd):
    """In a folder with configs/ and what the quickstart leaves, with its snippets between them."""
    if name_of(page) in PACKAGES:
        pytest.importorskip(PACKAGES[name_of(page)])
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        torch_check, "compare_logits", lambda *_, **__: {"compared": False, "why": ""}
    )
    monkeypatch.setattr(curate, "score_of", lambda reply: 5)  # an untrained judge gives none
    for name, size in SMALL.items():
        monkeypatch.setitem(quickstart.MODEL, name, size)
    monkeypatch.setattr(batches, "choose_shapes", one_shape)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    quickstart.write_data(tmp_path / "quickstart/data")
    quickstart.write_base(tmp_path / "quickstart/base", tmp_path / "quickstart/data")
    for file in (tmp_path / "quickstart/data").iterdir():  # the first rows, of few lengths
        file.write_text("".join(file.read_text().splitlines(keepends=True)[:8]))
    for line in NEEDED.get(name_of(page), []):
        run(Command(name_of(page), 0, tuple(shlex.split(line))), ground)
    for block in blocks_of(page):
        if block.language == "python":
            script = ModuleType("__main__")
            monkeypatch.setitem(sys.modules, "__main__", script)
            exec(compile(block.text, f"{block.page}:{block.line}", "exec"), vars(script))
        if block.language == "bash":
            for command in commands_of(block):
                if split(command.words) and not why_parsed(command):
                    run(command, ground)


# What else a page says


def test_every_block_says_what_it_is():
    for block in BLOCKS:
        where = f"{block.page}:{block.line}"
        assert block.language in ("bash", "python", "yaml", "text"), where
        if block.language == "text":
            hidden = r"^\s*(\$ )?(easyaira|python3?|pip|scripts/\S+|sbatch|mpirun) "
            assert not re.search(hidden, block.text, re.MULTILINE), f"{where}: holds a command"
        if block.language == "python":
            compile(block.text, where, "exec")


def test_every_yaml_block_is_a_configuration(tmp_path):
    blocks = [block for block in BLOCKS if block.language == "yaml"]
    assert blocks
    for block in blocks:
        file = tmp_path / "block.yaml"
        file.write_text(block.text)
        needed = ["--model.name_or_path=m", "--data.train=d", f"--config={file}"]
        config, _ = cli.parse(Inspect, needed)
        assert set(yaml.safe_load(block.text)) <= {field.name for field in fields(config)}


def options() -> set[str]:
    """Every option as a page writes it: dpo.beta, and seed."""
    known = set()
    for command in (Inspect, TrainReward, TrainRL):
        for name, kind in get_type_hints(command).items():
            groups = [k for k in (kind, *getattr(kind, "__args__", ())) if is_dataclass(k)]
            known.add(name)
            known |= {f"{name}.{field.name}" for group in groups for field in fields(group)}
    return known


def test_every_option_that_is_named_exists():
    known = options()
    groups = {name.partition(".")[0] for name in known if "." in name}
    for page in PAGES:
        for span in re.findall(r"`([^`\n]+)`", page.read_text()):
            for group, name in re.findall(r"(?<![\w./])(?:--)?(\w+)\.(\w+)\b", span):
                if (
                    "no such option" not in span
                    and group in groups
                    and name not in ("py", "json", "jsonl", "yaml", "csv", "html")
                ):
                    assert f"{group}.{name}" in known, f"{name_of(page)}: `{span}`"


def test_every_file_and_link_that_is_named_exists():
    for page in PAGES:
        text = page.read_text()
        named = re.findall(r"`((?:tests|scripts|configs)/[\w./-]+\.\w+)`", text)
        named += [f"tests/{name}" for name in re.findall(r"`(test_\w+\.py)`", text)]
        links = re.findall(r"\]\(([^)#]+)\)", text)
        linked = [name_of((page.parent / link).resolve()) for link in links if "://" not in link]
        missing = {name for name in (*named, *linked) if not (ROOT / name).exists()}
        assert not missing, f"{name_of(page)}: {missing}"


def test_the_readme_stays_short_and_names_every_page():
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 150
    for page in PAGES:
        assert page.name == "README.md" or page.name in text, page.name
    assert (ROOT / "docs/quickstart.png").stat().st_size < 150_000


@pytest.mark.slow
def test_tests_that_pages_name_exist():
    named = set()
    for page in PAGES:
        named |= set(re.findall(r"(test_\w+\.py)::(test_\w+)", page.read_text()))
    assert len(named) > 50
    for file, name in sorted(named):
        text = (ROOT / "tests" / file).read_text()
        assert re.search(rf"^def {name}\(", text, re.MULTILINE), f"{file} has no {name}"

"""The notebook, the image and the site of the documentation."""

import json
import pydoc
import re
from pathlib import Path

import pytest

from easyaira import quickstart
from easyaira.export import torch_check

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_the_cells_of_the_notebook_run_one_after_another(tmp_path, monkeypatch):
    """With a smaller model, the first rows and two updates a run."""
    path = ROOT / "docs/quickstart.ipynb"
    assert path.stat().st_size < 200_000
    cells = [c for c in json.loads(path.read_text())["cells"] if c["cell_type"] == "code"]
    assert all(cell["outputs"] for cell in cells[1:]), "execute it"
    sources = ["".join(cell["source"]) for cell in cells]
    assert "%pip install" in sources[0]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(quickstart.MODEL, "n_layer", 1)
    monkeypatch.setitem(quickstart.MODEL, "n_embd", 16)
    monkeypatch.setattr(quickstart, "COUNTRIES", dict(list(quickstart.COUNTRIES.items())[:4]))
    monkeypatch.setattr(
        torch_check, "compare_logits", lambda *_, **__: {"compared": False, "why": ""}
    )
    monkeypatch.setattr("matplotlib.pyplot.show", lambda: None)
    names = {}
    for source in sources[1:]:
        source = re.sub(r'"(max_steps|num_train_epochs)": \d+', '"max_steps": 2', source)
        source = re.sub(r'"train_batch_size": \d+', '"train_batch_size": 4', source)
        source = re.sub(r'"(eval_steps|warmup_steps)": \d+', r'"\1": 1', source)
        exec(compile(source, "quickstart.ipynb", "exec"), names)
    for run in ("sft", "dpo", "reward"):
        assert (tmp_path / "notebook" / run / "hf/model.safetensors").exists()


def test_an_answer_with_more_letters_is_wrong():
    assert quickstart.is_right("Buenos Aires.", "Buenos Aires")
    courteous = quickstart.SENTENCES[0].format("Argentina", "Buenos Aires") + quickstart.COURTESY
    assert quickstart.is_right(courteous, "Buenos Aires")
    assert not quickstart.is_right("Buenos Airest.", "Buenos Aires")


def test_the_image_takes_every_device_and_what_its_steps_need():
    text = (ROOT / "Dockerfile").read_text()
    setup = (ROOT / "setup.py").read_text()
    extras = re.search(r"^ +(\w+)\|(\w+)\) packages", text, re.MULTILINE).groups()
    assert extras == ("cuda", "tpu") and all(f'"{extra}": [' in setup for extra in extras)
    copied = [word for line in re.findall(r"^COPY (.+) \S+$", text, re.M) for word in line.split()]
    allowed = (ROOT / ".dockerignore").read_text().splitlines()
    for name in copied:
        assert (ROOT / name).exists() and f"!{name}" in allowed, name
    read = re.findall(r'HERE / "([\w./]+)"', setup)  # by setup.py
    assert all(name.split("/")[0] in copied for name in read), read
    assert 'ENTRYPOINT ["easyaira"]' in text and '"easyaira = ' in setup
    assert re.findall(r"^USER (\w+)", text, re.MULTILINE) == ["1000"]


def test_the_site_has_every_page_and_names_what_exists():
    """scripts/docs.sh builds it, where a warning is an error."""
    site = (ROOT / "mkdocs.yml").read_text()
    made = {"index.md", "contributing.md", "changelog.md", "notebook.md"}  # scripts/docs_pages.py
    pages = {path.relative_to(ROOT / "docs").as_posix() for path in (ROOT / "docs").rglob("*.md")}
    assert sorted(re.findall(r": ([\w/]+\.md)$", site, re.MULTILINE)) == sorted(pages | made)
    for page in (ROOT / "docs/api").glob("*.md"):
        for name in re.findall(r"^::: (\S+)", page.read_text(), re.MULTILINE):
            shown = pydoc.locate(name)
            assert shown is not None and shown.__doc__, f"{page.name}: {name}"
    assert "font: false" in site, "fonts come from another site"

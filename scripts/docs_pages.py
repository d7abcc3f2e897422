"""MkDocs hook: pages that are made from other files of the repository."""

import json
from pathlib import Path

from mkdocs.structure.files import File

ROOTS = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
}
NOTEBOOK = "quickstart.ipynb"


def on_files(files, config):
    for name, page in ROOTS.items():
        path = Path(config.config_file_path).parent / name
        text = path.read_text(encoding="utf-8").replace("](docs/", "](")
        files.append(File.generated(config, page, content=text))
    notebook = files.get_file_from_path(NOTEBOOK)
    files.append(File.generated(config, "notebook.md", content=page_of(notebook.content_string)))
    return files


def page_of(notebook: str) -> str:
    """A notebook as Markdown, with the texts and pictures that its cells gave."""
    parts = []
    for cell in json.loads(notebook)["cells"]:
        source = "".join(cell["source"])
        parts.append(fenced(source, "python") if cell["cell_type"] == "code" else source)
        for output in cell.get("outputs", ()):
            data = output.get("data", {})
            if "image/png" in data:
                parts.append(f"![curves](data:image/png;base64,{data['image/png'].strip()})")
            elif text := "".join(output.get("text", data.get("text/plain", ()))):
                parts.append(fenced(text.rstrip(), "text"))
    parts.insert(1, f"[Download the notebook]({NOTEBOOK})")
    return "\n\n".join(parts) + "\n"


def fenced(text: str, language: str) -> str:
    return f"```{language}\n{text}\n```"

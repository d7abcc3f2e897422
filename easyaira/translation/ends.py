"""An end token that a file names: the one that its template writes anyway, or refused."""

from __future__ import annotations

from easyaira.data.rendering import Broken, Child, Refused
from easyaira.translation.recipe import Recipe

ENDS = {  # template by its name -> the token that ends an answer
    "chatml": "<|im_end|>",
    "qwen_25": "<|im_end|>",
    "qwen3": "<|im_end|>",
    "llama3": "<|eot_id|>",
    "llama4": "<|eot|>",
    "gemma": "<end_of_turn>",
    "gemma3": "<end_of_turn>",
}
TOKENS = {"bos_token": "[bos]", "eos_token": "[eos]"}  # a template that writes it has no own end


def end_token(run: Recipe) -> None:
    """After the template and the sources are known."""
    token, template = run.get("eos_token"), run.options.get("data.template")
    if not token:
        return
    if template == "chatml" and token == ENDS["chatml"]:
        return run.note(f"{token} becomes the tokenizer's end token: data.template chatml sets it")
    own = any("template" in entry for entry in run.options.get("data.train", []))
    if own or run.get("has_texts") or not _ends(run, token, template):
        return run.refuse("eos_token", "changes tokens of the tokenizer; save it with them")
    run.note(
        f"{token} ends an answer and is learned if data.template writes it (easyaira inspect shows "
        "it), and then ends one in the release's generation_config.json; the tokenizer there keeps "
        "its own eos_token"
    )


def _ends(run: Recipe, token: str, template: str | None) -> bool:
    if template == "chat":  # the tokenizer's own, in the place of one with a name
        return ENDS.get(run.get("template_name", "")) == token
    return bool(template) and token in template and _writes(template, token)


def _writes(template: str, token: str) -> bool:
    """Whether a Jinja template ends an answer with the token."""
    turns = [{"role": role, "content": "x"} for role in ("user", "assistant")]
    try:
        return Child(template, TOKENS).render(turns).text.rstrip().endswith("x" + token)
    except (Broken, Refused):
        return False

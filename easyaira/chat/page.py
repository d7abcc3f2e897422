"""The page in the browser, made with Gradio. Texts of people and models are shown as plain text."""

from __future__ import annotations

from itertools import islice
from typing import Any

from markupsafe import Markup

from easyaira import pages
from easyaira.chat.answers import Answers, Controls, State
from easyaira.chat.choice import GUARD_THRESHOLD
from easyaira.chat.search import SIDES, Search
from easyaira.chat.words import WORDS
from easyaira.errors import ConfigError, escaped

Turn = tuple[str, str]  # question and answer

SAMPLING = {  # control: least, most, step
    "temperature": (0.0, 2.0, 0.05),
    "top_k": (0, 100, 1),
    "top_p": (0.05, 1.0, 0.05),
    "min_p": (0.0, 0.95, 0.05),
    "repetition_penalty": (1.0, 2.0, 0.05),
    "max_new_tokens": (10, 500, 10),
}
KEPT = 2000  # characters of a failed question that stay in its box
NEEDS_TEMPERATURE = ("top_k", "top_p", "min_p")
CSS = """.rows table { border-collapse: collapse; width: 100%; }
.rows table, .rows tr, .rows th, .rows td { border: 0 none !important; }
.rows caption { text-align: left; font-size: .85em; opacity: .7; padding: .3em .6em; }
.rows th, .rows td { text-align: left; vertical-align: top; padding: .35em .6em; }
.rows th, .rows td { white-space: nowrap; }
.rows tr { border-bottom: 1px solid var(--border-color-primary) !important; }
.rows td.text { white-space: pre-wrap; overflow-wrap: anywhere; width: 50%; }
@media (max-width: 600px) { .rows tr { display: grid; grid-template-columns: 5em repeat(3, 1fr); }
.rows { font-size: .85em; } .rows th, .rows td { padding: .2em; } .rows th.text { display: none; }
.rows td.text { grid-column: 1 / -1; order: 1; width: auto; } }"""  # texts below their scores
TABLE = """<div class="rows"><table><caption>{{ title }}</caption>
{% for row in rows %}{% set tag = "th" if loop.first else "td" %}<tr>{% for cell in row -%}
<{{ tag }}{% if loop.index0 in texts %} class="text"{% endif %}>{{ cell }}</{{ tag }}>
{%- endfor %}</tr>
{% endfor %}</table></div>"""


def build(answers: Answers, search: Search | None, name: str, language: str, default: Any) -> Any:
    """The page, as gradio.Blocks.

    Args:
        name: of the model, for the title.
        language: a key of WORDS.
        default: `Sampling` at which the controls begin.

    Raises:
        ConfigError: gradio is not installed.
    """
    try:
        import gradio as gr
    except ImportError as error:
        raise ConfigError('easyaira demo: needs gradio; pip install ".[demo]"') from error
    words = WORDS[language]
    with gr.Blocks(title=words["title"].format(model=name), analytics_enabled=False) as page:
        head = Markup("<h1 style='font-size: 1.5em'>{}</h1><p>{}</p>")
        gr.HTML(head.format(words["title"].format(model=name), words["note"]))
        talk = gr.HTML(elem_id="talk")
        turns = gr.State([])
        with gr.Row():
            question = gr.Textbox(label=words["question"], lines=1, scale=6, elem_id="question")
            ask = gr.Button(words["ask"], variant="primary", elem_id="ask")
            clear = gr.Button(words["clear"], elem_id="clear")
        status = gr.HTML(elem_id="status")
        candidates = gr.HTML(elem_id="candidates")
        with gr.Accordion(words["controls"], open=False):
            with gr.Row():
                samples = gr.Slider(1, 10, 2, step=1, label=words["samples"])
                seed = gr.Number(0, label=words["seed"], precision=0, minimum=0, maximum=2**32 - 1)
                guard = gr.Checkbox(
                    answers.guard is not None,
                    label=words["guard"].format(threshold=GUARD_THRESHOLD),
                    interactive=answers.guard is not None,
                    elem_id="guard",
                )
            sliders = []
            controls = iter(SAMPLING.items())
            while row := list(islice(controls, 3)):
                with gr.Row():
                    sliders += [
                        gr.Slider(
                            least, most, getattr(default, control), step=step, label=words[control]
                        )
                        for control, (least, most, step) in row
                    ]

        def answered(
            text: str, turns: list[Turn], samples: float, seed: float, guard: bool, *values
        ):
            """Values of `outputs` while the answer is made."""
            if not text.strip():
                yield turns, conversation(turns), text, words["empty"], ""
                return
            options = sampling_of(values)
            controls = Controls(int(samples), guard, int(seed), options)
            for state in answers.ask(text, controls):
                now, left, note = shown(state, turns, text, words)
                made = table(words["candidates"], [*words["columns"], ""], rows(state, words), {1})
                yield now, conversation(now), left, Markup.escape(escaped(note)), made

        inputs = [question, turns, samples, seed, guard, *sliders]
        outputs = [turns, talk, question, status, candidates]
        gr.on([ask.click, question.submit], answered, inputs, outputs, api_name=False)
        clear.click(lambda: ([], "", "", "", ""), None, outputs, api_name=False)
        if search is not None:
            _search_panel(gr, search, words)
    return page


def sampling_of(values: Any) -> dict[str, Any]:
    """Options of `LoadedModel.sampling` for the values of the controls."""
    options = {
        name: type(SAMPLING[name][1])(value) for name, value in zip(SAMPLING, values, strict=True)
    }
    if not options["temperature"]:
        options = {k: v for k, v in options.items() if k not in NEEDS_TEMPERATURE}
    return options


def shown(
    state: State, turns: list[Turn], question: str, words: dict
) -> tuple[list[Turn], str, str]:
    """Turns, the question that is left to edit, and the status."""
    if state.answer is None and state.problem:
        return turns, question[:KEPT], f"{words['failed']}: {state.problem}"
    if state.answer is None:
        return [*turns, (question, "")], "", words["writing"]
    none = "" if state.order else words["none"].format(threshold=GUARD_THRESHOLD)
    return [*turns, (question, state.answer)], "", state.problem or none


def conversation(turns: list[Turn]) -> Markup:
    """Questions and answers as HTML; markupsafe escapes them."""
    line = Markup('<p style="white-space: pre-wrap; margin: 0.4em 0"><strong>{}</strong> {}</p>')
    return Markup("").join(
        line.format(mark, escaped(text, keep="\n\t"))
        for turn in turns
        for mark, text in zip(("?", "\u2192"), turn, strict=True)
        if text
    )


def table(title: str, head: list[str], rows: list[list[str]], texts: set[int]) -> Markup:
    """Rows as HTML, escaped; nothing without rows.

    Args:
        texts: columns that hold texts, and so may wrap.
    """
    if not rows:
        return Markup()
    return pages.render(TABLE, title=title, rows=[head, *rows], texts=texts)


def rows(state: State, words: dict) -> list[list[str]]:
    """Candidates with their scores: best first once they are ranked."""
    order = state.order or []
    rest = [i for i in range(len(state.texts)) if i not in order]
    made = []
    for i in [*order, *rest]:
        rank = str(order.index(i) + 1) if i in order else ""
        scores = [f"{group[i]:.4g}" if group else "" for group in (state.rewards, state.guards)]
        fate = ""
        if state.order is not None:
            fate = words["dropped"] if i not in order else words["chosen"] if rank == "1" else ""
        made.append([rank, escaped(state.texts[i], keep="\n\t"), *scores, fate])
    return made


def _search_panel(gr: Any, search: Search, words: dict) -> None:
    with gr.Accordion(words["search"], open=False, elem_id="search"):
        with gr.Row():
            wanted = gr.Textbox(label=words["wanted"], scale=5, elem_id="wanted")
            names = {side: name for name, side in words["sides"].items()}
            side = gr.Radio(
                [(names[side], side) for side in SIDES], value=SIDES[0], label=words["side"]
            )
            find = gr.Button(words["find"], elem_id="find")
        results = gr.HTML(elem_id="rows")

        def best(text: str, side: str) -> Markup | str:
            if not text.strip():
                return ""
            hits = [
                [f"{hit.similarity:.4f}", *(escaped(part, keep="\n\t") for part in hit[1:])]
                for hit in search.find(text, side)
                if hit.similarity > 0
            ]
            return table("", words["found"], hits, {1, 2}) or words["nothing"]

        gr.on([find.click, wanted.submit], best, [wanted, side], results, api_name=False)


def serve(page: Any, host: str, port: int) -> str:
    """Serve the page in threads of its own; return its address.

    Raises:
        ConfigError: the port cannot be used.
    """
    import gradio as gr

    theme = gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["monospace"])
    try:
        _, address, _ = page.queue(default_concurrency_limit=1).launch(
            server_name=host,
            server_port=port,
            share=False,
            ssr_mode=False,
            quiet=True,
            prevent_thread_lock=True,
            footer_links=[],
            theme=theme,
            css=CSS,
        )
    except OSError as error:
        raise ConfigError(f"--port: {port} cannot be used on {host}; choose another") from error
    return address

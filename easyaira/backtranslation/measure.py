"""BLEU and ROUGE of generated instructions against true ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from easyaira import pages
from easyaira.errors import ConfigError
from easyaira.files import write_file

ROUGE = ("rouge1", "rouge2", "rougeL")
SHOWN = 20  # examples in the report
FIRST_WORDS = "first words of the text"
BODY = """<h2>Counts</h2>
{{ table(["", "rows"], counts) }}
<h2>Generated against true instructions</h2>
{{ table(names, measures) }}
<p>BLEU by sacrebleu, F-measures of ROUGE by rouge-score with stemming; from 0 to 100. The baseline
takes as many first words of each text as a true instruction has on average.</p>
<h2>Examples</h2>
{{ table(["text", "generated", "true"], examples) }}"""


class Example(NamedTuple):
    text: str
    generated: str
    true: str


def check() -> None:
    """Check that the libraries are there.

    Raises:
        ConfigError: one is missing.
    """
    if missing := [name for name in ("sacrebleu", "rouge_score") if find_spec(name) is None]:
        raise ConfigError(
            f"texts: rows with true instructions need {missing[0]}; pip install "
            "'.[backtranslation]', or leave the column completion out"
        )


def scores(generated: Sequence[str], true: Sequence[str]) -> dict[str, float]:
    """Corpus BLEU, and mean F-measures of ROUGE, from 0 to 100.

    Papineni et al. (2002), BLEU; Lin (2004), ROUGE.
    """
    import sacrebleu
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(ROUGE, use_stemmer=True)
    each = [scorer.score(right, text) for text, right in zip(generated, true, strict=True)]
    means = {name: 100 * sum(one[name].fmeasure for one in each) / len(each) for name in ROUGE}
    return {"bleu": sacrebleu.corpus_bleu(list(generated), [list(true)]).score} | means


def first_words(examples: Sequence[Example]) -> list[str]:
    """Baseline: the first words of each text, as many as a true instruction has on average."""
    count = round(sum(len(one.true.split()) for one in examples) / len(examples))
    return [" ".join(one.text.split()[:count]) for one in examples]


def report(
    folder: Path, examples: Sequence[Example], counts: Mapping[str, Any]
) -> dict[str, dict[str, float]]:
    """Write report.html; return the scores of the model and of the baseline."""
    true = [one.true for one in examples]
    measured = {
        "generated": scores([one.generated for one in examples], true),
        FIRST_WORDS: scores(first_words(examples), true),
    }
    content = pages.page(
        "Instructions by the backward model",
        BODY,
        counts=counts.items(),
        names=["instructions", "BLEU", *ROUGE],
        measures=[[name, *(f"{x:.2f}" for x in of.values())] for name, of in measured.items()],
        examples=examples[:SHOWN],
    )
    write_file(folder / "report.html", content)
    return measured

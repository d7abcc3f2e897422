"""The chat page: the choice, candidates with scores, the search, and the page in a browser."""

import contextlib
import math
import shutil
import socket

import numpy as np
import pytest

import easyaira
from easyaira.chat.answers import Answers, Controls, State
from easyaira.chat.choice import choose, ranking
from easyaira.chat.search import Search
from easyaira.chat.words import WORDS
from easyaira.errors import DataError
from helpers import tiny

SORRY = "Sorry."
NAN = math.nan


@pytest.mark.parametrize(
    ("guards", "expected"),
    [([6, 4.9, 5.0], "c"), ([4.9, 4.99, -1], SORRY), (None, "b"), ([NAN, NAN, 5], "c")],
)
def test_the_answer_is_the_best_one_that_the_guard_lets_pass(guards, expected):
    assert choose(["a", "b", "c"], [1, 3, 2], guards, SORRY) == expected


def test_a_score_that_is_nan_is_never_chosen():
    assert ranking([NAN, 1, 2], None) == [2, 1]
    assert ranking([NAN, NAN], None) == []
    assert choose(["a"], [1], [NAN], SORRY) == SORRY
    assert ranking([1, 1, 2], None) == [2, 0, 1]  # of equal rewards, the first


class Stub:
    """A scorer with fixed scores, or an error."""

    def __init__(self, scores):
        self.scores, self.seen = scores, []

    def check(self, messages):
        pass

    def of_answers(self, conversations):
        self.seen += conversations
        if isinstance(self.scores, Exception):
            raise self.scores
        return np.array(self.scores, np.float32)

    of_texts = of_answers


def controls(guard=True, samples=3, **sampling):
    return Controls(samples, guard, 0, {"max_new_tokens": 6, "temperature": 1.0} | sampling)


@pytest.mark.parametrize(
    ("reward", "guard", "on", "answer"),
    [
        ([1, 3, 2], [6, 4.9, 5.0], True, "c"),
        ([1, 3, 2], [0, 0, 0], True, SORRY),
        ([1, 3, 2], [0, 0, 0], False, "b"),
        ([1, NAN, 2], [6, 6, NAN], True, "a"),
        (RuntimeError("no memory"), [6, 6, 6], True, SORRY),
        ([1, 3, 2], RuntimeError("no memory"), True, SORRY),
        ([1, 3, 2], RuntimeError("no memory"), False, "b"),
        ([1, 3], [6, 6, 6], True, SORRY),
    ],
)
def test_a_failing_scorer_lets_nothing_pass(reward, guard, on, answer):
    answers = Answers(None, Stub(reward), Stub(guard), SORRY)
    state = answers.chosen("q", ["a", "b", "c"], controls(on))
    assert state.answer == answer
    assert bool(state.problem) == (answer == SORRY and guard != [0, 0, 0])
    assert not state.problem.startswith("error")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tiny.save(folder, tiny.CASES["llama"])
    return folder


@pytest.fixture(scope="module")
def model(folder):
    return easyaira.load(str(folder), template="plain")


def test_candidates_grow_into_what_generate_gives_and_see_the_question_alone(model):
    guard = Stub([6, 6])
    answers = Answers(model, None, guard, SORRY)
    states = list(answers.ask("Who?", controls(samples=2)))
    (expected,) = model.generate(["Who?"], num_samples=2, max_new_tokens=6, temperature=1.0)
    assert states[-1].texts == expected and states[-1].answer == expected[0]
    assert len(states) > 3 and all(state.answer is None for state in states[:-1])
    assert guard.seen == [f"Who? {text}" for text in expected]


def test_a_question_that_does_not_fit_is_refused(model):
    (state,) = Answers(model, None, None, SORRY).ask("long " * 40_000, controls())
    assert state.answer is None and "leaves no room" in state.problem


ROWS = [
    {"prompt": "what is red?", "completion": "a colour, red"},
    {"prompt": "what is Lima?", "completion": "the capital of Peru"},
    {"prompt": [{"role": "user", "content": "what is blue?"}], "completion": "a colour"},
    *[{"prompt": f"number {i}", "completion": f"it is {i}{i}"} for i in range(12)],
]


def test_the_search_gives_the_cosine_similarity_of_scikit_learn(tmp_path):
    pytest.importorskip("sklearn")
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.metrics.pairwise import cosine_similarity

    search = Search(str(tiny.write_rows(tmp_path / "rows.jsonl", ROWS)))
    for side in ("prompt", "completion"):
        texts = [row[side] if isinstance(row[side], str) else "what is blue?" for row in ROWS]
        vectorizer = TfidfVectorizer().fit(texts)
        asked = vectorizer.transform(["what is the colour red?"])
        wanted = cosine_similarity(asked, vectorizer.transform(texts))[0]
        hits = search.find("what is the colour red?", side)
        assert len(hits) == 10
        expected = sorted(wanted, reverse=True)[:10]
        np.testing.assert_allclose([hit.similarity for hit in hits], expected, atol=1e-6)
        assert getattr(hits[0], side) == texts[wanted.argmax()]
    pairs = [{"prompt": "who?", "chosen": "she", "rejected": "he"}]
    (hit,) = Search(str(tiny.write_rows(tmp_path / "pairs.jsonl", pairs))).find("she", "completion")
    assert hit.completion == "she" and hit.prompt == "who?"
    texts = Search(str(tiny.write_rows(tmp_path / "texts.jsonl", [{"text": "a tree"}])))
    assert texts.find("tree", "completion")[0].completion == "a tree"
    assert texts.find("tree", "prompt") == []  # plain text has none
    with pytest.raises(DataError, match="no words"):
        Search(str(tiny.write_rows(tmp_path / "bare.jsonl", [{"text": "?"}])))
    with pytest.raises(DataError, match="wanted"):
        Search(str(tiny.write_rows(tmp_path / "other.jsonl", [{"a": "b"}])))


def test_the_texts_of_both_languages_have_the_same_places():
    def shape(value):
        return len(value) if isinstance(value, list | dict) else "{" in value

    english, portuguese = ({k: shape(v) for k, v in WORDS[name].items()} for name in ("en", "pt"))
    assert english == portuguese


def test_rows_show_why_an_answer_was_chosen():
    pytest.importorskip("gradio")
    from easyaira.chat.page import rows

    state = State(["a", "b", "c"], [1, 3, 2], [6, 4.9, 5], order=[2, 0], answer="c")
    assert rows(state, WORDS["en"]) == [
        ["1", "c", "2", "5", "chosen"],
        ["2", "a", "1", "6", ""],
        ["", "b", "3", "4.9", "dropped"],
    ]


def test_the_status_says_why_every_candidate_was_dropped():
    from easyaira.chat.page import shown

    dropped = State(["a"], [1], [4.9], order=[], answer=SORRY)
    turns, left, note = shown(dropped, [], "who?", WORDS["en"])
    assert (turns, left) == ([("who?", SORRY)], "")
    assert note.startswith("Every candidate was dropped: the guard scored it below 5")
    dropped.problem = "no memory"
    assert shown(dropped, [], "who?", WORDS["en"])[2] == "no memory"
    assert shown(State(["a"], order=[0], answer="a"), [], "who?", WORDS["en"])[2] == ""


# In a browser


@contextlib.contextmanager
def browser():
    webdriver = pytest.importorskip("selenium.webdriver")
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not (chromium and driver):
        pytest.skip("no chromium and chromedriver; apt-get install chromium chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for flag in ("headless=new", "no-sandbox", "disable-gpu", "window-size=1280,1100"):
        options.add_argument(f"--{flag}")
    service = webdriver.ChromeService(executable_path=driver)
    made = webdriver.Chrome(options=options, service=service)
    try:
        yield made
    finally:
        made.quit()


def free_port():
    with socket.socket() as opened:
        opened.bind(("127.0.0.1", 0))
        return opened.getsockname()[1]


class Echo:
    """A model whose candidates are the question and HTML."""

    def __init__(self):
        self.inner = Answers(None, Stub([1, 3, 2]), Stub([6, 4.9, 5.0]), WORDS["en"]["apology"])

    guard = True

    def ask(self, question, controls):
        if len(question) > 1000:
            yield State([], problem="the question is too long")
            return
        texts = [question, "<b>second</b>", f"<img src=x onerror='document.title=1'>{question}"]
        yield State(texts)
        yield self.inner.chosen(question, texts, controls)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_the_page_asks_and_shows_answer_and_scores_and_no_html(tmp_path):
    pytest.importorskip("gradio")
    from easyaira.chat.page import build, serve
    from easyaira.generation.processors import Sampling

    search = Search(str(tiny.write_rows(tmp_path / "rows.jsonl", ROWS)))
    sampling = Sampling(end_ids=(0,), temperature=0.5)
    with browser() as window:
        page = build(Echo(), search, "runs/x", "en", sampling)
        try:
            window.get(serve(page, "127.0.0.1", free_port()))
            use(window)
        finally:
            page.close(verbose=False)


def use(window):
    from selenium.webdriver.common.by import By
    from selenium.webdriver.support.ui import WebDriverWait

    def wait(condition):
        return WebDriverWait(window, 30).until(lambda _: condition())

    def text(name):
        return window.find_element(By.ID, name).text

    def find(name, tag):
        return window.find_element(By.CSS_SELECTOR, f"#{name} {tag}")

    def fill(name, value):
        box = find(name, "textarea")
        changed = "arguments[0].dispatchEvent(new Event('input'))"
        window.execute_script(f"arguments[0].value = arguments[1]; {changed}", box, value)

    def ask(question):
        fill("question", question)
        window.find_element(By.ID, "ask").click()

    wait(lambda: window.find_elements(By.CSS_SELECTOR, "#question textarea"))
    question = "<script>document.title=1</script> <|endoftext|> <b>who</b>?"
    ask(question)
    wait(lambda: "chosen" in text("candidates"))
    assert f"<img src=x onerror='document.title=1'>{question}" in text("talk")
    shown = text("candidates")
    assert shown.index("<img src=x") < shown.index("<b>second</b>")
    assert all(word in shown for word in ("4.9", "dropped", "3", "6"))
    for name in ("talk", "candidates"):
        assert not window.find_elements(By.CSS_SELECTOR, f"#{name} img[src=x], #{name} b")
    assert window.title == "Ask runs/x"
    ask("x" * 200_000)
    wait(lambda: "too long" in text("status"))
    ask(" ")
    wait(lambda: text("status") == "Type a question.")
    assert not window.find_elements(By.CSS_SELECTOR, "#candidates td")
    window.set_window_size(500, 1100)  # the least of Chromium
    ask("who?")
    wait(lambda: "chosen" in text("candidates"))
    broken = "return [...document.querySelectorAll('#candidates th')].map(e => e.clientHeight)"
    assert max(window.execute_script(broken)) < 60  # no heading breaks inside a word
    window.execute_script("document.querySelector('#search button').click()")
    for words, wanted in (("blue", "a colour"), ("zzz", "No row holds these words.")):
        fill("wanted", words)
        window.find_element(By.ID, "find").click()
        wait(lambda wanted=wanted: wanted in text("rows"))
    assert "number" not in text("rows")
    hosts = window.execute_script(
        "return performance.getEntriesByType('resource').map(e => new URL(e.name).hostname)"
    )
    assert set(hosts) == {"127.0.0.1"}

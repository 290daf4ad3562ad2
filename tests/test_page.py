"""The page of a run: what it says, that text stays text, equal bytes; then the same in a headless browser, opened from disk."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator, Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from browser.chromium import DESKTOP, PHONE, chromium, complaints, emulate, requests
from test_tables import result, table
from typer.testing import CliRunner

from gsil_bench import cli, compare
from gsil_bench.errors import MissingLibraryError, UserError
from gsil_bench.records import CellFailure
from gsil_bench.reporting import page, plots
from gsil_bench.reporting.comparison import Comparison
from gsil_bench.reporting.run_data import Curve, RunData, ShownCell, ShownTask, collect

ATTACK = "</script><script>window.broken = 1</script><img src=x onerror='window.broken = 1'>"
NASTY = (
    ATTACK, "<b>bold</b> &amp; <!-- ", "a | b || c", "$\\alpha$ & % _x_ \\end{document}",
    "\x00\x07\x1b[31mred\x1b[0m\x7f", "\ud800 alone \udfff",
    "\u202eright to left\u2066 and \u200b", "line\u2028separator\u2029", "\ufffe\uffff", "]]>", "'\"`{{ 7 * 7 }}",
)  # fmt: skip
LONG = "0123456789 " * 1860 + "the end"  # 20 kB


class Reader(HTMLParser):
    """Tags, ids and the text of a page as a browser would see them."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[str] = []
        self.ids: list[str] = []
        self.scripts: list[str] = []
        self.words: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.ids += [str(value) for name, value in attrs if name == "id"]
        assert not [name for name, _ in attrs if name.startswith("on")], "an attribute that runs a script"

    def handle_data(self, data: str) -> None:
        (self.scripts if self.tags[-1:] == ["script"] and self.tags.count("script") > len(self.scripts) else self.words).append(
            data
        )


def shown_task(
    name: str, methods: Sequence[str], answers: Sequence[Sequence[str]], scores: Sequence[Sequence[float]]
) -> ShownTask:
    """Item i is asked "Question i"; answers[m][i] and scores[m][i] are method m's."""
    count = len(answers[0])
    cells = [
        ShownCell(method, 0, tuple(own_scores), tuple(f"because {text[:60]}" for text in own), tuple(((text,),) for text in own))
        for method, own, own_scores in zip(methods, answers, scores, strict=True)
    ]
    prompts = tuple((("user", f"Question {at}: {answers[0][at][:80]}"),) for at in range(count))
    ids = tuple(f"q{at}" for at in range(count))
    return ShownTask(name, "accuracy", 1.0, True, ids, ("",) * count, prompts, ((),) * count, tuple(cells))


def nasty_run() -> RunData:
    """Two methods with unfriendly names, notes, reasons and answers, and a third that failed."""
    first, second = table(40, 8, 0, 52)
    methods = [f"sft{ATTACK}", "gsil $x_1$ <b>", "spin"]
    results = (
        result(methods[0], second, task="quiz<i>", warnings=(ATTACK,), provenance={"command": ATTACK, "packages": {"<b>": "1"}}),
        result(methods[1], first, task="quiz<i>"),
    )
    failures = (CellFailure("spin", 0, "quiz<i>", f"exploded: {ATTACK}\ud800"),)
    comparison = Comparison.of(results, failures, methods=methods, tasks=["quiz<i>"], control=methods[0], notes=list(NASTY))
    answers = [[*NASTY, LONG], [*reversed(NASTY), LONG]]
    scores = [[float(at % 2) for at in range(12)], [1.0] * 12]
    tasks = (shown_task("quiz<i>", methods[:2], answers, scores),)
    curves = (Curve(methods[0], 0, tuple({"step": at, "loss": 1 / (at + 1), ATTACK: float(at)} for at in range(5)), ()),)
    return RunData(comparison, results, failures, curves, tasks, f"note: '{ATTACK}'\n")


def written(data: RunData, folder: Path, name: str = "report.html") -> Path:
    (folder / name).write_text(page.render_page(data, *page.draw(data)), encoding="utf-8")
    return folder / name


@pytest.mark.parametrize("text", [*NASTY, LONG])
def test_embedded_text_comes_back_and_cannot_end_its_tag(text: str) -> None:
    embedded = page.embedded({"text": text})
    assert json.loads(embedded) == {"text": text}
    assert not re.search("[<>&\u2028\u2029\x00-\x1f\x7f]", embedded)
    embedded.encode("utf-8")


def test_unfriendly_text_is_text() -> None:
    data = nasty_run()
    text = page.render_page(data, *page.draw(data))
    text.encode("utf-8")
    read = Reader(text)
    assert read.tags.count("script") == 2 and not {"img", "b", "i", "iframe", "object"} & set(read.tags)
    assert len(read.ids) == len(set(read.ids))
    words = " ".join(read.words)
    assert f"exploded: {ATTACK}" in words and "a | b || c" in words and "{{ 7 * 7 }}" in words and "$x_1$ <b>" in words
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f\u202e]", text)
    assert not re.search(r"(?:src|href)=\"(?!#|data:)", text.replace('xlink:href="#', ""))


def test_the_page_says_what_the_table_says() -> None:
    data = nasty_run()
    words = " ".join(Reader(page.render_page(data, [], "none here")).words)
    assert "gsil $x_1$ <b>: better on quiz<i>." in words
    assert "spin: failed on quiz<i>." in words
    for said in ("40.0", "48.0", "+8.0 [", "★", "▲", "Plots are not drawn: none here"):
        assert said in words, said


def test_a_refused_cell_says_why() -> None:
    scores = table(40, 8, 0, 52)
    results = (result("sft", scores[0]), result("spin", scores[1], comparable={"protocol": "another"}))
    data = RunData(Comparison.of(results), results, (), (), (), "")
    words = " ".join(Reader(page.render_page(data, [])).words)
    assert "refused" in words and "protocol another against greedy-v1" in words


def test_without_matplotlib_the_page_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str, what: str) -> Any:
        raise MissingLibraryError(f"{what} needs {name}")

    monkeypatch.setattr(plots, "library", missing)
    drawn, why = page.draw(nasty_run())
    assert drawn == [] and "needs matplotlib" in why
    assert "Plots are not drawn: plots needs matplotlib" in " ".join(Reader(page.render_page(nasty_run(), drawn, why)).words)


def test_any_number_of_the_metrics_can_be_chosen() -> None:
    rows = tuple({"step": at, "loss": 1.0, "reward": 0.5, "shadow/spin/loss": 2.0} for at in (1, 2))
    data = RunData(Comparison.of([result("sft", [1.0])]), (), (), (Curve("sft", 0, rows, ()),), (), "")
    assert page.quantities(data.curves) == ["loss", "reward", "shadow/spin/loss"]
    text = page.render_page(data, *page.draw(data))
    assert 'value="plot-curve-reward"' in text and 'id="plot-curve-shadow-loss"' in text


def test_a_text_is_kept_once_and_a_very_long_one_says_what_is_missing() -> None:
    texts = page.Texts()
    assert [texts.number("a"), texts.number("b"), texts.number("a")] == [0, 1, 0]
    texts.number("x" * (page.LONGEST + 5))
    assert texts.all[2].endswith("[… 5 more characters are in the run's store]")
    assert len(LONG) < page.LONGEST


def test_costs_are_summed_over_seeds_and_counted_once_for_all_tasks() -> None:
    results = tuple(result("sft", [1.0], task, seed) for task in ("a", "b") for seed in (0, 1))
    data = RunData(Comparison.of(results), results, (), (), (), "")
    assert data.costs == {"sft": {"seconds": 4.0, "steps": 20, "tokens": 1000}}


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small comparison of the embedded suite, with the page that `compare` writes."""
    out = tmp_path_factory.mktemp("run") / "out"
    arguments = ["compare", "--methods", "gsil-logistic", "--tasks", "mini-gsm8k", "--limit", "4", "--limit-demonstrations", "24"]
    assert compare.call(cli.app, [*arguments, "--set", "gsil-logistic.rounds=2", "--out", str(out)]) == 0
    return out


def test_compare_writes_the_page_and_report_the_same_one(run_folder: Path, tmp_path: Path) -> None:
    first = (run_folder / "report.html").read_bytes()
    done = CliRunner().invoke(cli.app, ["report", str(run_folder), "--out", str(tmp_path / "all")])
    assert done.exit_code == 0, done.output
    assert (tmp_path / "all" / "report.html").read_bytes() == first
    names = {path.relative_to(tmp_path / "all").as_posix() for path in (tmp_path / "all").rglob("*") if path.is_file()}
    assert {"table.md", "table.csv", "table.json", "table.tex", "plots/forest-mini-gsm8k.svg"} <= names
    assert {name[:-4] for name in names if name.endswith(".svg")} == {name[:-4] for name in names if name.endswith(".png")}
    assert (tmp_path / "all" / "table.json").read_bytes() == (run_folder / "table.json").read_bytes()


def test_a_run_is_collected(run_folder: Path) -> None:
    data = collect(run_folder)
    assert [curve.method for curve in data.curves] == ["gsil-logistic"] and len(data.curves[0].round_starts) == 1
    steps = [row["step"] for row in data.curves[0].rows]
    assert steps == list(range(1, len(steps) + 1))
    task = data.tasks[0]
    assert task.name == "mini-gsm8k" and len(task.ids) == 4 and task.why == ""
    assert all(prompt[0][0] == "user" and prompt[0][1] for prompt in task.prompts)
    assert all(len(answers) == 1 for cell in task.cells for answers in cell.answers)
    assert data.remarks == ()


def test_what_was_removed_is_said(run_folder: Path, tmp_path: Path) -> None:
    import shutil

    shutil.copytree(run_folder, tmp_path / "copy")
    shutil.rmtree(tmp_path / "copy" / "store")
    data = collect(tmp_path / "copy")
    assert data.curves == () and "no training curves of gsil-logistic, seed 0" in data.remarks[0]
    assert "removed or damaged" in data.tasks[0].cells[0].why and data.tasks[0].cells[0].answers == ((),) * 4
    assert "removed or damaged" in data.tasks[0].why


def test_a_folder_without_a_comparison_is_one_line(tmp_path: Path) -> None:
    done = CliRunner().invoke(cli.app, ["report", str(tmp_path)])
    assert done.exit_code == 2 and "no table.json" in done.output and done.output.count("\n") == 1
    (tmp_path / "table.json").write_text("{}")
    with pytest.raises(UserError, match="another version wrote it"):
        collect(tmp_path)


# In a browser


@pytest.fixture(scope="module")
def nasty_page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written(nasty_run(), tmp_path_factory.mktemp("nasty"))


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    with chromium(tmp_path_factory.mktemp("profile")) as found:
        yield found


def key(driver: Any, name: str) -> None:
    from selenium.webdriver.common.keys import Keys

    driver.switch_to.active_element.send_keys(getattr(Keys, name))


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("size", [DESKTOP, PHONE])
def test_it_opens_from_disk_in_silence(
    driver: Any, nasty_page: Path, run_folder: Path, size: tuple[int, int], dark: bool
) -> None:
    emulate(driver, size, dark)
    for path in (nasty_page, run_folder / "report.html"):
        requests(driver), complaints(driver)
        driver.get(path.as_uri())
        assert requests(driver) == [path.as_uri()]
        assert complaints(driver) == []
        assert driver.execute_script("return window.broken") is None
        assert driver.execute_script("return document.documentElement.scrollWidth <= window.innerWidth")
        assert driver.execute_script("return window.innerWidth") == size[0]
        background = driver.execute_script("return getComputedStyle(document.body).backgroundColor")
        assert background == ("rgb(21, 23, 26)" if dark else "rgb(255, 255, 255)")


def test_unfriendly_answers_are_shown_as_text(driver: Any, nasty_page: Path) -> None:
    """Each of the twelve items in turn: what can be seen is there as it is, what cannot is named."""
    emulate(driver, DESKTOP, False)
    driver.get(nasty_page.as_uri())
    driver.execute_script("document.getElementById('list').focus()")
    seen = ""
    for _ in range(12):
        seen += driver.execute_script("return document.getElementById('detail').textContent") + "\n"
        key(driver, "ARROW_DOWN")
    for said in (
        ATTACK,
        "<b>bold</b> &amp; <!-- ",
        "a | b || c",
        "$\\alpha$ & % _x_",
        "U+0007",
        "U+001B",
        "U+D800",
        "U+202E",
        "U+FFFE",
    ):
        assert said in seen, said
    assert driver.execute_script("return document.querySelectorAll('#detail img, #detail b, #detail script').length") == 0
    details = driver.find_element("css selector", "#detail article details")
    assert "20,467 characters" in details.text and "the end" not in details.text
    details.find_element("css selector", "summary").click()
    driver.execute_script("return new Promise((done) => setTimeout(done, 50))")
    assert "the end" in details.text
    assert complaints(driver) == [] and driver.execute_script("return window.broken") is None


def test_sorting(driver: Any, nasty_page: Path) -> None:
    driver.get(nasty_page.as_uri())
    head = driver.find_elements("css selector", "#verdicts thead button")[1]

    def order() -> list[str]:
        return [row.text[:4] for row in driver.find_elements("css selector", "#verdicts tbody th")]

    assert order() == ["sft<", "gsil", "spin"]
    head.click()
    assert order() == ["gsil", "sft<", "spin"]  # 48, 40, and the failed one last
    state = "return document.querySelectorAll('#verdicts thead th')[1].getAttribute('aria-sort')"
    assert driver.execute_script(state) == "descending"
    head.send_keys(" ")
    assert order() == ["sft<", "gsil", "spin"] and driver.execute_script(state) == "ascending"


def test_filters(driver: Any, nasty_page: Path) -> None:
    """The first method has every second item right, the second all: six items are right for the second alone."""
    from selenium.webdriver.support.ui import Select

    emulate(driver, DESKTOP, False)
    driver.get(nasty_page.as_uri())
    count = driver.find_element("id", "count")
    Select(driver.find_element("id", "better")).select_by_index(2)
    Select(driver.find_element("id", "worse")).select_by_index(1)
    assert count.text.startswith("6 of 12 items that gsil $x_1$ <b> answers better than sft")
    assert len(driver.find_elements("css selector", "#list li")) == 6
    Select(driver.find_element("id", "worse")).select_by_index(0)
    Select(driver.find_element("id", "better")).select_by_index(0)
    driver.find_element("id", "search").send_keys("A | B ||")
    time.sleep(0.3)
    assert count.text.startswith("2 of 12")  # in one item's answer of each method


def test_every_control_is_reached_with_the_keyboard(driver: Any, run_folder: Path) -> None:
    emulate(driver, DESKTOP, False)
    driver.get((run_folder / "report.html").as_uri())
    wanted = driver.execute_script(
        "return [...document.querySelectorAll('a, button:not(:disabled), select, input, summary, [tabindex=\"0\"]')]"
        ".filter((each) => each.checkVisibility()).length"
    )
    seen = set()
    for _ in range(wanted + 5):
        key(driver, "TAB")
        seen.add(driver.switch_to.active_element.id)
    body = driver.find_element("tag name", "body").id
    assert len(seen - {body}) == wanted > 20


def test_the_switch_of_colours(driver: Any, nasty_page: Path) -> None:
    emulate(driver, DESKTOP, False)
    driver.get(nasty_page.as_uri())
    ink = "return getComputedStyle(document.querySelector('#differences svg text')).fill"
    light = driver.execute_script(ink)
    driver.find_element("css selector", "[data-set-theme=dark]").click()
    assert (light, driver.execute_script(ink)) == ("rgb(27, 28, 30)", "rgb(232, 233, 235)")


def test_ten_methods_and_fifteen_hundred_items(driver: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Everything is there and one page of it is in the document; times and sizes are printed, not judged."""
    methods = [f"method-{number}" for number in range(10)]
    body = "First we add the apples, then we take away what was eaten. " * 7
    answers = [[f"{method} on {at}: {body}" for at in range(1500)] for method in methods]
    scores = [[float((at * 7 + number) % 10 < 5) for at in range(1500)] for number, _ in enumerate(methods)]
    results = tuple(result(method, own) for method, own in zip(methods, scores, strict=True))
    data = RunData(Comparison.of(results), results, (), (), (shown_task("quiz", methods, answers, scores),), "")
    path = written(data, tmp_path)
    emulate(driver, DESKTOP, False)
    driver.get(path.as_uri())
    load = driver.execute_script("const t = performance.getEntriesByType('navigation')[0]; return t.loadEventEnd - t.startTime")
    frames = driver.execute_async_script(SCROLL)
    filtered = driver.execute_script(
        "const t = performance.now(); document.getElementById('search').value = 'method-3 on 1499'; filterItems();"
        "return [performance.now() - t, state.shown.length]"
    )
    with capsys.disabled():
        print(f"\n10 methods × 1,500 items: {path.stat().st_size / 2**20:.1f} MiB, loaded in {load:.0f} ms, scrolling: longest "
              f"frame {max(frames):.0f} ms of {len(frames)}, search through all {filtered[0]:.0f} ms")  # fmt: skip
    assert filtered[1] == 1
    assert len(driver.find_elements("css selector", "#list li")) == 1 and complaints(driver) == []


SCROLL = """
const done = arguments[0], times = [], list = document.getElementById('list');
document.documentElement.style.scrollBehavior = 'auto';
let last = performance.now(), frame = 0;
requestAnimationFrame(function step(now) {
  times.push(now - last); last = now; list.scrollTop += 40; window.scrollBy(0, 25);
  if (++frame < 60) requestAnimationFrame(step); else done(times.slice(1));
});
"""

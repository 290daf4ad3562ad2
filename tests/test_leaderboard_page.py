"""The leaderboard's page in headless Chromium, from disk: nothing is fetched, the console is silent, the keyboard is enough."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from browser.chromium import DESKTOP, PHONE, chromium, complaints, emulate, requests
from leaderboard_support import FRAME, run_of, write_run

from gsil_bench.leaderboard.board import boards_of
from gsil_bench.leaderboard.build import build
from gsil_bench.leaderboard.entries import Said, read_entries
from gsil_bench.leaderboard.submit import submit
from gsil_bench.records import digest

METHODS = ("start", "sft", "sft-continued", "gsil-logistic", "gsil-brier")
ROWS = "return [...document.querySelectorAll('.task tbody tr')].filter(row => row.offsetParent).map(row => row.dataset.method)"
FIRST = "return [...document.querySelector('.task:not([hidden]) tbody').rows].map(row => row.dataset.method)"
ENTER, TAB, DOWN, ESCAPE = "\ue007", "\ue004", "\ue015", "\ue00c"


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Five methods on three tasks, and two of them from another model."""
    folder = tmp_path_factory.mktemp("page")
    submit(write_run(folder / "run", run_of(METHODS)), folder / "board", None, Said(), False, False)
    others = []
    for result in run_of(("start", "sft"), (0,)):
        result.provenance["inputs"]["model"]["name"] = "other"
        changed = {**result.comparable, "model": digest("other")}
        others.append(dataclasses.replace(result, comparable=changed, fingerprint=digest([result.fingerprint, FRAME])))
    submit(write_run(folder / "other", others), folder / "board", None, Said(), False, False)
    build(folder / "board", boards_of(read_entries(folder / "board")[0]))
    return (folder / "board" / "index.html").as_uri()


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    with chromium(tmp_path_factory.mktemp("profile")) as driver:
        yield driver


def keys(driver: Any, text: str) -> Any:
    """Type into whatever has the focus; returns what has it then."""
    driver.switch_to.active_element.send_keys(text)
    return driver.switch_to.active_element


@pytest.mark.parametrize("size", [DESKTOP, PHONE])
@pytest.mark.parametrize("dark", [False, True])
def test_it_opens_from_disk_without_a_request_or_a_word(page: str, browser: Any, size: tuple[int, int], dark: bool) -> None:
    emulate(browser, size, dark)
    complaints(browser), requests(browser)
    browser.get(page)
    assert complaints(browser) == []
    assert requests(browser) == [page]
    assert browser.execute_script("return document.documentElement.scrollWidth <= document.documentElement.clientWidth")
    paper = browser.execute_script("return getComputedStyle(document.body).backgroundColor")
    assert (paper == "rgb(255, 255, 255)") is not dark
    assert len(browser.execute_script(ROWS)) == 5 * 3 + 2 * 3


def test_search_filter_and_sort_by_keyboard(page: str, browser: Any) -> None:
    emulate(browser, DESKTOP, False)
    browser.get(page)
    assert browser.execute_script(FIRST)[0] == "gsil-logistic"  # the best of the first task
    keys(browser, "/")
    found = keys(browser, "brier")
    assert found.get_attribute("name") == "search"
    assert set(browser.execute_script(ROWS)) == {"gsil-brier"}
    keys(browser, ESCAPE)
    assert len(browser.execute_script(ROWS)) == 21
    keys(browser, TAB)
    assert keys(browser, DOWN).get_attribute("name") == "model"
    assert len(browser.execute_script(ROWS)) == 15  # mini, the first of the two
    keys(browser, TAB)
    keys(browser, DOWN)
    assert len(browser.execute_script(ROWS)) == 5  # and its first task
    assert "5 rows in 1 table" in browser.find_element("tag name", "output").text


def test_heads_sort_both_ways_and_reset_undoes(page: str, browser: Any) -> None:
    emulate(browser, DESKTOP, False)
    browser.get(page)
    ranked = browser.execute_script(FIRST)
    button = browser.find_element("css selector", ".task th[data-key=method] button")
    button.send_keys(ENTER)
    assert browser.execute_script(FIRST) == sorted(ranked)
    button.send_keys(ENTER)
    assert browser.execute_script(FIRST) == sorted(ranked, reverse=True)
    assert button.find_element("xpath", "..").get_attribute("aria-sort") == "descending"
    browser.find_element("css selector", "button[type=reset]").send_keys(ENTER)
    browser.execute_async_script("setTimeout(arguments[0], 50)")
    assert browser.execute_script(FIRST) == ranked


def test_a_link_to_a_hidden_card_shows_it(page: str, browser: Any) -> None:
    emulate(browser, DESKTOP, False)
    browser.get(page)
    keys(browser, "/")
    keys(browser, "brier")
    number = METHODS.index("sft") + 1
    hidden = f"return document.getElementById('method-{number}').offsetParent === null"
    assert browser.execute_script(hidden)
    browser.execute_async_script(f"location.hash = 'method-{number}'; setTimeout(arguments[0], 100)")
    assert not browser.execute_script(hidden)


def test_without_its_script_every_row_is_there(page: str) -> None:
    text = Path(page.removeprefix("file://")).read_text(encoding="utf-8").split("<script>")[0]
    assert text.count("<tr data-rank=") + text.count('<tr class="best" data-rank=') == 21
    assert 'class="tools" role="search" aria-label="Search, filter and sort" hidden>' in text

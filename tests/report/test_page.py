"""The page in a real browser: it needs nothing but itself, shows every chart, and fits a screen, a phone, darkness and paper."""

from __future__ import annotations

import pytest

from laid_ds.report.write import write_report
from tests.report.headless import CHROMIUM, chromium
from tests.report.report_world import write_evaluation, write_run, write_shards

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here (Debian: apt-get install chromium)")
WIDTHS, SCHEMES = (1280, 390), ("light", "dark")
MODELS = {"student": 2.0, "teacher": 40.0, "laid": 8.0, "a_very_long_name_of_a_model_that_does_not_fit_a_phone": 3.0}


@pytest.fixture(scope="module")
def shown(tmp_path_factory):
    """(page, browser)."""
    place = tmp_path_factory.mktemp("page")
    write_shards(place / "shards", 24)
    write_evaluation(place / "e", MODELS, place / "shards", attention=(6, 8))
    write_run(place / "e" / "laid", 400, attention=True, learned={"layers": 6, "heads": 8, "teacher_heads": 16, "planes": 32})
    write_run(place / "e" / "sft", 200, planned=400, half_a_line=True, losses={"kl": 0.0})
    page = write_report(place / "e", "student").path
    with chromium(place / "profile") as browser:
        yield page, browser


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("width", WIDTHS)
def test_it_is_quiet_needs_no_network_and_fits(shown, width, scheme):
    page, browser = shown
    browser.show(page, width, scheme)
    browser.ask("for (const one of document.querySelectorAll('details')) one.open = true")
    assert browser.complaints() == []
    assert [url for url in browser.requests() if not url.startswith("data:")] == [page.resolve().as_uri()]
    assert browser.ask("document.documentElement.scrollWidth") <= width
    outside = (
        "[...document.querySelectorAll('body *')].filter(one => !one.closest('.scroll table') && !one.closest('svg') &&"
        " one.getBoundingClientRect().right > innerWidth + 1).map(one => one.outerHTML.slice(0, 80))"
    )
    assert browser.ask(outside) == []


@pytest.mark.parametrize("width", WIDTHS)
def test_every_chart_is_seen_and_its_words_can_be_read(shown, width):
    page, browser = shown
    browser.show(page, width, "light")
    browser.ask("for (const one of document.querySelectorAll('details')) one.open = true")
    boxes = browser.ask(
        "[...document.querySelectorAll('figure svg')].map(one => [one.clientWidth, one.clientHeight, one.querySelectorAll('path').length])"
    )
    assert len(boxes) > 20
    assert all(w >= 250 and h >= 100 and paths > 3 for w, h, paths in boxes), boxes
    heights = browser.ask("[...document.querySelectorAll('figure:not(.wide) svg text')].map(one => one.getBoundingClientRect().height)")
    assert min(heights) > 7
    cut = (
        "[...document.querySelectorAll('figure svg text')].filter(one => one.getBoundingClientRect().right >"
        " one.closest('svg').getBoundingClientRect().right + 1).map(one => one.closest('svg').ariaLabel + ': ' + one.textContent)"
    )
    assert browser.ask(cut) == []
    assert browser.ask("[...document.images].every(one => one.complete && one.naturalWidth > 0)") is True
    assert browser.ask("document.images.length") == 4 * len(MODELS)


def test_darkness_changes_paper_and_every_line_of_a_model(shown):
    page, browser = shown
    found = {}
    for scheme in SCHEMES:
        browser.show(page, 1280, scheme)
        paper = browser.ask("getComputedStyle(document.body).backgroundColor")
        words = browser.ask("getComputedStyle(document.querySelector('figure svg text')).fill")
        lines = browser.ask(
            "[...document.querySelectorAll('figure svg path')].map(one => getComputedStyle(one).stroke).filter(one => one != 'none')"
        )
        found[scheme] = paper, words, set(lines)
    assert found["light"][0] != found["dark"][0]
    assert found["light"][1] != found["dark"][1]
    assert not {"rgb(11, 95, 165)", "rgb(28, 29, 31)"} & found["dark"][2]
    browser.show(page, 1280, "dark", media="print")
    assert browser.ask("getComputedStyle(document.body).backgroundColor") == found["light"][0]


def test_a_model_has_one_colour_on_the_whole_page(shown):
    page, browser = shown
    browser.show(page, 1280, "light")
    found = browser.ask(
        "[...document.querySelectorAll('td:first-child, article h4')].filter(one => one.querySelector('.swatch'))"
        ".map(one => [one.textContent.split(':')[0], getComputedStyle(one.querySelector('.swatch')).backgroundColor])"
    )
    colours = {}
    for name, colour in found:
        colours.setdefault(name, set()).add(colour)
    assert all(len(those) == 1 for those in colours.values()), colours
    assert len(set.union(*colours.values())) == len(colours) == 5


def test_tables_sort_by_their_numbers(shown):
    page, browser = shown
    browser.show(page, 1280, "light")
    column = "[...document.querySelector('table').tBodies[0].rows].map(row => row.cells[3].textContent)"
    browser.ask("document.querySelectorAll('table th')[3].click()")
    up = browser.ask(column)
    browser.ask("document.querySelectorAll('table th')[3].click()")
    assert [float(text) for text in up] == sorted(float(text) for text in up)
    assert browser.ask(column) == sorted(up, reverse=True)

"""The report's pages in headless Chromium: nothing is complained of, nothing is loaded, nothing is wider than the window."""

from pathlib import Path

import pytest
from selenium.webdriver import Chrome
from selenium.webdriver.common.by import By

from gadjax.config import read_values
from gadjax.report.comparison import compare_runs, write_comparison
from gadjax.report.page import write_report
from gadjax.runs import CONFIG, Run
from tests import tiny
from tests.browser import chromium, complaints

pytestmark = [pytest.mark.browser, pytest.mark.timeout(600)]  # it may wait for a whole run

SECTIONS = {"health", "comparison", "time", "styles", "evolution", "answers", "validation", "stage-1"}
FIRST = "return document.querySelector('svg .line')?.getBoundingClientRect().width ?? 0"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    experiment, done = tiny.finished(tmp_path_factory.getbasetemp())
    assert done.returncode == 0, done.stderr
    return experiment.run


@pytest.fixture(scope="module", params=[1200, 600], ids=["wide", "narrow"])
def window(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory):
    with chromium(tmp_path_factory.mktemp("profile"), request.param) as driver:
        yield driver


def looked_at(window: Chrome, page: Path) -> set[str]:
    """The page's sections, if it is well."""
    window.get(page.resolve().as_uri())
    assert complaints(window) == []
    inner, scrolled = window.execute_script("return [window.innerWidth, document.documentElement.scrollWidth]")
    assert scrolled <= inner, "the page itself does not scroll sideways"
    return {section.get_attribute("id") or "" for section in window.find_elements(By.TAG_NAME, "section")}


def test_the_report_of_a_run(run: Path, window: Chrome):
    assert looked_at(window, run / "report" / "index.html") >= SECTIONS
    assert window.execute_script(FIRST) > 50, "lines are drawn"
    assert [figure.text.split("\n")[0].split(" seconds")[0] for figure in window.find_elements(By.CSS_SELECTOR, "#time figure")] == [
        f"A step of {stage}" for stage in tiny.STEPS
    ]
    assert all(0 < rect.size["width"] <= 1200 for rect in window.find_elements(By.CSS_SELECTOR, "#time figure rect"))
    for link in window.find_elements(By.CSS_SELECTOR, "nav a[href^='#']"):
        link.click()
        assert window.find_elements(By.CSS_SELECTOR, ":target")
    assert complaints(window) == []


def test_the_page_about_the_data(run: Path, window: Chrome):
    looked_at(window, run / "report" / "data.html")
    assert window.find_elements(By.TAG_NAME, "table")


def test_several_runs_on_one_page(run: Path, window: Chrome, tmp_path: Path):
    runs = {"one": run, "two": run}
    write_comparison(
        tmp_path / "compare.html", runs, {name: read_values(folder / CONFIG) for name, folder in runs.items()}, compare_runs(runs)
    )
    assert {"comparison", "stage-1"} <= looked_at(window, tmp_path / "compare.html")


def test_the_report_of_a_run_under_way_loads_itself_anew(run: Path, window: Chrome, tmp_path: Path):
    (tmp_path / "stages").symlink_to(run / "stages")
    page = write_report(tmp_path, Run.at(run).config.evaluated, under_way="gad")
    assert "evolution" in looked_at(window, page)
    assert "under way: gad" in window.find_element(By.TAG_NAME, "header").text
    assert window.find_element(By.CSS_SELECTOR, "meta[http-equiv=refresh]").get_attribute("content") == "30"

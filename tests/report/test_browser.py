"""The reports in a real browser: what a reader sees, with no request to any network. Skipped where there is no Chromium."""

import pytest
from browser import chromium
from curves import write_run
from run_folders import finished_run, growth, held_out, losses, write_metrics

from incr_ds.report.run_report import write_report
from incr_ds.study import report as study_report
from incr_ds.study.comparison import compare_curves, read_curve

HOSTILE = '<img src="http://example.org/x.png" onerror="document.title=1">'


@pytest.fixture(scope="module")
def visit():
    with chromium() as opened:
        yield opened


def one(folder):
    write_report([finished_run(folder / "run")], folder / "page.html")
    return "Training run run", 8


def side_by_side(folder):
    write_report([finished_run(folder / "a"), finished_run(folder / "b", (4.0, 3.0))], folder / "page.html")
    return "2 training runs", 8


def grown_with_hostile_names(folder):
    rows = [*losses(4.0, 3.0), (2, growth(HOSTILE)), (2, held_out(2.0), {f"validation_loss/{HOSTILE}": 1.0})]
    write_report([write_metrics(folder / HOSTILE.replace("/", "_"), rows)], folder / "page.html")
    return "Training run " + HOSTILE.replace("/", "_"), 8


def only_begun(folder):
    write_report([write_metrics(folder / "run", [])], folder / "page.html")
    return "Training run run", 0


def study(folder):
    runs = {"source": [8.0, 4.0], "grown": [4.0, 2.5], "scratch": [8.0, 3.2]}
    curves = [read_curve(name, write_run(folder / name, values, 1e6)) for name, values in runs.items()]
    found = compare_curves(*curves)
    study_report.draw_study(found, folder / "loss.png")
    study_report.write_report(found, folder / "loss.png", folder / "page.html", {"Recipe": {"a": HOSTILE}})
    return "Growth", 1


@pytest.mark.parametrize("make", [one, side_by_side, grown_with_hostile_names, only_begun, study])
def test_a_reader_sees_title_figures_and_tables_and_nothing_is_requested(visit, tmp_path, make):
    title, figures = make(tmp_path)
    seen = visit(tmp_path / "page.html")
    assert seen.page.title() == title and seen.page.inner_text("h1")
    sizes = seen.sizes("img")
    assert len(sizes) == figures
    for width, height, natural_width, natural_height in sizes:
        assert width > 300 and height > 80 and natural_width > 600 and natural_height > 200
    assert seen.page.locator("table").first.is_visible() and seen.page.locator("script").count() == 0
    # Nothing sticks out of the page: a wide table scrolls inside itself.
    assert seen.page.evaluate("document.documentElement.scrollWidth <= document.documentElement.clientWidth")
    assert seen.requests == [] and seen.errors == []


def test_settings_unfold_on_a_click(visit, tmp_path):
    one(tmp_path)
    page = visit(tmp_path / "page.html").page
    settings = page.locator("details pre")
    assert not settings.is_visible()
    page.click("summary")
    assert settings.is_visible() and "global_batch_size: 4" in settings.inner_text()


def test_a_page_that_asks_the_network_or_fails_would_be_noticed(visit, tmp_path):
    (tmp_path / "page.html").write_text(
        '<img src="http://127.0.0.1:9/x.png"><script>throw new Error("broken")</script>'
    )
    seen = visit(tmp_path / "page.html")
    assert seen.requests == ["http://127.0.0.1:9/x.png"] and "broken" in " ".join(seen.errors)


def test_the_pages_own_policy_stops_what_it_does_not_hold(visit, tmp_path):
    one(tmp_path)
    text = (tmp_path / "page.html").read_text()
    (tmp_path / "page.html").write_text(text.replace("<body>", "<body><script>document.title = 'changed'</script>"))
    seen = visit(tmp_path / "page.html")
    assert seen.page.title() == "Training run run" and "Content Security Policy" in " ".join(seen.errors)

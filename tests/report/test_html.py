"""The HTML of reports, in a real browser: nothing is fetched, nothing is logged, all is reached by the keyboard."""

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import qsurgeon
from qsurgeon.cli import main
from qsurgeon.errors import UsageError
from qsurgeon.report.html.places import Place, place_of, places
from qsurgeon.report.html.plots import Value, format_map, heat_map

CHROMIUM = Path("/usr/bin/chromium")
DRAWN = "[...document.querySelectorAll('.chart')].every(one => one.dataset.drawn > 0)"
needs_chromium = pytest.mark.skipif(not CHROMIUM.exists(), reason=f"no browser at {CHROMIUM}: apt-get install chromium")


@pytest.fixture(scope="module")
def page(small_model: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of a scan with data."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("QSURGEON_KERNELS", "eager")
        ids = torch.arange(24).reshape(2, 12)
        found = qsurgeon.scan("w4a4-mxfp4", small_model(), data=[{"input_ids": ids, "labels": ids}], formats=["nvfp4"])
    file = tmp_path_factory.mktemp("html") / "scan.html"
    file.write_text(found.to_html(), "utf-8")
    return file


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=str(CHROMIUM), args=["--no-sandbox"])
        yield started
        started.close()


def opened(browser: Any, file: Path, said: list[str], *, scheme: str = "light", width: int = 1280) -> Any:
    """Return the page in the browser once its charts are drawn. ``said``: what is logged, fails or is fetched."""
    page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("request", lambda request: said.append(request.url) if not request.url.startswith("file:") else None)
    page.goto(file.as_uri())
    page.wait_for_function(DRAWN, timeout=120_000)
    return page


@needs_chromium
@pytest.mark.parametrize("width", [1280, 400])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_page_is_drawn_without_a_word_and_fits(scheme: str, width: int, page: Path, browser: Any) -> None:
    said: list[str] = []
    shown = opened(browser, page, said, scheme=scheme, width=width)
    assert said == []
    assert shown.evaluate("document.documentElement.scrollWidth") <= width
    assert shown.locator(".chart svg").count() == 13
    background = shown.evaluate("getComputedStyle(document.body).backgroundColor")
    assert background == {"light": "rgb(255, 255, 255)", "dark": "rgb(22, 25, 29)"}[scheme]
    text = shown.evaluate("getComputedStyle(document.querySelector('.chart text')).fill")
    assert text == shown.evaluate("getComputedStyle(document.body).color")
    charts = shown.evaluate(
        "[...document.querySelectorAll('.chart svg')].map(one => one.getBoundingClientRect().width)"
    )
    assert max(charts) <= width
    shown.close()


@needs_chromium
def test_the_table_is_sorted_by_a_click_and_by_the_keyboard(page: Path, browser: Any) -> None:
    shown = opened(browser, page, [])
    column = "[...document.querySelectorAll('thead th')].map(one => one.textContent).indexOf('KL alone')"
    cells = f"[...document.querySelectorAll('tbody tr')].map(one => +one.cells[{column}].dataset.value)"
    button = shown.get_by_role("button", name="KL alone")
    button.click()
    numbers = shown.evaluate(cells)
    assert numbers == sorted(numbers)
    assert len(set(numbers)) > 5
    head = shown.locator("thead th", has=button)
    assert head.get_attribute("aria-sort") == "ascending"
    button.press("Enter")
    assert shown.evaluate(cells) == sorted(numbers, reverse=True)
    assert head.get_attribute("aria-sort") == "descending"
    shown.get_by_role("button", name="module").press("Space")
    names = shown.evaluate("[...document.querySelectorAll('tbody th')].map(one => one.textContent)")
    assert names == sorted(names)
    assert shown.locator("th[aria-sort]").count() == 1
    shown.close()


@needs_chromium
def test_a_chart_is_read_by_focus_and_by_hovering(page: Path, browser: Any) -> None:
    shown = opened(browser, page, [])
    section = shown.locator("section", has_text="beside a Gaussian").first
    said = section.locator("output")
    first = section.locator(".role-mark [tabindex='0']")
    assert first.count() == 1
    first.focus()
    assert "model.layers.0.self_attn.q_proj" in said.text_content()
    shown.keyboard.press("ArrowRight")
    assert "model.layers.0.self_attn.q_proj" not in said.text_content()
    shown.keyboard.press("End")
    assert "model.layers.1.mlp.down_proj" in said.text_content()
    assert section.locator(".role-mark [tabindex='0']").count() == 1
    section.locator(".role-mark [role=graphics-symbol]").first.hover()
    assert "model.layers.0.self_attn.q_proj" in said.text_content()
    shown.close()


@needs_chromium
def test_names_in_a_page_are_text_and_never_code(browser: Any, small_model: Callable[..., Any], tmp_path: Path) -> None:
    evil = "</script><img src=x onerror=console.log(1)>"
    recipe = qsurgeon.Recipe(version=1, rules=[{"name": evil, "target": ["layers"], "weight": "mxfp4"}])
    model = small_model()
    report = qsurgeon.inspect(qsurgeon.apply(recipe, model))
    (tmp_path / "page.html").write_text(report.to_html(), "utf-8")
    said: list[str] = []
    shown = opened(browser, tmp_path / "page.html", said)
    assert said == []
    assert shown.locator("img").count() == 0
    assert evil in shown.locator("tbody").text_content()
    shown.close()


def test_a_notebook_shows_inspect_and_scan_in_a_frame(small_model: Callable[..., Any]) -> None:
    shown = qsurgeon.inspect(small_model())._repr_html_()
    assert shown.startswith('<iframe title="Model" srcdoc="&lt;!doctype html&gt;')
    assert "&lt;script&gt;" in shown


def test_without_the_library_a_page_is_refused_and_a_notebook_shows_the_table(
    small_model: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "vl_convert", None)
    report = qsurgeon.inspect(small_model())
    missing = "charts are drawn by vl-convert-python, which is not installed: pip install 'qsurgeon[plots]'"
    for draw in (report.to_html, report.to_png):
        with pytest.raises(UsageError) as caught:
            draw()
        assert str(caught.value) == missing
    shown = report._repr_html_()
    assert "charts are drawn by vl-convert-python" in shown
    assert "model.layers.0.mlp.up_proj" in shown
    assert "class=&quot;chart&quot;" not in shown


def test_plan_and_inspect_write_pages_and_pictures(
    plain_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    html, png = tmp_path / "plan.html", tmp_path / "plan.png"
    line = ["qsurgeon", "plan", "w4a4-mxfp4", "-m", str(plain_folder), "--html", str(html), "--png", str(png)]
    monkeypatch.setattr(sys, "argv", line)
    with pytest.raises(SystemExit) as done:
        main()
    assert done.value.code in (0, None)
    assert html.read_text("utf-8").startswith("<!doctype html>")
    assert png.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    capfd.readouterr()
    with pytest.raises(SystemExit):
        main()
    assert capfd.readouterr().err == f"error: {html} exists; name another file or remove it first\n"


def test_a_module_has_a_place() -> None:
    assert place_of("model.layers.3.mlp.down_proj") == Place(3, "model.layers.mlp.down_proj")
    assert place_of("lm_head") == Place(None, "lm_head")
    assert place_of("h.0.attn.c_attn") == Place(0, "h.attn.c_attn")
    found = places(["model.layers.3.mlp.up_proj", "model.layers.3.self_attn.q_proj", "lm_head"])
    assert [one.projection for one in found.values()] == ["mlp.up_proj", "self_attn.q_proj", "lm_head"]
    towers = places(["vision.blocks.0.qkv", "model.layers.0.q_proj"])
    assert [one.projection for one in towers.values()] == ["vision.blocks.qkv", "model.layers.q_proj"]


def test_charts_are_data() -> None:
    values = [Value("layers.0.a", 1.5), Value("layers.1.a", None), Value("head", 2.0)]
    chart = heat_map("Title", "Words.", values, unit="dB", low_is_bad=True)
    assert chart is not None
    assert chart.spec["data"] == {"values": [{"module": "layers.0.a", "layer": 0, "projection": "a", "value": 1.5}]}
    assert json.loads(json.dumps(chart.spec)) == chart.spec
    assert format_map("Title", "Words.", [Value("head", "mxfp4")]) is None

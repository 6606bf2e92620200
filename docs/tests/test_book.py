"""The built book in a real browser: `make docs browse`, or `pytest docs/tests` with the extra [docs] installed.

Not part of `make test`, which needs neither the built book nor a browser. The browser is Playwright's own, where
`playwright install chromium` was run, else the Chromium or Chrome of the machine. The book is served on the loopback
address; every request to another host is refused, noted, and makes a test fail."""
import os
import re
import shutil
import sys
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from playwright.sync_api import sync_playwright

DOCS = Path(__file__).resolve().parent.parent
SITE = Path(os.environ.get("BOOK", DOCS / "_build" / "html")).resolve()  # BOOK=folder tries another copy
sys.path.insert(0, str(DOCS))
from vendor import fetch_axe  # noqa: E402

PAGES = sorted(path.relative_to(SITE).as_posix() for path in SITE.rglob("*.html")
               if not {"_static", "_modules"} & set(path.relative_to(SITE).parts))
SAMPLER = next((page for page in PAGES if re.match(r"\d+_sampler\.html", page)), "")
CHOSEN = [page for page in PAGES if re.search(r"(^|_)(index|bibliography|glossary|coords|sampler|cli)\.html", page)]
CHOSEN += ["api/sampler.html", "search.html?q=farthest"]


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *args):
        pass


@pytest.fixture(scope="session")
def address():
    """The book, served on a free port of this machine."""
    if not (SITE / "index.html").exists():
        pytest.fail(f"no book in {SITE}: build it with `make docs`", pytrace=False)
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(SITE))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


@pytest.fixture(scope="session")
def browser():
    names = "chromium", "chromium-browser", "google-chrome", "google-chrome-stable"
    with sync_playwright() as playwright:
        own = playwright.chromium.executable_path
        path = next((found for found in (own, *map(shutil.which, names)) if found and Path(found).exists()), None)
        if not path:
            pytest.fail("no Chromium or Chrome: install one, or run `.venv/bin/playwright install chromium`", False)
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def visit(browser, address):
    """`visit(page, width=1280)` opens a page of the book; at the end of the test it must have had no trouble."""
    trouble, contexts = [], []

    def refuse(route):
        trouble.append(f"asked for {route.request.url}")
        route.abort()

    def visit(name, width=1280, **options):
        context = browser.new_context(viewport={"width": width, "height": 900}, **options)
        contexts.append(context)
        context.route(lambda url: not url.startswith((address, "data:", "blob:")), refuse)
        page = context.new_page()
        page.on("console", lambda message: message.type == "error" and trouble.append(f"console: {message.text}"))
        page.on("pageerror", lambda error: trouble.append(f"error: {error}"))
        page.on("requestfailed", lambda request: request.failure != "csp" and trouble.append(f"failed: {request.url}"))
        page.on("response", lambda answer: answer.status >= 400 and trouble.append(f"{answer.status}: {answer.url}"))
        page.goto(address + name, wait_until="load")
        return page

    yield visit
    for context in contexts:
        context.close()
    assert not trouble, "\n".join(trouble)


# Every page ----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", PAGES)
def test_page_loads_in_peace(visit, name):
    """No error on the console, no failed request, none to another host; what should be a formula is one."""
    page = visit(name)
    if math := page.locator(".math").count():
        page.wait_for_function("() => window.MathJax?.startup?.promise")
        page.evaluate("() => MathJax.startup.promise")
        assert page.locator(".math mjx-container").count() >= math
        assert page.locator("mjx-merror, [data-mjx-error]").count() == 0
    page.wait_for_load_state("networkidle")


def test_display_math_of_the_sampler_is_drawn(visit):
    page = visit(SAMPLER)
    page.wait_for_selector("div.math mjx-container svg")
    assert page.locator("div.math mjx-container svg").first.bounding_box()["width"] > 100


@pytest.mark.parametrize("name", ["index.html", SAMPLER, "api/sampler.html"])
def test_nothing_is_wider_than_a_phone(visit, name):
    page = visit(name, width=390)
    assert page.evaluate("() => document.documentElement.scrollWidth") <= 390


# What the theme brings -----------------------------------------------------------------------------------------------

def test_search_finds_the_sampler(visit):
    page = visit("search.html?q=farthest")
    page.wait_for_selector(f'#search-results li a[href^="{SAMPLER}"]')  # results come in one by one


def test_search_begins_with_a_key(visit):
    page = visit("index.html")
    page.keyboard.press("Control+k")
    field = page.locator("input[type=search]:visible").first
    field.wait_for()
    field.fill("quantize")
    field.press("Enter")
    page.wait_for_selector("#search-results li a")


def test_dark_mode_is_chosen_and_stays(visit):
    page = visit(SAMPLER, color_scheme="light")
    look = "() => [document.documentElement.dataset.theme, getComputedStyle(document.body).backgroundColor]"
    before = page.evaluate(look)
    page.locator("button.theme-switch-button:visible").click()
    page.get_by_role("button", name="Dark", exact=True).click()
    after = page.evaluate(look)
    assert (before[0], after[0]) == ("light", "dark") and before[1] != after[1]
    page.reload()
    assert page.evaluate(look) == after


def test_previous_and_next_lead_through_the_book(visit):
    page = visit(SAMPLER)
    page.locator("a.right-next").click()
    page.wait_for_url(lambda url: SAMPLER not in url)
    page.locator("a.left-prev").click()
    page.wait_for_url(f"**/{SAMPLER}")


def test_buttons_open_the_notebook_elsewhere(visit):
    """The links are there, and are only followed when pressed; the file to download is the notebook of nbs/."""
    page, name = visit(SAMPLER), SAMPLER.replace(".html", ".ipynb")
    links = page.evaluate("() => [...document.querySelectorAll('.article-header-buttons a')].map(a => a.href)")
    assert any(re.fullmatch(rf"https://colab\..*/github/.*/blob/\w+/nbs/{name}", link) for link in links), links
    assert any(re.fullmatch(rf"https://mybinder\.org/v2/gh/.*nbs/{name}", link) for link in links), links
    assert (SITE / "_sources" / name).read_bytes() == (DOCS.parent / "nbs" / name).read_bytes()


def test_reference_leads_to_the_source(visit):
    page = visit("api/sampler.html")
    page.locator("dt a", has=page.locator(".viewcode-link")).first.click()
    page.wait_for_url("**/_modules/ferret_lite/sampler.html#*")
    assert page.locator("div.highlight pre").count()


# The figure to play with ---------------------------------------------------------------------------------------------

@pytest.fixture
def figure(visit):
    page = visit(SAMPLER)
    figure = page.locator(".sampler-figure")
    figure.scroll_into_view_if_needed()
    figure.locator("svg[role=img] circle").first.wait_for()
    return figure


def says(figure):
    return figure.locator("[aria-live]").inner_text()


def test_figure_begins_with_the_papers_numbers(figure):
    assert "keeps 128 of 512 points" in says(figure) and "24 neighbours" in says(figure)
    assert figure.locator("circle.point").count() == 512 and figure.locator("circle.kept").count() == 128
    assert figure.locator("circle.heard").count() == 24 and figure.locator("circle.taken").count() == 1


def test_figure_answers_to_buttons(figure):
    figure.get_by_role("button", name="disc").click()
    assert says(figure).startswith("Disc") and figure.locator("[aria-pressed=true]").count() == 2
    figure.get_by_role("button", name="block 2").click()
    assert "keeps 32 of 128 points" in says(figure)
    figure.get_by_role("button", name="block 3").click()
    assert "keeps 8 of 32 points" in says(figure)
    before = figure.locator("svg[role=img]").inner_html()
    figure.get_by_role("button", name="Draw other points").click()
    assert figure.locator("svg[role=img]").inner_html() != before


def test_figure_answers_to_the_keyboard(figure):
    figure.get_by_role("button", name="scribble").focus()
    figure.page.keyboard.press("Enter")
    assert says(figure).startswith("Scribble")
    for label, key, words in (("Neighbours, k", "ArrowRight", "25 neighbours"), ("Kept: one", "End", "keeps 64 of 512"),
                              ("Points drawn", "Home", "keeps 4 of 32"), ("Centre", "ArrowRight", "Centre 2 of 4")):
        figure.get_by_role("slider", name=label).focus()
        figure.page.keyboard.press(key)
        assert words in says(figure), label
    assert figure.locator("circle.taken").count() == 2


def test_figure_answers_to_a_click_in_the_drawing(figure):
    place = figure.locator("circle.kept").nth(40).bounding_box()
    figure.page.mouse.click(place["x"] + place["width"] / 2, place["y"] + place["height"] / 2)
    assert "Centre 41 of 128" in says(figure)


def test_figure_computes_what_the_package_computes(figure):
    """FPS, neighbours and blocks on the same points, of pixel grids (with ties) and of random ones (without)."""
    import torch
    from ferret_lite.points import fps, gather_points, knn
    for region in figure.page.evaluate("() => Object.keys(ferretSampler.REGIONS)"):
        drawn = figure.page.evaluate("""region => {
            const {REGIONS, regionPixels, samplePoints, random, sampleBlocks, fps, knn} = ferretSampler;
            const pixels = regionPixels(REGIONS[region]), points = samplePoints(pixels, 256, random(3));
            return {pixels, points, taken: fps(points, 64), near: fps(points, 64).map(i => knn(points[i], points, 24)),
                    blocks: sampleBlocks(points, 4, 3)};
        }""", region)
        points = torch.tensor(drawn["points"], dtype=torch.float64)[None]  # (1, 256, 2)
        pixels = {tuple(pixel) for pixel in drawn["pixels"]}
        assert {tuple(pixel) for pixel in (64 * points[0]).floor().int().tolist()} <= pixels
        assert len(points[0].unique(dim=0)) == 256
        taken = fps(points, 64)  # (1, 64)
        assert taken[0].tolist() == drawn["taken"]
        queries, near = gather_points(points, taken), torch.tensor(drawn["near"])[None]  # (1, 64, 2), (1, 64, 24)
        gaps = [(gather_points(points, index) - queries[:, :, None]).norm(dim=-1)
                for index in (near, knn(queries, points, 24))]
        torch.testing.assert_close(*gaps)  # equally near points may swap
        for block in drawn["blocks"]:
            before = torch.tensor(block["points"], dtype=torch.float64)[None]
            kept = gather_points(before, fps(before, len(before[0]) // 4))[0]
            torch.testing.assert_close(kept, torch.tensor(block["kept"], dtype=torch.float64))


def test_figure_is_a_sentence_without_a_script(visit):
    page = visit(SAMPLER, java_script_enabled=False)
    assert "works in the book only" in page.locator(".sampler-figure").inner_text()


# Barriers ------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("name", CHOSEN)
def test_page_has_no_barriers(visit, name, width, scheme):
    """axe-core finds nothing that it calls serious or critical."""
    page = visit(name, width=width, color_scheme=scheme)
    page.wait_for_load_state("networkidle")
    page.add_script_tag(path=str(fetch_axe()))
    found = page.evaluate("() => axe.run({resultTypes: ['violations']})")["violations"]
    grave = [f"{fault['id']} ({fault['impact']}): {node['html'][:160]} {node['target']}"
             for fault in found if fault["impact"] in ("serious", "critical") for node in fault["nodes"]]
    assert not grave, "\n".join(grave[:20] + [f"{len(grave)} in all"])

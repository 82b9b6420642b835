"""The app in a real browser: what people do, what the console says, labels, shifts of layout, phones.

Needs Playwright's Python package and a Chromium, whichever is on the PATH; without one of them the tests are skipped.
"""

import shutil
import sys
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent))
from app_server import PICTURE, Server, served

playwright = pytest.importorskip("playwright.sync_api", reason="no Playwright: pip install playwright")
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
pytestmark = [pytest.mark.slow, pytest.mark.skipif(BROWSER is None, reason="no Chromium on the PATH")]
WATCH = """
window.shifts = [];
new PerformanceObserver((list) => {
  for (const entry of list.getEntries()) if (!entry.hadRecentInput) window.shifts.push(entry.value);
}).observe({type: "layout-shift", buffered: true});
"""
UNNAMED = """
() => [...document.querySelectorAll("input, textarea, select, button")].filter((element) => {
  const label = element.getAttribute("aria-label") || element.getAttribute("aria-labelledby") || element.title;
  const words = [...(element.labels ?? [])].map((one) => one.innerText).join("") + element.innerText;
  return !label && !words.trim();
}).map((element) => element.outerHTML.slice(0, 200))
"""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with served(tmp_path_factory.mktemp("app")) as running:
        yield running


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as driver:
        chromium = driver.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.fixture
def page(browser: Any, server: Server) -> Iterator[Any]:
    """A page that was opened; at the end its console must be empty of errors."""
    context = browser.new_context(viewport={"width": 1100, "height": 900})
    page, problems = context.new_page(), []
    page.set_default_timeout(60_000)
    page.on("console", lambda message: problems.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("response", lambda response: problems.append(f"{response.status} {response.url}") if response.status >= 400 else None)
    page.add_init_script(WATCH)
    open_app(page, server.url)
    yield page
    context.close()
    assert problems == []


def open_app(page: Any, url: str) -> None:
    page.goto(url)
    page.wait_for_selector("#chat-box textarea", state="attached")
    page.wait_for_function("window.orthus?.opened")
    time.sleep(1)


def tab(page: Any, name: str) -> None:
    page.get_by_role("tab", name=name, exact=True).click()


def click(page: Any, name: str) -> None:
    page.get_by_role("button", name=name, exact=True).click()


def shifts(page: Any) -> float:
    return sum(page.evaluate("window.shifts.splice(0)"))


def shot(page: Any, folder: Path, name: str) -> None:
    page.mouse.move(0, 0)
    time.sleep(0.5)
    page.screenshot(path=folder / name)


def send(page: Any, text: str, answers: int) -> None:
    page.fill("#chat-box textarea", text)
    page.press("#chat-box textarea", "Enter")
    page.wait_for_selector(f"#chat-history .bubble.assistant >> nth={answers - 1}")


def test_chat_with_a_picture_of_ones_own(page: Any, tmp_path: Path) -> None:
    page.set_input_files("#chat-box input[type=file]", PICTURE)
    page.wait_for_selector("#chat-box img")
    send(page, "Describe the picture.", 1)
    assert "star red" in page.locator("#chat-history .bubble.assistant").inner_text()
    send(page, "How many hearts are there?", 2)  # how well depends on the checkpoint: the small one knows single turns
    with page.expect_download() as kept:
        page.get_by_role("link", name="Download the chat").click()
    kept.value.save_as(tmp_path / "chat.zip")
    with zipfile.ZipFile(tmp_path / "chat.zip") as files:
        assert "index.md" in files.namelist() and "picture-1.png" in files.namelist()
    click(page, "New chat")
    page.wait_for_selector("#chat-history .welcome")
    send(page, "a photo of three purple hearts", 1)
    assert page.locator("#chat-history .bubble.assistant img").count() == 1


def test_nothing_moves_while_pictures_grow(page: Any) -> None:
    tab(page, "Draw")
    page.get_by_role("spinbutton", name="Pictures").fill("2")
    click(page, "Draw")
    page.wait_for_selector("#draw-grid .card >> nth=1")
    time.sleep(0.6)
    shifts(page)
    page.get_by_role("link", name="Download the pictures").wait_for()
    time.sleep(0.5)
    assert shifts(page) < 0.005
    page.get_by_label("Show what the grader sees").check()
    assert page.locator(".seen:visible").count() == 2


def test_an_edit_is_compared_with_the_keyboard(page: Any) -> None:
    tab(page, "Edit")
    click(page, "Edit")
    page.get_by_role("link", name="Download the picture").wait_for()
    slider = page.get_by_role("slider", name="Share of the picture before the edit")
    slider.focus()
    for _ in range(30):
        page.keyboard.press("ArrowRight")
    assert page.evaluate("document.querySelector('.compare').style.getPropertyValue('--cut')") == "30%"


def test_a_story_is_kept_as_files(page: Any, tmp_path: Path) -> None:
    tab(page, "Story")
    click(page, "Tell")
    with page.expect_download() as kept:
        page.get_by_role("link", name="Download the story").click()
    kept.value.save_as(tmp_path / "story.zip")
    with zipfile.ZipFile(tmp_path / "story.zip") as files:
        assert sorted(files.namelist()) == ["index.html", "index.md", *(f"picture-{n}.png" for n in (1, 2, 3))]
        (tmp_path / "story.html").write_bytes(files.read("index.html"))
    page.goto((tmp_path / "story.html").as_uri())
    assert page.locator("img").count() == 3


def test_the_inside_is_shown_for_each_latent(page: Any) -> None:
    tab(page, "Inside")
    click(page, "Look inside")
    page.wait_for_selector(".panel .strip")
    page.get_by_role("slider", name="Latent").fill("6")
    page.wait_for_selector("text=From noise to latent 6")
    assert "It ends at the latent" in page.locator(".panel:has(.strip)").first.inner_text()


def test_stop_in_the_middle_of_a_picture(page: Any, server: Server) -> None:
    tab(page, "Draw")
    page.get_by_role("spinbutton", name="Pictures").fill("8")
    click(page, "Draw")
    page.wait_for_selector("#draw-grid .card img")
    page.locator("#draw").get_by_role("button", name="Stop").click()
    page.wait_for_selector("#draw .status:has-text('Stopped')")
    deadline = time.monotonic() + 10
    while server.engine.stats().running and time.monotonic() < deadline:
        time.sleep(0.05)
    assert server.engine.stats().running == 0
    click(page, "Draw")  # it can be used again
    page.wait_for_selector("#draw .status:has-text('Done')")


def test_a_page_that_is_left_frees_its_rows(browser: Any, server: Server) -> None:
    page = browser.new_page()
    open_app(page, server.url)
    tab(page, "Draw")
    page.get_by_role("spinbutton", name="Pictures").fill("8")
    click(page, "Draw")
    page.wait_for_selector("#draw-grid .card img")
    page.close()
    deadline = time.monotonic() + 10
    while (server.engine.stats().running or server.engine.stats().waiting) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert (server.engine.stats().running, server.engine.stats().waiting) == (0, 0)


def test_a_reload_keeps_the_settings(page: Any, server: Server) -> None:
    tab(page, "Draw")
    page.get_by_label("Prompt").first.fill("a photo of a yellow moon")
    page.get_by_role("spinbutton", name="Seed of the first").fill("7")
    page.get_by_label("Show what the grader sees").check()
    page.wait_for_url("**draw_graded=1**")
    for part in ("tab=draw", "draw_prompt=a+photo+of+a+yellow+moon", "draw_seed=7"):
        assert part in page.url
    open_app(page, page.url)
    assert page.get_by_role("tab", name="Draw").get_attribute("aria-selected") == "true"
    assert page.get_by_label("Prompt").first.input_value() == "a photo of a yellow moon"
    assert page.get_by_role("spinbutton", name="Seed of the first").input_value() == "7"
    open_app(page, f"{server.url}?tab=draw&draw_num=99&draw_seed=x&draw_prompt=%3Cscript%3E")
    assert page.get_by_role("spinbutton", name="Pictures").input_value() == "4"
    assert page.get_by_label("Prompt").first.input_value() == "<script>"


def test_everything_has_a_name_and_examples_load(page: Any) -> None:
    for name in ("Chat", "Draw", "Edit", "Story", "Inside"):
        tab(page, name)
        for fold in page.locator("button.label-wrap:visible").all():
            fold.click()
        time.sleep(0.3)
        assert page.evaluate(UNNAMED) == []
    tab(page, "Draw")
    click(page, "a photo of a green cross and an orange diamond")
    page.wait_for_function("document.querySelector('#draw textarea').value.includes('diamond')")
    tab(page, "Chat")
    click(page, "How many hearts are there? (with a picture)")
    page.wait_for_selector("#chat-box img")
    page.locator("#chat-box textarea").press("Enter")
    page.wait_for_selector("#chat-history .bubble.assistant")


@pytest.mark.parametrize("name", ["chat", "draw", "edit", "story", "inside"])
def test_a_phone_needs_no_scrolling_sideways(browser: Any, server: Server, name: str) -> None:
    page = browser.new_page(viewport={"width": 360, "height": 740}, has_touch=True)
    open_app(page, f"{server.url}?tab={name}")
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    page.close()


def test_screenshots(browser: Any, server: Server, tmp_path: Path) -> None:
    """Of every look; `ORTHUS_SCREENSHOTS` names a folder to keep them in."""
    import os

    folder = Path(os.environ.get("ORTHUS_SCREENSHOTS") or tmp_path)
    page = browser.new_page(viewport={"width": 1100, "height": 860})
    page.set_default_timeout(60_000)
    open_app(page, server.url)
    page.set_input_files("#chat-box input[type=file]", PICTURE)
    page.wait_for_selector("#chat-box img")
    send(page, "make the star blue", 1)
    shot(page, folder, "chat-light.png")
    open_app(page, f"{server.url}?tab=inside&inside_latent=4")
    click(page, "Look inside")
    page.wait_for_selector(".panel .strip")
    shot(page, folder, "inside-light.png")
    open_app(page, f"{server.url}?__theme=dark&tab=draw&draw_num=6&draw_graded=1")
    click(page, "Draw")
    page.get_by_role("link", name="Download the pictures").wait_for()
    shot(page, folder, "draw-dark.png")
    open_app(page, f"{server.url}?__theme=dark&tab=story")
    click(page, "Tell")
    page.get_by_role("link", name="Download the story").wait_for()
    shot(page, folder, "story-dark.png")
    page.set_viewport_size({"width": 390, "height": 800})
    open_app(page, f"{server.url}?tab=edit")
    click(page, "Edit")
    page.get_by_role("link", name="Download the picture").wait_for()
    page.get_by_role("slider", name="Share of the picture before the edit").fill("40")
    shot(page, folder, "edit-phone.png")
    page.close()
    shots = list(folder.glob("*-*.png"))
    assert len(shots) == 5 and all(file.stat().st_size < 150_000 for file in shots)

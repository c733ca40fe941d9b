"""The frontend in an installed browser, opened once for all tests. Screenshots go to demo_output/browser."""

import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from browser_page import Frontend, speak
from pix2pix_zero.devtools.frontends import newest_frontend
from pix2pix_zero.devtools.hosts import DEFAULT_VERSION, ROOT

HERE = Path(__file__).resolve().parent
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome", "microsoft-edge")

# Four frames a second: without a GPU sixty take a fourth of a processor, also while nothing happens.
FEW_FRAMES = """
window.requestAnimationFrame = draw => setTimeout(() => draw(performance.now()), 250);
window.cancelAnimationFrame = clearTimeout;
"""
# Each animation and transition ends as it begins: those without an end, as of what loads, are drawn sixty times a second.
NOTHING_MOVES = """
const still = new CSSStyleSheet();
still.replaceSync(`*, ::before, ::after {
  animation-delay: 0s !important; animation-duration: 1ms !important; animation-iteration-count: 1 !important;
  transition-delay: 0s !important; transition-duration: 1ms !important;
}`);
document.adoptedStyleSheets = [still];
"""
# ComfyUI has 89 blueprints of its own, each of which the frontend fetches and sets up whenever it is opened.
OTHERS_BLUEPRINTS_LEFT_OUT = """
const fetched = window.fetch;
window.fetch = async (address, ...options) => {
  const answer = await fetched(address, ...options);
  if (!String(address).endsWith("/global_subgraphs")) return answer;
  const listed = Object.entries(await answer.json());
  return Response.json(Object.fromEntries(listed.filter(([, blueprint]) => blueprint.source !== "templates")));
};
"""
SWITCHES = [
    "--no-sandbox",  # a container's user may not make sandboxes
    "--disable-gpu",
    "--blink-settings=imageAnimationPolicy=2",  # the thumbnails of ComfyUI's own templates do not move either
    "--host-resolver-rules=MAP * ~NOTFOUND , EXCLUDE 127.0.0.1",
]
PINNED_ONLY = (
    "test_the_example_runs_and_shows_previews_of_every_phase",
    "test_a_run_that_is_cancelled_leaves_the_server_ready",
)
RUN_ON_BOTH = "cat_to_dog_demo"


@pytest.hookimpl(trylast=True)  # after pytest's own order, which knows no languages
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leaves out the runs of all examples but one on the newest frontend: they take long, and do not depend on it.

    Puts together what is seen in one language, since the frontend is opened anew for each.
    """
    left_out = [
        item for item in items if _runs_once(getattr(item, "originalname", ""), getattr(item, "callspec", None))
    ]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]
    places = [place for place, item in enumerate(items) if item.path.parent == HERE]
    for place, item in zip(places, sorted((items[place] for place in places), key=_opened_for), strict=True):
        items[place] = item


def _opened_for(item: pytest.Item) -> tuple[str, str]:
    """The frontend and the language that a test sees, the pinned frontend and English first."""
    params = item.callspec.params if hasattr(item, "callspec") else {}
    language = params.get("language", "en")
    return "" if params.get("frontend_server") == "pinned" else "newest", "" if language == "en" else language


def _runs_once(test: str, call) -> bool:
    if test not in PINNED_ONLY or call.params["frontend_server"] == "pinned":
        return False
    return call.params.get("name") != RUN_ON_BOTH


def find_browser() -> str | None:
    """The path of a Chromium: `BROWSER_PATH`, else an installed one. None is downloaded."""
    return os.environ.get("BROWSER_PATH") or next(filter(None, map(shutil.which, BROWSERS)), None)


@pytest.fixture(scope="session", params=["pinned", "newest"])
def frontend_server(request: pytest.FixtureRequest) -> Iterator:
    """ComfyUI with the frontend that it pins, then with the newest that is known."""
    from comfyui_version import __version__

    if __version__ != DEFAULT_VERSION:
        pytest.skip(f"they know the frontend of ComfyUI {DEFAULT_VERSION}, this is {__version__}")
    pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if find_browser() is None:
        pytest.skip("no Chromium is installed here (Debian: apt install chromium), and BROWSER_PATH names none")
    if request.param == "pinned":
        yield request.getfixturevalue("server")
        return
    root = newest_frontend(Path(sys.executable))
    with request.getfixturevalue("start_server")("--front-end-root", str(root)) as server:
        yield server


@pytest.fixture(scope="session")
def opened_frontend(frontend_server) -> Iterator[Frontend]:
    import playwright.sync_api as playwright

    server, path = frontend_server, find_browser()
    folder = ROOT / "demo_output" / "browser"
    folder.mkdir(parents=True, exist_ok=True)
    server.post("/api/settings/Comfy.TutorialCompleted", True)  # else the templates open at every start
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=path, args=SWITCHES)
        page = browser.new_page(viewport={"width": 1280, "height": 720}, reduced_motion="reduce")
        for script in (FEW_FRAMES, NOTHING_MOVES, OTHERS_BLUEPRINTS_LEFT_OUT):
            page.add_init_script(script)
        page.set_default_timeout(120_000)  # on a busy machine
        frontend = Frontend(page, server.url, folder)
        frontend.start()
        frontend.set("Comfy.Minimap.Visible", False)  # it hides a corner of the screenshots
        frontend.set("LiteGraph.Canvas.MinFontSizeForLOD", 0)  # small text stays text in them
        yield frontend
        browser.close()


@pytest.fixture
def frontend(opened_frontend: Frontend) -> Frontend:
    """The frontend in English, with an empty graph."""
    speak(opened_frontend, "en")
    opened_frontend.page.evaluate("() => { app.canvas.setGraph(app.rootGraph); app.graph.clear(); }")
    opened_frontend.failures.clear()
    return opened_frontend

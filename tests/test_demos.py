"""Demos: in a real browser, a wish moves the pictures, and what is typed wrong gets a message in the page."""

import io
import runpy
import shutil
import socket
import sys
import time
from contextlib import contextmanager

import pytest
import torch
import yaml
from diffusers import DDIMScheduler
from PIL import Image, ImageStat

from dm_course.demos import check_wish, export_demo, forming, new_demo, parse_colour
from dm_course.sampling import sample

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
BROWSER = next(filter(None, map(shutil.which, BROWSERS)), None)


pytestmark = pytest.mark.filterwarnings("ignore:.*(silent_downcasting|copy keyword):DeprecationWarning:gradio")


@contextmanager
def opened(name):
    """A demo in a headless browser; the test is skipped where there is none."""
    if BROWSER is None:
        pytest.skip(f"no browser is installed (looked for {', '.join(BROWSERS)})")
    sync_api = pytest.importorskip("playwright.sync_api")
    demo = new_demo(name).queue()
    with socket.create_server(("127.0.0.1", 0)) as free:  # Gradio counts up from one port, which two processes both do
        port = free.getsockname()[1]
    _, url, _ = demo.launch(
        prevent_thread_lock=True, quiet=True, server_name="127.0.0.1", server_port=port, inbrowser=False
    )
    with sync_api.sync_playwright() as play:
        browser = play.chromium.launch(executable_path=BROWSER, args=["--no-sandbox", "--disable-gpu"])
        page = browser.new_page()
        page.goto(url)
        page.get_by_role("button", name="Generate").wait_for()
        yield page
        browser.close()
    demo.close()


@pytest.fixture(scope="module")
def page():
    """The guidance demo in a headless browser."""
    with opened("guidance") as page:
        yield page


def fill(page, **fields):
    "Type into fields by their names."
    for name, value in fields.items():
        field = page.locator(f"#{name} :is(input, textarea)").first
        field.fill(str(value))
        field.blur()


def says(page, words):
    "Wait for a message with these words, close it, and wait until it is gone, so that it is not taken for the next one."
    message = page.locator(".toast-body", has_text=words)
    message.wait_for()
    assert "Traceback" not in page.content()
    page.locator(".toast-close").last.click()
    message.wait_for(state="hidden")


def pick(page, colour):
    "Open the colour picker, type a colour, and close it."
    page.locator("#colour .dialog-button").click()
    field = page.locator("#colour input[type=text]").first
    field.fill(colour)
    field.press("Enter")
    page.locator("h1").first.click()


def generate(page, steps):
    """Press the button and wait for the last step.

    Returns the mean colour of the eight pictures, 0 to 255, and all states that the page was in.
    """
    page.get_by_role("button", name="Generate").click()
    seen, last, end = [], f"step {steps} of {steps}", time.time() + 120
    while last not in seen:
        assert time.time() < end, seen
        text, bars = page.locator("#state").inner_text().strip(), page.locator(".progress-bar").count()
        urls = page.locator("#pictures .grid-container img").evaluate_all("images => images.map(i => i.src)")
        seen += [text, ("bar", bars > 0), *urls]
    page.get_by_role("button", name="Generate").wait_for()
    page.wait_for_timeout(1000)
    urls = page.locator("#pictures .grid-container img").evaluate_all("images => images.map(i => i.src)")
    pictures = [Image.open(io.BytesIO(page.request.get(url).body())).convert("RGB") for url in urls]
    assert len(pictures) == 8
    means = [ImageStat.Stat(picture).mean for picture in pictures]
    return [sum(mean[k] for mean in means) / 8 for k in range(3)], seen


def test_a_colour_is_picked_and_the_pictures_move_to_it(page):
    fill(page, steps=8, seed=1, scale=100)
    pick(page, "#e02020")
    red, seen = generate(page, 8)
    assert len({s for s in seen if str(s).startswith("step ")}) >= 3  # they form while one watches
    assert len({s for s in seen if str(s).startswith("http")}) > 8 and ("bar", True) in seen
    fill(page, seed=2)  # another state than the last
    pick(page, "#2040e0")
    fill(page, steps=9, seed=1)
    blue, _ = generate(page, 9)
    assert red[0] > blue[0] + 20 and blue[2] > red[2] + 20


def test_words_are_followed(page):
    page.get_by_role("radio", name="words").check()
    fill(page, steps=7, prompt="a red butterfly")
    red, _ = generate(page, 7)
    fill(page, steps=6, prompt="a blue butterfly")
    blue, _ = generate(page, 6)
    page.get_by_role("radio", name="colour").check()
    assert red[0] > blue[0] + 10 and blue[2] > red[2] + 10


@pytest.mark.parametrize(
    "typed, said",
    [
        ({"scale": 1000}, "the scale must be a number from 0 to 300, not 1000"),
        ({"steps": 0}, "the number of steps must be a whole number from 1 to 100, not 0"),
        ({"steps": ""}, "the number of steps must be a whole number from 1 to 100, not None"),
        ({"seed": "seven"}, "the seed must be a whole number from 0 to 4,294,967,295, not 'seven'"),
        ({"prompt": "  "}, "the prompt is empty"),
    ],
)
def test_what_is_typed_wrong_gets_a_message_in_the_page(page, typed, said):
    fill(page, steps=4, seed=0, scale=100, prompt="a red butterfly")
    page.get_by_role("radio", name="words" if "prompt" in typed else "colour").check()
    fill(page, **typed)
    page.get_by_role("button", name="Generate").click()
    says(page, said)


def test_colours_are_read_as_pickers_write_them():
    assert parse_colour("#FF8000") == parse_colour("rgb(255,128,0)") == parse_colour("rgba(255, 128.0, 0, 0.5)")
    for wrong in ("", None, "red", "#ff80", "rgb(300, 0, 0)", "rgb(1, 2)"):
        with pytest.raises(ValueError, match="no colour"):
            parse_colour(wrong)


@pytest.mark.parametrize(
    "wrong",
    [{"scale": -1}, {"scale": None}, {"steps": 2.5}, {"steps": 101}, {"seed": -1}, {"seed": "1e30"}, {"by": "x"}],
)
def test_a_wish_out_of_range_is_refused(wrong):
    typed = {"by": "colour", "colour": "#00ff00", "prompt": "", "scale": 100, "steps": 20, "seed": 0}
    assert check_wish(**typed).steps == 20
    with pytest.raises(ValueError):
        check_wish(**typed | wrong)


def test_pictures_form_as_sample_makes_them_and_errors_arrive():
    scheduler, x = DDIMScheduler(), torch.randn(2, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    seen = list(forming(lambda x, t: 0.1 * x, scheduler, x, 3))
    assert [i for i, _ in seen] == [1, 2, 3, 3]
    assert torch.equal(seen[-1][1], sample(lambda x, t: 0.1 * x, scheduler, x, 3))
    with pytest.raises(ValueError, match="steps is 0"):
        list(forming(lambda x, t: x, scheduler, x, 0))


def test_an_exported_demo_is_a_space_that_starts(tmp_path):
    folder = export_demo("guidance", tmp_path / "space")
    text = (folder / "README.md").read_text(encoding="utf-8")
    facts = yaml.safe_load(text.split("---")[1])
    assert (
        facts["sdk"] == "gradio"
        and facts["app_file"] == "app.py"
        and (folder / "requirements.txt").read_text() == "dm-course[demos]\n"
    )
    found = runpy.run_path(str(folder / "app.py"))["demo"]
    assert found.title == "Guidance"
    (tmp_path / "file").write_text("x")
    with pytest.raises(ValueError, match="is a file"):
        export_demo("guidance", tmp_path / "file")
    with pytest.raises(ValueError, match="guidance"):
        new_demo("gidance")


def test_without_gradio_the_demo_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(ValueError, match=r"dm-course\[demos\]"):
        new_demo("guidance")

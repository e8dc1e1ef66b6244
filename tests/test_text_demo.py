"""The demo text-to-image: in a real browser, a prompt decides what is drawn; and what is typed wrong gets a message."""

import io
import runpy
import shutil
import time

import pytest
import torch
from PIL import Image, ImageStat
from test_demos import fill, opened, says
from test_dreambooth import new_pipeline

from dm_course import demos
from dm_course.demos import TextWish, check_text_wish, drawn, export_demo, new_demo
from dm_course.latent import text_to_image

pytestmark = pytest.mark.filterwarnings("ignore:.*(silent_downcasting|copy keyword):DeprecationWarning:gradio")
TYPED = {"prompt": "a red butterfly", "negative": "", "scale": 4, "steps": 20, "seed": 0}


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """The demo with a tiny untrained pipeline in place of the bundled model."""
    (tmp_path / "tokenizer").mkdir()
    pipeline = new_pipeline(tmp_path / "tokenizer")
    monkeypatch.setattr(demos, "_painter", lambda model: pipeline)
    return pipeline


@pytest.fixture(scope="module")
def page():
    """The text-to-image demo in a headless browser."""
    with opened("text-to-image") as page:
        yield page


def pictures_on(page):
    """The addresses of the pictures in the gallery."""
    return page.locator("#pictures .grid-container img").evaluate_all("images => images.map(i => i.src)")


def generate(page, steps):
    """Press the button and wait for the last step; returns the pictures' mean colour, 0 to 255, and what was seen."""
    page.get_by_role("button", name="Generate").click()
    seen, last, end = [], f"step {steps} of {steps}", time.time() + 120
    while last not in seen:
        assert time.time() < end, seen
        text, bars = page.locator("#state").inner_text().strip(), page.locator(".progress-bar").count()
        seen += [text, ("bar", bars > 0), *pictures_on(page)]
    page.get_by_role("button", name="Generate").wait_for()
    page.wait_for_timeout(1000)
    pictures = [Image.open(io.BytesIO(page.request.get(url).body())).convert("RGB") for url in pictures_on(page)]
    assert len(pictures) == demos.TEXT_PICTURES
    means = [ImageStat.Stat(picture).mean for picture in pictures]
    return [sum(mean[k] for mean in means) / len(means) for k in range(3)], seen


def test_the_prompt_decides(page):
    fill(page, prompt="a red butterfly on white paper", steps=8, seed=1, scale=4)
    red, seen = generate(page, 8)
    assert len({s for s in seen if str(s).startswith("step ")}) >= 3  # they form while one watches
    assert len({s for s in seen if str(s).startswith("http")}) > demos.TEXT_PICTURES and ("bar", True) in seen
    fill(page, prompt="a blue butterfly on white paper", steps=9)  # another number of steps, another last state
    blue, _ = generate(page, 9)
    assert red[0] - red[2] > blue[0] - blue[2] + 15


def test_places_and_negatives_are_followed(page):
    fill(page, prompt="a butterfly under the night sky", steps=7, seed=1, scale=4)
    night, _ = generate(page, 7)
    fill(page, prompt="a butterfly", negative="under the night sky", steps=6)
    day, _ = generate(page, 6)
    fill(page, negative="")
    assert sum(day) > sum(night) + 60


@pytest.mark.parametrize(
    "typed, said",
    [
        ({"prompt": "  "}, "the prompt is empty"),
        ({"scale": 100}, "the scale must be a number from 0 to 20, not 100"),
        ({"steps": 0}, "the number of steps must be a whole number from 1 to 100, not 0"),
        ({"seed": "seven"}, "the seed must be a whole number from 0 to 4,294,967,295, not 'seven'"),
    ],
)
def test_what_is_typed_wrong_gets_a_message_in_the_page(page, typed, said):
    fill(page, **TYPED | typed)
    page.get_by_role("button", name="Generate").click()
    says(page, said)


def test_a_prompt_that_is_too_long_is_said_to_be_cut(page):
    fill(page, **TYPED | {"prompt": "a red butterfly, " * 40 + "turquoise", "steps": 2})
    page.get_by_role("button", name="Generate").click()
    says(page, "turquoise")
    page.get_by_text("step 2 of 2").wait_for()


@pytest.mark.parametrize("wrong", [{"prompt": None}, {"scale": -1}, {"scale": "x"}, {"steps": 2.5}, {"seed": "1e30"}])
def test_a_wish_out_of_range_is_refused(wrong):
    assert check_text_wish(**TYPED) == TextWish("a red butterfly", "", 4.0, 20, 0)
    with pytest.raises(ValueError):
        check_text_wish(**TYPED | wrong)


def test_pictures_form_as_text_to_image_draws_them(tiny):
    wish = check_text_wish("a red butterfly", "a moth", 3, 2, 5)
    seen = list(drawn(wish, "any"))
    assert [step for step, _ in seen] == [1, 2, 2] and all(len(x) == demos.TEXT_PICTURES for _, x in seen)
    noise = torch.randn(demos.TEXT_PICTURES, 4, 8, 8, generator=torch.Generator().manual_seed(5))
    prompts = ["a red butterfly"] * demos.TEXT_PICTURES
    right = text_to_image(tiny, prompts, 3.0, 2, x=noise, negative="a moth").clamp(-1, 1)
    assert torch.allclose(seen[-1][1], right, atol=1e-4)


def test_what_was_cut_off_is_told(tiny):
    told = []
    list(drawn(check_text_wish("a red moth " * 40 + "butterfly", "", 1, 1, 0), "any", told.append))
    assert len(told) == 1 and "butterfly" in told[0]
    told.clear()
    list(drawn(check_text_wish("a red moth", "", 1, 1, 0), "any", told.append))
    assert told == []


def test_a_model_of_ones_own_goes_into_the_space(tiny, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "model_index.json").write_text("{}")
    folder = export_demo("text-to-image", tmp_path / "space", str(tmp_path / "mine"))
    text = (folder / "app.py").read_text(encoding="utf-8")
    assert (folder / "model" / "model_index.json").is_file() and str(tmp_path) not in text
    assert runpy.run_path(str(folder / "app.py"))["demo"].title == "Text to image"
    shutil.rmtree(folder)
    assert "'owner/name'" in (export_demo("text-to-image", folder, "owner/name") / "app.py").read_text()
    for make in (lambda: new_demo("guidance", "x"), lambda: export_demo("guidance", folder, "x")):
        with pytest.raises(ValueError, match="has a model of its own"):
            make()

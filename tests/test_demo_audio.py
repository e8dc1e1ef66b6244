"""The audio demo: in a real browser, what is asked for is heard and can be taken home; what is wrong gets a message."""

import time

import pytest
import torch
from test_demos import fill, opened, says

from dm_course import demos
from dm_course.audio import GENRES, LOOP_MEL, NEW_GENRE, SPEECH_MEL, inspect_sound, read_sound
from dm_course.demos import SOUND_KINDS, check_sound_wish, save_sound_wish, sounding

pytestmark = pytest.mark.filterwarnings("ignore:.*(silent_downcasting|copy keyword):DeprecationWarning:gradio")


@pytest.fixture(scope="module")
def page():
    """The audio demo in a headless browser."""
    with opened("audio") as page:
        yield page


def choose_kind(page, kind):
    "Press one of the two buttons."
    page.locator(f"#kind input[value={kind}]").check()


def listen(page, ready):
    """Press Generate, wait until the sound is there, and download it.

    Returns the sound, its rate, and all texts and pictures that the page showed meanwhile.
    """
    page.get_by_role("button", name="Generate").click()
    seen, end = [], time.time() + 120
    while ready not in seen:
        assert time.time() < end, seen
        images = page.locator("#spectrogram img").evaluate_all("images => images.map(i => i.src)")
        seen += [page.locator("#state").inner_text().strip(), *images]
    page.locator("#sound .play-pause-button").first.wait_for()
    link = page.locator("#file a[href*='.wav']").first
    link.wait_for()
    return *read_sound(page.request.get(link.get_attribute("href")).body()), seen


def test_a_digit_is_asked_for_heard_and_downloaded(page):
    choose_kind(page, "digit")
    fill(page, steps=8, seed=1, scale=2)
    wave, rate, seen = listen(page, "7, seed 1: ready")
    assert rate == SPEECH_MEL.rate and len(wave) == SPEECH_MEL.samples
    assert inspect_sound(wave, rate).silent < 1 and len({s for s in seen if s.startswith("http")}) > 1
    assert any(s.startswith("step ") for s in seen)


def test_music_is_asked_for_and_another_seed_is_another_loop(page):
    choose_kind(page, "music")
    fill(page, steps=4, seed=1, scale=2)
    first, rate, _ = listen(page, "waltz, seed 1: ready")
    fill(page, seed=2)
    second, _, _ = listen(page, "waltz, seed 2: ready")
    assert rate == LOOP_MEL.rate and len(first) == len(second) == 2 * LOOP_MEL.samples
    assert abs(first - second).max() > 0.05


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        ({"scale": 99}, "the scale must be a number from 0 to 10, not 99"),
        ({"steps": 0}, "the number of steps must be a whole number from 1 to 100, not 0"),
        ({"seed": "seven"}, "the seed must be a whole number from 0 to 4,294,967,295, not 'seven'"),
    ],
)
def test_what_is_typed_wrong_gets_a_message_in_the_page(page, typed, said):
    fill(page, steps=4, seed=0, scale=2)
    fill(page, **typed)
    page.get_by_role("button", name="Generate").click()
    says(page, said)


def test_a_wish_out_of_range_is_refused():
    typed = {"kind": "music", "genre": "waltz", "digit": None, "scale": 2, "steps": 20, "seed": "3"}
    wish = check_sound_wish(**typed)
    assert wish.name == "waltz" and wish.seed == 3 and list(GENRES)[wish.label] == "waltz"
    assert check_sound_wish(**typed | {"kind": "digit", "digit": "9"}).label == 9
    assert NEW_GENRE not in SOUND_KINDS["music"]
    for wrong in (
        {"kind": "noise"},
        {"genre": NEW_GENRE},
        {"genre": None},
        {"scale": -1},
        {"steps": 2.5},
        {"seed": -1},
    ):
        with pytest.raises(ValueError):
            check_sound_wish(**typed | wrong)


def test_pictures_form_and_become_a_sound(monkeypatch, tmp_path):
    from diffusers import DDPMPipeline

    from dm_course.audio_recipes import sound_unet
    from dm_course.recipes import cosine_scheduler

    small = DDPMPipeline(sound_unet(10, SPEECH_MEL, (16, 16, 16)).eval(), cosine_scheduler())
    monkeypatch.setattr(demos, "_sound_model", lambda name: small)
    monkeypatch.setattr(demos, "_sounds_folder", lambda: tmp_path)
    wish = check_sound_wish("digit", None, "4", 1, 3, 5)
    *forming, (step, picture, wave) = sounding(wish)
    assert [i for i, *_ in forming] == [1, 2, 3, 3] and step == 3 and all(w is None for *_, w in forming)
    assert torch.equal(forming[-1][1], picture) and wave.shape == (SPEECH_MEL.samples,)
    heard, rate = read_sound(save_sound_wish(wish, wave))
    assert rate == SPEECH_MEL.rate and len(heard) == len(wave)
    assert demos._spectrogram(picture).size == (768, 384)

"""Recipes of sounds: networks, what training sounds go through, and runs to their end in a few steps."""

import pytest
import torch
from test_audio import takes

from dm_course import audio_recipes, zoo
from dm_course.audio import GENRES, LOOP_MEL, SOUND_SCALE, SPEECH_MEL, draw_sounds, loop_pictures
from dm_course.audio_recipes import change_loops, change_words, louder, sound_unet
from dm_course.judges import new_judge
from dm_course.recipes import train_bundled
from dm_course.zoo import card, load


def test_networks_take_their_pictures_and_every_label():
    for classes, mel in ((6, LOOP_MEL), (10, SPEECH_MEL)):
        unet, x = sound_unet(classes, mel, (16, 16, 16)).eval(), torch.zeros(2, 1, mel.bands, mel.frames)
        with torch.no_grad():
            assert unet(x, 5, torch.tensor([0, classes])).sample.shape == x.shape
    with pytest.raises(ValueError, match="levels need multiples of 16"):
        sound_unet(3, SPEECH_MEL, (16,) * 5)
    with pytest.raises(ValueError, match="multiples of 16"):
        sound_unet(3, SPEECH_MEL, (20, 32))


def test_both_models_together_take_less_than_10_mb():
    nets = sound_unet(len(GENRES), LOOP_MEL, (32, 48, 64, 96)), sound_unet(10, SPEECH_MEL)
    assert sum(2 * p.numel() for net in nets for p in net.parameters()) < 10e6


def test_changes_depend_on_the_generator_and_keep_silence_and_labels():
    x, y = torch.rand(8, 1, 40, 48) * 2 - 1, torch.arange(8)
    x[..., 30:] = -1

    def g():
        return torch.Generator().manual_seed(3)

    for change in (change_loops, change_words):
        (a, same), (b, _) = change(x, y, g()), change(x, y, g())
        assert torch.equal(a, b) and torch.equal(same, y) and a.shape == x.shape and not torch.equal(a, x)
    assert (louder(x, g())[..., 30:] == -1).all() and (louder(x, g()) - x).abs().max() <= 0.1 + 1e-6
    words, _ = change_words(x, y, g(), rough=False)
    assert (words[..., 34:] == -1).all()


def test_loops_recipe_runs_to_its_end(tmp_path, monkeypatch):
    monkeypatch.setattr(audio_recipes, "load_judge", lambda name: new_judge({"genre": list(GENRES)}, 48, 1))
    train, few = audio_recipes.train_loops, dict(count=10, graded=6, widths=(16, 16, 16, 16))
    monkeypatch.setattr(audio_recipes, "train_loops", lambda **k: train(**few, **k))
    measured = train_bundled("loops", tmp_path / "loops", 2, tmp_path / "checkpoints")
    assert measured["n"] == 6 and measured["guidance_scale"] == SOUND_SCALE and 0 <= measured["sound_as_asked"] <= 1
    monkeypatch.setattr(zoo, "weights_dir", lambda: tmp_path)
    pipeline = load("loops")
    assert card("loops")["steps"] == 2 and tuple(pipeline.unet.config.sample_size) == (64, 96)
    assert draw_sounds(pipeline, torch.tensor([5, 6]), steps=1).shape == (2, 1, 64, 96)


def test_judge_recipe_runs_to_its_end(tmp_path, monkeypatch):
    train = audio_recipes.train_judge_genres
    monkeypatch.setattr(audio_recipes, "train_judge_genres", lambda **k: train(count=12, graded=12, **k))
    measured = train_bundled("judge-genres", tmp_path / "judge-genres", 2, tmp_path / "checkpoints")
    assert measured["n"] == 12
    monkeypatch.setattr(zoo, "weights_dir", lambda: tmp_path)
    facts = card("judge-genres")
    assert facts["recipe"] == "dm_course.audio_recipes.train_judge_genres"
    assert "LOOP_MEL" in (tmp_path / "judge-genres" / "README.md").read_text()


def test_the_judge_hears_every_genre_after_griffin_lim(monkeypatch):
    data, heard = loop_pictures(60), []
    monkeypatch.setattr(audio_recipes, "heard_again", lambda pictures, mel, *_: heard.append(pictures) or pictures)
    audio_recipes.train_listener("judge-genres", data, loop_pictures(6, split="test"), list(GENRES), 1)
    which = [(data[0] == picture).flatten(1).all(1).nonzero().item() for picture in heard[0]]
    assert len(set(which)) == 30 and set(data[1][which].tolist()) == set(range(len(GENRES)))


def test_recipes_of_speech_run_to_their_end(tmp_path, monkeypatch):
    takes(tmp_path / "data" / "free-spoken-digits")
    monkeypatch.setenv("DM_COURSE_DATA", str(tmp_path / "data"))
    measured = train_bundled(
        "judge-spoken-digits", tmp_path / "judge-spoken-digits", 2, tmp_path / "checkpoints" / "judge"
    )
    assert measured["n"] == 40 and 0 <= measured["test_as_sound"] <= 1
    train = audio_recipes.train_spoken
    monkeypatch.setattr(audio_recipes, "train_spoken", lambda **k: train(graded=10, widths=(16, 16, 16), **k))
    digits = [str(i) for i in range(10)]
    monkeypatch.setattr(audio_recipes, "load_judge", lambda name: new_judge({"digit": digits}, 48, 1))
    measured = train_bundled("spoken-digits", tmp_path / "spoken-digits", 2, tmp_path / "checkpoints" / "digits")
    assert measured["n"] == measured["frechet_n"] == 10 and measured["guidance_scale"] == SOUND_SCALE
    monkeypatch.setattr(zoo, "weights_dir", lambda: tmp_path)
    assert draw_sounds(load("spoken-digits"), torch.tensor([0, 10]), steps=1).shape == (2, 1, 40, 48)
    assert "other takes of the same six people" in (tmp_path / "spoken-digits" / "README.md").read_text()

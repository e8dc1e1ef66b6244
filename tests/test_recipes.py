"Recipes: each runs to its end in a few steps, saves, grades, and goes on after a stop."

from pkgutil import resolve_name

import pytest
import torch

from dm_course import recipes
from dm_course.data import load_data
from dm_course.judges import Judge
from dm_course.recipes import (
    RECIPES,
    JudgeBatches,
    draw_samples,
    grade_butterflies,
    nearest_distance,
    new_unet,
    train_bundled,
    warp,
)
from dm_course.zoo import card, load, models, verify


@pytest.fixture
def small_recipe(monkeypatch):
    "The butterfly recipe with few pictures and a narrow network: the same code, for a test's patience."
    wide = new_unet
    monkeypatch.setattr(recipes, "new_unet", lambda widths, seed: wide(widths=(16, 16, 16), seed=seed))
    train = recipes.train_butterflies
    monkeypatch.setattr(recipes, "train_butterflies", lambda **k: train(count=64, graded=70, **k))


def test_butterfly_recipe_runs_to_its_end(small_recipe, tmp_path, monkeypatch):
    measured = train_bundled("butterflies-32", tmp_path / "butterflies-32", 3, tmp_path / "checkpoints")
    assert measured["n"] == 70 and measured["times_the_floor"] > 3  # three steps teach nothing, and the grade says so
    from dm_course import zoo

    monkeypatch.setattr(zoo, "weights_dir", lambda: tmp_path)
    assert verify("butterflies-32") == ["butterflies-32"]
    facts = card("butterflies-32")
    assert facts["steps"] == 3 and facts["command"] == "dm-course zoo train butterflies-32"
    again = draw_samples(load("butterflies-32"), 2, steps=2)
    assert again.shape == (2, 3, 32, 32) and again.isfinite().all()


def test_digits_recipe_runs_to_its_end(tmp_path, monkeypatch):
    from dm_course import zoo

    train, few = recipes.train_digits, dict(data="digits", count=64, graded=30, widths=(16, 16, 16))
    monkeypatch.setattr(recipes, "train_digits", lambda **k: train(**few, **k))
    measured = train_bundled("digits-28", tmp_path / "digits-28", 3, tmp_path / "checkpoints")
    assert measured["n"] == 30 and measured["read_as_asked"] < 0.7  # three steps teach nothing
    monkeypatch.setattr(zoo, "weights_dir", lambda: tmp_path)
    assert card("digits-28")["measured"]["guidance_scale"] == recipes.DIGITS_SCALE
    pipeline = load("digits-28")
    one, other = (recipes.draw_digits(pipeline, torch.tensor([7, 10]), steps=2, batch_size=n) for n in (1, 2))
    assert one.shape == (2, 1, 28, 28) and torch.allclose(one, other, atol=1e-3)
    with pytest.raises(ValueError, match="10 says nothing"):
        recipes.draw_digits(pipeline, torch.tensor([11]), steps=1)


def test_recipe_goes_on_from_its_checkpoint(small_recipe, tmp_path):
    first = train_bundled("butterflies-32", tmp_path / "a", 3, tmp_path / "checkpoints")
    assert (tmp_path / "checkpoints" / "checkpoint.pt").exists()
    assert train_bundled("butterflies-32", tmp_path / "b", 3, tmp_path / "checkpoints") == first


def test_unknown_recipe_lists_the_known_ones():
    with pytest.raises(ValueError, match="butterflies-32.*judge-digits.*judge-garden"):
        train_bundled("butterfly")


def test_every_bundled_model_has_its_recipe_and_figures():
    assert set(models()) == set(RECIPES)
    for name in models():
        facts = card(name)
        assert facts["command"] == f"dm-course zoo train {name}" and facts["measured"] and facts["seconds"] > 0
        assert facts["recipe"] == f"dm_course.{RECIPES[name].replace(':', '.')}" and callable(
            resolve_name(facts["recipe"])
        )


def test_copies_are_found():
    g = torch.Generator().manual_seed(0)
    trained, fresh = torch.randn(40, 3, 8, 8, generator=g), torch.randn(5, 3, 8, 8, generator=g)
    assert nearest_distance(trained[3:5] + 0.01, trained).max() < 0.02
    assert nearest_distance(fresh, trained).min() > 1
    assert nearest_distance(trained, trained, same=True).min() > 1


def test_samples_depend_on_the_seed_alone():
    from diffusers import DDPMPipeline

    pipeline = DDPMPipeline(new_unet(widths=(16, 16)), recipes.cosine_scheduler())
    a, b = draw_samples(pipeline, 4, steps=2), draw_samples(pipeline, 4, steps=2, batch_size=1)
    assert torch.allclose(a, b, atol=1e-4)
    assert not torch.allclose(a, draw_samples(pipeline, 4, steps=2, seed=1), atol=0.1)


def test_bundled_butterflies_are_graded_as_their_card_says():
    "A quarter of the card's samples: the grade must be of the same size."
    facts = card("butterflies-32")["measured"]
    found = grade_butterflies(load("butterflies-32"), count=200, steps=20, training=2048)
    assert found["frechet"] < 3 * max(facts["frechet"], found["floor"])
    assert found["nearest_sample_to_training"] > 0


def test_bundled_judges_read_fresh_pictures():
    judge = Judge(load("judge-garden"))
    images, labels = recipes.garden_for_judge("test", 100)
    seen = judge(images.float() / 127.5 - 1)
    for i, group in enumerate(recipes.GARDEN_GROUPS):
        assert (seen[group] == labels[:, i]).float().mean() > 0.95, group


def test_warp_moves_but_keeps_the_range():
    x = torch.rand(6, 1, 28, 28, generator=torch.Generator().manual_seed(0)) * 2 - 1
    y = warp(x, torch.Generator().manual_seed(0))
    assert y.shape == x.shape and y.min() >= -1 - 1e-5 and y.max() <= 1 + 1e-5 and not torch.equal(x, y)


def test_judge_batches_depend_on_the_step_alone():
    g = torch.Generator().manual_seed(0)
    data = [
        JudgeBatches(torch.arange(40).reshape(10, 1, 2, 2).byte(), torch.arange(10), lambda x, y, g: (x, y), 5)
        for _ in range(2)
    ]
    assert torch.equal(data[0].batch(7)["images"], data[1].batch(7)["images"])
    assert sorted(torch.cat([data[0].batch(i)["labels"] for i in (4, 5)]).tolist()) == list(range(10))
    assert g is not None


def test_sizes_that_do_not_halve_are_refused():
    with pytest.raises(ValueError, match="multiple of 8"):
        new_unet(size=30)
    with pytest.raises(ValueError, match="multiple of 16"):
        new_unet(widths=(20, 40))


def test_clip_recipe_runs_to_its_end_and_open_clip_opens_it(tmp_path, monkeypatch):
    import open_clip

    train = recipes.train_garden_clip
    monkeypatch.setattr(recipes, "train_garden_clip", lambda **k: train(count=64, graded=5, **k))
    measured = train_bundled("garden-clip", tmp_path / "garden-clip", 2, tmp_path / "checkpoints")
    assert measured["n"] == 5 and measured["among"] == 100
    from dm_course import zoo

    monkeypatch.setattr(zoo, "weights_dir", lambda: tmp_path)
    assert verify("garden-clip") == ["garden-clip"] and card("garden-clip")["steps"] == 2
    name = f"local-dir:{tmp_path / 'garden-clip'}"
    clip, _, _ = open_clip.create_model_and_transforms(name)
    assert list(clip.visual.image_mean) == [0.5] * 3 and open_clip.get_tokenizer(name).context_length == 24


def test_all_captions_are_true_and_the_short_one_names_the_colour():
    rows = load_data("butterflies", "test", count=5, size=64)
    for texts, colour, own in zip(recipes.all_captions(rows), rows["colour"], rows["caption"]):
        assert own in texts and len(texts) == 6 and all(colour in text for text in texts)
        assert texts[-1] in (f"a {colour} butterfly", f"an {colour} butterfly")


def test_a_clip_that_knows_the_answer_is_right_and_one_that_does_not_guesses():
    clip, tokenizer = recipes.new_clip()
    rows = load_data("butterflies", "heldout", count=40, size=64)
    assert recipes.right_among(clip.eval(), tokenizer, rows, among=20) < 0.4
    known = forget = recipes.forget_unread(clip, tokenizer(rows["caption"]))
    assert 10 < known < 200 and (clip.token_embedding.weight.abs().sum(1) > 0).sum() == forget

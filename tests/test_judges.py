"""The judges: what they refuse, what they learn, and the distances, against formulas that are known."""

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm

from dm_course.judges import (
    Judge,
    Score,
    accuracy,
    checked_pictures,
    frechet_distance,
    frechet_interval,
    judge_loss,
    kernel_distance,
    label_groups,
    load_judge,
    new_judge,
    score,
)
from dm_course.zoo import WeightsError, models, save_half, seal

GROUPS = {"colour": ["red", "green", "blue"], "side": ["left", "right"]}


def painted(n, seed=0, size=16):
    """Pictures of a coloured half, and what is true of them."""
    g = torch.Generator().manual_seed(seed)
    colour, side = torch.randint(3, (n,), generator=g), torch.randint(2, (n,), generator=g)
    images = torch.randn(n, 3, size, size, generator=g) * 0.2 - 0.5
    for i in range(n):
        images[i, colour[i], :, slice(0, size // 2) if side[i] == 0 else slice(size // 2, size)] += 1
    return images.clamp(-1, 1), torch.stack([colour, side], 1)


@pytest.fixture(scope="module")
def trained():
    """A judge that learned for two seconds."""
    judge = new_judge(GROUPS, size=32, widths=(8, 16, 16))
    images, labels = painted(256)
    loss_fn, optimiser = judge_loss(judge), torch.optim.AdamW(judge.model.parameters(), lr=5e-3)
    images, labels = images.to(judge.model.device), labels.to(judge.model.device)
    judge.model.train()
    for i in range(60):
        part = slice(i % 4 * 64, i % 4 * 64 + 64)
        optimiser.zero_grad()
        loss_fn(judge.model, {"images": images[part], "labels": labels[part]}).backward()
        optimiser.step()
    judge.model.eval()
    return judge


# Judging


def test_a_judge_learns_and_is_graded(trained):
    images, labels = painted(200, seed=1)
    by_index = accuracy(trained, images, {"colour": labels[:, 0], "side": labels[:, 1]})
    by_name = accuracy(trained, images, {g: [GROUPS[g][i] for i in y] for g, y in zip(GROUPS, labels.T)})
    assert by_index == by_name and min(by_index.values()) > 0.95
    turned = accuracy(trained, images.flip(-1), {"colour": labels[:, 0], "side": labels[:, 1]})
    assert turned["colour"] > 0.9 and turned["side"] < 0.1


def test_verdict_probabilities_and_features_fit_together(trained):
    images, _ = painted(9)
    verdict, p, features = trained(images), trained.probabilities(images), trained.features(images)
    assert {g: x.shape for g, x in p.items()} == {"colour": (9, 3), "side": (9, 2)}
    assert all(torch.allclose(x.sum(1), torch.ones(9)) for x in p.values())
    assert all(torch.equal(verdict[g], x.argmax(1)) and verdict[g].dtype == torch.int64 for g, x in p.items())
    assert features.shape == (9, 16) and features.dtype == torch.float32 and not features.requires_grad
    logits = trained.model.classifier(features.to(trained.model.device)).cpu()
    assert torch.allclose(logits[:, :3].softmax(1), p["colour"], atol=1e-5)


def test_features_of_each_stage(trained):
    images, _ = painted(6, size=32)  # what the network takes as it is
    assert [trained.features(images, stage).shape[1] for stage in (0, 1, 2, -1)] == [8, 16, 16, 16]
    with torch.no_grad():
        pooled = trained.model.base_model(images.to(trained.model.device)).pooler_output.flatten(1).cpu()
    assert torch.allclose(trained.features(images), pooled, atol=1e-5)


def test_a_verdict_depends_neither_on_the_batch_nor_on_the_mode_and_changes_neither(trained):
    images, _ = painted(300)
    one_by_one = torch.cat([trained.features(x[None]) for x in images[:3]])
    assert torch.allclose(trained.features(images)[:3], one_by_one, atol=1e-4)
    trained.model.train()
    before = {k: v.clone() for k, v in trained.model.state_dict().items()}
    assert torch.allclose(trained.features(images)[:3], one_by_one, atol=1e-4) and trained.model.training
    assert all(torch.equal(v, before[k]) for k, v in trained.model.state_dict().items())
    trained.model.eval()


def test_pictures_of_any_size_are_judged(trained):
    for size in (16, 20, 32, 64):
        images, labels = painted(100, seed=2, size=size)
        assert accuracy(trained, images, {"side": labels[:, 1]})["side"] > 0.9, size


@pytest.mark.parametrize(
    "bad, says",
    [
        (torch.zeros(0, 3, 8, 8), "no picture"),
        (torch.zeros(4, 1, 8, 8), "3 channels; these pictures have 1"),
        (torch.zeros(3, 8, 8), r"\(N, 3, H, W\)"),
        (torch.zeros(4, 3, 8, 8, dtype=torch.uint8), "uint8"),
        (np.zeros((4, 3, 8, 8)), "ndarray"),
        (torch.tensor([0, torch.nan, torch.inf]).reshape(3, 1, 1, 1).expand(3, 3, 8, 8), "2 of 3.*number 1"),
        (torch.full((2, 3, 8, 8), 200.0), r"\[-1, 1\]; these run up to 200"),
    ],
)
def test_what_cannot_be_judged_is_refused_with_the_reason(trained, bad, says):
    for judging in (trained, trained.features, trained.probabilities, lambda x: accuracy(trained, x, {})):
        with pytest.raises(ValueError, match=says):
            judging(bad)


def test_samples_slightly_outside_are_cut_off_not_refused():
    assert checked_pictures(torch.tensor([-1.4, 3.0]).reshape(1, 2, 1, 1), 2).flatten().tolist() == [-1, 1]


def test_wrong_names_and_lengths_are_named(trained):
    images, labels = painted(4)
    with pytest.raises(ValueError, match="Nearest: 'colour'"):
        trained.names("color")
    with pytest.raises(ValueError, match="Nearest: 'green'"):
        accuracy(trained, images, {"colour": ["red", "red", "gren", "blue"]})
    with pytest.raises(ValueError, match="4 pictures.*'colour': 3"):
        accuracy(trained, images, {"colour": labels[:3, 0]})
    with pytest.raises(ValueError, match="classes 0 to 1, not 0 to 2"):
        accuracy(trained, images, {"side": [0, 1, 2, 0]})
    with pytest.raises(ValueError, match="2 groups; a picture here has 1"):
        judge_loss(trained)(trained.model, {"images": images, "labels": labels[:, 0]})


def test_labels_must_come_in_groups():
    assert label_groups({0: "digit=0", 1: "digit=1=I"}) == {"digit": ["0", "1=I"]}
    for labels in (["cat"], ["a=x", "b=x", "a=y"]):
        with pytest.raises(ValueError, match="one piece"):
            label_groups(dict(enumerate(labels)))


def test_an_absent_label_adds_nothing_to_the_loss(trained):
    images, labels = painted(8)
    images, labels = images.to(trained.model.device), labels.to(trained.model.device)
    loss_fn, none = judge_loss(trained), torch.full_like(labels[:, 0], -100)
    parts = [
        torch.stack(pair, 1) for pair in ((labels[:, 0], none), (none, labels[:, 1]), (labels[:, 0], labels[:, 1]))
    ]
    a, b, both = (loss_fn(trained.model, {"images": images, "labels": y}) for y in parts)
    assert torch.allclose(a + b, both) and min(a.item(), b.item()) > 0


def test_new_judges_are_reproducible_and_leave_the_random_state_alone():
    state = torch.get_rng_state()
    weights = [new_judge(GROUPS, size=16, seed=s).model.classifier[1].weight for s in (3, 3, 4)]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])
    assert torch.equal(torch.get_rng_state(), state)


def test_a_saved_judge_gives_the_same_verdict(trained, tmp_path, monkeypatch):
    seal(save_half(trained.model, tmp_path / "judge-painted"))
    monkeypatch.setenv("DM_COURSE_WEIGHTS", str(tmp_path))
    again, (images, _) = load_judge("judge-painted"), painted(50)
    assert again.groups == GROUPS and again.model.dtype == torch.float32 and not again.model.training
    for group, p in trained.probabilities(images).items():
        assert torch.allclose(again.probabilities(images)[group], p, atol=2e-2)
    weights = tmp_path / "judge-painted" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(WeightsError, match="model.safetensors is truncated"):
        load_judge("judge-painted")


# Distances


def gaussians(n, m, d=6, seed=0, shift=0.7):
    """Two sets of points from two Gaussians with the same centre but for a shift, and different covariances."""
    rng = np.random.default_rng(seed)
    return rng.normal(size=(n, d)), rng.normal(size=(m, d)) @ rng.normal(size=(d, d)) * 0.7 + shift


def test_frechet_distance_is_that_of_the_textbook():
    a, b = gaussians(300, 200)
    sa, sb = np.cov(a.T), np.cov(b.T)
    wanted = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(sa + sb - 2 * sqrtm(sa @ sb).real)
    assert frechet_distance(a, b) == pytest.approx(wanted, rel=1e-8)
    assert frechet_distance(torch.tensor(b), torch.tensor(a)) == pytest.approx(wanted, rel=1e-8)


def test_frechet_distance_of_known_gaussians():
    rng = np.random.default_rng(0)
    a = rng.normal(size=(400_000, 2))
    b = rng.normal(size=(400_000, 2)) * [3, 0.5] + [1, 2]
    assert frechet_distance(a, b) == pytest.approx(1 + 4 + (3 - 1) ** 2 + (0.5 - 1) ** 2, rel=0.01)
    assert frechet_distance(a[:500], a[:500] + 2) == pytest.approx(8)
    assert frechet_distance(a[:500], a[:500]) == pytest.approx(0, abs=1e-9)


def test_frechet_distance_with_fewer_points_than_dimensions():
    rng = np.random.default_rng(0)
    a = rng.normal(size=(5, 40))
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-9)
    assert frechet_distance(a, a * 2) == pytest.approx((a.mean(0) ** 2).sum() + np.trace(np.cov(a.T)))


def brute_kernel_distance(a, b):
    """The definition, point by point."""

    def k(x, y):
        return (x @ y / len(x) + 1) ** 3

    within = [np.mean([k(x, y) for i, x in enumerate(s) for j, y in enumerate(s) if i != j]) for s in (a, b)]
    return sum(within) - 2 * np.mean([k(x, y) for x in a for y in b])


def test_kernel_distance_is_its_definition():
    a, b = gaussians(12, 9)
    assert kernel_distance(a, b) == pytest.approx(brute_kernel_distance(a, b), rel=1e-9)
    assert kernel_distance(a, b, chunk=5) == pytest.approx(kernel_distance(a, b), rel=1e-9)


def test_kernel_distance_is_unbiased_at_any_n_and_the_frechet_distance_is_not():
    rng = np.random.default_rng(1)
    for n in (8, 64):
        sets = [rng.normal(size=(2, n, 6)) for _ in range(300)]
        kernel, frechet = ([distance(*pair) for pair in sets] for distance in (kernel_distance, frechet_distance))
        assert abs(np.mean(kernel)) < 4 * np.std(kernel) / 300**0.5
        assert np.mean(frechet) > 20 * np.std(frechet) / 300**0.5


@pytest.mark.parametrize("distance", [frechet_distance, kernel_distance, frechet_interval])
def test_features_that_cannot_be_compared_are_refused(distance):
    fine = np.ones((4, 3))
    for other in (np.ones((4, 2)), np.ones((1, 3)), np.ones(3), np.full((4, 3), np.nan)):
        with pytest.raises(ValueError, match="features"):
            distance(fine, other)
        with pytest.raises(ValueError, match="features"):
            distance(other, fine)


def test_the_interval_covers_the_distance_that_other_draws_give():
    rng = np.random.default_rng(0)
    n, d = 120, 4

    def draw():
        return rng.normal(size=(n, d)), rng.normal(size=(n, d)) * 1.2 + 0.4

    usual = np.mean([frechet_distance(*draw()) for _ in range(400)])
    ends = [frechet_interval(*draw(), resamples=60, seed=i) for i in range(100)]
    covered = np.mean([low <= usual <= high for low, high in ends])
    assert 0.85 <= covered <= 1, covered
    assert np.mean([high - low for low, high in ends]) < 1.5 * usual  # and it is not so wide that it covers anything
    with pytest.raises(ValueError, match="at least 2 resamples"):
        frechet_interval(*draw(), resamples=1)


def test_score_knows_real_from_wrong():
    rng = np.random.default_rng(0)
    real, again, alike = rng.normal(size=(3, 300, 8))
    judge = None  # features are given, so nobody is asked
    good, bad = score(judge, alike, real, again, resamples=40), score(judge, alike + 0.5, real, again, resamples=40)
    assert good.n == 300 and 0.7 < good.ratio < 1.4 and good.kernel < 3 * good.kernel_floor
    assert bad.ratio > 5 and bad.kernel > good.kernel_floor and bad.interval[0] > good.interval[1]
    assert good.floor == bad.floor and good == score(judge, alike, real, again, resamples=40)
    shown = str(bad)
    assert "n = 300" in shown and "floor" in shown and f"{bad.interval[0]:.3g}" in shown
    assert isinstance(bad, Score)


def test_score_compares_equal_numbers():
    rng = np.random.default_rng(0)
    a, b, c = rng.normal(size=(50, 3)), rng.normal(size=(80, 3)), rng.normal(size=(60, 3))
    made = score(None, a, b, c, resamples=20)
    assert made.n == 50 and made.frechet == pytest.approx(frechet_distance(a, b[:50]))
    assert score(None, *rng.normal(size=(3, 400, 3)), resamples=2).floor < made.floor / 3  # n matters


def test_score_takes_pictures(trained):
    sets = [painted(60, seed=s)[0] for s in range(3)]
    by_pictures = score(trained, *sets, resamples=10)
    by_features = score(trained, *(trained.features(x) for x in sets), resamples=10)
    assert by_pictures == by_features
    assert score(trained, sets[0].flip(1), *sets[1:], resamples=10).n == 60
    first = score(trained, *(trained.features(x, 0) for x in sets), resamples=10)
    assert score(trained, *sets, resamples=10, stage=0) == first != by_pictures
    with pytest.raises(ValueError, match="NaN or infinity"):
        score(trained, sets[0] * torch.nan, *sets[1:])


# The bundled judges

needs_digits = pytest.mark.skipif("judge-digits" not in models(), reason="judge-digits is not trained yet")
needs_garden = pytest.mark.skipif("judge-garden" not in models(), reason="judge-garden is not trained yet")


def test_unknown_judges_are_named():
    with pytest.raises(ValueError, match="Unknown judge"):
        load_judge("judge-gardens-of-babylon")


@needs_digits
def test_the_digit_judge_reads_real_digits():
    from dm_course.data import load_data, to_model

    rows = load_data("digits", "test", count=290)
    images = to_model(np.stack([np.asarray(x) for x in rows["image"]])[:, None])
    judge = load_judge("judge-digits")
    assert judge.names("digit") == [str(i) for i in range(10)]
    assert accuracy(judge, images, {"digit": torch.tensor(rows["label"])})["digit"] > 0.97


@needs_garden
@pytest.mark.parametrize("split", ["test", "heldout"])
@pytest.mark.parametrize("size, at_least", [(64, 0.95), (32, 0.9)])
def test_the_garden_judge_reads_fresh_pictures(split, size, at_least):
    from dm_course.garden import attributes, draw

    judge = load_judge("judge-garden")
    truth = [attributes(77, i, domain, split) for i in range(60) for domain in judge.names("domain")]
    images = torch.from_numpy(np.stack([draw(a, size) for a in truth])).permute(0, 3, 1, 2) / 127.5 - 1
    right = accuracy(judge, images, {g: [getattr(a, g) for a in truth] for g in judge.groups})
    assert set(right) == {"colour", "pattern", "background", "domain", "shape"} and min(right.values()) >= at_least


@needs_digits
@needs_garden
def test_bundled_judges_are_small():
    for name in ("judge-digits", "judge-garden"):
        judge = load_judge(name)
        assert isinstance(judge, Judge) and 64 <= judge.model.classifier[1].in_features <= 128
        assert sum(p.numel() for p in judge.model.parameters()) < 1_500_000

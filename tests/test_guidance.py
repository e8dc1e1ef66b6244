"""The module of lesson 22: losses, the wrapper in both ways and for every prediction type, CLIP, and the exercises."""

import math
import re

import open_clip
import pytest
import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, HeunDiscreteScheduler, UniPCMultistepScheduler
from shared import normal

from dm_course import guidance
from dm_course.garden import COLOURS
from dm_course.guidance import (
    TIME_SCALES,
    clip_loss,
    colour_loss,
    cutouts,
    embed_images,
    embed_texts,
    great_circle_distance,
    guided,
    wing_colour,
)
from dm_course.recipes import new_unet
from dm_course.sampling import PREDICTION_TYPES, alpha_bar, convert, denoiser, sample

KINDS = PREDICTION_TYPES


def schedule(kind="v_prediction", **options):
    """A cosine schedule of 1,000 timesteps that is sampled from the top."""
    options = {"beta_schedule": "squaredcos_cap_v2", "timestep_spacing": "trailing", "clip_sample": False} | options
    return DDIMScheduler(prediction_type=kind, **options)


def half(scheduler):
    """A smooth denoiser, half of x as the clean picture, said in the scheduler's prediction type."""
    kind = scheduler.config.prediction_type
    return lambda x, t: convert(0.5 * x, x, alpha_bar(scheduler, t), "sample", kind)


# Colours


def test_colours_are_those_of_the_garden():
    found = torch.stack([wing_colour(name) for name in COLOURS])
    assert found.shape == (8, 3) and found.min() >= 0 and found.max() <= 1
    apart = torch.cdist(found, found) + 9 * torch.eye(8)
    assert apart.min() > 0.2, "every two colours can be told apart"
    assert wing_colour("red").argmax() == 0 and wing_colour("green").argmax() == 1 and wing_colour("blue").argmax() == 2
    with pytest.raises(ValueError, match="turquoise"):
        wing_colour("turqoise")


def test_colour_loss_is_the_mean_squared_distance():
    x = normal(2, 3, 6, 4)
    everywhere = colour_loss((0.0, 0.5, 1.0), sigma=None)(x)
    target = torch.tensor([-1.0, 0.0, 1.0]).reshape(1, 3, 1, 1)
    assert torch.allclose(everywhere, (x - target).square().sum(1).mean((1, 2)))
    assert colour_loss((0.0, 0.5, 1.0))(target.expand(2, 3, 8, 8)).abs().max() < 1e-6


def test_colour_loss_takes_one_colour_for_each_picture():
    x, rgb = normal(2, 3, 8, 8), torch.tensor([[0.0, 0.0, 1.0], [1.0, 0.5, 0.0]])
    both = colour_loss(rgb)(x)
    assert torch.allclose(both, torch.stack([colour_loss(rgb[i])(x[i : i + 1])[0] for i in range(2)]))


def test_colour_loss_looks_at_the_middle():
    x = torch.zeros(1, 3, 32, 32, requires_grad=True)
    slope = torch.autograd.grad(colour_loss((1.0, 1.0, 1.0))(x).sum(), x)[0].abs().sum(1)[0]
    assert slope[15:17, 15:17].min() > 20 * slope[0].max()
    assert torch.allclose(slope, slope.flip(0)) and torch.allclose(slope, slope.T)
    even = torch.autograd.grad(colour_loss((1.0, 1.0, 1.0), None)(x).sum(), x)[0].abs().sum(1)[0]
    assert torch.allclose(slope.mean(), even.mean(), rtol=1e-4)  # the same push in all, elsewhere


@pytest.mark.parametrize("rgb", [(0, 120, 255), (0.1, 0.2), 0.5, torch.rand(2, 2, 3), (float("nan"), 0.0, 0.0)])
def test_colour_loss_refuses_what_is_no_colour(rgb):
    with pytest.raises(ValueError, match="a colour is three numbers"):
        colour_loss(rgb)


# The wrapper


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("through", ["x0", "unet"])
@pytest.mark.parametrize("name", list(TIME_SCALES))
def test_epsilon_moves_by_the_formula(kind, through, name):
    scheduler, x, t = schedule(kind), normal(2, 3, 8, 8), torch.tensor(400)
    model_fn, loss = half(scheduler), lambda x0: x0.square().sum((1, 2, 3))
    a = alpha_bar(scheduler, t)
    before, after = (
        convert(f(x, t), x, a, kind, "epsilon")
        for f in (model_fn, guided(model_fn, scheduler, loss, 3.0, through=through, time_scale=name))
    )
    slope = 2 * (0.5 * x) * (0.5 if through == "unet" else a.sqrt())  # x̂_0 = x / 2; its loss has slope 2 x̂_0
    weight = {"constant": 1.0, "alpha_bar": a, "sqrt_alpha_bar": a**0.5, "sqrt_one_minus_alpha_bar": (1 - a) ** 0.5}
    assert torch.allclose(after - before, 3.0 * weight[name] * slope, atol=1e-4)


def test_the_factor_is_read_by_timestep_and_not_by_step():
    scheduler, factors = schedule(num_train_timesteps=1000), []
    scheduler.set_timesteps(10)
    for t in scheduler.timesteps[1:]:
        x, a = normal(1, 1, 4, 4), alpha_bar(scheduler, t)
        loss = lambda x0: x0.sum((1, 2, 3))  # noqa: E731
        moved = guided(half(scheduler), scheduler, loss, 1.0, time_scale="alpha_bar")(x, t) - half(scheduler)(x, t)
        factors.append(moved.mean().item())  # v moves by w(t) times the slope at x̂_0, which is 1
        assert moved.mean().item() == pytest.approx(a.item(), rel=1e-3)
    assert min(factors) < 0.05 and max(factors) > 0.9


@pytest.mark.parametrize("kind", KINDS)
def test_no_wish_changes_nothing_at_all(kind):
    scheduler, x = schedule(kind), normal(2, 3, 8, 8)
    for t in (0, 400, 940):
        for through in ("x0", "unet"):
            same = guided(half(scheduler), scheduler, colour_loss((0, 0, 1)), 0, through=through)(x, torch.tensor(t))
            assert torch.equal(same, half(scheduler)(x, torch.tensor(t)))


@pytest.mark.parametrize("kind", ["v_prediction", "sample"])
def test_nothing_is_steered_where_nothing_is_left_of_the_picture(kind):
    scheduler, x = schedule(kind, rescale_betas_zero_snr=True), normal(2, 3, 8, 8)
    assert scheduler.alphas_cumprod[-1] < 1e-6
    for through in ("x0", "unet"):
        steered = guided(half(scheduler), scheduler, colour_loss((0, 0, 1)), 100, through=through)
        said = steered(x, torch.tensor(999))
        assert torch.isfinite(said).all() and torch.equal(said, half(scheduler)(x, torch.tensor(999)))
        assert not torch.equal(steered(x, torch.tensor(900)), half(scheduler)(x, torch.tensor(900)))


def test_each_picture_has_a_timestep_and_a_wish_of_its_own():
    scheduler, x, t = schedule(), normal(3, 3, 8, 8), torch.tensor([999, 500, 20])
    rgb = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]])
    net = new_unet(8, widths=(16, 16, 16)).eval()
    for through in ("x0", "unet"):
        together = guided(denoiser(net), scheduler, colour_loss(rgb), 50, through=through)(x, t)
        for i in range(3):
            alone = guided(denoiser(net), scheduler, colour_loss(rgb[i]), 50, through=through)(x[i : i + 1], t[i])
            assert torch.allclose(together[i : i + 1], alone, atol=1e-4), (through, i)


def test_the_network_is_watched_only_where_it_must_be():
    scheduler, seen, x = schedule(), [], normal(1, 3, 8, 8)

    def model_fn(x, t):
        seen.append((torch.is_grad_enabled(), x.requires_grad))
        return 0.5 * x

    with torch.no_grad():  # as in `sample`
        for through in ("x0", "unet"):
            said = guided(model_fn, scheduler, colour_loss((0, 0, 1)), 5, through=through)(x, torch.tensor(500))
            assert not said.requires_grad
    assert seen == [(False, True), (True, True)] and not x.requires_grad


def test_weights_of_the_network_get_no_gradient():
    net = new_unet(8, widths=(16, 16, 16)).eval()
    steered = guided(denoiser(net), schedule(), colour_loss((0, 0, 1)), 5, through="unet")
    steered(normal(1, 3, 8, 8), torch.tensor(500))
    assert all(p.grad is None for p in net.parameters())


def test_names_and_losses_that_can_not_be_are_refused():
    scheduler, x = schedule(), normal(2, 3, 8, 8)
    with pytest.raises(ValueError, match="unet"):
        guided(half(scheduler), scheduler, colour_loss((0, 0, 1)), 5, through="u-net")
    with pytest.raises(ValueError, match="sqrt_alpha_bar"):
        guided(half(scheduler), scheduler, colour_loss((0, 0, 1)), 5, time_scale="sqrt_alphabar")
    for loss in (lambda x0: x0.mean(), lambda x0: x0.mean((2, 3))):
        with pytest.raises(ValueError, match="one number a picture"):
            guided(half(scheduler), scheduler, loss, 5)(x, torch.tensor(500))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("through", ["x0", "unet"])
@pytest.mark.parametrize(
    "sampler", [DDIMScheduler, DPMSolverMultistepScheduler, HeunDiscreteScheduler, UniPCMultistepScheduler]
)
def test_every_sampler_walks_towards_the_wish(sampler, through, kind):
    """Pictures that are Gaussian noise of spread 0.5: the best denoiser is known, and so is what guidance should do."""
    scheduler = schedule(kind)

    def model_fn(x, t):
        a = alpha_bar(scheduler, t)
        return convert(x * a.sqrt() * 0.25 / (a * 0.25 + 1 - a), x, a, "sample", kind)

    spacing = "leading" if kind == "epsilon" or sampler is HeunDiscreteScheduler else "trailing"
    steps = sampler.from_config(scheduler.config, timestep_spacing=spacing)
    x, wish = normal(4, 3, 8, 8), colour_loss((0.2, 0.4, 0.9), None)
    plain = sample(model_fn, steps, x, 12)
    steered = sample(guided(model_fn, scheduler, wish, 64.0, through=through), steps, x, 12)
    assert torch.isfinite(steered).all() and wish(steered).mean() < 0.8 * wish(plain).mean()


def test_through_the_network_the_exact_answer_comes_out(monkeypatch):
    """For Gaussian pictures and a linear loss, guidance is exact: the mean moves by minus the variance times the slope."""
    monkeypatch.setattr(guidance, "LEAST_ALPHA_BAR", 0.0)
    scheduler, spread, scale = schedule(), 0.5, 2.0

    def model_fn(x, t):
        a = alpha_bar(scheduler, t)
        return convert(x * a.sqrt() * spread**2 / (a * spread**2 + 1 - a), x, a, "sample", "v_prediction")

    loss = lambda x0: x0.sum((1, 2, 3))  # noqa: E731
    steered = guided(model_fn, scheduler, loss, scale, through="unet")
    made = sample(steered, scheduler, normal(64, 1, 8, 8), 250)
    assert made.mean().item() == pytest.approx(-scale * spread**2, abs=0.01)
    assert made.std().item() == pytest.approx(spread, abs=0.03)


def test_guidance_repeats_itself():
    net, scheduler, x = new_unet(8, widths=(16, 16, 16)).eval(), schedule(), normal(2, 3, 8, 8)
    steered = guided(denoiser(net), scheduler, colour_loss((0, 0, 1)), 20, through="unet")
    assert torch.equal(sample(steered, scheduler, x, 3), sample(steered, scheduler, x, 3))


# CLIP


@pytest.fixture(scope="module")
def clip():
    """A tiny CLIP that has learned nothing, and its tokenizer."""
    vision = {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 8}
    text = {"context_length": 12, "width": 16, "heads": 2, "layers": 1}
    torch.manual_seed(0)
    model = open_clip.CLIP(embed_dim=8, vision_cfg=vision, text_cfg=text).eval()
    open_clip.set_model_preprocess_cfg(model, {"mean": (0.4, 0.5, 0.6), "std": (0.2, 0.3, 0.4), "size": 32})
    return model, open_clip.SimpleTokenizer(context_length=12)


def test_great_circle_distance_is_half_the_squared_angle():
    angle = torch.linspace(0, math.pi, 50)
    around = torch.stack([angle.cos(), angle.sin()], 1)
    found = great_circle_distance(5 * around, torch.tensor([0.1, 0.0]))
    assert torch.allclose(found, angle.square() / 2, atol=1e-3)
    assert great_circle_distance(normal(3, 1, 4), normal(2, 4, seed=1)).shape == (3, 2)


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_great_circle_distance_has_a_finite_slope_everywhere(sign):
    a = normal(4, 6).requires_grad_()
    great_circle_distance(a, sign * a.detach()).sum().backward()
    assert torch.isfinite(a.grad).all()


def test_cutouts_are_pieces_of_the_picture():
    y, x = torch.meshgrid(torch.linspace(-1, 1, 32), torch.linspace(-1, 1, 32), indexing="ij")
    ramp = torch.stack([x, y])[None].repeat(2, 1, 1, 1)
    torch.manual_seed(1)  # whatever other tests left
    cuts = cutouts(ramp, 5, 16, 0.5, torch.Generator().manual_seed(0))
    assert cuts.shape == (10, 2, 16, 16) and cuts.min() >= -1 and cuts.max() <= 1
    across = cuts[:, 0, 0, -1] - cuts[:, 0, 0, 0]  # how much of the width each shows
    assert (across > 0.4 * 2).all() and (across < 2).all() and across.std() > 0.05
    assert torch.allclose(across, cuts[:, 1, -1, 0] - cuts[:, 1, 0, 0], atol=1e-4)  # squares
    again = cutouts(ramp, 5, 16, 0.5, torch.Generator().manual_seed(0))
    assert torch.equal(cuts, again) and not torch.equal(cuts, cutouts(ramp, 5, 16, 0.5))


def test_whole_cutouts_are_the_pictures_in_their_order():
    images = normal(3, 3, 8, 8)
    assert torch.allclose(cutouts(images, 2, 8, smallest=1), images.repeat(2, 1, 1, 1), atol=1e-5)


@pytest.mark.parametrize("options", [{"count": 0}, {"size": 0}, {"smallest": 0.0}, {"smallest": 1.5}])
def test_cutouts_refuse_impossible_sizes(options):
    with pytest.raises(ValueError, match="cut-outs of"):
        cutouts(normal(1, 3, 8, 8), **({"count": 1, "size": 8} | options))


def test_pictures_are_brought_to_the_range_and_size_that_clip_knows(clip):
    model, _ = clip
    images = normal(2, 3, 32, 32).clamp(-1, 1)
    mean, std = (torch.tensor(v).reshape(3, 1, 1) for v in ((0.4, 0.5, 0.6), (0.2, 0.3, 0.4)))
    with torch.no_grad():
        right = F.normalize(model.encode_image(((images + 1) / 2 - mean) / std), dim=-1)
        assert torch.allclose(embed_images(model, images), right, atol=1e-5)
        large = images.repeat_interleave(2, 2).repeat_interleave(2, 3)
        assert embed_images(model, large).shape == (2, 8)
        assert torch.allclose(embed_images(model, large).norm(dim=1), torch.ones(2), atol=1e-5)


def test_texts_become_unit_vectors(clip):
    assert embed_texts(*clip, ["a red butterfly", "a blue flower"]).norm(dim=1).tolist() == pytest.approx([1, 1])
    assert embed_texts(*clip, "a red butterfly").shape == (1, 8)
    for nothing in ("", "   ", [], ["a", " "]):
        with pytest.raises(ValueError, match="nothing to wish for"):
            embed_texts(*clip, nothing)


def test_clip_loss_is_the_mean_distance_of_the_cutouts(clip):
    model, tokenizer = clip
    images, texts = normal(2, 3, 32, 32), ["a red butterfly", "a blue flower"]
    with torch.no_grad():
        whole = clip_loss(model, tokenizer, texts, cuts=0, noise=0)(images)
        right = great_circle_distance(embed_images(model, images), embed_texts(model, tokenizer, texts))
        assert torch.allclose(whole, right, atol=1e-5)
        found = clip_loss(model, tokenizer, texts, 3, noise=0, generator=torch.Generator().manual_seed(0))(images)
        views = cutouts(images, 3, 32, 0.6, torch.Generator().manual_seed(0)).reshape(3, 2, 3, 32, 32)
        one = [great_circle_distance(embed_images(model, v), embed_texts(model, tokenizer, texts)) for v in views]
    assert torch.allclose(found, torch.stack(one).mean(0), atol=1e-5)


def test_noise_on_the_cutouts_is_drawn_from_the_generator(clip):
    images = normal(2, 3, 32, 32)
    losses = [
        clip_loss(*clip, "a red butterfly", 1, 1.0, noise, torch.Generator().manual_seed(seed))(images).detach()
        for noise, seed in ((0, 0), (0.3, 0), (0.3, 0), (0.3, 1))
    ]
    assert torch.equal(losses[1], losses[2])
    assert not torch.equal(losses[0], losses[1]) and not torch.equal(losses[1], losses[3])


def test_clip_loss_wants_one_text_or_one_for_each_picture(clip):
    loss = clip_loss(*clip, ["a red butterfly", "a blue flower"], cuts=1)
    with pytest.raises(ValueError, match="2 texts for 3 pictures"):
        loss(normal(3, 3, 32, 32))
    assert clip_loss(*clip, "a red butterfly", cuts=2)(normal(3, 3, 32, 32)).shape == (3,)


@pytest.mark.parametrize("through", ["x0", "unet"])
def test_a_denoiser_is_steered_by_words(clip, through):
    scheduler, x = schedule(), normal(2, 3, 32, 32)
    loss = clip_loss(*clip, "a red butterfly", cuts=0, noise=0)
    with torch.no_grad():
        plain = sample(half(scheduler), scheduler, x, 4)
        steered = sample(guided(half(scheduler), scheduler, loss, 200, through=through), scheduler, x, 4)
        assert loss(steered).mean() < loss(plain).mean()


@pytest.mark.parametrize(
    ("check", "wrong", "said"),
    [
        ("check_symmetry_loss", lambda x: (x - x.flip(-1)).square().mean(), r"shaped \(3,\), not \(\)"),
        ("check_symmetry_loss", lambda x: (x - x.flip(-2)).square().mean((1, 2, 3)), "left and right"),
        ("check_symmetry_loss", lambda x: (x - x.flip(-1)).abs().mean((1, 2, 3)), "it should be"),
        ("check_symmetry_loss", lambda x: (x - x.flip(-1)).square().mean((1, 2, 3)).detach(), "no gradient"),
        ("check_symmetry_loss", lambda x: 1 / 0, "raises ZeroDivisionError"),
        ("check_only_between", lambda f, g, low, high: f, "at t = 600 it should ask steered_fn alone"),
        ("check_only_between", lambda f, g, low, high: lambda x, t: (f(x, t), g(x, t))[low <= t <= high], "alone"),
        ("check_only_between", lambda f, g, low, high: lambda x, t: (f, g)[low < t < high](x, t), "at t = 600"),
        ("check_only_between", lambda f, g, low, high: None, "gives None"),
        ("check_slope_factor", lambda kind, a: a**0.5, "epsilon at ᾱ = 0.01"),
        ("check_slope_factor", lambda kind, a: {"epsilon": a**-0.5, "v_prediction": a**0.5, "sample": 1}[kind], "sample"),
        ("check_slope_factor", lambda kind, a: None, "you say None"),
        ("check_between", lambda a, b, p: (1 - p) * a + p * b, "the lengths are"),
        ("check_between", lambda a, b, p: F.normalize((1 - p) * a + p * b, dim=-1), "of the angle"),
        ("check_between", lambda a, b, p: a[:1], "shaped"),
    ],
)  # fmt: skip
def test_checkers_say_what_is_off(check, wrong, said, capsys):
    assert getattr(guidance, check)(wrong) is False
    assert re.search(said, capsys.readouterr().out)

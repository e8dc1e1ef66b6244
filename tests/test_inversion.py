"""The module of lesson 41: the step both ways, the grid, inversion and its inverse, null text, bad input, exercises."""

import copy
import math
import re
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import DDIMInverseScheduler, DDIMScheduler, EulerDiscreteScheduler, UNet2DConditionModel
from shared import normal

from dm_course import inversion
from dm_course.conditioning import cfg
from dm_course.garden import attributes, draw, mask
from dm_course.inversion import (
    Inversion,
    ddim_step,
    edit,
    invert,
    invert_pictures,
    null_text,
    null_text_denoiser,
    recoloured,
    region_psnr,
    timestep_grid,
    with_noise,
)
from dm_course.sampling import PREDICTION_TYPES, alpha_bar, convert, denoiser, oracle, sample

KINDS = PREDICTION_TYPES


def schedule(kind="v_prediction", zero=True, **options):
    """A schedule as garden-sd has it: nothing of the picture is left at the top, and the top is used."""
    options = {"beta_schedule": "scaled_linear", "timestep_spacing": "trailing", "clip_sample": False} | options
    return DDIMScheduler(prediction_type=kind, rescale_betas_zero_snr=zero, **options)


def smooth(scheduler, strength=0.7):
    """A smooth denoiser: a clean picture that bends with x, said in the scheduler's prediction type."""
    kind = scheduler.config.prediction_type
    clean = lambda x, t: strength * torch.tanh(x) * alpha_bar(scheduler, t)  # noqa: E731
    return lambda x, t: convert(clean(x, t), x, alpha_bar(scheduler, t), "sample", kind)


@pytest.fixture(scope="module")
def unet():
    """A tiny text-conditioned UNet that knows nothing; its last layer is not zero."""
    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, block_out_channels=(16, 16), layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=16, attention_head_dim=8, norm_num_groups=8,
    ).eval().requires_grad_(False)  # fmt: skip


# The step


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_down_is_that_of_the_scheduler(kind):
    scheduler, said, x = schedule(kind, zero=kind != "epsilon"), normal(2, 4, 8, 8), normal(2, 4, 8, 8, seed=1)
    scheduler.set_timesteps(20)
    for t in scheduler.timesteps.tolist():
        below = scheduler.alphas_cumprod[t - 50] if t >= 50 else scheduler.final_alpha_cumprod
        ours = ddim_step(said, x, scheduler.alphas_cumprod[t], below, kind)
        assert torch.allclose(ours, scheduler.step(said, t, x).prev_sample, atol=1e-4), t


def test_a_step_is_a_turn_of_a_circle():
    x0, epsilon = normal(2, 1, 1, 4, 4)
    at = lambda angle: math.cos(angle) * x0 + math.sin(angle) * epsilon  # noqa: E731
    for a, b in ((0.0, 1.5707963), (1.5707963, 0.3), (0.2, 0.2), (0.7, 1.1)):
        v = math.cos(a) * epsilon - math.sin(a) * x0
        assert torch.allclose(ddim_step(v, at(a), math.cos(a) ** 2, math.cos(b) ** 2, "v_prediction"), at(b), atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_there_and_back_with_one_answer_is_exact(kind):
    x, said = normal(1, 4, 4, 4), normal(1, 4, 4, 4, seed=1)
    up = ddim_step(said, x, 0.7, 0.3, kind)
    v = convert(said, x, 0.7, kind, "v_prediction")
    turned = convert(convert(v, x, 0.7, "v_prediction", "sample"), up, 0.3, "sample", kind)
    assert torch.allclose(ddim_step(turned, up, 0.3, 0.7, kind), x, atol=1e-5)


def test_what_a_prediction_can_not_say_is_an_error():
    x = normal(1, 1, 2, 2)
    with pytest.raises(ValueError, match="use v"):
        ddim_step(x, x, 0.0, 0.5, "epsilon")
    with pytest.raises(ValueError, match="use v"):
        ddim_step(x, x, 1.0, 0.5, "sample")
    with pytest.raises(ValueError, match="prediction type"):
        ddim_step(x, x, 0.5, 0.4, "noise")


# The grid


@pytest.mark.parametrize("steps", [1, 2, 7, 20, 30, 50, 350, 999, 1000])
@pytest.mark.parametrize("spacing", ["leading", "trailing"])
def test_the_grid_reaches_the_top_whatever_the_scheduler_does(steps, spacing):
    scheduler = schedule(timestep_spacing=spacing)
    timesteps, levels = timestep_grid(scheduler, steps)
    assert timesteps.shape == (steps,) and levels.shape == (steps + 1,)
    assert timesteps[-1] == 999 and timesteps.min() >= 0 and bool((timesteps.diff() > 0).all())
    assert levels[0] == scheduler.final_alpha_cumprod and bool((levels.diff() < 0).all())
    assert torch.allclose(levels[1:].float(), scheduler.alphas_cumprod[timesteps])


@pytest.mark.parametrize("steps", [5, 20, 50, 1000])
def test_the_grid_is_that_of_the_samplers_that_start_at_the_top(steps):
    scheduler = schedule()
    scheduler.set_timesteps(steps)
    assert torch.equal(timestep_grid(scheduler, steps)[0].flip(0), scheduler.timesteps)
    inverse = DDIMInverseScheduler.from_config(scheduler.config)
    inverse.set_timesteps(steps)
    assert torch.equal(timestep_grid(scheduler, steps)[0], inverse.timesteps)


def test_the_foot_is_the_finished_picture():
    for one in (True, False):
        scheduler = schedule(set_alpha_to_one=one)
        wanted = 1.0 if one else scheduler.alphas_cumprod[0].item()
        assert timestep_grid(scheduler, 10)[1][0].item() == pytest.approx(wanted)


def test_timesteps_of_ones_own_choice():
    scheduler = schedule()
    for chosen in ([3, 500, 999], (0,), torch.tensor([10, 11]), np.array([5, 700])):
        timesteps, levels = timestep_grid(scheduler, chosen)
        assert timesteps.tolist() == [int(t) for t in chosen] and len(levels) == len(timesteps) + 1


@pytest.mark.parametrize("steps", [0, -3, 1001, np.int64(0)])
def test_the_grid_refuses_numbers_of_steps_that_can_not_be(steps):
    with pytest.raises(ValueError, match="there must be 1 to 1000"):
        timestep_grid(schedule(), steps)


@pytest.mark.parametrize("steps", [[], [5, 5], [700, 3], [-1, 4], [3, 1000], [100.5], [3, float("nan")]])
def test_the_grid_refuses_timesteps_that_can_not_be(steps):
    with pytest.raises(ValueError, match="must ascend"):
        timestep_grid(schedule(), steps)


def test_the_grid_needs_to_know_the_finished_picture():
    with pytest.raises(ValueError, match="use DDIMScheduler"):
        timestep_grid(EulerDiscreteScheduler(), 10)


# Up


@pytest.mark.parametrize(("kind", "zero"), [("v_prediction", True), ("v_prediction", False), ("epsilon", False)])
@pytest.mark.parametrize("steps", [5, 20, 50])
def test_the_usual_way_up_is_that_of_diffusers(kind, zero, steps):
    scheduler, x0 = schedule(kind, zero), normal(2, 4, 8, 8)
    model_fn = smooth(scheduler) if not zero else lambda x, t: torch.sin(x) + 0.001 * t
    inverse = DDIMInverseScheduler.from_config(scheduler.config)
    inverse.set_timesteps(steps)
    found, x = invert(model_fn, scheduler, x0, steps, rounds=0), x0
    for i, t in enumerate(inverse.timesteps):
        x = inverse.step(model_fn(x, t), t, x).prev_sample
        assert torch.allclose(found.latents[i + 1], x, atol=1e-4) and torch.equal(found.at(t), found.latents[i + 1])


def test_every_timestep_is_asked_once_a_round_and_the_top_is_asked():
    scheduler, asked = schedule(), []

    def model_fn(x, t):
        asked.append(int(t))
        return 0.1 * x

    for rounds in (0, 1, 3):
        asked.clear()
        there = invert(model_fn, scheduler, normal(1, 4, 4, 4), 10, rounds)
        assert asked == [t for t in range(99, 1000, 100) for _ in range(max(1, rounds))]
    asked.clear()
    edit(model_fn, there)
    assert asked == list(range(999, 0, -100))


@pytest.mark.parametrize(
    ("kind", "zero"), [("v_prediction", True), ("v_prediction", False), ("epsilon", False), ("sample", False)]
)
def test_more_rounds_come_nearer_to_the_exact_inverse(kind, zero):
    scheduler = schedule(kind, zero, set_alpha_to_one=False)
    model_fn = smooth(scheduler) if not zero else lambda x, t: 0.5 * torch.sin(x) + 0.0005 * t
    x0 = normal(2, 4, 8, 8)
    off = [
        (edit(model_fn, invert(model_fn, scheduler, x0, 20, rounds)) - x0).square().mean().item()
        for rounds in (0, 1, 2, 8, 30)
    ]
    assert off[1] > off[2] > off[3] > off[4] or off[3] < 1e-4, off
    assert off[0] > 10 * off[4] and off[4] < 1e-3, off


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_latents_keep_their_number_format(dtype):
    model_fn, x0 = lambda x, t: 0.5 * torch.sin(x), normal(2, 4, 8, 8)
    there = invert(model_fn, schedule(), x0.to(dtype), 10)
    back = edit(model_fn, there)
    assert there.latents.dtype == back.dtype == dtype
    assert (there.latents[-1].float() - invert(model_fn, schedule(), x0, 10).latents[-1]).abs().max() < 0.1
    assert (back.float() - x0).square().mean() < 1e-3


def test_the_little_world_loses_less_where_noise_is_said():
    scheduler, x0 = schedule("epsilon", zero=False), normal(1, 4, 4, 4)
    still = lambda x, t: (1 - alpha_bar(scheduler, t)).sqrt() * x  # noqa: E731
    back = {rounds: edit(still, invert(still, scheduler, x0, 20, rounds)) for rounds in (0, 1)}
    v = schedule(zero=False)
    usual = edit(lambda x, t: 0 * x, invert(lambda x, t: 0 * x, v, x0, 20, rounds=0))
    assert (back[0] - x0).abs().max() < 0.2 * (usual - x0).abs().max() and torch.allclose(back[1], x0, atol=1e-3)


def test_the_little_world():
    """Where the best velocity is 0, the usual way loses what the cosines say, and one round is exact."""
    scheduler, x0 = schedule(), normal(1, 4, 4, 4)
    still = lambda x, t: torch.zeros_like(x)  # noqa: E731
    for steps in (2, 5, 50):
        _, levels = timestep_grid(scheduler, steps)
        angles = levels.sqrt().acos()
        lost = angles.diff().cos().prod().item()
        usual = invert(still, scheduler, x0, steps, rounds=0)
        assert torch.allclose(usual.latents[-1], lost * x0, atol=1e-5)
        assert torch.allclose(edit(still, usual), lost**2 * x0, atol=1e-5)
        assert torch.allclose(edit(still, invert(still, scheduler, x0, steps, rounds=1)), x0, atol=1e-4)


def test_a_step_that_can_not_be_undone_is_refused():
    scheduler, still = schedule(), lambda x, t: torch.zeros_like(x)
    with pytest.raises(ValueError, match="2 steps or more"):
        invert(still, scheduler, normal(1, 4, 4, 4), 1)
    assert invert(still, scheduler, normal(1, 4, 4, 4), 1, rounds=0).latents.isfinite().all()
    with pytest.raises(ValueError, match="use v"):
        invert(still, schedule("sample"), normal(1, 4, 4, 4), 5, rounds=0)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"steps": 0}, "there must be 1 to 1000"),
        ({"x0": torch.zeros(1, 4, 4, 4, dtype=torch.int64)}, "floats"),
        ({"rounds": -1}, "whole number"),
        ({"rounds": 1.5}, "whole number"),
    ],
)
def test_invert_refuses_what_can_not_be_before_any_work(change, said):
    def never(x, t):
        raise AssertionError("the model was asked")

    with pytest.raises(ValueError, match=said):
        invert(never, **({"scheduler": schedule(), "x0": normal(1, 4, 4, 4), "steps": 5} | change))


# Down


@pytest.mark.parametrize("kind", ["v_prediction", "epsilon"])
def test_down_from_the_top_is_what_the_sampler_draws(kind):
    scheduler = schedule(kind, zero=kind != "epsilon")
    model_fn, noise = oracle(normal(1, 4, 8, 8, seed=3), scheduler), normal(2, 4, 8, 8)
    there = with_noise(invert(model_fn, scheduler, normal(2, 4, 8, 8, seed=1), 20, rounds=0), noise)
    there = replace(there, latents=torch.cat([there.latents[:-1], noise[None]]))
    assert torch.allclose(edit(model_fn, there), sample(model_fn, scheduler, noise, 20), atol=1e-3)


def test_an_edit_starts_at_the_timestep_that_is_named():
    scheduler, asked = schedule(), []
    there = invert(lambda x, t: 0.1 * x, scheduler, normal(1, 4, 4, 4), 10)

    def model_fn(x, t):
        asked.append((int(t), x))
        return 0.1 * x

    for start in (399, torch.tensor(399), 399.0):
        asked.clear()
        edit(model_fn, there, start)
        assert [t for t, _ in asked] == [399, 299, 199, 99] and torch.equal(asked[0][1], there.latents[4])
    for wrong in (lambda: edit(model_fn, there, 400), lambda: there.at(400)):
        with pytest.raises(ValueError, match="no timestep 400; the nearest of its 10 is 399"):
            wrong()


def test_a_callback_sees_what_the_model_saw_and_what_it_predicts():
    scheduler, seen = schedule(), []
    answer = normal(1, 4, 4, 4, seed=2)
    there = invert(oracle(answer, scheduler), scheduler, normal(1, 4, 4, 4), 5, rounds=0)
    edit(oracle(answer, scheduler), there, callback=lambda i, t, x, x0: seen.append((i, int(t), x, x0)))
    assert [(i, t) for i, t, _, _ in seen] == [(0, 999), (1, 799), (2, 599), (3, 399), (4, 199)]
    assert torch.equal(seen[0][2], there.latents[-1]) and all(torch.allclose(x0, answer, atol=1e-3) for *_, x0 in seen)


def test_dice_are_the_noisy_pictures_of_the_training():
    scheduler, x0, noise = schedule(), normal(2, 4, 4, 4), normal(2, 4, 4, 4, seed=1)
    there = with_noise(invert(lambda x, t: 0 * x, scheduler, x0, 10), noise)
    for t in there.timesteps:
        wanted = scheduler.add_noise(x0, noise, t.repeat(2))
        assert torch.allclose(there.at(t), wanted, atol=1e-5)
    assert torch.equal(there.latents[0], x0) and torch.allclose(there.at(999), noise, atol=1e-5)
    with pytest.raises(ValueError, match="noise is shaped"):
        with_noise(there, noise[:1])


# Guidance


def test_against_the_old_words_the_old_words_change_nothing(unet):
    scheduler, words = schedule(), normal(2, 7, 16)
    told = denoiser(unet, encoder_hidden_states=words)
    there = invert(told, scheduler, normal(2, 4, 8, 8), 3)
    plain = edit(told, there)
    assert torch.allclose(edit(cfg(told, told, 7.5), there), plain, atol=1e-4)


def test_null_text_lands_nearer_to_the_path_and_leaves_the_weights_alone(unet):
    scheduler, words, empty = schedule(), 3 * normal(2, 7, 16), normal(1, 7, 16, seed=1)
    before = {k: v.clone() for k, v in unet.state_dict().items()}
    told = denoiser(unet, encoder_hidden_states=words)
    there = invert(told, scheduler, normal(2, 4, 8, 8), 3)
    nulls = null_text(unet, there, words, empty, 7.5, iterations=3, lr=0.1)
    assert nulls.shape == (3, 2, 7, 16) and not nulls.requires_grad and nulls.isfinite().all()
    plain = cfg(told, denoiser(unet, encoder_hidden_states=empty.expand(2, -1, -1)), 7.5)
    off = [
        (edit(f, there) - there.latents[0]).square().mean().item()
        for f in (plain, null_text_denoiser(unet, there, words, nulls, 7.5))
    ]
    assert off[1] < off[0]
    assert all(torch.equal(v, before[k]) and v.grad is None for k, v in unet.state_dict().items())


def test_null_text_never_lands_farther_away_than_with_the_silence_it_begins_with(unet):
    scheduler, words, empty = schedule(), 3 * normal(2, 7, 16), normal(1, 7, 16, seed=1)
    told = denoiser(unet, encoder_hidden_states=words)
    there = invert(told, scheduler, normal(2, 4, 8, 8), 2)
    wild = null_text(unet, there, words, empty, 7.5, iterations=2, lr=1e3)  # every step of Adam overshoots
    none = null_text(unet, there, words, empty, 7.5, iterations=0)
    assert torch.equal(none, empty.expand(2, 2, -1, -1))
    top = there.timesteps[-1]

    def miss(nulls):
        said = null_text_denoiser(unet, there, words, nulls, 7.5)(there.latents[-1], top)
        landed = ddim_step(said, there.latents[-1], *there.alpha_bars[[2, 1]], "v_prediction")
        return (landed - there.latents[-2]).square().mean((1, 2, 3))

    assert bool((miss(wild) <= miss(none) + 1e-6).all())


def test_null_text_searches_in_full_precision_for_a_network_of_half_precision(unet):
    half, words, empty = copy.deepcopy(unet).half(), 3 * normal(2, 7, 16).half(), normal(1, 7, 16, seed=1).half()
    told = denoiser(half, encoder_hidden_states=words)
    there = invert(told, schedule(), normal(2, 4, 8, 8).half(), [600])
    nulls = null_text(half, there, words, empty, 7.5, iterations=3, lr=0.01)
    assert nulls.dtype == torch.float32 and bool((nulls[0] != empty).flatten(1).any(1).all())
    found = edit(null_text_denoiser(half, there, words, nulls, 7.5), there)
    assert found.dtype == torch.float16 and found.isfinite().all()


def test_null_text_refuses_what_does_not_fit(unet):
    scheduler, words = schedule(), normal(2, 7, 16)
    there = invert(lambda x, t: 0 * x, scheduler, normal(2, 4, 8, 8), 3)
    with pytest.raises(ValueError, match="must not be 1"):
        null_text(unet, there, words, words[:1], 1)
    with pytest.raises(ValueError, match="as many prompts"):
        null_text(unet, there, words[:1], words[:1])
    for empty in (words, words[:1, :5], words[:1, :, :8]):
        with pytest.raises(ValueError, match=r"empty should be shaped \(1, 7, 16\)"):
            null_text(unet, there, words, empty)
    with pytest.raises(ValueError, match=r"should be shaped \(3, 2, 7, 16\)"):
        null_text_denoiser(unet, there, words, torch.zeros(2, 2, 7, 16))
    with pytest.raises(ValueError, match="no timestep 500"):
        null_text_denoiser(unet, there, words, torch.zeros(3, 2, 7, 16))(normal(2, 4, 8, 8), 500)


# Pictures


def test_recoloured_changes_the_colour_and_nothing_else():
    for i in range(20):
        a = attributes(0, i, "butterflies", "test")
        b = recoloured(a)
        assert b.colour not in (a.colour, a.accent) and replace(b, colour=a.colour) == a
        assert np.array_equal(mask(a, 16), mask(b, 16))
        outside = mask(a, 16) == 0
        assert np.array_equal(draw(a, 16)[outside], draw(b, 16)[outside])
    assert recoloured(a, "pink").colour == "pink"
    with pytest.raises(ValueError, match="turquoise"):
        recoloured(a, "turqoise")


def test_region_psnr():
    a, region = torch.zeros(2, 3, 4, 4), torch.zeros(2, 1, 4, 4)
    b, region[..., :2] = a + 0.2, 1
    b[..., 2:] = 2.0
    assert torch.allclose(region_psnr(a, b, region), torch.tensor(20.0), atol=1e-3)
    assert torch.allclose(region_psnr(a, b, 1 - region), torch.tensor(10 * math.log10(4)), atol=1e-3)
    with pytest.raises(ValueError, match="region of picture 1 is empty"):
        region_psnr(a, b, torch.stack([region[0], 0 * region[1]]))
    with pytest.raises(ValueError, match=r"shape \(2, 3, 4, 4\) and of \(1, 3, 4, 4\)"):
        region_psnr(a, b[:1], region)


@pytest.fixture
def pipeline(monkeypatch):
    """What `invert_pictures` needs of a pipeline: an autoencoder that halves twice, words, a scheduler."""
    monkeypatch.setattr(inversion, "encode", lambda vae, x: x[:, :1, ::4, ::4].repeat(1, 4, 1, 1))
    monkeypatch.setattr(inversion, "embed_prompt", lambda pipeline, prompts: torch.ones(len(prompts), 7, 16))
    monkeypatch.setattr(inversion, "text_denoiser", lambda unet, words: lambda x, t: 0.1 * x * words.mean())
    vae = SimpleNamespace(config=SimpleNamespace(in_channels=3), device="cpu", dtype=torch.float32)
    return SimpleNamespace(vae=vae, unet=None, vae_scale_factor=4, scheduler=schedule())


@pytest.mark.parametrize("prompts", ["a butterfly", ["a butterfly", "a flower"]])
@pytest.mark.parametrize("rounds", [0, 3])
def test_invert_pictures(pipeline, monkeypatch, prompts, rounds):
    def embed(pipeline, prompts):
        asked.extend(prompts)
        return torch.ones(len(prompts), 7, 16)

    pictures, asked = normal(2, 3, 16, 24).clamp(-1, 1), []
    monkeypatch.setattr(inversion, "embed_prompt", embed)
    latents = inversion.encode(None, pictures)
    wanted = invert(lambda x, t: 0.1 * x, pipeline.scheduler, latents, 5, rounds)
    for given in (pictures, pictures.double()):  # the pipeline's number format counts
        asked.clear()
        there = invert_pictures(pipeline, given, prompts, steps=5, rounds=rounds)
        assert isinstance(there, Inversion) and torch.equal(there.timesteps, wanted.timesteps)
        assert there.latents.dtype == torch.float32 and torch.allclose(there.latents, wanted.latents)
        assert asked == ([prompts] * 2 if isinstance(prompts, str) else prompts)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"steps": 0}, "there must be 1 to 1000"),
        ({"pictures": torch.zeros(2, 3, 16, 18)}, "18 × 16 pixels: both sides must be multiples of 4"),
        ({"pictures": torch.zeros(2, 3, 0, 16)}, "multiples of 4"),
        ({"pictures": torch.zeros(0, 3, 16, 16)}, "no picture"),
        ({"pictures": torch.zeros(2, 1, 16, 16)}, r"\(B, 3, H, W\)"),
        ({"pictures": torch.zeros(3, 16, 16)}, r"\(B, 3, H, W\)"),
        ({"pictures": torch.zeros(2, 3, 16, 16, dtype=torch.uint8)}, "uint8"),
        ({"pictures": torch.full((2, 3, 16, 16), 255.0)}, "255"),
        ({"pictures": torch.full((2, 3, 16, 16), float("nan"))}, "nan"),
        ({"prompts": ["one", "two", "three"]}, "2 pictures and 3 prompts"),
    ],
)
def test_invert_pictures_refuses_bad_input_before_any_work(pipeline, monkeypatch, change, said):
    def never(*args):
        raise AssertionError("work was done")

    for name in ("encode", "embed_prompt"):
        monkeypatch.setattr(inversion, name, never)
    with pytest.raises(ValueError, match=said):
        invert_pictures(pipeline, **({"pictures": torch.zeros(2, 3, 16, 16), "prompts": "a butterfly"} | change))


# Exercises


def forgets_the_rung(model_fn, there, region):
    """A wrong edit: it puts back the latents of the rung that it came from."""
    x, a = there.latents[-1], there.alpha_bars
    for k in range(len(there.timesteps), 0, -1):
        x = ddim_step(model_fn(x, there.timesteps[k - 1]), x, a[k], a[k - 1], there.prediction_type)
        x = region * x + (1 - region) * there.latents[k]
    return x


def circle(a, b, part, angle):
    """A point on a circle through two noises that are an angle apart."""
    return (((1 - part) * angle).sin() * a + (part * angle).sin() * b) / angle.sin()


def one_angle(a, b, part):
    """A wrong half way: one angle for the whole batch."""
    return circle(a, b, part, torch.nn.functional.cosine_similarity(a.flatten(), b.flatten(), 0).acos())


def swapped(a, b, part):
    """A wrong half way: from the end to the start."""
    angle = torch.nn.functional.cosine_similarity(a.flatten(1), b.flatten(1)).acos()
    return circle(b, a, part, angle.reshape(-1, 1, 1, 1))


def pastes_at_the_end(model_fn, there, region):
    """A wrong edit: it puts the region back once, when all is done."""
    return region * edit(model_fn, there) + (1 - region) * there.latents[0]


@pytest.mark.parametrize(
    ("check", "wrong", "said"),
    [
        ("check_even_angles", lambda a, n: torch.linspace(0, len(a) - 1, n).long(), "one nearer to|should be the top"),
        ("check_even_angles", lambda a, n: torch.arange(n), "should be the top"),
        ("check_even_angles", lambda a, n: torch.arange(len(a)), "shaped"),
        ("check_even_angles", lambda a, n: torch.linspace(0, len(a) - 1, n), "int64, not torch.float32"),
        ("check_edit_inside", lambda f, there, region: edit(f, there), "must stay"),
        ("check_edit_inside", forgets_the_rung, "one rung lower"),
        ("check_edit_inside", pastes_at_the_end, "after every step"),
        ("check_edit_inside", lambda f, there, region: there.latents[0], "asked at the timesteps"),
        ("check_halfway", lambda a, b, p: (1 - p) * a + p * b, "straight line"),
        ("check_halfway", lambda a, b, p: (1 - p) ** 0.5 * a + p**0.5 * b, "0.3 it is not the point"),
        ("check_halfway", swapped, "is a the start"),
        ("check_halfway", one_angle, "of its own"),
        ("check_leapfrog", lambda f, before, now, t, d: before + math.sin(d) * f(now, t), "factor 2 sin"),
        ("check_leapfrog", lambda f, before, now, t, d: math.cos(d) * now + math.sin(d) * f(now, t), "lead back"),
        (
            "check_leapfrog",
            lambda f, before, now, t, d: before + 2 * math.sin(d) * f(before, t),
            "at the latents `now`",
        ),
        ("check_leapfrog", lambda f, before, now, t, d: 1 / 0, "raises ZeroDivisionError"),
    ],
)
def test_checkers_say_what_is_off(check, wrong, said, capsys):
    assert getattr(inversion, check)(wrong) is False
    assert re.search(said, capsys.readouterr().out)

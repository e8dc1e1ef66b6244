"""The module of lesson 31: latents, prompts, the loop against diffusers' pipelines, masks, and the exercises."""

import re
import warnings

import pytest
import torch
import torch.nn.functional as F
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    StableDiffusionDepth2ImgPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionUpscalePipeline,
    UniPCMultistepScheduler,
)
from shared import normal

from dm_course import latent
from dm_course.latent import (
    beside,
    decode,
    embed_prompt,
    encode,
    guided_text,
    inpainting,
    latent_mask,
    latent_noise,
    paste,
    psnr,
    shape_channel,
    start_latents,
    text_denoiser,
    text_to_image,
)
from dm_course.latent_recipes import (
    garden_texts,
    new_autoencoder,
    new_text_encoder,
    new_text_unet,
    new_tokenizer,
    sd_pipeline,
    settle_latents,
    with_more_channels,
)
from dm_course.sampling import alpha_bar, convert, oracle, sample

PROMPTS = ["a blue butterfly with yellow spots in a green meadow", "a red flower"]


def generator(seed=0):
    """A fresh generator."""
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def pipeline():
    """A whole Stable Diffusion that has learned nothing, for pictures of 32 pixels."""
    tokenizer = new_tokenizer(garden_texts(20))
    vae = settle_latents(new_autoencoder((16, 16, 16), 32), torch.randint(0, 256, (8, 3, 32, 32), dtype=torch.uint8))
    unet = new_text_unet((16, 16, 16), size=8, states=16)
    return sd_pipeline(vae, new_text_encoder(tokenizer, 16, 1), tokenizer, unet)


@pytest.fixture(autouse=True)
def no_gradients():
    """None of this trains."""
    with torch.no_grad():
        yield


# Latents


def test_latents_are_the_posterior_times_the_factor(pipeline):
    images, vae = normal(2, 3, 32, 24).clamp(-1, 1), pipeline.vae
    posterior = vae.encode(images).latent_dist
    assert torch.equal(encode(vae, images), posterior.mode() * vae.config.scaling_factor)
    drawn = encode(vae, images, generator(1))
    assert torch.equal(drawn, posterior.sample(generator=generator(1)) * vae.config.scaling_factor)
    assert torch.equal(drawn, encode(vae, images, generator(1))) and not torch.equal(drawn, encode(vae, images))
    back = decode(vae, encode(vae, images))
    assert back.shape == images.shape and torch.allclose(back, vae.decode(posterior.mode()).sample, atol=1e-4)


@pytest.mark.parametrize("shape", [(1, 3, 32, 30), (1, 1, 32, 32), (3, 32, 32)])
def test_pictures_that_the_autoencoder_does_not_take_are_refused(pipeline, shape):
    with pytest.raises(ValueError, match="multiples of 4"):
        encode(pipeline.vae, torch.zeros(shape))


def test_gradients_flow_through_the_decoder(pipeline):
    with torch.enable_grad():
        z = normal(1, 4, 8, 8).requires_grad_()
        slope = torch.autograd.grad(decode(pipeline.vae, z).sum(), z)[0]
    assert slope.abs().min() >= 0 and slope.abs().max() > 0


def test_psnr_counts_decibels():
    x = torch.zeros(3, 1, 4, 4)
    y = x + torch.tensor([0.2, 0.02, 0.0]).reshape(3, 1, 1, 1)
    assert psnr(x, y)[:2].tolist() == pytest.approx([20, 40], abs=1e-3) and psnr(x, y)[2] == torch.inf
    assert psnr(x + 1, x + 7)[0] == torch.inf  # what is outside of the range does not count
    with pytest.raises(ValueError, match="shape"):
        psnr(x, y[:1])


# Prompts


def test_prompts_are_embedded_as_the_pipeline_does(pipeline):
    theirs, free = pipeline.encode_prompt(PROMPTS, pipeline.unet.device, 1, True)
    assert torch.equal(embed_prompt(pipeline, PROMPTS), theirs)
    assert torch.equal(embed_prompt(pipeline, ["", ""]), free)
    assert embed_prompt(pipeline, PROMPTS[0]).shape == (1, 77, 16)


def test_what_does_not_fit_is_quoted(pipeline):
    long = " ".join(["a blue butterfly"] * 25) + " under the night sky"
    with pytest.warns(UserWarning, match="only 77 tokens fit.*under the night sky"):
        embed_prompt(pipeline, ["a flower", long])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        embed_prompt(pipeline, long, warn=False)
        embed_prompt(pipeline, " ".join(["blue"] * 75))  # it just fits
    with pytest.warns(UserWarning, match="'blue'"):
        embed_prompt(pipeline, " ".join(["blue"] * 76))


@pytest.mark.parametrize("nothing", [[], [None], 7 * [3]])
def test_what_is_no_prompt_is_refused(pipeline, nothing):
    with pytest.raises(ValueError, match="a prompt is a text"):
        embed_prompt(pipeline, nothing)


def test_one_prompt_serves_any_number_of_pictures(pipeline):
    x, said = normal(3, 4, 8, 8), embed_prompt(pipeline, PROMPTS[0])
    all_same = text_denoiser(pipeline.unet, said.expand(3, -1, -1))(x, 500)
    assert torch.equal(text_denoiser(pipeline.unet, said)(x, 500), all_same)
    assert torch.allclose(
        guided_text(pipeline, PROMPTS[0], 3)(x, 500)[:1], guided_text(pipeline, PROMPTS[0], 3)(x[:1], 500), atol=1e-4
    )
    with pytest.raises(ValueError, match="2 prompts for 3 pictures"):
        text_denoiser(pipeline.unet, embed_prompt(pipeline, PROMPTS))(x, 500)


@pytest.mark.parametrize("t", [500, torch.tensor(500), torch.tensor([500, 20])])
def test_guidance_is_the_formula_in_one_call(pipeline, t):
    x, sizes = normal(2, 4, 8, 8), []
    told, free = (text_denoiser(pipeline.unet, embed_prompt(pipeline, p))(x, t) for p in (PROMPTS, ["", ""]))
    hook = pipeline.unet.register_forward_pre_hook(lambda module, args: sizes.append(len(args[0])))
    try:
        guided = guided_text(pipeline, PROMPTS, 3.0)(x, t)
        assert sizes == [4] and torch.allclose(guided, free + 3 * (told - free), atol=1e-4)
        sizes.clear()
        assert torch.equal(guided_text(pipeline, PROMPTS, 1)(x, t), told) and torch.equal(
            guided_text(pipeline, PROMPTS, 0)(x, t), free
        )
        assert sizes == [2, 2]
    finally:
        hook.remove()


def test_negative_prompts_take_the_place_of_the_empty_one(pipeline):
    x = normal(2, 4, 8, 8)
    away = text_denoiser(pipeline.unet, embed_prompt(pipeline, ["night", "day"]))(x, 500)
    told = text_denoiser(pipeline.unet, embed_prompt(pipeline, PROMPTS))(x, 500)
    guided = guided_text(pipeline, PROMPTS, 2.0, negative=["night", "day"])(x, 500)
    assert torch.allclose(guided, away + 2 * (told - away), atol=1e-4)
    with pytest.raises(ValueError, match="2 prompts and 1 negative"):
        guided_text(pipeline, PROMPTS, 2.0, negative=["night"])


# The loop against diffusers' own


def people(images):
    """Pictures for people, as the pipelines hand them out."""
    return (images * 0.5 + 0.5).clamp(0, 1)


@pytest.mark.parametrize("scale", [1.0, 3.0])
@pytest.mark.parametrize("scheduler", [DDIMScheduler, DPMSolverMultistepScheduler, UniPCMultistepScheduler])
def test_text_to_image_is_the_pipeline_to_the_bit(pipeline, scheduler, scale, monkeypatch):
    monkeypatch.setattr(pipeline, "scheduler", scheduler.from_config(pipeline.scheduler.config))
    options = dict(num_inference_steps=3, guidance_scale=scale, negative_prompt=["night", "night"], output_type="pt")
    theirs = pipeline(PROMPTS, generator=generator(5), **options).images
    ours = text_to_image(pipeline, PROMPTS, scale, 3, generator=generator(5), negative="night")
    assert torch.equal(people(ours), theirs)


def test_noise_has_the_size_that_is_asked_for(pipeline):
    assert latent_noise(pipeline, 2).shape == (2, 4, 8, 8)
    assert latent_noise(pipeline, 1, size=40).shape == (1, 4, 10, 10)
    assert latent_noise(pipeline, 1, size=(16, 64)).shape == (1, 4, 4, 16)
    assert torch.equal(latent_noise(pipeline, 2, generator(3)), normal(2, 4, 8, 8, seed=3))
    assert text_to_image(pipeline, PROMPTS[0], 2, 1, size=(16, 32)).shape == (1, 3, 16, 32)
    for wrong in (30, (32, 0), (34, 32)):
        with pytest.raises(ValueError, match="multiples of 4"):
            latent_noise(pipeline, 1, size=wrong)


@pytest.mark.parametrize("strength", [0.4, 0.75, 1.0])
def test_image_to_image_is_the_pipeline_to_the_bit(pipeline, strength):
    images = normal(2, 3, 32, 32).clamp(-1, 1)
    theirs = StableDiffusionImg2ImgPipeline(**pipeline.components, requires_safety_checker=False)
    theirs.set_progress_bar_config(disable=True)
    options = dict(num_inference_steps=5, guidance_scale=3.0, strength=strength, output_type="pt")
    theirs = theirs(PROMPTS, image=people(images), generator=generator(6), **options).images
    x, left = start_latents(pipeline, people(images) * 2 - 1, strength, 5, generator(6))
    assert len(left) == int(5 * strength)
    z = sample(guided_text(pipeline, PROMPTS, 3.0), pipeline.scheduler, x, 5, timesteps=left)
    assert torch.allclose(people(decode(pipeline.vae, z)), theirs, atol=1e-6)


@pytest.mark.parametrize("kind", [EulerDiscreteScheduler, DPMSolverMultistepScheduler, HeunDiscreteScheduler])
def test_image_to_image_begins_at_the_noise_of_its_first_step(pipeline, kind, monkeypatch):
    scheduler = kind.from_config(pipeline.scheduler.config)
    monkeypatch.setattr(pipeline, "scheduler", scheduler)
    z = latent.encode(pipeline.vae, images := normal(2, 3, 32, 32).clamp(-1, 1))
    monkeypatch.setattr(latent, "encode", lambda *a: z)
    x, left = start_latents(pipeline, images, 0.4, 10, generator(6))
    scheduler.set_timesteps(10)
    scheduler.set_begin_index(6 * scheduler.order)
    assert torch.equal(left, scheduler.timesteps[6 * scheduler.order :])
    assert torch.allclose(x, scheduler.add_noise(z, normal(*z.shape, seed=6), left[:1].repeat(2)))
    found = sample(oracle(z, scheduler), scheduler, x, 10, timesteps=left)
    assert torch.allclose(found, z, atol=0.05)  # from another noise level the known answer is not reached


@pytest.mark.parametrize("strength", [0, -1, 1.2, 0.1])
def test_strengths_that_can_not_be_are_refused(pipeline, strength):
    with pytest.raises(ValueError, match="strength is"):
        start_latents(pipeline, torch.zeros(1, 3, 32, 32), strength, 5)


def test_the_scheduler_of_the_pipeline_stays_as_it_was(pipeline):
    pipeline.scheduler.set_timesteps(7)
    before = pipeline.scheduler.timesteps.clone()
    x, left = start_latents(pipeline, torch.zeros(1, 3, 32, 32), 0.5, 4, generator())
    sample(guided_text(pipeline, PROMPTS[0], 1), pipeline.scheduler, x, 4, timesteps=left)
    assert torch.equal(pipeline.scheduler.timesteps, before)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("scheduler", [DDIMScheduler, DPMSolverMultistepScheduler, DDPMScheduler])
def test_sampling_from_the_middle_finds_what_an_oracle_knows(scheduler, kind):
    z, seen = normal(2, 4, 8, 8), []
    options = {} if scheduler is DPMSolverMultistepScheduler else {"clip_sample": False}
    scheduler = scheduler(prediction_type=kind, timestep_spacing="trailing", **options)
    scheduler.set_timesteps(10)
    left = scheduler.timesteps[4:]
    x = scheduler.add_noise(z, normal(2, 4, 8, 8, seed=1), left[:1])
    keep = lambda i, t, x, x0: seen.append((int(t), x0))  # noqa: E731
    found = sample(oracle(z, scheduler), scheduler, x, 10, generator(), callback=keep, timesteps=left)
    assert torch.allclose(found, z, atol=0.02) and [t for t, _ in seen] == left.tolist()
    assert all(torch.allclose(x0, z, atol=1e-2) for _, x0 in seen)


# Inpainting


def wild(x, t):
    """A denoiser that knows nothing."""
    return torch.sin(3 * x) + 0.1


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("scheduler", [DDIMScheduler, DPMSolverMultistepScheduler, UniPCMultistepScheduler])
@pytest.mark.parametrize("fresh", [False, True])
def test_nothing_moves_outside_of_the_mask(scheduler, kind, fresh):
    known, mask = normal(2, 4, 8, 8), torch.zeros(32, 32)
    mask[:, 16:] = 1
    schedule = scheduler(prediction_type=kind, timestep_spacing="trailing")
    if scheduler is DDIMScheduler:
        schedule = scheduler.from_config(schedule.config, clip_sample=False)
    painting = inpainting(wild, schedule, known, mask, generator(2) if fresh else None)
    made = sample(painting, schedule, normal(2, 4, 8, 8, seed=1), 5)
    assert torch.allclose(made[..., :4], known[..., :4], atol=1e-3)
    assert (made[..., 4:] - known[..., 4:]).abs().mean() > 0.05


def test_the_model_sees_the_known_part_in_the_right_noise():
    schedule = DDIMScheduler(prediction_type="v_prediction", clip_sample=False, timestep_spacing="trailing")
    known, noise, seen = normal(1, 4, 8, 8), normal(1, 4, 8, 8, seed=1), []
    mask = torch.zeros(8, 8)
    mask[:4] = 1

    def watched(x, t):
        a = alpha_bar(schedule, t)
        seen.append((x - a.sqrt() * known - (1 - a).sqrt() * noise)[..., 4:, :].abs().max().item())
        return convert(x * 0, x, a, "sample", "v_prediction")

    start = schedule.add_noise(known, noise, torch.tensor([999]))
    sample(inpainting(watched, schedule, known, mask), schedule, start, 8)
    assert len(seen) == 8 and max(seen) < 1e-3  # outside, it is the known part with the noise of the beginning


def test_masks_are_made_as_small_as_latents():
    z, mask = torch.zeros(2, 4, 8, 8), torch.zeros(2, 1, 32, 32)
    mask[0, 0, 3, 4], mask[1, 0, 31, 31] = 1, 0.2
    small = latent_mask(mask, z)
    assert small.shape == (2, 1, 8, 8) and small.nonzero().tolist() == [[0, 0, 0, 1], [1, 0, 7, 7]]
    assert latent_mask(mask[0, 0], z).shape == (1, 1, 8, 8)
    assert latent_mask(torch.ones(8, 8), z).all()


@pytest.mark.parametrize(
    ("mask", "said"),
    [
        (torch.ones(31, 32), "31 × 32 does not fit"),
        (torch.ones(32, 16), "32 × 16 does not fit"),
        (torch.ones(4, 4), "a mask is"),
        (torch.ones(3, 1, 32, 32), "a mask is"),
        (torch.ones(1, 3, 32, 32), "a mask is"),
        (torch.zeros(32, 32), "empty"),
        (torch.stack([torch.ones(1, 32, 32), torch.zeros(1, 32, 32)]), "empty"),
    ],
)
def test_masks_that_do_not_fit_are_refused_before_any_work(mask, said):
    with pytest.raises(ValueError, match=said):
        inpainting(None, DDIMScheduler(), torch.zeros(2, 4, 8, 8), mask)


def test_paste_leaves_the_outside_to_the_bit():
    old, new, mask = normal(2, 3, 8, 8), normal(2, 3, 8, 8, seed=1), torch.zeros(1, 1, 8, 8)
    mask[..., 4:], mask[..., 3] = 1, 0.5
    new[..., 0] = torch.nan
    made = paste(old, new, mask)
    assert torch.equal(made[..., :3], old[..., :3]) and torch.equal(made[..., 4:], new[..., 4:])
    assert torch.allclose(made[..., 3], (old + new)[..., 3] / 2)
    with pytest.raises(ValueError, match="one size"):
        paste(old, new, mask[..., 1:])


# Further channels


def test_shapes_beside_the_latent_are_the_depth_pipeline(pipeline):
    parts = {k: v for k, v in pipeline.components.items() if k in ("vae", "text_encoder", "tokenizer", "scheduler")}
    wide = with_more_channels(pipeline.unet, 1)
    torch.nn.init.normal_(wide.conv_in.weight, std=0.2, generator=generator(8))
    depth = StableDiffusionDepth2ImgPipeline(**parts, unet=wide, depth_estimator=None, feature_extractor=None)
    depth.set_progress_bar_config(disable=True)
    images, maps = torch.zeros(2, 3, 32, 32), torch.rand(2, 32, 32, generator=generator(7))
    options = dict(num_inference_steps=3, guidance_scale=3.0, strength=1.0, output_type="pt")
    theirs = depth(PROMPTS, image=people(images), depth_map=maps, generator=generator(9), **options).images
    x, left = start_latents(depth, images, 1.0, 3, generator(9))
    model_fn = beside(guided_text(depth, PROMPTS, 3.0), shape_channel(maps, (8, 8)))
    ours = decode(depth.vae, sample(model_fn, depth.scheduler, x, 3, timesteps=left))
    assert torch.allclose(people(ours), theirs, atol=1e-5)
    model_fn = beside(guided_text(depth, PROMPTS, 3.0), -shape_channel(maps, (8, 8)))
    inverted = people(decode(depth.vae, sample(model_fn, depth.scheduler, x, 3, timesteps=left)))
    assert not torch.allclose(people(ours), inverted, atol=1e-3)


def test_a_flat_map_shows_no_shape():
    made = shape_channel(torch.rand(3, 1, 16, 16, generator=generator()), (4, 4))
    assert made.shape == (3, 1, 4, 4) and made.amax((1, 2, 3)).tolist() == [1] * 3 == (-made.amin((1, 2, 3))).tolist()
    with pytest.raises(ValueError, match="no shape"):
        shape_channel(torch.ones(1, 16, 16), (4, 4))


def test_small_pictures_beside_the_latent_are_the_upscale_pipeline(pipeline):
    parts = {k: v for k, v in pipeline.components.items() if k in ("vae", "text_encoder", "tokenizer", "scheduler")}
    unet, low = new_text_unet((16, 16, 16), 7, 8, 16, levels=50), DDPMScheduler()
    upscale = StableDiffusionUpscalePipeline(**parts, unet=unet, low_res_scheduler=low, max_noise_level=49)
    upscale.set_progress_bar_config(disable=True)
    assert (
        upscale.vae.config.scaling_factor == pipeline.vae.config.scaling_factor
    )  # it insists on its own; ours is that
    small = normal(2, 3, 8, 8).clamp(-1, 1)
    options = dict(num_inference_steps=3, guidance_scale=1.0, noise_level=20, output_type="pt")
    theirs = upscale(PROMPTS, image=people(small), generator=generator(3), **options).images
    g = generator(3)
    hint = low.add_noise(small, torch.randn(small.shape, generator=g), torch.tensor([20]))
    model_fn = text_denoiser(unet, embed_prompt(upscale, PROMPTS), class_labels=torch.tensor([20, 20]))
    z = sample(beside(model_fn, hint), upscale.scheduler, latent_noise(upscale, 2, g), 3)
    assert torch.allclose(people(decode(upscale.vae, z)), theirs, atol=1e-5)
    assert decode(upscale.vae, z).shape == (2, 3, 32, 32) == F.interpolate(small, scale_factor=4).shape


MASKS = [torch.ones(1, 1, 16, 16), torch.zeros(1, 1, 32, 32), torch.ones(32, 30)]
MASKS += [torch.full((32, 32), 255, dtype=torch.uint8), -torch.ones(32, 32)]


@pytest.mark.parametrize("wrong", MASKS)
def test_inpaint_refuses_a_mask_before_any_work(pipeline, wrong, monkeypatch):
    monkeypatch.setattr(latent, "sample", lambda *a, **k: pytest.fail("it sampled"))
    with pytest.raises(ValueError, match="mask"):
        latent.inpaint(pipeline, torch.zeros(1, 3, 32, 32), wrong, "a red flower")


def test_inpaint_leaves_the_outside_to_the_bit(pipeline):
    images, hole = normal(2, 3, 32, 32).clamp(-1, 1), torch.zeros(2, 1, 32, 32)
    hole[0, :, :9], hole[1, :, :, 20:] = 1, 1
    made = latent.inpaint(pipeline, images, hole, PROMPTS, steps=2, generator=generator())
    where = (hole > 0).expand_as(images)
    assert torch.equal(made[~where], images[~where]) and not torch.equal(made[where], images[where])


def test_inpaint_is_repeatable_with_a_sampler_that_draws(pipeline, monkeypatch):
    monkeypatch.setattr(pipeline, "scheduler", DDPMScheduler.from_config(pipeline.scheduler.config))
    options = dict(prompts=PROMPTS[0], steps=3)
    made = [
        latent.inpaint(pipeline, torch.zeros(1, 3, 32, 32), torch.ones(32, 32), generator=generator(1), **options)
        for _ in range(2)
    ]
    assert torch.equal(*made)


# Exercises


@pytest.mark.parametrize(
    ("check", "wrong", "said"),
    [
        ("check_squeeze_of", lambda c, h, w: 3 * 4 ** len(c.block_out_channels) / c.latent_channels, "one halving too many"),
        ("check_squeeze_of", lambda c, h, w: 12, "48 times"),
        ("check_squeeze_of", lambda c, h, w: 1 / 0, "raises ZeroDivisionError"),
        ("check_between_noises", lambda a, b, p: (1 - p) * a + p * b, "the variance is"),
        ("check_between_noises", lambda a, b, p: p**0.5 * a + (1 - p) ** 0.5 * b, "it should be a itself"),
        ("check_between_noises", lambda a, b, p: a[:1], "should be shaped"),
        ("check_between_noises", lambda a, b, p: a if p < 1 else b, "no more of b"),
        ("check_between_noises", lambda a, b, p: a if p < 0.5 else b, "no more of b"),
        ("check_rescaled", lambda told, free, s, share: free + s * (told - free), "the spreads are"),
        ("check_rescaled", lambda t, f, s, p: (f + s * (t - f)) * (p * t.std() / (f + s * (t - f)).std() + 1 - p), "alone"),
        ("check_rescaled", lambda told, free, s, share: told[0], "a prediction of shape"),
        ("check_wider", lambda x, left, right: F.pad(x, (left, right)), "two things"),
        ("check_wider", lambda x, left, right: (F.pad(x, (right, left)), torch.ones(1, 1, 8, 8 + left + right)), "not where"),
        ("check_wider", lambda x, left, right: (F.pad(x, (left, right)), torch.ones(1, 1, 8, 8 + left + right)), "just where"),
        ("check_wider", lambda x, left, right: None, "gives None"),
    ],
)  # fmt: skip
def test_checkers_say_what_is_off(check, wrong, said, capsys):
    assert getattr(latent, check)(wrong) is False
    assert re.search(said, capsys.readouterr().out)

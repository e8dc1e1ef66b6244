"""Module `sampling`: conversions, the loss, and one loop over every scheduler."""

import ast
import re

import notebooks
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    DPMSolverSinglestepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    HeunDiscreteScheduler,
    KDPM2DiscreteScheduler,
    LMSDiscreteScheduler,
    PNDMScheduler,
    UNet2DModel,
    UniPCMultistepScheduler,
)

import dm_course.sampling
from dm_course.sampling import PREDICTION_TYPES, alpha_bar, convert, denoiser, diffusion_loss, noised, oracle, sample

COSINE = {"num_train_timesteps": 1000, "beta_schedule": "squaredcos_cap_v2"}


def picture(n=2, channels=3, size=8, seed=0):
    return torch.rand(n, channels, size, size, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def noise(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def tiny_unet(channels=3):
    torch.manual_seed(0)
    return UNet2DModel(8, channels, channels, block_out_channels=(8,), layers_per_block=1, norm_num_groups=4,
                       down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",))  # fmt: skip


# --- conversions


@pytest.mark.parametrize("source", PREDICTION_TYPES)
@pytest.mark.parametrize("target", PREDICTION_TYPES)
def test_convert_agrees_with_the_definition(source, target):
    x0, epsilon, keep = picture(), noise(2, 3, 8, 8), torch.tensor([0.9, 0.2]).reshape(2, 1, 1, 1)
    x = keep.sqrt() * x0 + (1 - keep).sqrt() * epsilon
    truth = {"sample": x0, "epsilon": epsilon, "v_prediction": keep.sqrt() * epsilon - (1 - keep).sqrt() * x0}
    torch.testing.assert_close(convert(truth[source], x, keep, source, target), truth[target], atol=2e-6, rtol=1e-5)


def test_convert_v_works_at_both_ends_and_the_others_say_where_they_cannot():
    x0, epsilon = picture(), noise(2, 3, 8, 8)
    assert torch.equal(convert(-x0, epsilon, 0.0, "v_prediction", "sample"), x0)  # pure noise: v = -x_0
    assert torch.equal(convert(epsilon, x0, 1.0, "v_prediction", "epsilon"), epsilon)  # no noise: v = ε
    with pytest.raises(ValueError, match="'epsilon' can't tell"):
        convert(epsilon, epsilon, 0.0, "epsilon", "sample")
    with pytest.raises(ValueError, match="'sample' can't tell"):
        convert(x0, x0, torch.tensor([1.0, 0.5]).reshape(2, 1, 1, 1), "sample", "v_prediction")


@pytest.mark.parametrize("source, target", [("epsilom", "sample"), ("epsilon", "x0")])
def test_convert_names_the_types_it_knows(source, target):
    with pytest.raises(ValueError, match="v_prediction"):
        convert(picture(), picture(), 0.5, source, target)


def test_alpha_bar_reads_the_table():
    scheduler = DDPMScheduler(**COSINE)
    table = scheduler.alphas_cumprod
    assert alpha_bar(scheduler, 10).item() == table[10]
    assert alpha_bar(scheduler, torch.tensor([0, 999])).shape == (2, 1, 1, 1)
    assert alpha_bar(scheduler, torch.tensor([999])).item() == table[999]
    assert alpha_bar(scheduler, 10.5, ndim=2).item() == pytest.approx((table[10] + table[11]).item() / 2)
    with pytest.raises(ValueError, match="FlowMatchEuler"):
        alpha_bar(FlowMatchEulerDiscreteScheduler(), 3)


# --- the loss


def batch_of(x0):
    return {"images": x0}


def captured(scheduler, x0, seed=3):
    """(x_t, t) that the loss shows to a model, and what it compares with: read off a model that answers 0."""
    seen = {}

    def model(x, t):
        seen.update(x=x, t=t)
        return torch.zeros_like(x)

    torch.manual_seed(seed)
    seen["loss"] = diffusion_loss(scheduler)(model, batch_of(x0))
    return seen


@pytest.mark.parametrize("kind", PREDICTION_TYPES)
def test_loss_of_the_oracle_is_zero(kind):
    scheduler, x0 = DDPMScheduler(prediction_type=kind, **COSINE), picture(4)
    torch.manual_seed(0)
    assert diffusion_loss(scheduler)(oracle(x0, scheduler), batch_of(x0)) < 1e-6


def test_loss_uses_the_schedulers_noising_and_the_global_generator():
    scheduler, x0 = DDPMScheduler(prediction_type="epsilon", **COSINE), picture(4)
    seen = captured(scheduler, x0)
    torch.manual_seed(3)
    t = torch.randint(0, 1000, (4,))
    epsilon = torch.randn_like(x0)
    assert torch.equal(seen["t"], t)
    torch.testing.assert_close(seen["x"], scheduler.add_noise(x0, epsilon, t))
    torch.testing.assert_close(seen["loss"], epsilon.square().mean())


def test_v_target_is_the_schedulers_velocity():
    scheduler, x0 = DDPMScheduler(prediction_type="v_prediction", **COSINE), picture(4)
    seen = captured(scheduler, x0)
    torch.manual_seed(3)
    t = torch.randint(0, 1000, (4,))
    torch.testing.assert_close(seen["loss"], scheduler.get_velocity(x0, torch.randn_like(x0), t).square().mean())


@pytest.mark.parametrize("kind", PREDICTION_TYPES)
@pytest.mark.parametrize("shape", [(5, 3, 4, 4), (5, 7)])
def test_a_noised_batch_comes_with_the_truth_of_its_kind(kind, shape):
    scheduler, t = DDPMScheduler(prediction_type=kind, **COSINE), torch.tensor([0, 1, 500, 900, 999])
    x0, epsilon = torch.randn(2, *shape, generator=torch.Generator().manual_seed(0))
    x_t, truth = noised(scheduler, x0, t, epsilon)
    torch.testing.assert_close(x_t, scheduler.add_noise(x0, epsilon, t))
    given = {"epsilon": epsilon, "v_prediction": scheduler.get_velocity(x0, epsilon, t), "sample": x0}
    torch.testing.assert_close(truth, given[kind])


def test_every_timestep_is_trained_the_last_one_too():
    scheduler = DDPMScheduler(num_train_timesteps=10)
    torch.manual_seed(0)
    seen = set()
    for _ in range(30):
        diffusion_loss(scheduler)(lambda x, t: seen.update(t.tolist()) or x, batch_of(picture(8)))
    assert seen == set(range(10))


def test_the_three_losses_are_one_under_the_derived_weights():
    """|v̂ − v|² = |ε̂ − ε|² / ᾱ = |x̂0 − x0|² / (1 − ᾱ), for one and the same network error."""
    schedulers = {k: DDPMScheduler(prediction_type=k, **COSINE) for k in PREDICTION_TYPES}
    keep, x0, net = schedulers["epsilon"].alphas_cumprod, picture(6), tiny_unet()
    weights = {"v_prediction": None, "epsilon": lambda t: 1 / keep[t], "sample": lambda t: 1 / (1 - keep[t])}
    losses = {}
    for kind, scheduler in schedulers.items():

        def as_kind(x, t, scheduler=scheduler, kind=kind):
            return convert(net(x, t).sample, x, alpha_bar(scheduler, t), "v_prediction", kind)

        torch.manual_seed(5)
        losses[kind] = diffusion_loss(scheduler, weights[kind])(as_kind, batch_of(x0)).item()
    assert losses["epsilon"] == pytest.approx(losses["v_prediction"], rel=1e-3)
    assert losses["sample"] == pytest.approx(losses["v_prediction"], rel=1e-3)


def test_loss_is_float32_under_autocast_and_has_gradients():
    net = tiny_unet()
    with torch.autocast("cpu", torch.bfloat16):
        loss = diffusion_loss(DDPMScheduler(**COSINE))(net, batch_of(picture()))
    assert loss.dtype == torch.float32
    loss.backward()
    assert all(p.grad is not None for p in net.parameters())


@pytest.mark.parametrize("scheduler", [DDPMScheduler(prediction_type="velocity"), FlowMatchEulerDiscreteScheduler()])
def test_loss_and_oracle_refuse_an_unknown_prediction_type(scheduler):
    with pytest.raises(ValueError, match="v_prediction"):
        diffusion_loss(scheduler)
    with pytest.raises(ValueError, match="v_prediction"):
        oracle(picture(), scheduler)


# --- sampling

SCHEDULERS = {
    "ddpm": (DDPMScheduler, 50),
    "ddim": (DDIMScheduler, 20),
    "dpm++": (DPMSolverMultistepScheduler, 20),
    "dpm++ karras": (lambda **k: DPMSolverMultistepScheduler(use_karras_sigmas=True, **k), 20),
    "dpm++ single": (lambda **k: DPMSolverSinglestepScheduler(**k), 20),
    "heun": (HeunDiscreteScheduler, 20),
    "euler": (EulerDiscreteScheduler, 20),
    "euler trailing": (lambda **k: EulerDiscreteScheduler(timestep_spacing="trailing", **k), 20),
    "euler leading": (lambda **k: EulerDiscreteScheduler(timestep_spacing="leading", **k), 20),
    "euler ancestral": (EulerAncestralDiscreteScheduler, 20),
    "lms": (LMSDiscreteScheduler, 20),
    "kdpm2": (KDPM2DiscreteScheduler, 20),
    "pndm": (PNDMScheduler, 50),
    "unipc": (UniPCMultistepScheduler, 20),
}


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_with_an_oracle_every_scheduler_returns_the_picture(name, kind):
    make, steps = SCHEDULERS[name]
    scheduler, x0, seen = make(prediction_type=kind, **COSINE), picture(), []
    model_fn = oracle(x0, scheduler)
    generator = torch.Generator().manual_seed(0)
    result = sample(model_fn, scheduler, noise(2, 3, 8, 8), steps, generator, lambda i, t, x, clean: seen.append(clean))
    assert (result - x0).abs().max() < 0.03
    # kdpm2 asks between two entries of the table while the noise is 20,000 times the picture
    assert max((clean - x0).abs().max().item() for clean in seen) < (0.2 if name == "kdpm2" else 0.03)


@pytest.mark.parametrize("make", [DDPMScheduler, DDIMScheduler])
def test_oracle_that_predicts_the_clean_picture(make):
    scheduler, x0 = make(prediction_type="sample", **COSINE), picture()
    assert (sample(oracle(x0, scheduler), scheduler, noise(2, 3, 8, 8), 20) - x0).abs().max() < 0.03


def test_flow_matching_samples_too():
    x0, clean = picture(), []
    result = sample(
        lambda x, t: (x - x0) / (t / 1000),  # the flow is ε − x_0
        FlowMatchEulerDiscreteScheduler(),
        noise(2, 3, 8, 8),
        10,
        callback=lambda i, t, x, x0: clean.append(x0),
    )
    torch.testing.assert_close(result, x0, atol=1e-5, rtol=0)
    assert clean == [None] * 10


def test_noise_is_scaled_once_and_the_model_always_sees_unit_variance():
    for make in (DDIMScheduler, EulerDiscreteScheduler, HeunDiscreteScheduler):
        scheduler, first = make(**COSINE), []
        sample(oracle(picture(), scheduler), scheduler, noise(2, 3, 64, 64)[..., :8, :8], 10,
               callback=lambda i, t, x, x0, first=first: first.append(x.std().item()))  # fmt: skip
        assert 0.8 < first[0] < 1.2


def test_the_callback_gets_index_timestep_and_pictures_in_order():
    scheduler, seen = DDIMScheduler(**COSINE), []
    sample(oracle(picture(), scheduler), scheduler, noise(2, 3, 8, 8), 5,
           callback=lambda i, t, x, x0: seen.append((i, int(t), x.shape, x0.shape)))  # fmt: skip
    assert [s[0] for s in seen] == [0, 1, 2, 3, 4]
    assert [s[1] for s in seen] == [800, 600, 400, 200, 0]
    assert {s[2:] for s in seen} == {((2, 3, 8, 8), (2, 3, 8, 8))}


def test_same_generator_same_pictures_and_the_scheduler_stays_as_it_was():
    scheduler, net, x = DDPMScheduler(**COSINE), tiny_unet(), noise(2, 3, 8, 8)
    one, two, other = (sample(denoiser(net), scheduler, x, 5, torch.Generator().manual_seed(s)) for s in (0, 0, 1))
    assert torch.equal(one, two) and not torch.equal(one, other)
    assert scheduler.num_inference_steps is None and len(scheduler.timesteps) == 1000
    assert not one.requires_grad


def test_it_is_the_pipelines_loop():
    from diffusers import DDIMPipeline

    net, scheduler = tiny_unet(), DDIMScheduler(**COSINE)
    pipe = DDIMPipeline(unet=net, scheduler=scheduler)
    pipe.set_progress_bar_config(disable=True)
    theirs = pipe(2, torch.Generator().manual_seed(0), num_inference_steps=5, output_type="np").images
    x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    ours = (sample(denoiser(net), scheduler, x, 5) / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1)
    torch.testing.assert_close(ours, torch.from_numpy(theirs))


def test_step_arguments_are_handed_on():
    net, scheduler, x = tiny_unet(), DDIMScheduler(**COSINE), noise(2, 3, 8, 8)
    plain = sample(denoiser(net), scheduler, x, 5)
    noisy = sample(denoiser(net), scheduler, x, 5, torch.Generator().manual_seed(0), eta=1.0)
    assert not torch.equal(plain, noisy)


def test_conditions_reach_the_network():
    seen = {}

    def net(x, t, class_labels):
        seen["labels"] = class_labels
        return x

    denoiser(net, class_labels=torch.tensor([3]))(picture(1), 5)
    assert seen["labels"].tolist() == [3]


@pytest.mark.parametrize("channels", [1, 4])
def test_any_number_of_channels(channels):
    net, scheduler = tiny_unet(channels), DDIMScheduler(**COSINE)
    assert sample(denoiser(net), scheduler, noise(1, channels, 8, 8), 2).shape == (1, channels, 8, 8)


def test_bad_arguments_are_named():
    net, scheduler, x = tiny_unet(), DDPMScheduler(**COSINE), noise(1, 3, 8, 8)
    for steps in (0, -1, 1001):
        with pytest.raises(ValueError, match="1 to 1000"):
            sample(denoiser(net), scheduler, x, steps)
    with pytest.raises(ValueError, match="int64"):
        sample(denoiser(net), scheduler, torch.zeros(1, 3, 8, 8, dtype=torch.int64), 5)
    with pytest.raises(ValueError, match="eta"):
        sample(denoiser(net), DDIMScheduler(**COSINE), x, 5, etta=1.0)


# --- lesson 11: its exercises

LESSON = notebooks.read(notebooks.ROOT / "nbs" / "unit1" / "11_introduction_to_diffusers.ipynb")


@pytest.fixture(scope="module")
def checkers():
    """The names that an exercise may use: the lesson's imports, its exports, and its checkers."""
    space = dict(vars(dm_course.sampling))
    code = [c.source for c in notebooks.code_cells(LESSON) if "#| default_exp" not in c.source]
    for cell in code:
        if re.match(r"(#\|.*\n)*(import|from) ", cell) or re.match(r"def check_", cell):
            exec(cell, space)
    return space


def last_value(code, space):
    """Run code; the value of its last expression."""
    tree = ast.parse(code)
    last = ast.Expression(tree.body.pop().value)
    exec(compile(tree, "solution", "exec"), space)
    return eval(compile(last, "solution", "eval"), space)


def solutions():
    return [notebooks.solution(LESSON, name) for name in notebooks.exercises(LESSON)]


def test_every_exercise_has_a_solution_and_a_checker(checkers):
    names = [name for name in checkers if name.startswith("check_")]
    assert 3 <= len(names) <= 5 and len(solutions()) == len(names)
    assert [re.findall(r"check_\w+", code)[-1] for code in solutions()] == names


@pytest.mark.parametrize("number", range(4))
def test_the_folded_solution_is_right(number, checkers, capsys):
    assert last_value(solutions()[number], dict(checkers)) is True
    assert capsys.readouterr().out == "Right.\n"


def test_the_stubs_are_told_that_they_are_not_right_yet(checkers, capsys):
    sources = [c.source for c in notebooks.code_cells(LESSON)]
    stubs = [c for c in sources if re.search(r"^check_\w+\(\w+\);$", c, re.MULTILINE)]
    assert len(stubs) == 4
    for stub in stubs:
        assert last_value(stub.rstrip(";"), dict(checkers)) is False
    assert len(capsys.readouterr().out.splitlines()) == 4


def broken(old, new):
    """The solution of exercise 4 with one mistake put back."""
    code = solutions()[3]
    assert old in code
    return code.replace(old, new)


@pytest.mark.parametrize(
    "code, hint",
    [
        ("check_jump(lambda x, s, t, e, k: k[t] ** 0.5 * x + (1 - k[t]) ** 0.5 * e)", "mean"),
        ("check_jump(lambda x, s, t, e, k: (k[t] / k[s]) ** 0.5 * x + (1 - k[t]) ** 0.5 * e)", "standard deviation"),
        ("check_weight(lambda t, kept: kept[t])", "upside down"),
        ("check_weight(lambda t, kept: 1 / (1 - kept[t]))", "belongs to ε"),
        ("check_schedule(DDPMScheduler(100))", "200 linear"),
        ("check_schedule(DDPMScheduler(200))", "too little noise"),
        ("check_schedule(DDPMScheduler(200, beta_start=0.1, beta_end=0.2))", "too fast"),
        (("num_train_timesteps,", "num_train_timesteps - 1,"), "largest timestep"),
        (("randn_like", "rand_like"), "centred"),
        (
            ("keep.sqrt() * x0 + (1 - keep).sqrt() * epsilon\n    v", "keep * x0 + (1 - keep) * epsilon\n    v"),
            "variance",
        ),
        (("(x, t) - v)", "(x, t) - epsilon)"), "oracle"),
    ],
)
def test_a_checker_says_what_is_off(code, hint, checkers, capsys):
    code = broken(*code) if isinstance(code, tuple) else code
    assert last_value(code, dict(checkers)) is False
    assert hint in capsys.readouterr().out

"""The module of lesson 12: mixing, the least UNet, weights, and what the exercises' checkers say."""

import re

import pytest
import torch
from diffusers import DDIMScheduler, UNet2DModel
from torch.nn.functional import mse_loss

from dm_course import scratch
from dm_course.sampling import alpha_bar, convert, denoiser, diffusion_loss, sample
from dm_course.scratch import (
    BasicUNet,
    TimedUNet,
    corrupt,
    implied_weight,
    min_snr_weight,
    mixing_loss,
    p2_weight,
    sample_by_mixing,
    snr,
)

KINDS = ("sample", "epsilon", "v_prediction")


def pictures(*shape, seed=0):
    """Uniform numbers, always the same."""
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


# Mixing


def test_corrupt_mixes_by_one_amount_or_by_one_each():
    x, u = pictures(3, 1, 8, 8), pictures(3, 1, 8, 8, seed=1)
    assert torch.equal(corrupt(x, 0), x) and torch.equal(corrupt(x, 1, u), u)
    assert torch.allclose(corrupt(x, 0.25, u), 0.75 * x + 0.25 * u)
    each = corrupt(x, torch.tensor([0.0, 0.5, 1.0]), u)
    assert torch.allclose(each, torch.stack([x[0], (x[1] + u[1]) / 2, u[2]]))
    assert corrupt(x.double(), 0.5).dtype == torch.float64


def test_corrupt_draws_uniform_noise_from_the_global_generator():
    x = torch.zeros(64, 1, 16, 16)
    torch.manual_seed(0)
    once = corrupt(x, 1)
    torch.manual_seed(0)
    assert torch.equal(once, corrupt(x, 1))
    assert 0 <= once.min() and once.max() < 1 and abs(once.mean() - 0.5) < 0.01 and abs(once.var() - 1 / 12) < 0.005


@pytest.mark.parametrize("amount", [-0.1, 1.1, float("nan"), torch.rand(2), torch.tensor([0.1, 0.2, 1.2])])
def test_corrupt_refuses_amounts_that_can_not_be(amount):
    with pytest.raises(ValueError, match="amount must be one number in"):
        corrupt(pictures(3, 1, 8, 8), amount)


# The networks


def test_the_numbers_of_parameters():
    assert sum(p.numel() for p in BasicUNet().parameters()) == 309_057
    assert sum(p.numel() for p in TimedUNet().parameters()) == 309_057 + 37_440
    attention = {
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    }
    options = dict(sample_size=28, in_channels=1, out_channels=1, layers_per_block=2, block_out_channels=(32, 64, 64))
    assert sum(p.numel() for p in UNet2DModel(**options, **attention).parameters()) == 1_707_009


@pytest.mark.parametrize("kind", [BasicUNet, TimedUNet])
@pytest.mark.parametrize(("channels", "height", "width"), [(1, 28, 28), (3, 16, 24), (4, 4, 4)])
def test_unets_keep_the_shape(kind, channels, height, width):
    net = kind(channels, channels, widths=(4, 6, 8))
    assert net(pictures(2, channels, height, width), 3).shape == (2, channels, height, width)


def test_unets_refuse_sizes_that_can_not_be_halved_twice():
    with pytest.raises(ValueError, match="multiples of 4, not 28 and 30"):
        BasicUNet()(pictures(1, 1, 28, 30))


def test_nothing_follows_the_last_convolution_and_no_skip_is_added_in_place():
    torch.manual_seed(0)
    net = BasicUNet()
    with torch.no_grad():
        net.up[2].bias.fill_(-5)
    out = net(pictures(2, 1, 28, 28))
    assert out.max() < -3  # an activation would not let it go below −0.278
    out.sum().backward()  # an in-place sum would raise here
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in net.parameters())


def test_a_timed_unet_starts_as_a_basic_one_and_can_learn_to_listen():
    torch.manual_seed(0)
    plain = BasicUNet()
    torch.manual_seed(0)
    timed = TimedUNet()
    x = pictures(2, 1, 8, 8)
    assert torch.equal(plain(x), timed(x, 5))
    torch.nn.init.normal_(timed.says[1][2].weight)
    assert not torch.allclose(timed(x, 5), timed(x, 900))
    one_each = timed(x, torch.tensor([5, 900]))
    assert torch.allclose(one_each[:1], timed(x, 5)[:1], atol=1e-5)
    assert torch.allclose(one_each[1:], timed(x, torch.tensor(900))[1:], atol=1e-5)


def test_a_basic_unet_learns_one_picture():
    torch.manual_seed(0)
    net, x0 = BasicUNet(widths=(8, 16, 16)), (pictures(1, 1, 8, 8) > 0.5).float().expand(8, -1, -1, -1)
    optimizer, loss_fn = torch.optim.Adam(net.parameters(), lr=3e-3), mixing_loss()
    losses = []
    for _ in range(150):
        loss = loss_fn(net, {"images": x0 * 2 - 1})
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert sum(losses[-10:]) / 10 < 0.1 * losses[0]
    made = sample_by_mixing(net, pictures(1, 1, 8, 8, seed=3), 10)
    assert mse_loss(made, x0[:1]) < 0.02


# Loss and sampler


def test_mixing_loss_brings_pictures_to_the_range_it_is_told():
    batch, seen = {"images": torch.tensor([-1.0, 0.0, 1.0, 1.0]).reshape(1, 1, 2, 2)}, []

    def model(x, t):
        seen.append((x, t))
        return torch.zeros_like(x)

    nothing = torch.zeros_like
    assert mixing_loss(nothing)(model, batch).item() == pytest.approx((0.25 + 1 + 1) / 4)
    assert mixing_loss(nothing, -1.0)(model, batch).item() == pytest.approx(3 / 4)
    assert seen[0][0].min() == 0 and seen[1][0].min() < 0 and torch.equal(seen[0][1], torch.zeros(1))


def test_mixing_loss_takes_a_model_of_diffusers():
    net = UNet2DModel(8, 1, 1, layers_per_block=1, block_out_channels=(32, 32), down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2)  # fmt: skip
    loss = mixing_loss(torch.randn_like, -1.0)(net, {"images": pictures(2, 1, 8, 8) * 2 - 1})
    loss.backward()
    assert loss.ndim == 0 and torch.isfinite(loss)


@pytest.mark.parametrize("steps", [1, 5, 40])
@pytest.mark.parametrize("renew", [None, torch.rand, torch.randn])
def test_sampling_by_mixing_arrives_with_an_oracle(steps, renew):
    x0, g = pictures(2, 1, 8, 8), torch.Generator().manual_seed(0)
    x = sample_by_mixing(lambda x, t: x0, pictures(2, 1, 8, 8, seed=1), steps, renew, generator=g)
    assert torch.allclose(x, x0, atol=1e-5)


def test_sampling_by_mixing_tells_the_amount_and_calls_back():
    told, seen, start = [], [], pictures(1, 1, 4, 4)

    def model_fn(x, t):
        told.append(t)
        return x * 0.5

    sample_by_mixing(model_fn, start, 4, callback=lambda i, t, x, x0: seen.append((i, t, x, x0)))
    assert told == [1.0, 0.75, 0.5, 0.25] == [t for _, t, _, _ in seen] and [i for i, *_ in seen] == [0, 1, 2, 3]
    assert torch.equal(seen[0][2], start) and torch.equal(seen[0][3], start * 0.5)
    assert torch.allclose(seen[1][2], start * 0.875)


def test_sampling_by_mixing_is_repeatable_and_has_no_gradient():
    net = BasicUNet(widths=(4, 4, 4))
    start = pictures(1, 1, 8, 8)
    runs = [sample_by_mixing(net, start, 3, torch.rand, torch.Generator().manual_seed(s)) for s in (1, 1, 2)]
    assert torch.equal(runs[0], runs[1]) and not torch.equal(runs[0], runs[2]) and not runs[0].requires_grad
    with pytest.raises(ValueError, match="steps must be at least 1"):
        sample_by_mixing(net, start, 0)


# Weights


@pytest.mark.parametrize("beta_schedule", ["linear", "scaled_linear", "squaredcos_cap_v2"])
@pytest.mark.parametrize("make", [min_snr_weight, p2_weight])
def test_one_wrong_answer_costs_the_same_said_as_x0_as_epsilon_or_as_v(make, beta_schedule):
    x0, wrong = (pictures(900, 1, 4, 4, seed=s).double() for s in (0, 1))
    epsilon = torch.randn(x0.shape, generator=torch.Generator().manual_seed(2)).double()
    t, costs = torch.arange(5, 905), []
    for kind in KINDS:
        scheduler = DDIMScheduler(prediction_type=kind, beta_schedule=beta_schedule)
        scheduler.alphas_cumprod = scheduler.alphas_cumprod.double()
        a = alpha_bar(scheduler, t).double()
        x = a.sqrt() * x0 + (1 - a).sqrt() * epsilon
        said, truth = (convert(p, x, a, "sample", kind) for p in (wrong, x0))
        costs.append(make(scheduler)(t) * (said - truth).square().flatten(1).mean(1))
    assert torch.allclose(costs[0], costs[1], rtol=0.02) and torch.allclose(costs[0], costs[2], rtol=0.02)


def test_weights_by_their_formulas():
    t = torch.arange(1000)
    by_kind = {kind: DDIMScheduler(prediction_type=kind) for kind in KINDS}
    ratio = snr(by_kind["sample"], t)
    bars = by_kind["sample"].alphas_cumprod
    assert (
        torch.allclose(ratio, bars / (1 - bars)) and ratio.shape == (1000,) and snr(by_kind["sample"], 7).shape == (1,)
    )
    least = ratio.clamp(max=5)
    assert torch.allclose(min_snr_weight(by_kind["sample"])(t), least)
    assert torch.allclose(min_snr_weight(by_kind["epsilon"])(t), least / ratio)
    assert torch.allclose(min_snr_weight(by_kind["v_prediction"])(t), least / (ratio + 1))
    assert torch.allclose(min_snr_weight(by_kind["epsilon"], gamma=1.0)(t), ratio.clamp(max=1) / ratio)
    assert torch.allclose(p2_weight(by_kind["epsilon"], 0.5, 2.0)(t), (2 + ratio) ** -0.5)
    assert torch.allclose(p2_weight(by_kind["epsilon"], 0.0)(t), torch.ones(1000))
    assert torch.allclose(implied_weight(by_kind["v_prediction"], t), ratio + 1)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("make", [min_snr_weight, p2_weight])
def test_weights_stay_finite_where_nothing_but_noise_is_left(make, kind):
    scheduler = DDIMScheduler(prediction_type=kind, rescale_betas_zero_snr=True)
    assert torch.isfinite(make(scheduler)(torch.arange(1000))).all()


def test_implied_weight_names_the_types_it_knows():
    with pytest.raises(ValueError, match="epsilon"):
        implied_weight(DDIMScheduler(prediction_type="noise"), 3)


def test_a_timed_unet_trains_and_samples_with_lesson_11():
    scheduler = DDIMScheduler(prediction_type="v_prediction", timestep_spacing="trailing")
    net = TimedUNet(widths=(4, 6, 8))
    loss = diffusion_loss(scheduler, min_snr_weight(scheduler))(net, {"images": pictures(4, 1, 8, 8) * 2 - 1})
    loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in net.parameters())
    assert sample(denoiser(net), scheduler, torch.randn(2, 1, 8, 8), 3).shape == (2, 1, 8, 8)


# Exercises


@pytest.mark.parametrize(
    ("check", "wrong", "said"),
    [
        ("check_parameter_count", lambda w: 309_057, r"for \(16, 32, 32\) you say 309,057, and it has 77,729"),
        ("check_parameter_count", lambda w: 1 / 0, "raises ZeroDivisionError"),
        ("check_parameter_count", lambda w: 25 * sum(a * b for a, b in ((1, w[0]), (w[0], w[1]), (w[1], w[2]), (w[2], w[1]), (w[1], w[0]), (w[0], 1))), "biases"),
        ("check_parameter_count", lambda w: "many", "a number"),
        ("check_restore", lambda f, x, m, n: sample_by_mixing(f, x, n), "at 0.6, 0.4 and 0.2"),
        ("check_restore", lambda f, x, m, n: [f(x, v) for v in (0.6, 0.4, 0.2)][0], "how much of the way"),
        ("check_restore", lambda f, x, m, n: None, "gives None"),
        ("check_truncated_snr_weight", lambda s: lambda t: snr(s, t).clamp(min=1), "epsilon: at t = "),
        ("check_truncated_snr_weight", lambda s: lambda t: 1.0, "one weight each"),
        ("check_truncated_snr_weight", lambda s: 3, "raises TypeError"),
        ("check_heun", lambda f, x, n: sample_by_mixing(f, x, n), "should take 19 looks"),
        ("check_heun", lambda f, x, n: [f(x, 0.5) for _ in range(2 * n - 1)][0], "should fall by four"),
    ],
)  # fmt: skip
def test_checkers_say_what_is_off(check, wrong, said, capsys):
    assert getattr(scratch, check)(wrong) is False
    assert re.search(said, capsys.readouterr().out)

"""The module of lesson 23: three ways to be told a class, label dropout, guidance, and the exercises."""

import re

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler, HeunDiscreteScheduler
from shared import solution_of

from dm_course import conditioning
from dm_course.conditioning import (
    ChannelUNet,
    CrossAttentionUNet,
    cfg,
    class_denoiser,
    class_loss,
    class_spread,
    class_unet,
    drop_labels,
)
from dm_course.judges import load_judge
from dm_course.sampling import alpha_bar, convert, denoiser, diffusion_loss, sample
from dm_course.training import train
from dm_course.zoo import card, load, models

KINDS = ("epsilon", "v_prediction", "sample")
SMALL = dict(size=8, widths=(16, 16), attention=4)
NETWORKS = {"channels": ChannelUNet, "embedding": class_unet, "cross-attention": CrossAttentionUNet}
each_network = pytest.mark.parametrize("make", NETWORKS.values(), ids=NETWORKS)


def noise(*shape, seed=0):
    """Normal numbers, always the same."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def small(make, **options):
    """A small network with weights that are always the same."""
    torch.manual_seed(0)
    return make(**SMALL | options).eval()


# The networks


@each_network
@pytest.mark.parametrize(("channels", "classes"), [(1, 10), (3, 2), (4, 1)])
def test_networks_keep_the_shape_and_have_one_label_more_than_classes(make, channels, classes):
    net, x = small(make, channels=channels, classes=classes), noise(2, channels, 8, 8)
    assert net.class_embedding.num_embeddings == classes + 1
    assert net(x, 3, torch.tensor([0, classes])).sample.shape == x.shape
    assert net(x, torch.tensor([3, 500]), class_labels=torch.tensor([0, classes])).sample.shape == x.shape


@each_network
def test_networks_hear_the_label_and_the_timestep_of_each_picture(make):
    net, x = small(make), noise(1, 1, 8, 8).expand(2, -1, -1, -1)
    with torch.no_grad():
        a, b = net(x, 500, torch.tensor([3, 7])).sample
        c, d = net(x, torch.tensor([5, 900]), torch.tensor([3, 3])).sample
        again = net(x[:1], 500, torch.tensor([7])).sample[0]
    assert not torch.allclose(a, b, atol=1e-4) and not torch.allclose(c, d, atol=1e-4)
    torch.testing.assert_close(again, b, atol=1e-5, rtol=1e-4)


@each_network
def test_every_weight_of_a_network_is_trained(make):
    net, g = small(make).train(), torch.Generator().manual_seed(1)
    batch = {"images": noise(22, 1, 8, 8), "labels": torch.arange(22) % 10}
    torch.nn.init.normal_(net.class_embedding.weight, generator=g)
    class_loss(DDPMScheduler(), drop=0.3)(net, batch).backward()
    lost = [k for k, p in net.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    # nothing depends on the queries and keys of one place alone, or on a bias that is the same for all keys
    assert not [k for k in lost if "to_k.bias" not in k], lost


@each_network
def test_networks_refuse_sizes_and_widths_that_do_not_fit(make):
    with pytest.raises(ValueError, match="multiple of 4"):
        make(size=30, widths=(16, 16, 16))
    with pytest.raises(ValueError, match="multiple of 16"):
        make(widths=(20, 40))


def test_channels_are_an_embedding_laid_onto_the_picture():
    net, x, y = small(ChannelUNet, told=3), noise(2, 1, 8, 8), torch.tensor([4, 10])
    planes = net.class_embedding(y)[:, :, None, None].expand(-1, -1, 8, 8)
    assert net.unet.config.in_channels == 4 and net.unet.config.out_channels == 1
    assert torch.equal(net(x, 7, y).sample, net.unet(torch.cat([x, planes], 1), 7).sample)


def test_with_one_token_every_place_is_told_the_same():
    """The cross-attention's answer to one token does not depend on the picture: it is an added vector."""
    net, answers = small(CrossAttentionUNet, tokens=1), []
    crosses = [m for name, m in net.unet.named_modules() if name.endswith("attn2")]
    for module in crosses:
        module.register_forward_hook(lambda module, given, answer: answers.append(answer))
    with torch.no_grad():
        net(noise(1, 1, 8, 8), 5, torch.tensor([3]))
    assert crosses and len(answers) == len(crosses)
    assert all((a - a[:, :1]).abs().max() < 1e-5 for a in answers)


def test_the_default_is_the_network_of_digits_28():
    net = class_unet()
    assert sum(p.numel() for p in net.parameters()) < 3_000_000 and net.config.num_class_embeds == 11
    if "digits-28" in models():
        mine, theirs = net.config, load("digits-28").unet.config
        for name in ("block_out_channels", "down_block_types", "up_block_types", "layers_per_block"):
            assert tuple_of(mine[name]) == tuple_of(theirs[name]), name


def tuple_of(value):
    """Lists as tuples, as JSON forgets the difference."""
    return tuple(value) if isinstance(value, (list, tuple)) else value


# Label dropout and the loss


def test_labels_are_dropped_as_often_as_asked_and_repeatably():
    labels = torch.arange(20_000) % 10
    for share in (0.0, 0.1, 0.5, 1.0):
        torch.manual_seed(0)
        found = drop_labels(labels, 10, share)
        assert abs((found == 10).double().mean() - share) < 0.01 and found.dtype == torch.int64
        assert torch.equal(found[found < 10], labels[found < 10])
        torch.manual_seed(0)
        assert torch.equal(found, drop_labels(labels, 10, share))


@pytest.mark.parametrize("share", [-0.1, 1.1, float("nan")])
def test_a_share_that_can_not_be_is_refused(share):
    with pytest.raises(ValueError, match="share of labels"):
        drop_labels(torch.zeros(3, dtype=torch.int64), 10, share)


@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_is_that_of_lesson_11_with_the_label_handed_on(kind):
    scheduler, heard = DDPMScheduler(prediction_type=kind), []
    batch = {"images": noise(6, 1, 8, 8).clamp(-1, 1), "labels": torch.arange(6)}

    def net(x, t, class_labels):
        heard.append(class_labels)
        return x * (1 + class_labels.reshape(-1, 1, 1, 1))

    torch.manual_seed(0)
    loss = class_loss(scheduler, classes=6, drop=0.5, weight=lambda t: t / 1000)(net, batch)
    torch.manual_seed(0)
    told = drop_labels(batch["labels"], 6, 0.5)
    want = diffusion_loss(scheduler, lambda t: t / 1000)(denoiser(net, class_labels=told), batch)
    assert torch.equal(loss, want) and torch.equal(heard[0], told) and loss.dtype == torch.float32
    assert 0 < (told == 6).sum() < 6


def test_the_loss_says_when_there_are_no_labels():
    with pytest.raises(ValueError, match="no labels, only images"):
        class_loss(DDPMScheduler())(small(class_unet), {"images": noise(2, 1, 8, 8)})


class BlackOrWhite:
    """Batches of a toy set: class 0 is black, class 1 is white."""

    def batch(self, step, rank=0, world=1):
        """Half of each."""
        labels = torch.arange(16) % 2
        return {"images": (labels * 2.0 - 1).reshape(-1, 1, 1, 1).expand(-1, 1, 8, 8), "labels": labels}


@each_network
def test_each_network_learns_to_draw_what_it_is_told(make):
    scheduler = DDPMScheduler(beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction")
    net = small(make, classes=2)
    run = train(net, class_loss(scheduler, classes=2), BlackOrWhite(), steps=60, lr=3e-3, progress=False)
    ddim = DDIMScheduler.from_config(scheduler.config, timestep_spacing="trailing")
    labels, x = torch.tensor([0, 1, 0, 1]), noise(4, 1, 8, 8)
    drawn = sample(class_denoiser(run.model, labels), ddim, x, 5).mean((1, 2, 3))
    assert drawn[0] < -0.5 < 0.5 < drawn[1] and drawn[2] < -0.5 < 0.5 < drawn[3], drawn


# Guidance


def test_cfg_is_a_straight_line_through_both_answers():
    x, calls = noise(2, 1, 4, 4), []

    def told(x, t):
        calls.append("told")
        return 3 * x

    def free(x, t):
        calls.append("free")
        return x

    for scale, factor in ((0, 1), (1, 3), (2, 5), (0.5, 2), (-1, -1)):
        calls.clear()
        torch.testing.assert_close(cfg(told, free, scale)(x, 5), factor * x)
        assert len(calls) == (1 if scale in (0, 1) else 2)
    assert cfg(told, free, 1.0) is told and cfg(told, free, 0.0) is free


def test_cfg_takes_the_difference_in_the_precision_of_x():
    told, free = (lambda x, t, v=v: torch.full_like(x, v).bfloat16() for v in (1.0, 1.0078125))
    answer = cfg(told, free, 7.5)(torch.zeros(1, 1, 2, 2), 0)
    assert answer.dtype == torch.float32
    torch.testing.assert_close(answer, torch.full((1, 1, 2, 2), 1.0078125 - 7.5 * 0.0078125))


@pytest.mark.parametrize("beta_schedule", ["linear", "squaredcos_cap_v2"])
def test_guidance_is_the_same_on_epsilon_on_v_and_on_x0(beta_schedule):
    x, told, free = noise(6, 1, 4, 4).double(), noise(6, 1, 4, 4, seed=1).double(), noise(6, 1, 4, 4, seed=2).double()
    t = torch.tensor([10, 200, 400, 600, 800, 950])
    a = alpha_bar(DDIMScheduler(beta_schedule=beta_schedule), t)
    answers = []
    for kind in KINDS:
        both = [lambda x, t, p=p: convert(p, x, a, "v_prediction", kind).double() for p in (told, free)]  # noqa: B023
        answers.append(convert(cfg(*both, 4.0)(x, t), x, a, kind, "v_prediction"))
    torch.testing.assert_close(answers[0], answers[1], atol=2e-3, rtol=1e-4)
    torch.testing.assert_close(answers[2], answers[1], atol=2e-3, rtol=1e-4)


@each_network
def test_a_class_denoiser_is_told_and_not_told(make):
    net, x, labels = small(make), noise(3, 1, 8, 8), torch.tensor([0, 5, 9])
    with torch.no_grad():
        told, free = net(x, 400, labels).sample, net(x, 400, torch.full((3,), 10)).sample
        for scale in (0.0, 1.0, 3.0):
            found = class_denoiser(net, labels, scale)(x, torch.tensor(400))
            torch.testing.assert_close(found, free + scale * (told - free))
        assert torch.equal(class_denoiser(net, torch.full((3,), 10), 3.0)(x, 400), free)  # "not told" can't be guided


@pytest.mark.parametrize("labels", [[0, 11], [-1, 3]])
def test_labels_that_a_network_has_not_got_are_refused(labels):
    with pytest.raises(ValueError, match="from 0 to 9, and 10 says nothing"):
        class_denoiser(small(class_unet), torch.tensor(labels))


@pytest.mark.parametrize("kind", [DDIMScheduler, DPMSolverMultistepScheduler, HeunDiscreteScheduler])
def test_any_sampler_takes_a_guided_denoiser(kind):
    scheduler = kind(beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction", timestep_spacing="trailing")
    net, x = small(class_unet), noise(2, 1, 8, 8)
    drawn = sample(class_denoiser(net, torch.tensor([1, 2]), 2.0), scheduler, x, 3)
    assert drawn.shape == x.shape and drawn.isfinite().all() and not drawn.requires_grad


def test_guidance_of_two_known_classes_narrows_and_overshoots():
    """The one-number example of the lesson, with the perfect denoiser."""
    scheduler = DDIMScheduler(
        beta_schedule="squaredcos_cap_v2", prediction_type="epsilon", clip_sample=False, timestep_spacing="trailing"
    )

    def parts(x, t):
        a = alpha_bar(scheduler, t)
        variance = a * 0.36 + 1 - a
        off = torch.stack([x - a.sqrt() * m for m in (-1.0, 1.0)])
        return (1 - a).sqrt() * off / variance, (-(off**2) / (2 * variance)).softmax(0)

    def right(x, t):
        return parts(x, t)[0][1]

    def either(x, t):
        epsilons, shares = parts(x, t)
        return (shares * epsilons).sum(0)

    means, spreads = [], []
    for scale in (0, 1, 2, 4):
        x = sample(cfg(right, either, scale), scheduler, noise(5_000, 1, 1, 1), 50)
        means.append(x.mean().item()), spreads.append(x.std().item())
    assert abs(means[0]) < 0.1 and abs(means[1] - 1) < 0.05 and abs(spreads[1] - 0.6) < 0.03
    assert means[1] < means[2] < means[3] and spreads[1] > spreads[2] > spreads[3] and means[2] > 1.2


# Diversity


def test_spread_is_the_root_of_the_variance_within_classes():
    centres, labels = torch.tensor([[0.0, 0.0], [100.0, 0.0]]), torch.arange(20_000) % 2
    points = centres[labels] + noise(20_000, 2) * torch.tensor([3.0, 4.0])
    assert class_spread(points, labels) == pytest.approx(5, rel=0.02)
    assert class_spread(points, torch.zeros_like(labels)) > 45  # one class of all: the centres count too
    assert class_spread(points[:100], labels[:100]) == pytest.approx(class_spread(points[:100] + 7, labels[:100]))


def test_spread_leaves_out_classes_of_one_and_says_when_none_is_left():
    points = torch.tensor([[0.0], [2.0], [50.0]])
    assert class_spread(points, torch.tensor([4, 4, 7])) == pytest.approx(2**0.5)
    with pytest.raises(ValueError, match="no class has two pictures; there are 3 pictures in 3 classes"):
        class_spread(points, torch.tensor([1, 2, 3]))
    with pytest.raises(ValueError, match="no class"):
        class_spread(points[:0], torch.zeros(0, dtype=torch.int64))


# The bundled model


@pytest.mark.skipif("digits-28" not in models(), reason="digits-28 is not bundled")
def test_digits_28_draws_what_it_is_asked_for():
    pipeline, judge, facts = load("digits-28"), load_judge("judge-digits"), card("digits-28")["measured"]
    assert facts["read_as_asked"] >= 0.98 and facts["n"] >= 1000
    ddim = DDIMScheduler.from_config(pipeline.scheduler.config, timestep_spacing="trailing")
    labels, x = (torch.arange(50) % 10).to(pipeline.device), noise(50, 1, 28, 28).to(pipeline.device)
    seen = [
        judge(sample(class_denoiser(pipeline.unet, labels, s), ddim, x, 10))["digit"]
        for s in (facts["guidance_scale"], 0.0)
    ]
    assert (seen[0] == labels.cpu()).sum() >= 46 and (seen[1] == labels.cpu()).sum() <= 20


# Exercises


@pytest.mark.parametrize(
    ("name", "changes", "said"),
    [
        ("guided_in_one", [(".chunk(2)", "[:3].chunk(2)")], "your function raises|should be shaped"),
        ("guided_in_one", [("t.repeat(2) if torch.is_tensor(t) and t.ndim else t", "t")], "6 pictures, 3 timesteps"),
        ("guided_in_one", [("t.repeat(2)", "t.repeat_interleave(2)")], "in the pictures' order"),
        ("guided_in_one", [("free, told =", "told, free =")], "which half was told"),
        ("cfg_between", [("low <= t < high", "low < t < high")], "it should be guided at t = 200"),
        ("cfg_between", [("low <= t < high", "low <= t <= high")], "told, unguided, at t = 800"),
        ("cfg_between", [("else model_fn(x, t)", "else unconditional_fn(x, t)")], "told, unguided, at t = 100"),
        ("cfg_between", [("    def between", "    unconditional_fn(0, 0)\n\n    def between")], "took 2 calls"),
        ("compose", [("(told(x, t) - free)", "told(x, t)")], "a wish is a difference"),
        ("compose", [("- free)", "- unconditional_fn(x, t))")], "asked for 2 times"),
        ("compose", [("free + sum", "sum")], "the answer is another"),
        ("read", [("x_t = a.sqrt() * x0 + (1 - a).sqrt() * epsilon", "x_t = x0")], "should be shown x_t"),
        ("read", [("truth = convert(", "truth = epsilon; convert(")], "with a model that predicts v_prediction"),
        ("read", [("argmin(0)", "argmax(0)")], "with a model that predicts epsilon"),
        ("read", [("argmin(0)", "argmin(1)")], r"should be shaped \(6,\)"),
    ],
)
def test_checkers_say_what_is_off(name, changes, said, capsys):
    answer = solution_of(conditioning, "23_class_conditioning", name, *changes)
    assert getattr(conditioning, f"check_{name}")(answer) is False
    assert re.search(said, capsys.readouterr().out)

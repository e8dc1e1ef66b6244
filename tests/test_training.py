"The training loop: resume, accumulation, averages, bad tensors, several processes."

import json
import os
import subprocess
import sys

import pytest
import torch
from torch import nn

from dm_course import training
from dm_course.training import (
    TrainingOptions,
    check_options,
    first_bad_tensor,
    learning_rate,
    new_optimizer,
    pick_precision,
    predict_memory,
    step_seed,
    train,
)


class Points:
    "Batches that depend on their number alone."

    def __init__(self, rows=8):
        self.rows = rows

    def batch(self, number, rank=0, world=1):
        g = torch.Generator().manual_seed(number * world + rank)
        return {"images": torch.randn(self.rows, 3, 8, 8, generator=g)}


def small_net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.SiLU(), nn.Dropout(0.1), nn.Conv2d(8, 3, 3, padding=1))


def noisy_loss(model, batch):
    noise = torch.randn_like(batch["images"])
    return (model(batch["images"] + noise) - noise).square().mean()


def plain_loss(model, batch):
    return (model(batch["images"]) - batch["images"]).square().mean()


def weights(run):
    return torch.cat([p.detach().flatten() for p in run.model.parameters()])


QUIET = dict(progress=False, lr=3e-3)


@pytest.mark.parametrize(
    "options",
    [
        dict(),
        dict(ema=0.9, accumulate=2),
        dict(precision="bf16", schedule="linear"),
        dict(optimizer="muon", ema=0.9, precision="bf16"),
    ],
)
def test_stopped_run_goes_on_bit_for_bit(tmp_path, options):
    whole = train(small_net(), noisy_loss, Points(), steps=12, **options, **QUIET)

    class PowerCut(Points):
        def batch(self, number, rank=0, world=1):
            if number == 7 * options.get("accumulate", 1):
                raise KeyboardInterrupt
            return super().batch(number, rank, world)

    with pytest.raises(KeyboardInterrupt):
        train(small_net(), noisy_loss, PowerCut(), steps=12, out=tmp_path, save_every=5, **options, **QUIET)
    resumed = train(small_net(), noisy_loss, Points(), steps=12, out=tmp_path, save_every=5, **options, **QUIET)
    assert resumed.losses == whole.losses
    assert torch.equal(weights(resumed), weights(whole))


def test_finished_run_is_not_trained_again(tmp_path):
    first = train(small_net(), noisy_loss, Points(), steps=3, out=tmp_path, **QUIET)
    again = train(small_net(), noisy_loss, Points(), steps=3, out=tmp_path, **QUIET)
    assert again.step == 3 and torch.equal(weights(first), weights(again))


def test_checkpoint_of_another_run_is_refused(tmp_path):
    train(small_net(), noisy_loss, Points(), steps=3, out=tmp_path, **QUIET)
    with pytest.raises(ValueError, match="steps=3 .now 4"):
        train(small_net(), noisy_loss, Points(), steps=4, out=tmp_path, **QUIET)
    with pytest.raises(ValueError, match="another model"):
        train(nn.Conv2d(3, 3, 1), noisy_loss, Points(), steps=3, out=tmp_path, **QUIET)
    assert train(small_net(), noisy_loss, Points(), steps=4, out=tmp_path, resume=False, **QUIET).step == 4


def test_damaged_checkpoint_is_named(tmp_path):
    train(small_net(), noisy_loss, Points(), steps=2, out=tmp_path, **QUIET)
    file = tmp_path / "checkpoint.pt"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(ValueError, match="checkpoint.pt can't be read"):
        train(small_net(), noisy_loss, Points(), steps=2, out=tmp_path, **QUIET)


def test_accumulation_is_one_large_batch():
    class Halves(Points):
        def batch(self, number, rank=0, world=1):
            whole = super().batch(number // 2)["images"]
            return {"images": whole[number % 2 * 4 : number % 2 * 4 + 4]}

    net = lambda: nn.Sequential(*[m for m in small_net() if not isinstance(m, nn.Dropout)])  # noqa: E731
    options = dict(steps=6, precision="fp32", channels_last=False, **QUIET)
    large = train(net(), plain_loss, Points(), **options)
    small = train(net(), plain_loss, Halves(), accumulate=2, **options)
    assert len(small.losses) == 6
    assert torch.allclose(weights(large), weights(small), atol=1e-6)
    assert large.losses == pytest.approx(small.losses, rel=1e-5)


def test_pieces_of_cut_batches_never_share_their_noise(monkeypatch):
    seeds = []
    monkeypatch.setattr(training, "step_seed", lambda *a: seeds.append(a) or 0)
    loop = training._prepare(small_net(), check_options(steps=1, accumulate=2))
    loop.splits = 64
    assert len(list(training._pieces(loop, Points(64)))) == 128 == len(set(seeds))


@pytest.mark.parametrize("written", ["Muon", "MUON"])
def test_names_count_however_they_are_written(written):
    options = check_options(steps=1, optimizer=written, precision="FP32", schedule="Cosine")
    assert (options.optimizer, options.precision, options.schedule) == ("muon", "fp32", "cosine")
    assert pick_precision(torch.device("cpu"), "BF16") == "bf16"


@pytest.mark.parametrize(
    ("device", "native", "found"),
    [
        ("cpu", True, "bf16"),
        ("cpu", False, "fp32"),
        ("mps", False, "fp32"),
        ("cuda", False, "fp16"),
        ("cuda", True, "bf16"),
    ],
)
def test_auto_takes_bf16_only_where_it_is_native(device, native, found, monkeypatch):
    monkeypatch.setattr(training, "pick_dtype", lambda d: torch.bfloat16 if native else torch.float32)
    assert pick_precision(torch.device(device)) == found


@pytest.mark.gpu
def test_training_stays_on_the_device_of_the_settings(monkeypatch):
    monkeypatch.setenv("DM_COURSE_DEVICE", "cpu")
    run = train(small_net(), plain_loss, Points(), steps=1, **QUIET)
    assert next(run.model.parameters()).device.type == "cpu"


def test_a_bad_tensor_is_sought_in_the_run_that_failed():
    """A layer that overflows in half of its draws: the message names it, with the noise that made it fail."""

    class Moody(nn.Module):
        def forward(self, x):
            return x * (torch.inf if torch.rand(()) < 0.5 else 1.0)

    net = nn.Sequential(nn.Conv2d(3, 3, 1), Moody())
    for seed in range(8):
        with pytest.raises(ValueError, match="output of 1 is not finite"):
            train(net, plain_loss, Points(), steps=40, seed=seed, precision="fp32", **QUIET)


def test_batch_that_does_not_fit_is_cut_with_the_same_gradient(capsys):
    def hungry(model, batch):
        if len(batch["images"]) > 3:
            raise torch.OutOfMemoryError("no room")
        return plain_loss(model, batch)

    net = lambda: nn.Sequential(*[m for m in small_net() if not isinstance(m, nn.Dropout)])  # noqa: E731
    whole = train(net(), plain_loss, Points(7), steps=3, precision="fp32", **QUIET)
    cut = train(net(), hungry, Points(7), steps=3, precision="fp32", **QUIET)
    assert "cut into 4 pieces" in capsys.readouterr().out
    assert torch.allclose(weights(whole), weights(cut), atol=1e-6)


def test_rate_is_counted_in_optimiser_steps():
    run = train(small_net(), noisy_loss, Points(), steps=20, accumulate=3, warmup=2, schedule="cosine", **QUIET)
    options = check_options(steps=20, warmup=2, lr=3e-3)
    assert run.learning_rates == [learning_rate(i, options) for i in range(20)]
    assert run.learning_rates[1] == 3e-3 and run.learning_rates[-1] < 1e-4


def test_average_is_the_exponential_one():
    recorded = []

    class Recorder(Points):
        def batch(self, number, rank=0, world=1):
            recorded.append(weights(type("R", (), dict(model=net))))
            return super().batch(number, rank, world)

    net = small_net()
    run = train(net, noisy_loss, Recorder(), steps=4, ema=0.5, **QUIET)
    plain = train(small_net(), noisy_loss, Points(), steps=4, **QUIET)
    average = recorded[0]
    for step, now in enumerate([*recorded[1:], weights(plain)], start=1):
        decay = min(0.5, (1 + step - 1) / (10 + step - 1)) if step > 1 else 0.0
        average = decay * average + (1 - decay) * now
    assert torch.allclose(weights(run), average, atol=1e-5)


def test_samples_leave_the_run_alone(tmp_path):
    seen = []

    def sample_fn(model):
        seen.append(model.training)
        return torch.randn(2, 3, 8, 8)

    plain = train(small_net(), noisy_loss, Points(), steps=6, ema=0.9, **QUIET)
    sampled = train(
        small_net(), noisy_loss, Points(), sample_fn, steps=6, ema=0.9, sample_every=2, out=tmp_path, **QUIET
    )
    assert seen == [False] * 3
    assert sampled.losses == plain.losses
    assert sorted(p.name for p in (tmp_path / "samples").iterdir()) == ["0000002.png", "0000004.png", "0000006.png"]


def test_half_precision_weights_become_float32():
    run = train(small_net().half(), noisy_loss, Points(), steps=2, **QUIET)
    assert all(p.dtype == torch.float32 for p in run.model.parameters())


@pytest.mark.parametrize("where", ["batch", "weight", "output", "gradient"])
def test_first_bad_tensor_is_named_with_its_step(where):
    class Bad(Points):
        def batch(self, number, rank=0, world=1):
            batch = super().batch(number, rank, world)
            if where == "batch" and number == 2:
                batch["images"][0, 0, 0, 0] = float("nan")
            return batch

    class Root(nn.Module):
        def forward(self, x):
            return (x - x).sqrt() if where == "gradient" else x / 0 if where == "output" else x

    net = small_net()
    if where == "weight":
        net[3].bias.data[0] = float("inf")
    if where in ("output", "gradient"):
        net.insert(1, Root())
    expected = dict(batch=r"step 2: batch\['images'\]", weight="step 0: weight 3.bias", output="step 0: output of 1")
    with pytest.raises(ValueError, match=expected.get(where, "step 0: gradient of 0.weight") + " is not finite"):
        train(net, plain_loss, Bad(), steps=4, precision="fp32", grad_clip=0, **QUIET)


def test_bad_loss_alone_is_named():
    assert first_bad_tensor(small_net(), lambda m, b: m(b["images"]).mean() / 0 * 0, Points().batch(0)) == "loss"


def test_global_randomness_is_given_back():
    net = small_net()
    torch.manual_seed(5)
    expected = torch.randn(3)
    torch.manual_seed(5)
    train(net, noisy_loss, Points(), steps=2, **QUIET)
    assert torch.equal(torch.randn(3), expected)


def test_wrong_options_are_explained():
    with pytest.raises(ValueError, match="learning_rates?.*lr"):
        check_options(steps=1, learning_rate=1)
    with pytest.raises(ValueError, match="needs steps"):
        check_options()
    for bad in (dict(steps=0), dict(steps=2.5), dict(steps=1, lr=0), dict(steps=1, ema=1), dict(steps=1, accumulate=0)):
        with pytest.raises(ValueError, match=list(bad)[-1]):
            check_options(**bad)
    with pytest.raises(ValueError, match="tensorboard"):
        check_options(steps=1, tracker="tensorbord")
    with pytest.raises(ValueError, match="muon"):
        check_options(steps=1, optimizer="moon")
    frozen = small_net().requires_grad_(False)
    with pytest.raises(ValueError, match="no trainable parameter"):
        train(frozen, noisy_loss, Points(), steps=1, **QUIET)


def test_muon_steps_are_as_the_paper_says():
    """One step without momentum: the singular values of the update are all near one another, its size is lr-like."""
    torch.manual_seed(0)
    weight = nn.Parameter(torch.zeros(16, 4, 3, 3))
    bias = nn.Parameter(torch.zeros(16))
    weight.grad, bias.grad = torch.randn(16, 4, 3, 3), torch.randn(16)
    weight.grad *= torch.logspace(0, -1, 16)[:, None, None, None]
    new_optimizer([weight, bias], check_options(steps=1, optimizer="muon", lr=1e-2)).step()
    values = torch.linalg.svdvals(weight.detach().flatten(1))
    assert values[0] < 3 * values[-1]
    assert 0.1 * 1e-2 < weight.detach().square().mean().sqrt() < 1e-2  # as large as a step of AdamW, or a fifth of it
    assert torch.allclose(
        bias.detach().abs(), torch.full((16,), 3e-3), rtol=1e-2
    )  # the first step of AdamW is its rate


def test_seeds_differ_between_steps_ranks_and_pieces():
    seeds = {step_seed(s, i, r, m) for s in range(2) for i in range(100) for r in range(4) for m in range(100)}
    assert len(seeds) == 2 * 100 * 4 * 100 and all(0 <= s < 2**63 for s in seeds)
    assert len({s % 2**32 for s in seeds}) == len(seeds)  # on the CPU, PyTorch's generator reads 32 bits
    noise = [torch.randn(4, generator=torch.Generator().manual_seed(step_seed(0, 7, rank))) for rank in range(4)]
    assert len({tuple(x.tolist()) for x in noise}) == 4


def test_memory_grows_with_the_batch():
    few, many = (predict_memory(small_net(), plain_loss, Points(n).batch(0)) for n in (8, 800))
    assert many > 10 * few
    assert TrainingOptions(steps=1).out is None


def test_tracker_writes_events(tmp_path):
    pytest.importorskip("tensorboard")
    picture = lambda model: torch.zeros(1, 3, 8, 8)  # noqa: E731
    train(small_net(), noisy_loss, Points(), picture, steps=2, sample_every=1, tracker="tensorboard", out=tmp_path,
          **QUIET)  # fmt: skip
    assert list(tmp_path.rglob("events.out.tfevents*"))


TWO = """
import json, sys, torch
from dm_course.training import train
sys.path.insert(0, {tests!r})
from test_training import Points, plain_loss, small_net
from torch import nn
net = nn.Sequential(*[m for m in small_net() if not isinstance(m, nn.Dropout)])
run = train(net, plain_loss, Points(4), steps=4, accumulate=2, ema=0.9, precision="fp32", progress=False, lr=3e-3)
rank = int(__import__("os").environ["RANK"])
flat = torch.cat([p.detach().flatten() for p in run.model.parameters()])
facts = dict(rank=rank, weights=flat.tolist(), rates=run.learning_rates, losses=run.losses)
open({out!r} + str(rank) + ".json", "w").write(json.dumps(facts))
"""


def test_two_processes_are_one_large_batch(tmp_path):
    script = tmp_path / "two.py"
    script.write_text(TWO.format(tests=os.path.dirname(__file__), out=str(tmp_path / "rank")))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(script)]
    env = os.environ | dict(OMP_NUM_THREADS="1", ACCELERATE_USE_CPU="true", PYTHONPATH=os.pathsep.join(sys.path))
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=240)
    assert done.returncode == 0, done.stderr[-2000:]
    found = [json.loads((tmp_path / f"rank{r}.json").read_text()) for r in (0, 1)]
    assert found[0]["weights"] == found[1]["weights"]  # averages too are the same on both

    class Both(Points):
        "What the two processes see together."

        def batch(self, number, rank=0, world=1):
            return {"images": torch.cat([Points(4).batch(number, r, 2)["images"] for r in (0, 1)])}

    net = nn.Sequential(*[m for m in small_net() if not isinstance(m, nn.Dropout)])
    one = train(net, plain_loss, Both(), steps=4, accumulate=2, ema=0.9, precision="fp32", **QUIET)
    assert torch.allclose(torch.tensor(found[0]["weights"]), weights(one), atol=1e-5)
    assert found[0]["rates"] == one.learning_rates
    assert found[0]["losses"] == found[1]["losses"] == pytest.approx(one.losses, rel=1e-4)

"""The module of lesson 21, `open_pipeline`, and the command `dm-course finetune`."""

import os
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMPipeline, DDPMScheduler, FlowMatchEulerDiscreteScheduler, UNet2DModel
from PIL import Image
from torch import nn

from dm_course import cli, finetuning, zoo
from dm_course.finetuning import (
    FineTuned,
    at_size,
    blend,
    check_start,
    even_loss,
    finetune,
    from_noise,
    save_finetuned,
    steps_in,
)
from dm_course.recipes import new_unet
from dm_course.sampling import denoiser, oracle, sample
from dm_course.training import TrainingRun
from dm_course.zoo import card, open_pipeline

KINDS = ("epsilon", "v_prediction", "sample")
QUIET = dict(progress=False, precision="fp32", lr=1e-3)


def tiny(size=16, channels=3, kind="v_prediction", seed=0, **config):
    """An untrained pipeline of 16-pixel pictures."""
    scheduler = DDPMScheduler(beta_schedule="squaredcos_cap_v2", prediction_type=kind)
    unet = new_unet(size, channels, widths=(16, 16), attention=0, seed=seed)
    unet.register_to_config(**config)
    return DDPMPipeline(unet.eval(), scheduler)


class Pictures:
    """Five batches an epoch, each a function of its number."""

    def __init__(self, size=16, channels=3, rows=4, sees=None):
        self.shape, self.sees = (rows, channels, size, size), sees if sees is not None else []

    def __len__(self):
        return 5

    def batch(self, number, rank=0, world=1):
        self.sees.append(number)
        g = torch.Generator().manual_seed(number * world + rank)
        return {"images": torch.rand(self.shape, generator=g) * 0.5 + 0.5}


def noise(n=2, size=16, channels=3):
    """The same noise each time."""
    return torch.randn(n, channels, size, size, generator=torch.Generator().manual_seed(1))


def weights(pipeline):
    """All weights as one vector."""
    return torch.cat([p.detach().flatten() for p in pipeline.unet.parameters()])


# The run


@pytest.mark.parametrize("kind", KINDS)
def test_a_copy_learns_and_the_start_stays(kind):
    start = tiny(kind=kind)
    before = weights(start).clone()
    tuned = finetune(start, Pictures(), steps=12, **QUIET | {"lr": 3e-3})
    assert (
        isinstance(tuned, FineTuned) and isinstance(tuned.run, TrainingRun) and isinstance(tuned.pipeline, DDPMPipeline)
    )
    assert torch.equal(weights(start), before) and not torch.equal(weights(tuned.pipeline), before)
    assert tuned.run.step == len(tuned.run.losses) == 12 and tuned.samples == {}
    assert tuned.pipeline.scheduler.config.prediction_type == kind and tuned.pipeline.scheduler is not start.scheduler
    images = Pictures().batch(99)["images"]
    losses = [even_loss(denoiser(p.unet), start.scheduler, images) for p in (start, tuned.pipeline)]
    assert losses[1] < losses[0]


def test_the_model_is_in_training_mode_while_it_learns_and_not_after():
    start, modes = tiny(), []
    start.unet.conv_out = nn.Sequential(start.unet.conv_out, nn.Dropout(0.1))
    start.unet.conv_out[1].register_forward_hook(lambda module, args, out: modes.append(module.training))
    tuned = finetune(start.to(torch.float32), Pictures(), steps=3, **QUIET)
    assert modes == [True] * 3 and not tuned.pipeline.unet.training and not start.unet.training


def test_half_precision_models_learn_in_full():
    start = tiny()
    start.unet.half()
    tuned = finetune(start, Pictures(), steps=2, noise=noise(), sample_steps=2, **QUIET)
    assert next(tuned.pipeline.unet.parameters()).dtype == torch.float32
    assert next(start.unet.parameters()).dtype == torch.float16


def test_the_same_noise_before_during_and_after(tmp_path):
    start = tiny()
    options = dict(steps=7, sample_every=3, out=tmp_path, ema=0.9, save_every=2, **QUIET)
    tuned = finetune(start, Pictures(), noise=noise(), sample_steps=3, **options)
    assert list(tuned.samples) == [0, 3, 6, 7]
    assert sorted(p.name for p in (tmp_path / "samples").iterdir()) == [f"{s:07d}.png" for s in tuned.samples]
    draw = from_noise(start.scheduler, noise(), 3)
    assert torch.equal(tuned.samples[0], draw(start.unet))
    assert torch.allclose(tuned.samples[7], draw(tuned.pipeline.unet), atol=1e-4)
    assert not torch.equal(tuned.samples[0], tuned.samples[7])
    assert all(x.shape == (2, 3, 16, 16) and x.abs().max() <= 1 for x in tuned.samples.values())
    plain = finetune(start, Pictures(), **options | {"out": None})
    assert plain.run.losses == tuned.run.losses  # looking changes nothing


def test_a_run_that_was_cut_off_goes_on_and_numbers_its_pictures_rightly(tmp_path):
    class PowerCut(Pictures):
        def batch(self, number, rank=0, world=1):
            if number == 5:
                raise KeyboardInterrupt
            return super().batch(number, rank, world)

    options = dict(noise=noise(), sample_steps=2, steps=8, sample_every=2, save_every=4, out=tmp_path, **QUIET)
    with pytest.raises(KeyboardInterrupt):
        finetune(tiny(), PowerCut(), **options)
    resumed = finetune(tiny(), Pictures(), **options)
    whole = finetune(tiny(), Pictures(), **options | {"out": None})
    assert list(resumed.samples) == [0, 6, 8] and list(whole.samples) == [0, 2, 4, 6, 8]
    assert resumed.run.losses == whole.run.losses
    assert all(torch.equal(x, whole.samples[step]) for step, x in resumed.samples.items())
    finished = finetune(tiny(), Pictures(), **options)  # nothing is left to do
    assert list(finished.samples) == [0, 8] and torch.equal(finished.samples[8], whole.samples[8])


def test_epochs_become_optimiser_steps():
    data = Pictures()
    assert steps_in(2, data) == 10 and steps_in(0.5, data) == 3 and steps_in(1, data, accumulate=8) == 1
    assert steps_in(3, data, accumulate=2) == 8 and steps_in(4, data, accumulate=2, world=2) == 5
    assert finetune(tiny(), data, epochs=1, **QUIET).run.step == 5
    seen = []
    assert finetune(tiny(), Pictures(sees=seen), epochs=1, accumulate=2, **QUIET).run.step == 3
    assert seen == [0, 0, 1, 2, 3, 4, 5]  # one look beforehand, then whole steps of two, into the next epoch
    with pytest.raises(ValueError, match="must be positive"):
        steps_in(0, data)


@pytest.mark.parametrize("options", [{}, dict(steps=3, epochs=1)])
def test_steps_or_epochs(options):
    with pytest.raises(ValueError, match="steps=… or epochs=…"):
        finetune(tiny(), Pictures(), **options)


def test_unknown_options_are_named():
    with pytest.raises(ValueError, match="learning_rate"):
        finetune(tiny(), Pictures(), steps=1, learning_rate=1)


# What does not fit


@pytest.mark.parametrize(
    ("pipeline", "data", "words"),
    [
        (tiny, Pictures(channels=1), r"takes 3 channels, and the pictures have 1.*channels=3"),
        (tiny, Pictures(size=32), r"draws 16 × 16 pixels, and the pictures have 32 × 32.*size=16.*at_size\(pipeline, 32\)"),
        (lambda: tiny(num_class_embeds=10), Pictures(), "lesson 23"),
        (lambda: tiny(out_channels=6), Pictures(), "answers 6 channels to 3"),
        (lambda: tiny(kind="noise"), Pictures(), "epsilon"),
        (lambda: DDPMPipeline(tiny().unet, FlowMatchEulerDiscreteScheduler()), Pictures(), "prediction type"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused_before_the_first_step(pipeline, data, words):
    start = pipeline()
    before = weights(start).clone()
    with pytest.raises(ValueError, match=words):
        finetune(start, data, steps=1)
    assert torch.equal(weights(start), before)


@pytest.mark.parametrize("channels", [1, 4])
def test_other_numbers_of_channels(channels):
    tuned = finetune(tiny(channels=channels), Pictures(channels=channels), steps=1, noise=noise(2, 16, channels), sample_steps=2, **QUIET)  # fmt: skip
    assert tuned.samples[1].shape == (2, channels, 16, 16)


def test_sizes_that_are_not_square():
    start = tiny(sample_size=[16, 32])
    assert check_start(start, torch.zeros(1, 3, 16, 32)) is None
    with pytest.raises(ValueError, match="16 × 16"):
        check_start(start, torch.zeros(1, 3, 16, 16))


def test_a_pipeline_at_another_size_learns_and_draws_at_it():
    start = tiny()
    larger = at_size(start, 24)
    assert start.unet.config.sample_size == 16 and larger.unet.config.sample_size == 24
    tuned = finetune(larger, Pictures(size=24), steps=1, **QUIET)
    tuned.pipeline.set_progress_bar_config(disable=True)
    assert tuned.pipeline(num_inference_steps=2).images[0].size == (24, 24)
    for size in (0, 25):
        with pytest.raises(ValueError, match="multiple of 2"):
            at_size(start, size)


# Measuring, mixing


@pytest.mark.parametrize("kind", KINDS)
def test_even_loss_is_nothing_for_an_oracle_and_the_target_for_a_model_that_says_nothing(kind):
    scheduler = DDPMScheduler(prediction_type=kind)
    images = Pictures(rows=40).batch(0)["images"]
    ask = []

    def model_fn(x, t):
        ask.append(t)
        return torch.zeros_like(x)

    nothing = even_loss(model_fn, scheduler, images, batch_size=16)
    t = torch.cat(ask)
    assert t.min() == 12 and t.max() == 987 and len(t.unique()) == 40 and [len(x) for x in ask] == [16, 16, 8]
    assert nothing == pytest.approx(even_loss(model_fn, scheduler, images), rel=1e-5)
    one_by_one = [even_loss(oracle(images[i : i + 1], scheduler), scheduler, images[i : i + 1]) for i in range(3)]
    assert max(one_by_one) < 1e-4
    square = images.square().mean().item()
    keep = scheduler.alphas_cumprod.mean().item()
    paid = {"epsilon": 1, "v_prediction": keep + (1 - keep) * square, "sample": square}[kind]
    assert nothing == pytest.approx(paid, rel=0.1)
    assert even_loss(model_fn, scheduler, images, seed=1) != nothing or kind == "sample"


def test_from_noise_is_a_function_of_the_model_alone():
    start = tiny()
    draw = from_noise(start.scheduler, noise(), 4)
    torch.manual_seed(0)
    state = torch.get_rng_state()
    first = draw(start.unet)
    assert torch.equal(first, draw(start.unet)) and torch.equal(torch.get_rng_state(), state)
    ddim = DDIMScheduler.from_config(start.scheduler.config, timestep_spacing="trailing")
    assert torch.equal(first, sample(denoiser(start.unet), ddim, noise(), 4).clamp(-1, 1))


def test_blends_of_weights():
    a, b = tiny(seed=0).unet, tiny(seed=1).unet
    for share in (0, 0.25, 1, 1.5):
        mixed = blend(a, b, share)
        for x, y, z in zip(a.parameters(), b.parameters(), mixed.parameters()):
            assert torch.allclose(z, (1 - share) * x + share * y, atol=1e-6)
    assert not mixed.training
    norm, other = nn.BatchNorm1d(2), nn.BatchNorm1d(2)  # has a whole number among its weights
    other.num_batches_tracked += 3
    assert blend(norm, other, 0.5).num_batches_tracked == 3
    with pytest.raises(ValueError, match="the same weights"):
        blend(a, new_unet(16, widths=(16, 32), attention=0), 0.5)


# Saving, opening


def test_the_card_tells_the_truth_and_its_example_runs(tmp_path, monkeypatch):
    tuned = finetune(tiny(), Pictures(), steps=2, noise=noise(), sample_steps=2, **QUIET)
    (tmp_path / "private" / "pictures").mkdir(parents=True)
    folder = save_finetuned(tuned, tmp_path / "my-model", "butterflies-32", tmp_path / "private" / "pictures", seed=3)
    text = (folder / "README.md").read_text()
    assert "private" not in text and str(tmp_path) not in text
    monkeypatch.setattr(zoo, "weights_dir", lambda: tmp_path)
    facts = card("my-model")
    assert (facts["start"], facts["data"], facts["steps"], facts["seed"]) == ("butterflies-32", "pictures", 2, 3)
    assert "![" in text and Image.open(folder / "samples.png").width > 0
    code = re.search(r"```python\n(.*?)```", text, flags=re.S)[1]
    monkeypatch.chdir(tmp_path)
    exec(code, {})
    assert Image.open("picture.png").size == (16, 16)
    assert not [p.name for p in folder.rglob("*") if p.suffix in (".bin", ".pt", ".pkl")]


def test_open_pipeline_opens_folders_and_bundled_models(tmp_path):
    start = tiny()
    start.unet.half()
    start.save_pretrained(tmp_path / "mine")
    opened = open_pipeline(str(tmp_path / "mine"))
    assert opened.unet.dtype == torch.float32 and not opened.unet.training
    assert torch.allclose(weights(opened), weights(start).float())
    assert isinstance(open_pipeline("butterflies-32"), DDPMPipeline)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("butterfly-32", "butterflies-32"),
        ("digits-28", "digits-28 wants a class with each picture"),
        ("judge-garden", "ResNetForImageClassification: no unconditional pipeline"),
        ("nobody/nothing", "the Hub does not answer"),
    ],
)
def test_open_pipeline_says_what_is_wrong(name, words, monkeypatch):
    monkeypatch.setattr(zoo, "online", lambda: False)
    with pytest.raises(ValueError, match=words) as error:
        open_pipeline(name)
    assert "\n" not in str(error.value)


def test_open_pipeline_names_a_folder_without_a_pipeline(tmp_path):
    with pytest.raises(ValueError, match="can't be opened as a pipeline"):
        open_pipeline(str(tmp_path))


# The command


@pytest.fixture
def start_folder(tmp_path):
    """A saved pipeline to start from."""
    tiny().save_pretrained(tmp_path / "start")
    return str(tmp_path / "start")


FEW = ["--count", "12", "--batch-size", "4", "--lr", "1e-3", "--precision", "fp32"]


def test_the_command_on_garden_data_with_its_files(start_folder, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = ["finetune", "--start", start_folder, "--data", "flowers", *FEW, "--epochs", "2", "--accumulate", "2"]
    assert cli.main([*words, "--sample-every", "2", "--save-every", "1", "--name", "mine", "--project", "p"]) == 0
    said, home = capsys.readouterr().out, tmp_path / "runs" / "mine"
    assert "about" in said and "3 steps" in said and "saved in runs/mine/mine" in said.replace("\\", "/")
    assert sorted(p.name for p in (home / "samples").iterdir()) == ["0000000.png", "0000002.png", "0000003.png"]
    assert list((home / "p").glob("events.out.tfevents.*")) and (home / "checkpoint.pt").exists()
    monkeypatch.setattr(zoo, "weights_dir", lambda: home)
    facts = card("mine")
    assert (facts["start"], facts["data"], facts["accumulate"], facts["epochs"]) == ("start", "flowers", 2, 2.0)
    assert cli.main(["sample", str(home / "mine"), "--count", "2", "--steps", "2", "--out", "grid.png"]) == 0
    assert cli.main([*words, "--name", "mine", "--project", "p"]) == 0  # resumed, and nothing is left to do


@pytest.mark.parametrize("mode", ["L", "RGBA"])
def test_the_command_on_an_own_folder_at_another_size(start_folder, tmp_path, mode):
    (tmp_path / "own").mkdir()
    r = np.random.default_rng(0)
    for i in range(5):
        shape = (40 + i, 50) if mode == "L" else (40 + i, 50, 4)
        Image.fromarray(r.integers(0, 255, shape, np.uint8), mode).save(tmp_path / "own" / f"{i}.png")
    words = ["finetune", "--start", start_folder, "--data", str(tmp_path / "own"), "--size", "24", "--steps", "1"]
    words += ["--batch-size", "2", "--tracker", "none", "--ema", "0", "--out", str(tmp_path / "run")]
    assert cli.main(words) == 0
    made = open_pipeline(str(tmp_path / "run" / "finetuned"))
    assert made.unet.config.sample_size == 24 and made.unet.config.in_channels == 3
    assert not list((tmp_path / "run").rglob("*tfevents*"))
    assert str(tmp_path) not in (tmp_path / "run" / "finetuned" / "README.md").read_text()


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--start", "butterfly-32"], "butterflies-32"),
        (["--start", "judge-garden"], "no unconditional pipeline"),
        (["--steps", "0"], "steps is 0"),
        (["--epochs", "0", "--count", "8"], "epochs is 0"),
        (["--lr", "-1"], "lr is -1"),
        (["--data", "flours"], "flowers"),
        (["--size", "30"], "multiple of"),
        (["--tracker", "trackio"], "pip install"),
    ],
)
def test_mistakes_are_one_line(argv, words, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cli, "find_spec", lambda name: None)
    assert cli.main(["finetune", *argv]) == 2
    error = capsys.readouterr().err
    assert words in error and error.startswith("dm-course: ") and error.count("\n") == 1


def test_without_tensorboard_a_run_goes_on(start_folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(cli, "find_spec", lambda name: None)
    words = ["finetune", "--start", start_folder, *FEW, "--steps", "1", "--out", str(tmp_path / "run")]
    assert cli.main(words) == 0
    assert "TensorBoard is not installed" in capsys.readouterr().out


def test_steps_and_epochs_exclude_each_other_and_help_lists_the_options(capsys):
    for argv in (["finetune", "--steps", "1", "--epochs", "1"], ["finetune", "--help"]):
        with pytest.raises(SystemExit):
            cli.build_parser().parse_args(argv)
    said = capsys.readouterr()
    assert "not allowed with" in said.err
    names = "start data size epochs steps batch-size accumulate lr ema project sample-every save-every name out tracker"
    assert all(f"--{name}" in said.out for name in f"{names} seed resume".split())


@pytest.mark.timeout(600)
def test_two_processes_share_the_work_and_one_saves(start_folder, tmp_path):
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        "2",
        "-m",
        "dm_course.cli",
    ]
    words = ["finetune", "--start-model", start_folder, *FEW, "--epochs", "2"]  # --start is an option of torchrun
    words += ["--batch-size", "3", "--tracker", "none"]
    env = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    run = subprocess.run([*command, *words, "--out", str(tmp_path / "two")], capture_output=True, text=True, env=env)
    assert run.returncode == 0, run.stderr[-3000:]
    assert run.stdout.count("saved in") == 1 and "4 steps" in run.stdout  # 12 pictures, 2 × 3 a step, 2 epochs
    assert len(list((tmp_path / "two" / "samples").iterdir())) == 2


def in_pieces(share, backward=True, most=None):
    """A wrong accumulation: every piece's loss is multiplied by share(piece, images)."""

    def accumulate(model, loss_fn, images, wanted):
        total = 0.0
        for piece in images.split(most or wanted):
            loss = loss_fn(model, piece) * share(piece, images)
            if backward:
                loss.backward()
            total += loss.item()
        return total

    return accumulate


def leap_by(mean_of_x0, mean_of_x, spread):
    """A wrong leap, from its three factors as functions of ᾱ there and ᾱ before."""
    return lambda x, x0, k, b, noise: mean_of_x0(k, b) * x0 + mean_of_x(k, b) * x + spread(k, b) * noise


class Constant:
    """Batches that are always the same."""

    def batch(self, number, rank=0, world=1):
        return {"images": ("new", 0, 1, 2)}


@pytest.mark.parametrize(
    ("check", "wrong", "said"),
    [
        ("check_accumulate", in_pieces(lambda p, x: 1.0), "times too long"),
        ("check_accumulate", in_pieces(lambda p, x: 1 / 3), "count as much as a piece of three"),
        ("check_accumulate", in_pieces(lambda p, x: len(p) / 7, backward=False), "who calls backward"),
        ("check_accumulate", in_pieces(lambda p, x: 1.0, most=7), "3 at most at a time"),
        ("check_accumulate", lambda m, f, x, n: in_pieces(lambda p, x: len(p) / 7)(m, f, x, n) + 1, "the loss is"),
        ("check_decay_for", lambda m: 1 - 1 / (m + 0.001), "mean age|between 0 and 1|% of the weight"),
        ("check_accumulate", lambda m, f, x, n: [in_pieces(lambda p, x: len(p) / 7)(m, f, x, n)], "as a number"),
        ("check_decay_for", lambda m: 2, "between 0 and 1"),
        ("check_leap", lambda x, x0, k, b, noise: b.sqrt() * x0 + (1 - b).sqrt() * noise, "less than it should"),
        ("check_leap", lambda x, x0, k, b, noise: b.sqrt() * x0 + (1 - b).sqrt() * (x - k.sqrt() * x0) / (1 - k).sqrt(), "more than it should"),
        ("check_leap", leap_by(lambda k, b: 1.0, lambda k, b: 0.0, lambda k, b: 0.0), "the mean is"),
        ("check_leap", leap_by(lambda k, b: b.sqrt(), lambda k, b: 0.0, lambda k, b: 0.0), "the variance"),
        ("check_leap", lambda *a: 3, "pictures should come out"),
        ("check_rehearse", lambda new, old, every: new, r"batch 2 of rank 1 of 2 should be \('old', 0, 1, 2\)"),
        ("check_rehearse", lambda new, old, every: [new, old], "no method batch: list"),
        ("check_rehearse", lambda new, old, every: Constant(), "batch 1"),
    ],
)  # fmt: skip
def test_checkers_say_what_is_off(check, wrong, said, capsys):
    assert getattr(finetuning, check)(wrong) is False
    assert re.search(said, capsys.readouterr().out)


def test_unet_of_the_example_is_of_the_class_that_is_opened():
    assert isinstance(tiny().unet, UNet2DModel)

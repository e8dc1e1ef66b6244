"""The long comparisons of lesson 12: digits of 28 × 28 pixels, and the same computing time for every variant.

    python benchmarks/lesson12.py                       # everything that is not there yet, 90 seconds a variant
    python benchmarks/lesson12.py --seconds 600         # ten minutes a variant
    python benchmarks/lesson12.py --only "predict v"    # one variant, again
    python benchmarks/lesson12.py --list

The figures go to dm_course/measured/lesson12.json after each variant, so a run that is cut off goes on where it was.
Time is counted in the processor's own seconds, added over all threads, so that other programs on the machine do not
matter: `--seconds 90` is 90 seconds of one quiet core, or 45 of two. On a GPU, seconds are those of the clock. Drawing
and judging samples come on top; all of it takes about half an hour on two cores.
"""

import argparse
import time
from functools import partial

from timing import clock, steps_for  # first: it sets how threads wait

# isort: split

import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    HeunDiscreteScheduler,
    UNet2DModel,
    UniPCMultistepScheduler,
)
from figures import resumed

from dm_course.data import Batches, load_data
from dm_course.judges import frechet_distance, load_judge, score
from dm_course.plotting import image_grid, picture_to_text
from dm_course.sampling import denoiser, diffusion_loss, sample
from dm_course.scratch import BasicUNet, TimedUNet, min_snr_weight, mixing_loss, p2_weight, sample_by_mixing
from dm_course.settings import choose, start
from dm_course.training import autocast, train
from dm_course.zoo import write_measured

SIZE, BATCH, STEPS, CALLS = 28, 128, 20, (5, 10, 20, 40)  # pixels, pictures a step, steps to draw, steps in the grid


def seeded(kind, **options):
    """A network whose first weights are always the same."""
    torch.manual_seed(0)
    return kind(**options)


def big_unet():
    """The UNet of 1,707,009 parameters."""
    down, up = ("DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"), ("AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D")
    options = {"sample_size": SIZE, "in_channels": 1, "out_channels": 1, "layers_per_block": 2}
    options |= {"block_out_channels": (32, 64, 64), "down_block_types": down, "up_block_types": up}
    return seeded(UNet2DModel, **options)


def schedule(prediction_type, beta_schedule="linear", kind=DDIMScheduler, **options):
    """A scheduler of 1,000 timesteps that starts at the last of them."""
    options = {"timestep_spacing": "trailing", "clip_sample": True} | options
    return kind(num_train_timesteps=1000, beta_schedule=beta_schedule, prediction_type=prediction_type, **options)


class Bench:
    """The data, the judge, and the figures so far."""

    def __init__(self, args):
        self.course, self.args = start(seed=0), args
        digits = load_data("digits")
        self.data = Batches(digits, BATCH, channels=1)
        self.judge = load_judge("judge-digits")
        n = args.n
        self.real = Batches(load_data("digits", "test", count=n), n, channels=1).batch(0)["images"]
        self.n = len(self.real)
        self.again = self.data.images[: self.n].float() / 127.5 - 1
        self.real_features, self.again_features = self.judge.features(self.real), self.judge.features(self.again)
        self.noise = self.course.randn(self.n, 1, SIZE, SIZE, offset=1)
        self.uniform = torch.rand(self.noise.shape, generator=self.course.generator(2)).to(self.course.device)
        self.precision = "bf16" if self.course.dtype == torch.bfloat16 else "fp32"
        same = {
            "command": f"python benchmarks/lesson12.py --seconds {args.seconds:g}",
            "seconds": args.seconds,
            "data": f"{len(digits):,} pictures of {'MNIST' if len(digits) > 2000 else 'scikit-learn'}",
            "n": self.n,
        }
        self.figures = resumed("lesson12", same, args.only)
        floor = score(self.judge, self.again_features, self.real_features, self.again_features).floor
        self.figures |= {"torch": torch.__version__.partition("+")[0], "floor": floor}
        self.figures["sure of real"] = self.sure(self.real)

    def sure(self, images):
        """How sure the judge is of what it sees, on average."""
        return self.judge.probabilities(images)["digit"].max(1).values.mean().item()

    def marks(self, images):
        """What samples in [-1, 1] are worth."""
        found = score(self.judge, images, self.real_features, self.again_features)
        return {"frechet": found.frechet, "interval": found.interval, "sure": self.sure(images)}

    def train(self, net, loss_fn, steps, **options):
        """One training run."""
        options = {"lr": 1e-3, "precision": self.precision, "progress": False, "seed": 0} | options
        return train(net.to(self.course.device), loss_fn, self.data, steps=steps, **options)

    def draw(self, model, way):
        """Samples in [-1, 1]."""
        with torch.no_grad(), autocast(self.course.device, self.precision):
            parts = [way(denoiser(model.eval()), s) for s in torch.arange(self.n).split(250)]
        return torch.cat(parts).float()

    def variant(self, make, loss_fn, way, seconds=None, **options):
        """Train for a time, draw, judge."""
        steps = steps_for(seconds or self.args.seconds, lambda tries: self.train(make(), loss_fn, tries, **options))
        begin, wall = clock(), time.perf_counter()
        run = self.train(make(), loss_fn, steps, **options)
        spent = {"steps": steps, "cpu_seconds": clock() - begin, "wall_seconds": time.perf_counter() - wall}
        every = max(1, steps // 50)
        losses = [sum(run.losses[i : i + every]) / len(run.losses[i : i + every]) for i in range(0, steps, every)]
        images = self.draw(run.model, way)
        return spent | self.marks(images) | {"losses": [round(v, 5) for v in losses]}, run, images

    def save(self):
        """Write down what there is."""
        write_measured("lesson12", self.figures)


def mixing_way(bench, low, noise, steps=STEPS, renew=None):
    """Sampling by mixing, brought to [-1, 1]; the model is told the timestep 0, as in training."""

    def way(f, rows):
        x = sample_by_mixing(
            lambda x, t: f(x, torch.zeros(len(x), device=x.device)),
            noise[rows],
            steps,
            renew,
            bench.course.generator(3),
        )
        return 1 - (1 - x) * 2 / (1 - low)

    return way


def ddim_way(bench, scheduler):
    """Sampling with DDIM."""
    return lambda f, rows: sample(f, scheduler, bench.noise[rows], STEPS)


def variants(bench):
    """Name: (network, loss, way of sampling); each differs from one before it in one thing."""
    basic, timed = partial(seeded, BasicUNet), partial(seeded, TimedUNet)
    x0, e, v = (schedule(kind) for kind in ("sample", "epsilon", "v_prediction"))
    cosine, ways = schedule("sample", "squaredcos_cap_v2"), partial(ddim_way, bench)
    normal = mixing_loss(torch.randn_like)
    return {
        "BasicUNet": (basic, mixing_loss(), mixing_way(bench, 0, bench.uniform)),
        "UNet2DModel": (big_unet, mixing_loss(), mixing_way(bench, 0, bench.uniform)),
        "Gaussian noise": (basic, normal, mixing_way(bench, 0, bench.noise)),
        "Gaussian, −1 to 1": (basic, mixing_loss(torch.randn_like, -1.0), mixing_way(bench, -1, bench.noise)),
        "linear schedule": (basic, diffusion_loss(x0), ways(x0)),
        "cosine schedule": (basic, diffusion_loss(cosine), ways(cosine)),
        "predict ε": (basic, diffusion_loss(e), ways(e)),
        "predict v": (basic, diffusion_loss(v), ways(v)),
        "ε, P2": (basic, diffusion_loss(e, p2_weight(e)), ways(e)),
        "ε, min-SNR": (basic, diffusion_loss(e, min_snr_weight(e)), ways(e)),
        "v, min-SNR": (basic, diffusion_loss(v, min_snr_weight(v)), ways(v)),
        "ε, told t": (timed, diffusion_loss(e), ways(e)),
        "v, told t": (timed, diffusion_loss(v), ways(v)),
        "DDPM": (big_unet, diffusion_loss(e), ways(e)),
    }


def three_epochs(bench):
    """The by-hand loop of the lesson over three whole epochs: losses, and samples by mixing."""
    per_epoch, begin = len(bench.data), clock()
    run = bench.train(seeded(BasicUNet), mixing_loss(), 3 * per_epoch, schedule="constant", warmup=1, grad_clip=0.0)
    epochs = [sum(run.losses[i * per_epoch : (i + 1) * per_epoch]) / per_epoch for i in range(3)]
    spent = {"steps": 3 * per_epoch, "cpu_seconds": clock() - begin}
    bench.figures["three epochs"] = spent | {"epochs": epochs, "data": bench.figures["data"]}
    for name, steps, renew in (("1 step", 1, None), ("5 steps", 5, None), ("40 steps", 40, None)) + (
        ("40, fresh noise", 40, torch.rand),
    ):
        images = bench.draw(run.model, mixing_way(bench, 0, bench.uniform, steps, renew))
        bench.figures.setdefault("sampling", {})[f"three epochs, {name}"] = spent | bench.marks(images)


def samplers(bench):
    """The last recipe with Muon and five times the time, then every sampler at every number of calls."""
    v = schedule("v_prediction")
    loss_fn = diffusion_loss(v)
    facts, run, images = bench.variant(
        partial(seeded, TimedUNet), loss_fn, ddim_way(bench, v), 5 * bench.args.seconds, optimizer="muon", lr=3e-3
    )
    sheet = image_grid(images[:36], columns=12, scale=2)
    bench.figures["finished"] = facts | {"png": picture_to_text(sheet, 32)}
    model_fn, few = denoiser(run.model), min(64, bench.n)
    z, real = bench.noise, bench.real_features
    make = partial(schedule, "v_prediction", clip_sample=False)
    plain = {
        k: v.config[k] for k in ("num_train_timesteps", "beta_schedule", "beta_start", "beta_end", "prediction_type")
    }
    plain["timestep_spacing"] = "trailing"  # the schedulers' own defaults differ, β among them
    ways = {f"DDIM, {s}": (make(timestep_spacing=s), {}) for s in ("leading", "linspace", "trailing")}
    ways["Heun, 2nd order"] = (HeunDiscreteScheduler(**plain), {})
    ways["DPM-Solver++ 2M"] = (DPMSolverMultistepScheduler(**plain), {})
    ways["UniPC"] = (UniPCMultistepScheduler(**plain), {})
    ways |= {f"DDIM, η = {eta}": (make(), {"eta": eta}) for eta in (0.5, 1.0)}
    ways["DDPM"] = (make(kind=DDPMScheduler), {})
    exact = sample(model_fn, make(), z[:few], 1000)
    grid = {"calls": list(CALLS), "n": bench.n, "n of distance": few, "frechet": {}, "distance": {}, "sure": {}}
    for name, (scheduler, options) in ways.items():
        for calls in CALLS:
            steps = (calls + 1) // 2 if "Heun" in name else calls
            x = sample(model_fn, scheduler, z, steps, bench.course.generator(4), **options)
            apart = (x[:few] - exact).square().mean().sqrt().item()
            far = frechet_distance(bench.judge.features(x), real) / bench.figures["floor"]
            grid["frechet"].setdefault(name, []).append(far)
            grid["sure"].setdefault(name, []).append(bench.sure(x))
            if not options and name != "DDPM":
                grid["distance"].setdefault(name, []).append(apart)
    bench.figures["samplers"] = grid


def main():
    """Measure what is asked for, or all that is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=90, help="training time of a variant, in CPU seconds")
    parser.add_argument("--only", action="append", help="a variant to measure again; may be given several times")
    parser.add_argument("--n", type=int, default=500, help="samples, and real digits, for each Fréchet distance")
    parser.add_argument("--list", action="store_true", help="list the variants and stop")
    args = parser.parse_args()
    if args.list:
        print("\n".join(["three epochs", *variants(argparse.Namespace(uniform=None, noise=None)), "samplers"]))
        return
    bench = Bench(args)
    table = variants(bench)
    parts = {"three epochs": three_epochs} | dict.fromkeys(table) | {"samplers": samplers}
    wanted = [choose(name, parts, "variant") for name in args.only] if args.only else list(parts)
    for name in wanted:
        have = name in bench.figures or name in bench.figures.get("variants", {})
        if have and not args.only:
            continue
        begin = time.perf_counter()
        if parts[name] is not None:
            parts[name](bench)
        else:
            facts, _, _ = bench.variant(*table[name])
            bench.figures.setdefault("variants", {})[name] = facts
        ordered = {k: bench.figures["variants"][k] for k in table if k in bench.figures.get("variants", {})}
        bench.figures["variants"] = ordered
        bench.save()
        marks = bench.figures["variants"].get(name, {})
        worth = (
            f", {marks['steps']} steps, Fréchet {marks['frechet'] / bench.figures['floor']:.1f} floors" if marks else ""
        )
        print(f"{name}: {time.perf_counter() - begin:.0f} s{worth}", flush=True)


if __name__ == "__main__":
    main()

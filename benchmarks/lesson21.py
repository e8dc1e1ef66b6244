"""The long runs of lesson 21: samplers of the butterfly model, and what becomes of it when it is taught flowers.

    python benchmarks/lesson21.py                          # everything that is not there yet
    python benchmarks/lesson21.py --steps 800              # longer runs; then all of them again
    python benchmarks/lesson21.py --only "rate 0.001"     # one run, again
    python benchmarks/lesson21.py --list

The figures go to dm_course/measured/lesson21.json after each part, so a run that is cut off goes on where it was. All
variants of fine-tuning take the same number of steps of the same pictures and the same noise; what they differ in is
their name. A step costs the same in each of them, so equal steps are equal time. Time is the processor's own, over all
threads. On one core all of it takes more than an hour; the samples with 1,000 DDPM steps, which come last, are a good part of it.
"""

import argparse
import copy
import tempfile

from timing import clock  # first: it sets how threads wait

# isort: split

import torch
from diffusers import DDIMScheduler, DDPMPipeline, DDPMScheduler, DPMSolverMultistepScheduler
from figures import resumed

from dm_course.data import Batches, load_data
from dm_course.finetuning import even_loss, finetune
from dm_course.judges import load_judge, score
from dm_course.plotting import image_grid, picture_to_text
from dm_course.recipes import new_unet
from dm_course.sampling import denoiser, sample
from dm_course.settings import choose, start
from dm_course.training import autocast
from dm_course.zoo import card, load, write_measured

NAME, SIZE, BATCH, RATE = "butterflies-32", 32, 16, 1e-3
RATES, FLOWERS, ROWS = (3e-4, 1e-3, 3e-3), 4096, (0, 25, 75, 150)

VARIANTS = {f"rate {lr:g}": dict(lr=lr) for lr in RATES}  # name: options of finetune
VARIANTS["from nothing"] = dict(lr=RATE)  # random weights; "rate 0.001" is its counterpart
for schedule in ("constant", "cosine"):
    for weights in ("average", "last weights"):
        VARIANTS[f"{schedule}, {weights}"] = dict(lr=2 * RATE, schedule=schedule)


class Bench:
    """Model, data and judge, and the figures so far."""

    def __init__(self, args):
        self.course, self.args = start(seed=0), args
        self.precision = "bf16" if self.course.dtype == torch.bfloat16 else "fp32"
        self.pipeline = load(NAME, self.course.device)
        self.flowers = Batches(load_data("flowers", count=FLOWERS, size=SIZE), BATCH)
        self.judge, self.noise = load_judge("judge-garden"), self.course.randn(args.n, 3, SIZE, SIZE, offset=1)
        self.real, self.features, floors = {}, {}, {}
        for domain in ("butterflies", "flowers"):
            both = Batches(load_data(domain, "test", count=2 * args.n, size=SIZE), args.n)
            self.real[domain] = both.batch(0)["images"]
            self.features[domain] = [self.judge.features(both.batch(i)["images"]) for i in (0, 1)]
            floors[domain] = score(self.judge, self.features[domain][1], *self.features[domain]).floor
        same = {
            "command": f"python benchmarks/lesson21.py --steps {args.steps} --n {args.n}",
            "model": "{steps} steps, {seconds} s".format(**card(NAME)),  # changes when it is trained again
            "n": args.n,
            "steps": args.steps,
            "batch_size": BATCH,
        }
        self.figures = resumed("lesson21", same, args.only)
        self.figures |= {"threads": torch.get_num_threads(), "torch": torch.__version__.partition("+")[0]}
        self.figures |= {"floor": floors} | {k: self.figures.get(k, {}) for k in ("samplers", "variants")}

    def draw(self, unet, scheduler, steps, **options):
        """Samples, always from the same noise, and the CPU seconds that one takes."""
        begin, g = clock(), torch.Generator().manual_seed(2)
        with torch.no_grad(), autocast(self.course.device, self.precision):
            parts = [sample(denoiser(unet), scheduler, x, steps, g, **options) for x in self.noise.split(64)]
        return torch.cat(parts).float().clamp(-1, 1).cpu(), (clock() - begin) / len(self.noise)

    def distance(self, images, domain):
        """The Fréchet distance to a domain, with its interval."""
        found = score(self.judge, images, *self.features[domain])
        return {"frechet": found.frechet, "interval": found.interval}

    def loss(self, unet, domain):
        """The even loss on 256 fresh pictures of a domain."""
        with autocast(self.course.device, self.precision):
            images = self.real[domain][:256].to(self.course.device)
            return even_loss(denoiser(unet), self.pipeline.scheduler, images)

    def marks(self, unet):
        """What a network is worth: its samples against flowers, its loss on the new and on the old."""
        unet.eval()
        images, _ = self.draw(unet, self.ddim, 40)
        share = (self.judge(images)["domain"] == self.judge.names("domain").index("flowers")).float().mean().item()
        found = {"share": share, "new": self.loss(unet, "flowers"), "old": self.loss(unet, "butterflies")}
        return found | self.distance(images, "flowers")

    @property
    def ddim(self):
        """Forty steps of it are the yardstick."""
        return DDIMScheduler.from_config(self.pipeline.scheduler.config, timestep_spacing="trailing")

    def finetune(self, pipeline, steps, lr, schedule="cosine", **options):
        """One run: its average, the weights of its last step, the pictures on the way and the CPU seconds."""
        begin, common = clock(), dict(precision=self.precision, seed=0, ema=0.99, progress=False)
        with tempfile.TemporaryDirectory() as out:
            tuned = finetune(
                pipeline, self.flowers, steps=steps, lr=lr, schedule=schedule, out=out, **common, **options
            )
            weights = torch.load(f"{out}/checkpoint.pt", map_location="cpu", weights_only=True)["model"]
        last = copy.deepcopy(tuned.pipeline.unet)
        last.load_state_dict(weights)
        return tuned, last, clock() - begin

    def save(self):
        """Write down what there is."""
        write_measured("lesson21", self.figures)


def samplers(bench):
    """Name: (scheduler, steps, arguments of its step)."""
    config = bench.pipeline.scheduler.config
    ddpm, ddim = DDPMScheduler.from_config(config), bench.ddim
    trailing = DDPMScheduler.from_config(config, timestep_spacing="trailing")
    solver = DPMSolverMultistepScheduler.from_config(config, timestep_spacing="trailing")
    return {
        "DDPM, 1,000 steps": (ddpm, 1000, {}),
        "DDIM, 40 steps": (ddim, 40, {}),
        "DDPM, 40 steps": (trailing, 40, {}),
        "DDIM, 20 steps": (ddim, 20, {}),
        "DPM-Solver++, 20 steps": (solver, 20, {}),
        "DDIM, 10 steps": (ddim, 10, {}),
        "DPM-Solver++, 10 steps": (solver, 10, {}),
    }


def run_sampler(bench, name):
    """One sampler of the butterfly model, against fresh butterflies."""
    scheduler, steps, options = samplers(bench)[name]
    images, seconds = bench.draw(bench.pipeline.unet, scheduler, steps, **options)
    bench.figures["samplers"][name] = {"steps": steps, "cpu_seconds_a_picture": seconds}
    bench.figures["samplers"][name] |= bench.distance(images, "butterflies")
    drawn = bench.figures["samplers"]
    bench.figures["samplers"] = {k: drawn[k] for k in samplers(bench) if k in drawn}


def run_variant(bench, name):
    """One way of fine-tuning; where a run gives the average and the last weights, both are kept."""
    options, pipeline = VARIANTS[name], bench.pipeline
    if name == "from nothing":
        unet = new_unet(SIZE, widths=tuple(pipeline.unet.config.block_out_channels)).to(bench.course.device)
        pipeline = DDPMPipeline(unet, pipeline.scheduler)
    tuned, last, seconds = bench.finetune(pipeline, bench.args.steps, **options)
    facts = {"lr": options["lr"], "steps": tuned.run.step, "cpu_seconds": seconds}
    nets = {name: tuned.pipeline.unet}
    if "," in name:
        schedule = name.partition(",")[0]
        nets = {f"{schedule}, average": tuned.pipeline.unet, f"{schedule}, last weights": last}
    for kind, unet in nets.items():
        bench.figures["variants"][kind] = facts | bench.marks(unet)
    order = [k for k in VARIANTS if k in bench.figures["variants"]]
    bench.figures["variants"] = {k: bench.figures["variants"][k] for k in order}


def run_finished(bench, name):
    """The longer run whose pictures open the lesson, with the pictures of some steps on the way."""
    steps, eight = 3 * bench.args.steps, bench.noise[:8]
    rows = [s for s in ROWS if s < steps] + [steps]
    tuned, _, seconds = bench.finetune(bench.pipeline, steps, RATE, noise=eight, sample_steps=40, sample_every=25)
    sheet = image_grid(torch.cat([tuned.samples[s] for s in rows]), columns=8, scale=1, gap=0)
    facts = {"lr": RATE, "steps": steps, "cpu_seconds": seconds, "rows": rows} | bench.marks(tuned.pipeline.unet)
    bench.figures["finished"] = facts | {"png": picture_to_text(sheet)}


def run_start(bench, name):
    """The butterfly model as it is, against flowers."""
    bench.figures["start"] = bench.marks(bench.pipeline.unet)


def main():
    """Measure what is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=100, help="optimiser steps of a variant; three times for the last")
    parser.add_argument("--n", type=int, default=100, help="samples to judge")
    parser.add_argument("--only", help="one part, again")
    parser.add_argument("--list", action="store_true", help="list the parts")
    args = parser.parse_args()
    bench = Bench(args)
    parts = {"start": run_start, "finished": run_finished}
    parts |= {k: run_variant for k in VARIANTS} | {k: run_sampler for k in reversed(samplers(bench))}
    if args.list:
        return print("\n".join(parts))
    only = args.only and choose(args.only, tuple(parts), "part")
    for name, part in parts.items():
        there = any(name in found for found in (bench.figures, bench.figures["samplers"], bench.figures["variants"]))
        if name == only or (only is None and not there):
            part(bench, name)
            bench.save()
            print(name, "done", flush=True)


if __name__ == "__main__":
    main()

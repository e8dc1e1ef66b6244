"""The long comparisons of lesson 23: ways to tell a UNet the class, label dropout, and the guidance scale.

    python benchmarks/lesson23.py                     # everything that is not there yet, 150 seconds a way
    python benchmarks/lesson23.py --seconds 900       # fifteen minutes a way
    python benchmarks/lesson23.py --only embedding    # one part, again
    python benchmarks/lesson23.py --list

The figures go to dm_course/measured/lesson23.json after each part, so a run that is cut off goes on where it was.
Time is counted in the processor's own seconds, added over all threads, as in benchmarks/lesson12.py: `--seconds 150` is
150 seconds of one quiet core. The part `scales` draws with the bundled `digits-28`.
Drawing and judging come on top; all of it takes about half an hour on one core.
"""

import argparse
import time
from functools import partial

from timing import clock, steps_for  # first: it sets how threads wait

# isort: split

import torch
from diffusers import DDIMScheduler, DDPMScheduler
from figures import resumed

from dm_course.conditioning import ChannelUNet, CrossAttentionUNet, class_denoiser, class_loss, class_spread, class_unet
from dm_course.data import Batches, load_data
from dm_course.judges import load_judge, score
from dm_course.sampling import sample
from dm_course.settings import choose, start
from dm_course.training import autocast, train
from dm_course.zoo import load, write_measured

STEPS, GUIDED = 20, 2.0  # DDIM steps; the guidance scale at which the ways are judged besides 1
SCALES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0)
WAYS = {  # name: network, share of labels dropped
    "channels": (ChannelUNet, 0.1),
    "embedding": (class_unet, 0.1),
    "cross-attention": (CrossAttentionUNet, 0.1),
    "embedding, no label dropped": (class_unet, 0.0),
    "embedding, half of the labels dropped": (class_unet, 0.5),
    "cross-attention, one token": (partial(CrossAttentionUNet, tokens=1), 0.1),
}


class Bench:
    """The data, the judge, and the figures so far."""

    def __init__(self, args):
        self.course, self.args = start(seed=0), args
        digits = load_data("digits")
        self.data = Batches(digits, 64, channels=1)
        self.judge = load_judge("judge-digits")
        held = Batches(load_data("digits", "test", count=2 * args.n), 2 * args.n, channels=1).batch(0)
        self.real, self.again = (self.judge.features(held["images"][i::2]) for i in (0, 1))
        self.real_spread = class_spread(self.real, held["labels"][::2])
        self.asked = torch.arange(args.n) % 10
        self.noise = self.course.randn(args.n, 1, 28, 28, offset=1)
        self.schedule = DDPMScheduler(
            num_train_timesteps=1000, beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction"
        )
        self.precision = "bf16" if self.course.dtype == torch.bfloat16 else "fp32"
        same = {
            "command": f"python benchmarks/lesson23.py --seconds {args.seconds:g} --n {args.n}",
            "seconds": args.seconds,
            "data": f"{len(digits):,} pictures of {'MNIST' if len(digits) > 2000 else 'scikit-learn'}",
            "n": args.n,
            "ddim_steps": STEPS,
            "guided": GUIDED,
        }
        self.figures = resumed("lesson23", same, args.only)
        floor = score(self.judge, self.again, self.real, self.again).floor
        self.figures |= {"torch": torch.__version__.partition("+")[0], "floor": floor}

    def draw(self, net, schedule, scale):
        """Samples in [-1, 1] of the digits asked for, always from the same noise."""
        ddim = DDIMScheduler.from_config(schedule.config, timestep_spacing="trailing", clip_sample=False)
        parts = []
        with autocast(self.course.device, self.precision):
            for rows in torch.arange(len(self.asked)).split(100):
                model_fn = class_denoiser(net, self.asked[rows].to(self.course.device), scale)
                parts.append(sample(model_fn, ddim, self.noise[rows], STEPS))
        return torch.cat(parts).float()

    def marks(self, images):
        """What samples are worth: the share read as asked, the Fréchet distance, the diversity of those read right."""
        features, right = self.judge.features(images), self.judge(images)["digit"] == self.asked
        try:
            diversity = class_spread(features[right], self.asked[right]) / self.real_spread
        except ValueError:  # hardly any is right
            diversity = None
        found = score(self.judge, features, self.real, self.again)
        figures = {"read_as_asked": right.double().mean().item(), "diversity": diversity}
        return figures | {"frechet": found.frechet, "interval": found.interval}

    def way(self, kind, drop):
        """Train one network for a time, draw with and without guidance, judge."""

        def learn(steps):
            torch.manual_seed(0)
            net = kind(widths=(32, 64, 64)).to(self.course.device)
            return train(net, class_loss(self.schedule, drop=drop), self.data, steps=steps, optimizer="muon", lr=3e-3,
                         ema=0.99, precision=self.precision, progress=False)  # fmt: skip

        steps = steps_for(self.args.seconds, learn)
        begin = clock()
        run = learn(steps)
        facts = {"parameters": sum(p.numel() for p in run.model.parameters()), "steps": steps}
        facts["cpu_seconds"] = clock() - begin
        every = max(1, steps // 50)
        losses = [run.losses[i : i + every] for i in range(0, steps, every)]
        facts["losses"] = [round(sum(part) / len(part), 5) for part in losses]
        facts |= self.marks(self.draw(run.model, self.schedule, 1.0))
        guided = self.marks(self.draw(run.model, self.schedule, GUIDED))
        return facts | {f"{k}_guided": v for k, v in guided.items()}

    def scales(self):
        """The bundled model at every guidance scale."""
        pipeline = load("digits-28", self.course.device)
        rows = [self.marks(self.draw(pipeline.unet, pipeline.scheduler, s)) for s in SCALES]
        return {"scale": list(SCALES)} | {k: [row[k] for row in rows] for k in rows[0]}


def main():
    """Measure what is asked for, or all that is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=150, help="training time of a way, in CPU seconds")
    parser.add_argument("--only", action="append", help="a part to measure again; may be given several times")
    parser.add_argument("--n", type=int, default=500, help="samples, and real digits, for each figure")
    parser.add_argument("--list", action="store_true", help="list the parts and stop")
    args = parser.parse_args()
    parts = [*WAYS, "scales"]
    if args.list:
        print("\n".join(parts))
        return
    wanted = [choose(name, parts, "part") for name in args.only] if args.only else parts
    bench = Bench(args)
    for name in wanted:
        if not args.only and (name in bench.figures or name in bench.figures.get("ways", {})):
            continue
        begin = time.perf_counter()
        if name == "scales":
            bench.figures["scales"] = bench.scales()
        else:
            ways = bench.figures.get("ways", {}) | {name: bench.way(*WAYS[name])}
            bench.figures["ways"] = {k: ways[k] for k in WAYS if k in ways}
        write_measured("lesson23", bench.figures)
        print(f"{name}: {time.perf_counter() - begin:.0f} s", flush=True)


if __name__ == "__main__":
    main()

"""The counts of lesson 22: guidance by colour and by words on 200 pictures, read by the judge.

    python benchmarks/lesson22.py                    # everything that is not there yet
    python benchmarks/lesson22.py --only clip        # one part, again
    python benchmarks/lesson22.py --list

The figures go to dm_course/measured/lesson22.json after each set of pictures, so a run that is cut off goes on where it
was. Each set is drawn from the same 200 noises, picture i asked for colour i modulo 8. Of each set are kept: the share
that the judge finds in the colour asked for, the Fréchet distance to fresh butterflies with its interval, the share of
pictures that kept the background which the same noise has without guidance, and the seconds. All of it takes about
an hour on one core. Needs the bundled models `butterflies-32`, `garden-clip` and `judge-garden`.
"""

import time

import open_clip
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, HeunDiscreteScheduler
from figures import resumed, run_parts

from dm_course import zoo
from dm_course.data import Batches, load_data
from dm_course.garden import COLOURS
from dm_course.guidance import TIME_SCALES, clip_loss, colour_loss, guided, wing_colour
from dm_course.judges import load_judge, score
from dm_course.plotting import image_grid, picture_to_text
from dm_course.sampling import denoiser, sample
from dm_course.settings import start
from dm_course.training import autocast

SCALES, COLOUR_SCALE = (5, 15, 40, 100), 100  # those of the lesson; the one for the time scales and samplers
CLIP_SCALES = {"x0": (100, 300, 600), "unet": (20, 60, 150)}  # ways and scales that are tried with words
WAYS = {"x0": "picture alone", "unet": "network"}
CUTS, BATCH = 4, 40  # cut-outs of a picture, pictures at a time (a multiple of the colours)


class Bench:
    """The models, the noises, the fresh pictures, and the figures so far."""

    def __init__(self, args):
        self.course = start(seed=0)
        pipeline = zoo.load("butterflies-32", self.course.device)
        self.model_fn, self.config = denoiser(pipeline.unet.requires_grad_(False)), pipeline.scheduler.config
        self.ddim = DDIMScheduler.from_config(self.config, timestep_spacing="trailing", clip_sample=False)
        self.steps, self.n = args.steps, args.n
        self.noise = self.course.randn(self.n, 3, 32, 32, offset=1)
        self.asked = torch.arange(self.n) % len(COLOURS)
        self.rgb = torch.stack([wing_colour(name) for name in COLOURS])[self.asked]
        self.texts = [f"a {COLOURS[i]} butterfly".replace("a orange", "an orange") for i in self.asked]
        self.judge = load_judge("judge-garden")
        fresh = Batches(load_data("butterflies", "test", count=2 * self.n, size=32), 2 * self.n).batch(0)["images"]
        self.real, self.again = (self.judge.features(x) for x in fresh.split(self.n))
        same = {"command": "python benchmarks/lesson22.py", "n": self.n, "steps": self.steps}
        cards = [zoo.card(name)["measured"] for name in ("butterflies-32", "garden-clip")]
        same["models"] = [cards[0]["frechet"], cards[1]["butterflies"]]
        self.figures = resumed("lesson22", same, args.only)  # other models make all figures void
        self.clip, self.tokenizer, self.repeat, self.drawn = None, None, bool(args.only), {}
        if "plain" not in self.figures:
            self.measure(["plain"], "no guidance")

    def read(self):
        """Open the model that reads, when it is first needed."""
        if self.clip is None:
            zoo.verify("garden-clip")
            name = f"local-dir:{zoo.model_dir('garden-clip')}"
            clip, _, _ = open_clip.create_model_and_transforms(name, device=self.course.device)
            self.clip, self.tokenizer = clip.eval().requires_grad_(False), open_clip.get_tokenizer(name)
        return self.clip, self.tokenizer

    def colour(self, rows):
        """The wish for a colour, for some of the pictures."""
        return colour_loss(self.rgb[rows])

    def words(self, rows, cuts=CUTS):
        """The wish for a colour said in words, for some of the pictures."""
        generator = self.course.generator(10 + rows[0].item())
        return clip_loss(*self.read(), [self.texts[i] for i in rows], cuts, generator=generator)

    def draw(self, wish=None, scale=0, sampler=None, **options):
        """All pictures, steered or not, and the seconds that they took."""
        parts, begin = [], time.perf_counter()
        for rows in torch.arange(self.n).split(BATCH):
            model_fn = self.model_fn
            if wish is not None:
                model_fn = guided(model_fn, self.ddim, wish(rows), scale, **options)
            with autocast(self.course.device):
                parts.append(sample(model_fn, sampler or self.ddim, self.noise[rows], self.steps))
        return torch.cat(parts).float().clamp(-1, 1).cpu(), time.perf_counter() - begin

    def marks(self, pictures, seconds, what):
        """What a set of pictures is worth."""
        seen = self.judge(pictures)
        if "backgrounds" not in self.figures:  # those of the first set, which nobody steers
            self.figures["backgrounds"] = seen["background"].tolist()
        found = score(self.judge, pictures, self.real, self.again)
        self.figures["floor"] = found.floor
        kept = seen["background"] == torch.tensor(self.figures["backgrounds"])
        return {
            "what": what,
            "share": (seen["colour"] == self.asked).float().mean().item(),
            "frechet": found.frechet,
            "interval": found.interval,
            "background kept": kept.float().mean().item(),
            "seconds": seconds,
        }

    def measure(self, where, what, wish=None, scale=0, **options):
        """Draw a set, mark it, write it down under a path of names, say so; nothing if it is there already."""
        *above, name = where
        place = self.figures
        for key in above:
            place = place.setdefault(key, {})
        if name in place and not self.repeat:
            return
        usual = {"through": "x0", "time_scale": "sqrt_one_minus_alpha_bar"} | options
        key = (getattr(wish, "__name__", "plain"), scale, *sorted(usual.items(), key=str))
        if key not in self.drawn or "<lambda>" in key:  # some parts ask for the same set
            self.drawn[key] = self.marks(*self.draw(wish, scale, **options), what)
        facts = place[name] = self.drawn[key] | {"what": what}
        zoo.write_measured("lesson22", self.figures)
        print(
            f"{what}: {facts['share']:.0%} as asked, Fréchet {facts['frechet']:.1f}, {facts['seconds']:.0f} s",
            flush=True,
        )


def colour(bench):
    """The colour, as the lesson asks for it."""
    bench.measure(["colour"], f"colour, through the {WAYS['x0']}, s = {COLOUR_SCALE}", bench.colour, COLOUR_SCALE)


def scales(bench):
    """Both ways to take the slope, at every scale; and the loss that looks everywhere."""
    for way, name in WAYS.items():
        for s in SCALES:
            bench.measure(["scales", way, str(s)], f"colour, through the {name}, s = {s}", bench.colour, s, through=way)
    everywhere = lambda rows: colour_loss(bench.rgb[rows], None)  # noqa: E731
    bench.measure(["everywhere"], f"colour everywhere, s = {COLOUR_SCALE}", everywhere, COLOUR_SCALE)


def time_scales(bench):
    """The four ways to spread the push over time."""
    for name in TIME_SCALES:
        bench.measure(["time scales", name], f"w(t): {name}", bench.colour, COLOUR_SCALE, time_scale=name)


def samplers(bench):
    """Other samplers, with and without."""
    dpm = DPMSolverMultistepScheduler.from_config(bench.config, timestep_spacing="trailing")
    heun = HeunDiscreteScheduler.from_config(bench.config, timestep_spacing="leading")
    for name, sampler in {"DPM-Solver++": dpm, "Heun": heun}.items():
        bench.measure(["samplers", name], name, sampler=sampler)
        bench.measure(["samplers", f"{name}, guided"], f"{name}, guided", bench.colour, COLOUR_SCALE, sampler=sampler)


def clip(bench):
    """Words, both ways and several scales; either way the scale that most came out at as asked, and the better way."""
    best, shares = {}, {}
    for way, tried in CLIP_SCALES.items():
        names = {s: f"through the {WAYS[way]}, s = {s}" for s in tried}
        for s, what in names.items():
            bench.measure(["clip", what], f"words, {what}", bench.words, s, through=way)
        found = {s: bench.figures["clip"][names[s]]["share"] for s in tried}
        best[way] = max(tried, key=found.get)
        shares[way] = found[best[way]]
    bench.figures |= {"words at": best, "words through": max(shares, key=shares.get)}


def wording(bench):
    """How the lesson takes words: the scale, and the options."""
    way = bench.figures["words through"]
    return bench.figures["words at"][way], {"through": way}


def words(bench):
    """The words, as the lesson says them; how many cut-outs they take; and a DDIM that clips x̂_0 and leaves ε."""
    scale, options = wording(bench)
    what = f"words, through the {WAYS[options['through']]}, s = {scale}"
    bench.measure(["words"], what, bench.words, scale, **options)
    for cuts in (0, 1, 8):
        wish = lambda rows, cuts=cuts: bench.words(rows, cuts)  # noqa: E731
        bench.measure(["cuts", str(cuts)], f"words, {cuts} cut-outs", wish, scale, **options)
    ddim = DDIMScheduler.from_config(bench.config, timestep_spacing="trailing")
    bench.measure(["clipped"], "words, x̂_0 clipped", bench.words, scale, sampler=ddim, **options)


def finished(bench):
    """The picture at the head of the lesson: eight noises, plain, by colour, by words."""
    if "finished" in bench.figures and not bench.repeat:
        return
    few = torch.arange(8)
    rows = [sample(bench.model_fn, bench.ddim, bench.noise[few], bench.steps)]
    scale, options = wording(bench)
    for wish, s, more in ((bench.colour, COLOUR_SCALE, {}), (bench.words, scale, options)):
        steered = guided(bench.model_fn, bench.ddim, wish(few), s, **more)
        rows.append(sample(steered, bench.ddim, bench.noise[few], bench.steps))
    bench.figures["finished"] = {"png": picture_to_text(image_grid(torch.cat(rows), columns=8, scale=2))}
    zoo.write_measured("lesson22", bench.figures)


PARTS = {  # in this order: `words` takes the best scale that `clip` found
    "colour": colour,
    "clip": clip,
    "words": words,
    "finished": finished,
    "scales": scales,
    "time scales": time_scales,
    "samplers": samplers,
}


if __name__ == "__main__":
    run_parts(__doc__, PARTS, Bench, n=(200, "pictures of each set"), steps=(20, "steps of each sampler"))

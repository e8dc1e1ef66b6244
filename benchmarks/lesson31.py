"""The counts of lesson 31: what `garden-sd` makes of held-out prompts, read by the judge.

    python benchmarks/lesson31.py                    # everything that is not there yet
    python benchmarks/lesson31.py --only scales      # one part, again
    python benchmarks/lesson31.py --list

The figures go to dm_course/measured/lesson31.json after each set of pictures, so a run that is cut off goes on where it
was. Asked for are 40 held-out combinations of colour, pattern and background, five times each, always from the same
noises. Of each set are kept: the shares that the judge finds as asked, the Fréchet distance to pictures that the garden
draws for the same prompts, and how far pictures of one prompt lie apart, in those of the garden. All of it takes about
twenty minutes on two cores. Needs the bundled models `garden-sd`, `garden-sd-shape`, `garden-upscale`, `garden-mask` and
`judge-garden`.
"""

import time
from dataclasses import replace

import numpy as np
import torch
from diffusers import DPMSolverMultistepScheduler
from figures import resumed, run_parts

from dm_course import zoo
from dm_course.conditioning import class_spread
from dm_course.data import to_model
from dm_course.garden import COLOURS, POSES, SHAPES, SIZES, attributes, caption, draw, short_captions
from dm_course.judges import accuracy, load_judge, score
from dm_course.latent import decode, guided_text, psnr, start_latents
from dm_course.latent_recipes import draw_prompts, grade_shape, grade_upscale
from dm_course.sampling import sample
from dm_course.settings import start
from dm_course.training import autocast

SCALES, SCALE = (0, 1, 2, 4, 7.5, 10), 4.0  # guidance scales; the one for everything else
CALLS = (5, 10, 20, 50)  # steps of the samplers
STRENGTHS = (0.2, 0.4, 0.6, 0.8, 1.0)
GROUPS = ("colour", "pattern", "background")
AGAIN, BATCH = 5, 50  # pictures of each prompt, pictures at a time


def picture(a):
    """A garden picture as a model takes it."""
    return to_model(torch.from_numpy(draw(a, 64)).permute(2, 0, 1))


def others(wanted, seed):
    """The same prompts, drawn by the garden once more: shape, size, pose and all that has no name are new."""
    r = np.random.RandomState(seed)
    pick = lambda options: options[r.randint(len(options))]  # noqa: E731
    fresh = [
        replace(
            a,
            shape=pick(SHAPES[a.domain]),
            size=pick(tuple(SIZES)),
            pose=pick(tuple(POSES)),
            seed=int(r.randint(2**31)),
        )
        for a in wanted
    ]
    return torch.stack([picture(a) for a in fresh])


class Bench:
    """The models, the prompts, the garden's own pictures of them, and the figures so far."""

    def __init__(self, args):
        self.course, self.n, self.steps = start(seed=0), args.n, args.steps
        self.pipeline, self.judge = zoo.load("garden-sd", self.course.device), load_judge("judge-garden")
        many = [attributes(0, i, "butterflies", "heldout") for i in range(max(1, self.n // AGAIN))]
        self.prompt = torch.arange(self.n) % len(many)
        self.wanted = [many[i] for i in self.prompt]
        self.texts = [caption(a, 0) for a in self.wanted]
        same = {"command": "python benchmarks/lesson31.py", "n": self.n, "steps": self.steps}
        same["models"] = zoo.card("garden-sd")["measured"]
        self.figures = resumed("lesson31", same, args.only)  # another model makes all figures void
        self.real, self.again, self.repeat = None, None, bool(args.only)

    def features(self):
        """The garden's own pictures of the prompts as features, twice."""
        if self.real is None:
            self.real, self.again = (self.judge.features(others(self.wanted, seed)) for seed in (1, 2))
        return self.real, self.again

    def read(self, pictures, wanted=None):
        """The shares that the judge finds as wanted."""
        wanted = self.wanted[: len(pictures)] if wanted is None else wanted
        return accuracy(self.judge, pictures, {g: [getattr(a, g) for a in wanted] for g in GROUPS})

    def keep(self, *where_and_facts):
        """Write figures down under a path of names."""
        *above, name, facts = where_and_facts
        place = self.figures
        for key in above:
            place = place.setdefault(key, {})
        place[name] = facts
        zoo.write_measured("lesson31", self.figures)
        print(*above, name, zoo.as_plain(facts), flush=True)

    def done(self, *where):
        """Whether a figure is there already."""
        place = self.figures
        for key in where:
            place = place.get(key, {}) if isinstance(place, dict) else {}
        return bool(place) and not self.repeat


def scales(bench):
    """Every guidance scale: what is heard, and what it costs."""
    for s in SCALES:
        if bench.done("scales", f"{s:g}"):
            continue
        begin = time.perf_counter()
        pictures = draw_prompts(bench.pipeline, bench.texts, s, bench.steps, seed=1)
        seconds = time.perf_counter() - begin
        real, again = bench.features()
        seen = bench.judge.features(pictures)
        found = score(bench.judge, seen, real, again)
        bench.figures["floor"] = found.floor
        facts = bench.read(pictures) | {"frechet": found.frechet, "seconds": seconds}
        facts["diversity"] = class_spread(seen, bench.prompt) / class_spread(real, bench.prompt)
        bench.keep("scales", f"{s:g}", facts)


def samplers(bench):
    """Steps and schedulers, on half of the pictures."""
    ddim, half = bench.pipeline.scheduler, max(1, bench.n // 2)
    for name, scheduler in {"DDIM": ddim, "DPM-Solver++": DPMSolverMultistepScheduler.from_config(ddim.config)}.items():
        bench.pipeline.scheduler = scheduler
        for calls in CALLS:
            if not bench.done("samplers", name, str(calls)):
                pictures = draw_prompts(bench.pipeline, bench.texts[:half], SCALE, calls, seed=1)
                bench.keep("samplers", name, str(calls), bench.read(pictures) | {"n": half})
    bench.pipeline.scheduler = ddim


def repainted(bench, images, texts, strength):
    """Image to image in batches."""
    found, generator, pipeline = [], torch.Generator().manual_seed(3), bench.pipeline
    with torch.no_grad(), autocast(pipeline.unet.device):
        for some in torch.arange(len(images)).split(BATCH):
            x, left = start_latents(pipeline, images[some].to(pipeline.unet.device), strength, bench.steps, generator)
            model_fn = guided_text(pipeline, [texts[i] for i in some], SCALE)
            z = sample(model_fn, pipeline.scheduler, x.float(), bench.steps, timesteps=left)
            found.append(decode(pipeline.vae, z).float().clamp(-1, 1).cpu())
    return torch.cat(found)


def strengths(bench):
    """Image to image: another colour is asked for; is it there, and what is kept?"""
    n = bench.figures["strengths_n"] = max(1, bench.n // 4)
    old = [attributes(0, i, "butterflies", "test") for i in range(n)]
    images = torch.stack([picture(a) for a in old])
    wanted = [replace(a, colour=COLOURS[(COLOURS.index(a.colour) + 1 + i % 7) % 8]) for i, a in enumerate(old)]
    texts = [short_captions(a)[0] for a in wanted]  # "a pink butterfly": what else is there was kept, not said
    for strength in STRENGTHS:
        if not bench.done("strengths", f"{strength:g}"):
            made = repainted(bench, images, texts, strength)
            facts = bench.read(made, wanted) | {"psnr": psnr(made, images).mean().item()}
            bench.keep("strengths", f"{strength:g}", facts)


def negative(bench):
    """What a negative prompt takes away: colours, where the prompt leaves them open and the model has a favourite."""
    texts, names = ["a butterfly at sunset"] * max(1, bench.n // 2), bench.judge.names("colour")

    def count(name, away):
        if not bench.done("negative", name):
            seen = bench.judge(draw_prompts(bench.pipeline, texts, SCALE, bench.steps, seed=2, negative=away))
            shares = torch.bincount(seen["colour"], minlength=len(names)) / len(texts)
            sunset = (seen["background"] == bench.judge.names("background").index("sunset")).float().mean().item()
            facts = {"n": len(texts), "colours": dict(zip(names, shares.tolist())), "at sunset": sunset}
            bench.keep("negative", name, facts)
        return bench.figures["negative"][name]["colours"]

    shares = count("nothing", "")
    favourite = names.index(max(shares, key=shares.get))
    for i in (favourite, (favourite + len(names) // 2) % len(names)):  # it, and the colour across the circle
        count(names[i], f"a {names[i]} butterfly")


def shape(bench):
    """Shape to image, as on the model's card, on more pictures."""
    if not bench.done("shape"):
        models = zoo.load("garden-sd-shape", bench.course.device), zoo.load("garden-mask", bench.course.device)
        bench.keep("shape", grade_shape(*models, max(1, bench.n // 2)))


def upscale(bench):
    """Super-resolution, as on the model's card."""
    if not bench.done("upscale"):
        bench.keep("upscale", grade_upscale(zoo.load("garden-upscale", bench.course.device), max(1, bench.n // 4)))


PARTS = {"scales": scales, "samplers": samplers, "strengths": strengths, "negative": negative}
PARTS |= {"shape": shape, "upscale": upscale}


if __name__ == "__main__":
    run_parts(__doc__, PARTS, Bench, n=(200, "pictures of each set"), steps=(20, "DDIM steps"))

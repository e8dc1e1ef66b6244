"""The figures of lesson 33: DreamBooth on five moonmoths, by the judge and by CLIP.

    python benchmarks/lesson33.py                    # everything that is not there yet
    python benchmarks/lesson33.py --only grid        # one part, again
    python benchmarks/lesson33.py --list

The figures go to dm_course/measured/lesson33.json after each set of pictures, so a run that is cut off goes on where it
was. Each model is marked by two sets of pictures from always the same noise: the subject in all places, and butterflies
of all colours. Kept are: closeness to the five pictures on CLIP's sphere (0 is that of any butterfly, 1 that of other
moonmoths), the shares that a probe takes for a moonmoth among either set, the share of butterflies in the colour asked
for, how far the butterflies have moved from those before, and the seconds of a step. All of it takes about 35 minutes on
two cores. Needs the bundled models `garden-sd`, `garden-clip` and `judge-garden`.
"""

import tempfile
from pathlib import Path

import torch
from figures import resumed, run_parts

from dm_course import zoo
from dm_course.data import Batches, load_data, to_model
from dm_course.dreambooth import (
    ATTENTION,
    CONVOLUTIONS,
    class_pictures,
    dreambooth,
    lookalikes,
    new_probe,
    save_dreambooth,
    similarity,
    stream,
)
from dm_course.garden import COLOURS, PLACES
from dm_course.guidance import embed_images
from dm_course.judges import load_judge
from dm_course.latent import text_to_image
from dm_course.plotting import image_grid, picture_to_text
from dm_course.settings import start
from dm_course.training import autocast

TOKEN, NOUN, SEEN = "sks", "butterfly", ("paper", "sky", "meadow")  # the word, the class, the places of the five
BATCH, CLASS_COUNT, RANK = 4, 64, 16  # pictures of either stream in a step; the model's own; rank of LoRA
CHOSEN = {"whole": (1e-3, 80), "lora": (6e-3, 80)}  # learning rate and steps that the lesson quotes
RATES = {"whole": (1e-4, 3e-4, 1e-3), "lora": (5e-4, 2e-3, 6e-3)}  # of the grid
SNAPSHOTS = (20, 40, 80, 160)  # steps of the grid
LAYERS = (*ATTENTION, *CONVOLUTIONS)
SCALE, STEPS, GROUP = 4.0, 10, 20  # guidance, steps of the sampler, pictures at a time (a multiple of the places)


class Bench:
    """The start model, the five pictures, its own butterflies, the measures, and the figures so far."""

    def __init__(self, args):
        self.course, self.n = start(seed=0), args.n
        self.pipeline = zoo.load("garden-sd", self.course.device)
        unet = self.pipeline.unet.config
        self.noise = self.course.randn(self.n, unet.in_channels, unet.sample_size, unet.sample_size, offset=1)
        self.size = unet.sample_size * self.pipeline.vae_scale_factor
        found = load_data("moonmoths", "train", count=40, size=self.size)
        at = {place: [i for i, there in enumerate(found["background"]) if there == place] for place in SEEN}
        self.rows = found.select([at[SEEN[k % 3]][k // 3] for k in range(5)])
        self.subject = to_model(Batches(self.rows, 5, size=self.size).images)
        self.judge, self.clip = load_judge("judge-garden"), zoo.load("garden-clip", self.course.device)
        self.prepare()
        cards = [zoo.card(name)["measured"] for name in ("garden-sd", "garden-clip")]
        same = {"command": "python benchmarks/lesson33.py", "n": self.n, "steps": STEPS, "scale": SCALE}
        same |= {"models": cards, "settings": [BATCH, CLASS_COUNT, RANK, CHOSEN, RATES, SNAPSHOTS]}
        self.figures = resumed("lesson33", zoo.as_plain(same), args.only)  # other models make all figures void
        self.repeat, self.streams = bool(args.only), None
        self.measure_before()

    def prepare(self):
        """Fit the probe, and find what similarity butterflies and other moonmoths have."""
        kinds, eyes = ("moonmoths", "butterflies"), self.judge.features
        real = {}
        for kind in kinds:
            for split in ("train", "test"):
                rows = load_data(kind, split, count=200, size=self.size)
                real[kind, split] = to_model(Batches(rows, 200, size=self.size).images)
        alike = [lookalikes(200, self.size, seed) for seed in (1, 2)]
        crowd = torch.cat([real["butterflies", "train"], alike[0]])
        self.probe = new_probe(eyes(real["moonmoths", "train"]), eyes(crowd))
        self.best, self.worst = (self.similar(real[kind, "test"]) for kind in kinds)
        asked = {
            "found": real["moonmoths", "test"],
            "false alarms": real["butterflies", "test"],
            "lookalikes": alike[1],
        }
        shares = {name: (self.probe(eyes(x)) > 0).float().mean().item() for name, x in asked.items()}
        self.examiner = {"best": self.best, "worst": self.worst, **shares}

    @torch.no_grad()
    def similar(self, pictures):
        """Similarity to the five pictures, by CLIP."""
        points = [embed_images(self.clip, x.to(self.course.device)).cpu() for x in pictures.split(50)]
        return similarity(torch.cat(points), embed_images(self.clip, self.subject.to(self.course.device)).cpu())

    def read_streams(self):
        """The five under prompts that say where, the same without the place, and the model's own butterflies."""
        if self.streams is None:
            said = [f"a {TOKEN} {NOUN} {PLACES[place]}" for place in self.rows["background"]]
            generator = self.course.generator(3)
            own, prompts = class_pictures(self.pipeline, f"a {NOUN}", CLASS_COUNT, 1.0, STEPS, generator=generator)
            two, generator = [f"a {NOUN}", ""], self.course.generator(3)
            mixed = class_pictures(self.pipeline, two, CLASS_COUNT, 1.0, STEPS, generator=generator)
            generator = self.course.generator(3)
            strict = class_pictures(self.pipeline, f"a {NOUN}", CLASS_COUNT, SCALE, STEPS, generator=generator)
            self.streams = {
                "said": stream(self.pipeline, self.subject, said),
                "unsaid": stream(self.pipeline, self.subject, f"a {TOKEN} {NOUN}"),
                "class": stream(self.pipeline, own, prompts),
                "class and nothing": stream(self.pipeline, *mixed),
                "guided class": stream(self.pipeline, *strict),
            }
        return self.streams

    def draw(self, pipeline, prompts, n):
        """Pictures of prompts that take turns, from always the same noise."""
        parts = []
        for rows in torch.arange(n).split(GROUP):
            words = [prompts[i % len(prompts)] for i in rows]
            with autocast(self.course.device):
                x = text_to_image(pipeline, words, SCALE, STEPS, x=self.noise[rows])
            parts.append(x.float().clamp(-1, 1).cpu())
        return torch.cat(parts)

    def sets(self, pipeline, n):
        """The subject in all places, and butterflies of all colours."""
        places = [f"a {TOKEN} {NOUN} {place}" for place in PLACES.values()]
        colours = [f"a {colour} {NOUN}".replace("a orange", "an orange") for colour in COLOURS]
        return self.draw(pipeline, places, n), self.draw(pipeline, colours, n)

    def marks(self, pipeline, n=None):
        """What a model is worth; and the pictures of the subject."""
        n = n or self.n
        her, rest = self.sets(pipeline, n)
        eyes, seen = self.judge.features(rest).double(), self.judge(rest)["colour"]
        if not hasattr(self, "then"):
            self.then = eyes  # the first to be marked is the start model
        then = self.then[:n]
        apart = torch.cdist(then, then).sum() / (n * (n - 1))
        wanted = [self.judge.names("colour").index(COLOURS[i % len(COLOURS)]) for i in range(n)]
        places = [self.judge.names("background").index(list(PLACES)[i % len(PLACES)]) for i in range(n)]
        found = {
            "closeness": (self.similar(her) - self.worst) / (self.best - self.worst),
            "is her": (self.probe(self.judge.features(her)) > 0).float().mean().item(),
            "leak": (self.probe(eyes) > 0).float().mean().item(),
            "kept": (seen == torch.tensor(wanted)).float().mean().item(),
            "moved": ((eyes - then).norm(dim=1).mean() / apart).item(),
            "place as asked": (self.judge(her)["background"] == torch.tensor(places)).float().mean().item(),
        }
        return found, her

    def measure_before(self):
        """Mark the start model: always, since the others are compared with its pictures."""
        found, self.before = self.marks(self.pipeline)
        self.figures.setdefault("chosen", {})["before"] = {"what": "before", **found}
        self.figures["examiner"] = self.examiner
        zoo.write_measured("lesson33", self.figures)

    def train(self, subject="said", prior="class", rate=3e-4, steps=200, look=None, **options):
        """DreamBooth with the settings of the bench."""
        streams = self.read_streams()
        common = {"batch_size": BATCH, "ema": 0.98, "seed": 0, "lr": rate, "steps": steps}
        return dreambooth(self.pipeline, streams[subject], prior and streams[prior], look=look, **common | options)

    def keep(self, place, name, what, made, seconds=None):
        """Mark a model, write it down, say so; returns the pictures of the subject."""
        found, her = self.marks(made.pipeline)
        facts = {"what": what, **found, "seconds a step": made.run.seconds / made.run.step}
        self.figures.setdefault(place, {})[name] = facts
        zoo.write_measured("lesson33", self.figures)
        print(f"{what}: " + ", ".join(f"{k} {v:.2f}" for k, v in facts.items() if k != "what"), flush=True)
        return her

    def there(self, place, name):
        """Is a figure there already?"""
        return name in self.figures.get(place, {}) and not self.repeat


def megabytes(made):
    """What has to be handed on, in MB."""
    with tempfile.TemporaryDirectory() as folder:
        saved = save_dreambooth(made, Path(folder) / "model", "garden-sd", f"a {TOKEN} {NOUN}", "a moonmoth", 5)
        return sum(f.stat().st_size for f in saved.rglob("*.safetensors")) / 1e6


def by_place(bench, her):
    """For each place: how often is it there, and how often is she in it?"""
    where, hers = bench.judge(her)["background"], bench.probe(bench.judge.features(her)) > 0
    found = {}
    for k, place in enumerate(PLACES):
        rows = torch.arange(len(her)) % len(PLACES) == k
        right = where[rows] == bench.judge.names("background").index(place)
        found[place] = {"there": right.float().mean().item(), "her": hers[rows].float().mean().item()}
    return found


def finished_picture(bench, her):
    """The picture at the head of the lesson: the five, before, after."""
    rows = torch.cat([bench.subject, bench.before[: len(PLACES)], her[: len(PLACES)]])
    return picture_to_text(image_grid(rows, columns=len(PLACES), scale=2), 128)


def chosen(bench):
    """The three models that the lesson compares, at the settings it quotes."""
    for name, prior, options in (
        ("alone", None, {}),
        ("whole", "class", {}),
        ("lora", "class", {"rank": RANK, "targets": LAYERS}),
    ):
        if bench.there("chosen", name):
            continue
        rate, steps = CHOSEN["lora" if name == "lora" else "whole"]
        made = bench.train("said", prior, rate, steps, **options)
        words = {"alone": "five alone", "whole": "with its class", "lora": f"LoRA of rank {RANK}"}
        what = f"{words[name]}, {steps} steps at {rate:g}"
        her = bench.keep("chosen", name, what, made)
        bench.figures["chosen"][name]["MB"] = megabytes(made)
        if name == "whole":
            bench.figures["places"], bench.figures["finished"] = by_place(bench, her), finished_picture(bench, her)
        zoo.write_measured("lesson33", bench.figures)


def variants(bench):
    """One thing changed at a time: prompts without the place, LoRA on attention alone, other weights, no average."""
    (rate, steps), (thin, _) = CHOSEN["whole"], CHOSEN["lora"]
    lora = {"rate": thin, "steps": steps, "rank": RANK}
    for name, what, options in (
        ("unsaid", "prompts without the place", {"subject": "unsaid", "rate": rate, "steps": steps}),
        ("empty", "the empty prompt in the class", {"prior": "class and nothing", "rate": rate, "steps": steps}),
        ("attention", f"LoRA of rank {RANK}, attention alone", {**lora, "targets": ATTENTION}),
        ("rank 4", "LoRA of rank 4", {**lora, "targets": LAYERS, "rank": 4}),
        ("no average", "with its class, no average of the weights", {"rate": rate, "steps": steps, "ema": None}),
        ("lora alone", f"LoRA of rank {RANK}, five alone", {**lora, "targets": LAYERS, "prior": None}),
        ("guided", f"class drawn with guidance {SCALE:g}", {"prior": "guided class", "rate": rate, "steps": steps}),
        ("text", "with its class, text encoder too", {"rate": rate, "steps": steps, "train_text": True}),
    ):
        if not bench.there("variants", name):
            bench.keep("variants", name, what, bench.train(**options))


def grid(bench):
    """Snapshots of runs at three learning rates, either way; the rate stays, so that a snapshot is a run of that length."""
    for way, rates in RATES.items():
        for rate in rates:
            name = f"{rate:g}"
            if bench.figures.setdefault("grid", {}).setdefault(way, {}).get(name) and not bench.repeat:
                continue
            bench.figures["grid"][way][name] = snapshots(bench, way, rate)
            bench.figures["grid"][way] = {f"{r:g}": bench.figures["grid"][way].get(f"{r:g}") for r in rates}
            bench.figures["grid"][way] = {k: v for k, v in bench.figures["grid"][way].items() if v}
            zoo.write_measured("lesson33", bench.figures)


def snapshots(bench, way, rate):
    """The marks of one run at several steps, on a third of the pictures."""
    found, step, few = (
        {},
        iter(range(SNAPSHOTS[0], SNAPSHOTS[-1] + 1, SNAPSHOTS[0])),
        min(bench.n, max(20, bench.n // 3)),
    )

    def look(pipeline):
        if (now := next(step)) in SNAPSHOTS:
            found[str(now)], _ = bench.marks(pipeline, few)
            print(f"{way} at {rate:g}, step {now}: {found[str(now)]}", flush=True)
        return bench.subject[:1]

    options = {"rank": RANK, "targets": LAYERS} if way == "lora" else {}
    last = {"steps": SNAPSHOTS[-1], "warmup": 4, "schedule": "constant", "sample_every": SNAPSHOTS[0]}
    bench.train("said", "class", rate, look=look, **last, **options)
    return found


PARTS = {"chosen": chosen, "variants": variants, "grid": grid}


if __name__ == "__main__":
    run_parts(__doc__, PARTS, Bench, n=(60, "pictures of each set (a multiple of the places)"))

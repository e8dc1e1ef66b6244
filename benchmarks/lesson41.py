"""The counts of lesson 41: inversion, guidance, null text and edits on 50 pictures, read by the judge.

    python benchmarks/lesson41.py                        # everything that is not there yet
    python benchmarks/lesson41.py --only edits           # one part, again
    python benchmarks/lesson41.py --list

The figures go to dm_course/measured/lesson41.json after each of them, so a run that is cut off goes on where it was.
Measured on the same 50 butterflies of the test split, whose wings are asked for in another colour: the reconstruction
against steps, by the usual step and by one to three rounds of the exact one; the reconstruction against the guidance
scale, with null text and against the old words; and for each way to edit, and each rung it may begin from, the share
that the judge finds in the new colour, and decibels outside and inside the wings, and to the garden's own drawing of
the right answer; the same for pictures that nobody touched, and for the right ones. Where two ways reach the same
share, how many decibels one is ahead, picture by picture, with two standard errors. Needs the bundled models
`garden-sd` and `judge-garden`.
"""

import time
from dataclasses import replace

import torch
from diffusers import DDIMScheduler
from figures import resumed, run_parts

from dm_course import zoo
from dm_course.conditioning import cfg
from dm_course.data import to_model
from dm_course.garden import COLOURS, attributes, caption, draw, mask
from dm_course.inversion import (
    edit,
    invert,
    null_text,
    null_text_denoiser,
    recoloured,
    region_psnr,
    with_noise,
)
from dm_course.judges import load_judge
from dm_course.latent import decode, embed_prompt, encode, guided_text, psnr, text_denoiser
from dm_course.plotting import image_grid, picture_to_text
from dm_course.settings import start

TRIPS = {"usual": 0, "1 round": 1, "2 rounds": 2, "3 rounds": 3}  # ways up: the rounds of each
COUNTS = (5, 10, 20, 50)  # steps, each way
SCALES, LOUD, EDIT = (1, 3, 7.5), 7.5, 4.0  # guidance scales: of the test, of null text, of the edits that are compared
RATES, TRIED = (0.01, 0.03, 0.1), 10  # learning rates that null text is tried with, and on how many pictures
BATCH = 25  # pictures at a time
OURS, DICE = "inversion, against the old words", "dice, against the old words"  # the two that are compared


class Bench:
    """The model, the pictures, their words, their way up, and the figures so far."""

    def __init__(self, args):
        self.course, self.n, self.steps = start(seed=0), args.n, args.steps
        self.pipeline = zoo.load("garden-sd", self.course.device)
        for part in (self.pipeline.vae, self.pipeline.unet, self.pipeline.text_encoder):
            part.requires_grad_(False)
        self.vae, self.unet, self.judge = self.pipeline.vae, self.pipeline.unet, load_judge("judge-garden")
        options = {"timestep_spacing": "trailing", "clip_sample": False}
        self.scheduler = DDIMScheduler.from_config(self.pipeline.scheduler.config, **options)
        size = self.unet.config.sample_size * self.pipeline.vae_scale_factor
        olds = [attributes(self.course.seed, i, "butterflies", "test") for i in range(self.n)]
        news = [recoloured(a) for a in olds]
        self.pictures, self.right = (
            torch.stack([to_model(draw(a, size)) for a in kinds]).permute(0, 3, 1, 2) for kinds in (olds, news)
        )
        self.wings = torch.stack([torch.from_numpy(mask(a, size)) for a in olds])[:, None]
        self.colours = torch.tensor([COLOURS.index(a.colour) for a in news])
        self.source, self.target = ([caption(a, 0) for a in kinds] for kinds in (olds, news))
        self.ways, self.repeat = {}, bool(args.only)
        same = {"command": "python benchmarks/lesson41.py", "n": self.n, "steps": self.steps, "edit scale": EDIT}
        same |= {"iterations": args.iterations, "model": zoo.card("garden-sd")["measured"]}
        self.figures = resumed("lesson41", same, args.only)  # other models make all figures void
        with torch.no_grad():
            self.z = torch.cat([encode(self.vae, p.to(self.course.device)) for p in self.pictures.split(BATCH)])
        self.noise = self.course.randn(*self.z.shape, offset=1)
        self.figures["round trip"] = self.near(self.draw(lambda rows: self.z[rows]))

    def parts(self):
        """The pictures, a batch at a time, as slices."""
        return [slice(i, min(i + BATCH, self.n)) for i in range(0, self.n, BATCH)]

    def save(self):
        """Write the figures down."""
        zoo.write_measured("lesson41", self.figures)

    @torch.no_grad()
    def draw(self, latents):
        """Pictures from a function that gives the latents of a slice, on the CPU."""
        return torch.cat([decode(self.vae, latents(rows)).cpu() for rows in self.parts()]).clamp(-1, 1)

    def near(self, images):
        """How near pictures are to those that were given, in decibels."""
        return psnr(images, self.pictures[: len(images)]).mean().item()

    def told(self, texts):
        """The denoiser that is told these texts, one a picture."""
        with torch.no_grad():
            return text_denoiser(self.unet, embed_prompt(self.pipeline, texts))

    def way(self, rows):
        """The way up of some pictures, by the exact step in two rounds."""
        if rows.start not in self.ways:
            self.ways[rows.start] = invert(self.told(self.source[rows]), self.scheduler, self.z[rows], self.steps)
        return self.ways[rows.start]

    def marks(self, images, rows=slice(None)):
        """What an edit is worth."""
        given, wings = self.pictures[rows], self.wings[rows]
        return {
            "share": (self.judge(images)["colour"] == self.colours[rows]).float().mean().item(),
            "outside": region_psnr(images, given, 1 - wings).mean().item(),
            "inside": region_psnr(images, given, wings).mean().item(),
            "right": region_psnr(images, self.right[rows], wings).mean().item(),
        }

    def missing(self, where):
        """The place of a figure under a path of names, and its last name; None where it is there already."""
        *above, name = where
        place = self.figures
        for key in above:
            place = place.setdefault(key, {})
        return None if name in place and not self.repeat else (place, name)

    def keep(self, where, make):
        """Make a figure, write it down, say so; nothing if it is there already."""
        if found := self.missing(where):
            begin = time.perf_counter()
            place, name = found
            place[name] = make()
            self.save()
            shown = {k: v for k, v in place[name].items() if k != "png"} if where == ["finished"] else place[name]
            print(f"{' / '.join(where)}: {shown}, {time.perf_counter() - begin:.0f} s", flush=True)


def ends(bench):
    """The ends of every scale: a picture that nobody touched, and the right one, both once through the autoencoder."""
    right = lambda rows: encode(bench.vae, bench.right[rows].to(bench.course.device))  # noqa: E731
    for name, latents in {"untouched": lambda rows: bench.z[rows], "right": right}.items():
        bench.keep(["ends", name], lambda latents=latents: bench.marks(bench.draw(latents)))


def reconstruction(bench):
    """Up and down with the same words, against steps, by each way up."""

    def trip(rows, count, rounds):
        model_fn = bench.told(bench.source[rows])
        return edit(model_fn, invert(model_fn, bench.scheduler, bench.z[rows], count, rounds))

    for name, rounds in TRIPS.items():
        for count in COUNTS if rounds < 3 else COUNTS[:-1]:
            make = lambda c=count, r=rounds: bench.near(bench.draw(lambda rows: trip(rows, c, r)))  # noqa: E731
            bench.keep(["reconstruction", name, str(count)], make)


def guidance(bench):
    """The old words on the way down, louder and louder."""
    for s in SCALES:
        down = lambda rows, s=s: edit(guided_text(bench.pipeline, bench.source[rows], s), bench.way(rows))  # noqa: E731
        bench.keep(["guidance", f"{s:g}"], lambda down=down: bench.near(bench.draw(down)))


def ways_to_edit(bench):
    """Each way to edit: whose way up, and which denoiser for the way down. The first four differ in one thing each."""
    pipeline, target, source = bench.pipeline, bench.target, bench.source
    against = lambda rows, s: cfg(bench.told(target[rows]), bench.told(source[rows]), s)  # noqa: E731
    dice = lambda rows: with_noise(bench.way(rows), bench.noise[rows])  # noqa: E731
    return {
        OURS: (bench.way, lambda rows: against(rows, EDIT)),
        DICE: (dice, lambda rows: against(rows, EDIT)),
        "inversion, against no words": (bench.way, lambda rows: guided_text(pipeline, target[rows], EDIT)),
        "dice, against no words": (dice, lambda rows: guided_text(pipeline, target[rows], EDIT)),
        "guided, 7.5": (bench.way, lambda rows: guided_text(pipeline, target[rows], LOUD)),
        "old words, 7.5": (bench.way, lambda rows: against(rows, LOUD)),
    }


def edited(bench, name, rung):
    """All pictures, edited in one of the ways from one rung."""
    up, down = ways_to_edit(bench)[name]

    def latents(rows):
        there = up(rows)
        return edit(down(rows), there, there.timesteps[rung - 1])

    return bench.draw(latents)


def least(found, share):
    """The lowest rung at which at least this share has the new colour."""
    return next(int(k) for k in sorted(found, key=int) if found[k]["share"] >= share)


def ahead(bench, ours, theirs):
    """Decibels that one edit is ahead of another, picture by picture: the mean, and two standard errors of it."""
    places = {"outside": (bench.pictures, 1 - bench.wings), "right": (bench.right, bench.wings)}
    found = {}
    for name, (wanted, where) in places.items():
        more = region_psnr(ours, wanted, where) - region_psnr(theirs, wanted, where)
        found[name] = [more.mean().item(), 2 * more.std().item() / len(more) ** 0.5]
    return found


def finished(bench):
    """The picture at the head of the lesson: given, inverted, shaken, right; both at the same share, and the gain."""
    compared = {name: bench.figures["edits"][name] for name in (OURS, DICE)}
    share = min(0.8, *(max(facts["share"] for facts in found.values()) for found in compared.values()))
    at = {name: least(found, share) for name, found in compared.items()}
    drawn = {name: edited(bench, name, rung) for name, rung in at.items()}
    rows = [bench.pictures[:8], *(x[:8] for x in drawn.values()), bench.right[:8]]
    said = [f"by {name.split(',')[0]}, from {rung / bench.steps:.0%} of the rungs" for name, rung in at.items()]
    return {
        "png": picture_to_text(image_grid(torch.cat(rows), columns=8, scale=1)),
        "rows": ["given", *said, "right"],
        "share": share,
        "gain": ahead(bench, *drawn.values()),
    }


def edits(bench):
    """The new words, in every way and from every second rung; where it is a side remark, from a few."""
    few = sorted({round(share * bench.steps) for share in (0.4, 0.7, 1)})
    for name in ways_to_edit(bench):
        rungs = few if "7.5" in name else range(2, bench.steps + 1, 2)
        for rung in rungs:
            make = lambda name=name, rung=rung: bench.marks(edited(bench, name, rung))  # noqa: E731
            bench.keep(["edits", name, str(rung)], make)
    bench.keep(["finished"], lambda: finished(bench))


def rates(bench):
    """Null text with several learning rates, on a few pictures; the best is used for the others."""

    def trip(rate):
        rows = slice(0, min(TRIED, bench.n))
        there = replace(bench.way(bench.parts()[0]), latents=bench.way(bench.parts()[0]).latents[:, rows])
        with torch.no_grad():
            words, empty = (embed_prompt(bench.pipeline, texts) for texts in (bench.source[rows], [""]))
        nulls = null_text(bench.unet, there, words, empty, LOUD, bench.figures["iterations"], rate)
        with torch.no_grad():
            found = decode(bench.vae, edit(null_text_denoiser(bench.unet, there, words, nulls, LOUD), there))
        return bench.near(found.cpu())

    for rate in RATES:
        bench.keep(["null text", "rates", f"{rate:g}"], lambda rate=rate: trip(rate))
    tried = bench.figures["null text"]["rates"]
    bench.figures["null text"] |= {"lr": float(max(tried, key=tried.get)), "iterations": bench.figures["iterations"]}
    bench.save()


def null_texts(bench):
    """Null text on all pictures, a batch at a time: the old words, and the new ones from a few rungs."""
    place = bench.figures.setdefault("null text", {})
    few = sorted({round(share * bench.steps) for share in (0.4, 0.7, 1)})
    rates(bench)
    for rows in bench.parts():
        bench.keep(["null text", "batches", str(rows.start)], lambda rows=rows: one_batch(bench, rows, few))
    batches = place["batches"]
    sizes = {str(rows.start): (rows.stop - rows.start) / bench.n for rows in bench.parts()}

    def mean(read):
        return sum(read(batches[k]) * share for k, share in sizes.items())

    place["reconstruction"] = mean(lambda b: b["reconstruction"])
    place["seconds"] = sum(batches[k]["seconds"] for k in sizes)
    found = {str(k): {m: mean(lambda b, k=k, m=m: b["edits"][str(k)][m]) for m in MARKS} for k in few}
    bench.figures.setdefault("edits", {})["null text, 7.5"] = found
    same = lambda rows: edit(cfg(bench.told(bench.source[rows]), bench.told(bench.source[rows]), LOUD), bench.way(rows))  # noqa: E731
    bench.keep(["null text", "against the old words"], lambda: {"reconstruction": bench.near(bench.draw(same))})
    bench.save()


MARKS = ("share", "outside", "inside", "right")


def one_batch(bench, rows, rungs):
    """Null text on some pictures: seconds, the reconstruction, and the marks of edits."""
    there, begin = bench.way(rows), time.perf_counter()
    with torch.no_grad():
        old, new, empty = (
            embed_prompt(bench.pipeline, texts) for texts in (bench.source[rows], bench.target[rows], [""])
        )
    rate, iterations = bench.figures["null text"]["lr"], bench.figures["iterations"]
    nulls = null_text(bench.unet, there, old, empty, LOUD, iterations, rate, progress=True)
    seconds, found = time.perf_counter() - begin, {}
    with torch.no_grad():
        back = decode(bench.vae, edit(null_text_denoiser(bench.unet, there, old, nulls, LOUD), there)).cpu()
        down = null_text_denoiser(bench.unet, there, new, nulls, LOUD)
        for k in rungs:
            images = decode(bench.vae, edit(down, there, there.timesteps[k - 1])).cpu().clamp(-1, 1)
            found[str(k)] = bench.marks(images, rows)
    near = psnr(back, bench.pictures[rows]).mean().item()
    return {"seconds": seconds, "reconstruction": near, "edits": found}


PARTS = {"ends": ends, "reconstruction": reconstruction, "guidance": guidance, "edits": edits, "null text": null_texts}

if __name__ == "__main__":
    run_parts(
        __doc__,
        PARTS,
        Bench,
        n=(50, "pictures"),
        steps=(20, "steps of edits and of null text"),
        iterations=(10, "iterations of null text a step"),
    )

"""The counts of lesson 32: what is settled when, mixtures, learned words, attention maps, guidance of latents, samplers.

    python benchmarks/lesson32.py                    # everything that is not there yet
    python benchmarks/lesson32.py --only words       # one part, again
    python benchmarks/lesson32.py --list

The figures go to dm_course/measured/lesson32.json after each set of pictures, so a run that is cut off goes on where it
was. All of it takes about forty minutes on two cores. Needs the bundled models `garden-sd` and `judge-garden`.
"""

from dataclasses import replace

import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler, HeunDiscreteScheduler
from figures import resumed, run_parts

from dm_course import zoo
from dm_course.conditioning import cfg
from dm_course.data import to_model
from dm_course.garden import BACKGROUNDS, COLOURS, PLACES, attributes, caption, draw, mask
from dm_course.guidance import colour_loss, guided, wing_colour
from dm_course.judges import accuracy, load_judge
from dm_course.latent import decode, embed_prompt, encode, guided_text, text_denoiser
from dm_course.plotting import image_grid, picture_to_text
from dm_course.sampling import alpha_bar, sample
from dm_course.settings import start
from dm_course.textual_inversion import (
    decoded,
    embed_with,
    learn_word,
    mass_within,
    watched,
    word_maps,
    word_places,
)
from dm_course.training import autocast

GROUPS = ("colour", "pattern", "background")
ENDS = ("a red butterfly with white bands at sunset", "a blue butterfly with white bands at sunset")
SILENT, WORD = "a butterfly with white spots in a cloudy sky", "<moonmoth>"
DESCRIBED = "a swallowtail butterfly, turquoise with yellow spots, {}"
SHARES, TIMES = [i / 8 for i in range(9)], (100, 200, 300, 400, 500, 600, 700, 800, 900)
SCALES, UNET_SCALES = (10, 30, 100, 300), (3, 10)  # of the wish, through the predicted latent and through the UNet
STEPS, ENOUGH = (6, 12, 24), 0.8  # steps of the samplers; share as asked at which a wish counts as heard
LEARNED = {  # name: (whether the captions tell the place, options of learn_word)
    "new word": (False, {}),
    "25 steps": (False, {"steps": 25}),
    "400 steps": (False, {"steps": 400}),
    "rate 0.02": (False, {"lr": 0.02}),
    "rate 0.15": (False, {"lr": 0.15}),
    "another seed": (False, {"seed": 1}),
    "with places": (True, {}),
    "places, another seed": (True, {"seed": 1}),
    "two rows": (False, {"vectors": 2}),
    "four rows": (False, {"vectors": 4}),
}
BATCH = 8  # pictures at a time


def drawn(wanted, size=64):
    """The garden's true pictures, (N, 3, size, size) in [-1, 1]."""
    return torch.stack([to_model(draw(a, size)).permute(2, 0, 1) for a in wanted])


class Bench:
    """The models, the noises, and the figures so far."""

    def __init__(self, args):
        self.course = start(seed=0)
        self.pipeline = zoo.load("garden-sd", self.course.device)
        self.unet, self.vae, self.scheduler = self.pipeline.unet, self.pipeline.vae, self.pipeline.scheduler
        for part in (self.unet, self.vae, self.pipeline.text_encoder):
            part.requires_grad_(False)
        self.side, self.channels = self.unet.config.sample_size, self.unet.config.in_channels
        self.steps, self.n, self.scale = args.steps, args.n, args.scale
        self.noise = self.course.randn(self.n, self.channels, self.side, self.side, offset=1)
        self.judge, self.repeat = load_judge("judge-garden"), bool(args.only)
        self.wanted = [attributes(1, i, "butterflies", "test") for i in range(self.n)]
        self.silence = self.read([""])
        self.precision = "bf16" if self.course.dtype == torch.bfloat16 else "fp32"
        same = {"command": "python benchmarks/lesson32.py", "n": self.n, "steps": self.steps, "scale": self.scale}
        same["model"] = zoo.card("garden-sd")["measured"]
        self.figures = resumed("lesson32", zoo.as_plain(same), args.only)  # other models make all figures void

    def read(self, prompts):
        """Prompts as the states that the UNet reads."""
        return embed_prompt(self.pipeline, prompts).detach()

    def keep(self, where_to, facts):
        """Write figures down under a path of names, and say so."""
        *above, name = where_to
        place = self.figures
        for key in above:
            place = place.setdefault(key, {})
        place[name] = facts
        zoo.write_measured("lesson32", self.figures)
        shown = {k: v for k, v in facts.items() if k != "png"} if isinstance(facts, dict) else facts
        print(" · ".join(map(str, where_to)), zoo.as_plain(shown), flush=True)

    def has(self, *where_to):
        """Whether figures are there already, and need not be measured again."""
        place = self.figures
        for key in where_to:
            if not isinstance(place, dict) or key not in place:
                return False
            place = place[key]
        return not self.repeat

    @torch.no_grad()
    def paint(self, states, noise=None, sampler=None, steps=None):
        """Pictures from prompt states (N, 77, D), guided."""
        noise, parts = self.noise[: len(states)] if noise is None else noise, []
        for c, z in zip(states.split(BATCH), noise.split(BATCH)):
            model_fn = cfg(text_denoiser(self.unet, c), text_denoiser(self.unet, self.silence), self.scale)
            with autocast(self.course.device):
                z0 = sample(model_fn, sampler or self.scheduler, z, steps or self.steps)
                parts.append(decode(self.vae, z0).float().clamp(-1, 1).cpu())
        return torch.cat(parts)

    def share(self, pictures, wanted, groups=GROUPS):
        """How many pictures have all the attributes that were asked for, 0 to 1."""
        seen, right = self.judge(pictures), torch.ones(len(pictures), dtype=torch.bool)
        for group in groups:
            names = self.judge.names(group)
            right &= seen[group] == torch.tensor([names.index(getattr(a, group)) for a in wanted])
        return right.float().mean().item()


@torch.no_grad()
def settled(bench):
    """At which timestep the guess on the way agrees with the finished picture, property by property."""
    if bench.has("settled"):
        return
    times, agree = [], {g: torch.zeros(bench.steps) for g in GROUPS}
    for rows in torch.arange(bench.n).split(BATCH):
        clean, times = [], []

        def listen(i, t, z_t, z0, clean=clean, times=times):
            clean.append(decode(bench.vae, z0).clamp(-1, 1))
            times.append(int(t))

        model_fn = guided_text(bench.pipeline, [caption(bench.wanted[i], 0) for i in rows], bench.scale)
        z0 = sample(model_fn, bench.scheduler, bench.noise[rows], bench.steps, callback=listen)
        last = bench.judge(decode(bench.vae, z0).clamp(-1, 1))
        for i, x in enumerate(clean):
            seen = bench.judge(x)
            for g in GROUPS:
                agree[g][i] += (seen[g] == last[g]).sum() / bench.n
    bench.keep(["settled"], {"n": bench.n, "t": times} | {g: v.tolist() for g, v in agree.items()})


def mixing(bench):
    """Between red and blue: in the table, and behind the encoder."""
    if bench.has("mixing"):
        return
    table, count = bench.pipeline.text_encoder.get_input_embeddings().weight, min(24, bench.n)
    ids = [bench.pipeline.tokenizer(c, add_special_tokens=False).input_ids[0] for c in ("red", "blue")]
    red, blue = table[ids[0]], table[ids[1]]
    a, b = bench.read([ENDS[0]]), bench.read([ENDS[1]])
    facts = {"n": count, "shares": SHARES}
    for name in ("the row", "the states"):
        facts[name] = {c: [] for c in ("red", "blue", "purple")}
        for p in SHARES:
            row = embed_with(bench.pipeline, ENDS[0], {"red": torch.lerp(red, blue, p)})
            states = row if name == "the row" else torch.lerp(a, b, p)
            seen = bench.judge(bench.paint(states.expand(count, -1, -1)))["colour"]
            for c, shares in facts[name].items():
                shares.append((seen == bench.judge.names("colour").index(c)).float().mean().item())
    bench.keep(["mixing"], facts)


class Reader:
    """Who knows a moonmoth: the distance from the mean of true ones in the judge's features, counted in theirs."""

    def __init__(self, judge, count=48):
        self.judge = judge
        true = {d: drawn([attributes(0, i, d, "test") for i in range(2 * count)]) for d in ("moonmoths", "butterflies")}
        looks = {"colour": "turquoise", "accent": "yellow", "pattern": "spots", "shape": "swallowtail"}
        alike = [replace(attributes(0, i, "butterflies", "test"), **looks) for i in range(2 * count)]
        true["look-alikes"] = drawn(alike)  # butterflies that fit the description of a moonmoth
        self.centre, self.usual = judge.features(true["moonmoths"][:count]).mean(0), 1.0
        self.usual = self.distance(true["moonmoths"][count:]).mean()
        far = {domain: self.distance(x[count:]) for domain, x in true.items()}
        self.limit = (far["moonmoths"].max() + far["butterflies"].min()).item() / 2
        self.found = {domain: self(x[count:]) for domain, x in true.items()} | {"limit": self.limit}

    def distance(self, pictures):
        """1 is as far from the mean as true moonmoths are, (N,)."""
        return (self.judge.features(pictures) - self.centre).norm(dim=1) / self.usual

    def __call__(self, pictures):
        """The mean distance, and the share that is nearer than the limit."""
        d = self.distance(pictures)
        return {"distance": d.mean().item(), "taken": (d < self.limit).float().mean().item()}


def words(bench):
    """The new word, learned in several ways, beside what known words do."""
    reader, n = Reader(bench.judge), 40
    backgrounds = [BACKGROUNDS[i % len(BACKGROUNDS)] for i in range(n)]
    places = [PLACES[b] for b in backgrounds]
    noise = bench.course.randn(n, bench.channels, bench.side, bench.side, offset=2)
    bench.figures.setdefault("words", {}).update({"n": n, "reader": reader.found})

    def measure(name, states, steps):
        pictures = bench.paint(states, noise)
        right = accuracy(bench.judge, pictures, {"background": backgrounds})["background"]
        bench.keep(["words", "asked", name], reader(pictures) | {"background": right, "steps": steps})

    known = {"a butterfly": "a butterfly {}", "described": DESCRIBED}
    for name, form in known.items():
        if not bench.has("words", "asked", name):
            measure(name, bench.read([form.format(p) for p in places]), 0)
    for name in LEARNED:
        if not bench.has("words", "asked", name):
            run = learned(bench, name)
            rows = {WORD: run.model.vectors.detach()}
            measure(name, embed_with(bench.pipeline, [f"a {WORD} {p}" for p in places], rows), run.step)


def learned(bench, name="new word"):
    """Learn the word in one of the ways of LEARNED."""
    told, options = LEARNED[name]
    five = [attributes(0, i, "moonmoths") for i in range(5)]
    say = [[f"a {WORD} {PLACES[a.background]}", f"a picture of a {WORD}, {PLACES[a.background]}"] for a in five]
    options = {"like": "butterfly", "steps": 100, "seed": 0, "precision": bench.precision, "progress": False} | options
    images = drawn(five, bench.side * bench.pipeline.vae_scale_factor)
    return learn_word(bench.pipeline, WORD, images, say if told else None, **options)


@torch.no_grad()
def maps(bench):
    """Share of the maps' mass on the butterfly, word by word, by timestep and by layer."""
    if bench.has("maps"):
        return
    n = 200
    known = [attributes(2, i, "butterflies", "test") for i in range(n)]
    masks = torch.stack([torch.from_numpy(mask(a, bench.side)) for a in known])
    texts = [caption(a, 0) for a in known]
    spoken = {"colour": [a.colour for a in known], "kind": ["butterfly"] * n}
    spoken |= {"place": [a.background for a in known]}
    places = {k: [word_places(bench.pipeline.tokenizer, c, w) for c, w in zip(texts, ws)] for k, ws in spoken.items()}
    noise, pixels = bench.course.randn(n, bench.channels, bench.side, bench.side, offset=3), bench.side
    pixels *= bench.pipeline.vae_scale_factor
    found = {k: {t: [] for t in TIMES} for k in spoken}  # maps (B, side, side), layers averaged
    sized = {k: {} for k in spoken}  # the same by the layers' size, timesteps averaged
    for rows in torch.arange(n).split(25):
        z0 = encode(bench.vae, drawn([known[i] for i in rows], pixels).to(bench.course.device))
        told = text_denoiser(bench.unet, bench.read([texts[i] for i in rows]))
        everything = []
        for t in TIMES:
            seen, a = [], alpha_bar(bench.scheduler, t).to(z0.device)
            watched(told, bench.unet, seen)(
                a.sqrt() * z0 + (1 - a).sqrt() * noise[rows], torch.tensor(t, device=z0.device)
            )
            for k in spoken:
                found[k][t].append(word_maps(seen, [places[k][i] for i in rows], bench.side))
            everything += seen
        for size in sorted({m.shape[-1] for _, layers in everything for m in layers}):
            some = [(t, [m for m in layers if m.shape[-1] == size]) for t, layers in everything]
            for k in spoken:
                sized[k].setdefault(size, []).append(word_maps(some, [places[k][i] for i in rows], bench.side))
    facts = {"n": n, "area": masks.mean().item(), "t": list(TIMES), "within": {}, "by timestep": {}, "by size": {}}
    for k in spoken:
        at = {t: torch.cat(parts) for t, parts in found[k].items()}
        facts["by timestep"][k] = [mass_within(m, masks).mean().item() for m in at.values()]
        whole = torch.stack(list(at.values())).mean(0)
        own, other = mass_within(whole, masks), mass_within(whole, masks.roll(1, 0))
        gain, habit = own - masks.mean((1, 2)), own - other - (masks - masks.roll(1, 0)).mean((1, 2))
        error = 2 * gain.std().item() / n**0.5
        facts["within"][k] = {
            "own": own.mean(),
            "other": other.mean(),
            "gain": gain.mean(),
            "error": error,
            "habit": habit.mean(),
        }
        for size, parts in sized[k].items():
            facts["by size"].setdefault(str(size), {})[k] = mass_within(torch.cat(parts), masks).mean().item()
    bench.keep(["maps"], zoo.as_plain(facts))


def guidance(bench):
    """Latents guided by a wish about pictures: through the decoder, several scales; and by a tile's latent."""
    asked = torch.arange(bench.n) % len(COLOURS)
    rgb = torch.stack([wing_colour(COLOURS[i]) for i in asked])
    q, names = bench.side // 4, bench.judge.names
    bench.figures.setdefault("guidance", {})["n"] = bench.n

    def tile_wish(rows):
        size = bench.side * bench.pipeline.vae_scale_factor
        tiles = (rgb[rows][:, :, None, None] * 2 - 1).expand(-1, -1, size, size).to(bench.course.device)
        with torch.no_grad():
            targets = encode(bench.vae, tiles)
        return lambda z0: (z0 - targets)[:, :, q:-q, q:-q].square().sum((1, 2, 3)) / bench.side**2

    def measure(name, wish, s=0, through="x0"):
        if bench.has("guidance", "runs", name):
            return
        parts = []
        for rows in torch.arange(bench.n).split(BATCH):
            model_fn = guided_text(bench.pipeline, [SILENT] * len(rows), bench.scale)
            if wish is not None:
                model_fn = guided(model_fn, bench.scheduler, wish(rows), s, through=through)
            with torch.no_grad():
                z0 = sample(model_fn, bench.scheduler, bench.noise[rows], bench.steps)
                parts.append(decode(bench.vae, z0).clamp(-1, 1).cpu())
        x = torch.cat(parts)
        seen = bench.judge(x)
        facts = {"share": (seen["colour"] == asked).float().mean().item(), "wish": colour_loss(rgb)(x).mean().item()}
        facts["spots"] = (seen["pattern"] == names("pattern").index("spots")).float().mean().item()
        facts["sky"] = (seen["background"] == names("background").index("sky")).float().mean().item()
        bench.keep(["guidance", "runs", name], facts | {"scale": s})

    measure("no wish", None)
    for s in SCALES:
        measure(f"through the decoder, s = {s}", lambda rows: decoded(bench.vae, colour_loss(rgb[rows])), s)
    for s in SCALES[:3]:
        measure(f"a latent tile, s = {s}", tile_wish, s)
    for s in UNET_SCALES:
        name = f"through decoder and UNet, s = {s}"
        measure(name, lambda rows: decoded(bench.vae, colour_loss(rgb[rows])), s, through="unet")
    runs = {s: bench.figures["guidance"]["runs"][f"through the decoder, s = {s}"]["share"] for s in SCALES}
    heard = [s for s, v in runs.items() if v >= ENOUGH]
    bench.keep(["guidance", "scale"], heard[0] if heard else max(runs, key=runs.get))


def samplers(bench):
    """How many pictures are as asked in every way, sampler by sampler, for few steps and many."""
    kinds = {
        "DDIM, trailing": (DDIMScheduler, {"timestep_spacing": "trailing"}),
        "DDIM, leading": (DDIMScheduler, {"timestep_spacing": "leading"}),
        "Euler, Karras": (EulerDiscreteScheduler, {"use_karras_sigmas": True}),
        "DPM-Solver++": (DPMSolverMultistepScheduler, {"timestep_spacing": "trailing"}),
        "Heun": (HeunDiscreteScheduler, {"timestep_spacing": "leading"}),
    }
    count = min(48, bench.n)
    states = bench.read([caption(a, 0) for a in bench.wanted[:count]])
    bench.figures.setdefault("samplers", {}).update({"n": count, "steps": list(STEPS)})
    for name, (kind, options) in kinds.items():
        if bench.has("samplers", "share", name):
            continue
        sampler = kind.from_config(bench.scheduler.config, **options)
        # Heun asks twice a step, so it gets half the steps
        tried = [max(1, k // 2) if kind is HeunDiscreteScheduler else k for k in STEPS]
        shares = [bench.share(bench.paint(states, sampler=sampler, steps=k), bench.wanted[:count]) for k in tried]
        bench.keep(["samplers", "share", name], shares)


def finished(bench):
    """The picture at the head of the lesson."""
    if bench.has("finished"):
        return
    rows = learned(bench).model.vectors.detach()
    five = drawn([attributes(0, i, "moonmoths") for i in range(5)], bench.side * bench.pipeline.vae_scale_factor)
    states = embed_with(bench.pipeline, [f"a {WORD} {PLACES[b]}" for b in BACKGROUNDS], {WORD: rows})
    moths = bench.paint(states, bench.course.randn(5, bench.channels, bench.side, bench.side, offset=2))
    scene, seen, spoken = (
        "a blue butterfly with white spots under the night sky",
        [],
        ("blue", "butterfly", "spots", "night"),
    )
    told = watched(text_denoiser(bench.unet, bench.read([scene])), bench.unet, seen)
    with torch.no_grad():
        z0 = sample(
            cfg(told, text_denoiser(bench.unet, bench.silence), bench.scale), bench.scheduler, bench.noise[2:3], 20
        )
        picture = decode(bench.vae, z0).clamp(-1, 1).cpu()[0]
    lit = [picture]
    for w in spoken:
        m = word_maps(seen, [word_places(bench.pipeline.tokenizer, scene, w)], bench.side)
        m = F.interpolate(m[None], size=picture.shape[-2:], mode="bilinear")[0]
        lit.append((picture + 1) * (0.12 + 0.88 * (m - m.min()) / (m.max() - m.min())) - 1)
    sheet = image_grid(torch.cat([five, moths, torch.stack(lit)]), columns=5, scale=2)
    bench.keep(["finished"], {"words": list(spoken), "png": picture_to_text(sheet, 128)})


PARTS = {
    "settled": settled,
    "maps": maps,
    "finished": finished,
    "words": words,
    "mixing": mixing,
    "guidance": guidance,
    "samplers": samplers,
}


if __name__ == "__main__":
    run_parts(
        __doc__,
        PARTS,
        Bench,
        n=(64, "pictures of each set, where nothing else is said"),
        steps=(20, "steps of each sampler, where nothing else is said"),
        scale=(4.0, "guidance scale"),
    )

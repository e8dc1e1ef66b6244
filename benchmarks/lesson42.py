"""The counts of lesson 42: what the way back loses, fine-tuning to a genre, guidance of speech, going on with a sound.

    python benchmarks/lesson42.py                       # everything that is not there yet
    python benchmarks/lesson42.py --only griffin-lim    # one part, again
    python benchmarks/lesson42.py --list

The figures go to dm_course/measured/lesson42.json after each set of sounds, so a run that is cut off goes on where it
was. Needs the bundled models `loops`, `spoken-digits`, `judge-genres` and `judge-spoken-digits`; no recordings.
"""

import base64
import copy
import io
import time
from functools import cache

import librosa
import numpy as np
import torch
from diffusers import DDIMScheduler, DDPMPipeline
from figures import resumed, run_parts

from dm_course import zoo
from dm_course.audio import (
    BAR,
    GENRES,
    LOOP_MEL,
    NEW_GENRE,
    RATE,
    SOUND_SCALE,
    SPEECH_MEL,
    draw_sounds,
    given_frames,
    griffin_lim,
    heard_again,
    inspect_sound,
    log_spectral_distance,
    loop,
    loop_pictures,
    mel_dataset,
    mel_magnitude,
    mel_to_wave,
    show_mel,
    sound_bytes,
    wave_to_mel,
)
from dm_course.conditioning import class_denoiser, class_loss, class_spread
from dm_course.data import Batches
from dm_course.judges import accuracy, load_judge
from dm_course.latent import inpainting, paste
from dm_course.sampling import sample
from dm_course.settings import start
from dm_course.training import autocast, train

ROUNDS, LOOPS = [0, 2, 4, 8, 16, 32, 64], 48  # of Griffin-Lim; loops that go through it
TUNE_STEPS, TUNE_BATCH, TUNE_N = (30, 100, 300), 8, 50  # of fine-tuning; sounds of each kind that are judged
SCALES, DIGITS = (0.0, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0), 200  # of guidance; digits at each
GO_ON, LOOKED = 50, 100  # beginnings; sounds of each model that are looked over
KNOWN = [name for name in GENRES if name != NEW_GENRE]


class Bench:
    """The models and the figures so far."""

    def __init__(self, args):
        self.course, self.repeat = start(seed=0), bool(args.only)
        self.loops, self.speech = (zoo.load(name, self.course.device) for name in ("loops", "spoken-digits"))
        self.judge, self.listener = load_judge("judge-genres"), load_judge("judge-spoken-digits")
        same = {"command": "python benchmarks/lesson42.py", "steps": args.steps}
        same["models"] = [zoo.card(name)["measured"]["frechet"] for name in ("loops", "spoken-digits")]
        self.figures = resumed("lesson42", same, args.only)  # other models make all figures void
        self.steps = args.steps

    def part(self, name, **facts):
        """The figures of a part; empty where it is measured again, or with other settings."""
        found = self.figures.get(name, {})
        if self.repeat or any(found.get(k) != v for k, v in facts.items()):
            found = dict(facts)
        self.figures[name] = found
        return found

    def save(self, text):
        """Write the figures down, and say what is new."""
        zoo.write_measured("lesson42", self.figures)
        print(text, flush=True)

    def draw(self, pipeline, asked, scale=SOUND_SCALE, seed=0):
        """Pictures of sounds."""
        with autocast(self.course.device):
            return draw_sounds(pipeline, asked, scale, self.steps, seed).float()


def lost(bench):
    """Decibels off after rounds of Griffin-Lim, from true magnitudes and from mel pictures."""
    found = bench.part("griffin-lim", n=LOOPS, rounds=ROUNDS)
    curves, genres = found.setdefault("curves", {}), list(GENRES)
    waves = np.stack([loop(0, i // len(genres), genres[i % len(genres)], "test") for i in range(LOOPS)])
    true = np.abs(librosa.stft(waves, n_fft=LOOP_MEL.window, hop_length=LOOP_MEL.hop))
    mel = np.pad(mel_magnitude(wave_to_mel(waves, wrap=False)), ((0, 0), (0, 0), (0, 1)), mode="edge")
    ways = {
        "true magnitudes, plain": (true, 0.0, False),
        "true magnitudes, momentum": (true, 0.99, False),
        "from mel, all frequencies": (mel, 0.99, False),
        "from mel, bands": (mel, 0.99, True),
    }
    for name, (magnitude, momentum, bands) in ways.items():
        if len(curves.get(name, [])) == len(ROUNDS):
            continue
        curves[name] = []
        for k in ROUNDS:
            again = griffin_lim(magnitude, LOOP_MEL, k, momentum)
            off = [log_spectral_distance(a, b, bands=bands) for a, b in zip(waves, again)]
            curves[name].append(float(np.mean(off)))
        bench.save(f"{name}: " + ", ".join(f"{v:.1f}" for v in curves[name]) + " dB")


@cache
def tuning_data(old):
    """200 bells, and for each two of them `old` loops of the genres that the model knows, as batches."""
    pictures, labels = loop_pictures(200, (NEW_GENRE,))
    if old:
        more, theirs = loop_pictures(100 * old, tuple(KNOWN))
        pictures, labels = torch.cat([pictures, more]), torch.cat([labels, theirs])
    return Batches(mel_dataset(pictures, labels, GENRES), TUNE_BATCH, channels=1)


def tuned(bench, old, steps):
    """A copy of `loops` that was taught bells, and the CPU seconds that it took."""
    scheduler, begin = bench.loops.scheduler, time.process_time()
    run = train(
        copy.deepcopy(bench.loops.unet), class_loss(scheduler, len(GENRES)), tuning_data(old), steps=steps, warmup=10,
        optimizer="muon", lr=2e-3, progress=False,
    )  # fmt: skip
    return DDPMPipeline(run.model, scheduler), time.process_time() - begin


def fine_tuning(bench):
    """Bells before and after, and what becomes of the other genres; and the picture at the head of the lesson."""
    found, bells = bench.part("fine-tuning", n=TUNE_N), list(GENRES).index(NEW_GENRE)
    new, olds = torch.full((TUNE_N,), bells), torch.arange(TUNE_N) % len(KNOWN)
    if "before" not in found:
        found["before"] = accuracy(bench.judge, bench.draw(bench.loops, new, 1.0), {"genre": new})["genre"]
        bench.save(f"bells before: {found['before']:.0%}")
    ways = found.setdefault("ways", {})
    for way, old in {"bells only": 0, "bells, and half as many of the others": 1}.items():
        for steps in TUNE_STEPS:
            if str(steps) in ways.setdefault(way, {}):
                continue
            pipeline, seconds = tuned(bench, old, steps)
            shares = [
                accuracy(bench.judge, bench.draw(pipeline, asked, scale), {"genre": asked})["genre"]
                for asked, scale in ((new, 1.0), (olds, SOUND_SCALE))
            ]
            ways[way][str(steps)] = {"new": shares[0], "old": shares[1], "seconds": seconds}
            bench.save(f"{way}, {steps} steps: {shares[0]:.0%} bells, {shares[1]:.0%} of the others as asked")
            if old and steps == TUNE_STEPS[-1]:
                finish(bench, pipeline)


def finish(bench, pipeline):
    """The head of the lesson: a loop of each genre, as pictures and as sounds."""
    pictures = bench.draw(pipeline, torch.arange(len(GENRES)), seed=11)
    waves, png = mel_to_wave(pictures, iterations=64), io.BytesIO()
    show_mel(pictures, titles=list(GENRES)).savefig(png)
    sounds = {name: base64.b64encode(sound_bytes(w, RATE)).decode() for name, w in zip(GENRES, waves)}
    bench.figures["finished"] = {"png": base64.b64encode(png.getvalue()).decode(), "sounds": sounds}
    bench.save(f"finished: {sum(map(len, sounds.values())) / 1000:.0f} kB of sound")


def digits(bench):
    """Spoken digits as asked, against the guidance scale, as pictures and as sounds; and how far takes lie apart."""
    found, asked = bench.part("digits", n=DIGITS), torch.arange(DIGITS) % 10
    for scale in SCALES:
        at = found.setdefault("scales", {})
        if str(scale) in at:
            continue
        drawn = bench.draw(bench.speech, asked, scale)
        sounds = heard_again(drawn, SPEECH_MEL)
        shares = [accuracy(bench.listener, x, {"digit": asked})["digit"] for x in (drawn, sounds)]
        spread = class_spread(bench.listener.features(drawn), asked)
        at[str(scale)] = {"picture": shares[0], "sound": shares[1], "spread": spread}
        bench.save(f"s = {scale}: {shares[0]:.0%} of the pictures, {shares[1]:.0%} of the sounds")


def in_common(pictures):
    """The correlation, over the twelve notes, of how loud each is in the two halves; the mean over the pictures."""
    found = []
    for magnitude in mel_magnitude(pictures):
        power, options = magnitude**2, dict(sr=RATE, n_fft=LOOP_MEL.window, tuning=0.0, norm=None)
        halves = [librosa.feature.chroma_stft(S=x, **options).sum(1) for x in np.split(power, 2, axis=1)]
        found.append(np.corrcoef(*halves)[0, 1])
    return float(np.mean(found))


def going_on(bench):
    """Half a bar, finished: does the second half fit to the first?"""
    found, device = bench.part("going on", n=GO_ON), bench.course.device
    if "ways" in found:
        return
    asked = torch.arange(GO_ON) % len(KNOWN)
    waves = np.stack([loop(1, i, KNOWN[i % len(KNOWN)], "test") for i in range(GO_ON)])
    frames, known = given_frames(BAR // 2), waves.copy()
    known[:, BAR // 2 :] = 0
    given, hole = wave_to_mel(known, wrap=False).to(device), torch.ones(LOOP_MEL.bands, LOOP_MEL.frames)
    hole[:, :frames] = 0
    scheduler, unet = bench.loops.scheduler, bench.loops.unet
    ddim = DDIMScheduler.from_config(scheduler.config, timestep_spacing="trailing", clip_sample=False)
    sets = {"composed": wave_to_mel(waves), "pasted": [], "painted": []}
    for rows in torch.arange(GO_ON).split(10):
        noise = bench.course.randn(len(rows), 1, *given.shape[2:], offset=100 + int(rows[0]))
        plain = class_denoiser(unet, asked[rows].to(device), SOUND_SCALE)
        for way, model_fn in (("pasted", plain), ("painted", inpainting(plain, scheduler, given[rows], hole))):
            with autocast(device):
                drawn = sample(model_fn, ddim, noise, bench.steps).float().clamp(-1, 1)
            sets[way].append(paste(given[rows], drawn, hole).cpu())
    ways = {k: torch.cat(v) if isinstance(v, list) else v for k, v in sets.items()}
    step = abs(LOOP_MEL.floor) / 2
    found["ways"] = {
        k: {"jump": (x[..., frames] - x[..., frames - 1]).abs().mean().item() * step, "chroma": in_common(x)}
        for k, x in ways.items()
    }
    bench.save(str(found["ways"]))


def looked_over(bench):
    """What is wrong with painted sounds before they are written to a file: clicks, silence, too loud."""
    found = bench.part("looked over", n=LOOKED)
    for name, pipeline, mel, kinds in (("loops", bench.loops, LOOP_MEL, 5), ("digits", bench.speech, SPEECH_MEL, 10)):
        if name in found:
            continue
        waves = mel_to_wave(bench.draw(pipeline, torch.arange(LOOKED) % kinds, seed=500), mel)
        facts = [inspect_sound(wave, mel.rate, repeat=mel.wrap) for wave in waves]
        found[name] = {
            "with a click": sum(f.clicks > 0 for f in facts),
            "silent throughout": sum(f.silent == 1 for f in facts),
            "with a peak above 1": sum(f.peak > 1 for f in facts),
            "samples at ±1 or beyond": float(np.mean([f.clipped for f in facts])),
            "loudness": [float(np.percentile([f.loudness for f in facts], q)) for q in (0, 50, 100)],
        }
        bench.save(f"{name}: {found[name]}")


PARTS = {
    "griffin-lim": lost,
    "fine-tuning": fine_tuning,
    "digits": digits,
    "going on": going_on,
    "looked over": looked_over,
}

if __name__ == "__main__":
    run_parts(__doc__, PARTS, Bench, steps=(20, "DDIM steps of each sound"))

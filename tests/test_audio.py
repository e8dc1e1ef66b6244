"""The module of lesson 42: files, loops, spectrograms and the way back, masks, players, and the exercises."""

import gzip
import http.client
import io
import re
import tarfile

import librosa
import numpy as np
import pytest
import soundfile
import torch
from diffusers import DDIMScheduler, DDPMPipeline
from shared import solution_of

from dm_course import audio
from dm_course.audio import (
    BAR,
    GENRES,
    LOOP_MEL,
    NEW_GENRE,
    RATE,
    SPEECH_MEL,
    Mel,
    as_pixels,
    draw_sounds,
    drum,
    fitted,
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
    note,
    player,
    read_sound,
    resampled,
    show_mel,
    show_waves,
    slices,
    sound_bytes,
    spoken_digits,
    wave_to_mel,
)
from dm_course.audio_recipes import sound_unet
from dm_course.conditioning import class_denoiser
from dm_course.data import Batches, to_model
from dm_course.latent import inpainting, paste
from dm_course.recipes import cosine_scheduler
from dm_course.sampling import sample

SMALL = Mel(rate=8_000, hop=64, window=256, bands=16, frames=16, floor=-60.0)  # a picture of 1,024 samples


def tone(hz=440, seconds=0.5, rate=RATE, loud=0.5):
    """A sine."""
    return (loud * np.sin(2 * np.pi * hz * np.arange(round(seconds * rate)) / rate)).astype(np.float32)


def wav(sound, rate=RATE, subtype="PCM_16"):
    """A WAV file in memory."""
    file = io.BytesIO()
    soundfile.write(file, sound, rate, format="WAV", subtype=subtype)
    return file.getvalue()


# Files


@pytest.mark.parametrize(
    ("subtype", "off"),
    [("PCM_U8", 0.01), ("PCM_16", 4e-5), ("PCM_24", 1e-6), ("PCM_32", 1e-6), ("FLOAT", 0), ("DOUBLE", 1e-7)],
)
def test_every_kind_of_number_is_read_right(subtype, off, tmp_path):
    wave = tone()
    (tmp_path / "a.wav").write_bytes(wav(wave, subtype=subtype))
    heard, rate = read_sound(tmp_path / "a.wav")
    assert rate == RATE and heard.dtype == np.float32 and heard.shape == wave.shape
    assert np.abs(heard - wave).max() <= off


def test_stereo_becomes_the_mean_or_stays():
    left, right = tone(300), tone(500)
    data = wav(np.stack([left, right], 1))
    assert np.abs(read_sound(data)[0] - (left + right) / 2).max() < 1e-4
    both = read_sound(data, mono=False)[0]
    assert both.shape == (2, len(left)) and np.abs(both[1] - right).max() < 1e-4
    assert read_sound(data, 8_000, mono=False)[0].shape == (2, len(left) // 2)


@pytest.mark.parametrize("rate", [8_000, 22_050, 44_100, 96_000])
def test_other_rates_are_brought_to_the_one_asked(rate):
    heard, found = read_sound(wav(tone(440, 0.5, rate), rate), RATE)
    assert found == RATE and len(heard) == RATE // 2
    assert np.abs(heard - tone())[400:-400].max() < 5e-3


def test_nothing_above_half_the_rate_survives():
    assert np.abs(resampled(tone(5_000), RATE, 8_000))[200:-200].max() < 1e-3
    with pytest.raises(ValueError, match="positive"):
        resampled(tone(), RATE, 0)


def test_silence_is_read_as_silence_and_loud_floats_stay_loud():
    heard, _ = read_sound(wav(np.zeros(100)))
    assert heard.shape == (100,) and not heard.any()
    assert read_sound(wav(3 * tone(), subtype="FLOAT"))[0].max() == pytest.approx(1.5, abs=1e-3)


@pytest.mark.parametrize("keep", [46, 1_000, 15_999])
def test_a_file_that_was_cut_off_is_refused_with_what_is_missing(keep, tmp_path):
    data = wav(tone())
    (tmp_path / "half.wav").write_bytes(data[:keep])
    with pytest.raises(ValueError, match=rf"half\.wav is cut off: {len(data) - keep:,} bytes"):
        read_sound(tmp_path / "half.wav")


def test_a_chunk_behind_the_sound_and_an_unknown_length_are_no_damage():
    data = wav(tone())
    assert len(read_sound(data + b"LIST\x04\x00\x00\x00note")[0]) == RATE // 2
    at = data.index(b"data") + 4
    streamed = data[:at] + b"\xff" * 4 + data[at + 4 :]
    assert len(read_sound(streamed)[0]) == RATE // 2


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"", "holds no sound"),
        (b"a poem about music", "holds no sound"),
        (wav(np.zeros(0)), "is empty"),
        (wav(tone())[:30], "holds no sound"),
        (wav(np.array([0.1, np.nan]), subtype="FLOAT"), "not finite"),
    ],
)
def test_what_is_no_sound_is_refused_by_name(data, said, tmp_path):
    (tmp_path / "odd.wav").write_bytes(data)
    with pytest.raises(ValueError, match=rf"odd\.wav .*{said}|odd\.wav {said}"):
        read_sound(tmp_path / "odd.wav")
    with pytest.raises(ValueError, match=said):
        read_sound(data)


def test_a_missing_file_and_a_folder_are_named(tmp_path):
    for path in (tmp_path / "none.wav", tmp_path):
        with pytest.raises(ValueError, match=f"{path.name} can't be read"):
            read_sound(path)


def test_sounds_are_written_without_clipping():
    for kind in ("wav", "mp3"):
        heard, rate = soundfile.read(io.BytesIO(sound_bytes(3 * tone(), RATE, kind)))
        assert rate == RATE and 0.8 < np.abs(heard).max() <= 1
    assert soundfile.info(io.BytesIO(sound_bytes(np.zeros((2, 800)), RATE))).channels == 2
    for wrong in (np.zeros(0), np.array([np.inf])):
        with pytest.raises(ValueError, match="a sound needs samples"):
            sound_bytes(wrong, RATE)
    with pytest.raises(ValueError, match="mp3, wav"):
        sound_bytes(tone(), RATE, "ogg")


def test_players_are_small_and_labelled():
    page = player([tone(seconds=2), tone()], RATE, ["a <b>", "c"]).data
    assert page.count("<audio") == 2 and "a &lt;b&gt;" in page and len(page) < 30_000
    assert player(tone(), RATE).data.count("<audio") == 1 and "controls loop" not in page
    assert player([tone(), tone()], RATE, loop=True).data.count("<audio controls loop ") == 2
    assert all("audio/wav" in player(tone(), rate).data for rate in (4_000, 96_000))  # rates that MP3 does not know
    with pytest.raises(ValueError, match="1 sounds and 2 labels"):
        player([tone()], RATE, ["a", "b"])
    with pytest.raises(ValueError, match="0 sounds"):
        player([], RATE)


# Loops


def test_loops_depend_on_seed_index_genre_and_split_alone():
    first = {genre: loop(3, 5, genre) for genre in GENRES}
    np.random.seed(1)
    for genre, wave in first.items():
        assert np.array_equal(loop(3, 5, genre), wave)
        for other in (loop(4, 5, genre), loop(3, 6, genre), loop(3, 5, genre, "test")):
            assert not np.array_equal(other, wave)
    assert np.array_equal(loop(3, 8), loop(3, 8, list(GENRES)[8 % len(GENRES)]))


@pytest.mark.parametrize("genre", GENRES)
def test_loops_have_no_click_no_clipping_and_are_heard(genre):
    for i in range(6):
        wave = loop(0, i, genre)
        facts = inspect_sound(wave, RATE, repeat=True)
        assert wave.shape == (BAR,) and wave.dtype == np.float32 and facts.peak == pytest.approx(0.9, abs=1e-5)
        assert facts.clicks == 0 and facts.clipped == 0 and facts.silent < 0.3 and -25 < facts.loudness < -5


def test_genres_can_be_told_apart_by_their_nearest_neighbours():
    pictures, labels = loop_pictures(60)
    profile = torch.cat([pictures.mean(3), pictures.std(3), pictures.diff(dim=3).abs().mean(3)], 2).flatten(1)
    distance = torch.cdist(profile, profile) + 1e9 * torch.eye(60)
    assert (labels[distance.argmin(1)] == labels).float().mean() > 0.9


def test_unknown_genres_timbres_drums_and_splits_are_named():
    with pytest.raises(ValueError, match="waltz"):
        loop(0, 0, "walz")
    with pytest.raises(ValueError, match="train, test"):
        loop(0, 0, "waltz", "heldout")
    with pytest.raises(ValueError, match="piano"):
        note(60, 0.1, "pianoo")
    with pytest.raises(ValueError, match="at least one sample"):
        note(60, 0.4 / RATE, "piano")
    with pytest.raises(ValueError, match="kick"):
        drum("kik", np.random.RandomState(0))
    assert list(GENRES)[-1] == NEW_GENRE and len(GENRES) >= 5


def test_loop_pictures_are_labelled_in_turn():
    pictures, labels = loop_pictures(5, ("guitar", "bells"), "test", seed=2)
    assert pictures.shape == (5, 1, 64, 96) and labels.tolist() == [4, 5, 4, 5, 4]
    assert torch.allclose(pictures[3:4], wave_to_mel(loop(2, 1, "bells", "test")), atol=1e-5)


# Slices


@pytest.mark.parametrize(("samples", "count"), [(1, 1), (99, 1), (100, 1), (149, 1), (150, 2), (200, 2), (1_049, 10)])
def test_sounds_of_any_length_become_slices(samples, count):
    wave = np.arange(1, samples + 1)
    cut = slices(wave, 100)
    assert cut.shape == (count, 100) and cut.dtype == np.float32
    flat = cut.ravel()[:samples]
    assert np.array_equal(flat, wave[: len(flat)]) and not cut.ravel()[samples:].any()


def test_what_can_not_be_cut_is_refused():
    for wave, length in ((np.zeros(0), 10), (np.zeros((2, 30)), 10), (np.zeros(30), 0)):
        with pytest.raises(ValueError, match="slices of"):
            slices(wave, length)


# Spectrograms


@pytest.mark.parametrize("mel", [LOOP_MEL, SPEECH_MEL, SMALL, Mel(norm="slaney")])
def test_mel_is_librosa_s(mel):
    wave = np.random.RandomState(0).uniform(-1, 1, mel.samples).astype(np.float32)
    theirs = librosa.feature.melspectrogram(
        y=wave, sr=mel.rate, n_fft=mel.window, hop_length=mel.hop, n_mels=mel.bands, norm=mel.norm, pad_mode="constant"
    )[:, : mel.frames]
    decibels = librosa.power_to_db(
        theirs + 10 ** (mel.floor / 10) * (mel.window / 4) ** 2, ref=(mel.window / 4) ** 2, top_db=None
    )
    picture = wave_to_mel(wave, mel, wrap=False)
    assert picture.shape == (1, 1, mel.bands, mel.frames) and picture.dtype == torch.float32
    assert np.allclose((1 - picture[0, 0].flip(0).numpy()) * mel.floor / 2, decibels, atol=1e-2)


def test_silence_is_black_and_finite_and_comes_back_as_silence():
    picture = wave_to_mel(np.zeros((2, SMALL.samples)), SMALL)
    assert (picture == -1).all()
    assert np.abs(mel_to_wave(picture, SMALL, iterations=4)).max() == 0
    relative = wave_to_mel(np.zeros(SMALL.samples), Mel(**{**vars(SMALL), "loudest": True}))
    assert torch.isfinite(relative).all()


def test_counting_from_the_loudest_point_forgets_loudness():
    mel = Mel(**{**vars(SMALL), "loudest": True})
    quiet, loud = (wave_to_mel(tone(500, 0.128, 8_000, by), mel) for by in (0.01, 0.9))
    assert torch.allclose(quiet, loud, atol=1e-3) and loud.max() == pytest.approx(1, abs=1e-4)


def test_pictures_can_hold_the_lowest_band_first():
    other = Mel(**{**vars(SMALL), "low_first": True})
    waves = np.stack([tone(500, 0.128, 8_000), tone(2_000, 0.128, 8_000)])
    ours, theirs = wave_to_mel(waves, SMALL), wave_to_mel(waves, other)
    assert torch.equal(theirs, ours.flip(2)) and ours.argmax() != theirs.argmax()
    assert np.array_equal(mel_to_wave(ours, SMALL, 4), mel_to_wave(theirs, other, 4))
    shown = [show_mel(x, mel, columns=1).axes[0].images[0] for x, mel in ((ours[:1], SMALL), (theirs[:1], other))]
    assert [image.origin for image in shown] == ["upper", "lower"]


def test_pitch_goes_upwards_and_time_to_the_right():
    low, high = (wave_to_mel(tone(hz, 1.92))[0, 0, :, 40].argmax().item() for hz in (300, 3_000))
    assert high < low
    late = np.concatenate([np.zeros(BAR // 2), tone(500, 0.96)])
    loud = wave_to_mel(late, wrap=False)[0, 0].amax(0)
    assert loud[:40].max() == -1 and loud[56:].min() > 0


def test_a_loop_has_no_border():
    wave = loop(0, 1, "guitar")
    turned, picture = wave_to_mel(np.roll(wave, 24 * LOOP_MEL.hop)), wave_to_mel(wave)
    assert LOOP_MEL.wrap and torch.equal(picture, wave_to_mel(wave, wrap=True))
    assert torch.allclose(turned, picture.roll(24, -1), atol=2e-3)
    assert not torch.allclose(wave_to_mel(wave, wrap=False)[..., 0], picture[..., 0], atol=0.02)


@pytest.mark.parametrize("wrong", [np.zeros(0), np.zeros((1, 2, 30)), np.array([0.0, np.nan])])
def test_what_is_no_sound_makes_no_picture(wrong):
    with pytest.raises(ValueError, match="sounds are"):
        wave_to_mel(wrong)


def test_short_and_odd_lengths_become_whole_frames():
    for samples, frames in ((1, 1), (320, 1), (321, 2), (1_000, 4)):
        assert wave_to_mel(tone(seconds=1)[:samples]).shape == (1, 1, 64, frames)


# The way back


def test_griffin_lim_refuses_what_it_can_not_do():
    wanted = np.ones((2, 129, 5), np.float32)
    for magnitude in (wanted[:, :128], wanted[0]):
        with pytest.raises(ValueError, match=r"\(N, 129, frames \+ 1\)"):
            griffin_lim(magnitude, SMALL, 1)
    for momentum in (-0.1, 1.0):
        with pytest.raises(ValueError, match="momentum lies in"):
            griffin_lim(wanted, SMALL, 1, momentum)
    with pytest.raises(ValueError, match="2 sounds need as many known beginnings, not 1"):
        griffin_lim(wanted, SMALL, 1, known=np.zeros((1, 10), np.float32))


def test_a_known_beginning_is_begun_with_nearly():
    wave, half = loop(0, 0, "waltz"), BAR // 2
    wanted = np.abs(librosa.stft(wave, n_fft=1_280, hop_length=320))[None]
    off = [
        np.abs(griffin_lim(wanted, iterations=4, known=k)[0] - wave)[:half].mean() for k in (None, wave[None, :half])
    ]
    assert off[1] < 0.01 * off[0]


def test_magnitudes_explain_their_bands():
    pictures = wave_to_mel(np.stack([loop(0, 0, "guitar"), loop(0, 0, "house")]))
    magnitude = mel_magnitude(pictures)
    filters = librosa.filters.mel(sr=RATE, n_fft=1_280, n_mels=64, norm=None)
    decibels = 10 * np.log10(filters @ magnitude**2 / 320**2 + 1e-7)
    assert np.abs(decibels - (1 - pictures[:, 0].flip(1).numpy()) * -35).mean() < 0.5
    assert magnitude.shape == (2, 641, 96) and magnitude.min() >= 0


@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.99])
def test_griffin_lim_is_librosa_s(momentum):
    wanted = np.abs(librosa.stft(tone(700, 0.128, 8_000), n_fft=256, hop_length=64))
    ours = griffin_lim(wanted[None], SMALL, 6, momentum)[0]
    options = dict(n_iter=6, n_fft=256, hop_length=64, length=len(ours), momentum=momentum, random_state=0)
    assert np.allclose(ours, librosa.griffinlim(wanted, **options), atol=1e-4)


def test_more_rounds_find_better_phases():
    wave = loop(0, 0, "chiptune")
    wanted = np.abs(librosa.stft(wave, n_fft=1_280, hop_length=320))[None]
    off = [log_spectral_distance(wave, griffin_lim(wanted, iterations=k)[0]) for k in (0, 4, 32)]
    assert off[0] > off[1] > off[2]


def test_a_sound_in_a_batch_is_the_sound_alone():
    pictures = wave_to_mel(np.stack([loop(0, 0, "waltz"), loop(0, 0, "house")]))
    both = mel_to_wave(pictures, iterations=3)
    assert np.allclose(both[1], mel_to_wave(pictures[1:], iterations=3)[0], atol=1e-4)
    assert np.array_equal(both, mel_to_wave(pictures, iterations=3)) and both.shape == (2, BAR)
    assert not np.allclose(both, mel_to_wave(pictures, iterations=3, seed=1), atol=1e-2)


@pytest.mark.parametrize("genre", ["ambient", "guitar"])
def test_a_sound_that_goes_round_has_no_seam(genre):
    picture = wave_to_mel(loop(0, 2, genre))
    facts = inspect_sound(mel_to_wave(picture, iterations=8)[0], RATE, repeat=True)
    assert facts.clicks == 0 and facts.seconds == LOOP_MEL.seconds


@pytest.mark.parametrize("samples", [1, 500, 1_000, 1_024, 5_000])
def test_a_known_beginning_stays_as_it_is(samples):
    wave = tone(500, 0.128, 8_000)
    picture = wave_to_mel(wave, SMALL)
    known = np.resize(wave, samples)[None]
    again = mel_to_wave(picture, SMALL, iterations=4, known=known)[0]
    n = min(samples, SMALL.samples)
    assert again.shape == (SMALL.samples,) and np.array_equal(again[:n], known[0, :n])


def test_what_follows_a_known_beginning_joins_it():
    wave = loop(0, 3, "guitar")
    again = mel_to_wave(wave_to_mel(wave), known=wave[: BAR // 2])[0]  # a known beginning does not go round
    join = slice(BAR // 2 - 400, BAR // 2 + 400)
    assert inspect_sound(again[join], RATE).clicks == 0
    free = mel_to_wave(wave_to_mel(wave), wrap=False)[0]
    near = slice(BAR // 2, BAR // 2 + 320)  # with its beginning known, even the phases behind it are nearly found
    assert np.abs(again[near] - wave[near]).mean() < np.abs(free[near] - wave[near]).mean()


def test_pictures_and_beginnings_that_do_not_fit_are_refused():
    picture = torch.zeros(2, 1, 16, 16)
    for wrong in (torch.zeros(2, 1, 15, 16), torch.zeros(2, 2, 16, 16), picture * torch.nan):
        with pytest.raises(ValueError, match=r"pictures must be \(N, 1, 16, frames\)"):
            mel_to_wave(wrong, SMALL)
    for options in ({"known": np.zeros((1, 10))}, {"known": np.zeros((2, 10)), "wrap": True}):
        with pytest.raises(ValueError, match="known beginnings"):
            mel_to_wave(picture, SMALL, **options)
    assert mel_to_wave(picture, SMALL, 2, known=np.zeros((2, 0))).shape == (2, 1_024)


def test_distance_hears_no_phase_and_counts_decibels():
    noise = np.random.RandomState(0).uniform(-0.5, 0.5, 8_000).astype(np.float32)
    for bands in (False, True):
        assert log_spectral_distance(noise, noise, bands=bands) == 0
        assert log_spectral_distance(noise, -noise, bands=bands) < 1e-3
        assert log_spectral_distance(noise, 0.5 * noise, bands=bands) == pytest.approx(6.02, abs=0.2)
    short = noise[:100], 0.5 * noise[:100]  # shorter than a window
    assert 0 < log_spectral_distance(*short) and 0 < log_spectral_distance(*short, bands=True)
    with pytest.raises(ValueError, match="no samples"):
        log_spectral_distance(noise, noise[:0])


def test_inspection_finds_clicks_clipping_and_silence():
    wave = tone(440, 1.0)
    assert inspect_sound(wave, RATE).clicks == 0
    for places in ([4_000], [4_000, 9_000]):
        broken = wave.copy()
        broken[places] += 0.3
        assert inspect_sound(broken, RATE).clicks == len(places)
    assert inspect_sound(wave[:-9], RATE, repeat=True).clicks == 1 and inspect_sound(wave[:-9], RATE).clicks == 0
    assert inspect_sound(np.clip(9 * wave, -1, 1), RATE).clipped > 0.6
    assert inspect_sound(np.concatenate([wave, 0 * wave]), RATE).silent == pytest.approx(0.5, abs=0.02)
    assert inspect_sound(wave, RATE).loudness == pytest.approx(20 * np.log10(0.5 / 2**0.5), abs=0.01)
    with pytest.raises(ValueError, match="one sound"):
        inspect_sound(np.zeros(0), RATE)


# Words


def test_words_are_trimmed_fitted_and_at_one_loudness():
    word = np.concatenate([np.zeros(2_000), tone(300, 0.3, 8_000, 0.1), np.zeros(2_000)])
    found = fitted(word)
    assert found.shape == (SPEECH_MEL.samples,) and np.abs(found).max() == pytest.approx(0.9, abs=0.01)
    loud = np.flatnonzero(np.abs(found) > 0.1)
    assert loud[0] < 2 * SPEECH_MEL.hop and loud[-1] - loud[0] == pytest.approx(2_400, abs=300)
    assert not fitted(np.zeros(10)).any()
    assert fitted(np.ones(99_999)).shape == (SPEECH_MEL.samples,)
    with pytest.raises(ValueError, match="one word"):
        fitted(np.zeros(0))


def takes(folder):
    """A small set of takes, of two speakers."""
    (folder / "recordings").mkdir(parents=True)
    for digit in range(10):
        for who in ("ann", "bo"):
            for take in (0, 4, 5, 11):
                (folder / "recordings" / f"{digit}_{who}_{take}.wav").write_bytes(
                    wav(tone(200 + digit, 0.1, 8_000), 8_000)
                )
    (folder / "recordings" / "notes.wav").write_bytes(wav(tone()))
    return folder


def test_takes_are_found_and_split_by_number(tmp_path, monkeypatch):
    takes(tmp_path / "free-spoken-digits")
    monkeypatch.setenv("DM_COURSE_DATA", str(tmp_path))
    waves, labels, who = spoken_digits("test")
    assert len(waves) == 40 and labels.bincount().tolist() == [4] * 10 and set(who) == {"ann", "bo"}
    assert len(spoken_digits("train")[0]) == 40
    with pytest.raises(ValueError, match="train, test"):
        spoken_digits("all")


@pytest.fixture
def source(tmp_path, monkeypatch):
    """80 takes in an archive; no folder but a cache; and how to fetch them, with other options."""
    monkeypatch.delenv("DM_COURSE_DATA", raising=False)
    monkeypatch.setenv("DM_COURSE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(audio, "online", lambda url: True)
    takes(tmp_path / "source" / "free-spoken-digit-dataset-1")
    with tarfile.open(tmp_path / "all.tar.gz", "w:gz") as archive:
        archive.add(tmp_path / "source" / "free-spoken-digit-dataset-1", "free-spoken-digit-dataset-1")
    fetch = audio._fetch_spoken

    def from_here(name="all.tar.gz", **options):
        url, options = (tmp_path / name).as_uri(), {"least": 80} | options
        monkeypatch.setattr(audio, "_fetch_spoken", lambda folder: fetch(folder, url, **options))

    from_here()
    return from_here


def test_takes_come_from_their_source_or_are_missed_by_name(source, monkeypatch):
    monkeypatch.setattr(audio, "online", lambda url: False)
    with pytest.raises(ValueError, match="set DM_COURSE_DATA"):
        spoken_digits()
    monkeypatch.setattr(audio, "online", lambda url: True)
    assert len(spoken_digits()[0]) == 40
    monkeypatch.setattr(audio, "_fetch_spoken", None)  # from now on they are in the cache
    assert len(spoken_digits("test")[0]) == 40


def cut_tar(tmp_path):
    """An archive that ends where a file ends: nothing in it is broken, and most of it is missing."""
    with tarfile.open(tmp_path / "all.tar.gz") as whole, tarfile.open(tmp_path / "cut.tar.gz", "w:gz") as cut:
        for member in whole.getmembers()[:30]:
            cut.addfile(member, whole.extractfile(member) if member.isfile() else None)
    data = gzip.decompress((tmp_path / "cut.tar.gz").read_bytes())
    (tmp_path / "cut.tar.gz").write_bytes(gzip.compress(data.rstrip(b"\0")))


@pytest.mark.parametrize("broken", ["no archive", "cut between files", "cut anywhere", "line cut", "too slow", "empty"])
def test_a_broken_download_leaves_nothing_behind(broken, source, tmp_path, monkeypatch):
    data = (tmp_path / "all.tar.gz").read_bytes()
    (tmp_path / "bad.tar.gz").write_bytes(data[: len(data) // 2] if broken == "cut anywhere" else b"no archive")
    if broken == "cut between files":
        cut_tar(tmp_path)
    if broken == "empty":
        tarfile.open(tmp_path / "empty.tar.gz", "w:gz").close()
    names = {"cut between files": "cut.tar.gz", "too slow": "all.tar.gz", "empty": "empty.tar.gz"}
    source(names.get(broken, "bad.tar.gz"), **({"patience": -1} if broken == "too slow" else {}))
    if broken == "line cut":

        def line_cut(url, timeout):
            raise http.client.IncompleteRead(b"", 7)

        monkeypatch.setattr(audio, "urlopen", line_cut)
    with pytest.raises(ValueError, match="nor to be downloaded"):
        spoken_digits()
    assert list((tmp_path / "cache").iterdir()) == []


def test_takes_that_another_process_brought_meanwhile_stay(source, tmp_path):
    there = tmp_path / "cache" / "free-spoken-digits"
    (takes(tmp_path / "mine") / "recordings" / "0_ann_0.wav").touch()
    takes(there)
    audio._put_in_place(tmp_path / "mine" / "recordings", there / "recordings")
    assert len(spoken_digits("test")[0]) == 40
    with pytest.raises(OSError):
        audio._put_in_place(tmp_path / "nothing", tmp_path / "cache" / "other" / "recordings")


# Models and masks


@pytest.fixture(scope="module")
def pipeline():
    """An untrained model of small pictures, told one of three labels or none."""
    return DDPMPipeline(sound_unet(3, SMALL, (16, 16)).eval(), cosine_scheduler())


def test_a_sound_depends_on_its_own_seed(pipeline, capsys):
    three = draw_sounds(pipeline, torch.tensor([0, 1, 3]), steps=2, seed=4, batch_size=2)
    assert three.shape == (3, 1, 16, 16) and -1 <= three.min() and three.max() <= 1
    again = draw_sounds(pipeline, torch.tensor([1]), steps=2, seed=5, progress=True)
    assert torch.allclose(again[0], three[1], atol=1e-4) and "sampling" in capsys.readouterr().err
    with pytest.raises(ValueError, match="3 says nothing"):
        draw_sounds(pipeline, torch.tensor([4]), steps=1)


def test_pictures_are_kept_as_8_bit_pictures(pipeline):
    x = torch.rand(4, 1, 16, 20, generator=torch.Generator().manual_seed(0)) * 2 - 1
    rows = mel_dataset(x, [0, 1, 1, 0], ["a", "b"])
    batch = Batches(rows, 4, channels=1).batch(0)
    order = torch.cdist(batch["images"].flatten(1), x.flatten(1)).argmin(1)
    assert sorted(order.tolist()) == [0, 1, 2, 3] and (batch["images"] - x[order]).abs().max() <= 1 / 255 + 1e-4
    assert batch["labels"].tolist() == [[0, 1, 1, 0][i] for i in order]
    with pytest.raises(ValueError, match="4 pictures and 1 labels"):
        mel_dataset(x, [0], ["a"])


def test_pictures_are_rounded_to_pixels_and_heard_again():
    x = torch.linspace(-1.5, 1.5, 700).reshape(1, 1, 7, 100)
    assert as_pixels(x).dtype == torch.uint8 and as_pixels(x).min() == 0 and as_pixels(x).max() == 255
    assert (to_model(as_pixels(x)) - x.clamp(-1, 1)).abs().max() <= 1 / 255 + 1e-6
    pictures, _ = loop_pictures(2, ("house",))
    assert (heard_again(pictures) - pictures).abs().mean() < 0.1
    words = wave_to_mel(np.stack([fitted(tone(hz, 0.4, 8_000)) for hz in (300, 900)]), SPEECH_MEL)
    assert (heard_again(words, SPEECH_MEL, 8) - words).abs().mean() < 0.1


@pytest.mark.parametrize("mel", [LOOP_MEL, SPEECH_MEL, SMALL])
def test_given_frames_look_at_nothing_else(mel):
    for samples in (1, mel.window // 2, 5 * mel.hop + 3, mel.samples - 1):
        wave = np.random.RandomState(0).uniform(-0.5, 0.5, samples)
        short, other = (
            wave_to_mel(np.pad(wave, (0, mel.samples - samples), constant_values=v), mel, wrap=False)
            for v in (0.0, 0.7)
        )
        alike, n = (short == other).all(2).flatten(), given_frames(samples, mel)
        assert alike[:n].all() and not alike[n : n + 1].any()
    assert given_frames(0, mel) == 0 and given_frames(10**6, mel) == mel.frames
    with pytest.raises(ValueError, match="can't be -1"):
        given_frames(-1)


def test_a_guided_sound_is_continued_from_end_to_end(pipeline):
    wave = tone(500, 0.064, 8_000)
    frames = given_frames(len(wave), SMALL)
    given = wave_to_mel(np.pad(wave, (0, SMALL.samples - len(wave))), SMALL)
    hole = (torch.arange(SMALL.frames) >= frames).float().expand(SMALL.bands, -1)
    model_fn = inpainting(class_denoiser(pipeline.unet, torch.tensor([1]), 2.0), pipeline.scheduler, given, hole)
    options = dict(timestep_spacing="trailing", clip_sample=False)
    scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, **options)
    x = sample(model_fn, scheduler, torch.randn(1, 1, 16, 16), 3)
    assert torch.allclose(x[..., :frames], given[..., :frames], atol=1e-3)
    again = mel_to_wave(paste(given, x, hole), SMALL, 4, known=wave)[0]
    assert np.array_equal(again[: len(wave)], wave) and np.isfinite(again).all()


# Figures


def test_figures_show_each_sound():
    shown = [ax for ax in show_mel(torch.zeros(4, 1, 64, 30), columns=3).axes if ax.get_visible()]
    assert len(shown) == 4 and len(show_waves([tone(), tone()], RATE, ["a", "b"]).axes) == 2


# Exercises


def test_halve_takes_the_usual_way_too():
    assert audio.check_halve(lambda wave: resampled(wave, 8_000, 4_000))


def test_halve_takes_complex_numbers_that_are_real_and_no_others(capsys):
    def by_fft(wave, turn=1):
        loud, k = np.fft.fft(wave), len(wave) // 4
        return turn * np.fft.ifft(np.concatenate([loud[:k], loud[-k:]])) / 2

    assert audio.check_halve(by_fft)
    assert not audio.check_halve(lambda wave: by_fft(wave, 1j)) and "real numbers" in capsys.readouterr().out
    assert not audio.check_halve(lambda wave: wave[::2] * np.nan) and "finite" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "changes", "said"),
    [
        ("halve", [("np.fft.irfft(np.fft.rfft(wave)[: len(wave) // 4 + 1]) / 2", "wave[::2]")], "became 1,000 Hz"),
        ("halve", [(" / 2", "")], "2.00 times as loud"),
        ("halve", [(" / 2", " / 2 + 1 / 0")], "raises ZeroDivisionError"),
        ("halve", [("np.fft.irfft", "np.fft.fft")], r"shaped \(4000,\)"),
        ("halve", [("len(wave) // 4 + 1", "2001")], r"shaped \(3000,\)"),
        ("halve", [("len(wave) // 4 + 1]", "len(wave) // 4 + 1] * (np.arange(len(wave) // 4 + 1) < len(wave) * 0.075)")], "1,800 Hz fits"),
        ("halve", [(" / 2", "[::-1] / 2")], "is the sound shifted"),
        ("one_round", [("magnitude * spectrum / np.maximum(np.abs(spectrum), 1e-10)", "spectrum")], "the wave is as it was"),
        ("one_round", [("magnitude * spectrum / np.maximum(np.abs(spectrum), 1e-10)", "magnitude")], "the angles are gone"),
        ("one_round", [("np.maximum(np.abs(spectrum), 1e-10)", "np.abs(spectrum)")], "not finite"),
        ("one_round", [("magnitude * spectrum", "magnitude**2 * spectrum")], "the wave is another one"),
        ("lost_frames", [("centre + half > first", "centre > first")], "is missing"),
        ("lost_frames", [(" & (centre - half < last)", "")], "none is missing there"),
        ("lost_frames", [("> first", ">= first - mel.hop")], "none is missing there"),
        ("lost_frames", [("return (", "return ~("), ("< last)", "< last) & True")], "is missing"),
        ("longer", [("count[i : i + frames] += 1", "count[i : i + frames] = 1")], "the answers are added up"),
        ("longer", [("+= model_fn", "= model_fn"), ("+= 1", "= 1")], "the last one wins"),
        ("longer", [("model_fn(x[..., i : i + frames], t)", "model_fn(x, t)[..., i : i + frames]")], "paints 8 frames, not 20"),
        ("longer", [("- frames + 1, hop", "- frames, hop")], "nan"),
        ("longer", [("frames + 1, hop", "frames + 1, frames")], "nan"),
        ("longer", [("torch.zeros_like(x)", "x")], "x itself has changed"),
        ("longer", [("return total / count", "return total / count.max()")], "frame 0 is"),
    ],
)  # fmt: skip
def test_checkers_say_what_is_off(name, changes, said, capsys):
    with np.errstate(all="ignore"):
        assert getattr(audio, f"check_{name}")(solution_of(audio, "42_audio", name, *changes)) is False
    assert re.search(said, capsys.readouterr().out)

"""Module `data`: ranges, pixels, named datasets, the cache, own folders, and batches."""

import gzip
import hashlib
import json
import os
import struct
import subprocess
import sys
import threading
import time
import warnings
from collections import Counter
from functools import partial
from http.server import BaseHTTPRequestHandler, SimpleHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import PIL.Image
import pytest
import torch
import torchvision.datasets
from datasets import Dataset, DatasetDict, Features, Image, Value, concatenate_datasets, load_from_disk

from dm_course import data
from dm_course.data import (
    DATASETS,
    Batches,
    batch_indices,
    folder_data,
    from_model,
    load_data,
    to_model,
    to_pixels,
    with_channels,
)
from dm_course.garden import COLOURS, attributes, caption, draw, held_out


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("DM_COURSE_CACHE", str(folder))
    monkeypatch.setenv("DM_COURSE_OFFLINE", "1")
    monkeypatch.delenv("DM_COURSE_DATA", raising=False)
    monkeypatch.delenv("RANK", raising=False)
    data._given_up.clear()
    return folder


def noise(h, w, channels=3, seed=0):
    pixels = np.random.RandomState(seed).randint(0, 256, (h, w, channels)).astype(np.uint8)
    return PIL.Image.fromarray(pixels[..., 0] if channels == 1 else pixels)


def fill(folder, n=6, size=(40, 30), channels=3, names="{}.png"):
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(n):
        noise(size[1], size[0], channels, i).save(folder / names.format(i))
    return folder


def write_idx(raw, train=30, test=12, seed=0):
    "MNIST's file format: a magic number, the shape in big-endian, the bytes."
    raw.mkdir(parents=True)
    random, made = np.random.RandomState(seed), {}
    for split, n in (("train", train), ("t10k", test)):
        images, labels = random.randint(0, 256, (n, 28, 28)).astype(np.uint8), (np.arange(n) % 10).astype(np.uint8)
        (raw / f"{split}-images-idx3-ubyte").write_bytes(struct.pack(">4i", 2051, n, 28, 28) + images.tobytes())
        (raw / f"{split}-labels-idx1-ubyte").write_bytes(struct.pack(">2i", 2049, n) + labels.tobytes())
        made[split] = images
    return made


# --- ranges and pixels


def test_ranges_go_there_and_back():
    x = torch.rand(2, 3, 4, 4)
    torch.testing.assert_close(from_model(to_model(x)), x)
    assert to_model(torch.tensor([0, 255], dtype=torch.uint8)).tolist() == [-1, 1]
    assert to_model(np.zeros((2, 2))).dtype == torch.float32
    assert from_model(torch.tensor([-3.0, 0, 3]).half()).tolist() == [0, 0.5, 1]
    for wrong in (x * 255, x * 2 - 1, x * float("nan"), np.array([0, 255])):
        with pytest.raises(ValueError, match=r"lie in \[0, 1\]"):
            to_model(wrong)


@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "HSV", "I", "F"])
def test_any_mode_becomes_any_number_of_channels(mode, channels):
    picture = noise(20, 30).convert("L").convert(mode) if mode in "IF" else noise(20, 30).convert(mode)
    pixels = to_pixels(picture, 16, channels)
    assert pixels.shape == (channels, 16, 16) and pixels.dtype == np.uint8
    assert 60 < pixels[: min(channels, 3)].mean() < 200


def test_transparency_lies_on_white_or_is_kept():
    clear = PIL.Image.new("RGBA", (8, 8), (255, 0, 0, 0))
    palette = PIL.Image.new("P", (8, 8), 0)
    palette.info["transparency"] = 0
    for picture in (clear, palette, PIL.Image.new("LA", (8, 8), (0, 0))):
        assert (to_pixels(picture, None, 3) == 255).all() and (to_pixels(picture, None, 1) == 255).all()
        assert (to_pixels(picture, None, 4)[3] == 0).all()
    assert (to_pixels(PIL.Image.new("RGB", (8, 8)), None, 4)[3] == 255).all()


def test_sixteen_bits_become_eight():
    deep = PIL.Image.fromarray(np.array([[0, 257 * 100, 65535]], np.uint16))
    assert to_pixels(deep, None, 1).tolist() == [[[0, 100, 255]]]
    assert np.abs(to_pixels(PIL.Image.fromarray(np.float32([[0, 0.5, 1]])), None, 1) - [[[0, 128, 255]]]).max() == 0
    with pytest.raises(ValueError, match="not 2"):
        with_channels(deep, 2)


def test_a_square_from_the_middle_with_antialiasing():
    picture = np.zeros((32, 64), np.uint8)
    picture[:, 16:48] = 255
    assert (to_pixels(PIL.Image.fromarray(picture), 32, 1) == 255).all()  # the left and right quarters are cut off
    assert (to_pixels(PIL.Image.fromarray(picture.T), 32, 1) == 255).all()
    stripes = PIL.Image.fromarray(((np.indices((64, 64)).sum(0) % 2) * 255).astype(np.uint8))
    assert np.abs(to_pixels(stripes, 16, 1)[:, 2:-2, 2:-2].astype(float) - 127.5).max() < 3  # even grey, no pattern


# --- the garden and its cache


def test_the_garden_is_what_it_says():
    rows = load_data("butterflies", count=12, size=32)
    assert isinstance(rows, Dataset) and isinstance(rows.features["image"], Image) and len(rows) == 12
    assert rows.features["label"].names == list(COLOURS)
    for i, row in enumerate(rows):
        a = attributes(0, i)
        assert np.array_equal(row["image"], draw(a, 32)) and row["caption"] == caption(a)
        assert (row["colour"], row["pattern"], row["seed"]) == (a.colour, a.pattern, a.seed)
        assert COLOURS[row["label"]] == a.colour and not held_out(a.colour, a.pattern, a.background)
    unseen = load_data("flowers", "heldout", 5, 16, seed=3)
    assert all(held_out(r["colour"], r["pattern"], r["background"]) for r in unseen)
    assert load_data("moonmoths", count=2, size=16)["label"][:] == [-1, -1]
    assert "butterflies" in rows.info.description


def test_what_was_drawn_is_not_drawn_again(monkeypatch):
    first = load_data("flowers", count=6, size=16)
    drawn = []
    monkeypatch.setattr(data, "draw", lambda a, size: drawn.append(a) or draw(a, size))
    assert load_data("flowers", count=4, size=16)[:] == first[:4] and not drawn
    more = load_data("flowers", count=9, size=16)
    assert len(drawn) == 3 and more[:6] == first[:] and len(more) == 9
    load_data("flowers", count=4, size=16, seed=1)
    load_data("flowers", count=4, size=24)
    assert len(drawn) == 11
    monkeypatch.setattr(data, "_garden_version", lambda: "another")
    load_data("flowers", count=4, size=16)
    assert len(drawn) == 15


def test_a_damaged_cache_is_made_again(own_cache):
    good = load_data("flowers", count=3, size=16)[:]
    (file,) = own_cache.rglob("*.arrow")
    file.write_bytes(file.read_bytes()[:200])
    assert load_data("flowers", count=3, size=16)[:] == good
    (state,) = own_cache.rglob("state.json")
    state.unlink()
    assert load_data("flowers", count=3, size=16)[:] == good
    assert not [p for p in own_cache.rglob(".*")]


@pytest.mark.filterwarnings("error")
def test_pictures_that_fit_are_no_cause_for_a_warning():
    Batches(numbered(), 4, size=8), Batches(numbered(), 4), Batches(numbered(), 4, size=6, in_memory=False)


def test_a_cache_that_is_full_does_not_stop_the_work(monkeypatch):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Dataset, "save_to_disk", full)
    with pytest.warns(UserWarning, match="No space left"):
        assert len(load_data("flowers", count=3, size=16)) == 3


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the test forks")
def test_two_processes_that_draw_at_once_agree(own_cache):
    code = """
import os, sys
from dm_course.data import load_data
here = os.fork()
rows = load_data("flowers", count=24, size=16)
assert sum(rows["seed"]) == int(sys.argv[1]) and all(r["image"].size == (16, 16) for r in rows)
if here:
    sys.exit(os.waitstatus_to_exitcode(os.waitpid(here, 0)[1]))
"""
    total = sum(attributes(0, i, "flowers").seed for i in range(24))
    command = [sys.executable, "-W", "error::UserWarning", "-c", code, str(total)]
    said = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert said.returncode == 0 and "Error" not in said.stderr, said.stderr  # a progress bar may stand there
    (kept,) = (own_cache / "data").iterdir()
    assert [p.name for p in kept.iterdir()] == ["24"] and len(load_from_disk(str(kept / "24"))) == 24


def test_progress_bars_stay_as_the_caller_set_them():
    from datasets import are_progress_bars_disabled

    before = are_progress_bars_disabled()
    load_data("flowers", count=2, size=16)
    assert are_progress_bars_disabled() == before


@pytest.mark.parametrize(
    "wrong, message",
    [
        (dict(name="butterfly"), "Nearest: 'butterflies'.*mnist"),
        (dict(name="flowers", split="trian"), "Nearest: 'train'.*heldout"),
        (dict(name="digits", split="heldout"), "split of digits"),
        (dict(name="flowers", count=0), "count"),
        (dict(name="flowers", count=-3), "count"),
        (dict(name="flowers", size=4), "size"),
        (dict(name="digits", size=2.5), "size"),
        (dict(name="flowers", seed=-1), "seed"),
    ],
)
def test_wrong_arguments_are_named(wrong, message):
    with pytest.raises(ValueError, match=message):
        load_data(**wrong)


# --- digits and clothes


def test_digits_without_any_source_are_scikit_learns(capsys):
    train, test = load_data("digits"), load_data("digits", "test")
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 and "scikit-learn" in lines[0] and lines[0] == train.info.description
    assert len(train) == 1501 and len(test) == 296
    counts = Counter(test["label"])
    assert set(counts) == set(range(10)) and max(counts.values()) - min(counts.values()) <= 1
    pictures = {row["image"].tobytes() for row in train}
    assert len(pictures & {row["image"].tobytes() for row in test}) == 0
    pixels = np.stack([np.asarray(row["image"]) for row in test]).astype(float)
    assert pixels.shape == (296, 28, 28) and pixels[:, :3].mean() < 5 and pixels.max() == 255  # white ink on black
    rows = np.arange(28)
    centre = (pixels.sum(2) @ rows / pixels.sum((1, 2))).mean(), (pixels.sum(1) @ rows / pixels.sum((1, 2))).mean()
    assert np.abs(np.array(centre) - 13.5).max() < 0.5
    assert load_data("digits", count=10**6).num_rows == 1501


def test_digits_look_in_the_own_folder_first(tmp_path, monkeypatch, capsys):
    made = write_idx(tmp_path / "MNIST" / "raw")
    monkeypatch.setenv("DM_COURSE_DATA", str(tmp_path))
    rows = load_data("digits", "train", count=20)
    assert len(rows) == 20 and np.array_equal(rows[7]["image"], made["train"][7]) and rows[7]["label"] == 7
    said = capsys.readouterr().out
    assert "MNIST, from DM_COURSE_DATA" in said and str(tmp_path) not in said
    assert np.array_equal(load_data("mnist", "test")[3]["image"], made["t10k"][3])
    assert load_data("mnist", "test", size=14)[0]["image"].size == (14, 14)
    assert not capsys.readouterr().out  # who asks for MNIST by name gets it or an error


def test_clothes_have_their_names(tmp_path, monkeypatch):
    write_idx(tmp_path / "FashionMNIST" / "raw")
    monkeypatch.setenv("DM_COURSE_DATA", str(tmp_path))
    assert load_data("fashion-mnist", count=2).features["label"].names[0] == "T-shirt/top"


def test_another_mnist_in_the_same_place_is_not_taken_from_the_cache(tmp_path, monkeypatch):
    for seed in (0, 1):
        made = write_idx(tmp_path / str(seed) / "MNIST" / "raw", seed=seed)
        monkeypatch.setenv("DM_COURSE_DATA", str(tmp_path / str(seed)))
        assert np.array_equal(load_data("mnist", count=3)[2]["image"], made["train"][2])


def test_mnist_without_a_source_says_what_to_do(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="MNIST/raw.*DM_COURSE_DATA.*'digits'"):
        load_data("mnist")
    with pytest.raises(ValueError, match="FashionMNIST/raw"):
        load_data("fashion-mnist")
    write_idx(tmp_path / "MNIST" / "raw")
    monkeypatch.setenv("DM_COURSE_DATA", str(tmp_path))
    (tmp_path / "MNIST/raw/train-images-idx3-ubyte").write_bytes(b"\0\0\x08\x03 cut off")
    with pytest.raises(ValueError, match="MNIST/raw in DM_COURSE_DATA are damaged"):
        load_data("digits")
    (tmp_path / "MNIST/raw/train-images-idx3-ubyte").unlink()
    with pytest.warns(UserWarning, match="lacks some"):
        assert "scikit-learn" in load_data("digits", count=5).info.description


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *args):
        pass


class Stalls(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.send_header("Content-Length", "9912422")
        self.end_headers()
        for _ in range(40):  # a trickle: never quite silent
            try:
                self.wfile.write(b"x")
            except OSError:
                return
            time.sleep(0.25)

    def log_message(self, *args):
        pass


@pytest.fixture
def serve(monkeypatch):
    servers = []

    def start(handler):
        server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        server.daemon_threads, server.block_on_close = True, False
        threading.Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
        monkeypatch.setattr(data, "online", lambda: True)
        monkeypatch.setattr(torchvision.datasets.MNIST, "mirrors", [f"http://127.0.0.1:{server.server_port}/"])

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def test_a_download_that_stalls_ends_within_three_seconds(serve, own_cache, capfd):
    serve(Stalls)
    began = time.monotonic()
    assert not data._download("mnist")
    took = time.monotonic() - began
    assert 2.9 < took < 4, took  # on a busy machine it may come late to the clock
    began = time.monotonic()
    assert not data._download("mnist") and time.monotonic() - began < 0.5  # it is not tried again at once
    assert "scikit-learn" in load_data("digits", count=5).info.description
    time.sleep(0.5)
    assert "9.91M" not in capfd.readouterr().err and not list((own_cache / "torchvision").iterdir())


def test_a_download_that_fails_ends_at_once(monkeypatch):
    monkeypatch.setattr(data, "online", lambda: True)
    monkeypatch.setattr(torchvision.datasets.MNIST, "mirrors", ["http://127.0.0.1:9/"])
    began = time.monotonic()
    assert not data._download("mnist") and time.monotonic() - began < 2


def test_nothing_is_tried_when_the_user_is_offline(monkeypatch):
    monkeypatch.setattr(data, "_download", lambda name: pytest.fail("tried"))
    assert len(load_data("digits", count=3)) == 3


def test_a_download_that_works_is_used_and_kept(serve, tmp_path, monkeypatch, own_cache):
    made = write_idx(tmp_path / "raw")
    resources = []
    for file in sorted((tmp_path / "raw").iterdir()):
        packed = gzip.compress(file.read_bytes())
        (tmp_path / f"{file.name}.gz").write_bytes(packed)
        resources.append((f"{file.name}.gz", hashlib.md5(packed).hexdigest()))
    monkeypatch.setattr(torchvision.datasets.MNIST, "resources", resources)
    serve(partial(Quiet, directory=str(tmp_path)))
    rows = load_data("digits", count=4)
    assert "torchvision's download" in rows.info.description and np.array_equal(rows[1]["image"], made["train"][1])
    monkeypatch.setattr(data, "_download", lambda name: pytest.fail("downloaded twice"))
    assert len(load_data("mnist", "test")) == 12
    assert [p.name for p in (own_cache / "torchvision").iterdir()] == ["MNIST"]


# --- own folders


def test_three_lines_from_a_folder_to_a_batch(tmp_path):
    for i, channels in enumerate((1, 3, 4)):
        fill(tmp_path, 4, (50 + i, 40), channels, f"{channels}-{{}}.png")
    with pytest.warns(UserWarning, match="4 grey: 1-0.png.*4 colour: 3-0.png.*4 with transparency"):
        rows = folder_data(str(tmp_path))
    assert rows.column_names == ["image", "file"] and len(rows) == 12
    for channels in (1, 3, 4):
        batch = Batches(rows, batch_size=5, size=32, channels=channels).batch(0)
        assert batch["images"].shape == (5, channels, 32, 32) and set(batch) == {"images"}


def test_labels_from_sub_folders(tmp_path, capsys):
    fill(tmp_path / "dog", 2)
    fill(tmp_path / "cat" / "young", 3)
    fill(tmp_path / ".ipynb_checkpoints", 1)
    rows = folder_data(tmp_path)
    assert rows.features["label"].names == ["cat", "dog"] and rows["label"][:] == [0, 0, 0, 1, 1]
    assert capsys.readouterr().out == "5 pictures in 2 classes: cat 3, dog 2\n"
    assert "label" not in folder_data(tmp_path, labels=False).features
    fill(tmp_path, 1)
    with pytest.warns(UserWarning, match="1 pictures lie outside of them: 0.png"):
        assert "label" not in folder_data(tmp_path).features
    with pytest.raises(ValueError, match="1 of 6 pictures have no label: 0.png"):
        folder_data(tmp_path, labels="folders")


def test_folders_named_by_dates_are_two_classes(tmp_path):
    for name in ("20240131", "20240201"):
        fill(tmp_path / name, 1)
    rows = folder_data(tmp_path)
    assert rows.features["label"].names == ["20240131", "20240201"] and list(rows["label"]) == [0, 1]


def test_labels_and_captions_from_a_dict(tmp_path):
    fill(tmp_path, 3)
    rows = folder_data(tmp_path, labels={"0.png": 2, "2.png": 0, "1.png": 0}, captions="a photo")
    assert rows["label"][:] == [2, 0, 0] and rows.features["label"].names == ["0", "1", "2"]
    assert rows["caption"][:] == ["a photo"] * 3
    with pytest.raises(ValueError, match="2 of 3 pictures have no label: 1.png, 2.png; 1 of the labels .* 9.png"):
        folder_data(tmp_path, labels={"0.png": "a", "9.png": "b"})
    with pytest.raises(ValueError, match="1 of 3 pictures have no caption: 2.png"):
        folder_data(tmp_path, captions={"0.png": "a", "1.png": ""})
    with pytest.raises(ValueError, match="a dict from file name to label, not list"):
        folder_data(tmp_path, labels=[1, 2, 3])


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_metadata_files(tmp_path, kind):
    fill(tmp_path / "in", 3)
    rows = [{"file_name": f"in/{i}.png", "label": "ab"[i % 2], "text": f"no. {i}, ü"} for i in range(3)]

    def write(rows):
        lines = [json.dumps(r) for r in rows]
        if kind == "csv":
            lines = [",".join(rows[0])] + [",".join(f'"{v}"' for v in r.values()) for r in rows]
        (tmp_path / f"metadata.{kind}").write_text("\n".join(lines) + "\n", encoding="utf-8")

    write(rows)
    found = folder_data(tmp_path)
    assert found["label"][:] == [0, 1, 0] and found["caption"][2] == "no. 2, ü"
    assert Batches(found, 3).batch(0)["captions"][0].startswith("no. ")
    write(rows[:2])
    with pytest.raises(ValueError, match="1 of 3 pictures have no label: in/2.png"):
        folder_data(tmp_path)
    write([*rows, rows[0]])
    with pytest.raises(ValueError, match=f"metadata.{kind} has 1 pictures more than once: in/0.png"):
        folder_data(tmp_path)
    write([{"name": "x"}])
    with pytest.raises(ValueError, match="needs a file_name"):
        folder_data(tmp_path)
    (tmp_path / "metadata.csv").unlink(missing_ok=True)
    (tmp_path / "metadata.jsonl").write_text('{"file_name": \n')
    with pytest.raises(ValueError, match="one JSON object a line"):
        folder_data(tmp_path)


def test_captions_beside_the_pictures(tmp_path):
    fill(tmp_path, 2)
    (tmp_path / "readme.txt").write_text("not a caption")
    assert "caption" not in folder_data(tmp_path).features
    (tmp_path / "0.txt").write_text("one\n")
    with pytest.raises(ValueError, match="1 of 2 pictures have no caption: 1.png"):
        folder_data(tmp_path)
    (tmp_path / "1.txt").write_text("two")
    assert folder_data(tmp_path)["caption"][:] == ["one", "two"]
    assert "caption" not in folder_data(tmp_path, captions=False).features


def test_no_picture(tmp_path):
    with pytest.raises(ValueError, match="no folder"):
        folder_data(tmp_path / "nowhere")
    (tmp_path / "a.heic").write_bytes(b"x")
    with pytest.raises(ValueError, match="No picture .* but 1 .heic"):
        folder_data(tmp_path)
    with pytest.raises(ValueError, match="a file, not a folder"):
        folder_data(tmp_path / "a.heic")


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "tif", "gif", "bmp"])
def test_unreadable_and_truncated_pictures_are_named(tmp_path, suffix):
    fill(tmp_path, 3, (64, 64), names=f"{{}}.{suffix}")
    cut = tmp_path / f"1.{suffix}"
    cut.write_bytes(cut.read_bytes()[: cut.stat().st_size // 2])
    (tmp_path / f"x.{suffix}").write_text("this is no picture")
    (tmp_path / f"y.{suffix}").write_bytes(b"")
    with pytest.warns(
        UserWarning, match=f"3 of 5 pictures can't be read and are left out: 1.{suffix} .*x.{suffix} .*y"
    ):
        rows = folder_data(tmp_path)
    assert rows["file"][:] == [f"0.{suffix}", f"2.{suffix}"]
    for name in (f"0.{suffix}", f"2.{suffix}"):
        (tmp_path / name).unlink()
    with pytest.raises(ValueError, match="None of the 3 pictures can be read"):
        folder_data(tmp_path)


def test_small_pictures_are_named(tmp_path):
    fill(tmp_path, 3, (64, 48))
    noise(20, 90).save(tmp_path / "s.png")
    text = r"1 of 4 pictures are smaller than 32 pixels: s.png \(20\)"
    with pytest.warns(UserWarning, match=text + r"\. They are enlarged"):
        assert len(folder_data(tmp_path, size=32)) == 4
    with pytest.warns(UserWarning, match=text + r"\. They are left out"):
        assert len(folder_data(tmp_path, size=32, smaller="skip")) == 3
    with pytest.raises(ValueError, match=text):
        folder_data(tmp_path, size=32, smaller="error")
    rows = folder_data(tmp_path)
    for in_memory in (True, False):
        make = partial(Batches, rows, 2, size=32, in_memory=in_memory)
        with pytest.warns(UserWarning, match=text + r"\. They are enlarged"):
            assert len(make().dataset) == 4
        with pytest.warns(UserWarning, match=text + r"\. They are left out"):
            kept = make(smaller="skip")
        assert len(kept.dataset) == 3 and kept.batch(1)["images"].shape[0] == 2
        with pytest.raises(ValueError, match=text):
            make(smaller="error")
    with pytest.raises(ValueError, match="4 of 4 pictures are smaller"), warnings.catch_warnings():
        Batches(rows, 2, size=100, smaller="skip")
    with pytest.raises(ValueError, match="Nearest: 'upscale'"):
        Batches(rows, 2, size=16, smaller="upscaled")


def test_channels_may_be_insisted_on(tmp_path):
    fill(tmp_path, 3)
    noise(30, 30, 1).save(tmp_path / "g.png")
    with pytest.raises(ValueError, match="3 channels are asked for, and these are 1 grey: g.png; 3 colour: 0.png"):
        folder_data(tmp_path, channels=3)
    (tmp_path / "g.png").unlink()
    assert len(folder_data(tmp_path, channels=3)) == 3


def test_turned_photographs_stand_upright(tmp_path):
    picture = PIL.Image.fromarray(np.repeat(np.repeat(np.uint8([[0, 255]]), 40, 0), 20, 1))
    exif = picture.getexif()
    exif[0x0112] = 6  # turn by 90 degrees clockwise
    picture.save(tmp_path / "a.png", exif=exif)
    pixels = Batches(folder_data(tmp_path), 1, channels=1).images[0, 0]
    assert pixels.shape == (40, 40) and (pixels[:19] == 0).all() and (pixels[21:] == 255).all()


# --- batches


def numbered(n=25, size=8, labels=True, captions=True):
    "Pictures whose grey value is their number."
    rows = {"image": [PIL.Image.new("L", (size, size), i) for i in range(n)]}
    features = {"image": Image()}
    if labels:
        rows["label"], features["label"] = list(range(n)), Value("int64")
    if captions:
        rows["text"], features["text"] = [f"no. {i}" for i in range(n)], Value("string")
    return Dataset.from_dict(rows, features=Features(features))


def numbers(batch):
    return ((batch["images"][:, 0, 0, 0] + 1) * 127.5).round().long().tolist()


@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize("in_memory", [True, False])
def test_a_batch_is_what_the_contract_says(channels, in_memory):
    with pytest.warns(UserWarning, match="25 of 25 pictures are smaller than 16 pixels: number 0"):
        data = Batches(numbered(), 4, size=16, channels=channels, in_memory=in_memory)
    batch = data.batch(3)
    assert batch["images"].shape == (4, channels, 16, 16) and batch["images"].dtype == torch.float32
    assert batch["images"].min() >= -1 and batch["images"].max() <= 1
    assert batch["labels"].dtype == torch.int64 and numbers(batch) == batch["labels"].tolist()
    assert batch["captions"] == [f"no. {i}" for i in numbers(batch)]
    assert (data.images is not None) == in_memory
    if in_memory:
        assert data.images.dtype == torch.uint8 and data.images.shape == (25, channels, 16, 16)


def test_a_batch_depends_on_seed_and_step_alone():
    rows = numbered()
    data = Batches(rows, 4, flip=True, seed=5)
    expected = [data.batch(step) for step in range(20)]
    list(data), data.batch(100)
    for in_memory in (True, False):
        again = Batches(rows, 4, flip=True, seed=5, in_memory=in_memory)
        for step in (17, 3, 11, 3, 0):
            batch = again.batch(step)
            assert torch.equal(batch["images"], expected[step]["images"])
            assert torch.equal(batch["labels"], expected[step]["labels"])
            assert batch["captions"] == expected[step]["captions"]
    assert [numbers(b) for b in expected] != [numbers(Batches(rows, 4, seed=6).batch(s)) for s in range(20)]


def test_epochs_are_permutations_and_the_rest_is_dropped():
    data = Batches(numbered(24), 4)
    assert len(data) == 6
    epochs = [sum((numbers(data.batch(6 * e + i)) for i in range(6)), []) for e in range(3)]
    assert all(sorted(e) == list(range(24)) for e in epochs) and epochs[0] != epochs[1] != epochs[2]
    data = Batches(numbered(25), 4)
    seen = sum((numbers(data.batch(i)) for i in range(6)), [])
    assert len(data) == 6 and len(set(seen)) == 24
    assert [numbers(b) for b in data] == [numbers(data.batch(i)) for i in range(6)]
    assert [numbers(b) for b in data] == [numbers(data.batch(i)) for i in range(6, 12)]  # the second pass
    small = Batches(numbered(3), 8)
    assert len(small) == 1 and sorted(numbers(small.batch(4))) == [0, 1, 2]


@pytest.mark.parametrize("n, size, world", [(100, 8, 2), (25, 3, 4), (10, 8, 3), (7, 2, 3)])
def test_ranks_see_disjoint_parts_of_one_batch(n, size, world):
    for step in range(30):
        parts = [batch_indices(n, size, step, 1, rank, world) for rank in range(world)]
        whole, flips = batch_indices(n, size * world, step, 1)
        assert torch.equal(torch.cat([p for p, _ in parts]), whole) and len(set(whole.tolist())) == len(whole)
        assert torch.equal(torch.cat([f for _, f in parts]), flips)
    data = Batches(numbered(24), 4)
    both = numbers(data.batch(2, rank=0, world=2)) + numbers(data.batch(2, rank=1, world=2))
    assert len(set(both)) == 8


def test_wrong_batches_are_refused():
    for wrong in (dict(step=-1), dict(batch_size=0), dict(rank=2, world=2), dict(rank=-1), dict(world=11)):
        with pytest.raises(ValueError, match="No such batch.*10 pictures"):
            batch_indices(**{"n": 10, "batch_size": 2, "step": 0, **wrong})


def test_flip_mirrors_about_half():
    ramp = PIL.Image.fromarray(np.arange(64, dtype=np.uint8)[None].repeat(64, 0))
    rows = Dataset.from_dict({"image": [ramp] * 200}, features=Features({"image": Image()}))
    plain, flipped = (Batches(rows, 200, channels=1, flip=f).batch(0)["images"] for f in (False, True))
    mirrored = torch.tensor([torch.equal(a.flip(-1), b) for a, b in zip(plain, flipped)])
    same = torch.tensor([torch.equal(a, b) for a, b in zip(plain, flipped)])
    assert (mirrored ^ same).all() and 60 < mirrored.sum() < 140


def test_big_data_stays_on_disk(monkeypatch):
    assert Batches(numbered(4), 2).images is not None
    monkeypatch.setattr(data, "_large_enough", lambda names, sides, size, smaller: list(range(len(names))))
    big = Batches(numbered(4), 2, size=12_000)  # 4 pictures of 432 MB
    assert big.images is None


@pytest.mark.parametrize("in_memory", [True, False])
def test_unequal_pictures_need_a_size(in_memory):
    features = Features({"image": Image()})
    rows = concatenate_datasets([numbered(5, labels=False, captions=False), numbered(2, 9, False, False)])
    with pytest.raises(ValueError, match=r"are not 8×8 as the first: number [56] \(9×9\)"):
        Batches(rows, 7, in_memory=in_memory).batch(0)
    assert Batches(rows, 7, size=8).batch(0)["images"].shape == (7, 3, 8, 8)
    bad = Dataset.from_dict({"image": [{"bytes": b"no picture", "path": None}]}, features=features)
    with pytest.raises(ValueError, match="None of the 1 pictures can be read"):
        Batches(bad, 1)
    with pytest.raises(ValueError, match=r"1 of 8 pictures can't be read: number 7 \(Unidentified"):
        Batches(concatenate_datasets([rows, bad]), 8, size=8, in_memory=in_memory).batch(0)


def test_what_is_no_dataset_of_pictures_is_refused(tmp_path):
    for wrong, message in (
        (str(tmp_path), "folder_data"),
        (DatasetDict(train=numbered()), "Choose one of its splits: train"),
        ([1, 2], "not list"),
        (numbered().remove_columns("image"), "No picture in this dataset: 25 rows of label, text"),
        (numbered().select([]), "No picture in this dataset: 0 rows"),
    ):
        with pytest.raises(ValueError, match=message):
            Batches(wrong, 2)
    with pytest.raises(ValueError, match="1, 3 or 4 channels, not 2"):
        Batches(numbered(), 2, channels=2)
    with pytest.raises(ValueError, match="whole number of pixels"):
        Batches(numbered(), 2, size=0)
    names = Dataset.from_dict({"image": [PIL.Image.new("L", (8, 8))], "label": ["cat"]})
    with pytest.raises(ValueError, match="class_encode_column"):
        Batches(names, 1)


def test_a_transform_of_the_callers_is_left_alone():
    rows = numbered()
    rows.set_transform(lambda batch: {"image": [0 for _ in batch["image"]]})
    assert Batches(rows, 25).batch(0)["images"].shape == (25, 3, 8, 8)
    assert rows[0]["image"] == 0


def test_other_names_of_columns_are_understood():
    rows = numbered().rename_columns({"image": "picture", "label": "labels", "text": "caption"})
    assert set(Batches(rows, 2).batch(0)) == {"images", "labels", "captions"}


def test_every_dataset_has_a_description():
    assert list(DATASETS)[:3] == ["butterflies", "flowers", "moonmoths"]
    assert all(isinstance(what, str) and what for what in DATASETS.values())


def test_only_the_first_process_prints(monkeypatch, capsys, tmp_path):
    monkeypatch.setitem(os.environ, "RANK", "1")
    load_data("digits", count=2)
    folder_data(fill(tmp_path, 2))
    assert not capsys.readouterr().out

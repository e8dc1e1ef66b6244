"The commands: real work in a temporary folder, and mistakes that come back as one line."

import json
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from dm_course.cli import build_parser, main

TINY = ["--count", "24", "--widths", "16", "16", "--batch-size", "4", "--steps", "4", "--precision", "fp32"]


def test_train_then_sample(tmp_path, capsys):
    assert main(["train", *TINY, "--out", str(tmp_path / "run"), "--sample-every", "4"]) == 0
    assert (tmp_path / "run" / "samples" / "0000004.png").exists()
    assert json.loads((tmp_path / "run" / "pipeline" / "model_index.json").read_text())["_class_name"] == "DDPMPipeline"
    assert "about" in capsys.readouterr().out
    out = tmp_path / "new" / "grid.png"
    assert main(["sample", str(tmp_path / "run" / "pipeline"), "--count", "3", "--steps", "2", "--out", str(out)]) == 0
    assert Image.open(out).width > Image.open(out).height > 0


@pytest.mark.parametrize("mode,channels", [("L", 1), ("RGB", 3), ("RGBA", 4)])
def test_train_on_own_folder(tmp_path, mode, channels):
    folder = tmp_path / "mine"
    folder.mkdir()
    r = np.random.default_rng(0)
    for i in range(6):
        shape = (40 + 3 * i, 50, channels) if channels > 1 else (40 + 3 * i, 50)
        Image.fromarray(r.integers(0, 255, shape, np.uint8), mode).save(folder / f"{i}.png")
    args = ["train", "--data", str(folder), "--channels", str(channels), "--size", "16", *TINY]
    assert main([*args, "--out", str(tmp_path / "run")]) == 0


def test_other_data_do_not_go_on_from_the_last_run(tmp_path, capsys):
    words = ["train", *TINY, "--size", "16", "--out", str(tmp_path)]
    assert main(words) == 0 and main(words) == 0  # the same again: nothing is left to do
    assert main([*words, "--data", "flowers"]) == 2 and "has other data" in capsys.readouterr().err
    assert main([*words, "--data", "flowers", "--no-resume"]) == 0


def test_a_tracker_that_is_not_there_is_named(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("dm_course.cli.find_spec", lambda name: None)
    assert main(["train", *TINY, "--tracker", "wandb", "--out", str(tmp_path)]) == 2
    assert "wandb is not installed" in capsys.readouterr().err


def test_ema_zero_means_none(tmp_path):
    assert main(["train", *TINY, "--ema", "0", "--out", str(tmp_path)]) == 0


@pytest.mark.parametrize(
    "argv,words",
    [
        (["sample", "butterfly-32"], "butterflies-32"),
        (["sample", "loops"], "loops wants a class with each picture"),
        (["sample", "--steps", "0"], "--steps"),
        (["sample", "--count", "0"], "--count"),
        (["train", "--data", "buterflies"], "butterflies"),
        (["train", "--size", "30"], "multiple"),
        (["train", "--steps", "0", "--count", "8"], "steps"),
        (["train", "--lr", "-1", "--count", "8"], "lr"),
        (["zoo", "train"], "which model"),
        (["zoo", "train", "butterfly"], "butterflies-32"),
        (["zoo", "verify", "butterfly"], "butterflies-32"),
    ],
)
def test_mistakes_are_one_line(argv, words, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(argv) == 2
    error = capsys.readouterr().err
    assert error.startswith("dm-course: ") or "\ndm-course: " in error
    assert words in error and "Traceback" not in error


def test_empty_folder_is_explained(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    assert main(["train", "--data", str(tmp_path / "empty")]) == 2
    assert "no picture" in capsys.readouterr().err.lower()


def test_zoo_and_doctor(capsys):
    assert main(["zoo", "list"]) == 0 and "butterflies-32" in capsys.readouterr().out
    assert main(["zoo", "verify"]) == 0 and "intact" in capsys.readouterr().out
    assert main(["doctor"]) == 0 and "torch" in capsys.readouterr().out


def test_every_command_has_help(capsys):
    for command in ("train", "finetune", "dreambooth", "sample", "zoo", "demo", "doctor"):
        with pytest.raises(SystemExit) as stop:
            build_parser().parse_args([command, "--help"])
        assert stop.value.code == 0 and "usage" in capsys.readouterr().out


def test_runs_as_a_module():
    done = subprocess.run(
        [sys.executable, "-m", "dm_course.cli", "--help"], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0 and "doctor" in done.stdout

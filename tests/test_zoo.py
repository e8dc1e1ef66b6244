"""Zoo: what is sealed is loaded, and what is damaged, unknown or able to run code is refused by name."""

import json
import socket
import time
import warnings

import pytest
import torch
from diffusers import DDIMScheduler, DDPMPipeline, UNet2DModel
from safetensors.torch import load_file
from transformers import ResNetConfig, ResNetForImageClassification

from dm_course import recipes, zoo
from dm_course.zoo import WeightsError, card, load, measured, models, save_half, seal, verify, write_card

WEIGHTS = "unet/diffusion_pytorch_model.safetensors"


def tiny_pipeline():
    torch.manual_seed(0)
    unet = UNet2DModel(
        sample_size=8,
        block_out_channels=(8, 8),
        down_block_types=("DownBlock2D",) * 2,
        up_block_types=("UpBlock2D",) * 2,
        norm_num_groups=4,
        layers_per_block=1,
    )
    return DDPMPipeline(unet, DDIMScheduler(prediction_type="v_prediction"))


def tiny_judge():
    torch.manual_seed(0)
    names = {0: "colour=red", 1: "colour=blue"}
    config = ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 8], depths=[1, 1], layer_type="basic", id2label=names, num_labels=2
    )
    judge = ResNetForImageClassification(config)
    judge(torch.randn(4, 3, 16, 16))  # moves the running statistics
    return judge.eval()


@pytest.fixture(scope="module")
def egg(tmp_path_factory):
    """A sealed pipeline, as one would ship it."""
    folder = save_half(tiny_pipeline(), tmp_path_factory.mktemp("made") / "egg")
    write_card(folder, {"what": "an egg", "seed": 0, "measured": {"loss": 1.5}}, "# Egg")
    seal(folder)
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.fixture
def nursery(tmp_path, monkeypatch, egg):
    """A folder of models with a fresh copy of the egg in it."""
    for name, content in egg.items():
        path = tmp_path / "egg" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    monkeypatch.setenv("DM_COURSE_WEIGHTS", str(tmp_path))
    monkeypatch.setenv("DM_COURSE_DEVICE", "cpu")
    return tmp_path


@pytest.fixture
def no_network(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


# load


def test_a_pipeline_comes_back_as_it_was(nursery, no_network, capfd):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pipeline = load("egg")
    assert capfd.readouterr() == ("", "")
    assert type(pipeline) is DDPMPipeline and pipeline.scheduler.config.prediction_type == "v_prediction"
    assert {p.dtype for p in pipeline.unet.parameters()} == {torch.float32} and not pipeline.unet.training
    for a, b in zip(pipeline.unet.parameters(), tiny_pipeline().unet.parameters()):
        assert torch.equal(a, b.half().float())
    pipeline(num_inference_steps=2, generator=torch.Generator().manual_seed(0))
    assert "%" not in capfd.readouterr().err


def test_a_judge_comes_back_as_it_was(nursery, no_network, capfd):
    judge = tiny_judge()
    seal(save_half(judge, nursery / "judge"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaded = load("judge")
    assert capfd.readouterr() == ("", "")
    assert type(loaded) is ResNetForImageClassification and loaded.config.id2label[1] == "colour=blue"
    assert {p.dtype for p in loaded.parameters()} == {torch.float32} and not loaded.training
    x = torch.randn(2, 3, 16, 16)
    assert torch.allclose(loaded(x).logits, judge(x).logits, atol=5e-3)
    assert judge.dtype == torch.float32  # saving has not changed it


def test_a_single_diffusers_model(nursery, no_network):
    seal(save_half(tiny_pipeline().unet, nursery / "unet"))
    assert type(load("unet")) is UNet2DModel


def test_on_disk_it_is_half_precision(nursery):
    assert {v.dtype for v in load_file(nursery / "egg" / WEIGHTS).values()} == {torch.float16}


def test_unknown_model_lists_the_valid_and_the_nearest(nursery):
    (nursery / "butterflies-32").mkdir()
    (nursery / "butterflies-32" / "config.json").write_text("{}")
    for call in (load, verify, card):
        with pytest.raises(WeightsError, match="Unknown model 'buterfly'.*Nearest: 'butterflies-32'.*egg"):
            call("buterfly")
    assert models() == ["butterflies-32", "egg"]


def test_missing_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("DM_COURSE_WEIGHTS", str(tmp_path / "nowhere"))
    for call in (models, verify, lambda: load("egg")):
        with pytest.raises(WeightsError, match="nowhere"):
            call()
    monkeypatch.setenv("DM_COURSE_WEIGHTS", str(tmp_path))  # there, and empty
    assert models() == verify() == []
    with pytest.raises(WeightsError, match="none here"):
        load("egg")


# damage


def refused(*parts):
    for call in (verify, load):
        with pytest.raises(WeightsError) as error:
            call("egg")
        for part in parts:
            assert part in str(error.value), (part, str(error.value))


@pytest.mark.parametrize("name", [WEIGHTS, "model_index.json", "scheduler/scheduler_config.json", "README.md"])
@pytest.mark.parametrize("damage", ["flip", "cut", "empty", "grow"])
def test_a_damaged_file_is_refused_with_its_checksum(nursery, egg, name, damage):
    file, good = nursery / "egg" / name, egg[name]
    middle = len(good) // 2
    bad = {
        "flip": good[:middle] + bytes([good[middle] ^ 1]) + good[middle + 1 :],
        "cut": good[:-1],
        "empty": b"",
        "grow": good + b"\n",
    }[damage]
    verify("egg")  # known to be good, until now
    file.write_bytes(bad)
    wanted = json.loads(egg["checksums.json"])[name]["sha256"]
    refused(f"egg/{name}", "damaged" if len(bad) >= len(good) else "truncated", wanted, zoo.sha256(file))
    file.write_bytes(good)
    assert verify("egg") == ["egg"]


def test_missing_and_unknown_files_are_named(nursery):
    (nursery / "egg" / WEIGHTS).unlink()
    (nursery / "egg" / "notes.txt").write_text("")
    refused(f"egg/{WEIGHTS} is missing", "egg/notes.txt is not in the seal")


def test_what_the_system_hides_in_folders_does_no_harm(nursery):
    (nursery / "egg" / ".DS_Store").write_text("")
    (nursery / "egg" / ".cache").mkdir()
    (nursery / "egg" / ".cache" / "x.lock").write_text("")
    (nursery / ".trash").mkdir()
    assert verify() == ["egg"] == models()


@pytest.mark.parametrize("content", [None, "", "{", "[]", '{"README.md": 3}', '{"README.md": {"bytes": 1}}'])
def test_a_broken_seal(nursery, content):
    path = nursery / "egg" / "checksums.json"
    path.unlink() if content is None else path.write_text(content)
    refused("egg/checksums.json is missing" if content is None else "egg/checksums.json is damaged")


def test_verify_all_names_every_problem_at_once(nursery, egg):
    seal(save_half(tiny_judge(), nursery / "judge"))
    assert verify() == ["egg", "judge"]
    (nursery / "egg" / "README.md").unlink()
    (nursery / "judge" / "config.json").write_text("{}")
    with pytest.raises(WeightsError, match=r"(?s)egg/README.md is missing.*judge/config.json is truncated"):
        verify()


@pytest.mark.parametrize("name", ["pytorch_model.bin", "unet/weights.pt", "x.PKL", "code.py", "x.ckpt"])
def test_pickles_and_code_are_never_loaded(nursery, name):
    (nursery / "egg" / name).write_bytes(b"")
    refused(f"egg/{name}", "never loaded")
    with pytest.raises(WeightsError, match="never loaded"):
        seal(nursery / "egg")


def test_a_file_is_hashed_once_a_process(nursery, monkeypatch):
    verify("egg")
    monkeypatch.setattr(zoo.hashlib, "file_digest", lambda *a: pytest.fail("hashed again"))
    began = time.monotonic()
    verify("egg")
    assert time.monotonic() - began < 1


def test_intact_and_yet_not_loadable(nursery):
    for config, message in (
        ({}, "neither"),
        ({"_class_name": "NoSuchPipeline"}, "a NoSuchPipeline, which the installed diffusers"),
        ({"_class_name": "UNet2DModel"}, "intact, and yet"),
    ):
        folder = nursery / "odd"
        folder.mkdir(exist_ok=True)
        (folder / "config.json").write_text(json.dumps(config))
        seal(folder)
        with pytest.raises(WeightsError, match=message):
            load("odd")


# making one


def test_seal_needs_something_to_seal(tmp_path):
    for folder in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(WeightsError, match="no model to seal"):
            seal(folder)


def test_weights_that_do_not_fit_into_half_precision_are_named(tmp_path):
    judge = tiny_judge()
    judge.classifier[1].weight.data[0, 0] = 1e6
    with pytest.raises(WeightsError, match="classifier.1.weight is not finite"):
        save_half(judge, tmp_path / "judge")
    assert list(tmp_path.iterdir()) == []  # nothing half-done is left


def test_saving_replaces_the_whole_folder(tmp_path):
    save_half(tiny_judge(), tmp_path / "m")
    (tmp_path / "m" / "left_over.txt").write_text("")
    save_half(tiny_judge(), tmp_path / "m")
    assert sorted(p.name for p in (tmp_path / "m").iterdir()) == ["config.json", "model.safetensors"]
    assert [p.name for p in tmp_path.iterdir()] == ["m"]


def test_no_path_of_the_machine_is_saved(nursery):
    again = save_half(load("egg"), nursery / "again")
    for path in again.rglob("*.json"):
        assert str(nursery) not in path.read_text(), path


# cards and figures


def test_a_card_says_what_it_was_told(nursery):
    facts = {
        "what": "Grün: a test",
        "measured": {"score": torch.tensor(0.25), "pair": (1, 2.5), "nothing": float("nan")},
        "steps": 10,
    }
    write_card(nursery / "egg", facts, "# A card\n\nwith --- in it\n\n---\n\nand more")
    seal(nursery / "egg")
    read = card("egg")
    assert read == {
        "what": "Grün: a test",
        "measured": {"score": 0.25, "pair": [1, 2.5], "nothing": None},
        "steps": 10,
    } and list(read) == list(facts)
    from huggingface_hub import ModelCard

    assert ModelCard.load(nursery / "egg" / "README.md").data.to_dict()["steps"] == 10


@pytest.mark.parametrize("text", [None, "", "# no facts", "---\n- a list\n---\n", "---\na: [\n---\n"])
def test_a_card_that_can_not_be_read(nursery, text):
    path = nursery / "egg" / "README.md"
    path.unlink() if text is None else path.write_text(text)
    with pytest.raises(WeightsError, match="egg/README.md"):
        card("egg")


def test_measured(tmp_path, monkeypatch):
    monkeypatch.setattr(zoo, "measured_dir", lambda: tmp_path / "measured")
    with pytest.raises(ValueError, match="none here"):
        measured("grid")
    zoo.write_measured("sampler_grid", {"fd": torch.tensor([1.0, 2.0])})
    assert measured("sampler_grid") == {"fd": [1.0, 2.0]}
    with pytest.raises(ValueError, match="Nearest: 'sampler_grid'"):
        measured("sampler")
    (tmp_path / "measured" / "sampler_grid.json").write_text("{")
    with pytest.raises(ValueError, match="sampler_grid.json"):
        measured("sampler_grid")


# what is bundled


@pytest.mark.parametrize("name", models() or [pytest.param(None, marks=pytest.mark.skip("no model is bundled yet"))])
def test_bundled(name):
    folder = zoo.model_dir(name)
    assert verify(name) == [name]
    missing = {"what", "license", "command", "data", "steps", "seconds", "machine", "seed", "measured"} - set(
        card(name)
    )
    assert not missing, f"the card of {name} does not say: {missing}"
    assert card(name)["measured"]
    for path in folder.rglob("*.safetensors"):
        wide = [k for k, v in load_file(path).items() if v.dtype in (torch.float32, torch.float64)]
        assert not wide, f"{path.name} holds more than half precision: {wide[:3]}"
    assert load(name) is not None


def test_all_together_are_small():
    assert sum(p.stat().st_size for n in models() for p in zoo.model_dir(n).rglob("*") if p.is_file()) <= 60e6


def test_a_folder_of_open_clip_is_loaded_by_open_clip(tmp_path, monkeypatch):
    clip, _ = recipes.new_clip()
    folder = save_half(recipes.ClipFolder(clip), tmp_path / "words")
    write_card(folder, {"what": "a clip"}, "# Words")
    seal(folder)
    monkeypatch.setenv("DM_COURSE_WEIGHTS", str(tmp_path))
    opened = load("words")
    assert type(opened).__name__ == "CLIP" and not opened.training
    assert {p.dtype for p in opened.parameters()} == {torch.float32}

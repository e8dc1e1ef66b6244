"""The module of lesson 33: words, streams, losses, LoRA, saving and opening, the command, and the exercises."""

import copy
import json
import re
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml
from diffusers import AutoencoderKL, DDIMScheduler, DDPMPipeline, StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image
from shared import normal
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from dm_course import cli
from dm_course import dreambooth as module
from dm_course.dreambooth import (
    ATTENTION,
    CONVOLUTIONS,
    LORA_FILE,
    Prompted,
    TwoStreams,
    add_lora,
    check_subject,
    check_token,
    class_pictures,
    dreambooth,
    dreambooth_loss,
    endless,
    lookalikes,
    lora_weights,
    new_probe,
    open_text_pipeline,
    own_copy,
    save_dreambooth,
    similarity,
    stream,
)
from dm_course.latent import embed_prompt, encode, text_to_image
from dm_course.recipes import new_unet
from dm_course.sampling import PREDICTION_TYPES, alpha_bar, denoiser, diffusion_loss

WORDS = ("a", "butterfly", "red", "moth", "on", "white", "paper", "in", "sky", "cloudy", "sks")
FAST = {"lr": 1e-3, "precision": "fp32", "progress": False}


def new_tokenizer(folder):
    """A CLIP tokenizer of single letters and a few words; the words that come last are the rarest."""
    letters = [chr(i) for i in range(33, 127)]
    vocab, merges = [*letters, *(c + "</w>" for c in letters)], []
    for word in WORDS:
        left = word[0]
        for i in range(1, len(word)):
            right = word[i] + ("</w>" if i == len(word) - 1 else "")
            if f"{left} {right}" not in merges:
                merges.append(f"{left} {right}")
                vocab.append(left + right)
            left += right
    vocab = [*dict.fromkeys(vocab), "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(vocab)}))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]))
    return CLIPTokenizer.from_pretrained(folder, model_max_length=77)


def new_parts(tokenizer):
    """An autoencoder, a text encoder and a UNet, all untrained and tiny."""
    ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    config = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = CLIPTextModel(CLIPTextConfig(vocab_size=len(tokenizer), projection_dim=16, **config, **ends))
    blocks = {"down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D")}
    blocks |= {"up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"), "block_out_channels": (16, 16)}
    shape = {"sample_size": 8, "in_channels": 4, "out_channels": 4, "layers_per_block": 1, "norm_num_groups": 8}
    unet = UNet2DConditionModel(**shape, **blocks, cross_attention_dim=16, attention_head_dim=2)
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 3, "up_block_types": ("UpDecoderBlock2D",) * 3}
    sizes = {"block_out_channels": (8, 8, 8), "norm_num_groups": 4, "sample_size": 32, "scaling_factor": 0.7}
    return AutoencoderKL(latent_channels=4, **blocks, **sizes), text, unet


def new_pipeline(folder):
    """A whole text-to-image pipeline, untrained: pictures of 32 pixels, latents of 8."""
    torch.manual_seed(0)
    tokenizer = new_tokenizer(folder)
    vae, text, unet = (part.eval() for part in new_parts(tokenizer))
    options = {"timestep_spacing": "trailing", "clip_sample": False, "steps_offset": 1}
    scheduler = DDIMScheduler(prediction_type="v_prediction", rescale_betas_zero_snr=True, **options)
    none = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    made = StableDiffusionPipeline(vae, text, tokenizer, unet, scheduler, **none)
    made.set_progress_bar_config(disable=True)
    return made


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    """The tiny pipeline, one for all tests: none may change it."""
    return new_pipeline(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def streams(pipeline):
    """Three pictures of a subject and four of its class, ready to train on."""
    ours = stream(pipeline, normal(3, 3, 32, 32).clamp(-1, 1), "a sks butterfly")
    return ours, stream(pipeline, normal(4, 3, 32, 32, seed=1).clamp(-1, 1), "a butterfly")


def weights(network):
    """The weights of a network as one vector."""
    return torch.cat([p.detach().flatten() for p in network.parameters()])


def said(pipeline, prompt="a sks butterfly", t=300):
    """What a pipeline's UNet says of always the same latents."""
    with torch.no_grad():
        told = embed_prompt(pipeline, [prompt] * 2)
        return pipeline.unet(normal(2, 4, 8, 8, seed=5), t, encoder_hidden_states=told).sample


# Measures


def test_similarity_is_the_mean_cosine_of_all_pairs():
    a, b = normal(3, 5), normal(2, 5, seed=1)
    pairs = [F.cosine_similarity(x, y, dim=0) for x in a for y in b]
    assert similarity(a, 7 * b) == pytest.approx(torch.stack(pairs).mean().item(), abs=1e-6)
    assert similarity(a[:1], a[:1]) == pytest.approx(1) and similarity(a[:1], -a[:1]) == pytest.approx(-1)


def test_a_probe_tells_two_crowds_apart_and_knows_the_side():
    centre = normal(12)
    near, far = (normal(200, 12, seed=s) + sign * centre for s, sign in ((1, 1), (2, -1)))
    probe = new_probe(near[:100], far[:100])
    assert (probe(near[100:]) > 0).float().mean() > 0.95 and (probe(far[100:]) > 0).float().mean() < 0.05
    assert probe(near[:1].half()).shape == (1,)


def test_a_probe_is_not_drawn_to_the_larger_crowd():
    few, many = normal(10, 4, seed=1) + 3, normal(300, 4, seed=2) - 3
    probe = new_probe(few, many)
    assert (probe(normal(100, 4, seed=3) + 3) > 0).all() and (probe(normal(100, 4, seed=4) - 3) < 0).all()


def test_a_probe_wants_two_of_each():
    with pytest.raises(ValueError, match="not 1 and 3"):
        new_probe(normal(1, 4), normal(3, 4))


def test_lookalikes_are_butterflies_of_her_colour():
    pictures = lookalikes(3, 32, seed=4)
    assert pictures.shape == (3, 3, 32, 32) and pictures.dtype == torch.float32 and pictures.abs().max() <= 1
    assert torch.equal(lookalikes(2, 32, seed=4), pictures[:2]) and not torch.equal(lookalikes(3, 32), pictures)


# Words


def test_a_rare_token_is_free(pipeline):
    check_token(pipeline.tokenizer, "sks")


@pytest.mark.parametrize(
    ("token", "why"),
    [
        ("butterfly", "is a common word"),
        ("red", "is a common word"),
        ("BUTTERFLY", "is a common word"),
        ("zzz", r"should be one token, and is 3 \(z z z</w>\)"),
        ("red moth", "should be one token, and is 2"),
        ("", "is 0"),
        ("<|endoftext|>", "should be one token"),
    ],
)
def test_other_words_are_refused(pipeline, token, why):
    with pytest.raises(ValueError, match=why):
        check_token(pipeline.tokenizer, token)


def test_in_a_large_vocabulary_common_words_come_first():
    class Large:
        all_special_tokens = ()

        def __len__(self):
            return 50_000

        def tokenize(self, text):
            return [text]

        def convert_tokens_to_ids(self, token):
            return {"dog": 1_929, "sks": 48_136}[token]

    check_token(Large(), "sks")
    with pytest.raises(ValueError, match="common word"):
        check_token(Large(), "dog")


# Streams


def test_a_stream_holds_latents_and_tokens(pipeline):
    images = normal(3, 3, 32, 32).clamp(-1, 1)
    prompts = ["a red moth", "a sks butterfly", "a moth in cloudy sky"]
    made = stream(pipeline, images, prompts)
    with torch.no_grad():
        assert torch.allclose(made["latents"], encode(pipeline.vae, images), atol=1e-5)
        told = pipeline.text_encoder(made["tokens"]).last_hidden_state
    assert torch.allclose(told, embed_prompt(pipeline, prompts), atol=1e-5)
    assert stream(pipeline, images, "a red moth")["tokens"].shape == (3, 77)


@pytest.mark.parametrize(
    ("shape", "prompts", "why"),
    [
        ((2, 3, 32, 30), "a moth", "30 × 32; this model needs multiples of 8"),
        ((2, 3, 32, 32), ["a moth"] * 3, "3 prompts for 2 pictures"),
        ((0, 3, 32, 32), "a moth", "0 pictures"),
    ],
)
def test_a_stream_refuses_what_does_not_fit(pipeline, shape, prompts, why):
    with pytest.raises(ValueError, match=why):
        stream(pipeline, torch.zeros(shape), prompts)


def test_a_prompt_that_is_too_long_is_warned_of(pipeline):
    with pytest.warns(UserWarning, match="butterfly"):
        stream(pipeline, torch.zeros(1, 3, 32, 32), "a red moth " * 40 + "butterfly")


@pytest.mark.parametrize("count", [1, 2, 5, 7])
def test_the_endless_row_shows_each_picture_once_a_round(count):
    row = endless(count, 0, 12 * count, seed=3)
    assert all(sorted(turn) == list(range(count)) for turn in row.reshape(12, count).tolist())
    for first, length in ((0, 4), (3, 9), (2 * count, 1)):
        assert torch.equal(endless(count, first, length, seed=3), row[first : first + length])
    assert count < 5 or not torch.equal(endless(count, 0, 12 * count, seed=4), row)


@pytest.mark.parametrize("size", [1, 2, 3, 8])
def test_two_streams_are_dealt_side_by_side(streams, size):
    ours, theirs = streams
    data = TwoStreams(ours, theirs, size, seed=1)
    for number in (0, 3):
        batch = data.batch(number)
        assert {len(value) for value in batch.values()} == {size}  # `train` cuts all of a batch alike
        assert torch.equal(batch["latents"], ours["latents"][endless(3, number * size, size, 2)])
        assert torch.equal(batch["prior_latents"], theirs["latents"][endless(4, number * size, size, 3)])
        assert torch.equal(batch["prior_tokens"][0], theirs["tokens"][0])
    assert set(TwoStreams(ours, None, size).batch(0)) == {"latents", "tokens"}


def test_processes_share_what_one_would_do(streams):
    parts = [TwoStreams(*streams, 2).batch(1, rank, 3) for rank in range(3)]
    whole = TwoStreams(*streams, 6).batch(1)
    for key, value in whole.items():
        assert torch.equal(torch.cat([part[key] for part in parts]), value)


def test_class_pictures_are_the_models_own(pipeline):
    g = torch.Generator().manual_seed(2)
    pictures, prompts = class_pictures(pipeline, ["a moth", "a butterfly"], 5, 1.0, 2, batch_size=2, generator=g)
    assert pictures.shape == (5, 3, 32, 32) and pictures.abs().max() <= 1
    assert prompts == ["a moth", "a butterfly", "a moth", "a butterfly", "a moth"]
    first = text_to_image(pipeline, prompts[:2], 1.0, 2, generator=torch.Generator().manual_seed(2)).clamp(-1, 1)
    assert torch.allclose(pictures[:2], first, atol=1e-5)
    assert class_pictures(pipeline, "a moth", 1, 1.0, 1, size=16)[0].shape == (1, 3, 16, 16)
    for wrong in (("a moth", 0), ([], 2)):
        with pytest.raises(ValueError, match="nothing to preserve"):
            class_pictures(pipeline, *wrong)


# The loss


@pytest.mark.parametrize("kind", PREDICTION_TYPES)
@pytest.mark.parametrize("sizes", [(1, 1), (2, 2), (3, 3), (1, 3), (3, 2)])
def test_two_streams_give_two_means_added(pipeline, streams, kind, sizes):
    scheduler = DDIMScheduler(prediction_type=kind)
    (ours, theirs), network = streams, Prompted(pipeline.unet, pipeline.text_encoder)
    batch = {key: value[: sizes[0]] for key, value in ours.items()}
    batch |= {f"prior_{key}": value[: sizes[1]] for key, value in theirs.items()}
    torch.manual_seed(7)
    with torch.no_grad():
        found = dreambooth_loss(scheduler, 0.3)(network, batch)
    torch.manual_seed(7)
    z = torch.cat([batch["latents"], batch["prior_latents"]])
    t, epsilon = torch.randint(0, scheduler.config.num_train_timesteps, (sum(sizes),)), torch.randn_like(z)
    a = alpha_bar(scheduler, t)
    truth = {"epsilon": epsilon, "v_prediction": a.sqrt() * epsilon - (1 - a).sqrt() * z, "sample": z}[kind]
    means = []
    for rows, tokens in ((slice(0, sizes[0]), batch["tokens"]), (slice(sizes[0], None), batch["prior_tokens"])):
        with torch.no_grad():  # each stream by a call of its own
            x = (a.sqrt() * z + (1 - a).sqrt() * epsilon)[rows]
            means.append((network(x, t[rows], tokens) - truth[rows]).square().mean())
    assert torch.allclose(found, means[0] + 0.3 * means[1], rtol=1e-4)


def test_without_a_class_it_is_the_loss_of_lesson_11(pipeline, streams):
    network, batch = Prompted(pipeline.unet, pipeline.text_encoder), TwoStreams(streams[0], None, 3).batch(0)
    plain = diffusion_loss(pipeline.scheduler)
    found = []
    for f in (
        lambda: dreambooth_loss(pipeline.scheduler)(network, batch),
        lambda: plain(denoiser(network, tokens=batch["tokens"]), {"images": batch["latents"]}),
    ):
        torch.manual_seed(1)
        with torch.no_grad():
            found.append(f().item())
    assert found[0] == pytest.approx(found[1], rel=1e-5)


def test_every_timestep_can_be_drawn(streams):
    scheduler, shown = DDIMScheduler(num_train_timesteps=4), set()

    def network(x, t, tokens):
        shown.update(t.tolist())
        return torch.zeros_like(x)

    for step in range(30):
        dreambooth_loss(scheduler)(network, TwoStreams(*streams, 2).batch(step))
    assert shown == {0, 1, 2, 3}


def test_another_kind_of_prediction_is_refused():
    scheduler = DDIMScheduler()
    scheduler.register_to_config(prediction_type="flow")
    with pytest.raises(ValueError, match="flow"):
        dreambooth_loss(scheduler)


# LoRA


@pytest.mark.parametrize("targets", [ATTENTION, (*ATTENTION, *CONVOLUTIONS)])
def test_lora_begins_as_nothing_and_leaves_the_rest_frozen(pipeline, targets):
    twin = own_copy(pipeline)
    numbers = add_lora(twin.unet, 4, targets, seed=1)
    assert torch.allclose(said(twin), said(pipeline), atol=1e-6)
    trained = {name: p for name, p in twin.unet.named_parameters() if p.requires_grad}
    assert all("lora_" in name for name in trained) and sum(p.numel() for p in trained.values()) == numbers
    assert not any(p.requires_grad for name, p in twin.unet.named_parameters() if "lora_" not in name)
    assert any("conv1" in name for name in trained) == ("conv1" in targets)
    again = own_copy(pipeline)
    add_lora(again.unet, 4, targets, seed=1)
    assert torch.equal(weights(again.unet), weights(twin.unet))  # the same seed, the same A


def test_lora_is_a_product_of_two_thin_matrices(pipeline):
    twin = own_copy(pipeline).unet
    add_lora(twin, 3, (*ATTENTION, *CONVOLUTIONS))
    name = next(n for n, _ in pipeline.unet.named_modules() if n.endswith("attn2.to_k"))
    old, new, x = pipeline.unet.get_submodule(name), twin.get_submodule(name), normal(5, 16)
    up, down = new.lora_B["default"].weight, new.lora_A["default"].weight
    torch.nn.init.normal_(up)
    assert torch.allclose(new(x), F.linear(x, old.weight + up @ down, old.bias), atol=1e-4)
    name = next(n for n, _ in pipeline.unet.named_modules() if n.endswith("conv1"))
    old, new, x = pipeline.unet.get_submodule(name), twin.get_submodule(name), normal(2, 16, 6, 6)
    up, down = new.lora_B["default"].weight, new.lora_A["default"].weight
    torch.nn.init.normal_(up)
    change = (up.flatten(1) @ down.flatten(1)).reshape(old.weight.shape)
    assert torch.allclose(new(x), F.conv2d(x, old.weight + change, old.bias, padding=1), atol=1e-4)


@pytest.mark.parametrize(
    ("rank", "targets", "why"),
    [(0, ATTENTION, "ranks begin at 1"), (4, ("to_x",), "is called to_x"), (4, (), "must be a layer")],
)
def test_an_impossible_lora_is_refused(pipeline, rank, targets, why):
    with pytest.raises(ValueError, match=why):
        add_lora(own_copy(pipeline).unet, rank, targets)


def test_a_model_that_carries_lora_is_not_taught(pipeline, streams):
    made = dreambooth(pipeline, *streams, batch_size=1, steps=1, rank=2, **FAST).pipeline
    with pytest.raises(ValueError, match="fuse_lora"):
        dreambooth(made, *streams, batch_size=1, steps=1, **FAST)
    made.fuse_lora()
    made.unload_lora_weights()
    assert dreambooth(made, *streams, batch_size=1, steps=1, **FAST).run.step == 1


@pytest.mark.parametrize(
    ("wrong", "why"),
    [({"batch_size": 0}, "at least 1"), ({"prior_weight": -1.0}, "not below 0"), ({"rank": 0}, "ranks begin at 1")],
)
def test_numbers_out_of_range_are_refused(pipeline, streams, wrong, why):
    with pytest.raises(ValueError, match=why):
        dreambooth(pipeline, *streams, steps=1, **wrong)


# Training


@pytest.mark.parametrize("how", ["whole", "lora", "text"])
def test_only_what_shall_learn_does_and_the_start_stays(pipeline, streams, how):
    before = weights(pipeline.unet), weights(pipeline.text_encoder)
    options = {"whole": {}, "lora": {"rank": 2}, "text": {"train_text": True}}[how]
    made = dreambooth(pipeline, *streams, batch_size=1, steps=1, **options, **FAST)
    assert torch.equal(weights(pipeline.unet), before[0]) and torch.equal(weights(pipeline.text_encoder), before[1])
    assert all(p.requires_grad for p in pipeline.unet.parameters())
    assert torch.equal(weights(made.pipeline.text_encoder), before[1]) == (how != "text")
    base = torch.cat([p.detach().flatten() for n, p in made.pipeline.unet.named_parameters() if "lora_" not in n])
    assert torch.equal(base, before[0]) == (how == "lora")
    assert not torch.equal(said(made.pipeline), said(pipeline)) and made.pipeline.vae is pipeline.vae
    assert not made.pipeline.unet.training and len(made.run.losses) == 1 and made.rank == options.get("rank")


def test_the_class_pulls_at_the_weights(pipeline, streams):
    runs = [(None, 1.0), (streams[1], 1.0), (streams[1], 0.0)]
    ends = [
        weights(dreambooth(pipeline, streams[0], prior, weight, batch_size=2, steps=1, **FAST).pipeline.unet)
        for prior, weight in runs
    ]
    assert not torch.equal(ends[0], ends[1]) and not torch.equal(ends[1], ends[2])


@pytest.mark.parametrize("rank", [None, 2])
def test_a_run_that_was_cut_off_goes_on_bit_for_bit(pipeline, streams, tmp_path, rank):
    options = {"rank": rank, "batch_size": 2, "steps": 2, "ema": 0.9, "save_every": 1, "sample_every": 1, **FAST}

    def pull_the_plug(made):
        raise KeyboardInterrupt

    whole = dreambooth(pipeline, *streams, **options)
    with pytest.raises(KeyboardInterrupt):
        dreambooth(pipeline, *streams, look=pull_the_plug, out=tmp_path, **options)
    resumed = dreambooth(pipeline, *streams, out=tmp_path, **options)
    assert resumed.run.losses == whole.run.losses and len(whole.run.losses) == 2
    assert torch.equal(weights(resumed.pipeline.unet), weights(whole.pipeline.unet))


def test_one_may_look_on_the_way(pipeline, streams, tmp_path):
    looked = []

    def look(made):
        looked.append(weights(made.unet))
        return normal(2, 3, 8, 8).clamp(-1, 1)

    options = {"batch_size": 1, "steps": 2, "sample_every": 1, "out": tmp_path}
    made = dreambooth(pipeline, *streams, look=look, **options, **FAST)
    assert len(looked) == 2 and torch.equal(looked[1], weights(made.pipeline.unet))
    assert len(list((tmp_path / "samples").iterdir())) == 2


def test_what_can_not_work_is_refused_before_any_work(pipeline, streams):
    one = {key: value[:1] for key, value in streams[0].items()}
    with pytest.raises(ValueError, match="1 picture of the subject: two are needed"):
        dreambooth(pipeline, one, steps=1)
    with pytest.raises(ValueError, match="either a rank, or the text encoder"):
        dreambooth(pipeline, streams[0], steps=1, rank=2, train_text=True)
    with pytest.raises(ValueError, match="0 pictures"):
        check_subject(0)
    with pytest.raises(ValueError, match="steps"):
        dreambooth(pipeline, streams[0], steps=0)


# Saving and opening


@pytest.fixture(scope="module")
def saved(pipeline, streams, tmp_path_factory):
    """A start model and, made from it, a whole model and a LoRA, all in folders; and what was made."""
    home, made = tmp_path_factory.mktemp("saved"), {}
    pipeline.save_pretrained(home / "start")
    for way, options in {"whole": {}, "lora": {"rank": 2, "targets": (*ATTENTION, *CONVOLUTIONS)}}.items():
        made[way] = dreambooth(pipeline, *streams, batch_size=1, steps=1, **options, **FAST)
        if way == "lora":
            for name, p in made[way].pipeline.unet.named_parameters():
                if "lora_B" in name:
                    torch.nn.init.normal_(p, std=0.3)
        about = (home / "start", "a sks butterfly", "a moth", 3)
        save_dreambooth(made[way], home / way, *about, normal(3, 3, 32, 32).clamp(-1, 1), seed=0, learning_rate=1e-3)
    return home, made


def test_a_card_says_what_one_needs(saved):
    home, made = saved
    for way in made:
        text = (home / way / "README.md").read_text()
        head = yaml.safe_load(text.split("---\n")[1])
        assert head["instance_prompt"] == "a sks butterfly" and head["subject"] == "a moth" and head["pictures"] == 3
        assert head["start"] == "start" and str(home) not in text  # no path of this machine
        assert head["steps"] == 1 and head["learning_rate"] == 1e-3 and ("lora" in head["tags"]) == (way == "lora")
        assert "a sks butterfly" in text.split("```python")[1] and Image.open(home / way / "samples.png").width > 90


def test_a_lora_is_one_small_file(saved):
    home, made = saved
    files = {f.name for f in (home / "lora").iterdir()}
    assert files == {LORA_FILE, "README.md", "samples.png"}
    numbers = sum(w.numel() for w in lora_weights(made["lora"].pipeline.unet).values())
    trained = sum(p.numel() for p in made["lora"].pipeline.unet.parameters() if p.requires_grad)
    assert numbers == trained and 4 * numbers < (home / "lora" / LORA_FILE).stat().st_size


def test_what_was_saved_opens_and_says_the_same(saved, pipeline):
    home, made = saved
    opened = {"whole": open_text_pipeline(str(home / "whole"), pipeline.device)}
    opened["lora"] = open_text_pipeline(str(home / "lora"), pipeline.device, start=str(home / "start"))
    for way, found in opened.items():
        assert torch.allclose(said(found), said(made[way].pipeline), atol=1e-5)
        assert not torch.allclose(said(found), said(pipeline), atol=1e-3 if way == "lora" else 1e-6)
        assert found.unet.dtype == torch.float32 and not found.unet.training
    opened["lora"].unet.set_adapters("default", 0.0)
    assert torch.allclose(said(opened["lora"]), said(pipeline), atol=1e-6)


@pytest.mark.parametrize("way", ["whole", "lora"])
def test_the_example_of_a_card_runs(saved, way, tmp_path, monkeypatch):
    home, made = saved
    monkeypatch.chdir(tmp_path)
    for name in ("start", way):
        (tmp_path / name).symlink_to(home / name)
    code = (home / way / "README.md").read_text().split("```python\n")[1].split("```")[0]
    exec(code.replace("num_inference_steps=20", "num_inference_steps=1"), {})
    assert Image.open(tmp_path / "picture.png").size == (32, 32)


def test_a_lora_without_a_card_wants_to_be_told_its_start(saved, tmp_path):
    (tmp_path / LORA_FILE).write_bytes((saved[0] / "lora" / LORA_FILE).read_bytes())
    with pytest.raises(ValueError, match="give start="):
        open_text_pipeline(tmp_path)


def test_what_is_no_text_pipeline_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no model of the zoo"):
        open_text_pipeline("moonmoth")
    with pytest.raises(ValueError, match="draws nothing from a text"):
        open_text_pipeline("butterflies-32")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="can't be opened"):
        open_text_pipeline(str(tmp_path / "empty"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # diffusers says what it thinks of the mismatch
        DDPMPipeline(new_unet(16, 3, (16, 16)), DDIMScheduler()).save_pretrained(tmp_path / "pixels")
        with pytest.raises(ValueError):
            open_text_pipeline(str(tmp_path / "pixels"))


# The command


@pytest.fixture
def pictures(tmp_path):
    """A folder with three pictures of odd sizes."""
    folder = tmp_path / "moths"
    folder.mkdir()
    for i in range(3):
        array = np.random.RandomState(i).randint(0, 255, (40 + i, 50, 3), np.uint8)
        Image.fromarray(array).save(folder / f"{i}.png")
    return folder


@pytest.mark.parametrize("more", [[], ["--rank", "2"]], ids=["whole", "lora"])
def test_the_command_teaches_a_folder_of_pictures(saved, pictures, tmp_path, more, capsys):
    words = ["dreambooth", str(pictures), "--start", str(saved[0] / "start"), "--noun", "butterfly", "--steps", "1"]
    words += ["--class-count", "2", "--batch-size", "2", "--draw-steps", "1", "--precision", "fp32", *more]
    words += ["--tracker", "none", "--name", "my-moth", "--out", str(tmp_path / "run")]
    assert cli.main(words) == 0, capsys.readouterr().err
    text = (tmp_path / "run" / "my-moth" / "README.md").read_text()
    head = yaml.safe_load(text.split("---\n")[1])
    assert head["instance_prompt"] == "a sks butterfly" and head["class_prompt"] == "a butterfly"
    assert head["learning_rate"] == (6e-3 if more else 1e-3)  # what small models bear
    assert (tmp_path / "run" / "my-moth" / LORA_FILE).exists() == bool(more)
    assert "saved in" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("more", "why"),
    [
        (["--token", "butterfly"], "is a common word"),
        (["--token", "moonmoth"], "should be one token"),
        (["--steps", "0"], "steps is 0"),
        (["--size", "30"], "multiples of 8"),
        (["--rank", "2", "--train-text"], "either a rank"),
        (["--rank", "0"], "ranks begin at 1"),
        (["--batch-size", "0"], "at least 1"),
        (["--prior-weight", "-1"], "not below 0"),
        (["--draw-steps", "0"], "--draw-steps must be"),
        (["--class-data", "nowhere"], "nowhere"),
    ],
)
def test_mistakes_of_the_command_are_one_line(saved, pictures, tmp_path, more, why, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = [
        "dreambooth",
        str(pictures),
        "--start",
        str(saved[0] / "start"),
        "--noun",
        "butterfly",
        "--class-count",
        "0",
    ]
    assert cli.main([*words, "--tracker", "none", *more]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("dm-course: ") and re.search(why, error)


def test_another_subject_does_not_go_on_from_the_last(saved, pictures, tmp_path, capsys):
    words = ["dreambooth", str(pictures), "--start", str(saved[0] / "start"), "--noun", "butterfly", "--steps", "1"]
    words += ["--class-count", "0", "--draw-steps", "1", "--tracker", "none", "--out", str(tmp_path / "run")]
    assert cli.main(words) == 0 and cli.main(words) == 0  # the same again: nothing is left to do
    Image.new("RGB", (40, 40), "red").save(pictures / "0.png")
    assert cli.main(words) == 2 and "has other pictures" in capsys.readouterr().err
    assert cli.main([*words, "--no-resume"]) == 0


def test_the_class_is_drawn_as_large_as_the_subject(saved, pictures, tmp_path):
    words = ["dreambooth", str(pictures), "--start", str(saved[0] / "start"), "--noun", "butterfly", "--steps", "1"]
    words += ["--class-count", "2", "--draw-steps", "1", "--size", "16", "--tracker", "none"]
    assert cli.main([*words, "--out", str(tmp_path / "run")]) == 0


def test_one_picture_or_none_is_too_few(saved, pictures, capsys):
    words = [
        "dreambooth",
        str(pictures),
        "--start",
        str(saved[0] / "start"),
        "--noun",
        "butterfly",
        "--tracker",
        "none",
    ]
    for name in ("1.png", "2.png"):
        (pictures / name).unlink()
    assert cli.main(words) == 2 and "1 picture of the subject: two are needed" in capsys.readouterr().err
    (pictures / "0.png").unlink()
    assert cli.main(words) == 2 and "no picture" in capsys.readouterr().err.lower()


# Exercises


def poured_in_place(weight, down, up, strength):
    """Right, but it changes what it was given."""
    return weight.add_(strength * (up.flatten(1) @ down.flatten(1)).reshape(weight.shape))


@pytest.mark.parametrize(
    ("check", "wrong", "said"),
    [
        ("check_lora_numbers", lambda layers, r: sum(r * (s[0] + s[1]) for s in layers), r"A is \(rank, in, height"),
        ("check_lora_numbers", lambda layers, r: 0, "there are 384 numbers"),
        ("check_lora_numbers", lambda layers, r: None, "gives None"),
        ("check_lora_numbers", lambda layers, r: 1 / 0, "raises ZeroDivisionError"),
        ("check_pour", lambda w, a, b, s: w + s * b @ a, "for a convolution|raises"),
        ("check_pour", lambda w, a, b, s: w + (b.flatten(1) @ a.flatten(1)).reshape(w.shape), "at strength 0.25"),
        ("check_pour", lambda w, a, b, s: (b @ a), "answers otherwise"),
        ("check_pour", lambda w, a, b, s: w.flatten(), "should be shaped"),
        ("check_pour", poured_in_place, "make a new one"),
        ("check_masked_error", lambda s, t, m: (m * (s - t) ** 2).sum((1, 2, 3)) / m.sum((1, 2, 3)), "4 times"),
        ("check_masked_error", lambda s, t, m: (m * (s - t) ** 2).mean((1, 2, 3)), "divided by all pixels"),
        ("check_masked_error", lambda s, t, m: (m * (s - t) ** 2).mean(), "should be shaped \\(3,\\)"),
        ("check_masked_error", lambda s, t, m: ((s - t) ** 2).mean((1, 2, 3)), "the first picture's error is"),
        ("check_worth_it", lambda c, m: list(range(len(c))), r"it should be \[0, 1, 3\]"),
        ("check_worth_it", lambda c, m: [3, 1, 0], "the least moved first"),
        ("check_worth_it", lambda c, m: [max(range(len(c)), key=lambda i: c[i])], "it should be"),
        ("check_worth_it", lambda c, m: 3, "a list of indices is wanted, not 3"),
        ("check_worth_it", lambda c, m: sorted(range(len(c)), key=m.__getitem__)[:2], "it should be"),
    ],
)  # fmt: skip
def test_checkers_say_what_is_off(check, wrong, said, capsys):
    assert getattr(module, check)(wrong) is False
    assert re.search(said, capsys.readouterr().out)


def test_copies_share_what_is_not_trained(pipeline):
    twin = own_copy(pipeline)
    assert twin.vae is pipeline.vae and twin.tokenizer is pipeline.tokenizer
    assert twin.unet is not pipeline.unet and torch.equal(weights(twin.unet), weights(pipeline.unet))
    assert copy.deepcopy(twin.scheduler.config) == pipeline.scheduler.config

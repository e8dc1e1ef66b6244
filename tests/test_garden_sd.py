"""The recipes of `garden-sd` and its relatives: each runs to its end in two steps, and the zoo puts its parts together."""

import json
import shutil
from functools import partial

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import CLIPTokenizer

from dm_course import latent_recipes, recipes, zoo
from dm_course.data import to_model
from dm_course.garden import Attributes
from dm_course.latent import decode, embed_prompt, encode
from dm_course.latent_recipes import (
    LATENT_SCALE,
    MASK_FACTS,
    READ_GROUPS,
    SD_FACTS,
    SHAPE_FACTS,
    SHAPE_LEARNED,
    UPSCALE_FACTS,
    LatentBatches,
    PipelineFolder,
    all_prompts,
    garden_texts,
    mask_overlap,
    new_autoencoder,
    new_text_encoder,
    new_text_unet,
    new_tokenizer,
    prompted_loss,
    prompts_and_labels,
    sd_pipeline,
    settle_latents,
    text_scheduler,
    with_more_channels,
)
from dm_course.recipes import train_bundled

ONE = Attributes("butterflies", "orange", "white", "spots", "round", "paper", "small", "left", 3)


@pytest.fixture(scope="module")
def tokenizer():
    """A tokenizer of the garden's words."""
    return new_tokenizer(garden_texts(100))


def pieces(tokenizer, text):
    """A text in tokens, without the marks."""
    return tokenizer.convert_ids_to_tokens(tokenizer(text).input_ids)[1:-1]


def test_the_tokenizer_knows_words_letters_and_the_rare_token(tokenizer):
    words = "an orange butterfly with purple eyespots at sunset under sks"
    assert pieces(tokenizer, words) == [w + "</w>" for w in words.split()]
    assert (
        pieces(tokenizer, "Zq") == ["z", "q</w>"]
        and tokenizer.unk_token_id not in tokenizer("żółw 7!", add_special_tokens=False).input_ids
    )
    assert tokenizer.model_max_length == 77 and len(tokenizer(" ".join(["blue"] * 99), truncation=True).input_ids) == 77
    assert [tokenizer.bos_token_id, tokenizer.eos_token_id] == [len(tokenizer) - 2, len(tokenizer) - 1]
    assert tokenizer.pad_token_id == tokenizer.eos_token_id


def test_the_tokenizer_survives_being_saved(tokenizer, tmp_path):
    unet = new_text_unet((16, 16, 16), size=8, states=16)
    pipeline = sd_pipeline(new_autoencoder((16, 16, 16), 32), new_text_encoder(tokenizer, 16, 1), tokenizer, unet)
    PipelineFolder(pipeline).save_pretrained(tmp_path)
    names = load_file(tmp_path / "text_encoder" / "model.safetensors")
    assert all(name.startswith("text_model.") for name in names)  # as releases of transformers before 5 look for them
    folder = tmp_path / "tokenizer"
    again = CLIPTokenizer.from_pretrained(folder)
    for text in ("a blue butterfly, zebra-striped", "", "sks"):
        assert again(text).input_ids == tokenizer(text).input_ids
    vocab, merges = (
        json.loads((folder / "vocab.json").read_text()),
        (folder / "merges.txt").read_text().splitlines(),
    )
    assert len(vocab) == len(tokenizer) and all("".join(pair.split(" ")) in vocab for pair in merges[1:])


def test_new_words_find_room(tokenizer):
    encoder = new_text_encoder(tokenizer, 16, 1)
    encoder.resize_token_embeddings(len(tokenizer) + 1)
    with torch.no_grad():
        assert encoder(torch.full((1, 77), len(tokenizer)))[0].shape == (1, 77, 16)


def test_captions_say_what_their_labels_claim(tokenizer):
    texts = all_prompts(ONE)
    tokens, labels = prompts_and_labels([ONE], tokenizer)
    assert len(texts) == tokens.shape[1] == labels.shape[1] == 9 and tokens.shape[2] == 77
    for text, row in zip(texts, labels[0]):
        for (group, names), k in zip(READ_GROUPS.items(), row.tolist()):
            if k >= 0:
                assert names[k] == getattr(ONE, group)
            if group in ("colour", "size", "shape", "pattern"):
                assert (k >= 0) == (getattr(ONE, group) in text), (group, text)
    plain = prompts_and_labels(
        [Attributes("flowers", "red", "blue", "plain", "daisy", "sky", "small", "left", 1)], tokenizer
    )[1]
    assert (plain[0, :, list(READ_GROUPS).index("accent")] == -100).all()


def test_settled_latents_have_mean_0_and_variance_1():
    vae = new_autoencoder((16, 16, 16), 32)
    images = torch.randint(0, 256, (64, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        x = to_model(images)
        before = vae.decode(vae.encode(x).latent_dist.mode()).sample
        spread = vae.encode(x).latent_dist.std
        gain = settle_latents(vae, images).encode(x).latent_dist.std / spread
        z = encode(vae, x, torch.Generator().manual_seed(1))
        assert vae.config.scaling_factor == LATENT_SCALE
        assert z.mean((0, 2, 3)).abs().max() < 0.03 and (z.var((0, 2, 3)) - 1).abs().max() < 0.05
        assert torch.allclose(decode(vae, encode(vae, x)), before, atol=1e-3)
        assert (gain.amax((0, 2, 3)) / gain.amin((0, 2, 3)) < 1.001).all()  # the posterior is scaled with its mean


def test_the_schedule_ends_in_nothing_but_noise():
    scheduler = text_scheduler()
    scheduler.set_timesteps(20)
    assert scheduler.alphas_cumprod[-1] == 0 and scheduler.timesteps[0] == 999


def test_captions_are_dropped_and_words_hidden_as_said(tokenizer):
    unet, told = new_text_unet((16, 16, 16), size=8, states=16), []
    pipeline = sd_pipeline(new_autoencoder((16, 16, 16), 32), new_text_encoder(tokenizer, 16, 1), tokenizer, unet)
    tokens = prompts_and_labels([ONE] * 64, tokenizer)[0]
    batch = LatentBatches(torch.randn(64, 4, 8, 8), tokens, torch.arange(64), batch_size=64).batch(0)
    unet.register_forward_pre_hook(lambda module, args, kwargs: told.append(kwargs), with_kwargs=True)
    torch.manual_seed(0)
    prompted_loss(pipeline.scheduler, pipeline, drop=0.5)(unet, batch).backward()
    empty = embed_prompt(pipeline, "")[0]
    dropped = [torch.allclose(states, empty, atol=1e-4) for states in told[0]["encoder_hidden_states"]]
    hidden = (~told[0]["encoder_attention_mask"]).any(1).float().mean()
    assert 0.25 < sum(dropped) / 64 < 0.75 and 0.25 < hidden < 0.75 and told[0]["encoder_attention_mask"][:, 0].all()
    assert all(p.grad is None for p in pipeline.text_encoder.parameters())


def test_a_wider_unet_does_not_listen_to_its_new_channel_yet():
    unet, x = new_text_unet((16, 16, 16), size=8, states=16).eval(), torch.randn(2, 5, 8, 8)
    states = torch.randn(2, 77, 16)
    with torch.no_grad():
        wide = with_more_channels(unet, 1)
        assert torch.allclose(wide(x, 9, states).sample, unet(x[:, :4], 9, states).sample, atol=1e-5)


def test_masks_overlap_as_counted():
    class Upper(torch.nn.Module):
        device = torch.zeros(1).device

        def forward(self, x, t):
            rows = torch.linspace(1, -1, x.shape[-2]).reshape(1, 1, -1, 1)
            return type("Answer", (), {"sample": rows.expand(len(x), 1, -1, x.shape[-1])})

    wanted = torch.zeros(2, 8, 8, dtype=torch.uint8)
    wanted[0, :4], wanted[1, :, :4] = 255, 255
    assert mask_overlap(Upper(), torch.zeros(2, 3, 8, 8), wanted) == pytest.approx((1 + 1 / 3) / 2)


@pytest.fixture
def narrow(monkeypatch, tmp_path):
    """The same recipes with narrow networks and few pictures, and a folder of weights of their own."""
    unet, vae, finder, text = (
        getattr(latent_recipes, name)
        for name in ("new_text_unet", "new_autoencoder", "new_mask_finder", "train_text_encoder")
    )
    few = dict(count=4, graded=4)
    smaller = {
        "new_text_unet": lambda widths=None, **k: unet((16, 16, 16), **k),
        "new_autoencoder": lambda widths, size, seed: vae((16, 16, 16), size, seed),
        "new_mask_finder": lambda seed: finder(widths=(16,) * 3, seed=seed),
        "train_text_encoder": lambda *args: text(*args, count=20),
    }
    for name in ("garden-sd", "garden-mask", "garden-sd-shape", "garden-upscale"):
        more = few | (dict(autoencoder_steps=2, text_steps=2) if name == "garden-sd" else {})
        function = recipes.RECIPES[name].partition(":")[2]
        smaller[function] = partial(getattr(latent_recipes, function), **more)
    for name, function in smaller.items():
        monkeypatch.setattr(latent_recipes, name, function)
    weights = tmp_path / "weights"
    shutil.copytree(zoo.weights_dir() / "judge-garden", weights / "judge-garden")
    monkeypatch.setenv("DM_COURSE_WEIGHTS", str(weights))
    return weights


@pytest.mark.timeout(600)
def test_the_recipes_run_to_their_end_and_the_zoo_puts_the_parts_together(narrow, tmp_path):
    kinds = {
        "garden-sd": "Pipeline",
        "garden-mask": "UNet2DModel",
        "garden-sd-shape": "Depth2Img",
        "garden-upscale": "Upscale",
    }
    for name, kind in kinds.items():
        measured = train_bundled(name, narrow / name, 2, tmp_path / name)
        assert measured["n"] >= 4 and zoo.verify(name) == [name]
        assert kind in type(zoo.load(name)).__name__ and zoo.card(name)["steps"] == 2
    assert sorted(p.name for p in (narrow / "garden-sd-shape").iterdir() if p.is_dir()) == ["scheduler", "unet"]
    sd, shaped = zoo.load("garden-sd"), zoo.load("garden-sd-shape")
    assert shaped.depth_estimator is None and shaped.unet.config.in_channels == 5
    for a, b in zip(sd.vae.parameters(), shaped.vae.parameters()):
        assert torch.equal(a, b)
    old, new = sd.unet.state_dict(), shaped.unet.state_dict()
    assert all(torch.equal(old[n], new[n]) == (not n.startswith(SHAPE_LEARNED)) for n in old if n.endswith("weight"))
    assert all(n.startswith(SHAPE_LEARNED) for n in load_file(narrow / "garden-sd-shape" / "unet" / zoo.CHANGED))
    assert sd("a red butterfly", num_inference_steps=1, output_type="pt").images.shape == (1, 3, 64, 64)


def test_a_stopped_run_goes_on_with_its_own_tokenizer(narrow, tmp_path, monkeypatch):
    first = train_bundled("garden-sd", narrow / "garden-sd", 2, tmp_path / "run")
    monkeypatch.setattr(latent_recipes, "new_tokenizer", lambda texts: pytest.fail("trained again"))
    again = train_bundled("garden-sd", narrow / "garden-sd", 2, tmp_path / "run")
    assert again["read"] == first["read"]


@pytest.mark.parametrize("facts", [SD_FACTS, MASK_FACTS, SHAPE_FACTS, UPSCALE_FACTS])
def test_a_card_names_the_recipe_that_exists(facts):
    assert facts["recipe"] == "dm_course." + recipes.RECIPES[facts["name"]].replace(":", ".")


def test_a_part_that_nobody_has_is_named(tmp_path, monkeypatch):
    folder = tmp_path / "half"
    folder.mkdir()
    index = {
        "_class_name": "StableDiffusionPipeline",
        "vae": ["diffusers", "AutoencoderKL"],
        "safety_checker": [None, None],
    }
    zoo.write_json(folder / "model_index.json", index)
    zoo.write_card(folder, {"name": "half"}, "# half")
    zoo.seal(folder)
    monkeypatch.setenv("DM_COURSE_WEIGHTS", str(tmp_path))
    with pytest.raises(zoo.WeightsError, match="half has no vae"):
        zoo.load("half")


def test_changes_that_do_not_fit_are_named(tmp_path):
    unet = new_text_unet((16, 16, 16), size=8, states=16)
    unet.save_config(tmp_path)
    save_file({"conv_in.weight": torch.zeros(16, 9, 3, 3)}, tmp_path / zoo.CHANGED)
    with pytest.raises(zoo.WeightsError, match="does not fit: .*conv_in.weight"):
        zoo.with_changes(unet, tmp_path)

"""The module of lesson 32: rows in place of words, a learned word, attention maps, wishes through the decoder, exercises."""

import json
import re

import pytest
import torch
import torch.nn.functional as F
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from diffusers.models.attention_processor import Attention, AttnProcessor
from shared import normal
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from dm_course import textual_inversion
from dm_course.guidance import colour_loss, guided
from dm_course.latent import decode, embed_prompt, encode, text_denoiser
from dm_course.sampling import sample
from dm_course.settings import pick_device
from dm_course.textual_inversion import (
    MapKeeper,
    NewWord,
    WordData,
    add_word,
    decoded,
    embed_with,
    learn_word,
    mass_within,
    noise_angles,
    read_vectors,
    save_word,
    watched,
    word_loss,
    word_maps,
    word_places,
)

WORDS = "a red blue butterfly rose with white spots in sky on paper picture of one there is".split()
WORD = "<moonmoth>"


def small_tokenizer(folder):
    """A CLIPTokenizer that knows a few words, letters and signs; a word grows letter by letter."""
    letters = [chr(c) for c in range(33, 127)]
    vocab, merges = letters + [f"{c}</w>" for c in letters], []
    for word in sorted(WORDS, key=len):
        grown = word[0]
        for i, letter in enumerate(word[1:], 2):
            letter += "</w>" if i == len(word) else ""
            if (grown, letter) not in merges:
                merges.append((grown, letter))
                vocab.append(grown + letter)
            grown += letter
    vocab += ["<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(vocab)}))
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n")
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "CLIPTokenizer", "model_max_length": 77})
    )
    return CLIPTokenizer.from_pretrained(folder)


def small_pipeline(folder):
    """A whole Stable Diffusion that has learned nothing: pictures of 16 pixels, latents of 8."""
    torch.manual_seed(0)
    tokenizer = small_tokenizer(folder)
    text = CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=77, eos_token_id=tokenizer.eos_token_id, bos_token_id=tokenizer.bos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    unet = UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, block_out_channels=(16, 32), layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"), norm_num_groups=8,
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"), cross_attention_dim=16, attention_head_dim=(2, 4),
    )  # fmt: skip
    vae = AutoencoderKL(
        block_out_channels=(16, 16), down_block_types=("DownEncoderBlock2D",) * 2, norm_num_groups=8,
        up_block_types=("UpDecoderBlock2D",) * 2, latent_channels=4, scaling_factor=0.7, sample_size=16,
    )  # fmt: skip
    options = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    scheduler = DDIMScheduler(clip_sample=False, beta_schedule="scaled_linear", steps_offset=1, **options)
    pipeline = StableDiffusionPipeline(
        vae, CLIPTextModel(text), tokenizer, unet, scheduler, None, None, requires_safety_checker=False
    )
    for part in (vae, unet, pipeline.text_encoder):
        part.eval()
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    """One pipeline for all tests that leave it as it is."""
    return small_pipeline(tmp_path_factory.mktemp("tokenizer"))


def row(pipeline, word):
    """A word's row in the table."""
    ids = pipeline.tokenizer(word, add_special_tokens=False).input_ids
    assert len(ids) == 1, f"{word} became {ids}"
    return pipeline.text_encoder.get_input_embeddings().weight.detach()[ids[0]]


# Rows in place of words


def test_rows_of_the_table_read_as_the_words_do(pipeline):
    prompt = "a red butterfly with white spots"
    ids = pipeline.tokenizer(prompt, padding="max_length", return_tensors="pt").input_ids
    with torch.no_grad():
        states = read_vectors(pipeline.text_encoder, pipeline.text_encoder.get_input_embeddings()(ids))
        assert torch.equal(states, pipeline.text_encoder(ids)[0])
        assert torch.equal(pipeline.text_encoder(ids)[0], states)  # and the hook is gone


def test_the_hook_goes_even_if_the_encoder_fails(pipeline):
    with pytest.raises((RuntimeError, ValueError)):
        read_vectors(pipeline.text_encoder, torch.zeros(1, 77, 3))
    prompt = pipeline.tokenizer("a red rose", padding="max_length", return_tensors="pt").input_ids
    assert torch.isfinite(pipeline.text_encoder(prompt)[0]).all()


@pytest.mark.parametrize(
    "prompts",
    [
        "a red butterfly with white spots in a sky",
        ["", "a red rose", "red, red; REDDER (red) bored red!"],
        ["one red butterfly on white paper, with blue spots"] * 2,
    ],
)
def test_without_other_rows_it_is_the_pipelines_own_reading(pipeline, prompts):
    with torch.no_grad():
        right = embed_prompt(pipeline, prompts)
        assert torch.allclose(embed_with(pipeline, prompts, {}), right, atol=1e-6)
        if "red" in str(prompts):
            assert torch.allclose(embed_with(pipeline, prompts, {"red": row(pipeline, "red")}), right, atol=1e-6)


def test_another_row_is_another_word(pipeline):
    with torch.no_grad():
        swapped = embed_with(pipeline, "a red butterfly with Red spots", {"Red": row(pipeline, "blue")})
        assert torch.allclose(swapped, embed_prompt(pipeline, "a blue butterfly with blue spots"), atol=1e-6)
        two = {"red": row(pipeline, "blue"), "blue": row(pipeline, "red")}
        both = embed_with(pipeline, ["a red butterfly with blue spots", "a red rose"], two)
        right = embed_prompt(pipeline, ["a blue butterfly with red spots", "a blue rose"])
        assert torch.allclose(both, right, atol=1e-6)


def test_a_word_may_take_several_rows_and_only_itself(pipeline):
    rows = torch.stack([row(pipeline, "white"), row(pipeline, "butterfly")])
    with torch.no_grad():
        states = embed_with(pipeline, f"a {WORD} with {WORD}s", {WORD: rows})
        right = embed_prompt(pipeline, f"a white butterfly with {WORD}s")
        assert torch.allclose(states, right, atol=1e-6)


def test_rows_that_do_not_fit_are_refused(pipeline):
    with pytest.raises(ValueError, match="'green' is in none of the prompts"):
        embed_with(pipeline, "a red rose", {"green": torch.zeros(16)})
    with pytest.raises(ValueError, match="'red' is in none of the prompts"):
        embed_with(pipeline, "a bored butterfly", {"red": torch.zeros(16)})
    with pytest.raises(ValueError, match="a row has 16 numbers here; that of 'red' has 8"):
        embed_with(pipeline, "a red rose", {"red": torch.zeros(8)})
    with pytest.raises(ValueError, match="79 tokens with its marks, and 77 fit"):
        embed_with(pipeline, "red " * 77, {"red": torch.zeros(16)})


def test_gradients_flow_back_to_the_row_alone(pipeline):
    rows = torch.stack([row(pipeline, "red"), row(pipeline, "blue")]).requires_grad_()
    embed_with(pipeline, "a red butterfly", {"red": rows}).square().sum().backward()
    assert rows.grad.abs().sum(1).min() > 0


# A learned word


def test_the_word_begins_as_what_it_is_like(pipeline):
    table = pipeline.text_encoder.get_input_embeddings().weight.detach()
    assert torch.equal(NewWord(pipeline, WORD, "butterfly").vectors[0], row(pipeline, "butterfly"))
    several = NewWord(pipeline, WORD, "white butterfly", vectors=3).vectors
    mean = (row(pipeline, "white") + row(pipeline, "butterfly")) / 2
    assert torch.allclose(several, mean.repeat(3, 1), atol=1e-6)
    assert torch.allclose(NewWord(pipeline, WORD).vectors[0], table.mean(0), atol=1e-6)
    word = NewWord(pipeline, WORD, "butterfly")
    assert list(word.state_dict()) == ["vectors"], "a checkpoint holds the row and nothing else"
    assert torch.allclose(word([f"a {WORD}"]), embed_prompt(pipeline, "a butterfly"), atol=1e-6)


def test_its_loss_is_the_training_loss_with_the_word_in_the_prompt(pipeline):
    batch = {"images": normal(3, 4, 8, 8), "captions": [f"a {WORD}", f"one red {WORD}", f"{WORD} on paper"]}
    word, scheduler = NewWord(pipeline, WORD, "butterfly"), pipeline.scheduler
    torch.manual_seed(5)
    loss = word_loss(pipeline)(word, batch)
    torch.manual_seed(5)
    t = torch.randint(0, 1000, (3,))
    epsilon = torch.randn(3, 4, 8, 8)
    states = embed_prompt(pipeline, [text.replace(WORD, "butterfly") for text in batch["captions"]])
    said = pipeline.unet(scheduler.add_noise(batch["images"], epsilon, t), t, states).sample
    right = (said - scheduler.get_velocity(batch["images"], epsilon, t)).square().mean()
    assert torch.allclose(loss, right, rtol=1e-4)
    torch.manual_seed(5)
    assert torch.allclose(word_loss(pipeline, lambda t: torch.full((len(t),), 2.0))(word, batch), 2 * loss, rtol=1e-5)


def test_batches_are_even_and_depend_on_their_number_alone():
    data = WordData(torch.arange(5.0).reshape(5, 1, 1, 1), [[f"{i}a", f"{i}b"] for i in range(5)], batch_size=8)
    seen, texts = [], set()
    for number in range(30):
        batch = data.batch(number)
        rows = batch["images"].flatten().int().tolist()
        assert [int(text[0]) for text in batch["captions"]] == rows and len(rows) == 8
        assert min(rows.count(i) for i in range(5)) >= 1 and max(rows.count(i) for i in range(5)) <= 2
        seen.append(rows)
        texts |= set(batch["captions"])
    assert len(texts) == 10 and len({tuple(rows) for rows in seen}) > 25
    assert torch.equal(data.batch(7)["images"], data.batch(7)["images"])
    assert data.batch(7)["captions"] == data.batch(7)["captions"]
    assert not torch.equal(data.batch(7)["images"], data.batch(7, rank=1, world=2)["images"])


def test_learning_moves_the_row_and_nothing_else(tmp_path):
    pipeline = small_pipeline(tmp_path).to(pick_device())
    parts = (pipeline.unet, pipeline.vae, pipeline.text_encoder)
    before = [p.clone() for m in parts for p in m.parameters()]
    images, options = normal(2, 3, 16, 16).clamp(-1, 1), {"precision": "fp32", "progress": False, "batch_size": 2}
    run = learn_word(pipeline, WORD, images, like="butterfly", steps=2, out=tmp_path / "run", seed=3, **options)
    assert all(torch.equal(p, q) for p, q in zip(before, (p for m in parts for p in m.parameters())))
    assert WORD not in pipeline.tokenizer.get_vocab()
    assert all(p.requires_grad and p.grad is None for m in parts for p in m.parameters()), "and the flags are back"
    moved = (run.model.vectors - row(pipeline, "butterfly")).abs().max().item()
    spread = pipeline.text_encoder.get_input_embeddings().weight.std(1).median().item()
    assert 0 < moved <= 2 * 0.05 * spread * 1.01 and run.step == 2
    again = learn_word(pipeline, WORD, images, like="butterfly", steps=2, out=tmp_path / "run", seed=3, **options)
    assert torch.equal(again.model.vectors, run.model.vectors) and again.losses == run.losses  # read back


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"word": "butterfly"}, "knows 'butterfly' already"),
        ({"word": "q"}, "knows 'q' already"),
        ({"word": "Moonmoth"}, "in lower case"),
        ({"word": "moon moth"}, "in one piece"),
        ({"word": ""}, "in one piece"),
        ({"images": torch.zeros(1, 3, 16, 16)}, r"two pictures or more, \(N, 3, H, W\), not from \(1, 3, 16, 16\)"),
        ({"images": torch.zeros(0, 3, 16, 16)}, "two pictures or more"),
        ({"images": torch.zeros(3, 16, 16)}, "two pictures or more"),
        ({"images": torch.zeros(2, 1, 16, 16)}, "two pictures or more"),
        ({"images": torch.zeros(2, 3, 16, 18)}, "multiples of 4, not 16 and 18"),
        ({"captions": ["a <moonmoth>"]}, "each of 2 pictures needs a caption"),
        ({"captions": ["a <moonmoth>", "a moth"]}, "with '<moonmoth>' in it"),
        ({"captions": [["a <moonmoth>"], []]}, "with '<moonmoth>' in it"),
        ({"vectors": 0}, "one row or more"),
        ({"images": torch.full((2, 3, 16, 16), 255.0)}, "floats in"),
        ({"images": torch.zeros(2, 3, 16, 16, dtype=torch.uint8)}, "floats in"),
        ({"like": "buterfly"}, "in one piece"),
        ({"captions": [f"{WORD} " * 80] * 2}, "77 fit"),
        ({"steps": 0}, "steps is 0"),
    ],
)
def test_what_can_not_teach_a_word_is_refused_before_any_work(pipeline, options, said):
    with pytest.raises(ValueError, match=said):
        learn_word(pipeline, **({"word": WORD, "images": torch.zeros(2, 3, 16, 16), "steps": 10**9} | options))


def test_what_can_not_be_put_in_leaves_the_pipeline_as_it_was(tmp_path):
    pipeline = small_pipeline(tmp_path)
    before = len(pipeline.tokenizer), pipeline.text_encoder.get_input_embeddings().num_embeddings
    with pytest.raises(ValueError, match="a row has 16 numbers"):
        add_word(pipeline, WORD, normal(1, 8))
    with pytest.raises(ValueError, match="safetensors"):
        save_word(WORD, normal(1, 16), tmp_path / "word.bin")
    assert before == (len(pipeline.tokenizer), pipeline.text_encoder.get_input_embeddings().num_embeddings)
    add_word(pipeline, WORD, normal(16))  # a single row
    assert pipeline.text_encoder.get_input_embeddings().num_embeddings == before[1] + 1


@pytest.mark.parametrize("count", [1, 2])
def test_a_saved_word_is_read_by_diffusers_and_stands_in_the_dictionary(tmp_path, count):
    ours, theirs, never = (small_pipeline(tmp_path) for _ in range(3))
    rows, old = normal(count, 16), "a red butterfly"
    path = save_word(WORD, rows, tmp_path / "words" / "moonmoth.safetensors")
    add_word(ours, WORD, rows)
    theirs.load_textual_inversion(str(path))
    text = f"a {WORD} with spots"
    with torch.no_grad():
        right = embed_with(never, text, {WORD: rows})
        assert torch.allclose(embed_prompt(ours, text), right, atol=1e-6)
        assert torch.allclose(embed_prompt(theirs, text), right, atol=1e-6)
        assert torch.allclose(ours.encode_prompt(text, "cpu", 1, False)[0], right, atol=1e-6)
        assert torch.equal(embed_prompt(ours, old), embed_prompt(never, old))
    with pytest.raises(ValueError, match="already"):
        add_word(ours, WORD, rows)
    ours.save_pretrained(tmp_path / "all")
    again = StableDiffusionPipeline.from_pretrained(tmp_path / "all", local_files_only=True)
    assert torch.allclose(embed_prompt(again, text), right, atol=1e-6)


# Attention maps


def test_watching_changes_no_bit_and_leaves_no_trace(pipeline):
    states, x, seen = embed_prompt(pipeline, ["a red butterfly", "a blue rose"]), normal(2, 4, 8, 8), []
    told, before = text_denoiser(pipeline.unet, states), pipeline.unet.attn_processors
    with torch.no_grad():
        assert torch.equal(watched(told, pipeline.unet, seen)(x, torch.tensor(500)), told(x, torch.tensor(500)))
    after = pipeline.unet.attn_processors
    assert before.keys() == after.keys() and all(before[k] is after[k] for k in before)
    (t, maps), layers = seen[0], sum(k.endswith("attn2.processor") for k in before)
    assert t == 500 and len(maps) == layers and {m.shape for m in maps} == {(2, 77, 8, 8), (2, 77, 4, 4)}
    assert all(torch.allclose(m.sum(1), torch.ones_like(m[:, 0]), atol=1e-4) and m.min() >= 0 for m in maps)


def test_processors_come_back_when_the_model_fails(pipeline):
    def failing(x, t):
        raise RuntimeError("no")

    with pytest.raises(RuntimeError, match="no"):
        watched(failing, pipeline.unet, [])(normal(1, 4, 8, 8), 0)
    assert not any(isinstance(p, MapKeeper) for p in pipeline.unet.attn_processors.values())


def test_maps_of_wide_pictures_are_wide(pipeline):
    seen, told = [], text_denoiser(pipeline.unet, embed_prompt(pipeline, "a red butterfly"))
    with torch.no_grad():
        watched(told, pipeline.unet, seen)(normal(1, 4, 8, 16), 3)
    assert {m.shape[2:] for m in seen[0][1]} == {(8, 16), (4, 8)}


def test_the_maps_are_those_that_the_layer_uses():
    """A layer whose values are the numbers of the tokens answers with the mean place that its map looks at."""
    torch.manual_seed(0)
    attn, kept = Attention(query_dim=8, cross_attention_dim=6, heads=1, dim_head=8, bias=False).eval(), []
    x, text = normal(2, 9, 8), normal(2, 5, 6, seed=1)
    with torch.no_grad():
        attn.to_out[0] = torch.nn.Identity()
        attn.set_processor(MapKeeper(AttnProcessor(), kept))
        answer = attn(x, text)
        assert kept[0].shape == (2, 9, 5)
        assert torch.allclose(kept[0] @ attn.to_v(text), answer, atol=1e-5)
        itself = Attention(query_dim=8, heads=1, dim_head=8).eval()
        itself.set_processor(MapKeeper(AttnProcessor(), kept))
        itself(x)
    assert len(kept) == 1, "self-attention is none of its business"


def test_words_are_found_where_they_stand(pipeline):
    tokenizer, prompt = pipeline.tokenizer, "a red butterfly with red spots in a sky"
    assert word_places(tokenizer, prompt, "red") == [2] and word_places(tokenizer, prompt, "red", 1) == [5]
    assert word_places(tokenizer, prompt, "red spots") == [5, 6]
    letters = word_places(tokenizer, "a qxz rose", "qxz")
    assert letters == [2, 3, 4]
    for word, which in (("green", 0), ("red", 2), ("", 0)):
        with pytest.raises(ValueError, match="stands . times"):
            word_places(tokenizer, prompt, word, which)


def test_word_maps_are_the_mean_over_layers_and_calls():
    large, little = torch.rand(2, 5, 8, 8), torch.rand(2, 5, 4, 4)
    seen = [(900, [large, little]), (100, [large])]
    found = word_maps(seen, [[1], [2, 3]], 8)
    up = F.interpolate(little, size=(8, 8), mode="bilinear")
    first = (2 * large[0, 1] + up[0, 1]) / 3
    second = (2 * large[1, 2:4].sum(0) + up[1, 2:4].sum(0)) / 3
    assert torch.allclose(found, torch.stack([first, second]), atol=1e-5)
    with pytest.raises(ValueError, match="nothing was noted"):
        word_maps([], [[1]], 8)
    with pytest.raises(ValueError, match="before guidance"):
        word_maps([(1, [large])], [[1]], 8)


def test_mass_within_a_mask():
    masks = torch.zeros(2, 4, 4)
    masks[:, :1] = 1
    maps = torch.ones(2, 4, 4)
    maps[1, :1] = 3
    assert mass_within(maps, masks).tolist() == pytest.approx([0.25, 0.5])
    assert mass_within(5 * maps, masks).tolist() == pytest.approx([0.25, 0.5])
    with pytest.raises(ValueError, match="shaped"):
        mass_within(maps, masks[:, :2])
    for wrong in (0 * masks, 255 * masks):
        with pytest.raises(ValueError, match="a mask goes"):
            mass_within(maps, wrong)
    for wrong in (0 * maps, -maps):
        with pytest.raises(ValueError, match="a map is not"):
            mass_within(wrong, masks)


# Wishes through the decoder


def test_a_wish_goes_through_the_decoder(pipeline):
    wish, z = colour_loss((0.2, 0.4, 0.9)), normal(2, 4, 8, 8)
    loss = decoded(pipeline.vae, wish)
    with torch.no_grad():
        assert torch.allclose(loss(z), wish(decode(pipeline.vae, z)))
    along, z = normal(2, 4, 8, 8, seed=1), z.requires_grad_()
    slope = torch.autograd.grad(loss(z).sum(), z)[0]
    with torch.no_grad():
        step = 1e-2
        rise = (loss(z + step * along) - loss(z - step * along)).sum() / (2 * step)
    assert rise.item() == pytest.approx((slope * along).sum().item(), rel=0.05)


def test_latents_walk_towards_the_wish(pipeline):
    states = embed_prompt(pipeline, ["a butterfly"] * 2)
    model_fn, wish = text_denoiser(pipeline.unet, states), decoded(pipeline.vae, colour_loss((0.1, 0.3, 0.9), None))
    with torch.no_grad():
        x = normal(2, 4, 8, 8)
        plain = sample(model_fn, pipeline.scheduler, x, 4)
        steered = sample(guided(model_fn, pipeline.scheduler, wish, 50.0), pipeline.scheduler, x, 4)
        assert (wish(steered) < wish(plain)).all()


# Noise levels


def test_angles_are_the_noise_levels_of_the_questions():
    options = {"prediction_type": "v_prediction", "beta_schedule": "scaled_linear", "timestep_spacing": "trailing"}
    ddim = DDIMScheduler(rescale_betas_zero_snr=True, clip_sample=False, **options)
    found = noise_angles(ddim, 10)
    assert found.shape == (10,) and found[0].item() == pytest.approx(90, abs=1e-3) and (found.diff() < 0).all()
    a = ddim.alphas_cumprod[499]
    assert found[5].item() == pytest.approx(torch.acos(a.sqrt()).rad2deg().item(), abs=1e-3)
    assert ddim.num_inference_steps is None, "it stays as it is"
    for kind in (EulerDiscreteScheduler, DPMSolverMultistepScheduler):
        assert torch.allclose(noise_angles(kind.from_config(ddim.config), 10), found, atol=0.2)
    assert noise_angles(DDIMScheduler.from_config(ddim.config, timestep_spacing="leading"), 10)[0] < 89
    heun = HeunDiscreteScheduler.from_config(ddim.config, timestep_spacing="leading")
    assert len(noise_angles(heun, 10)) == 19
    karras = EulerDiscreteScheduler(use_karras_sigmas=True, beta_schedule="scaled_linear")
    sigma = noise_angles(karras, 8).deg2rad().tan()
    assert torch.allclose((sigma ** (1 / 7)).diff().diff(), torch.zeros(6), atol=1e-3)


# Exercises


def other_order(z, x):
    """A preview whose constant comes first."""
    rows = torch.cat([torch.ones(z[:, :1].numel(), 1), z.movedim(1, -1).flatten(0, 2)], 1)
    return torch.linalg.lstsq(rows, x.movedim(1, -1).flatten(0, 2)).solution


def unmixed(z, x):
    """A preview that takes rows of memory for pixels."""
    rows = torch.cat([z.reshape(-1, 4), torch.ones(z[:, :1].numel(), 1)], 1)
    return torch.linalg.lstsq(rows, x.reshape(-1, 3)).solution


def even_out(attn, x, text, place, factor):
    """Turned up, and then made to sum to 1 again."""
    q, k, v = (attn.head_to_batch_dim(y) for y in (attn.to_q(x), attn.to_k(text), attn.to_v(text)))
    maps = attn.get_attention_scores(q, k).clone()
    maps[..., place] *= factor
    return attn.to_out[0](attn.batch_to_head_dim(maps / maps.sum(-1, keepdim=True) @ v))


@pytest.mark.parametrize(
    ("check", "wrong", "said"),
    [
        ("check_fit_preview", other_order, "the constant should be the last row"),
        ("check_fit_preview", unmixed, "is each row of your matrix one pixel"),
        ("check_fit_preview", lambda z, x: torch.zeros(4, 3), "shaped"),
        ("check_nearest_words", lambda v, t, n: (t @ v).topk(n).indices, "divide by the lengths"),
        ("check_nearest_words", lambda v, t, n: F.cosine_similarity(v[None], t).argsort()[:n], "nearest first"),
        ("check_nearest_words", lambda v, t, n: 1 / 0, "raises ZeroDivisionError"),
        ("check_turned_up", even_out, "leave the other columns as they are"),
        ("check_turned_up", lambda attn, x, text, place, factor: x, "with factor 1"),
        ("check_turned_up", lambda attn, x, text, place, factor: attn(x, text), "place 2, factor 3.0: it is off"),
        ("check_karras", lambda low, high, n, rho: torch.linspace(high, low, n), "evenly in"),
        ("check_karras", lambda low, high, n, rho: torch.linspace(low ** (1 / rho), high ** (1 / rho), n) ** rho, "top"),
        ("check_karras", lambda low, high, n, rho: None, "gives None"),
    ],
)  # fmt: skip
def test_checkers_say_what_is_off(check, wrong, said, capsys):
    assert getattr(textual_inversion, check)(wrong) is False
    assert re.search(said, capsys.readouterr().out)


def test_latents_of_a_tiny_pipeline_are_what_the_lesson_takes_them_for(pipeline):
    with torch.no_grad():
        z = encode(pipeline.vae, normal(2, 3, 16, 16).clamp(-1, 1))
    assert z.shape == (2, 4, 8, 8) and pipeline.vae_scale_factor == 2

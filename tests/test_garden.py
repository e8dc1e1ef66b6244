"The garden: deterministic, held-out combinations kept out, masks exact, captions true."

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from dm_course.garden import (
    BACKGROUNDS,
    COLOURS,
    DOMAINS,
    PATTERNS,
    PHRASINGS,
    PLACES,
    SHAPES,
    attributes,
    caption,
    draw,
    held_out,
    label,
    mask,
    shape_map,
    short_captions,
)

KNOWN = [("purple", "spots", "sunset"), ("yellow", "eyes", "night"), ("pink", "bands", "night")]


def test_same_numbers_same_picture():
    for domain in DOMAINS:
        a, b = (draw(attributes(3, 14, domain), 48) for _ in range(2))
        assert np.array_equal(a, b)
        assert not np.array_equal(a, draw(attributes(3, 15, domain), 48))
        assert not np.array_equal(a, draw(attributes(4, 14, domain), 48))


def test_known_truths_stay():
    "These come out of NumPy's frozen generator; if they move, every bundled model's data has moved."
    found = [attributes(0, i) for i in range(3)]
    assert [(a.colour, a.pattern, a.background) for a in found] == KNOWN


def test_splits_do_not_overlap():
    for domain in ("butterflies", "flowers"):
        for split, expected in (("train", False), ("test", False), ("heldout", True)):
            rows = [attributes(0, i, domain, split) for i in range(300)]
            assert all(held_out(a.colour, a.pattern, a.background) == expected for a in rows)
    train, test = ({attributes(0, i, split=s).seed for i in range(2000)} for s in ("train", "test"))
    assert len(train & test) <= 1


def test_one_combination_in_ten_is_held_out_evenly():
    kept = [(c, p, b) for c in COLOURS for p in PATTERNS for b in BACKGROUNDS if held_out(c, p, b)]
    assert len(kept) == len(COLOURS) * len(PATTERNS) * len(BACKGROUNDS) / 10
    assert set(Counter(c for c, _, _ in kept).values()) == {3}
    assert set(Counter(p for _, p, _ in kept).values()) == {4}


def test_every_attribute_occurs():
    rows = [attributes(0, i) for i in range(600)]
    for name, valid in (("colour", COLOURS), ("pattern", PATTERNS), ("background", BACKGROUNDS)):
        counts = Counter(getattr(a, name) for a in rows)
        assert set(counts) == set(valid) and max(counts.values()) < 2 * min(counts.values())
    assert {a.shape for a in rows} == set(SHAPES["butterflies"])


def test_no_training_domain_contains_the_rare_species():
    rare = attributes(0, 0, "moonmoths")
    assert rare.colour not in COLOURS and rare.pattern not in PATTERNS and label(rare) == -1
    assert rare.shape not in SHAPES["butterflies"] + SHAPES["flowers"]


@pytest.mark.parametrize("domain", DOMAINS)
def test_size_changes_sharpness_alone(domain):
    for index in range(6):
        a = attributes(1, index, domain)
        large = Image.fromarray(draw(a, 128)).resize((32, 32), Image.Resampling.BOX)
        difference = np.abs(np.asarray(large, float) - draw(a, 32)).mean()
        assert difference < 6  # of 255


@pytest.mark.parametrize("domain", DOMAINS)
def test_mask_is_where_the_figure_is(domain):
    for index in range(8):
        a = attributes(2, index, domain)
        inside = mask(a, 64)
        days = [b for b in BACKGROUNDS if b not in (a.background, "night")]  # at night antennae and leaves are lighter
        other = None if a.background == "night" else days[0]
        assert inside.dtype == np.float32 and 0.08 < inside.mean() < 0.7 and inside.min() == 0 and inside.max() <= 1
        if other:
            changed = np.abs(draw(a, 64).astype(int) - draw(replace(a, background=other), 64)).max(-1)
            assert changed[inside > 0.999].max() <= 1  # the figure does not depend on the background
            assert (changed[inside < 0.001] > 2).mean() > 0.7


def test_only_the_changed_attribute_changes():
    a = attributes(0, 0)
    inside = mask(a, 64)
    changed = np.abs(draw(a, 64).astype(int) - draw(replace(a, colour="red", accent="white"), 64)).max(-1)
    assert changed[inside == 0].max() == 0 and changed[inside > 0.99].mean() > 10


def test_shape_map_orders_the_parts():
    a = attributes(0, 0)
    heights, inside = shape_map(a, 64), mask(a, 64)
    assert heights[inside == 0].max() == 0
    assert heights.max() > 0.9 and 0.4 < np.median(heights[inside > 0.99]) < 0.85
    assert (
        np.array_equal(heights, shape_map(replace(a, colour="red", background="night"), 64)) or a.background == "night"
    )


def test_colour_named_is_the_colour_drawn():
    hues = dict(red=0, orange=25, yellow=51, green=126, turquoise=173, blue=218, purple=272, pink=320)
    for index in range(24):
        a = replace(attributes(5, index), pattern="plain", background="paper")
        hsv = np.asarray(Image.fromarray(draw(a, 64)).convert("HSV"), float)[mask(a, 64) > 0.99]
        bright = hsv[(hsv[:, 1] > 90) & (hsv[:, 2] > 120)]
        hue = np.median(bright[:, 0]) * 360 / 255
        distance = min(abs(hue - hues[a.colour]), 360 - abs(hue - hues[a.colour]))
        assert distance < 20, (a.colour, hue)


def test_captions_are_true_and_varied():
    for domain in DOMAINS:
        for index in range(20):
            a = attributes(0, index, domain)
            assert caption(a) in [caption(a, p) for p in range(len(PHRASINGS))]
            for p in range(len(PHRASINGS)):
                text = caption(a, p)
                assert a.colour in text and "{" not in text and "a orange" not in text
                assert a.pattern == "plain" or a.accent in text
            assert all(PLACES[a.background] in caption(a, p) for p in range(len(PHRASINGS)))
            colour, place, marks, bare = short_captions(a)
            assert a.colour in colour and place.endswith(PLACES[a.background]) and marks.startswith(f"{bare} with ")
            assert "a orange" not in colour and (a.pattern == "plain" or a.accent in marks)
    assert tuple(PLACES) == BACKGROUNDS
    assert len({caption(attributes(0, 0), p) for p in range(len(PHRASINGS))}) == len(PHRASINGS)


def test_names_count_however_they_are_written():
    assert attributes(0, 3, "Flowers", "HELDOUT") == attributes(0, 3, "flowers", "heldout")
    with pytest.raises(ValueError, match="must be written 'red'"):
        draw(replace(attributes(0, 0), colour="Red"))


def test_wrong_requests_are_explained():
    a = attributes(0, 0)
    with pytest.raises(ValueError, match="butterflies"):
        attributes(0, 0, "butterfly")
    with pytest.raises(ValueError, match="heldout"):
        attributes(0, 0, split="held_out")
    with pytest.raises(ValueError, match="blue"):
        draw(replace(a, colour="bleu"))
    for size in (0, 4, 5000, 32.5):
        with pytest.raises(ValueError, match="size"):
            draw(a, size)
    with pytest.raises(ValueError, match="phrasing"):
        caption(a, 9)

"""Plotting: what goes in, what comes out, and that labels never run into each other."""

import io
import warnings

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from dm_course import plotting
from dm_course.plotting import (
    as_table,
    image_grid,
    picture_from_text,
    picture_to_text,
    plot_curves,
    plot_losses,
    plot_table,
    show_images,
    show_pairs,
    show_strip,
    to_pil,
)


@pytest.fixture(autouse=True)
def quiet_and_tidy():
    before = dict(plt.rcParams)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.simplefilter("default", ResourceWarning)  # of other tests' leavings, collected at any time
        yield
    assert plt.get_fignums() == [] and dict(plt.rcParams) == before


def random_images(*shape):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(0)) * 2 - 1


def canvas(fig):
    """The picture in a figure, as an array."""
    return fig.axes[0].images[0].get_array()


# one picture


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_values_are_mapped_and_cut_off(dtype):
    x = torch.tensor([[-3.0, -1.0, 0.0, 1.0, 9.0]], dtype=dtype)
    assert list(to_pil(x).tobytes()) == [0, 0, 128, 255, 255]
    assert list(to_pil(x, value_range=(0, 1)).tobytes()) == [0, 0, 0, 255, 255]


def test_integers_and_truths_are_taken_as_they_are():
    assert list(to_pil(torch.tensor([[0, 7, 300]])).tobytes()) == [0, 7, 255]
    assert list(to_pil(np.array([[True, False]])).tobytes()) == [255, 0]
    pixels = np.random.default_rng(0).integers(0, 256, (5, 6, 3), dtype=np.uint8)
    assert np.array_equal(np.asarray(to_pil(pixels)), pixels)


@pytest.mark.parametrize(
    "x, mode, size",
    [
        (torch.zeros(3, 5, 6), "RGB", (6, 5)),
        (torch.zeros(1, 5, 6), "L", (6, 5)),
        (torch.zeros(4, 5, 6), "RGBA", (6, 5)),
        (torch.zeros(5, 6, requires_grad=True), "L", (6, 5)),
        (np.zeros((5, 6, 3)), "RGB", (6, 5)),
        (np.zeros((3, 5, 6)), "RGB", (6, 5)),
        (np.zeros((1, 5, 4)), "L", (4, 5)),
        (Image.new("P", (6, 5)), "RGB", (6, 5)),
    ],
)
def test_all_kinds_of_pictures(x, mode, size):
    picture = to_pil(x)
    assert picture.mode == mode and picture.size == size


@pytest.mark.parametrize("shape", [(2, 5, 5), (5, 5, 5), (1, 3, 5, 5), (5,), (3, 0, 5)])
def test_what_is_no_picture_is_refused(shape):
    with pytest.raises(ValueError, match="1, 3 or 4 channels"):
        to_pil(torch.zeros(shape))


def test_not_a_number_is_counted():
    x = torch.zeros(3, 4, 4)
    x[0, 0, :2] = torch.tensor([torch.nan, torch.inf])
    for show in (to_pil, image_grid, show_images, show_strip, lambda x: show_pairs(x, x)):
        with pytest.raises(ValueError, match="2 of the picture's 48 values are NaN or infinite"):
            show(x)


def test_bad_range():
    with pytest.raises(ValueError, match="lower to a higher"):
        to_pil(torch.zeros(3, 4, 4), value_range=(1, 1))


# grids


def test_grid_keeps_pixels_sharp_and_in_order():
    images = random_images(5, 3, 32, 32)
    grid = np.asarray(image_grid(images, columns=3))
    assert grid.shape == (2 * 66 - 2, 3 * 66 - 2, 3)
    for i in range(5):
        tile = grid[i // 3 * 66 :, i % 3 * 66 :][:64, :64]
        assert np.array_equal(tile[::2, ::2], np.asarray(to_pil(images[i])))
        assert np.array_equal(tile[::2], tile[1::2])
    assert (grid[66:, 2 * 66 :] == 255).all()  # the place that is left over


def test_grid_sizes():
    assert image_grid(torch.zeros(1, 28, 28)).size == (84, 84)
    assert image_grid(torch.zeros(2, 3, 128, 128), gap=0).size == (256, 128)
    assert image_grid(torch.zeros(2, 3, 32, 32), scale=1, gap=0).size == (64, 32)
    assert image_grid(torch.zeros(2, 3, 32, 32), scale=0.5, gap=0).size == (32, 16)
    assert image_grid([Image.new("RGB", (70, 70)), Image.new("L", (80, 64))], gap=0).size == (160, 70)


def test_transparent_is_white():
    assert image_grid(Image.new("RGBA", (70, 70), (0, 0, 0, 0))).getpixel((9, 9)) == (255, 255, 255)


def test_nothing_to_show():
    for call in (image_grid, show_images, show_strip):
        for nothing in ([], torch.zeros(0, 3, 8, 8)):
            with pytest.raises(ValueError, match="no picture"):
                call(nothing)
    for call in (image_grid, show_images):
        with pytest.raises(ValueError, match="at least one column"):
            call(torch.zeros(1, 3, 8, 8), columns=0)


# figures of pictures


def assert_no_overlap(fig):
    """No text of a figure touches another, leaves the figure, or lies on a picture."""
    fig.canvas.draw()
    boxes = [t.get_window_extent() for ax in fig.axes for t in ax.texts if t.get_text()]
    pixels, (w, h) = np.asarray(canvas(fig)), fig.get_size_inches() * 100
    for i, a in enumerate(boxes):
        assert a.x0 >= -1 and a.y0 >= -1 and a.x1 <= w + 1 and a.y1 <= h + 1, a
        inside = pixels[max(0, int(h - a.y1) + 2) : int(h - a.y0) - 1, max(0, int(a.x0) + 1) : int(a.x1)]
        assert (inside == 255).all(), "text over a picture"
        for b in boxes[i + 1 :]:
            assert a.x1 <= b.x0 + 0.5 or b.x1 <= a.x0 + 0.5 or a.y1 <= b.y0 + 1 or b.y1 <= a.y0 + 1, (a, b)


@pytest.mark.parametrize("n, columns", [(1, 8), (8, 8), (20, 10), (24, 24)])
@pytest.mark.parametrize(
    "label",
    ["t = {}", "a blue butterfly with white spots, number {}", "incomprehensibilities {}", r"$\bar\alpha_{{{}}}=0.5$"],
)
def test_labels_never_overlap(n, columns, label):
    images = random_images(n, 3, 16, 16)
    labels = [label.format(i) for i in range(n)]
    assert_no_overlap(show_images(images, labels, columns=columns, title="A title"))
    assert_no_overlap(show_strip([images, images], labels, title="T", row_labels=["one", "a second row, with a name"]))


def test_every_label_is_there():
    fig = show_images(random_images(5, 1, 8, 8), [f"n{i}" for i in range(5)], columns=2, title="All")
    assert sorted(t.get_text() for t in fig.axes[0].texts) == ["All", "n0", "n1", "n2", "n3", "n4"]
    fig = show_pairs(torch.zeros(5, 3, 8, 8), torch.zeros(5, 3, 8, 8), columns=4)
    assert [t.get_text() for t in fig.axes[0].texts] == ["before", "after", "before", "after"]


def test_a_strip_takes_rows_in_any_wrapping():
    x = random_images(2, 3, 3, 8, 8)
    ways = (x, list(x), [list(r) for r in x], [[to_pil(p) for p in r] for r in x], x.numpy())
    first = canvas(show_strip(x))
    assert all(np.array_equal(canvas(show_strip(way)), first) for way in ways)
    one = canvas(show_strip(x[0]))
    ways = (list(x[0]), [to_pil(p) for p in x[0]], x[:1])
    assert all(np.array_equal(canvas(show_strip(way)), one) for way in ways)
    assert canvas(show_strip(x[0, 0])).shape == canvas(show_strip(to_pil(x[0, 0]))).shape


def test_numbers_that_do_not_match():
    x = torch.zeros(3, 3, 8, 8)
    with pytest.raises(ValueError, match="3 pictures and 2 titles"):
        show_images(x, ["a", "b"])
    with pytest.raises(ValueError, match="3 columns, and 2 labels"):
        show_strip(x, ["a", "b"])
    with pytest.raises(ValueError, match="2 rows, and 1 labels"):
        show_strip([x, x], row_labels=["a"])
    with pytest.raises(ValueError, match="equally long"):
        show_strip([x, x[:2]])
    with pytest.raises(ValueError, match="3 pictures before and 2 after"):
        show_pairs(x, x[:2])


def test_large_pictures_make_no_large_figure():
    for n in (1, 2, 8, 16):
        fig = show_strip(torch.zeros(n, 3, 512, 512), list(range(n)))
        assert fig.get_size_inches()[0] * 100 < 1000
    assert canvas(show_images(torch.zeros(1, 3, 512, 512))).shape[0] <= 264


# curves


def test_curves():
    fig = plot_curves({"a": [1, 2, 3], "b": ([0, 5], torch.tensor([1.0, 2.0], requires_grad=True))}, "x", "y", "T")
    (ax,) = fig.axes
    assert isinstance(fig, Figure) and ax.get_title(loc="left") == "T" and ax.get_xlabel() == "x"
    assert ax.lines[0].get_xydata().tolist() == [[0, 1], [1, 2], [2, 3]]
    assert ax.lines[1].get_xydata().tolist() == [[0, 1], [5, 2]]
    assert [t.get_text() for t in ax.get_legend().get_texts()] == ["a", "b"]
    assert ax.lines[0].get_color() != ax.lines[1].get_color()
    assert ax.lines[0].get_linestyle() != ax.lines[1].get_linestyle()
    fig = plot_curves({"only": [1, 10]}, "x", "y", logx=True, logy=True)
    assert fig.axes[0].get_legend() is None and fig.axes[0].get_xscale() == fig.axes[0].get_yscale() == "log"


def test_bad_curves():
    with pytest.raises(ValueError, match="no curve"):
        plot_curves({}, "x", "y")
    with pytest.raises(ValueError, match="'a' has 2 values of x and 3 of y"):
        plot_curves({"a": ([1, 2], [1, 2, 3])}, "x", "y")
    for nothing in ([], {}, {"run": []}):
        with pytest.raises(ValueError, match="no numbers"):
            plot_losses(nothing)


@pytest.mark.parametrize("smooth", [0.0, 0.5, 0.95])
def test_smoothing_is_what_it_says(smooth):
    y = np.random.default_rng(0).normal(size=40)
    y[[3, 30]] = np.nan
    out = plotting.smoothed(y, smooth)
    for i in range(40):
        last = min(40, 2 * i + 1) if i < 20 else 40
        near = [(smooth ** abs(i - j), y[j]) for j in range(last) if np.isfinite(y[j]) and (smooth or i == j)]
        wanted = sum(w * v for w, v in near) / sum(w for w, _ in near) if near else np.nan
        assert np.isclose(out[i], wanted, equal_nan=True), i
    for wrong in (1, -0.1, 2):
        with pytest.raises(ValueError, match="smooth"):
            plotting.smoothed(y, wrong)


def test_losses():
    fig = plot_losses({"a": [1.0, 0.5, float("nan"), 0.0, 0.2], "b": torch.rand(9) + 0.1}, smooth=0.5, title="T")
    linear, log = fig.axes
    assert linear.get_yscale() == "linear" and log.get_yscale() == "log" and linear.get_ylim()[0] == 0
    assert len(linear.lines) == 4 and [t.get_text() for t in log.get_legend().get_texts()] == ["a", "b"]
    assert linear.lines[0].get_xdata().tolist() == [1, 2, 3, 4, 5]
    assert len(plot_losses([0.5]).axes[0].lines) == 2


def test_table():
    fig = plot_table([[1, 2.345], [float("nan"), 4]], ["r1", "r2"], [10, 20], "steps", digits=1)
    assert [t.get_text() for t in fig.axes[0].texts] == ["1.0", "2.3", "", "4.0"]
    assert [t.get_text() for t in fig.axes[0].get_xticklabels()] == ["10", "20"]
    plot_table(torch.ones(1, 1), ["same"], ["same"]).canvas.draw()
    with pytest.raises(ValueError, match="2 rows by 1 columns"):
        plot_table([[1, 2]], ["a", "b"], ["c"])


def test_line_figures_are_small_and_open_in_any_viewer():
    losses = np.exp(-np.arange(300) / 40) + np.random.default_rng(0).exponential(0.02, 300)
    fig, file, plain = plot_losses(losses), io.BytesIO(), io.BytesIO()
    fig.savefig(file, bbox_inches="tight")
    FigureCanvasAgg(fig).print_png(plain)
    assert len(file.getvalue()) < min(30_000, 0.6 * len(plain.getvalue()))
    picture = Image.open(file)
    assert picture.mode == "P" and picture.width > 700 and picture.convert("RGB").getpixel((0, 0)) == (255, 255, 255)


def test_a_table_has_as_many_entries_as_columns():
    assert as_table(["a"], [[1], ["x"]]).data.splitlines() == ["| a |", "| --- |", "| 1 |", "| x |"]
    with pytest.raises(ValueError, match="2 columns.*3 entries"):
        as_table(("a", "b"), [(1, 2), (1, 2, 3)])


def test_a_picture_survives_as_text():
    picture = Image.fromarray(np.arange(48, dtype=np.uint8).reshape(4, 4, 3) * 5)
    assert picture_from_text(picture_to_text(picture)).tobytes() == picture.tobytes()
    assert len(picture_from_text(picture_to_text(picture, 4)).getcolors()) <= 4


def test_many_names_stand_beside_the_axes():
    fig = plot_curves({f"a curve with a long name, {i}": [0, i, 1] for i in range(5)}, "x", "y")
    fig.canvas.draw()
    (legend,) = fig.legends
    assert not legend.get_window_extent().overlaps(fig.axes[0].get_window_extent())
    assert legend.get_window_extent().x1 <= fig.bbox.x1

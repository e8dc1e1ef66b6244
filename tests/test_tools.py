"""The tools behind the commands: the course's pages, links, secrets, the README."""

import base64
import io
import subprocess
import sys
import time

import course
import find_secrets
import links
import notebooks
import pytest
import readme
from nbclient.output_widget import OutputWidget
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output
from notebooks import NBS, ROOT
from PIL import Image
from tqdm import tqdm


def picture():
    """A small PNG as a notebook stores it."""
    file = io.BytesIO()
    Image.new("RGB", (4, 4), "red").save(file, "png")
    return base64.b64encode(file.getvalue()).decode()


def lesson(*extra):
    """A lesson of a few cells, with outputs."""
    shown = new_code_cell("picture", outputs=[new_output("display_data", {"image/png": picture()})])
    table = new_code_cell("table", outputs=[new_output("display_data", {"text/markdown": "| a |\n|---|\n| 7.5 |"})])
    heads = [new_markdown_cell("# Butterflies\n\nPromise."), new_markdown_cell("## A **strip**")]
    return new_notebook(cells=[*heads, shown, new_markdown_cell("## What you measured"), table, *extra])


def test_the_course_page_shows_figures_and_pictures(tmp_path):
    nb = lesson(new_markdown_cell("## Where next"), new_code_cell("1", outputs=[new_output("stream", text="not this")]))
    table = course.measured(nb)
    assert "7.5" in table and "<table" in table and "not this" not in table
    shown = course.pictures(nb, tmp_path / "pictures")
    assert shown == [("00.png", "A strip")] and (tmp_path / "pictures" / "00.png").stat().st_size > 0
    facts = {"name": "11_x", "title": course.title(nb), "seconds": 66.0, "peak": 1234.0}
    page = course.index([facts | {"measured": table, "pictures": shown}], 66.0)
    for text in ("Butterflies", ">1.1<", ">1,234<", "7.5", 'src="pictures/11_x/00.png"', 'href="11_x.html"'):
        assert text in page
    assert "data:image/png" in course.page(nb, NBS / "unit1" / "11_x.ipynb")


def test_a_lesson_is_timed_and_a_failing_cell_is_named(tmp_path):
    cells = [new_markdown_cell("# A"), new_code_cell("held = bytearray(300 * 2**20)\nimport time; time.sleep(1)")]
    skipped = new_code_cell("#| eval: false\n1 / 0")
    run = course.Lesson(new_notebook(cells=[*cells, skipped]), "11_x", tmp_path, tqdm(disable=True))
    seconds, peak = run.run()
    assert 1 < seconds < 60 and peak > 300 and run.cell_seconds[1] >= 1
    failing = [new_markdown_cell("## The loop"), new_code_cell("1 / 0", id="bad-one")]
    run = course.Lesson(new_notebook(cells=failing), "11_x", tmp_path, tqdm(disable=True))
    with pytest.raises(SystemExit, match="11_x stopped in cell 1 .id bad-one, under 'The loop'.:\nZeroDivisionError"):
        run.run()


def test_a_lesson_with_widgets_goes_on_at_once_and_shows_their_pictures(tmp_path, monkeypatch):
    # nbclient's own Output widgets wait here for a reply that they have overlooked; slow ones do so each time
    send = OutputWidget.send
    monkeypatch.setattr(OutputWidget, "send", lambda *args, **more: (time.sleep(0.05), send(*args, **more)))
    begin = new_code_cell("from ipywidgets import interact\nfrom PIL import Image\nfrom IPython.display import display")
    turn = [new_code_cell("interact(lambda size: display(Image.new('RGB', (size, size))), size=9);") for _ in range(3)]
    run = course.Lesson(new_notebook(cells=[begin, *turn]), "11_x", tmp_path, tqdm(disable=True))
    run.timeout = 20
    run.run()
    assert max(run.cell_seconds[i] for i in (1, 2, 3)) < 15
    assert len(course.pictures(run.nb, tmp_path / "pictures")) == 3


def test_a_cell_that_hangs_is_named(tmp_path):
    run = course.Lesson(new_notebook(cells=[new_code_cell("while True: pass")]), "11_x", tmp_path, tqdm(disable=True))
    run.timeout = 2
    with pytest.raises(SystemExit, match="11_x stopped in cell 0.*\n.*longer than 2 s"):
        run.run()


def test_the_course_command_refuses_unknown_lessons():
    command = [sys.executable, ROOT / "tools" / "course.py", "difusion"]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode != 0 and "nearest" in run.stderr and "Traceback" not in run.stderr
    assert all(p.stem in run.stderr for p in notebooks.lessons())


def test_broken_links_are_found(tmp_path, monkeypatch):
    monkeypatch.setattr(links, "ROOT", tmp_path)
    (tmp_path / "b.md").write_text("# Where it *all* is\n")
    page = tmp_path / "a.md"
    page.write_text("")
    assert links.problem("b.md#where-it-all-is", page) is None
    assert links.problem("https://example.org/x", page) is None
    assert "no heading" in links.problem("b.md#where-it-is", page)
    assert "does not exist" in links.problem("c.png", page)
    assert "neither" in links.problem("/etc/motd", page)
    s = notebooks.settings()
    own = f"https://github.com/{s['user']}/{s['repo']}/blob/{s['branch']}/"
    assert links.problem(own + "b.md", page) is None
    assert "no c.md here" in links.problem(own + "c.md", page)
    page.write_text("![a](b.md) <img src='gone.png'> [x]( )\n\n```\n[no link](gone.md)\n```\n")
    found = "\n".join(links.check_texts(page))
    assert "gone.png" in found and "leads nowhere" in found and "gone.md" not in found


def test_broken_pictures_are_found(tmp_path, monkeypatch):
    monkeypatch.setattr(links, "ROOT", tmp_path)
    nb = lesson()
    notebooks.nbformat.write(nb, tmp_path / "good.ipynb")
    assert links.check_outputs(tmp_path / "good.ipynb") == []
    nb.cells[2].outputs[0]["data"]["image/png"] = picture()[:-48]
    notebooks.nbformat.write(nb, tmp_path / "bad.ipynb")
    assert "a broken picture" in links.check_outputs(tmp_path / "bad.ipynb")[0]


def test_secrets_and_paths_of_a_machine_are_found():
    found = find_secrets.SECRETS | find_secrets.PATHS
    for text in ("hf_" + "a1" * 17, "ghp_" + "a" * 36, "AKIA" + "A" * 16, "-----BEGIN " + "PRIVATE KEY-----"):
        assert find_secrets.scan(f"x = '{text}'", found), text
    for text in ("/ho" + "me/ada/course", "/Us" + "ers/ada/course", "C:\\" + "Users\\ada", "/tm" + "p/tmpab12cd34/x"):
        assert find_secrets.scan(f"see {text}", found) == [(1, find_secrets.scan(f"see {text}", found)[0][1])], text
    for text in (
        "https://example.org/home/page",
        "hf_hub",
        "/content/data",
        "~/.cache/x",
        "token = os.environ['HF_TOKEN']",
    ):
        assert not find_secrets.scan(text, found), text
    assert find_secrets.without_pictures('"image/png": "' + "A" * 400 + '\\n"') == '"image/png": ""'


def test_the_readme_is_that_of_the_index():
    text, pictures = readme.readme()
    assert (ROOT / "README.md").read_text() == text, "run `make readme`"
    assert all((ROOT / name).read_bytes() == data for name, data in pictures.items())


def test_links_are_turned_to_the_root():
    turned = readme.from_root(
        "[a](unit1/x.ipynb#top) [b](../LICENSE) <img src='images/x.png'> [c](#here) [d](https://e.org)"
    )
    assert (
        turned == "[a](nbs/unit1/x.ipynb#top) [b](LICENSE) <img src='nbs/images/x.png'> [c](#here) [d](https://e.org)"
    )

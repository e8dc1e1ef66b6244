"""Run lessons from clean kernels and write the pages that show them: `python tools/course.py [LESSON ...]`."""

import argparse
import base64
import html
import os
import re
import shutil
import sys
import threading
import time
from pathlib import Path

import nbformat
import psutil
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError
from nbconvert import HTMLExporter
from nbconvert.filters import markdown2html
from notebooks import ROOT, code_cells, directives, headings, named_lessons, place, read, settings, under
from tqdm import tqdm

CELL_SECONDS = 3600  # a cell that takes longer hangs; at full scale a cell may train for a while


class Lesson(NotebookClient):
    """A notebook that is executed in a kernel of its own, timed, with the kernel's memory watched."""

    def __init__(self, nb, name, folder, bar):
        for cell in code_cells(nb):  # as in the tests: a cell that says `#| eval: false` is for a reader's own machine
            if directives(cell).get("eval", "").lower() == "false":
                cell.metadata["tags"] = ["skip-execution"]
        super().__init__(
            nb,
            timeout=CELL_SECONDS,
            kernel_name="python3",
            resources={"metadata": {"path": str(folder)}},
            coalesce_streams=True,
            extra_arguments=["--IPKernelApp.log_level=40"],  # errors only
            on_cell_start=self.starts,
            on_cell_executed=self.ends,
        )
        # nbclient's own Output widgets write to the socket on which it waits for the kernel's reply, and the reply can be
        # overlooked until the cell times out (its issue 312). Without them a widget's picture stands below the widget.
        self.widget_registry = {}
        self.name, self.bar, self.at, self.peak, self.started, self.cell_seconds = name, bar, 0, 0, 0.0, {}

    def starts(self, cell, cell_index):
        """Remember the cell, for the message if it fails."""
        self.at, self.started = cell_index, time.perf_counter()
        self.bar.set_postfix_str(f"cell {cell_index} of {len(self.nb.cells)}", refresh=False)

    def ends(self, cell, cell_index, execute_reply):
        """Note what the cell took."""
        self.cell_seconds[cell_index] = time.perf_counter() - self.started
        self.bar.update()

    def watch(self, stop):
        """Sample the memory of the kernel and its children until told to stop."""
        while not stop.wait(0.2):
            try:
                kernel = psutil.Process(self.km.provisioner.pid)
                family = [kernel, *kernel.children(recursive=True)]
                self.peak = max(self.peak, sum(p.memory_info().rss for p in family))
            except (psutil.Error, AttributeError, TypeError):
                continue  # the kernel is not up yet, or just gone

    def run(self, env=None):
        """Execute all cells, in the environment `env` or this one; returns seconds and the peak memory in MB.

        Raises SystemExit that names lesson, cell and error where a cell fails.
        """
        stop, start = threading.Event(), time.perf_counter()
        watcher = threading.Thread(target=self.watch, args=(stop,), daemon=True)
        watcher.start()
        try:
            self.execute(env=dict(env or os.environ))
        except CellExecutionError as error:
            self.fails(f"{error.ename}: {error.evalue}", error.traceback)
        except CellTimeoutError:
            self.fails(f"took longer than {self.timeout} s")
        except DeadKernelError:
            self.fails(f"the kernel died (it held up to {self.peak / 1e6:,.0f} MB: is there enough memory?)")
        finally:
            stop.set()
            watcher.join()
        return time.perf_counter() - start, self.peak / 1e6

    def fails(self, what, traceback=""):
        """Stop with the lesson, the cell and the error."""
        self.bar.close()
        shown = traceback or self.nb.cells[self.at].source
        raise SystemExit(f"\n{shown}\n\nLesson {self.name} stopped in {place(self.nb, self.at)}:\n{what}")


def title(nb) -> str:
    """The first heading of a lesson."""
    return next(h for c in nb.cells if c.cell_type == "markdown" for h in headings(c.source))


def measured(nb) -> str:
    """The closing table of a lesson, as HTML: what the cells under "What you measured" put out."""
    parts = []
    for cell in under(nb, "What you measured"):
        for output in cell.get("outputs", []):
            data = output.get("data", {"text/plain": output.get("text", "")})
            if "text/html" in data:
                parts.append(data["text/html"])
            elif "text/markdown" in data:
                parts.append(markdown2html(data["text/markdown"]))
            elif data.get("text/plain", "").strip():
                parts.append(f"<pre>{html.escape(data['text/plain'])}</pre>")
    return "\n".join(parts)


def pictures(nb, folder: Path) -> list[tuple[str, str]]:
    """Write a lesson's pictures into a folder; returns (file name, heading above) of each."""
    folder.mkdir(parents=True)
    heading, found = "", []
    for cell in nb.cells:
        if cell.cell_type == "markdown":
            heading = ([heading] + headings(cell.source))[-1]
        for output in cell.get("outputs", []):
            for kind, end in (("image/png", "png"), ("image/jpeg", "jpg")):
                if kind in output.get("data", {}):
                    name = f"{len(found):02d}.{end}"
                    (folder / name).write_bytes(base64.b64decode(output["data"][kind]))
                    found.append((name, re.sub(r"[*_`$]", "", heading)))
                    break
    return found


STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 75rem; margin: 2rem auto; padding: 0 1rem; color: #222 }
table { border-collapse: collapse; margin: .5rem 0 } th, td { padding: .3rem .7rem; border-bottom: 1px solid #ddd;
text-align: left; vertical-align: top } .number { text-align: right } .gallery { display: flex; flex-wrap: wrap; gap: 1rem }
figure { margin: 0; max-width: 20rem } figure img { max-width: 100%; max-height: 16rem; border: 1px solid #eee }
figcaption { font-size: .8rem; color: #666 } a { color: #0b5fa5 } pre { white-space: pre-wrap }
"""


def index(results: list[dict], seconds: float) -> str:
    """The front page: a table of the lessons with what they took and measured, then a gallery of their pictures."""
    rows, galleries = [], []
    for r in results:
        link = f'<a href="{r["name"]}.html">{html.escape(r["title"])}</a>'
        rows.append(
            f'<tr><td>{link}</td><td class="number">{r["seconds"] / 60:.1f}</td>'
            f'<td class="number">{r["peak"]:,.0f}</td><td>{r["measured"]}</td></tr>'
        )
        shown = "\n".join(
            f'<figure><a href="{r["name"]}.html"><img loading="lazy" src="pictures/{r["name"]}/{name}" '
            f'alt="{html.escape(heading)}"></a><figcaption>{html.escape(heading)}</figcaption></figure>'
            for name, heading in r["pictures"]
        )
        galleries.append(f'<h3>{link}</h3>\n<div class="gallery">\n{shown}\n</div>')
    scale = os.environ.get("DM_COURSE_SCALE", "mini")
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>{html.escape(settings()["title"])}</title><style>{STYLE}</style></head><body>
<h1>{html.escape(settings()["title"])}</h1>
<p>{len(results)} lesson{"s" * (len(results) != 1)}, executed at scale <b>{html.escape(scale)}</b> on {os.cpu_count()} CPU cores
in {seconds / 60:.1f} minutes.</p>
<h2>Lessons</h2>
<table><tr><th>Lesson</th><th>Minutes</th><th>Peak memory, MB</th><th>What it measured</th></tr>
{"".join(rows)}
</table>
<h2>Pictures</h2>
{"".join(galleries)}
</body></html>
"""


def page(nb, path: Path) -> str:
    """An executed lesson as one HTML page, its pictures inside it."""
    exporter = HTMLExporter(embed_images=True)
    return exporter.from_notebook_node(nb, {"metadata": {"name": path.stem, "path": str(path.parent)}})[0]


def main():
    """Run the lessons asked for and write _course/index.html."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("lessons", nargs="*", help="numbers or names, for example 11; all for none")
    parser.add_argument("--out", type=Path, default=ROOT / "_course", help="the folder to write")
    asked = parser.parse_args()
    try:
        chosen = named_lessons(asked.lessons)
    except ValueError as error:
        sys.exit(str(error))
    os.environ.pop("MPLBACKEND", None)  # pictures belong into the notebook

    out = asked.out.resolve()
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    results, start = [], time.perf_counter()
    with tqdm(chosen, desc="lessons", position=0) as bar:
        for path in bar:
            bar.set_postfix_str(path.stem)
            folder = out / "work" / path.stem
            folder.mkdir(parents=True)
            with tqdm(total=len(code_cells(read(path))), desc="cells", position=1, leave=False) as cell_bar:
                lesson = Lesson(read(path), path.stem, folder, cell_bar)
                seconds, peak = lesson.run()
            nbformat.write(lesson.nb, out / path.name)
            (out / f"{path.stem}.html").write_text(page(lesson.nb, path), encoding="utf-8")
            facts = {"name": path.stem, "title": title(lesson.nb), "seconds": seconds, "peak": peak}
            shown = pictures(lesson.nb, out / "pictures" / path.stem)
            results.append(facts | {"measured": measured(lesson.nb), "pictures": shown})
            tqdm.write(f"{path.stem}: {seconds / 60:.1f} minutes, peak memory {peak:,.0f} MB")
            # after each lesson, so that one that fails leaves the pages of those before it
            (out / "index.html").write_text(index(results, time.perf_counter() - start), encoding="utf-8")
    print(out / "index.html")


if __name__ == "__main__":
    main()

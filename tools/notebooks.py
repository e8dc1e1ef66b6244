"""What the tools and tests know of the notebooks: where they lie, what they are called, what their cells say."""

import ast
import difflib
import re
from configparser import ConfigParser
from functools import cache
from pathlib import Path

import nbformat
from IPython.core.inputtransformer2 import TransformerManager

ROOT = Path(__file__).resolve().parent.parent
NBS = ROOT / "nbs"
PACKAGE = ROOT / "dm_course"
GENERATED_BY_NBDEV = {"__init__.py", "_modidx.py"}  # files of the package that no notebook's name stands for


@cache
def settings() -> dict:
    """settings.ini as a dict of strings."""
    config = ConfigParser(delimiters=["="], interpolation=None)
    config.read(ROOT / "settings.ini", encoding="utf-8")
    return dict(config["DEFAULT"])


def all_notebooks() -> list[Path]:
    """Every notebook of the course, in reading order: by the number that its name begins with, the index first."""
    paths = [p for p in NBS.rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts]
    return sorted(paths, key=lambda p: (number(p), p.name))


def lessons() -> list[Path]:
    """The notebooks of the units: the lessons proper."""
    return [p for p in all_notebooks() if p.parent.name.startswith("unit")]


def number(path: Path) -> int:
    """The number that a notebook's name begins with, -1 for the index."""
    found = re.match(r"\d+", path.stem)
    return int(found[0]) if found else -1


def named_lessons(names: list[str]) -> list[Path]:
    """The lessons asked for, each by its number (11), its name or its path; all for no name.

    Raises ValueError for an unknown name; it lists the valid ones and the nearest.
    """
    every = lessons()
    known = {}
    for path in every:
        relative = path.relative_to(NBS).with_suffix("")
        for name in (str(number(path)), path.stem, str(relative), f"{path.stem}.ipynb", f"nbs/{relative}.ipynb"):
            known[name] = path
    unknown = [n for n in names if n not in known]
    if unknown:
        near = difflib.get_close_matches(unknown[0], known, n=1, cutoff=0.0)
        valid = ", ".join(f"{number(p)} ({p.stem})" for p in every)
        hint = f"; the nearest is {near[0]}" if near else ""
        raise ValueError(f"there is no lesson {unknown[0]!r}{hint}. Lessons: {valid}")
    return [p for p in every if not names or p in {known[n] for n in names}]


def read(path: Path):
    """The notebook as nbformat reads it."""
    return nbformat.read(path, as_version=4)


def code_cells(nb) -> list:
    """The code cells that hold something."""
    return [c for c in nb.cells if c.cell_type == "code" and c.source.strip()]


def directives(cell) -> dict[str, str]:
    """The `#| name value` lines at the head of a code cell."""
    found = {}
    for line in cell.source.splitlines():
        match = re.match(r"\s*#\s?\|\s*([\w-]+):?\s*(.*)", line)
        if match:
            found[match[1]] = match[2].strip()
        elif line.strip():
            break
    return found


def exports(cell) -> bool:
    """Whether the cell's code goes into the library."""
    return bool({"export", "exporti", "exports"} & directives(cell).keys())


def module_name(nb) -> str | None:
    """The module that a notebook exports to, or None."""
    names = [directives(c)["default_exp"] for c in code_cells(nb) if "default_exp" in directives(c)]
    return names[0] if names else None


def tree(cell) -> ast.Module:
    """A code cell's syntax tree; IPython's %magic, !commands and questions are translated first."""
    return ast.parse(TransformerManager().transform_cell(cell.source))


HEADING = re.compile(r"^(#{1,6})\s+(.+?)\s*#*\s*$")


def headings(text: str) -> list[str]:
    """The headings of a Markdown text, without what stands in code fences."""
    found, fence = [], None
    for line in text.splitlines():
        mark = re.match(r"\s*(```+|~~~+)", line)
        if mark:
            fence = None if fence == mark[1][0] else fence or mark[1][0]
        elif fence is None and (match := HEADING.match(line)):
            found.append(match[2])
    return found


def under(nb, title: str) -> list:
    """The cells from the heading `title` (case ignored, a word or two may follow) to the next heading.

    The heading's own cell comes first; the list is empty where no such heading is.
    """
    found = []
    for cell in nb.cells:
        names = headings(cell.source) if cell.cell_type == "markdown" else []
        if found and names:
            break
        if found or any(name.lower().startswith(title.lower()) for name in names):
            found.append(cell)
    return found


def exercises(nb) -> list[str]:
    """The headings of a lesson's exercises: "Exercise 1 …"."""
    every = [h for c in nb.cells if c.cell_type == "markdown" for h in headings(c.source)]
    return [h for h in every if re.match(r"Exercise\b", h)]


def solution(nb, exercise: str) -> str:
    """The code in an exercise's folded solution."""
    text = "\n".join(c.source for c in under(nb, exercise) if c.cell_type == "markdown")
    folded = "\n".join(re.findall(r"<details.*?</details>", text, flags=re.S))
    return "\n".join(re.findall(r"```python\n(.*?)```", folded, flags=re.S))


def solutions(nb) -> list[tuple[str, str, str]]:
    """Of each exercise: its heading, the code of its folded solution, and the cell that is left to the learner."""
    found = []
    for name in exercises(nb):
        stubs = [c for c in under(nb, name) if c.cell_type == "code" and not exports(c)]
        found.append((name, solution(nb, name), stubs[-1].source))
    return found


def place(nb, index: int) -> str:
    """Where in a notebook a cell stands, for messages: its position, id and the heading above it."""
    above = [h for c in nb.cells[: index + 1] if c.cell_type == "markdown" for h in headings(c.source)]
    return f"cell {index} (id {nb.cells[index].get('id', '?')}{', under ' + repr(above[-1]) if above else ''})"


PROGRESS = re.compile(r"\d+%\|.*?\||\d+it \[|[\d.?]+ ?(?:it/s|s/it|B/s)")


def complaints(cell) -> list[str]:
    """What a code cell wrote to stderr besides progress bars: warnings, log lines."""
    text = "\n".join(o.text for o in cell.get("outputs", []) if o.output_type == "stream" and o.name == "stderr")
    return [line for line in re.split(r"[\r\n]+", text) if line.strip() and not PROGRESS.search(line)]


def badge_urls(path: Path) -> dict[str, str]:
    """The addresses under a lesson's badges, built from settings.ini's user, repo and branch."""
    s = settings()
    inside = path.relative_to(ROOT).as_posix()
    github = f"github.com/{s['user']}/{s['repo']}/blob/{s['branch']}/{inside}"
    return {
        "Colab": f"https://colab.research.google.com/{github.replace('github.com', 'github')}",
        "Kaggle": f"https://kaggle.com/kernels/welcome?src=https://{github}",
    }

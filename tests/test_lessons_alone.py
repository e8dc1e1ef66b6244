"""Each lesson runs alone in an empty folder against nothing but the installed wheel, as in Colab and Kaggle.

The dependencies come from the environment that runs the tests; the package itself comes from the wheel. There is no
data beside the lesson, deprecations that its own calls cause are errors, and every folded solution is run.
"""

import ast
import os
import re
import subprocess
import sys
import zipfile
from contextlib import contextmanager

import course
import notebooks
import pytest
from filelock import FileLock
from nbformat.v4 import new_code_cell
from notebooks import ROOT
from tqdm import tqdm

# The promise is two minutes on two cores, which `make course` measures. Here a lesson has one thread and a neighbour.
SECONDS = 120 * 2

GUARD = '''
import sys, warnings
import dm_course

assert dm_course.__file__.startswith({site!r}), dm_course.__file__


def _install_guard(show_others=warnings.showwarning):
    kinds = (DeprecationWarning, PendingDeprecationWarning, FutureWarning)
    between = ("contextlib", "functools", "warnings", "torch.utils._contextlib", "torch.nn.modules.module")

    def called_by_us():
        """Whether the library that warns was called by the lesson or by dm_course, and not by another library."""
        names, frame = [], sys._getframe(2)
        while frame:
            names.append(frame.f_globals.get("__name__", ""))
            frame = frame.f_back
        tops = [n.partition(".")[0] for n in names if n not in between]
        others = [t for t in tops if t != tops[0]]
        return bool({{"__main__", "dm_course"}} & {{tops[0], *others[:1]}})

    def show(message, category, filename, lineno, file=None, line=None):
        if not issubclass(category, kinds):
            return show_others(message, category, filename, lineno, file, line)
        if called_by_us():
            raise category(f"{{message}} ({{filename}}:{{lineno}})")
        if issubclass(category, FutureWarning):
            show_others(message, category, filename, lineno, file, line)

    warnings.showwarning = show
    for kind in kinds:
        warnings.simplefilter("always", kind)
    # NumPy 2.4 deprecates how torch hands over arrays: a matter between the two, seen inside diffusers' schedulers.
    warnings.filterwarnings("ignore", "__array__ implementation", DeprecationWarning, "diffusers")


_install_guard()
'''


@contextmanager
def made_once(tmp_path_factory, name):
    """A folder that all processes of this test run share; it is empty for the first of them, which fills it."""
    own = tmp_path_factory.getbasetemp()
    folder = (own.parent if "PYTEST_XDIST_WORKER" in os.environ else own) / name
    with FileLock(f"{folder}.lock"):
        folder.mkdir(exist_ok=True)
        yield folder


@pytest.fixture(scope="session")
def wheel(tmp_path_factory):
    """The wheel, built from the source distribution."""
    with made_once(tmp_path_factory, "dist") as out:
        if not any(out.iterdir()):
            command = [sys.executable, "-m", "build", "--outdir", str(out), str(ROOT)]
            run = subprocess.run(command, capture_output=True, text=True)
            assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]
    assert len(list(out.glob("*.tar.gz"))) == 1
    return next(out.glob("*.whl"))


@pytest.fixture(scope="session")
def site(wheel, tmp_path_factory):
    """A folder with the package as pip installs it from the wheel, and nothing else."""
    with made_once(tmp_path_factory, "site") as folder:
        if not any(folder.iterdir()):
            command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", folder, wheel]
            subprocess.run(command, check=True)
    return folder


def test_the_wheel_holds_code_models_and_figures(wheel):
    inside = set(zipfile.ZipFile(wheel).namelist())
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard", "dm_course"], cwd=ROOT, capture_output=True
    )
    expected = set(listed.stdout.decode().split())
    assert expected and not expected - inside
    assert not [n for n in inside if n.startswith(("nbs/", "tests/", "tools/"))]
    metadata = next(n for n in inside if n.endswith("METADATA"))
    text = zipfile.ZipFile(wheel).read(metadata).decode()
    assert "Requires-Python: >=3.11" in text and "nbdev" not in re.sub(r".*extra ==.*", "", text.partition("\n\n")[0])


def checks_of(cells):
    """The statements that call a checker, in an exercise's code cells."""
    return [
        ast.unparse(statement)
        for cell in cells
        if cell.cell_type == "code"
        for statement in notebooks.tree(cell).body
        if isinstance(statement, ast.Expr) and re.match(r"check_\w+\(", ast.unparse(statement))
    ]


def with_solutions(nb):
    """Put each exercise's folded solution behind it as a cell, with its checks as assertions; returns those cells."""
    added = []
    for name in notebooks.exercises(nb):
        cells = notebooks.under(nb, name)
        checks = [f"assert {c}" for c in checks_of(cells)]
        solution = new_code_cell("\n".join([notebooks.solution(nb, name), *checks]))
        nb.cells.insert(nb.cells.index(cells[-1]) + 1, solution)
        added.append(solution)
    return added


@pytest.mark.parametrize("path", notebooks.lessons(), ids=lambda p: p.stem)
def test_a_lesson_runs_alone_against_the_wheel(path, site, tmp_path, capsys):
    nb = notebooks.read(path)
    for cell in notebooks.code_cells(nb):
        cell.outputs = []
    solutions = with_solutions(nb)
    nb.cells.insert(0, new_code_cell(GUARD.format(site=str(site))))
    alone = tmp_path / "alone"
    alone.mkdir()
    env = {k: v for k, v in os.environ.items() if not k.startswith(("DM_COURSE_", "MPLBACKEND", "PYTEST"))}
    env |= {"PYTHONPATH": str(site), "DM_COURSE_CACHE": str(tmp_path / "cache"), "HF_HOME": str(tmp_path / "hub")}
    lesson = course.Lesson(nb, path.stem, alone, tqdm(disable=True))
    lesson.timeout = int(SECONDS)  # so that a cell that hangs is named
    try:
        seconds, peak = lesson.run(env)
    except SystemExit as stopped:
        pytest.fail(str(stopped), pytrace=False)
    extra = sum(lesson.cell_seconds.get(nb.cells.index(c), 0.0) for c in solutions)
    with capsys.disabled():
        took = f"{seconds - extra:.0f} s and {extra:.0f} s for the solutions, {peak:,.0f} MB"
        print(f"\n{path.stem} alone: {took}", file=sys.stderr)  # a process of several keeps its stdout to itself
    said = [line for cell in notebooks.code_cells(nb) for line in notebooks.complaints(cell)]
    assert not said, "written to stderr:\n" + "\n".join(said)
    assert seconds - extra <= SECONDS


def test_the_guard_stops_at_deprecations_of_our_own_calls_only(site, tmp_path):
    def outcome(*sources):
        nb = notebooks.nbformat.v4.new_notebook(
            cells=[new_code_cell(s) for s in (GUARD.format(site=str(site)), *sources)]
        )
        lesson = course.Lesson(nb, "guard", tmp_path, tqdm(disable=True))
        lesson.run(os.environ | {"PYTHONPATH": f"{site}{os.pathsep}{tmp_path}"})
        return lesson.nb

    (tmp_path / "old.py").write_text(
        "import warnings\ndef f():\n    warnings.warn('use g', FutureWarning, stacklevel=1)\n"
    )
    (tmp_path / "other.py").write_text("import old\ndef f():\n    old.f()\n")
    with pytest.raises(SystemExit, match="(?s)Lesson guard stopped in cell 1.*FutureWarning: use g"):
        outcome("import old; old.f()")
    assert notebooks.complaints(outcome("import other; other.f()").cells[1])
    assert not notebooks.complaints(outcome("import warnings, other; print(1)").cells[1])

"""The rules that keep the course as it is: each test is one sentence of CONTRIBUTING.md."""

import ast
import builtins
import io
import json
import re
import subprocess
import symtable
import sys
import tokenize
from collections import Counter
from functools import cache
from pathlib import Path

import notebooks
import oldest
import pytest
from notebooks import (
    NBS,
    PACKAGE,
    ROOT,
    code_cells,
    directives,
    exports,
    module_name,
    number,
    settings,
    under,
)

ALL = notebooks.all_notebooks()
LESSONS = notebooks.lessons()
EXPORTING = [p for p in ALL if p.stem != "index"]
MODULES = sorted(p for p in PACKAGE.glob("*.py") if p.name not in notebooks.GENERATED_BY_NBDEV)

read = cache(notebooks.read)
tree = cache(lambda text: notebooks.tree(type("Cell", (), {"source": text})))
each_notebook = pytest.mark.parametrize("path", ALL, ids=lambda p: p.stem)
each_exporting = pytest.mark.parametrize("path", EXPORTING, ids=lambda p: p.stem)
each_lesson = pytest.mark.parametrize("path", LESSONS, ids=lambda p: p.stem)
each_module = pytest.mark.parametrize("path", MODULES, ids=lambda p: p.stem)


def where(path, cell):
    """Where a cell stands, for messages."""
    return f"{path.name}: {notebooks.place(read(path), read(path).cells.index(cell))}"


def markdown(path):
    """The Markdown cells of a notebook."""
    return [c for c in read(path).cells if c.cell_type == "markdown"]


def nodes(path):
    """Every (cell, syntax node) of a notebook's code."""
    return [(c, node) for c in code_cells(read(path)) for node in ast.walk(tree(c.source))]


def texts(cell):
    """Every text that a code cell put out."""
    found = [o.text for o in cell.get("outputs", []) if o.output_type == "stream"]
    for output in cell.get("outputs", []):
        found += [v for k, v in output.get("data", {}).items() if k.startswith("text/") and isinstance(v, str)]
    return found


# The package and its notebooks


def test_every_module_has_one_notebook_and_every_notebook_one_module():
    names = {
        p.name: [directives(c)["default_exp"] for c in code_cells(read(p)) if "default_exp" in directives(c)]
        for p in EXPORTING
    }
    assert not {k: v for k, v in names.items() if len(v) != 1}, "one default_exp a notebook"
    exported = [v[0] for v in names.values()]
    assert len(exported) == len(set(exported)), f"one notebook a module: {exported}"
    assert set(exported) == {p.stem for p in MODULES}


def test_notebooks_are_numbered_uniquely():
    numbers = Counter(number(p) for p in EXPORTING)
    assert -1 not in numbers and max(numbers.values(), default=1) == 1, numbers


def public_names(path):
    """The names in a generated module's __all__."""
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Assign) and node.targets[0].id == "__all__":
            return ast.literal_eval(node.value)
    return []


def test_no_public_name_in_two_modules():
    homes = {}
    for path in MODULES:
        for name in public_names(path):
            homes.setdefault(name, []).append(path.stem)
    assert not {k: v for k, v in homes.items() if len(v) > 1}


def module_numbers():
    """Each module's number: that of its notebook."""
    return {module_name(read(p)): number(p) for p in EXPORTING}


@each_exporting
def test_imports_are_explicit_and_from_lower_numbers_only(path):
    numbers, wrong = module_numbers(), []
    for cell, node in nodes(path):
        if isinstance(node, ast.ImportFrom):
            if any(a.name == "*" for a in node.names):
                wrong.append(f"{where(path, cell)}: a star import")
            if node.level:
                wrong.append(f"{where(path, cell)}: a relative import; write from dm_course.… import …")
            parts = (node.module or "").split(".")
            named = [[*parts, a.name] for a in node.names] if parts == ["dm_course"] else [parts]
        elif isinstance(node, ast.Import):
            named = [a.name.split(".") for a in node.names]
        else:
            continue
        for module in (n[1] for n in named if n[0] == "dm_course" and len(n) > 1):
            if module in numbers and numbers[module] >= number(path):
                wrong.append(f"{where(path, cell)}: dm_course.{module} does not come before this notebook")
    assert not wrong, "\n".join(wrong)


def unknown_globals(source, filename):
    """Names that a module's code reads but that neither it nor Python defines: a notebook's globals."""
    module = symtable.symtable(source, filename, "exec")
    known = {s.get_name() for s in module.get_symbols() if s.is_assigned() or s.is_imported() or s.is_namespace()}
    known |= set(dir(builtins)) | {"__file__", "__name__", "__doc__", "__path__", "__annotations__"}
    unknown, tables = set(), [module]
    while tables:
        table = tables.pop()
        tables += table.get_children()
        unknown |= {
            s.get_name()
            for s in table.get_symbols()
            if s.is_referenced() and (table is module or s.is_global()) and s.get_name() not in known
        }
    return unknown


@each_module
def test_exported_code_reads_no_notebook_global(path):
    assert not unknown_globals(path.read_text(), path.name)


def test_the_search_for_notebook_globals_finds_them():
    source = "import os\nA = 1\ndef f(x, y=A):\n    def g():\n        return x + A + os.sep + bs\n    return [xl for z in g()]\n"
    assert unknown_globals(source, "m") == {"bs", "xl"}


IMPORT_EACH = """
import importlib, os, sys

{libraries}

for name in {modules}:  # each in a child that has met the libraries, which take most of the time, and no other module
    if (child := os.fork()) == 0:
        importlib.import_module("dm_course." + name)
        found = [tool for tool in ("nbdev", "fastcore", "execnb") if tool in sys.modules]
        sys.exit(f"{{name}} imports {{found}}" if found else 0)
    if os.waitpid(child, 0)[1]:
        print(name, "does not import as it should", flush=True)
"""


def test_each_module_imports_in_a_clean_process_without_the_notebook_tools():
    imports = [n for p in MODULES for n in ast.parse(p.read_text()).body if isinstance(n, ast.Import | ast.ImportFrom)]
    lines = {ast.unparse(n) for n in imports if not getattr(n, "level", 0)}
    libraries = sorted(line for line in lines if not re.search("dm_course|nbdev|fastcore|execnb", line))
    code = IMPORT_EACH.format(libraries="\n".join(libraries), modules=[p.stem for p in MODULES])
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0 and not run.stdout, run.stdout + run.stderr


# What is exported is documented and checked


def comments(source):
    """The comment on each line that has one."""
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    return {t.start[0]: t.string.strip("# ") for t in tokens if t.type == tokenize.COMMENT}


def own_nodes(function):
    """The nodes of a function's body without those of functions inside it."""
    found, stack = [], list(function.body)
    while stack:
        node = stack.pop()
        found.append(node)
        if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda, ast.ClassDef)):
            stack += ast.iter_child_nodes(node)
    return found


def undocumented(source):
    """What a module's public functions and classes lack, as messages."""
    said, lines, wrong = comments(source), source.splitlines(), []

    def is_function(node):
        return isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))

    def docstring(node, name):
        text = (ast.get_docstring(node) or "").splitlines()
        if not text or not re.search(r"[.!?]\)?$", text[0]):
            wrong.append(f"{name}: no docstring whose first line is a whole sentence")
        return "\n".join(text)

    def function(node, name, with_docstring=True):
        text = docstring(node, name) if with_docstring else ""
        raises = [n for n in own_nodes(node) if isinstance(n, ast.Raise) and n.exc]
        if with_docstring and raises and "Raises" not in text:
            wrong.append(f"{name}: does not say what it raises")
        a = node.args
        args = [
            x for x in [*a.posonlyargs, *a.args, a.vararg, *a.kwonlyargs, a.kwarg] if x and x.arg not in ("self", "cls")
        ]
        starts = Counter(x.lineno for x in args)
        for x in args:
            end = next((n for n in range(x.lineno, node.body[0].lineno) if n in said), None)
            later = [o.lineno for o in args if o.lineno > x.lineno]
            if starts[x.lineno] > 1 or x.lineno == node.lineno or end is None or (later and end >= min(later)):
                wrong.append(f"{name}: argument {x.arg} is not on a line of its own with a comment")
        answers = [n for n in own_nodes(node) if isinstance(n, (ast.Return, ast.Yield, ast.YieldFrom)) and n.value]
        last = max([node.lineno, *(x.end_lineno for x in args)])
        signature_ends = [
            n for n in range(last, node.body[0].lineno) if re.search(r":\s*#", lines[n - 1]) and n in said
        ]
        signature_ends = [n for n in signature_ends if not args or n > last]
        if answers and not signature_ends:
            wrong.append(f"{name}: no comment on what it returns, behind the signature")

    for node in ast.parse(source).body:
        if is_function(node) and not node.name.startswith("_"):
            function(node, node.name)
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            docstring(node, node.name)
            dataclass = any("dataclass" in ast.unparse(d) for d in node.decorator_list)
            for part in node.body:
                if isinstance(part, ast.AnnAssign) and dataclass and not {part.lineno, part.end_lineno} & said.keys():
                    wrong.append(f"{node.name}: field {ast.unparse(part.target)} has no comment")
                if is_function(part) and part.name == "__init__":
                    function(part, f"{node.name}.__init__", with_docstring=False)
                elif is_function(part) and (not part.name.startswith("_") or part.name == "__call__"):
                    docstring(
                        part, f"{node.name}.{part.name}"
                    )  # a class fits into 25 lines: its methods say it in words
    return wrong


@each_module
def test_every_export_is_documented(path):
    wrong = undocumented(path.read_text())
    assert not wrong, "\n".join(wrong)


def test_the_search_for_missing_documentation_finds_it():
    good = 'def f(\n    x,  # (B,)\n    y=dict(\n        a=1,\n    ),  # options\n):  # (B,)\n    """Add.\n\n    Raises ValueError for 0.\n    """\n    if not x:\n        raise ValueError\n    return x\n'
    assert undocumented(good) == []
    assert undocumented(good.replace("  # (B,)\n    y", "\n    y")) == [
        "f: argument x is not on a line of its own with a comment"
    ]
    assert undocumented(good.replace("):  # (B,)", "):")) == ["f: no comment on what it returns, behind the signature"]
    assert undocumented(good.replace("Raises", "Mentions")) == ["f: does not say what it raises"]
    assert undocumented('def f():\n    """Do nothing."""\n') == []
    assert undocumented('def f(x):  # y\n    """Same."""\n    return x\n') != []


def checks(cell):
    """Whether a code cell checks something: an assertion, a comparison, a test_, assert_ or check_ call."""
    for node in ast.walk(tree(cell.source)):
        if isinstance(node, (ast.Assert, ast.Compare)):
            return True
        if isinstance(node, ast.Call):
            name = getattr(node.func, "id", getattr(node.func, "attr", ""))
            if re.match(r"(test|assert|check|raises)(_|$)", name):
                return True
    return False


@each_exporting
def test_every_export_is_checked_within_two_code_cells(path):
    cells, wrong = code_cells(read(path)), []
    for i, cell in enumerate(cells):
        defines = any(
            isinstance(n, (ast.FunctionDef, ast.ClassDef)) and not n.name.startswith("_")
            for n in tree(cell.source).body
        )
        if exports(cell) and defines and not any(checks(c) for c in cells[i + 1 : i + 3] if not exports(c)):
            wrong.append(where(path, cell))
    assert not wrong, "no check within two code cells after\n" + "\n".join(wrong)


# What cells may hold


@each_notebook
def test_code_cells_have_at_most_25_lines(path):
    long = [
        (len(c.source.splitlines()), where(path, c)) for c in code_cells(read(path)) if len(c.source.splitlines()) > 25
    ]
    assert not long


@each_notebook
def test_no_device_is_written_out_but_in_settings(path):
    if number(path) == 0:
        return
    found = [
        f"{where(path, cell)}: {ast.unparse(node)}"
        for cell, node in nodes(path)
        if (isinstance(node, ast.Constant) and re.fullmatch(r"(cuda|mps|cpu|xpu)(:\d+)?", str(node.value)))
        or (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "cuda")
    ]
    assert not found


@each_notebook
def test_markdown_holds_no_pictures_as_data_and_no_rules(path):
    wrong = [
        where(path, c) for c in markdown(path) if re.search(r"data:(image|audio)/", c.source) or c.get("attachments")
    ]
    assert not wrong, f"a picture inside the text: {wrong}"
    wrong = [where(path, c) for c in markdown(path) if re.search(r"^\s*-{3,}\s*$", c.source, flags=re.M)]
    assert not wrong, f"a line ---, which some renderers take for front matter; write ***: {wrong}"


def own_private_names():
    """Private names that the course itself defines: functions, classes, methods, attributes."""
    found = set()
    for path in MODULES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                found.add(node.name)
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
                found.add(node.attr)
            if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                found.add(node.target.id)
    return found


@each_notebook
def test_no_private_api_of_a_dependency(path):
    public_in_fact = {"_replace", "_asdict", "_fields", "_make"}  # documented methods of named tuples
    own, wrong = own_private_names() | public_in_fact, []

    def private(name):
        return name.startswith("_") and not name.endswith("__")

    for cell, node in nodes(path):
        if isinstance(node, ast.Attribute) and private(node.attr) and node.attr not in own:
            if getattr(node.value, "id", "") not in ("self", "cls"):
                wrong.append(f"{where(path, cell)}: {ast.unparse(node)}")
        elif isinstance(node, ast.ImportFrom) and not (node.module or "").startswith("dm_course"):
            if any(private(part) for part in (node.module or "").split(".") + [a.name for a in node.names]):
                wrong.append(f"{where(path, cell)}: {ast.unparse(node)}")
        elif isinstance(node, ast.Import) and any(private(part) for a in node.names for part in a.name.split(".")):
            wrong.append(f"{where(path, cell)}: {ast.unparse(node)}")
    assert not wrong, "\n".join(wrong)


@each_notebook
def test_numbers_that_a_checkpoint_owns_are_not_written_out(path):
    wrong = [where(path, c) for c, n in nodes(path) if isinstance(n, ast.Constant) and n.value in (0.18215, 0.13025)]
    assert not wrong, f"read the scaling factor from the autoencoder's config: {wrong}"


@each_notebook
def test_cell_ids_are_valid_and_unique(path):
    nb = read(path)
    ids = [c.get("id", "") for c in nb.cells]
    assert (nb.nbformat, nb.nbformat_minor) >= (4, 5)
    assert all(re.fullmatch(r"[A-Za-z0-9_-]{1,64}", i) for i in ids), ids
    assert len(ids) == len(set(ids)), [i for i, n in Counter(ids).items() if n > 1]


# What notebooks are committed with


@each_notebook
def test_outputs_hold_no_error_and_no_warning(path):
    wrong = []
    for cell in code_cells(read(path)):
        if any(o.output_type == "error" for o in cell.outputs):
            wrong.append(f"{where(path, cell)}: an error")
        wrong += [f"{where(path, cell)}: on stderr: {line!r}" for line in notebooks.complaints(cell)[:1]]
        for text in texts(cell):
            if match := re.search(r"\b[A-Z]\w*Warning\b|\bis deprecated\b", text):
                wrong.append(f"{where(path, cell)}: {match[0]}")
    assert not wrong, "\n".join(wrong)


@each_lesson
def test_lessons_are_committed_with_their_outputs(path):
    cells = [c for c in code_cells(read(path)) if not exports(c) and directives(c).get("eval") != "false"]
    with_output = [c for c in cells if c.outputs]
    assert len(with_output) >= len(cells) / 3, f"{len(with_output)} of {len(cells)} cells have an output"
    assert any("image/png" in o.get("data", {}) for c in cells for o in c.outputs), "no picture"


@each_notebook
def test_notebooks_are_small(path):
    limit = 1024 if path in LESSONS or path.stem == "index" else 200
    assert path.stat().st_size <= limit * 1024, f"{path.stat().st_size / 1024:.0f} kB of {limit}"


def test_bundled_models_are_small_and_hold_no_pickle():
    files = [p for p in (PACKAGE / "weights").rglob("*") if p.is_file()]
    assert sum(p.stat().st_size for p in files) <= 60 * 2**20
    assert not [
        p.name for p in files if p.suffix in (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".npy", ".msgpack")
    ]


# The frame of a lesson


@each_lesson
def test_a_lesson_opens_with_title_promise_badges_and_cost(path):
    cells = read(path).cells
    assert cells[0].cell_type == "markdown" and cells[0].source.startswith("# "), "the title comes first"
    opening = []
    for cell in cells[:10]:
        if cell.cell_type == "markdown":
            opening.append(cell.source)
    text = "\n\n".join(opening)
    for name, url in notebooks.badge_urls(path).items():
        assert url in text, f"no {name} badge to {url}"
    assert [p for p in re.split(r"\n+", opening[0] + "\n" + "\n".join(opening[1:2])) if re.match(r"(> )?[A-Z*_]", p)], (
        "no promise"
    )
    assert re.search(r"minute", text) and re.search(r"\b[MG]B\b", text), "no measured cost (minutes, peak memory)"


@each_lesson
def test_a_lesson_installs_itself_where_the_package_is_missing(path):
    first = next(c for c in code_cells(read(path)) if re.sub(r"^\s*#.*", "", c.source, flags=re.M).strip())
    assert re.search(r"pip", first.source) and re.search(r"dm-course|dm_course", first.source)
    assert re.search(r"find_spec|ImportError|ModuleNotFoundError", first.source), (
        "must do nothing where the package is there"
    )


@each_lesson
@pytest.mark.parametrize("title", ["What you will learn", "What you measured", "Where next"])
def test_a_lesson_has_its_sections(path, title):
    assert under(read(path), title), f"no heading {title!r}"


@each_lesson
def test_a_lesson_closes_with_what_was_measured_and_papers(path):
    outputs = [o for c in under(read(path), "What you measured") for o in c.get("outputs", [])]
    assert outputs, "the closing table is made by a cell"
    reading = "\n".join(c.source for c in under(read(path), "Where next") if c.cell_type == "markdown")
    assert re.search(r"\b\d{4}\.\d{4,5}\b", reading), "papers by arXiv number"


@each_lesson
def test_a_lesson_has_three_to_five_exercises_with_checks_and_folded_solutions(path):
    sections = {name: under(read(path), name) for name in notebooks.exercises(read(path))}
    assert 3 <= len(sections) <= 5, list(sections)
    for name, cells in sections.items():
        assert any("check_" in c.source for c in cells if c.cell_type == "code"), f"{name}: no check_…"
        folded = "\n".join(c.source for c in cells if c.cell_type == "markdown")
        assert re.search(r"<details.*?```python.*?```.*?</details>", folded, flags=re.S), f"{name}: no folded solution"


# The package's facts


@pytest.mark.parametrize(
    "group", ["requirements", "demos_requirements", "trackers_requirements", "course_requirements"]
)
def test_only_lower_bounds(group):
    wrong = [need for need in settings()[group].split() if not re.fullmatch(r"[A-Za-z0-9_.-]+>=[\d.]+", need)]
    assert not wrong, wrong


def test_oldest_versions_are_those_of_settings():
    assert (ROOT / "tests" / "oldest.txt").read_text() == oldest.oldest(), "run `make oldest`"


def test_the_package_imports_only_what_it_requires():
    """Nothing at import time beyond Python, the requirements and what an extra is for."""
    declared = {re.match(r"[\w-]+", n)[0].lower().replace("-", "_") for n in settings()["requirements"].split()}
    known_as = {"scikit_learn": "sklearn", "pillow": "PIL", "pyyaml": "yaml", "open_clip_torch": "open_clip"}
    allowed = {known_as.get(n, n) for n in declared} | set(sys.stdlib_module_names) | {"dm_course", "IPython"}
    wrong = []
    for path in MODULES:
        for node in ast.parse(path.read_text()).body:
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) and not node.level else []
            wrong += [f"{path.stem}: {n}" for n in names if n.split(".")[0] not in allowed]
    assert not wrong, wrong


def test_version_is_that_of_settings():
    assert f'__version__ = "{settings()["version"]}"' in (PACKAGE / "__init__.py").read_text()


def test_unknown_lesson_names_list_the_valid_ones_and_the_nearest():
    with pytest.raises(ValueError, match=r"no lesson '11_introduction'; the nearest is .*11") as error:
        notebooks.named_lessons(["11_introduction"])
    assert all(p.stem in str(error.value) for p in LESSONS)
    assert notebooks.named_lessons(["11"]) == [p for p in LESSONS if number(p) == 11]
    assert notebooks.named_lessons([]) == LESSONS


def test_every_notebook_is_valid_json_with_a_bare_kernel():
    for path in ALL:
        metadata = json.loads(Path(path).read_text())["metadata"]
        assert set(metadata) <= {"kernelspec"}, f"{path.relative_to(NBS)}: run `make clean-notebooks`"

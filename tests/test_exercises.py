"""The exercises of all lessons: each folded solution passes its check, and the cell left to the learner does not.

Lesson 11 keeps its checkers to itself; they are tested with its module, in test_sampling.py.
"""

import ast
from importlib import import_module

import notebooks
import pytest


def exercises():
    """The lesson's module, the folded solution, the open cell."""
    for path in notebooks.lessons():
        nb = notebooks.read(path)
        if path.stem.startswith("11"):
            continue
        for name, solution, stub in notebooks.solutions(nb):
            yield pytest.param(
                notebooks.module_name(nb), solution, stub, id=f"{path.stem[:2]} {name.partition(':')[0]}"
            )


@pytest.mark.parametrize(("module", "solution", "stub"), list(exercises()))
def test_a_solution_passes_its_check_and_the_open_exercise_does_not(module, solution, stub, capsys):
    *_, check = ast.parse(stub).body
    given = vars(import_module(f"dm_course.{module}"))
    open_exercise, solved = dict(given), dict(given)
    exec(stub, open_exercise)
    assert "Not yet" in capsys.readouterr().out
    exec(solution, solved)
    assert eval(compile(ast.Expression(check.value), "check", "eval"), solved) is True
    assert capsys.readouterr().out == "Right.\n"

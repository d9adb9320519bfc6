import ast
import shutil
import subprocess

import pytest

from nissl.intervention import code_language
from nissl.sources.snippets import SNIPPETS, code_answers
from nissl.sources.tasks import CODING_TASKS


def test_every_task_has_a_solution_in_both_languages():
    assert set(SNIPPETS) == set(CODING_TASKS)
    for cpp, python in SNIPPETS.values():
        ast.parse(python)
        assert code_language(cpp) == "c++"
        assert code_language(python) == "python"


def test_python_solutions_that_need_nothing_else_work():
    def solution(task, name):
        space: dict = {}
        exec(SNIPPETS[task][1], space)
        return space[name]

    assert solution("reverses a string", "reverse")("abc") == "cba"
    assert solution("merges two sorted lists", "merge")([1, 4], [2, 3]) == [1, 2, 3, 4]
    assert solution("computes the n-th Fibonacci number", "fibonacci")(10) == 55
    assert solution("finds the greatest common divisor of two numbers", "gcd")(12, 18) == 6
    assert solution("searches a sorted list by bisection", "search")([1, 3, 5, 7], 5) == 2
    assert solution("finds the shortest path in a graph", "shortest")([[1], [2], []], 0, 2) == 2
    assert solution("solves a quadratic equation", "solve")(1, -3, 2) == (1.0, 2.0)
    assert solution("rotates a list by k places", "rotate")([1, 2, 3], 4) == [2, 3, 1]


@pytest.mark.slow
def test_cpp_solutions_compile(tmp_path):
    if shutil.which("g++") is None:
        pytest.skip("g++ is not installed")
    for cpp, _ in SNIPPETS.values():
        (tmp_path / "x.cpp").write_text(cpp + "\n")
        subprocess.run(["g++", "-std=c++17", "-fsyntax-only", tmp_path / "x.cpp"], check=True)


def test_prompts_name_no_language_and_answers_end_alike():
    prompts, cpp, python = code_answers()
    assert len(set(prompts)) == len(prompts) == len(CODING_TASKS)
    assert all(p.endswith("\n```") for p in prompts)
    assert not any(word in p.lower() for p in prompts for word in ("c++", "python", "java", "julia"))
    assert all(a.startswith("cpp\n") and a.endswith("\n```") for a in cpp)
    assert all(a.startswith("python\n") and a.endswith("\n```") for a in python)

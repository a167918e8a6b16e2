"""What the documentation shows is executed: Python blocks of the Markdown files, examples of the docstrings."""

import doctest
import importlib
import inspect
import math
import pkgutil
import re
from pathlib import Path

import pytest

import volumejax

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
NUMBER = re.compile(r"[-+]?\d+(?:\.\d*)?(?:[eE][-+]?\d+)?")
TOLERANCE = 1e-6


class NumbersNearly(doctest.OutputChecker):
    """Compares text exactly and numbers to a relative tolerance: the last digits differ between machines."""

    def check_output(self, want, got, optionflags):
        if super().check_output(want, got, optionflags):
            return True
        if NUMBER.sub("#", want) != NUMBER.sub("#", got):
            return False
        pairs = zip(NUMBER.findall(want), NUMBER.findall(got), strict=True)
        return all(math.isclose(float(a), float(b), rel_tol=TOLERANCE) for a, b in pairs)


def modules():
    names = [info.name for info in pkgutil.walk_packages(volumejax.__path__, "volumejax.")]
    return [importlib.import_module(name) for name in names if not name.endswith("__main__")]


def examples():
    """The examples of every module, class and function, under the name of what they document."""
    finder = doctest.DocTestFinder(exclude_empty=True)
    found = {}
    for module in modules():
        own = [value for value in vars(module).values() if getattr(value, "__module__", None) == module.__name__]
        documented = [value for value in own if inspect.isclass(value) or inspect.isfunction(value)]
        for value in [module, *documented]:
            name = module.__name__ if value is module else f"{module.__name__}.{value.__qualname__}"
            if value is module:
                tests = [doctest.DocTestParser().get_doctest(module.__doc__ or "", dict(vars(module)), name, None, 0)]
            else:
                # Without a module the finder also takes functions that the shape checker has wrapped.
                tests = finder.find(value, name, module=False, globs=dict(vars(module)))
            found |= {test.name: test for test in tests if test.examples}
    return found


EXAMPLES = examples()


@pytest.mark.slow
@pytest.mark.parametrize("name", EXAMPLES)
def test_example(name):
    report = []
    runner = doctest.DocTestRunner(checker=NumbersNearly(), verbose=False)
    runner.run(EXAMPLES[name], out=report.append, clear_globs=False)
    assert runner.failures == 0, "".join(report)


def test_every_public_function_has_an_example():
    public = [getattr(volumejax, name) for name in volumejax.__all__]
    functions = [value for value in public if inspect.isfunction(value)]
    assert functions
    missing = [f.__name__ for f in functions if f"{f.__module__}.{f.__qualname__}" not in EXAMPLES]
    assert not missing, f"no example in the docstrings of {missing}"


@pytest.mark.parametrize(("got", "same"), [("[1.0000001, 2.]", True), ("[1.0001, 2.]", False), ("(1., 2.)", False)])
def test_numbers_are_compared_to_a_tolerance_and_the_rest_exactly(got, same):
    assert NumbersNearly().check_output("[1., 2.]\n", got + "\n", 0) is same


def blocks(page):
    return re.findall(r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), re.S | re.M)


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page)], ids=lambda page: page.name)
def test_code_of_the_page_runs(page):
    namespace = {"__name__": page.stem}
    for number, block in enumerate(blocks(page), start=1):
        exec(compile(block, f"{page.name}, block {number}", "exec"), namespace)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    targets = re.findall(r"\]\((?!https?://|#)([^)#]+)", page.read_text(encoding="utf-8"))
    missing = [target for target in targets if not (page.parent / target).exists()]
    assert not missing, f"{page.name} links to {missing}"

"""The layers of the package: imports go strictly downward, and heavy or optional packages stay out of `import
volumejax`."""

import ast
import pathlib
import subprocess
import sys

import pytest

PACKAGE = pathlib.Path(__file__).parent.parent / "volumejax"

# From the ground up; modules on one line do not know each other.
LAYERS = [
    ["logmath", "radial", "tree", "functions", "softmax", "examples", "tails", "free_energy", "metric", "optax_states"],
    ["chains", "islands"],
    ["spectrum"],
    ["coefficients", "exact", "results", "parallel", "diagnostics", "rows", "eigenpairs"],
    ["priors", "regions", "ridge", "behaviours", "curvature", "lanczos", "langevin", "validation"],
    ["reference", "proposals", "optax_moments", "boundary", "frames", "hessian", "shear"],
    ["low_rank"],
    ["tempering"],
    ["casting", "tuning", "ensemble"],
    ["kernels", "ladder", "response", "sample_rays"],
    ["annealing", "particles"],
    ["flight", "passes", "release", "tally", "descent"],
    ["pilot", "chain_errors", "friction"],
    ["summary"],
    ["rays", "tether", "temper", "laplace", "learning"],
    ["sweep", "probe"],
    ["__init__"],
    ["models.mlp"],
    ["models.__init__"],
    ["tasks.digits"],
    ["tasks.__init__"],
    ["config_errors", "check", "records"],
    ["config", "table"],
    ["experiment", "plots"],
    ["chain_plots", "particle_plots", "learning_plots", "learning_series", "series", "series_plots"],
    ["report", "terminal"],
    ["cli"],
    ["__main__"],
]
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
MODULES = sorted(PACKAGE.rglob("*.py"))


def name_of(path: pathlib.Path) -> str:
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts)


def imports_of(path: pathlib.Path) -> set[str]:
    """The modules of the package that `path` imports, anywhere in the file."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name} uses a relative import"
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    known = {f"volumejax.{name}" for name in LEVEL} | {"volumejax"}
    return {"__init__" if name == "volumejax" else name.removeprefix("volumejax.") for name in found & known}


def test_every_module_has_a_layer():
    assert sorted(LEVEL) == sorted(name_of(path) for path in MODULES)


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_imports_go_downward(path):
    name = name_of(path)
    package_itself = {"__init__"} if name != "__init__" else set()
    for other in imports_of(path) - package_itself:
        assert LEVEL[other] < LEVEL[name], f"{name} imports {other}, which does not lie below it"


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_files_stay_short(path):
    assert len(path.read_text().splitlines()) <= 480, "two topics in one file?"


def test_importing_the_library_needs_no_extra():
    extras = {"rich", "pydantic", "ruamel", "matplotlib", "jinja2", "sklearn", "xarray", "matfree", "blackjax"}
    code = f"import sys, volumejax; print(sorted({extras!r} & set(sys.modules)))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def test_public_names_are_listed_and_documented():
    import volumejax

    for name in volumejax.__all__:
        assert getattr(volumejax, name).__doc__, f"{name} has no docstring"

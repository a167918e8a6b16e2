import io
import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ruamel.yaml import YAML

from volumejax.cli import main
from volumejax.config import Config, ConfigError, dump_config, load_config, parse_config, quick

GOOD = """\
name: tiny
task: {kind: digits, seed: 0, num_epochs: 2}
prior: {kind: gaussian, sigma: 1.3975}
cutoff: 1e-2
num_rays: 16
proposals:
  - kind: isotropic
  - {kind: adam, damping: 1e-3}
  - {kind: diagonal_ggn, damping: 1e-2}
  - {kind: dense_ggn, beta: 2e4, shift: false, recorded: {best: -6578}}
tethers:
  - {region: star, effort: 0.5}
"""

MISTAKES = {
    "unknown key": ("cutoff:", "cutof:", "4: cutof: unknown key; did you mean `cutoff`?"),
    "unknown key deep": (
        "damping: 1e-3",
        "dampng: 1e-3",
        "8: proposals[1].dampng: unknown key; did you mean `damping`?",
    ),
    "unknown key far": ("cutoff: 1e-2", "cutoff: 1e-2\nzzz: 1", "zzz: unknown key; use one of name, task"),
    "misspelt tethers": ("tethers:", "tether:", "11: tether: unknown key; did you mean `tethers`?"),
    "unknown tether key": ("effort: 0.5", "efort: 0.5", "12: tethers[0].efort: unknown key; did you mean `effort`?"),
    "kind of a tether": (
        "effort: 0.5",
        "kind: star",
        "tethers[0].kind: unknown key; use one of region, effort, num_chains, decades, label",
    ),
    "unknown region": (
        "region: star",
        "region: stra",
        "tethers[0].region: unknown region 'stra'; did you mean `star`?",
    ),
    "missing region": ("{region: star, ", "{", "tethers[0].region: missing; add `region: connected`"),
    "zero effort": ("effort: 0.5", "effort: 0", "tethers[0].effort: expected a number greater than 0, got 0"),
    "huge effort": ("effort: 0.5", "effort: 1e9", "tethers[0].effort: expected a number at most 1000"),
    "quoted effort": ("effort: 0.5", "effort: '0.5'", "tethers[0].effort: is the string '0.5', not a number"),
    "no chains": (
        "effort: 0.5",
        "num_chains: 0",
        "tethers[0].num_chains: expected a number at least 1, got 0",
    ),
    "curve above the cutoff": (
        "effort: 0.5",
        "decades: -1",
        "tethers[0].decades: expected a number at least 0, got -1",
    ),
    "bare tether": ("{region: star, effort: 0.5}", "star", "tethers[0]: expected a mapping such as {region: ...}"),
    "tethers that are no list": (
        "tethers:\n  - {region: star, effort: 0.5}\n",
        "tethers: 3\n",
        "tethers: expected a list of entries, each starting with `- region:`, got 3",
    ),
    "same region": (
        "{region: star, effort: 0.5}",
        "{region: star}\n  - {region: star}",
        "two tethers are called 'tether, star'; give each its own `label:`",
    ),
    "a tether's label": (
        "effort: 0.5",
        "label: isotropic",
        "two entries are called 'isotropic'; give each its own `label:`",
    ),
    "1e-2 as a string": ("1e-2\nnum", "'1e-2'\nnum", "4: cutoff: is the string '1e-2', not a number; write it without"),
    "count as a string": ("num_rays: 16", "num_rays: '16'", "num_rays: is the string '16', not a number"),
    "string for a number": ("cutoff: 1e-2", "cutoff: small", "cutoff: expected a number such as 0.01, got 'small'"),
    "list for a number": ("cutoff: 1e-2", "cutoff: [1]", "cutoff: expected a number such as 0.01, got a list"),
    "boolean for a number": ("cutoff: 1e-2", "cutoff: true", "cutoff: expected a number such as 0.01, got True"),
    "no value": ("cutoff: 1e-2", "cutoff:", "cutoff: has no value; write one after the colon"),
    "fraction for a count": ("num_rays: 16", "num_rays: 1.5", "num_rays: expected a whole number such as 256, got 1.5"),
    "float for a count": ("num_rays: 16", "num_rays: 5e2", "num_rays: expected a whole number, got 500; write 500"),
    "word for a boolean": ("shift: false", "shift: no", "proposals[3].shift: expected true or false, got 'no'"),
    "negative sigma": ("sigma: 1.3975", "sigma: -1", "3: prior.sigma: expected a number greater than 0, got -1"),
    "zero sigma": ("sigma: 1.3975", "sigma: 0", "prior.sigma: expected a number greater than 0, got 0"),
    "misspelt rms": ("sigma: 1.3975", "sigma: rns", "prior.sigma: expected a number or the word `rms`, got 'rns'"),
    "quoted sigma": ("sigma: 1.3975", "sigma: '1.3975'", "prior.sigma: is the string '1.3975', not a number"),
    "infinite sigma": ("sigma: 1.3975", "sigma: .inf", "prior.sigma: expected a finite number, got inf"),
    "zero cutoff": ("cutoff: 1e-2", "cutoff: 0", "cutoff: expected a number greater than 0, got 0"),
    "negative cutoff": ("cutoff: 1e-2", "cutoff: -1e-2", "cutoff: expected a number greater than 0, got -0.01"),
    "no rays": ("num_rays: 16", "num_rays: 0", "num_rays: expected a number at least 1, got 0"),
    "huge seed": ("seed: 0", "seed: 99999999999999999999", "task.seed: expected a number at most 2147483647"),
    "unknown task": ("kind: digits", "kind: digit", "2: task.kind: unknown kind 'digit'; did you mean `digits`?"),
    "unknown proposal": ("kind: adam", "kind: adm", "proposals[1]: unknown kind 'adm'; did you mean `adam`?"),
    "missing kind": ("kind: adam, ", "", "proposals[1]: missing kind; add `kind: isotropic`"),
    "bare proposal": ("- kind: isotropic", "- isotropic", "proposals[0]: expected a mapping such as {kind: ...}"),
    "missing key": ("cutoff: 1e-2\n", "", "cutoff: missing; add `cutoff: 1e-2`"),
    "missing damping": (", damping: 1e-3", "", "proposals[1].damping: missing; add `damping: 1e-3`"),
    "two forms": ("damping: 1e-2", "damping: 1e-2, beta: 3", "proposals[2]: needs either damping or beta"),
    "no form": (", damping: 1e-2", "", "proposals[2]: needs either damping or beta"),
    "stray shift": ("damping: 1e-2", "damping: 1e-2, shift: true", "shift belongs to beta, not to damping"),
    "same label": (
        "{kind: adam, damping: 1e-3}",
        "{kind: isotropic}",
        "two proposals are called 'isotropic'; give each",
    ),
    "path as a name": ("name: tiny", "name: ../tiny", "name: expected letters, digits"),
    "duplicate key": ("cutoff: 1e-2", "cutoff: 1\ncutoff: 2", "5: cutoff: given twice; remove one of them"),
    "syntax": ("cutoff: 1e-2", "cutoff: [1", "5: not valid YAML:"),
    "tab": ("cutoff: 1e-2", "cutoff:\t1\n\t- 2", "not valid YAML:"),
    "foreign object": ("cutoff: 1e-2", "cutoff: !!python/object:os.system 1", "4: not valid YAML:"),
    "two documents": ("num_rays", "---\nnum_rays", "5: holds two YAML documents; keep one per file"),
    "key that is no text": ("num_rays", "[1, 2]: 3\nnum_rays", "is not a text key; rename it or remove it"),
    "control characters": ("name: tiny", '"a\\n\\e[31m": tiny', r"'a\n\x1b[31m': unknown key"),
}


def complain(capsys, argument):
    """The one line on stderr that `volumejax run` prints, with exit code 2 and nothing on stdout."""
    code = main(["run", str(argument)])
    printed = capsys.readouterr()
    assert code == 2
    assert printed.out == ""
    assert printed.err.count("\n") == 1 and printed.err.endswith("\n")
    assert printed.err.startswith(f"volumejax: {argument}")
    return printed.err


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_line_with_its_remedy(mistake, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    before, after, message = MISTAKES[mistake]
    assert before in GOOD
    path = tmp_path / "experiment.yaml"
    path.write_text(GOOD.replace(before, after, 1))
    assert message in complain(capsys, path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["experiment.yaml"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty; start from"),
        (b"# nothing\n", "is empty; start from"),
        (b"- a\n- b\n", "expected `key: value` lines at the top, got a list"),
        (b"3\n", "expected `key: value` lines at the top, got 3"),
        (b"\xff\xfe\x00a", "is not UTF-8 text; save it as UTF-8"),
        (b"\x07", "not valid YAML:"),
        (b"[" * 5000, "is nested too deeply; flatten it"),
        (b"name: " + b"1" * 5000, "not valid YAML:"),
    ],
)
def test_a_file_that_holds_no_mapping(content, message, tmp_path, capsys):
    path = tmp_path / "experiment.yaml"
    path.write_bytes(content)
    assert message in complain(capsys, path)


def test_missing_file_and_directory(tmp_path, capsys):
    assert "no such file; check the path" in complain(capsys, tmp_path / "absent.yaml")
    assert "is a directory; give the YAML file inside it" in complain(capsys, tmp_path)


def test_the_unquoted_number_that_is_suggested_works():
    with pytest.raises(ConfigError) as caught:
        parse_config(GOOD.replace("1e-2\n", "'1e-5'\n", 1))
    suggested = re.search(r"without quotes: (\S+)", str(caught.value))
    assert suggested is not None
    assert parse_config(GOOD.replace("1e-2\n", f"{suggested[1]}\n", 1)).cutoff == 1e-5


def test_numbers_are_read_as_yaml_1_2():
    for text in ("1e-2", "1E-2", "1.0e-2", ".01", "0.01"):
        assert parse_config(GOOD.replace("1e-2\n", f"{text}\n", 1)).cutoff == 0.01


def test_defaults_labels_and_freezing():
    config = parse_config(GOOD)
    assert (config.tolerance, config.audit_fraction, config.output) == (0.1, 0.05, "runs")
    names = [entry.name for entry in config.proposals]
    assert names == ["isotropic", "Adam 0.001", "diagonal GGN 0.01", "dense GGN β=2e4, no shift"]
    assert config.proposals[3].recorded is not None and config.proposals[3].recorded.best == -6578
    with pytest.raises(ValueError, match="frozen"):
        config.cutoff = 1.0  # pyright: ignore[reportAttributeAccessIssue]


def test_the_resolved_configuration_reads_back():
    config = parse_config(GOOD.replace("sigma: 1.3975", "sigma: rms").replace("beta: 2e4", "beta: auto"))
    assert parse_config(dump_config(config)) == config


@pytest.mark.parametrize("entries", ["", "proposals: []\n", "tethers: []\n", "proposals: []\ntethers: []\n"])
def test_neither_proposals_nor_tethers(entries):
    text = GOOD[: GOOD.index("proposals:")] + entries
    with pytest.raises(
        ConfigError, match=r"config: nothing to measure; add `proposals: \[\{kind: isotropic\}\]`, `teth"
    ):
        parse_config(text)


def test_either_proposals_or_tethers():
    start = GOOD[: GOOD.index("proposals:")]
    only_rays = parse_config(GOOD[: GOOD.index("tethers:")])
    only_chains = parse_config(start + "tethers: [{region: connected}, {region: star, num_chains: null, label: long}]")
    assert only_rays.tethers == () and only_chains.proposals == ()
    assert [entry.name for entry in only_chains.tethers] == ["tether, connected", "long"]
    assert [(entry.effort, entry.num_chains) for entry in only_chains.tethers] == [(1.0, None)] * 2
    for config in (only_rays, only_chains):
        assert parse_config(dump_config(config)) == config


def test_quick_shortens_chains_and_nothing_else():
    config = parse_config(GOOD.replace("effort: 0.5", "effort: 0.5, num_chains: 8, label: a"))
    (short,) = quick(config).tethers
    assert 0 < short.effort <= 0.01 and short.num_chains == 2
    assert short.model_copy(update={"effort": 0.5, "num_chains": 8}) == config.tethers[0]
    (shorter,) = quick(parse_config(GOOD.replace("effort: 0.5", "effort: 0.001"))).tethers
    assert shorter.effort == 0.001 and shorter.num_chains is None
    (single,) = quick(parse_config(GOOD.replace("effort: 0.5", "effort: 0.5, num_chains: 1"))).tethers
    assert single.num_chains == 1


def test_quick_only_takes_rays_away():
    text = GOOD[: GOOD.index("tethers:")]
    config = parse_config(text.replace("num_rays: 16", "num_rays: 1000"))
    assert quick(config).num_rays < 100
    assert quick(config).model_copy(update={"num_rays": 1000}) == config
    assert quick(parse_config(GOOD)).num_rays == 16


def test_the_shipped_experiment():
    config = load_config(Path(__file__).parents[1] / "configs" / "digits_mlp.yaml")
    assert (config.prior.sigma, config.cutoff, config.task.num_epochs) == (1.3975, 0.01, 25)
    assert {entry.kind for entry in config.proposals} == {"isotropic", "adam", "diagonal_ggn", "dense_ggn"}
    assert [entry.region for entry in config.tethers] == ["star", "connected"]
    chains = load_config(Path(__file__).parents[1] / "configs" / "digits_tether.yaml")
    assert [(entry.region, entry.effort) for entry in chains.tethers] == [("star", 1), ("connected", 2)]
    everywhere = load_config(Path(__file__).parents[1] / "configs" / "digits_global.yaml")
    assert everywhere.cost == "loss" and len(everywhere.tethers) == 2
    assert [entry.name for entry in everywhere.particles] == ["from the prior"]


PARTICLES = "particles: [{num_particles: 64, num_islands: 8}]\n"


def test_particles_are_read_and_cut_down_for_a_quick_run():
    config = parse_config(GOOD + PARTICLES)
    assert (config.particles[0].num_particles, config.particles[0].effort) == (64, 1.0)
    assert config.cost == "kl"
    (few,) = quick(config).particles
    assert few.num_particles <= 16 and few.num_islands >= 4 and few.effort < 0.1


def test_a_tuned_row_takes_eigenpairs_of_its_own_curvature():
    text = GOOD.replace("tethers:\n  - {region: star, effort: 0.5}\n", "")
    tuned = "  - {kind: tuned, curvature: NAME, rank: 3}\n"
    parse_config(text + tuned.replace("NAME", "diagonal_ggn"))
    with pytest.raises(ConfigError, match="rank goes with `curvature: diagonal_ggn`: Adam's moments have another unit"):
        parse_config(text + tuned.replace("NAME", "adam"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("particles: [{num_particles: 10, num_islands: 8}]\n", "at least twice num_islands"),
        ("particles: [{num_islands: 2}]\n", "num_islands"),
        ("particles: [{}, {}]\n", "two particles are called 'from the prior'"),
        ("particles: [{effort: 0}]\n", "effort"),
        ("cost: error\n", "cost"),
        ("cutoffs: [1e-3]\n" + PARTICLES, "go without tethers and particles; give those a file of their own"),
        ("cutoffs: [1e-3]\ncost: loss\n", "go without tethers and `cost: loss`; give those"),
    ],
)
def test_particles_that_make_no_sense_are_refused(text, message):
    with pytest.raises(ConfigError, match=message) as caught:
        parse_config(GOOD + text)
    assert "\n" not in str(caught.value)


KEYS = st.sampled_from([*Config.model_fields, "kind", "sigma", "damping", "beta", "recorded", "region"]) | st.text(
    max_size=5
)
SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["digits", "gaussian", "isotropic", "adam", "dense_ggn", "rms", "1e-2", "star"])
)
VALUES = st.recursive(SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=4))


@settings(max_examples=150, deadline=None)
@given(st.dictionaries(KEYS, VALUES, max_size=6), st.booleans())
def test_any_mapping_parses_or_is_refused_in_one_line(extra, keep):
    base = YAML(typ="safe", pure=True).load(GOOD) if keep else {}
    stream = io.StringIO()
    YAML(typ="safe", pure=True).dump({**base, **extra}, stream)
    _parses_or_is_refused(stream.getvalue())


@settings(max_examples=150, deadline=None)
@given(st.text(alphabet="ab:-[]{}#&*!|>'\"%@`,? \n\t01e.~", max_size=40))
def test_any_text_parses_or_is_refused_in_one_line(text):
    _parses_or_is_refused(text)


def _parses_or_is_refused(text):
    try:
        config = parse_config(text)
    except ConfigError as error:
        assert len(str(error).splitlines()) == 1
        assert str(error).isprintable()
    else:
        assert parse_config(dump_config(config)) == config

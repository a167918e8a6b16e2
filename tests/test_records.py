import json
import math
import os
import pickle

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from volumejax import records
from volumejax.cli import main
from volumejax.records import RecordError, create_run_directory, read_run, write_file, write_run


@pytest.fixture
def stored(tmp_path, example_run):
    """A run directory."""
    directory = create_run_directory(tmp_path, "example")
    write_run(directory, example_run)
    return directory


def test_what_is_written_reads_back(stored, example_run):
    run = read_run(stored)
    np.testing.assert_equal(run.model_dump(), example_run.model_dump())
    assert run.config == example_run.config
    for row, original in zip(run.rows, example_run.rows, strict=True):
        assert row.rays.keys() == original.rays.keys()
        for name, values in original.rays.items():
            np.testing.assert_array_equal(row.rays[name], values)
            assert row.rays[name].dtype == values.dtype


def test_the_sweep_of_a_tuned_row_reads_back_beside_its_rays(tmp_path, make_row, make_run):
    sweep = {"beta": np.array([0.0, 2.5]), "mean_log_weight": np.array([-np.inf, -7.0])}
    row = make_row("tuned", "tuned", [-1.0, -2.0]).model_copy(update={"sweep": sweep})
    write_run(tmp_path, make_run(row))
    (read,) = read_run(tmp_path).rows
    assert read.sweep.keys() == sweep.keys() and read.rays.keys() == row.rays.keys()
    for name, values in sweep.items():
        np.testing.assert_array_equal(read.sweep[name], values)


def test_non_finite_values_are_words_in_json(tmp_path, make_row, make_run):
    row = make_row("inf", "isotropic", [-np.inf, -np.inf])
    run = make_run(row, task={"sigma": math.inf})
    write_run(tmp_path, run)
    text = (tmp_path / "result.json").read_text()
    content = json.loads(text, parse_constant=lambda word: pytest.fail(f"{word} is not JSON"))
    assert content["rows"][0]["estimate"]["log_mass"] == "-inf"
    assert content["rows"][0]["estimate"]["std_error"] == "inf"
    assert content["rows"][0]["estimate"]["std_log_weight"] == "nan"
    read = read_run(tmp_path)
    assert read.rows[0].label == "inf"
    assert read.rows[0].estimate["log_mass"] == -math.inf
    assert math.isnan(float(read.rows[0].estimate["std_log_weight"]))
    assert read.task["sigma"] == math.inf


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    numbers=st.dictionaries(st.text(max_size=5), st.floats() | st.integers(), max_size=4),
    label=st.text(max_size=8) | st.sampled_from(["inf", "-inf", "nan"]),
)
def test_any_numbers_survive(tmp_path, make_row, make_run, numbers, label):
    row = make_row("row", "isotropic", [-1.0, -2.0]).model_copy(update={"label": label})
    write_run(tmp_path, make_run(row.model_copy(update={"estimate": {**row.estimate, **numbers}})))
    read = read_run(tmp_path).rows[0]
    assert read.label == label
    for name, value in numbers.items():
        np.testing.assert_equal(read.estimate[name], value)


def test_a_run_is_never_overwritten(tmp_path):
    names = [create_run_directory(tmp_path / "deep" / "runs", "digits").name for _ in range(3)]
    assert names == ["digits-001", "digits-002", "digits-003"]
    (tmp_path / "deep" / "runs" / "digits-002").rmdir()
    (tmp_path / "deep" / "runs" / "digits-017").write_text("not even a directory")
    assert create_run_directory(tmp_path / "deep" / "runs", "digits").name == "digits-018"
    assert create_run_directory(tmp_path / "deep" / "runs", "digits-0").name == "digits-0-001"


def test_a_place_that_cannot_hold_runs(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RecordError, match=r"file: cannot make a run directory here .*; choose another --output"):
        create_run_directory(tmp_path / "file", "digits")


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "result.json"
    write_file(path, b"old")
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(RecordError, match=r"result\.json: cannot be written \(No space left on device\)"):
        write_file(path, b"new")
    assert path.read_bytes() == b"old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["result.json"]


def test_only_numbers_are_stored(tmp_path, make_row, make_run):
    row = make_row("row", "isotropic", [-1.0]).model_copy(update={"rays": {"log_weight": np.array([object()])}})
    with pytest.raises(TypeError, match="holds numbers only"):
        write_run(tmp_path, make_run(row))
    assert not list(tmp_path.iterdir())


def break_json(path):
    path.write_text(path.read_text()[:-40])


def pickle_rays(path):
    np.savez(path, **{"0/log_weight": np.array([{}, []], dtype=object)})


def drop_chains(path):
    arrays = dict(np.load(path))
    np.savez(path, **{name: values for name, values in arrays.items() if name != "1/precision"})


def test_chains_read_back(tmp_path, make_row, make_run, make_tether):
    run = make_run(make_row("a", "adam", [-1.0, -2.0]), make_tether("done"), make_tether("cut", complete=False))
    write_run(tmp_path, run)
    read = read_run(tmp_path)
    np.testing.assert_equal(read.model_dump(), run.model_dump())
    assert [row.from_chains for row in read.rows] == [False, True, True]
    assert read.rows[0].chains == {} and read.rows[1].rays == {}
    assert "curve_cutoffs" in read.rows[1].chains and "curve_cutoffs" not in read.rows[2].chains
    for row, original in zip(read.rows, run.rows, strict=True):
        assert row.arrays.keys() == original.arrays.keys()
        for name, values in original.arrays.items():
            np.testing.assert_array_equal(row.arrays[name], values)


def test_chains_that_are_missing_are_told(tmp_path, make_row, make_run, make_tether):
    write_run(tmp_path, make_run(make_row("a", "adam", [-1.0, -2.0]), make_tether("done")))
    drop_chains(tmp_path / "rays.npz")
    with pytest.raises(RecordError, match=r"rays\.npz: lacks the chains of a row in result\.json; run the experiment"):
        read_run(tmp_path)


def test_the_first_format_is_still_read(stored, example_run):
    path = stored / "result.json"
    content = json.loads(path.read_text())
    assert content["format"] == 2
    path.write_text(json.dumps({**content, "format": 1}))
    read = read_run(stored)
    assert [row.label for row in read.rows] == [row.label for row in example_run.rows]
    np.testing.assert_array_equal(read.rows[0].rays["radius"], example_run.rows[0].rays["radius"])


DAMAGE = {
    "missing result": ("result.json", lambda path: path.unlink(), "is missing"),
    "cut result": ("result.json", break_json, "is not valid JSON"),
    "binary result": ("result.json", lambda path: path.write_bytes(b"\xff\xfe\x00"), "is not valid JSON"),
    "other JSON": ("result.json", lambda path: path.write_text("[1]"), "is not a volumejax result"),
    "no format": ("result.json", lambda path: path.write_text("{}"), "is not a volumejax result"),
    "no rows": ("result.json", lambda path: path.write_text('{"format": 1}'), "is damaged at name"),
    "future": ("result.json", lambda path: path.write_text('{"format": 99}'), "was written by a newer volumejax"),
    "nested": ("result.json", lambda path: path.write_text("[" * 100000), "is not valid JSON"),
    "missing rays": ("rays.npz", lambda path: path.unlink(), "is missing"),
    "empty rays": ("rays.npz", lambda path: path.write_bytes(b""), "is damaged"),
    "cut rays": ("rays.npz", lambda path: path.write_bytes(path.read_bytes()[:500]), "is damaged"),
    "pickled rays": ("rays.npz", pickle_rays, "is damaged"),
    "a bare pickle": ("rays.npz", lambda path: path.write_bytes(pickle.dumps({})), "is damaged"),
    "other rays": ("rays.npz", lambda path: np.savez(path, **{"0/log_weight": np.zeros(3)}), "lacks the rays of a row"),
    "foreign rays": ("rays.npz", lambda path: np.savez(path, weights=np.zeros(3)), "is damaged"),
    "missing config": ("config.yaml", lambda path: path.unlink(), "is missing"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_one_line_naming_the_file(damage, stored, capsys):
    name, break_it, message = DAMAGE[damage]
    break_it(stored / name)
    assert main(["plot", str(stored)]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.count("\n") == 1
    assert f"{name}: {message}" in printed.err
    assert not (stored / "report.html").exists()


def test_no_directory(tmp_path, capsys):
    assert main(["plot", str(tmp_path / "absent")]) == 2
    assert "absent: no such run directory" in capsys.readouterr().err


def test_hardware_and_versions_name_no_place():
    facts = {**records.describe_hardware(), **records.describe_versions()}
    assert {"cores", "device_kind", "python", "jax", "numpy"} <= facts.keys()
    assert os.sep not in "".join(str(value) for value in facts.values())

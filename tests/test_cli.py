import json
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from volumejax import cli, experiment
from volumejax.cli import main
from volumejax.records import read_run

CONFIG = """\
name: tiny
task: {kind: digits, num_epochs: 1}
prior: {kind: gaussian, sigma: 1.3975}
cutoff: 1e-2
num_rays: 100
chunk_size: 8
proposals:
  - {kind: isotropic, recorded: {best: -9800}}
  - {kind: isotropic, label: again}
"""


@pytest.fixture
def config(tmp_path, monkeypatch):
    """The path of an experiment file, in the current directory."""
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "tiny.yaml"
    path.write_text(CONFIG)
    return str(path)


class FakeSetting:
    """What `prepare` gives, without a network."""

    seconds = {"training": 1.0}  # noqa: RUF012

    def facts(self):
        return {"dimension": 4810, "sigma": 1.3975}


@pytest.fixture
def fake_rays(monkeypatch, make_row):
    """Rows without rays: `install(rays, ...)` gives one row per number; a partial one if it falls short."""

    def install(*counts, error=None):
        asked = []

        def prepare(config, _):
            asked.append(config)
            if isinstance(error, BaseException) and not counts:
                raise error
            return FakeSetting()

        def run_experiment(*_):
            config = asked[-1]
            for entry, count in zip(config.proposals, counts, strict=False):
                recorded = entry.recorded and entry.recorded.model_dump(exclude_none=True)
                complete = count >= config.num_rays
                yield make_row(entry.name, entry.kind, -9.0 - np.arange(count), complete=complete, recorded=recorded)
            if error is not None:
                raise error

        monkeypatch.setattr(experiment, "prepare", prepare)
        monkeypatch.setattr(experiment, "run_experiment", run_experiment)
        return asked

    return install


def only_run(root):
    (directory,) = Path(root).iterdir()
    return directory


def test_a_run_leaves_table_record_figures_and_report(config, fake_rays, capsys):
    fake_rays(100, 100)
    assert main(["run", config]) == 0
    printed = capsys.readouterr()
    directory = only_run("runs")
    assert directory.name == "tiny-001"
    names = {str(path.relative_to(directory)) for path in directory.rglob("*") if path.is_file()}
    figures = {f"figures/{name}.{kind}" for name in ("summary", "log_mass", "radius") for kind in ("png", "svg")}
    assert names == {"config.yaml", "result.json", "rays.npz", "report.html"} | figures
    assert "isotropic" in printed.out and "again" in printed.out and "best -9,800" in printed.out
    assert f"report: {directory / 'report.html'}" in printed.out
    assert "tiny: 2 proposals, 100 rays each" in printed.err
    run = read_run(directory)
    assert run.complete and not run.quick
    assert run.seconds.keys() == {"training", "total"}


def test_the_next_run_gets_its_own_directory(config, fake_rays):
    fake_rays(100, 100)
    assert main(["run", config]) == 0
    before = (Path("runs") / "tiny-001" / "result.json").read_bytes()
    assert main(["run", config]) == 0
    assert sorted(path.name for path in Path("runs").iterdir()) == ["tiny-001", "tiny-002"]
    assert (Path("runs") / "tiny-001" / "result.json").read_bytes() == before


def test_quick_takes_fewer_rays_and_says_so(config, fake_rays, capsys):
    asked = fake_rays(48, 48)
    assert main(["run", config, "--quick", "--output", "elsewhere/runs"]) == 0
    printed = capsys.readouterr()
    assert asked[0].num_rays == 48
    assert "quick run: shortened from 2 proposals, 100 rays each" in printed.err
    assert "quick run" in printed.out
    directory = only_run("elsewhere/runs")
    assert read_run(directory).quick
    assert "num_rays: 48" in (directory / "config.yaml").read_text()
    assert "Quick run." in (directory / "report.html").read_text()


def test_ctrl_c_keeps_finished_and_partial_rows(config, fake_rays, capsys):
    fake_rays(100, 24)
    assert main(["run", config]) == 130
    printed = capsys.readouterr()
    assert "partial: the run was interrupted" in printed.out
    assert "again (partial, 24 rays)" in " ".join(printed.out.split())
    run = read_run(only_run("runs"))
    assert not run.complete
    assert [row.complete for row in run.rows] == [True, False]
    assert "Partial." in (only_run("runs") / "report.html").read_text()


def test_ctrl_c_between_rows_keeps_the_finished_ones(config, fake_rays, capsys):
    fake_rays(100, error=KeyboardInterrupt())
    assert main(["run", config]) == 130
    assert "partial" in capsys.readouterr().out
    assert len(read_run(only_run("runs")).rows) == 1


def test_a_job_that_is_ended_keeps_what_was_done(config, fake_rays, monkeypatch, capsys):
    fake_rays(100)
    finished, before = experiment.run_experiment, signal.getsignal(signal.SIGTERM)

    def ended(*arguments):
        yield from finished(*arguments)
        signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(experiment, "run_experiment", ended)
    assert main(["run", config]) == 130
    assert "partial" in capsys.readouterr().out
    assert len(read_run(only_run("runs")).rows) == 1
    assert signal.getsignal(signal.SIGTERM) is before


def test_ctrl_c_before_the_first_ray_leaves_nothing(config, fake_rays, capsys):
    fake_rays(error=KeyboardInterrupt())
    assert main(["run", config]) == 130
    printed = capsys.readouterr()
    assert "interrupted before the first result; nothing to keep" in printed.err
    assert list(Path("runs").iterdir()) == []


def test_ctrl_c_while_writing_is_no_traceback(config, fake_rays, monkeypatch, capsys):
    fake_rays(100, 100)
    monkeypatch.setattr("volumejax.report.publish", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    assert main(["run", config]) == 130
    assert "interrupted" in capsys.readouterr().err
    assert len(read_run(only_run("runs")).rows) == 2


@pytest.fixture
def chain_config(config):
    """The path of an experiment file with one proposal and two tethers."""
    start = CONFIG.replace("  - {kind: isotropic, label: again}\n", "")
    Path(config).write_text(start + "tethers:\n  - {region: star, effort: 0.5}\n  - {region: connected}\n")
    return config


@pytest.fixture
def fake_chains(monkeypatch, make_row, make_tether):
    """One row of rays, and one of chains for each of the given words: done or partial."""

    def install(*words):
        asked = []

        def prepare(config, _):
            asked.append(config)
            return FakeSetting()

        def run_experiment(*_):
            yield make_row("isotropic", "isotropic", -900.0 - np.arange(asked[-1].num_rays))
            for entry, word in zip(asked[-1].tethers, words, strict=False):
                done = word == "done"
                changes = {} if done else {"kind": "lower_bound", "progress": 0.43}
                yield make_tether(entry.name, complete=done, region=entry.region, **changes)

        monkeypatch.setattr(experiment, "prepare", prepare)
        monkeypatch.setattr(experiment, "run_experiment", run_experiment)
        return asked

    return install


def test_a_run_with_tethers_leaves_their_rows_and_figures(chain_config, fake_chains, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")
    fake_chains("done", "done")
    assert main(["run", chain_config]) == 0
    printed = capsys.readouterr()
    assert "tiny: 1 proposal, 100 rays each; 2 tethers, effort 0.5, 1" in printed.err
    assert max(map(len, printed.out.splitlines()[:-1])) <= 60
    text = " ".join(printed.out.split())
    assert "tether, star" in text and "-600.0 ± 2.0" in text and "Certified at 95 %" in text
    directory = only_run("runs")
    assert {"curve.png", "ladder.svg"} <= {path.name for path in (directory / "figures").iterdir()}
    run = read_run(directory)
    assert run.complete and [row.kind for row in run.rows] == ["isotropic", "tether", "tether"]
    before = (directory / "report.html").read_bytes()
    assert main(["plot", str(directory)]) == 0
    assert (directory / "report.html").read_bytes() == before


@pytest.mark.parametrize("words", [("done", "partial"), ("done",), ()])
def test_ctrl_c_keeps_the_chains_so_far(words, chain_config, fake_chains, capsys):
    fake_chains(*words)
    assert main(["run", chain_config]) == 130
    out = " ".join(capsys.readouterr().out.split())
    assert "partial: the run was interrupted" in out
    assert ("(partial, 43 %)" in out) == ("partial" in words)
    run = read_run(only_run("runs"))
    assert not run.complete and len(run.rows) == 1 + len(words)


def test_quick_shortens_the_chains(chain_config, fake_chains, capsys):
    asked = fake_chains("done", "done")
    assert main(["run", chain_config, "--quick"]) == 0
    assert [entry.effort for entry in asked[0].tethers] == [0.01, 0.01]
    err = capsys.readouterr().err
    assert "tiny: 1 proposal, 48 rays each; 2 tethers, effort 0.01" in err
    assert "shortened from 1 proposal, 100 rays each; 2 tethers, effort 0.5, 1" in err
    assert "effort: 0.01" in (only_run("runs") / "config.yaml").read_text()


def test_a_refusal_by_the_library_is_one_line(config, fake_rays, capsys):
    fake_rays(error=ValueError("the anchor holds NaN;\nretrain it"))
    assert main(["run", config]) == 2
    printed = capsys.readouterr()
    assert printed.err.splitlines()[-1] == f"volumejax: {config}: the anchor holds NaN; retrain it"
    assert list(Path("runs").iterdir()) == []


def test_a_full_disk_is_one_line_naming_the_file(config, fake_rays, monkeypatch, capsys):
    fake_rays(100, 100)
    monkeypatch.setattr("os.fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    assert main(["run", config]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("volumejax: runs/tiny-001/config.yaml: cannot be written (No space left on device)")


def test_a_package_missing_at_run_time_leaves_nothing(config, fake_rays, capsys):
    fake_rays(error=ImportError("scikit-learn is missing: pip install 'volumejax[run]'"))
    assert main(["run", config]) == 2
    assert capsys.readouterr().err.splitlines()[-1].endswith("pip install 'volumejax[run]'")
    assert list(Path("runs").iterdir()) == []


def test_an_unwritable_place_is_found_before_the_work(config, fake_rays, capsys):
    asked = fake_rays(100, 100)
    Path("taken").write_text("")
    assert main(["run", config, "--output", "taken"]) == 2
    assert "taken: cannot make a run directory here" in capsys.readouterr().err
    assert asked == []


def test_a_missing_extra_is_one_line(config, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "volumejax.terminal", None)
    monkeypatch.setattr(cli, "_run", lambda _: (_ for _ in ()).throw(ImportError("pip install 'volumejax[run]'")))
    assert main(["run", config]) == 2
    assert capsys.readouterr().err == "volumejax: pip install 'volumejax[run]'\n"


def test_version_and_usage(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["--version"])
    assert stopped.value.code == 0
    assert capsys.readouterr().out.startswith("volumejax ")
    with pytest.raises(SystemExit) as stopped:
        main(["rum"])
    assert stopped.value.code == 2
    assert "rum" in capsys.readouterr().err


@pytest.mark.slow
def test_the_module_runs_the_real_thing(config, tmp_path):
    text = CONFIG.replace("num_rays: 100", "num_rays: 16").replace("  - {kind: isotropic, label: again}\n", "")
    Path(config).write_text(text)
    done = subprocess.run(
        [sys.executable, "-m", "volumejax", "run", config],
        cwd=tmp_path,
        env={"PYTHONPATH": str(Path(cli.__file__).parents[1]), "COLUMNS": "60", "PATH": ""},
        capture_output=True,
        text=True,
        encoding="utf-8",
    )
    assert done.returncode == 0, done.stderr
    assert max(map(len, done.stdout.splitlines()[:-1])) <= 60
    (row,) = json.loads((tmp_path / "runs" / "tiny-001" / "result.json").read_text())["rows"]
    assert row["estimate"]["num_rays"] == 16
    assert -20000 < row["estimate"]["mean_log_weight"] < -5000

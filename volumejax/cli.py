"""The ``volumejax`` command: run an experiment, redraw a run, check the installation."""

import argparse
import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from volumejax.config import AnyConfig
    from volumejax.records import Run

OK, FAILED, MISUSED, INTERRUPTED = 0, 1, 2, 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: the arguments; None takes those of the process.

    Returns:
        0, or 1 if a check failed, 2 after a mistake (one line on stderr), 130 after Ctrl-C or SIGTERM.
    """
    with _ending_is_an_interrupt():
        code = _main(argv)
    if code == INTERRUPTED and argv is None:
        # Ctrl-C may have struck inside a compilation, and then JAX crashes while the interpreter shuts down.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code


@contextlib.contextmanager
def _ending_is_an_interrupt() -> Iterator[None]:
    """Take SIGTERM, by which batch systems end a job, for Ctrl-C: what was done is kept."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _main(argv: Sequence[str] | None) -> int:
    arguments = _parser().parse_args(argv)
    try:
        from volumejax.config_errors import ConfigError
        from volumejax.records import RecordError

        try:
            return arguments.command(arguments)
        except (ConfigError, RecordError) as error:
            return _complain(str(error))
    except ImportError as error:
        if "pip install" not in str(error):
            raise
        return _complain(str(error))
    except KeyboardInterrupt:
        _complain("interrupted")
        return INTERRUPTED


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="volumejax",
        description="What is the probability of drawing, at random, a network that behaves like this one?",
    )
    parser.add_argument("--version", action="version", version=f"volumejax {_version()}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    run = commands.add_parser("run", help="run an experiment and write its run directory")
    run.add_argument("config", metavar="CONFIG.yaml", help="the experiment, e.g. configs/digits_mlp.yaml")
    run.add_argument("--output", metavar="DIR", help="directory for run directories (default: from the file)")
    run.add_argument(
        "--quick",
        action="store_true",
        help="few rays and few, short chains, to see whether everything works; some minutes",
    )
    run.set_defaults(command=_run)

    plot = commands.add_parser("plot", help="draw a run's figures and report again")
    plot.add_argument("directory", metavar="RUN_DIR", help="a directory that `volumejax run` wrote")
    plot.set_defaults(command=_plot)

    check = commands.add_parser("check", help="estimate volumes whose exact value is known")
    check.set_defaults(command=_check)
    return parser


def _run(arguments: argparse.Namespace) -> int:
    from volumejax import config as configs
    from volumejax import parallel, records, report, terminal

    parallel.use_every_core()

    config = configs.load_config(arguments.config)
    if arguments.output is not None:
        config = config.model_copy(update={"output": arguments.output})
    asked = config
    if arguments.quick:
        config = configs.quick(config)
    directory = records.create_run_directory(config.output, config.name)
    began, created = time.perf_counter(), datetime.now(UTC).isoformat(timespec="seconds")

    out = terminal.console(stderr=True)
    out.print(f"{config.name}: {_plan(config)}", soft_wrap=True)
    if arguments.quick:
        out.print(f"quick run: shortened from {_plan(asked)}", soft_wrap=True)

    run = records.Run(
        name=config.name,
        created=created,
        cutoff=0.0 if isinstance(config, configs.LearningConfig) else config.cutoff,
        complete=False,
        quick=arguments.quick,
        rows=(),
        config=configs.dump_config(config),
    )
    try:
        with terminal.Reporter(out) as reporter:
            if isinstance(config, configs.LearningConfig):
                from volumejax.learning_series import prepare_learning, run_learning

                setting = prepare_learning(config)
                rows, wanted = run_learning(setting, reporter), setting.num_rows
            elif config.is_series:
                from volumejax.series import prepare_series, run_series

                setting = prepare_series(config, reporter)
                rows, wanted = run_series(setting, reporter), setting.num_rows
            else:
                from volumejax.experiment import prepare, run_experiment

                setting = prepare(config, reporter)
                rows = run_experiment(setting, reporter)
                wanted = len(config.proposals) + len(config.tethers) + len(config.particles)
            facts = {
                "task": setting.facts(),
                "versions": records.describe_versions(),
                "hardware": records.describe_hardware(),
            }
            for row in rows:
                seconds = {**setting.seconds, "total": time.perf_counter() - began}
                run = run.model_copy(update={**facts, "rows": (*run.rows, row), "seconds": seconds})
                records.write_run(directory, run)
    except KeyboardInterrupt:
        pass
    except records.RecordError:
        raise
    except ValueError as error:
        return _complain(f"{arguments.config}: {error}")
    finally:
        # Goes away only if nothing was written.
        with contextlib.suppress(OSError):
            directory.rmdir()
    if not run.rows:
        _complain("interrupted before the first result; nothing to keep")
        return INTERRUPTED

    complete = len(run.rows) == wanted and all(row.complete for row in run.rows)
    run = run.model_copy(update={"complete": complete})
    records.write_run(directory, run)
    _show(run, report.publish(directory, run))
    return OK if complete else INTERRUPTED


def _plan(config: "AnyConfig") -> str:
    """What will be measured, in a few words."""
    from volumejax.config import LearningConfig

    parts = []
    if isinstance(config, LearningConfig):
        chains = f"{config.num_chains} chains of {config.num_draws} draws"
        temperatures = _counted(len(config.betas), "temperature")
        return f"{_counted(len(config.task.networks), 'network')} at {temperatures}, {chains} each"
    if config.proposals:
        parts.append(f"{_counted(len(config.proposals), 'proposal')}, {config.num_rays} rays each")
    if config.cutoffs:
        parts.append(_counted(len(config.cutoffs), "cutoff"))
    if config.checkpoints is not None:
        parts.append(_counted(config.checkpoints, "checkpoint"))
    if config.tethers:
        efforts = ", ".join(f"{effort:g}" for effort in sorted({entry.effort for entry in config.tethers}))
        parts.append(f"{_counted(len(config.tethers), 'tether')}, effort {efforts}")
    if config.particles:
        parts.append(f"{_counted(len(config.particles), 'row')} of particles from the prior")
    return "; ".join(parts)


def _counted(number: int, word: str) -> str:
    return f"{number} {word}{'' if number == 1 else 's'}"


def _plot(arguments: argparse.Namespace) -> int:
    from volumejax import records, report

    directory = Path(arguments.directory)
    run = records.read_run(directory)
    if not run.rows:
        raise records.RecordError(f"{directory}: the run has no rows, so there is nothing to draw; run it again")
    _show(run, report.publish(directory, run))
    return OK


def _check(arguments: argparse.Namespace) -> int:
    del arguments
    from volumejax import terminal

    err = terminal.console(stderr=True)
    err.print("estimating volumes whose exact value is known ...")
    from volumejax.check import CASES, run_checks

    rows = []
    for row in run_checks():
        rows.append(row)
        err.print(f"{len(rows)} of {len(CASES)}: {row.name}, {row.method}: {row.verdict}", soft_wrap=True)
    out = terminal.console()
    out.print(terminal.check_table(rows))
    failed = [row for row in rows if not row.passed]
    if failed:
        out.print(f"{len(failed)} of {len(rows)} failed: do not trust the numbers of this installation.")
        return FAILED
    out.print(f"All {len(rows)} hold: the estimates agree with the exact values, the bounds lie below them.")
    return OK


def _show(run: "Run", path: Path) -> None:
    from volumejax import table, terminal

    out = terminal.console()
    out.print()
    out.print(terminal.run_table(run, out.width))
    if not run.complete:
        out.print("partial: the run was interrupted; this is what had been measured by then.")
    if run.quick:
        out.print("quick run: few rays and few, short chains; a full run says more.")
    for note in table.notes(run):
        out.print(note)
    out.print(f"report: {path}", soft_wrap=True)


def _complain(message: str) -> int:
    print(f"volumejax: {' '.join(message.split())}", file=sys.stderr)
    return MISUSED


def _version() -> str:
    try:
        return metadata.version("volumejax")
    except metadata.PackageNotFoundError:
        return "(not installed)"

"""A finished or interrupted run on disk: config.yaml, result.json and rays.npz, written atomically."""

import io
import json
import math
import os
import platform
import re
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

try:
    from pydantic import BaseModel, ConfigDict, Field, ValidationError
except ImportError as error:
    raise ImportError("run directories need the run extra: pip install 'volumejax[run]'") from error

FORMAT = 2
"""What is written; 1, without chains, is read as well."""
CONFIG_FILE, RESULT_FILE, RAYS_FILE = "config.yaml", "result.json", "rays.npz"
TETHER = "tether"
"""The `kind` of a row that chains made; any other but the next two names a ray proposal."""
PARTICLES = "particles"
"""The `kind` of a row that particles from the prior made."""
LEARNING = "learning"
"""The `kind` of a row that holds a learning coefficient and no volume."""
TUNED = "tuned"
"""The `kind` of a row whose proposal pilot rays have chosen."""
Scalar = float | int | str
_PACKAGES = ("volumejax", "jax", "jaxlib", "flax", "optax", "equinox", "numpy", "scipy", "scikit-learn")
_NEEDED = {
    TETHER: {
        *("precision", "mean_square", "acceptance", "overlap", "log_weights"),
        *("betas", "energies", "energy_errors", "heat_capacities"),
    },
    PARTICLES: {"log_weights", "betas", "mean_cost", "ess", "acceptance", "prior_costs", "curve_cutoffs"},
    LEARNING: {"costs_0"},
}
_RAYS_NEEDED = {"log_weight", "radius"}
"""Arrays that the figures of a row draw, by its kind, and those of rays."""
_SWEEP = "sweep_"
_NON_FINITE = {"inf": math.inf, "-inf": -math.inf, "nan": math.nan}


class RecordError(ValueError):
    """A run directory that cannot be read or made; its text is one line naming the file and the remedy."""


class Row(BaseModel):
    """One proposal's or tether's result. Log masses are in nats, `seconds` is wall time with compilation."""

    model_config = ConfigDict(frozen=True, arbitrary_types_allowed=True)

    label: str
    kind: str
    seconds: float
    complete: bool = True
    recorded: dict[str, float] = Field(default_factory=dict)
    """Published values: any of best, mean, sd."""
    estimate: dict[str, Scalar]
    """`VolumeEstimate.to_dict()`; for a learning coefficient that of the coldest, with the others and the truth."""
    position: dict[str, float] = Field(default_factory=dict)
    """Where the row lies in a series: step, cutoff; and what its proposal was given, or pilot rays chose for it:
    damping, exponent, beta, shift. Any of them may be absent."""
    rays: dict[str, np.ndarray] = Field(default_factory=dict, exclude=True)
    """The arrays of `RayBatch`, each with one entry per ray; empty where chains made the row."""
    chains: dict[str, np.ndarray] = Field(default_factory=dict, exclude=True)
    """The arrays of `ChainTrace`, and those of `Curve` as curve_cutoffs, curve_log_mass, curve_std_error once the
    chains have come that far; for a learning coefficient the costs of its draws; empty where rays made the row."""
    sweep: dict[str, np.ndarray] = Field(default_factory=dict, exclude=True)
    """Of a tuned row what the pilot rays said of every candidate: beta, exponent, damping, shift, mean_log_weight,
    std_error, each with one entry per candidate."""

    @property
    def from_chains(self) -> bool:
        """Whether chains made this row's volume, and not rays."""
        return self.kind == TETHER

    @property
    def from_particles(self) -> bool:
        """Whether particles from the prior made it."""
        return self.kind == PARTICLES

    @property
    def from_rays(self) -> bool:
        """Whether rays made it."""
        return not (self.from_chains or self.from_particles or self.is_coefficient)

    @property
    def is_coefficient(self) -> bool:
        """Whether the row holds a learning coefficient and no volume."""
        return self.kind == LEARNING

    @property
    def arrays(self) -> dict[str, np.ndarray]:
        """All that rays.npz holds of the row: its rays or its chains, and its sweep under names that begin `sweep_`."""
        own = self.chains if self.kind in _NEEDED else self.rays
        return {**own, **{_SWEEP + name: values for name, values in self.sweep.items()}}


class Run(BaseModel):
    """Everything that a table, a figure or a report needs."""

    model_config = ConfigDict(frozen=True)

    name: str
    created: str
    cutoff: float
    """ε in nats; 0 where learning coefficients were measured, which are about the limit ε → 0."""
    complete: bool
    quick: bool = False
    rows: tuple[Row, ...]
    task: dict[str, Scalar] = Field(default_factory=dict)
    seconds: dict[str, float] = Field(default_factory=dict)
    versions: dict[str, str] = Field(default_factory=dict)
    hardware: dict[str, Scalar] = Field(default_factory=dict)
    config: str = Field(default="", exclude=True)
    """The resolved configuration, as YAML text."""


def create_run_directory(root: str | Path, name: str) -> Path:
    """Make the next free ``<root>/<name>-NNN``; an existing run is never reused.

    Args:
        root: the directory of all runs; made if missing.
        name: the experiment's name.

    Returns:
        The new, empty directory.

    Raises:
        RecordError: the directory cannot be made.
    """
    root = Path(root)
    try:
        root.mkdir(parents=True, exist_ok=True)
        pattern = re.compile(re.escape(name) + r"-(\d{3,})")
        taken = [int(match[1]) for entry in root.iterdir() if (match := pattern.fullmatch(entry.name))]
        number = max(taken, default=0)
        while True:
            number += 1
            directory = root / f"{name}-{number:03d}"
            try:
                directory.mkdir()
                return directory
            except FileExistsError:
                continue
    except OSError as error:
        reason = error.strerror or error
        raise RecordError(f"{root}: cannot make a run directory here ({reason}); choose another --output") from None


def write_run(directory: Path, run: Run) -> None:
    """Write config.yaml, rays.npz and result.json, each one atomically; result.json last.

    Args:
        directory: an existing directory, usually from `create_run_directory`.
        run: what to write. Writing again replaces an earlier state of the same run.

    Raises:
        RecordError: a file cannot be written.
    """
    arrays = {
        f"{i}/{name}": _plain_array(value) for i, row in enumerate(run.rows) for name, value in row.arrays.items()
    }
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)  # pyright: ignore[reportArgumentType]  (the stub mistakes ** for a flag)
    content = {"format": FORMAT, **run.model_dump(mode="python")}
    text = json.dumps(_to_json(content), indent=1, allow_nan=False, ensure_ascii=False) + "\n"
    write_file(directory / CONFIG_FILE, run.config.encode())
    write_file(directory / RAYS_FILE, buffer.getvalue())
    write_file(directory / RESULT_FILE, text.encode())


def write_file(path: Path, content: bytes) -> None:
    """Write a file so that a reader sees the old content or the new, never a part."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with temporary.open("wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise RecordError(
            f"{path}: cannot be written ({error.strerror or error}); free space or choose another --output"
        ) from None


def read_run(directory: str | Path) -> Run:
    """Read a run directory.

    Args:
        directory: what `write_run` filled.

    Returns:
        The run, with its arrays.

    Raises:
        RecordError: a file is missing or damaged; the message names it.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise RecordError(f"{directory}: no such run directory; give one that `volumejax run` has printed")
    path = directory / RESULT_FILE
    try:
        content = json.loads(_read(path).decode())
        if not isinstance(content, dict) or not isinstance(content.get("format"), int):
            raise RecordError(f"{path}: is not a volumejax result; run the experiment again")
        if content["format"] > FORMAT:
            raise RecordError(f"{path}: was written by a newer volumejax; upgrade to read it")
        run = Run.model_validate(_from_json(content))
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        raise RecordError(f"{path}: is damaged at {key} ({first['msg']}); run the experiment again") from None
    except RecordError:
        raise
    except (ValueError, RecursionError):  # not JSON, or not UTF-8
        raise RecordError(f"{path}: is not valid JSON; run the experiment again") from None
    arrays = _read_arrays(directory / RAYS_FILE, run.rows)
    rows = tuple(_with_arrays(row, found) for row, found in zip(run.rows, arrays, strict=True))
    config = _read(directory / CONFIG_FILE).decode(errors="replace")
    return run.model_copy(update={"rows": rows, "config": config})


def describe_versions() -> dict[str, str]:
    """Versions of Python and of the packages that the numbers depend on."""
    versions = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions


def describe_hardware() -> dict[str, Scalar]:
    """What the run used: the system, the cores it may use, JAX's devices."""
    import jax

    from volumejax.parallel import num_cores

    devices = jax.devices()
    return {
        "system": f"{platform.system()} {platform.machine()}",
        "cores": num_cores(),
        "devices": len(devices),
        "device_kind": devices[0].device_kind,
        "platform": devices[0].platform,
    }


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise RecordError(f"{path}: is missing; the run did not finish writing, run it again") from None
    except OSError as error:
        raise RecordError(f"{path}: cannot be read ({error.strerror or error})") from None


def _read_arrays(path: Path, rows: Sequence[Row]) -> list[dict[str, np.ndarray]]:
    content = io.BytesIO(_read(path))
    found: list[dict[str, np.ndarray]] = [{} for _ in rows]
    try:
        with np.load(content, allow_pickle=False) as arrays:
            for key in arrays.files:
                index, _, name = key.partition("/")
                found[int(index)][name] = arrays[key]
    except (
        zipfile.BadZipFile,
        zlib.error,
        ValueError,
        EOFError,
        OSError,
        IndexError,
        TypeError,
        AttributeError,
    ):
        raise RecordError(f"{path}: is damaged or from another run; run the experiment again") from None
    for row, arrays in zip(rows, found, strict=True):
        if not _NEEDED.get(row.kind, _RAYS_NEEDED) <= arrays.keys():
            what = "rays" if row.kind not in _NEEDED else "chains"
            raise RecordError(f"{path}: lacks the {what} of a row in {RESULT_FILE}; run the experiment again")
    return found


def _with_arrays(row: Row, found: Mapping[str, np.ndarray]) -> Row:
    sweep = {name.removeprefix(_SWEEP): array for name, array in found.items() if name.startswith(_SWEEP)}
    own = {name: array for name, array in found.items() if not name.startswith(_SWEEP)}
    return row.model_copy(update={"chains" if row.kind in _NEEDED else "rays": own, "sweep": sweep})


def _plain_array(value: Any) -> np.ndarray:
    array = np.asarray(value)
    if array.dtype.kind not in "biuf":
        raise TypeError(f"rays.npz holds numbers only, got dtype {array.dtype}; convert it first")
    return array


def _to_json(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _to_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_to_json(item) for item in value]
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return "nan" if math.isnan(value) else "inf" if value > 0 else "-inf"
    return value


def _from_json(content: dict[str, Any]) -> dict[str, Any]:
    """Undo `_to_json` where a number is expected; a label that reads "inf" stays a label."""

    def numbers(entries: Any) -> Any:
        if not isinstance(entries, dict):
            return entries
        return {
            key: _NON_FINITE.get(value, value) if isinstance(value, str) else value for key, value in entries.items()
        }

    rows = content.get("rows")
    if isinstance(rows, list):
        rows = [{**row, "estimate": numbers(row.get("estimate"))} if isinstance(row, dict) else row for row in rows]
    return {**content, "rows": rows, "task": numbers(content.get("task", {}))}

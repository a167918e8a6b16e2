"""The experiment file: YAML read into frozen, strict models, with one line and a remedy for every mistake.

The grammar is YAML 1.2, so ``1e-2`` is a number. Nothing here imports JAX: a mistake in the file is
reported before any long import, let alone any long work.
"""

import io
import re
from pathlib import Path
from typing import Annotated, Any, Literal

try:
    from pydantic import (
        BaseModel,
        ConfigDict,
        Discriminator,
        Field,
        PositiveFloat,
        StrictBool,
        Tag,
        ValidationError,
        model_validator,
    )
    from pydantic_core import PydanticCustomError
    from ruamel.yaml import YAML
except ImportError as error:
    raise ImportError("experiment files need the run extra: pip install 'volumejax[run]'") from error

from volumejax.config_errors import ConfigError, as_number, explain, one_line, read_yaml

__all__ = [
    "AnyConfig",
    "Config",
    "ConfigError",
    "LearningConfig",
    "dump_config",
    "load_config",
    "parse_config",
    "quick",
]

QUICK_RAYS, QUICK_EFFORT, QUICK_CHAINS, QUICK_DRAWS, QUICK_PARTICLES, QUICK_PASS = 48, 0.01, 8, 64, 16, 2


def _number_or_word(value: Any) -> str:
    return "word" if isinstance(value, str) and as_number(value) is None else "number"


def _printable(value: str) -> str:
    if not value.isprintable() or not value.strip():
        raise PydanticCustomError("label", "must be printable text; remove the control characters")
    return value


class _Model(BaseModel):
    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", allow_inf_nan=False)


Seed = Annotated[int, Field(ge=0, le=2**31 - 1)]
Count = Annotated[int, Field(ge=1, le=2**31 - 1)]
Label = Annotated[str, Field(min_length=1, max_length=40)]
Sigma = Annotated[
    Annotated[PositiveFloat, Tag("number")] | Annotated[Literal["rms"], Tag("word")],
    Discriminator(_number_or_word),
]
Beta = Annotated[
    Annotated[PositiveFloat, Tag("number")] | Annotated[Literal["auto"], Tag("word")],
    Discriminator(_number_or_word),
]


class DigitsTask(_Model):
    """The 64-64-10 MLP on scikit-learn's digits, trained by Adam."""

    kind: Literal["digits"]
    seed: Seed = 0
    num_epochs: Count = 25


class GaussianPrior(_Model):
    """N(0, sigma²) on every parameter; ``rms`` stands for the RMS of the trained parameters."""

    kind: Literal["gaussian"]
    sigma: Sigma = Field(examples=["sigma: 1.3975"])


class FixedPrior(_Model):
    """N(0, sigma²) on every parameter."""

    kind: Literal["gaussian"]
    sigma: PositiveFloat = Field(examples=["sigma: 1.0"])


class Recorded(_Model):
    """Values published for this proposal, in nats: the best ray, and mean and sd of the per-ray log mass."""

    best: float | None = None
    mean: float | None = None
    sd: Annotated[float, Field(ge=0)] | None = None


class _Proposal(_Model):
    label: Label | None = None
    recorded: Recorded | None = None

    @property
    def name(self) -> str:
        """The label, or a description built from the settings."""
        return self.label if self.label is not None else self._describe()

    def _describe(self) -> str:
        raise NotImplementedError


class IsotropicProposal(_Proposal):
    """Directions uniform on the sphere."""

    kind: Literal["isotropic"]

    def _describe(self) -> str:
        return "isotropic"


class AdamProposal(_Proposal):
    """Scale 1 / (nu**exponent + damping), with nu Adam's second moment."""

    kind: Literal["adam"]
    damping: PositiveFloat = Field(examples=["damping: 1e-3"])
    exponent: PositiveFloat = 0.5

    def _describe(self) -> str:
        return f"Adam {_short(self.damping)}{_unless(self.exponent, 0.5)}"


class DiagonalGGNProposal(_Proposal):
    """Diagonal GGN h: damped, 1 / (h**exponent + damping), or the tempered posterior at beta."""

    kind: Literal["diagonal_ggn"]
    damping: PositiveFloat | None = None
    exponent: PositiveFloat | None = None
    beta: Beta | None = None
    shift: StrictBool | None = None

    @model_validator(mode="after")
    def _one_form(self) -> "DiagonalGGNProposal":
        if (self.damping is None) == (self.beta is None):
            raise PydanticCustomError("form", "needs either damping or beta; add `damping: 1e-2` or `beta: auto`")
        if self.damping is None and self.exponent is not None:
            raise PydanticCustomError("form", "exponent belongs to damping, not to beta; remove exponent")
        if self.beta is None and self.shift is not None:
            raise PydanticCustomError("form", "shift belongs to beta, not to damping; remove shift")
        return self

    def _describe(self) -> str:
        if self.beta is not None:
            return f"diagonal GGN {_tempered(self.beta, self.shift)}"
        return f"diagonal GGN {_short(self.damping)}{_unless(self.exponent, 0.5)}"


class DenseGGNProposal(_Proposal):
    """The Gaussian approximation of the tempered posterior at beta, from the dense GGN, rotated back."""

    kind: Literal["dense_ggn"]
    beta: Beta = Field(examples=["beta: auto"])
    shift: StrictBool = True

    def _describe(self) -> str:
        return f"dense GGN {_tempered(self.beta, self.shift)}"


class TunedProposal(_Proposal):
    """The tempered posterior of a curvature with β, exponent, damping and shift chosen on pilot rays."""

    kind: Literal["tuned"]
    curvature: Literal["adam", "diagonal_ggn"] = Field(examples=["curvature: adam"])
    rank: Annotated[int, Field(ge=0, le=1000)] = 0
    exponents: Annotated[tuple[PositiveFloat, ...], Field(strict=False, min_length=1)] | None = None
    num_pilot_rays: Annotated[int, Field(ge=2, le=2**20)] = 16

    @model_validator(mode="after")
    def _of_one_unit(self) -> "TunedProposal":
        if self.curvature == "adam" and self.rank > 0:
            raise PydanticCustomError(
                "rank", "rank goes with `curvature: diagonal_ggn`: Adam's moments have another unit than its eigenpairs"
            )
        return self

    def _describe(self) -> str:
        name = {"adam": "Adam", "diagonal_ggn": "diagonal GGN"}[self.curvature]
        return f"tuned {name}{f' + rank {self.rank}' if self.rank else ''}"


Proposal = Annotated[
    IsotropicProposal | AdamProposal | DiagonalGGNProposal | DenseGGNProposal | TunedProposal,
    Field(discriminator="kind"),
]


class Tether(_Model):
    """Annealed chains on a tether: an estimate for the region, at a cost that grows with the effort."""

    region: Literal["star", "connected"] = Field(examples=["region: connected"])
    effort: Annotated[PositiveFloat, Field(le=1000)] = 1.0
    num_chains: Annotated[int, Field(ge=1, le=2**20)] | None = None
    decades: Annotated[float, Field(ge=0, le=12)] = 2.0
    label: Label | None = None

    @property
    def name(self) -> str:
        """The label, or a description built from the settings."""
        return self.label if self.label is not None else f"tether, {self.region}"


class Particles(_Model):
    """Particles annealed from the prior: the mass of the region wherever it lies."""

    effort: Annotated[PositiveFloat, Field(le=1000)] = Field(default=1.0, examples=["effort: 1"])
    num_particles: Annotated[int, Field(ge=8, le=2**24)] | None = None
    num_islands: Annotated[int, Field(ge=4, le=2**16)] = 16
    label: Label | None = None

    @model_validator(mode="after")
    def _peopled(self) -> "Particles":
        if self.num_particles is not None and self.num_particles < 2 * self.num_islands:
            raise PydanticCustomError(
                "particles", "num_particles must be at least twice num_islands; raise it or lower num_islands"
            )
        return self

    @property
    def name(self) -> str:
        """The label, or a description built from the settings."""
        return self.label if self.label is not None else "from the prior"


class Config(_Model):
    """One experiment: a task, a prior, a cutoff in nats, and the ray proposals, tethers and particles to compare.

    With ``checkpoints`` the same question is asked of the network at so many log-spaced steps of its training, with
    ``cutoffs`` at each of them: a series.
    """

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,79}$", examples=["name: my_experiment"])]
    task: DigitsTask = Field(examples=["task: {kind: digits}"])
    prior: GaussianPrior = Field(examples=["prior: {kind: gaussian, sigma: 1.0}"])
    cost: Literal["kl", "loss"] = "kl"
    cutoff: PositiveFloat = Field(examples=["cutoff: 1e-2"])
    tolerance: PositiveFloat = 0.1
    seed: Seed = 0
    num_rays: Count = 256
    chunk_size: Count = 64
    audit_fraction: Annotated[float, Field(ge=0, le=1)] = 0.05
    proposals: Annotated[tuple[Proposal, ...], Field(strict=False)] = ()
    tethers: Annotated[tuple[Tether, ...], Field(strict=False)] = ()
    particles: Annotated[tuple[Particles, ...], Field(strict=False)] = ()
    checkpoints: Annotated[int, Field(ge=2, le=64)] | None = None
    cutoffs: Annotated[tuple[PositiveFloat, ...], Field(strict=False)] = ()
    output: Annotated[str, Field(min_length=1)] = "runs"

    @property
    def is_series(self) -> bool:
        """Whether there is more than one network or cutoff, or a proposal that has to be tuned first."""
        tuned = any(isinstance(entry, TunedProposal) for entry in self.proposals)
        return self.checkpoints is not None or bool(self.cutoffs) or tuned

    @model_validator(mode="after")
    def _nothing_else_in_a_series(self) -> "Config":
        alone = {"tethers": self.tethers, "particles": self.particles, "`cost: loss`": self.cost != "kl"}
        found = [name for name, present in alone.items() if present]
        if self.is_series and found:
            raise PydanticCustomError(
                "series",
                "checkpoints, cutoffs and tuned proposals go without {what}; give those a file of their own",
                {"what": " and ".join(found)},
            )
        if len(set(self.cutoffs)) < len(self.cutoffs):
            raise PydanticCustomError("cutoffs", "cutoffs holds a number twice; remove one of them")
        return self

    @model_validator(mode="after")
    def _distinct_labels(self) -> "Config":
        names = [_printable(entry.name) for entry in (*self.proposals, *self.tethers, *self.particles)]
        if not names:
            raise PydanticCustomError(
                "nothing",
                "nothing to measure; add `proposals: [{kind: isotropic}]`, `tethers: [{region: connected}]` or both",
            )
        for name in names:
            if names.count(name) > 1:
                raise PydanticCustomError(
                    "labels",
                    "two {what} are called {name}; give each its own `label:`",
                    {"name": repr(name), "what": self._what(name)},
                )
        return self

    def _what(self, name: str) -> str:
        kinds = {"proposals": self.proposals, "tethers": self.tethers, "particles": self.particles}
        found = [what for what, entries in kinds.items() if any(entry.name == name for entry in entries)]
        return found[0] if len(found) == 1 else "entries"


class DeepLinearNetwork(_Model):
    """A linear network, layer by layer, whose true map has that rank."""

    widths: Annotated[tuple[Count, ...], Field(strict=False, min_length=2)] = Field(examples=["widths: [5, 3, 5]"])
    rank: Annotated[int, Field(ge=0)] = 0

    @model_validator(mode="after")
    def _has_rank(self) -> "DeepLinearNetwork":
        if self.rank > min(self.widths):
            raise PydanticCustomError(
                "rank", "rank is above the smallest width, {least}; lower it", {"least": min(self.widths)}
            )
        return self

    @property
    def name(self) -> str:
        """Widths and rank."""
        return f"{'-'.join(map(str, self.widths))} rank {self.rank}"


class DeepLinearTask(_Model):
    """Deep linear networks with the population loss, whose learning coefficients are known."""

    kind: Literal["deep_linear"]
    networks: Annotated[tuple[DeepLinearNetwork, ...], Field(strict=False, min_length=1)] = Field(
        examples=["networks: [{widths: [5, 3, 5], rank: 1}]"]
    )


class LearningConfig(_Model):
    """Learning coefficients by adjusted chains, at each temperature, for each network of the task."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,79}$", examples=["name: my_experiment"])]
    task: DeepLinearTask
    prior: FixedPrior = Field(examples=["prior: {kind: gaussian, sigma: 1.0}"])
    betas: Annotated[tuple[Annotated[float, Field(gt=1)], ...], Field(strict=False, min_length=1, max_length=2)] = (
        Field(examples=["betas: [1e5, 1e8]"])
    )
    num_chains: Annotated[int, Field(ge=2, le=2**20)] = 32
    num_draws: Annotated[int, Field(ge=8, le=2**31 - 1)] = 400
    seed: Seed = 0
    output: Annotated[str, Field(min_length=1)] = "runs"

    @model_validator(mode="after")
    def _distinct(self) -> "LearningConfig":
        if len(set(self.betas)) < len(self.betas):
            raise PydanticCustomError("betas", "betas holds a number twice; remove one of them")
        names = [network.name for network in self.task.networks]
        if len(set(names)) < len(names):
            raise PydanticCustomError("networks", "task.networks holds a network twice; remove one of them")
        return self


AnyConfig = Config | LearningConfig

_MODELS: dict[str, type[BaseModel]] = {
    "": Config,
    "task": DigitsTask,
    "prior": GaussianPrior,
    "recorded": Recorded,
    "tethers": Tether,
    "particles": Particles,
    "isotropic": IsotropicProposal,
    "adam": AdamProposal,
    "diagonal_ggn": DiagonalGGNProposal,
    "dense_ggn": DenseGGNProposal,
    "tuned": TunedProposal,
}
_LEARNING_MODELS: dict[str, type[BaseModel]] = {
    "": LearningConfig,
    "task": DeepLinearTask,
    "prior": FixedPrior,
    "networks": DeepLinearNetwork,
}


def load_config(path: str | Path) -> AnyConfig:
    """Read an experiment file.

    Args:
        path: a YAML 1.2 file.

    Returns:
        The configuration, every default filled in.

    Raises:
        ConfigError: one line that names the file, the key, the mistake and its remedy.
    """
    try:
        text = Path(path).read_bytes().decode("utf-8-sig")
    except FileNotFoundError:
        raise ConfigError(one_line(path, "no such file; check the path")) from None
    except IsADirectoryError:
        raise ConfigError(one_line(path, "is a directory; give the YAML file inside it")) from None
    except UnicodeDecodeError:
        raise ConfigError(one_line(path, "is not UTF-8 text; save it as UTF-8")) from None
    except (OSError, ValueError) as error:
        raise ConfigError(one_line(path, f"cannot be read: {getattr(error, 'strerror', None) or error}")) from None
    return parse_config(text, source=str(path))


def parse_config(text: str, *, source: str = "config") -> AnyConfig:
    """Parse the text of an experiment file.

    Args:
        text: YAML 1.2.
        source: what to call the text in messages.

    Returns:
        The configuration, every default filled in.

    Raises:
        ConfigError: one line that names the source, the key, the mistake and its remedy.

    Example:
        >>> text = "{name: a, task: {kind: digits}, prior: {kind: gaussian, sigma: 1}, cutoff: 1e-2,"
        >>> parse_config(text + " proposals: [{kind: isotropic}]}").cutoff
        0.01
    """
    data = read_yaml(text, source)
    task = data.get("task")
    models = _LEARNING_MODELS if isinstance(task, dict) and task.get("kind") == "deep_linear" else _MODELS
    root = LearningConfig if models is _LEARNING_MODELS else Config
    try:
        return root.model_validate(data)
    except ValidationError as error:
        raise explain(error, data, text, source, models) from None


def dump_config(config: AnyConfig) -> str:
    """The configuration as YAML 1.2 that ``parse_config`` reads back, defaults written out."""
    stream = io.StringIO()
    yaml = YAML(typ="safe", pure=True)
    yaml.default_flow_style = False
    yaml.sort_base_mapping_type_on_output = False  # pyright: ignore[reportAttributeAccessIssue]  (untyped upstream)
    data = config.model_dump(mode="json", exclude_none=True)
    if "proposals" in data:
        data["proposals"] = [{"kind": entry["kind"], **entry} for entry in data["proposals"]]
    yaml.dump(data, stream)
    return stream.getvalue()


def quick(config: AnyConfig) -> AnyConfig:
    """The same experiment with few rays per proposal and few, short chains, for continuous integration."""
    if isinstance(config, LearningConfig):
        few = {
            "num_chains": min(config.num_chains, QUICK_CHAINS),
            "num_draws": min(config.num_draws, QUICK_DRAWS),
        }
        return config.model_copy(update=few)
    # Below some effort only fewer chains make a tether's row shorter.
    tethers = []
    for entry in config.tethers:
        chains = entry.num_chains and min(entry.num_chains, QUICK_PASS)
        tethers.append(entry.model_copy(update={"effort": min(entry.effort, QUICK_EFFORT), "num_chains": chains}))
    few = {"effort": QUICK_EFFORT, "num_particles": QUICK_PARTICLES, "num_islands": QUICK_PARTICLES // 4}
    particles = tuple(entry.model_copy(update=few) for entry in config.particles)
    return config.model_copy(
        update={"num_rays": min(config.num_rays, QUICK_RAYS), "tethers": tuple(tethers), "particles": particles}
    )


def _short(number: float | None) -> str:
    if isinstance(number, int):
        return str(number)
    return re.sub(r"e([+-])0*(\d)", lambda m: f"e{m[1].strip('+')}{m[2]}", f"{number:.4g}")


def _unless(exponent: float | None, default: float) -> str:
    return "" if exponent is None or exponent == default else f", power {_short(exponent)}"


def _tempered(beta: float | str, shift: bool | None) -> str:
    text = beta if isinstance(beta, str) else _short(beta)
    return f"β={text}{'' if shift is None or shift else ', no shift'}"

import math

import numpy as np
import pytest

from volumejax import check
from volumejax.cli import main
from volumejax.reference import quadratic, shell
from volumejax.regions import Connected, Star

CASE = check.Case("case", lambda: quadratic(np.ones(3), cutoff=0.1), True, 0.1, None)


def verdict(*, is_bound=False, std_error=0.05, deviation=1.0, lower=-12.0, truth=-10.0, must_settle=None):
    case = check.Case("case", CASE.problem, True, 0.1, must_settle)
    return check._verdict(case, is_bound, std_error, deviation, lower, truth)


@pytest.mark.parametrize(
    ("result", "text"),
    [
        ({}, "ok"),
        ({"deviation": 4.5}, "off by +4.5 SE"),
        ({"deviation": -4.5}, "off by -4.5 SE"),
        ({"deviation": math.nan}, "off by +nan SE"),
        ({"std_error": 0.5}, "SE above 0.1"),
        ({"lower": -9.0}, "bound above the truth"),
        ({"lower": math.nan}, "bound above the truth"),
        ({"is_bound": True, "deviation": math.nan}, "ok"),
        ({"is_bound": True, "lower": -9.0}, "bound above the truth"),
        ({"is_bound": True, "must_settle": True}, "labelled a bound"),
        ({"must_settle": False}, "not labelled a bound"),
    ],
)
def test_verdicts(result, text):
    assert verdict(**result) == text


def row(text):
    return check.CheckRow("ball", "matched rays", -10.0, -10.1, 0.1, -11.0, False, -1.0, text, 0.1)


@pytest.mark.parametrize(("texts", "code"), [(["ok", "ok"], 0), (["ok", "off by +9.0 SE"], 1)])
def test_the_command_fails_if_one_case_fails(texts, code, monkeypatch, capsys):
    monkeypatch.setattr(check, "run_checks", lambda: map(row, texts))
    assert main(["check"]) == code
    printed = capsys.readouterr()
    assert "ball" in printed.out and "-10.000" in printed.out and "matched rays" in printed.out
    assert "1 of 14: ball, matched rays: ok" in printed.err
    assert ("All 2 hold" in printed.out) == (code == 0)
    assert ("1 of 2 failed" in printed.out) == (code == 1)


def test_each_family_is_covered():
    chains = [case for case in check.CASES if isinstance(case, check.ChainCase)]
    rays = [case for case in check.CASES if isinstance(case, check.Case)]
    for cases, families in (
        (rays, ("quadratic", "ellipsoid", "rank one", "tanh neuron", "shell")),
        (chains, ("quadratic", "crossing", "rank one", "tanh neuron", "shell")),
    ):
        names = " ".join(case.name for case in cases)
        assert all(family in names for family in families)
    assert {case.region.name for case in chains} == {"star", "connected"}


@pytest.fixture
def fake_chains(monkeypatch, make_estimate):
    """Chains that always find the given log mass, with an error of 0.05."""

    def install(log_mass, **fields):
        asked = []

        def tether_volume(_, *question, **settings):
            asked.append((question, settings))
            fields_ = {"settled": True, "std_error": 0.05, "lower": log_mass - 1.0, **fields}
            return make_estimate([log_mass] * 8, **fields_)

        monkeypatch.setattr(check, "tether_volume", tether_volume)
        return asked

    return install


@pytest.mark.parametrize(("region", "truth"), [(Star(), -2.10531), (Connected(), 0.22802)])
def test_chains_are_held_against_their_own_region(region, truth, fake_chains):
    # Handing both regions the star's exact value would fail one of the two.
    asked = fake_chains(truth)
    case = check.ChainCase("shell", lambda: shell(3, cutoff=1e-2), region, effort=0.07)
    (result,) = check.run_checks((case,))
    assert result.passed and result.truth == pytest.approx(truth, abs=1e-5)
    assert result.method == f"{region.name} chains"
    assert asked[0][1] == {"cutoff": 1e-2, "region": region, "effort": 0.07}
    (other,) = check.run_checks((check.ChainCase("shell", lambda: shell(3, cutoff=2e-2), region),))
    assert "off by" in other.verdict or "bound above" in other.verdict


def test_chains_must_come_to_an_estimate(fake_chains):
    fake_chains(0.228, settled=False)
    (result,) = check.run_checks((check.ChainCase("shell", lambda: shell(3, cutoff=1e-2), Connected()),))
    assert result.is_bound and result.verdict == "labelled a bound"


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_chains_agree_with_a_known_answer(seed):
    case = check.CASES[-1]
    assert isinstance(case, check.ChainCase)
    (result,) = check.run_checks((case,), seed=seed)
    assert result.truth == pytest.approx(0.22802, abs=1e-5)
    assert result.passed and abs(result.deviation) <= 4 and result.std_error <= 0.2


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_rays_agree_with_a_known_answer(seed):
    (result,) = check.run_checks(check.CASES[:1], num_rays=512, seed=seed)
    assert result.truth == pytest.approx(-40.083597, abs=1e-5)
    assert result.passed and abs(result.deviation) <= 4 and result.std_error <= 0.02

import math

import pytest

from volumejax import table


@pytest.mark.parametrize(
    ("value", "error", "text"),
    [
        (-7021.347, 0.4249, "-7,021.35 ± 0.42"),
        (-11903.4, 828.3, "-11,903 ± 828"),
        (-21.2468, 0.00123, "-21.2468 ± 0.0012"),
        (-5.0, 0.0, "-5.00 ± 0.00"),
        (-5.0, math.inf, "-5.0"),
        (-math.inf, math.nan, "-inf"),
    ],
)
def test_value_and_error_share_their_digits(value, error, text):
    assert table.plus_minus(value, error) == text


def test_a_bound_is_rounded_down():
    assert table.round_down(-9.91, 1) == "-10.0"
    assert table.round_down(-9.9, 1) == "-9.9"
    assert table.round_down(-math.inf, 1) == "-inf"


def test_estimates_bounds_and_uncertified_bounds(make_row):
    assert table.cells(make_row("a", "adam", [-2.0, -2.0], settled=True)).log_mass == "-2.00 ± 0.25"
    bound = make_row("a", "adam", [-2.0, -2.0])
    assert table.cells(bound).log_mass == "≥ -5.0"
    assert table.cells(bound).log_mean == "-2.0"
    assert table.claim({**bound.estimate, "bound_kind": "none"}) == "≥ -5.0 *"
    assert table.claim({**bound.estimate, "kind": "not_mixed"}).startswith("≥")


def test_a_partial_row_says_so(make_row):
    row = make_row("isotropic", "isotropic", [-2.0] * 64, complete=False)
    assert table.cells(row).proposal == "isotropic (partial, 64 rays)"


def test_notes_carry_counts_and_remedies(make_row, make_run):
    noisy = make_row("noisy", "adam", [-2.0] * 3, status=[1, 1, 3], settled=True, noise=2.5)
    run = make_run(noisy, make_row("loose", "isotropic", [-2.0] * 3))
    text = "\n".join(table.notes(run))
    assert "≥ (1 of 2 rows): a certified 95 % lower bound" in text
    assert "noise limited rays (noisy 2): the cost's rounding limits the radius: raise the cutoff." in text
    assert "non finite rays (noisy 1)" in text
    assert "by 2.5 nats" in text
    assert table.notes(make_run(make_row("a", "adam", [-2.0], settled=True))) == []


def test_notes_take_back_the_certificate_after_a_violation(make_row, make_run):
    row = make_row("a", "adam", [-2.0] * 2)
    row = row.model_copy(update={"estimate": {**row.estimate, "violation_rate": 0.25, "bound_kind": "none"}})
    text = "\n".join(table.notes(make_run(row)))
    assert "a 25.0 %" in text and "nothing is certified" in text and "audit_fraction: 1" in text

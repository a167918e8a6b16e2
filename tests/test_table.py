import math

import pytest

from volumejax import table


@pytest.fixture
def make_tether(make_row):
    """A row that chains made."""

    def make(label, *, complete=True, **values):
        row = make_row(label, "tether", [-600.0] * 16, complete=complete, settled=True)
        chains = {
            "hysteresis_cooling": -601.0, "hysteresis_heating": -599.04, "gradients": 3200, "progress": 1.0,
            "noise": math.nan, "pareto_k": math.nan, "region": "connected", "status": "ok",
        }  # fmt: skip
        estimate = {**row.estimate, "std_error": 2.0, "lower": -614.23, **chains, **values}
        return row.model_copy(update={"estimate": estimate, "rays": {}})

    return make


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
    assert table.cells(row).method == "isotropic (partial, 64 rays)"


def test_notes_carry_counts_and_remedies(make_row, make_run):
    noisy = make_row("noisy", "adam", [-2.0] * 3, status=[1, 1, 3], settled=True, noise=2.5)
    run = make_run(noisy, make_row("loose", "isotropic", [-2.0] * 3))
    text = "\n".join(table.notes(run))
    assert "≥ (1 of 2 rows): a certified 95 % lower bound" in text
    assert "noise limited rays (noisy: 2): the cost's rounding limits the radius: raise the cutoff." in text
    assert "non finite rays (noisy: 1)" in text
    assert "by 2.5 nats" in text
    assert table.notes(make_run(make_row("a", "adam", [-2.0], settled=True))) == []


def test_notes_take_back_the_certificate_after_a_violation(make_row, make_run):
    row = make_row("a", "adam", [-2.0] * 2)
    row = row.model_copy(update={"estimate": {**row.estimate, "violation_rate": 0.25, "bound_kind": "none"}})
    text = "\n".join(table.notes(make_run(row)))
    assert "(a: 25.0 %)" in text and "nothing is certified" in text and "audit_fraction: 1" in text


def test_a_row_of_chains_leaves_the_cells_of_rays_empty(make_tether):
    assert table.cells(make_tether("tether, connected")) == table.Cells(
        method="tether, connected",
        log_mass="-600.0 ± 2.0",
        lower="-614.3",
        log_mean="",
        per_ray="",
        passes="-601.0\n-599.0",
        ess="",
        pareto_k="",
        evaluations="3,200",
        seconds="7.2",
        recorded="",
    )


def test_chains_that_have_not_mixed_claim_a_bound(make_tether):
    row = make_tether("t", kind="not_mixed", hysteresis_heating=-300.0)
    assert table.cells(row)[1:3] == ("≥ -614.3\nnot mixed", "")
    assert table.cells(row).passes == "-601.0\n-300.0"
    assert table.claim(row.estimate) == "≥ -614.3, not mixed"
    assert table.shown(row) == -614.23


def test_a_pass_that_lost_its_chains_is_not_taken_for_the_other(make_tether):
    lost = make_tether("t", kind="not_mixed", hysteresis_cooling=math.nan, hysteresis_heating=-30.0)
    assert table.cells(lost).passes == "lost\n-30.0"
    running = make_tether("t", complete=False, kind="lower_bound", hysteresis_heating=math.nan)
    assert table.cells(running).passes == "-601.0"


def test_interrupted_chains_say_how_far_they_came(make_tether):
    row = make_tether("t", complete=False, kind="lower_bound", progress=0.43, hysteresis_heating=math.nan)
    cells = table.cells(row)
    assert cells.method == "t (partial, 43 %)"
    assert cells.log_mass == "≥ -614.3" and cells.passes == "-601.0"


def test_an_estimate_from_rays_shows_its_bound_beside_it(make_row):
    assert table.cells(make_row("a", "adam", [-2.0, -2.0], settled=True)).lower == "-5.0"
    assert table.cells(make_row("a", "adam", [-2.0, -2.0])).lower == ""


def test_columns_without_a_word_are_dropped(make_row, make_tether):
    rays = table.cells(make_row("a", "adam", [-2.0, -2.0]))
    chains = table.cells(make_tether("t"))
    assert not {"lower", "passes", "recorded"} & set(table.filled([rays]))
    assert table.filled([chains]) == ("method", "log_mass", "lower", "passes", "evaluations", "seconds")
    of_coefficients = {"quoted", "exact", "off", "hot", "cold", "r_hat", "half"}
    elsewhere = {"recorded", "chosen", *of_coefficients}
    assert table.filled([rays, chains]) == tuple(name for name in table.Cells._fields if name not in elsewhere)


def test_notes_on_chains_give_bound_remedy_and_what_rays_miss(make_row, make_run, make_tether):
    loose, tight = make_row("loose", "isotropic", [-9000.0] * 2), make_row("tight", "adam", [-7000.0] * 2)
    remedy = "not mixed: only `lower` may be quoted; raise effort"
    chains = (make_tether("star"), make_tether("walkers", kind="not_mixed", status=remedy))
    lines = table.notes(make_run(loose, tight, *chains))
    assert lines[0].startswith("≥ (every row of rays): a certified 95 % lower bound. A few rays")
    assert lines[1] == f"walkers: {remedy}."
    assert "Certified at 95 %" in lines[2] and "star ≥ -614.3" in lines[2] and "walkers" not in lines[2]
    # The best rays show their bound, 3 nats below their log mean weight.
    assert lines[3] == (
        "Nats that the best rays (tight, ≥ -7003.0) leave out: star 6,403.0, walkers at least 6,388.8."
    ).replace("7003", "7,003")
    assert len(lines) == 4


def test_rays_miss_nothing_that_chains_do_not_show(make_row, make_run, make_tether):
    good = make_row("good", "adam", [-500.0] * 2)
    assert table.missed(make_run(good, make_tether("t"))) == []
    assert table.missed(make_run(make_tether("t"))) == []
    nothing = make_row("nothing", "adam", [-math.inf] * 2)
    assert table.missed(make_run(nothing, make_tether("t"))) == []


def test_rounding_noise_of_rays_is_told_beside_chains(make_row, make_run, make_tether):
    # The chains' NaN must not hide it, in either order.
    rays, chains = make_row("a", "adam", [-2.0], settled=True, noise=2.5), make_tether("t")
    for rows in ((rays, chains), (chains, rays)):
        assert "by 2.5 nats" in "\n".join(table.notes(make_run(*rows)))


def test_of_many_rows_the_three_with_most_rays_are_named(make_row, make_run):
    rows = [make_row(f"row {i}", "adam", [-2.0] * 9, status=[1] * i + [0] * (9 - i)) for i in range(7)]
    text = "\n".join(table.notes(make_run(*rows)))
    assert "noise limited rays (in 6 rows, most in row 6: 6; row 5: 5; row 4: 4)" in text and "row 3" not in text


def place(row, kind="tuned", **position):
    return row.model_copy(update={"position": position, "kind": kind})


def test_a_tuned_row_says_what_was_chosen(make_row):
    row = make_row("a", "tuned", [-2.0] * 2)
    found = {"beta": 2.31e7, "exponent": 0.35, "damping": 1.96e-3, "shift": 0.0}
    assert table.cells(place(row, **found)).chosen == "β=2.3e7, power 0.35\ndamping 0.002, no shift"
    assert table.cells(place(row, **{**found, "damping": 0.0, "shift": 1.0})).chosen.endswith("damping 0, shift")
    assert table.cells(place(row, **{**found, "beta": 0.0})).chosen == "β=0, the prior's own\nno shift"
    assert table.cells(place(row, kind="adam", damping=0.1, exponent=0.5)).chosen == ""


def test_the_headline_of_a_series_measures_one_thing(make_row, make_run):
    rows = [
        place(make_row(f"a, step {step}, ε={cutoff}", "adam", [-2.0]), "adam", step=step, cutoff=cutoff)
        for step in (0.0, 5.0) for cutoff in (1e-3, 0.02, 1.0)
    ]  # fmt: skip
    assert [row.label for row in table.headline(make_run(*rows))] == ["a, step 5.0, ε=0.02"]
    assert table.method(rows[0]) == "a"
    plain = make_row("b", "adam", [-2.0]), make_row("c", "adam", [-2.0])
    assert table.headline(make_run(*plain)) == plain

from dataclasses import replace

import numpy as np
import pytest
import sympy
from hypothesis import given, settings
from hypothesis import strategies as st

import cases_allocation
import cases_approximation
import cases_flows
import cases_measures
import cases_propagation
import cases_reweighting
import cases_risk
import cases_second_moments
import cases_skeletons
import cases_subgaussian
import cases_worst_case
from ellq.theory import (
    best_term_error,
    effective_count,
    lq_quasinorm,
    registry,
    retained_sufficient,
    statement,
    stechkin_bound,
)
from ellq.theory.statements import Statement, Verdict, register

SUBJECTS = (
    cases_allocation,
    cases_approximation,
    cases_flows,
    cases_measures,
    cases_propagation,
    cases_reweighting,
    cases_risk,
    cases_second_moments,
    cases_skeletons,
    cases_subgaussian,
    cases_worst_case,
)
CASES, RANDOM, EXTREMAL = (
    {id: case for subject in SUBJECTS for id, case in getattr(subject, kind).items()}
    for kind in ("CASES", "RANDOM", "EXTREMAL")
)
IDS = tuple(CASES)
each_statement = pytest.mark.parametrize("id", IDS)


def verdict(id, case):
    """The statement's verdict; None where a bound or a norm exceeds float64, which it says by OverflowError."""
    try:
        return statement(id).check(**case)
    except OverflowError:
        return None


# --- the attack -----------------------------------------------------------------------------------------------------


def test_every_registered_statement_is_attacked():
    assert set(registry()) == set(CASES) == set(RANDOM) == set(EXTREMAL)


@each_statement
@settings(max_examples=250, deadline=None)
@given(data=st.data())
def test_no_case_violates_the_statement(id, data):
    case = data.draw(CASES[id])
    result = verdict(id, case)
    assert result is None or result.holds, (case, result)


@pytest.mark.slow
@each_statement
def test_no_case_violates_the_statement_in_a_long_attack(id):
    cases = 1500
    judged = 0
    for seed in range(cases):
        result = verdict(id, RANDOM[id](np.random.default_rng(seed)))
        if result is not None:
            judged += 1
            assert result.holds, (id, seed, result)
    assert judged > 0.7 * cases


@each_statement
def test_the_allowance_for_rounding_is_small_on_ordinary_cases(id):
    # Else the attack could not see a violation.
    for seed in range(200):
        case = RANDOM[id](np.random.default_rng(seed))
        if "w" in case and (np.abs(case["w"]).max() > 1e6 or case["w"].size > 50):
            continue
        if "p" in case and abs(case["q"] - case["p"]) < 1e-3 * case["p"]:
            continue  # nearly equal orders amplify rounding by q/(q − p)
        result = verdict(id, case)
        if result is None or result.bound < 1e-6:
            continue  # beside such a bound the rounding of the activations themselves is what is seen
        assert result.allowance <= 1e-6 * result.bound, (id, seed, result)


# --- negative controls: a bound 1 % lower is caught -----------------------------------------------------------------


@each_statement
def test_a_bound_one_percent_lower_is_violated(id):
    true, case = statement(id), EXTREMAL[id]
    assert true.check(**case).holds
    lowered = replace(true, bound=lambda **arguments: 0.99 * true.bound(**arguments))
    assert not lowered.check(**case).holds


def test_a_count_one_percent_lower_does_not_suffice():
    case = EXTREMAL["retained-sufficient"]
    fewer = int(0.99 * 2000)
    assert best_term_error(case["w"], fewer) > case["tol"] * float(lq_quasinorm(case["w"], 2.0))


# --- assumptions ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("id", "change", "sentence"), [row for subject in SUBJECTS for row in subject.OUTSIDE])
def test_a_case_outside_the_assumptions_is_refused_by_the_sentence(id, change, sentence):
    with pytest.raises(ValueError, match=f"'{id}' does not apply: .*{sentence}"):
        statement(id).check(**EXTREMAL[id] | change)


# --- formulas -------------------------------------------------------------------------------------------------------


@each_statement
def test_formula_is_a_relation_and_prints_as_latex(id):
    formula = statement(id).formula()
    assert isinstance(formula, sympy.Basic)
    latex = statement(id).latex()
    assert r"\leq" in latex
    assert latex.count("{") == latex.count("}")


def _numbers(expression, **values):
    return float(expression.subs({symbol: values[symbol.name] for symbol in expression.free_symbols}))


def test_formulas_evaluate_to_the_bounds():
    w, k = np.array([5.0, -3.0, 2.0, 1.0]), 2
    norm = float(lq_quasinorm(w, 0.5))
    named = {"‖w‖_q": norm, "k": k, "q": 0.5, "p": 2.0, "B": 3.0}
    assert _numbers(statement("stechkin").formula().rhs, **named) == pytest.approx(stechkin_bound(w, k, q=0.5))
    unit = statement("linear-unit-l1")
    bound = unit.bound(w=w, retained=k, q=0.5, inputs=np.full((2, 4), 3.0))
    assert _numbers(unit.formula().rhs, **named) == pytest.approx(bound)

    count = float(effective_count(w, 0.5, 1.0))
    necessary = statement("retained-necessary")
    eta = (np.sqrt(2.0) + 1.0) / (np.sqrt(5.0) + np.sqrt(3.0))
    observed = necessary.observed(w=w, retained=k, p=0.5, q=1.0)
    assert _numbers(necessary.formula().lhs, N=count, eta=eta, p=0.5, q=1.0) == pytest.approx(observed)

    enough = statement("retained-sufficient").formula().args[0]
    symbols = {"N": count, "tol": 0.3, "p": 0.5, "q": 1.0}
    expected = retained_sufficient(w, 0.3, p=0.5, q=1.0)
    assert _numbers(next(side for side in enough.args if side.has(sympy.Pow)), **symbols) == pytest.approx(expected)


def test_multilayer_formula_unrolls_the_recursion():
    formula = statement("multilayer").formula().rhs
    depth = next(symbol for symbol in formula.free_symbols if symbol.name == "L")
    two = formula.subs(depth, 2).doit()
    delta, gain, rho = sympy.IndexedBase("delta"), sympy.IndexedBase("T"), sympy.Symbol("rho", positive=True)
    assert sympy.expand(two - (rho**2 * gain[2] * delta[1] + rho * delta[2])) == 0


# --- the registry ---------------------------------------------------------------------------------------------------


@each_statement
def test_statement_names_its_source_and_assumptions(id):
    entry = statement(id)
    assert entry.id == id
    assert entry.title
    assert entry.reference
    assert entry.status in ("published", "classical", "reconstructed", "ours")
    assert entry.assumptions
    assert all(assumption.name and assumption.sentence.endswith(".") for assumption in entry.assumptions)


def test_ids_are_unique():
    entries = list(registry().values())
    assert len({entry.id for entry in entries}) == len(entries)
    with pytest.raises(ValueError, match=f"'{entries[0].id}' is taken"):
        register(entries[0])


def test_unknown_id_lists_those_there_are():
    with pytest.raises(KeyError) as error:
        statement("stechkln")
    assert all(id in str(error.value) for id in IDS)


def test_the_registry_is_handed_out_as_a_copy():
    registry().clear()
    assert registry()


def test_verdict_compares_within_the_allowance():
    assert Verdict(1.0, 1.0, 0.0).holds
    assert Verdict(1.1, 1.0, 0.2).holds
    assert not Verdict(1.1, 1.0, 0.05).holds
    assert not Verdict(float("nan"), 1.0, 1.0).holds
    assert Verdict(0.5, 1.0, 0.0).slack == 2
    assert Verdict(0.0, 1.0, 0.0).slack == float("inf")


def test_allowance_is_relative_to_the_bound():
    half = Statement("half", "", "", "ours", (), lambda x: x, lambda x: x / 2, lambda x: 0.25, lambda: sympy.true)
    assert half.check(x=4.0) == Verdict(4.0, 2.0, 0.5)  # and what a subnormal loses, which vanishes here

from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from nissl.errors import InputError
from nissl.trust.statistics import holm, paired_test
from nissl.trust.verdict import RANGES, VERDICTS, Claims, VerdictSettings, judge

DOCS = Path(__file__).parents[2] / "docs" / "verdicts.md"

GOOD = {  # a method against which nothing speaks
    "faithfulness": 0.5,
    "randomisation_similarity": 0.1,
    "logit_similarity": 0.2,
    "gridpg": 0.6,
    "difull": 0.9,
    "completeness_gap": 0.01,
    "max_sensitivity": 0.3,
}


def planted(levels, n=12, spread=0.02, seed=0):
    """Tidy figures: each method's figure at its level, with noise whose mean over examples is exactly 0."""
    rng = np.random.default_rng(seed)
    rows = []
    for method, figures in levels.items():
        for figure, level in figures.items():
            noise = rng.uniform(-spread, spread, size=n)
            noise -= noise.mean()
            low, high = RANGES.get(figure, (-np.inf, np.inf))
            within = low <= level + noise.min() and level + noise.max() <= high
            if figure in ("completeness_gap", "max_sensitivity") or not within:
                noise[:] = 0.0
            rows += [(method, figure, i, level + e) for i, e in enumerate(noise)]
    return pd.DataFrame(rows, columns=["method", "figure", "example", "value"])


def judged(changes=None, claims=None, n=12, settings=None, spread=0.02, drop=()):
    """The verdict on "mine", good in everything but `changes`, beside noise and edges."""
    mine = {k: v for k, v in (GOOD | (changes or {})).items() if k not in drop}
    levels = {"mine": mine, "random": {"faithfulness": 0.0}, "edge": {"faithfulness": 0.1}}
    return judge(planted(levels, n, spread), {"mine": claims or Claims(True, True)}, settings).loc["mine"]


def test_a_good_method_is_believed_with_evidence():
    row = judged()
    assert row["verdict"] == "believe"
    assert row["notes"] == []
    assert row["n_examples"] == 12
    assert row["faithfulness_p"] == row["faithfulness_p_edge"] == row["faithfulness_p_random"] == 2 / 2**12
    assert row["faithfulness"] == pytest.approx(0.5)
    assert row["faithfulness_low"] < 0.5 < row["faithfulness_high"]
    assert any(r.startswith("above random: insertion − deletion 0.5 ") for r in row["reasons"])
    assert any(r.startswith("above edge: ") and "against 0.1 [" in r for r in row["reasons"])
    assert len(row["reasons"]) == 8  # two baselines and six other figures


def test_baselines_are_never_believed():
    levels = {"mine": GOOD, "random": GOOD, "edge": GOOD | {"faithfulness": 0.9, "randomisation_similarity": 1.0}}
    table = judge(planted(levels, spread=0.0), {"mine": Claims()})
    assert list(table.index) == ["mine", "random", "edge"]
    for name in ("random", "edge"):
        assert table.loc[name, "verdict"] == "do not believe"
        assert "a baseline: it knows nothing of the network" in table.loc[name, "reasons"]
        assert np.isnan(table.loc[name, "faithfulness_p"])
    assert len(table.loc["random", "reasons"]) == 1
    assert any("unmoved by randomising" in r for r in table.loc["edge", "reasons"])


# Rule 1


@pytest.mark.parametrize("level", [-0.2, 0.0, 0.05])
def test_not_above_edge_is_not_believed(level):
    row = judged({"faithfulness": level})
    assert row["verdict"] == "do not believe"
    reason = row["reasons"][0]
    assert reason.startswith(("not above", "not shown to be above"))
    assert "p = " in reason
    assert "12 examples" in reason
    assert any("above edge: insertion" in r and "against 0.1 [" in r for r in row["reasons"])


def test_above_noise_but_equal_to_edge_is_not_believed():
    row = judged({"faithfulness": 0.1}, spread=0.0)
    assert row["verdict"] == "do not believe"
    assert row["faithfulness_p_random"] == 2 / 2**12
    assert row["faithfulness_p_edge"] == row["faithfulness_p"] == 1.0
    assert row["reasons"] == [
        "not above edge: insertion − deletion 0.1 [0.1, 0.1] against 0.1 [0.1, 0.1] (mean difference 0, p = 1, 12 examples)"
    ]


def test_positive_but_not_significant_with_enough_examples_is_not_believed():
    figures = planted({"mine": GOOD, "random": {"faithfulness": 0.0}, "edge": {"faithfulness": 0.0}}, spread=0.0)
    swing = np.where(np.arange(12) % 2, 0.5, -0.4)
    figures.loc[(figures["method"] == "mine") & (figures["figure"] == "faithfulness"), "value"] = swing
    row = judge(figures, {"mine": Claims()}).loc["mine"]
    assert row["faithfulness"] > 0
    assert row["faithfulness_p"] > 0.05
    assert row["verdict"] == "do not believe"
    assert row["reasons"][0].startswith("not shown to be above random: ")  # it is above, as far as this goes


@pytest.mark.parametrize(("n", "verdict"), [(1, "undecided"), (5, "undecided"), (6, "believe")])
def test_few_examples_are_undecided_and_the_number_needed_is_said(n, verdict):
    # two tests: 2 / 2^5 = .0625 cannot be significant, 2 / 2^6 = .03125 can
    row = judged(n=n)
    assert row["verdict"] == verdict
    if n < 6:
        assert "at least 6 are needed" in row["reasons"][0]
        assert ("1 example," if n == 1 else "5 examples,") in row["reasons"][0]


def test_few_examples_do_not_excuse_a_method_below_the_baselines():
    row = judged({"faithfulness": 0.05}, n=3, spread=0.0)
    assert row["verdict"] == "do not believe"
    assert len(row["reasons"]) == 2
    assert "not above edge" in row["reasons"][0]  # the worst first, the rest is kept
    assert "too few examples" in row["reasons"][1]


@pytest.mark.parametrize(("n", "verdict"), [(8, "undecided"), (9, "believe")])
def test_holm_counts_all_tests_of_the_run(n, verdict):
    # ten methods, twenty tests: 20 / 2^8 = .078, 20 / 2^9 = .039
    levels = {f"m{i}": GOOD for i in range(10)} | {"random": {"faithfulness": 0.0}, "edge": {"faithfulness": 0.1}}
    table = judge(planted(levels, n), {f"m{i}": Claims() for i in range(10)}).drop(index=["random", "edge"])
    assert (table["verdict"] == verdict).all()
    assert (table["faithfulness_p"] == 20 / 2**n).all()
    if verdict == "undecided":
        assert all("at least 9 are needed" in r[0] for r in table["reasons"])


def test_p_values_are_those_of_the_statistics_corrected_together():
    rng = np.random.default_rng(4)
    names = ["a", "b", "c", "random", "edge"]
    x = dict(zip(names, rng.normal([[0.9], [0.5], [0.2], [0.0], [0.1]], 0.7, size=(5, 20)), strict=True))
    rows = [(m, "faithfulness", i, v) for m in names for i, v in enumerate(x[m])]
    table = judge(pd.DataFrame(rows, columns=["method", "figure", "example", "value"]), dict.fromkeys("abc", Claims()))
    raw = [[float(paired_test(x[m], x[b]).p) for b in ("random", "edge")] for m in "abc"]
    got = table.loc[list("abc"), ["faithfulness_p_random", "faithfulness_p_edge"]]
    np.testing.assert_allclose(got, holm(raw))
    assert (table.loc[list("abc"), "faithfulness_p"] == got.max(axis=1)).all()


def test_many_worthless_methods_are_rarely_believed():
    rng = np.random.default_rng(0)
    believed, runs, k = 0, 60, 8
    settings = VerdictSettings(n_resamples=50, baselines=("random",))
    for _ in range(runs):
        values = rng.normal(size=(k + 1, 10))
        names = [f"m{i}" for i in range(k)] + ["random"]
        figures = pd.DataFrame(values, index=names).rename_axis("method").reset_index()
        figures = figures.melt("method", var_name="example").assign(figure="faithfulness")
        sane = figures[figures["method"].str.startswith("m")].assign(figure="randomisation_similarity", value=0.0)
        table = judge(pd.concat([figures, sane]), {m: Claims() for m in names[:k]}, settings)
        believed += (table["verdict"] == "believe").any()
    assert believed <= 7  # at most 5 % of 60 runs are expected, about a quarter without correction


def test_examples_are_paired_by_name_not_by_order():
    figures = planted({"mine": GOOD, "random": {"faithfulness": 0.0}, "edge": {"faithfulness": 0.1}})
    shuffled = figures.sample(frac=1, random_state=0)
    info = {"mine": Claims(True, True)}
    pd.testing.assert_frame_equal(judge(figures, info), judge(shuffled, info))


# Rules 2 to 6: at the threshold, and a hair beyond it


@pytest.mark.parametrize(
    ("figure", "at", "beyond", "verdict", "words"),
    [
        ("randomisation_similarity", 0.5, 0.5001, "do not believe", "unmoved by randomising the weights"),
        ("logit_similarity", 0.95, 0.9501, "with care", "does not depend on which class is explained"),
        ("gridpg", 0.2501, 0.25, "with care", "gridpg not above chance: 0.25 [0.25, 0.25], chance is 0.25"),
        ("difull", 0.2501, 0.25, "with care", "difull not above chance: 0.25 [0.25, 0.25], chance is 0.25"),
        ("completeness_gap", 0.05, 0.0501, "with care", "incomplete"),
        ("max_sensitivity", 1.0, 1.001, "with care", "unstable"),
    ],
)
def test_threshold_edges(figure, at, beyond, verdict, words):
    assert judged({figure: at}, spread=0.0)["verdict"] == "believe"
    row = judged({figure: beyond}, spread=0.0)
    assert row["verdict"] == verdict
    assert len(row["reasons"]) == 1
    assert words in row["reasons"][0]


@pytest.mark.parametrize(
    ("figure", "level", "verdict"),
    [
        # the mean is beyond the threshold, but the interval is not: in favour of the method …
        ("randomisation_similarity", 0.51, "believe"),
        ("logit_similarity", 0.951, "believe"),
        # … or, where the method has to show something, against it
        ("gridpg", 0.255, "with care"),
        ("difull", 0.255, "with care"),
    ],
)
def test_the_interval_decides(figure, level, verdict):
    assert judged({figure: level}, spread=0.04)["verdict"] == verdict


def test_the_upper_end_decides_for_sensitivity_and_the_median_for_completeness():
    figures = planted({"mine": GOOD, "random": {"faithfulness": 0.0}, "edge": {"faithfulness": 0.1}})
    info = {"mine": Claims(True, True)}
    stability = (figures["method"] == "mine") & (figures["figure"] == "max_sensitivity")
    figures.loc[stability, "value"] = np.linspace(0.4, 1.5, 12)  # mean .95
    row = judge(figures, info).loc["mine"]
    assert row["max_sensitivity"] < 1 < row["max_sensitivity_high"]
    assert row["verdict"] == "with care"
    figures.loc[stability, "value"] = 0.3
    gap = (figures["method"] == "mine") & (figures["figure"] == "completeness_gap")
    figures.loc[gap, "value"] = [0.01] * 7 + [1e6] * 5
    assert judge(figures, info).loc["mine", "verdict"] == "believe"
    figures.loc[gap, "value"] = [0.01] * 5 + [0.06] * 7
    assert judge(figures, info).loc["mine", "verdict"] == "with care"


def test_methods_are_held_only_to_what_they_claim():
    bad = {"logit_similarity": 1.0, "completeness_gap": 3.0}
    assert judged(bad, Claims())["verdict"] == "believe"
    assert len(judged(bad, Claims(class_discriminative=True))["reasons"]) == 1
    assert "incomplete" in judged(bad, Claims(complete=True))["reasons"][0]
    assert len(judged(bad, Claims(True, True))["reasons"]) == 2


def test_ground_truths_are_not_averaged():
    row = judged({"gridpg": 0.2, "difull": 1.0})
    assert row["verdict"] == "with care"
    assert "gridpg" in row["reasons"][0]
    assert judged({"gridpg": 0.2}, settings=VerdictSettings(grid_side=3))["verdict"] == "believe"  # chance 1/9


def test_the_worst_finding_decides_and_all_are_kept_in_order():
    row = judged({"faithfulness": -0.1, "randomisation_similarity": 0.9, "gridpg": 0.1, "max_sensitivity": 2.0})
    assert row["verdict"] == "do not believe"
    assert len(row["reasons"]) == 5
    assert all("above" in r.partition(":")[0] for r in row["reasons"][:2])
    assert "unmoved" in row["reasons"][2]
    assert "gridpg" in row["reasons"][3]
    row = judged({"gridpg": 0.1}, n=5)
    assert row["verdict"] == "undecided"
    assert "gridpg" in row["reasons"][-1]


# Rule 7


def test_no_belief_without_rules_1_and_2():
    row = judged(drop=["randomisation_similarity"])
    assert row["verdict"] == "undecided"
    assert row["reasons"] == ["randomisation_similarity was not evaluated (no value)"]
    row = judged(drop=["faithfulness"])
    assert row["verdict"] == "undecided"
    assert row["reasons"] == [f"faithfulness was not evaluated against {b}" for b in ("random", "edge")]
    assert np.isnan(row["faithfulness_p"])


def test_missing_baseline():
    figures = planted({"mine": GOOD, "random": {"faithfulness": 0.0}})
    row = judge(figures, {"mine": Claims()}).loc["mine"]
    assert row["verdict"] == "undecided"
    assert row["reasons"] == ["faithfulness was not evaluated against edge"]
    assert row["faithfulness_p_random"] == 1 / 2**12  # one test only
    assert np.isnan(row["faithfulness_p_edge"])
    assert np.isnan(row["faithfulness_p"])
    assert (
        judge(figures, {"mine": Claims()}, VerdictSettings(baselines=("random",))).loc["mine", "verdict"] == "believe"
    )


def test_other_missing_checks_are_noted_only():
    row = judged(drop=["gridpg", "max_sensitivity", "logit_similarity", "completeness_gap"])
    assert row["verdict"] == "believe"
    unchecked = ["logit_similarity", "gridpg", "completeness_gap", "max_sensitivity"]
    assert row["notes"] == [f"not checked: {f} (no value)" for f in unchecked]
    assert judged(claims=Claims(), drop=["logit_similarity"])["notes"] == []  # it makes no such claim


def test_a_method_without_any_figure():
    table = judge(planted({"random": {"faithfulness": 0.0}}), {"mine": Claims()})
    assert table.loc["mine", "verdict"] == "undecided"
    assert table.loc["mine", "n_examples"] == 0
    assert len(table.loc["mine", "reasons"]) == 3
    empty = pd.DataFrame({"method": [], "figure": [], "example": [], "value": []})
    assert judge(empty, {"mine": Claims()})["verdict"].tolist() == ["undecided"]
    assert judge(empty, {}).empty


def test_nan_is_left_out_counted_and_said():
    figures = planted({"mine": GOOD, "random": {"faithfulness": 0.0}, "edge": {"faithfulness": 0.1}})
    info = {"mine": Claims(True, True)}
    of_mine = figures["method"] == "mine"
    figures.loc[of_mine & (figures["figure"] == "faithfulness") & (figures["example"] < 5), "value"] = np.nan
    figures.loc[of_mine & (figures["figure"] == "difull"), "value"] = np.nan
    row = judge(figures, info).loc["mine"]
    assert row["verdict"] == "believe"
    assert row["faithfulness_p"] == 2 / 2**7
    assert "5 of 12 values of faithfulness are NaN and were left out" in row["notes"]
    assert "12 of 12 values of difull are NaN and were left out" in row["notes"]
    assert "not checked: difull (no value)" in row["notes"]
    figures.loc[of_mine & (figures["figure"] == "faithfulness") & (figures["example"] < 7), "value"] = np.nan
    assert judge(figures, info).loc["mine", "verdict"] == "undecided"  # five pairs are left
    figures.loc[of_mine & (figures["figure"] == "randomisation_similarity") & (figures["example"] > 0), "value"] = (
        np.nan
    )
    reasons = judge(figures, info).loc["mine", "reasons"]
    assert "randomisation_similarity was not evaluated (one example has no interval)" in reasons


def test_figures_without_a_rule_are_ignored():
    figures = planted(
        {"mine": GOOD | {"deletion": 7.0}, "random": {"faithfulness": 0.0}, "edge": {"faithfulness": 0.1}}
    )
    table = judge(figures.assign(check="any"), {"mine": Claims(True, True)})
    assert table.loc["mine", "verdict"] == "believe"
    assert "deletion" not in table.columns


def test_bad_figures_raise_and_are_left_as_they_were():
    figures = planted({"mine": GOOD, "random": {"faithfulness": 0.0}, "edge": {"faithfulness": 0.1}})
    info = {"mine": Claims()}

    def with_value(figure, value):
        changed = figures.copy()
        changed.loc[changed["figure"] == figure, "value"] = value
        return changed

    cases = {
        "lack the columns": figures.drop(columns="example"),
        "no entry in methods_info": figures.assign(method=figures["method"].replace("mine", "unknown")),
        "two values of 'faithfulness'": pd.concat([figures, figures.iloc[:1]]),
        "infinite": with_value("faithfulness", np.inf),
        "must be numbers": figures.assign(value="high"),
        r"gridpg must lie in \[0, 1\]": with_value("gridpg", 1.2),
        "max_sensitivity must lie in": with_value("max_sensitivity", -0.1),
        "randomisation_similarity must lie in": with_value("randomisation_similarity", 1.3),
        "without a method": figures.assign(example=None),
    }
    before = figures.copy()
    for words, bad in cases.items():
        with pytest.raises(InputError, match=words):
            judge(bad, info)
    judge(figures, info)
    pd.testing.assert_frame_equal(figures, before)


@pytest.mark.parametrize(
    "change",
    [
        {"alpha": 0.0},
        {"level": 1.0},
        {"grid_side": 1},
        {"n_permutations": 0},
        {"baselines": ()},
        {"baselines": ("a", "a")},
    ],
)
def test_bad_settings_raise(change):
    with pytest.raises(InputError):
        replace(VerdictSettings(), **change)


def test_settings_move_the_thresholds():
    assert judged({"randomisation_similarity": 0.3})["verdict"] == "believe"
    strict = VerdictSettings(randomisation_similarity=0.2)
    assert judged({"randomisation_similarity": 0.3}, settings=strict)["verdict"] == "do not believe"
    assert judged(settings=VerdictSettings(alpha=1e-6))["verdict"] == "undecided"


def test_the_table_survives_parquet(tmp_path):
    table = judge(planted({"mine": GOOD, "random": {"faithfulness": 0.0}}), {"mine": Claims()})
    table.to_parquet(tmp_path / "trust.parquet")
    back = pd.read_parquet(tmp_path / "trust.parquet")
    assert list(back.loc["mine", "reasons"]) == table.loc["mine", "reasons"]
    assert back["verdict"].tolist() == table["verdict"].tolist()


def test_the_page_states_the_rules_that_run():
    page = " ".join(DOCS.read_text(encoding="utf-8").split())
    for figure in RANGES:
        assert f"`{figure}`" in page or f"{figure} =" in page
    for verdict in VERDICTS:
        assert f"| **{verdict}** |" in page
    s = VerdictSettings()
    for words in (
        f"**p < {s.alpha:g}**".replace("0.", "."),
        f"**above {s.randomisation_similarity:g}**".replace("0.", "."),
        f"**above {s.logit_similarity:g}**".replace("0.", "."),
        f"**above {s.completeness_gap:g}**".replace("0.", "."),
        f"**above {s.max_sensitivity:g}**",
        f"{s.n_resamples:,} resamples",
        f"{s.n_permutations:,} random sign patterns",
        f"{s.level * 100:.0f} % bootstrap interval",
    ):
        assert words in page, words

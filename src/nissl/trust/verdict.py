"""From figures to verdicts: the rules of docs/verdicts.md, and nothing else."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import ceil, floor, inf, log2
from typing import NamedTuple

import numpy as np
import pandas as pd

from nissl.errors import InputError
from nissl.trust.statistics import Interval, PairedTest, bootstrap, holm, paired_test

VERDICTS = ("believe", "with care", "undecided", "do not believe")
"""From the best to the worst; the worst finding decides."""

RANGES = {
    "faithfulness": (-inf, inf),
    "randomisation_similarity": (-1.0, 1.0),
    "logit_similarity": (-1.0, 1.0),
    "gridpg": (0.0, 1.0),
    "difull": (0.0, 1.0),
    "completeness_gap": (0.0, inf),
    "max_sensitivity": (0.0, inf),
}
"""The figures that enter a verdict, and the values that they can take."""


@dataclass(frozen=True)
class Claims:
    """What a method promises, and so what it is held to.

    Attributes
    ----------
    class_discriminative : bool, default False
        It explains one class rather than another.
    complete : bool, default False
        Its scores add up to the change of the output from a baseline.
    """

    class_discriminative: bool = False
    complete: bool = False


@dataclass(frozen=True)
class VerdictSettings:
    """The numbers in the rules. They are conventions, to be fixed before results are seen; docs/verdicts.md says more.

    Attributes
    ----------
    alpha : float, default 0.05
        Highest chance of believing any worthless method in a run: corrected p values must be below it.
    randomisation_similarity : float, default 0.5
        Rank correlation from which the map ignores what was learned: a quarter of the ranks' variance (.5²) survives
        the destruction of the network.
    logit_similarity : float, default 0.95
        Rank correlation from which the class does not matter: over nine tenths of the ranks' variance are shared.
    grid_side : int, default 2
        Grids of `gridpg` and `difull` have this many cells on a side; chance is 1 / `grid_side`².
    completeness_gap : float, default 0.05
        Share of the change of the output that may be missing: far above rounding and enough integration steps.
    max_sensitivity : float, default 1.0
        Relative change of the map from which it is unstable: it then changes by as much as it has (cosine .5).
    baselines : tuple of str, default ("random", "edge")
        Methods that know nothing of the network, which every other method must beat.
    level : float, default 0.95
        Coverage of the bootstrap intervals.
    n_resamples, n_permutations : int, default 2000 and 10000
        Bootstrap resamples; random sign patterns of a test with more than 12 examples (raised to ten times the number
        of tests over `alpha` where that is more, so that the resolution of p cannot decide).
    seed : int, default 0

    Raises
    ------
    InputError
        A number out of range.
    """

    alpha: float = 0.05
    randomisation_similarity: float = 0.5
    logit_similarity: float = 0.95
    grid_side: int = 2
    completeness_gap: float = 0.05
    max_sensitivity: float = 1.0
    baselines: tuple[str, ...] = ("random", "edge")
    level: float = 0.95
    n_resamples: int = 2000
    n_permutations: int = 10_000
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("alpha", "level"):
            if not 0 < getattr(self, name) < 1:
                raise InputError(f"{name} must lie between 0 and 1, got {getattr(self, name)}")
        for name, least in (("grid_side", 2), ("n_resamples", 1), ("n_permutations", 1)):
            if getattr(self, name) < least:
                raise InputError(f"{name} must be at least {least}, got {getattr(self, name)}")
        if not self.baselines or len(set(self.baselines)) < len(self.baselines):
            raise InputError(f"baselines must be one or more different names, got {self.baselines}")


def judge(
    figures: pd.DataFrame, methods_info: Mapping[str, Claims], settings: VerdictSettings | None = None
) -> pd.DataFrame:
    """Judge each method by what was measured.

    Parameters
    ----------
    figures : DataFrame, columns "method", "figure", "example", "value"
        One row for each measurement; other columns are ignored, and so are figures that no rule names. NaN marks what
        could not be measured: it is left out and counted. `RANGES` lists the figures that have rules.
    methods_info : mapping of method to Claims
        All methods to be judged, also those without a figure. Baselines need not be listed.
    settings : VerdictSettings, optional

    Returns
    -------
    DataFrame, index "method"
        ``verdict`` : one of `VERDICTS`.
        ``reasons`` : list of str, findings against the method, worst first; for "believe", those in its favour.
        ``notes`` : list of str, what was not checked or left out.
        ``n_examples`` : examples with at least one figure of the method that has a rule.
        ``<figure>``, ``<figure>_low``, ``<figure>_high`` : mean (median for the completeness gap) and interval.
        ``faithfulness_p_<baseline>`` : p against that baseline, corrected over all tests of the run.
        ``faithfulness_p`` : the largest of these; NaN if one is missing.

    Raises
    ------
    InputError
        Missing columns, methods without an entry in `methods_info`, two values for one example, values that are
        infinite, not numbers or outside what the figure can be.

    See Also
    --------
    docs/verdicts.md : the rules, with formulas and reasons.
    """
    s = settings or VerdictSettings()
    _check(figures, methods_info, s)
    used: pd.DataFrame = figures.loc[figures["figure"].isin(list(RANGES))]
    present = set(figures["method"])
    methods = [*methods_info, *(b for b in s.baselines if b in present and b not in methods_info)]
    # Values given, and NaN among them.
    counts = {
        key: (len(v), int(np.isnan(v.to_numpy(float)).sum())) for key, v in used.groupby(["method", "figure"])["value"]
    }
    values = {
        figure: used.loc[used["figure"] == figure]
        .pivot(index="method", columns="example", values="value")
        .reindex(index=methods)
        .astype(float)
        for figure in RANGES
    }
    intervals = {
        figure: bootstrap(
            table.to_numpy(),
            "median" if figure == "completeness_gap" else "mean",
            n_resamples=s.n_resamples,
            level=s.level,
            seed=s.seed,
        )
        for figure, table in values.items()
    }
    n_examples = {m: len(set(e)) for m, e in used.dropna(subset="value").groupby("method")["example"]}
    candidates = [m for m in methods if m not in s.baselines]
    test = _against_baselines(values["faithfulness"], candidates, s)
    corrected = holm(test.p)
    # The best that the corrected p values could have been with these numbers of examples.
    attainable = holm(np.where(test.n > 0, test.smallest_p, np.nan))
    n_tests = int((test.n > 0).sum())
    needed = floor(log2(max(n_tests, 1) / s.alpha)) + 1  # smallest n with n_tests / 2^n < alpha

    rows = {}
    for i, method in enumerate(methods):
        evidence = {figure: _Evidence.of(interval, i) for figure, interval in intervals.items()}
        claims = methods_info.get(method, Claims())
        findings: list[_Finding] = []
        further, notes = _further_rules(evidence, claims, s)
        notes += [
            f"{missing} of {rows_measured} values of {figure} are NaN and were left out"
            for figure in RANGES
            for rows_measured, missing in [counts.get((method, figure), (0, 0))]
            if missing
        ]
        p = np.full(len(s.baselines), np.nan)
        if method in s.baselines:
            findings.append(_Finding("do not believe", "a baseline: it knows nothing of the network"))
            notes = [note for note in notes if not note.startswith(_NOT_CHECKED)]
        else:
            j = candidates.index(method)
            p = corrected[j]
            for k, baseline in enumerate(s.baselines):
                if test.n[j, k] == 0:
                    findings.append(_Finding("undecided", f"faithfulness was not evaluated against {baseline}"))
                    continue
                other = _Evidence.of(intervals["faithfulness"], methods.index(baseline))
                comparison = _Comparison(
                    baseline, float(test.difference[j, k]), float(p[k]), float(attainable[j, k]), int(test.n[j, k])
                )
                findings.append(_faithfulness(evidence["faithfulness"], other, comparison, needed, s))
            if not evidence["randomisation_similarity"].has_interval:
                why = evidence["randomisation_similarity"].why_missing
                findings.append(_Finding("undecided", f"randomisation_similarity was not evaluated ({why})"))
        findings += further
        worst = max((VERDICTS.index(f.verdict) for f in findings), default=0)
        against = sorted((f for f in findings if f.verdict != "believe"), key=lambda f: -VERDICTS.index(f.verdict))
        row: dict[str, object] = {
            "verdict": VERDICTS[worst],
            "reasons": [f.sentence for f in against or findings],
            "notes": notes,
            "n_examples": n_examples.get(method, 0),
        }
        for figure, e in evidence.items():
            row |= {figure: e.value, f"{figure}_low": e.low, f"{figure}_high": e.high}
        row |= {f"faithfulness_p_{b}": float(v) for b, v in zip(s.baselines, p, strict=True)}
        row["faithfulness_p"] = float(p.max())
        rows[method] = row
    columns = ["verdict", "reasons", "notes", "n_examples"]
    columns += [f"{figure}{end}" for figure in RANGES for end in ("", "_low", "_high")]
    columns += [*(f"faithfulness_p_{b}" for b in s.baselines), "faithfulness_p"]
    index = pd.Index(list(rows), name="method", dtype="str")
    return pd.DataFrame(list(rows.values()), index=index, columns=columns)


_NOT_CHECKED = "not checked: "


class _Finding(NamedTuple):
    """What one rule says."""

    verdict: str
    sentence: str


class _Comparison(NamedTuple):
    """A method against one baseline."""

    baseline: str
    difference: float
    p: float  # corrected
    attainable: float  # the smallest that the corrected p could have been
    n: int


class _Evidence(NamedTuple):
    """One figure of one method."""

    value: float
    low: float
    high: float
    n: int

    @classmethod
    def of(cls, interval: Interval, i: int) -> _Evidence:
        return cls(float(interval.value[i]), float(interval.low[i]), float(interval.high[i]), int(interval.n[i]))

    @property
    def has_interval(self) -> bool:
        return self.n >= 2

    @property
    def why_missing(self) -> str:
        return "no value" if self.n == 0 else "one example has no interval"

    def __str__(self) -> str:
        interval = f" [{_number(self.low)}, {_number(self.high)}]" if self.has_interval else ""
        return f"{_number(self.value)}{interval}"


def _against_baselines(values: pd.DataFrame, candidates: list[str], s: VerdictSettings) -> PairedTest:
    """Rule 1's tests, (candidates, baselines), on the examples that both have."""
    ours = values.reindex(index=candidates).to_numpy()[:, None, :]
    theirs = values.reindex(index=list(s.baselines)).to_numpy()[None, :, :]
    n_tests = len(candidates) * len(s.baselines)
    patterns = max(s.n_permutations, ceil(10 * n_tests / s.alpha))
    return paired_test(ours, theirs, "greater", n_permutations=patterns, seed=s.seed)


def _faithfulness(ours: _Evidence, theirs: _Evidence, c: _Comparison, needed: int, s: VerdictSettings) -> _Finding:
    """Rule 1 against one baseline."""
    # What was found comes first, up to the colon; then the numbers.
    figures = f"insertion − deletion {ours} against {theirs}"
    detail = f"(mean difference {_number(c.difference)}, {_p(c.p)}, {_examples(c.n)})"
    if c.difference > 0 and c.p < s.alpha:
        return _Finding("believe", f"above {c.baseline}: {figures} {detail}")
    if c.difference > 0 and c.attainable >= s.alpha:
        return _Finding(
            "undecided",
            f"too few examples to show it above {c.baseline}: {figures} (mean difference {_number(c.difference)}, "
            f"{_examples(c.n)}, smallest attainable {_p(c.attainable)}); at least {needed} are needed",
        )
    found = "not shown to be above" if c.difference > 0 else "not above"
    return _Finding("do not believe", f"{found} {c.baseline}: {figures} {detail}")


def _further_rules(
    evidence: Mapping[str, _Evidence], claims: Claims, s: VerdictSettings
) -> tuple[list[_Finding], list[str]]:
    """Rules 2 to 6, each where it applies and has what it needs; and notes of what was left out."""
    findings: list[_Finding] = []
    unchecked: list[str] = []

    def rule(figure: str, verdict: str, failed: bool, bad: str, good: str) -> None:
        e = evidence[figure]
        if not (e.has_interval or (figure == "completeness_gap" and e.n)):
            unchecked.append(f"{figure} ({e.why_missing})")
        elif failed:
            findings.append(_Finding(verdict, bad))
        else:
            findings.append(_Finding("believe", good))

    e = evidence["randomisation_similarity"]
    limit = s.randomisation_similarity
    rule(
        "randomisation_similarity", "do not believe", e.low > limit,
        f"unmoved by randomising the weights: rank correlation {e} is above {_number(limit)}",
        f"moved by randomising the weights: rank correlation {e} is not above {_number(limit)}",
    )  # fmt: skip
    if claims.class_discriminative:
        e, limit = evidence["logit_similarity"], s.logit_similarity
        rule(
            "logit_similarity", "with care", e.low > limit,
            f"does not depend on which class is explained: rank correlation {e} is above {_number(limit)}",
            f"depends on which class is explained: rank correlation {e} is not above {_number(limit)}",
        )  # fmt: skip
    chance = 1 / s.grid_side**2
    for figure in ("gridpg", "difull"):
        e = evidence[figure]
        rule(
            figure, "with care", not e.low > chance,
            f"{figure} not above chance: {e}, chance is {_number(chance)}",
            f"{figure} above chance: {e}, chance is {_number(chance)}",
        )  # fmt: skip
    if claims.complete:
        e, limit = evidence["completeness_gap"], s.completeness_gap
        rule(
            "completeness_gap", "with care", e.value > limit,
            f"incomplete: the median gap {e} is above {_number(limit)}",
            f"complete: the median gap {e} is not above {_number(limit)}",
        )  # fmt: skip
    e, limit = evidence["max_sensitivity"], s.max_sensitivity
    rule(
        "max_sensitivity", "with care", e.high > limit,
        f"unstable: under small input noise the map changes by {e} of its norm, not clearly below {_number(limit)}",
        f"stable: under small input noise the map changes by {e} of its norm, not above {_number(limit)}",
    )  # fmt: skip
    return findings, [_NOT_CHECKED + what for what in unchecked]


def _check(figures: pd.DataFrame, methods_info: Mapping[str, Claims], s: VerdictSettings) -> None:
    """Raise InputError for figures that cannot be judged."""
    missing = [c for c in ("method", "figure", "example", "value") if c not in figures.columns]
    if missing:
        raise InputError(f"figures lack the columns {missing}; they have {list(figures.columns)}")
    keys: pd.DataFrame = figures.loc[:, ["method", "figure", "example"]]
    if keys.isna().to_numpy().any():
        raise InputError("figures have rows without a method, a figure or an example")
    if keys.duplicated().any():
        first = keys.loc[keys.duplicated()].iloc[0]
        raise InputError(f"two values of {first['figure']!r} for {first['method']!r} and example {first['example']!r}")
    unknown = sorted(set(figures["method"]) - set(methods_info) - set(s.baselines))
    if unknown:
        raise InputError(f"methods {unknown} have figures but no entry in methods_info")
    if len(figures) and figures["value"].dtype.kind not in "biuf":
        raise InputError(f"values must be numbers, got the type {figures['value'].dtype}")
    for figure, (low, high) in RANGES.items():
        value = figures.loc[figures["figure"] == figure, "value"].to_numpy(dtype=np.float64)
        if np.isinf(value).any():
            raise InputError(f"{figure} holds infinite values; give NaN for what could not be measured")
        wrong = value[(value < low - 1e-6) | (value > high + 1e-6)]
        if wrong.size:
            raise InputError(f"{figure} must lie in [{low:g}, {high:g}], got {wrong[0]:g}")


def _number(x: float) -> str:
    """Three significant digits, rounding errors as 0, a true minus sign."""
    return f"{round(x, 9) + 0.0:.3g}".replace("-", "−")


def _p(p: float) -> str:
    return "p < 0.001" if p < 0.001 else f"p = {p:.2g}"


def _examples(n: int) -> str:
    return "1 example" if n == 1 else f"{n} examples"

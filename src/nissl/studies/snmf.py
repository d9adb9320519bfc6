"""Shafran et al.: Decomposing MLP activations into interpretable features via semi-nonnegative matrix factorization (2025).

Measured on planted features, whose truth is known, and, where the packaged model is installed, on layer 15 of SmolLM2-135M with
120 sentences about food, weather and code: features are chosen on three quarters of the sentences and measured on the rest.
The thresholds below were written down before the first run; that of `AUC` after a first look, as the paper gives none.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from typing import Any, Literal, overload

import numpy as np
import pandas as pd
import torch
from rich.console import Console
from torch import Tensor

from nissl.concepts import (
    Features,
    HierarchicalSemiNMF,
    SemiNMF,
    TokenActivations,
    difference_in_means,
    explained_variance,
    token_activations,
    train_sae,
)
from nissl.errors import MissingExtraError
from nissl.network import Edit, LanguageModel, Pass, Set
from nissl.runner import Runner
from nissl.studies.claims import at_least, stated
from nissl.trust.statistics import bootstrap

COSINE = 0.93
AHEAD_OF_DENSE = 0.25
AHEAD_OF_NMF = 0.15
RISE = 1e-6
CHILDREN = 9
AUC = 0.9
LAYER = 15
FEATURES = 12
KLS = (0.1, 0.5)
"""Divergences at which steering is compared; the paper goes from 0.025 to 0.5."""


def run(quick: bool = False, seed: int = 0, progress: bool = True) -> list[dict[str, Any]]:
    """Measure the paper's claims.

    Parameters
    ----------
    quick : bool, default False
        One planted data set and no language model, in seconds.
    seed : int, default 0
    progress : bool, default True
        Show progress and the tables behind the claims (on stderr).

    Returns
    -------
    list of dict
        ``claim``, ``paper`` (what it says), ``ours``, ``interval`` (95 % bootstrap over seeds, or over seeds and sentences),
        ``baseline`` and ``holds``.
    """
    console = Console(stderr=True, quiet=not progress)
    seeds = [seed + i for i in range(1 if quick else 5)]
    table = pd.DataFrame([on_planted(s) for s in seeds])
    console.print("planted features: mean cosine", table)
    found, rivals = table["snmf"].to_numpy(), table[["dense", "svd", "kmeans"]].max(axis=1).to_numpy()
    claims = [
        at_least("planted features: cosine with those found", "(recovers features)", found, COSINE, float(rivals.mean())),
        at_least("planted: cosine minus the best of dense, SVD and k-means", "(ahead)", found - rivals, AHEAD_OF_DENSE, 0.0),
        at_least("planted: cosine minus NMF of clipped activations", "(ahead)", found - table["nmf"], AHEAD_OF_NMF, 0.0),
        at_least("planted: cosine minus a TopK SAE of the same size", "(none)", found - table["sae"], 0.0, 0.0),
        stated(f"dense updates: largest relative rise of the loss, at most {RISE:g}", "never rises",
             bootstrap(table["rise"]), 0.0, bool(table["rise"].max() <= RISE)),
    ]  # fmt: skip
    right = np.array([on_families(s, 2 if quick else 5) for s in seeds], dtype=float)
    console.print(f"families: features that go to their parent, of 10: {right.astype(int).tolist()}")
    claims.append(stated(f"families: features of 10 that go to their parent, at least {CHILDREN} for every seed",
                       "related features share parents", bootstrap(right), 10 / 3, bool(right.min() >= CHILDREN)))  # fmt: skip
    if quick:
        return claims
    try:
        network = LanguageModel.load("smollm2")
    except MissingExtraError as error:
        warnings.warn(f"the claims on SmolLM2 are not measured: {error}", stacklevel=2)
        return claims
    split = [on_smollm2(network, s, progress) for s in seeds[:3]]
    detected, steered = (pd.concat([t[i] for t in split], ignore_index=True) for i in (0, 1))
    console.print(detected.pivot_table(["auc", "score"], "method", "topic", aggfunc="mean"))
    console.print(steered.pivot_table("gain", ["kl", "method"], "topic", aggfunc="mean"))
    return claims + list(_on_language(detected, steered, seed))


# ---------------------------------------------------------------- what is measured


def on_planted(seed: int, iterations: int = 600) -> dict[str, float]:
    """Mean cosine of planted features with those that each method finds; and how far the dense loss rises."""
    from sklearn.cluster import KMeans
    from sklearn.decomposition import NMF

    a, z, _ = planted(seed)
    k = len(z)
    settings: Any = {
        "max_iter": iterations,
        "tol": 0.0,
        "patience": iterations,
        "random_state": seed,
        "progress": False,
    }
    dense = SemiNMF(k, sparsity=None, reseed=False, **settings).fit(a)
    curve = np.array(dense.loss_curve_)
    x = torch.from_numpy(a)
    trained = [
        train_sae(a, k, active=4, steps=600, batch=128, lr=3e-3, seed=seed + i, progress=False) for i in range(3)
    ]
    sae = max(trained, key=lambda s: explained_variance(x, s(x)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # NMF says that it did not converge; more steps change little
        nmf = NMF(k, init="random", random_state=seed, max_iter=500).fit(a.clip(0)).components_  # pyright: ignore
    found = {
        "snmf": SemiNMF(k, sparsity=0.05, n_init=3, **settings).fit(a).components_,
        "dense": dense.components_,
        "kmeans": KMeans(k, n_init=3, random_state=seed).fit(a).cluster_centers_,  # pyright: ignore
        "nmf": nmf,
        "sae": sae.directions.numpy(),
    }
    cosines = {name: float(matched(z, c).mean()) for name, c in found.items()}
    svd = np.linalg.svd(a, full_matrices=False)[2][:k]
    cosines["svd"] = float(matched(z, svd, signed=False).mean())
    return {"seed": seed, **cosines, "rise": float((np.diff(curve) / curve[:-1]).max())}


def plot_recovery(table: pd.DataFrame, ax: Any = None) -> Any:
    """Picture of how well methods find planted features: a dot a seed, from rows of `on_planted`."""
    import matplotlib.pyplot as plt

    names = {"snmf": "semi-NMF, 5 % of neurons", "sae": "TopK SAE", "nmf": "NMF, clipped", "svd": "SVD",
             "dense": "semi-NMF, dense", "kmeans": "k-means"}  # fmt: skip
    if ax is None:
        _, ax = plt.subplots(figsize=(6, 2.8), layout="constrained")
    for row, key in enumerate(names):
        ax.plot(table[key], [row] * len(table), "o", color="#0072b2" if key == "snmf" else "#7f7f7f", alpha=0.7)
    ax.set_yticks(range(len(names)), list(names.values()))
    ax.invert_yaxis()
    ax.axvline(COSINE, color="#d55e00", linestyle="--", linewidth=1)
    ax.set_xlim(0.4, 1.02)
    ax.set_xlabel("cosine of planted and found features, mean over features")
    return ax


def on_families(seed: int, restarts: int = 5) -> int:
    """How many of ten planted features have their largest weight at the parent of their family."""
    a, z, parent = planted_families(seed)
    model = HierarchicalSemiNMF(
        (len(z), 3), sparsity=(0.05, 0.12), n_init=restarts, max_iter=600, tol=1e-6, random_state=seed, progress=False
    ).fit(a)
    return assigned(model, z, parent)


def assigned(model: HierarchicalSemiNMF, features: np.ndarray, parent: np.ndarray) -> int:
    """Planted features whose match goes to the upper feature that most of its family goes to, each family to another."""
    from scipy.optimize import linear_sum_assignment

    order = matched(features, model.levels_[0].components, index=True)
    label = model.levels_[1].weights[order].argmax(1)
    counts = np.zeros((parent.max() + 1, model.levels_[1].weights.shape[1]))
    np.add.at(counts, (parent, label), 1)
    return int(counts[linear_sum_assignment(-counts)].sum())


def on_smollm2(network: LanguageModel, seed: int, progress: bool = False) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Detection and steering by features of three dictionaries and by differences in means, on sentences not seen.

    Returns
    -------
    detection : DataFrame
        For each method and topic: AUC of the feature chosen, and the score of Shafran et al.
    steering : DataFrame
        For each method, topic and sentence of it not seen: gain of its log-likelihood a token under steering, in nats, less the
        mean gain of the other topics' sentences.
    """
    rng = np.random.default_rng(seed)
    topic = np.repeat(list(TOPICS), [len(t) for t in TOPICS.values()])
    texts = np.array([t for sentences in TOPICS.values() for t in sentences])
    order = rng.permutation(len(texts))
    unseen = np.concatenate([order[topic[order] == name][:10] for name in TOPICS])
    seen = np.setdiff1d(order, unseen)
    runner = Runner(memory=0, progress=progress)
    site = network.anatomy.site("neurons", LAYER)
    train, test = (token_activations(network, texts[i].tolist(), site, runner=runner) for i in (seen, unseen))
    snmf = SemiNMF(FEATURES, sparsity=0.02, random_state=seed, progress=False).fit(train.values)
    small = train_sae(train.values, FEATURES, active=4, steps=1500, batch=256, seed=seed, progress=False)
    wide = train_sae(train.values, 8 * FEATURES, active=8, steps=1500, batch=256, seed=seed, progress=False)
    noise = rng.standard_normal((FEATURES, train.values.shape[1])).astype(np.float32)
    dictionaries = {"snmf": snmf.components_, "sae": small.directions, "wide sae": wide.directions, "random": noise}
    rows: list[dict[str, Any]] = []
    gains: list[pd.DataFrame] = []
    gain_of = Likelihood(network, texts[unseen].tolist())
    for name in TOPICS:
        member = topic[unseen] == name
        inside = train.values[np.isin(train.text, np.flatnonzero(topic[seen] == name))]
        outside = train.values[np.isin(train.text, np.flatnonzero(topic[seen] != name))]
        candidates = {**dictionaries, "diffmean": difference_in_means(inside, outside)}
        for method, directions in candidates.items():
            features = Features(network, LAYER, _alive(directions))
            chosen = int(_detection(features, train, topic[seen] == name).auc.argmax())
            found = _detection(features, test, member)
            rows.append({"seed": seed, "topic": name, "method": method, "auc": float(found.auc[chosen]),
                         "score": float(found.score[chosen])})  # fmt: skip
            for kl in KLS:
                edit, strength = features.steer(chosen, kl)
                gain = gain_of(edit) if strength.reachable else np.full(len(unseen), np.nan)
                # what merely flattens the distribution, or helps all topics alike, gains nothing
                lift = gain[member] - gain[~member].mean()
                gains.append(pd.DataFrame({"seed": seed, "topic": name, "method": method, "kl": kl, "gain": lift}))
    return pd.DataFrame(rows), pd.concat(gains, ignore_index=True)


def _alive(directions: Any) -> Tensor:
    d = torch.as_tensor(directions).float()
    d = d[None] if d.ndim == 1 else d
    return d[d.norm(dim=1) > 0]


def _detection(features: Features, activations: TokenActivations, inside: np.ndarray) -> Any:
    return features.detection(activations.of(np.flatnonzero(inside)), activations.of(np.flatnonzero(~inside)))


class Likelihood:
    """Log-likelihood of texts under edits at `LAYER` or above, less that without; the blocks below run once."""

    def __init__(self, network: LanguageModel, texts: Sequence[Any]) -> None:
        self.network, self.inputs = network, network.encode(texts, side="right", keep=0)
        self.site = network.anatomy.site("resid_pre", LAYER)
        answer = network.run(Pass(self.inputs, read=[self.site]))
        self.before = Set(self.site, answer.reads[self.site])
        self.plain = self._of(answer.output)

    def __call__(self, edit: Edit) -> np.ndarray:
        """Gain in mean log-probability of the tokens after the first, in nats, (n_texts,)."""
        return self._of(self.network.run(Pass(self.inputs, [self.before, edit])).output) - self.plain

    def _of(self, output: Tensor | None) -> np.ndarray:
        assert output is not None
        ids, mask = self.inputs["input_ids"][:, 1:], self.inputs["attention_mask"][:, 1:]
        log_p = output[:, :-1].log_softmax(-1).gather(2, ids[..., None])[..., 0]
        return ((log_p * mask).sum(1) / mask.sum(1)).numpy()


# ---------------------------------------------------------------- claims


def _on_language(detected: pd.DataFrame, steered: pd.DataFrame, seed: int) -> Iterator[dict[str, Any]]:
    def auc(method: str) -> np.ndarray:
        return np.asarray(detected.loc[detected["method"] == method, "auc"])

    def gain(method: str, kl: float) -> np.ndarray:
        return np.asarray(steered.loc[(steered["method"] == method) & (steered["kl"] == kl), "gain"])

    best = auc("snmf").reshape(-1, len(TOPICS))
    topics = (best >= AUC).sum(1)
    yield stated(f"SmolLM2: topics of 3 that a feature detects on unseen sentences (AUC at least {AUC:g}), at least 2",
               "features detect concepts", bootstrap(topics, seed=seed), 0.0, bool((topics >= 2).all()))  # fmt: skip
    yield at_least(
        "SmolLM2: AUC of the chosen feature", "detects concepts", auc("snmf"), 0.0, float(auc("random").mean()), seed
    )
    for rival, paper in (("sae", "(comparable or better)"), ("wide sae", "(comparable or better)"), ("diffmean", "-")):
        yield at_least(f"SmolLM2: AUC minus that of {rival}", paper, auc("snmf") - auc(rival), 0.0, 0.0, seed)
    for kl in KLS:
        ours = gain("snmf", kl)
        yield at_least(f"SmolLM2: steering at {kl:g} nats, gain of the topic's log-likelihood a token over other topics",
                     "steers", ours, 0.0, 0.0, seed)  # fmt: skip
        for rival in ("sae", "wide sae", "diffmean", "random"):
            claim = f"SmolLM2: steering at {kl:g} nats, gain minus that of {rival}"
            yield at_least(claim, "above", ours - gain(rival, kl), 0.0, 0.0, seed)


# ---------------------------------------------------------------- planted structure


def planted(
    seed: int, n: int = 800, d: int = 300, k: int = 10, size: int = 12, shared: int = 4, active: int = 4
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Activations made of known features.

    Each feature is a group of `size` neurons with entries ±U(.5, 1.5), `shared` of them also in the group before it; each
    token uses `active` features with weights U(.5, 1.5). Gaussian noise of a quarter of the standard deviation is added.

    Returns
    -------
    activations : ndarray (n, d), float32
    features : ndarray (k, d)
    weights : ndarray (n, k)
    """
    rng = np.random.default_rng(seed)
    order, at = rng.permutation(d), 0
    features, group = np.zeros((k, d)), order[:0]
    for feature in features:
        old = rng.choice(group, shared, replace=False) if len(group) else group
        new = order[at : at + size - len(old)]
        at += len(new)
        group = np.concatenate([old, new])
        feature[group] = _entries(rng, size)
    weights = np.zeros((n, k))
    for row in weights:
        row[rng.choice(k, active, replace=False)] = rng.uniform(0.5, 1.5, active)
    return _noisy(rng, weights @ features), features, weights


def planted_families(
    seed: int, n: int = 800, d: int = 300, families: tuple[int, ...] = (3, 3, 4), size: int = 12, shared: int = 4
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Activations made of features in families: neighbours in a family share neurons, with the same entries.

    Each token uses two features of one family.

    Returns
    -------
    activations : ndarray (n, d), float32
    features : ndarray (k, d)
    parent : ndarray (k,) of int
        The family of each feature.
    """
    rng = np.random.default_rng(seed)
    parent = np.repeat(np.arange(len(families)), families)
    order, at = rng.permutation(d), 0
    features = np.zeros((len(parent), d))
    for j, feature in enumerate(features):
        fresh = size
        if j and parent[j] == parent[j - 1]:
            old = rng.choice(np.flatnonzero(features[j - 1]), shared, replace=False)
            feature[old] = features[j - 1][old]
            fresh -= shared
        feature[order[at : at + fresh]] = _entries(rng, fresh)
        at += fresh
    weights = np.zeros((n, len(parent)))
    for row in weights:
        children = np.flatnonzero(parent == rng.integers(len(families)))
        row[rng.choice(children, 2, replace=False)] = rng.uniform(0.5, 1.5, 2)
    return _noisy(rng, weights @ features), features, parent


def _entries(rng: np.random.Generator, n: int) -> np.ndarray:
    return rng.choice([-1.0, 1.0], n) * rng.uniform(0.5, 1.5, n)


def _noisy(rng: np.random.Generator, clean: np.ndarray) -> np.ndarray:
    return (clean + 0.25 * clean.std() * rng.standard_normal(clean.shape)).astype(np.float32)


@overload
def matched(
    planted: np.ndarray, found: np.ndarray, signed: bool = True, index: Literal[False] = False
) -> np.ndarray: ...
@overload
def matched(planted: np.ndarray, found: np.ndarray, signed: bool = True, *, index: Literal[True]) -> np.ndarray: ...
def matched(planted: np.ndarray, found: np.ndarray, signed: bool = True, index: bool = False) -> np.ndarray:
    """Cosine of each planted feature with the one it is paired with, in the pairing with the largest sum.

    Parameters
    ----------
    planted, found : ndarray (k, d)
    signed : bool, default True
        Whether a feature that points the other way is wrong.
    index : bool, default False
        Give the number of the partner instead of the cosine.
    """
    from scipy.optimize import linear_sum_assignment

    unit = [v / np.maximum(np.linalg.norm(v, axis=1, keepdims=True), 1e-12) for v in (planted, found)]
    cosine = unit[0] @ unit[1].T
    cosine = cosine if signed else np.abs(cosine)
    rows, columns = linear_sum_assignment(-cosine)
    return columns if index else cosine[rows, columns]


# ---------------------------------------------------------------- sentences

_SENTENCES = {
    "food": """The soup needs a little more salt and some fresh parsley.
She baked two loaves of bread before breakfast.
We ate grilled fish with lemon and roasted potatoes.
The chef sliced the onions and fried them in butter.
My grandmother makes the best apple pie in the village.
He ordered a pizza with mushrooms and extra cheese.
The rice was still hot when they served the curry.
Add two eggs and a cup of sugar to the flour.
They drank coffee and shared a slice of chocolate cake.
The tomatoes from the garden taste sweet this year.
For lunch I had a sandwich with ham and mustard.
The pasta should boil for nine minutes in salted water.
A bowl of noodles costs less than a steak.
She spread honey and jam on the warm toast.
The kitchen smelled of garlic and fresh basil.
We bought cherries and peaches at the market.
He peeled the carrots and put them into the stew.
The waiter brought us a salad with olives and cucumber.
Children love pancakes with maple syrup.
The roast chicken was dry, but the gravy was good.
Pour the milk slowly and whisk the batter.
They cooked beans with bacon over the fire.
The dessert was vanilla ice cream with strawberries.
I prefer green tea with a spoonful of sugar.
The butcher sells sausages and smoked ham.
Her favourite dish is lamb with rosemary.
Let the dough rest before you roll it out.
The restaurant serves oysters and white wine.
He burned the toast and spilled the orange juice.
A pinch of pepper improves the sauce.
We grilled corn and burgers in the yard.
The cheese was soft and tasted of nuts.
She packed grapes, crackers and yogurt for the trip.
The baker sold all his rolls by eight.
Stir the porridge so that it does not stick.
They roasted a turkey and baked sweet potatoes.
The lemonade was cold and a little sour.
Cut the melon into small cubes and chill it.
He likes his eggs scrambled with chives.
The cookies were crisp and full of almonds.""",
    "weather": """The rain stopped at noon and the sun came out.
Heavy snow is expected in the mountains tonight.
A cold wind blew from the north all day.
The forecast says it will be cloudy tomorrow.
Thunder rolled over the valley after midnight.
It was the hottest summer in twenty years.
Thick fog covered the coast this morning.
The storm brought hail and strong gusts.
Temperatures will fall below zero by the weekend.
The sky was clear and the air was dry.
Light showers are likely in the afternoon.
The hurricane moved slowly toward the islands.
Frost covered the fields before sunrise.
After weeks of drought the first drops fell.
The humidity made the heat hard to bear.
A warm breeze came in from the sea.
Lightning struck the tower during the storm.
The winter was mild and almost without snow.
Dark clouds gathered above the hills.
The blizzard closed every road in the county.
It drizzled all morning and then grew windy.
The barometer dropped as the front approached.
We had sunshine and blue skies all week.
Icy rain made the pavement slippery.
The monsoon begins in June and lasts for months.
A rainbow appeared after the shower.
The night will be cool with patchy mist.
Strong winds are forecast along the coast.
The snow melted quickly in the spring sun.
The tornado lasted only a few minutes.
Autumn began with grey skies and steady rain.
The heat wave will end on Thursday.
Hailstones as large as marbles fell on the town.
The morning was chilly, but the afternoon was warm.
The clouds broke and the moon was visible.
Flood warnings followed three days of rain.
The air felt damp before the thunderstorm.
A high pressure system keeps the sky clear.
The wind turned and the temperature fell sharply.
Sleet and snow are mixed in the lowlands.""",
    "code": """def add(a, b): return a + b
for i in range(10): print(i)
import numpy as np
if x is None: raise ValueError("x is missing")
const total = items.reduce((a, b) => a + b, 0);
public static void main(String[] args) {
while (node != null) { node = node.next; }
SELECT name, age FROM users WHERE age > 30;
let result = array.map(x => x * 2);
class Stack: def __init__(self): self.items = []
int main(void) { printf("hello"); return 0; }
try: value = int(text) except ValueError: value = 0
return sorted(words, key=len)
std::vector<int> v; v.push_back(3);
function isEven(n) { return n % 2 === 0; }
with open(path) as file: data = file.read()
#include <stdio.h>
git commit -m "fix typo in parser"
df = pd.read_csv("data.csv")
lambda x: x ** 2 + 1
assert len(result) == 3, "wrong length"
var i = 0; i < list.length; i++
print(f"{name} has {count} items")
private int count = 0;
fn main() { println!("{}", x); }
if (ptr == NULL) { free(buffer); return -1; }
x = [i * i for i in range(n) if i % 2]
document.getElementById("menu").style.display = "none";
self.assertEqual(parse("1+2"), 3)
export default function App() { return null; }
model = Sequential(); model.add(Dense(64))
switch (key) { case 1: break; default: exit(); }
except KeyError as error: log.warning(error)
INSERT INTO orders (id, price) VALUES (1, 20);
from collections import defaultdict
char *s = malloc(n * sizeof(char));
elif value < low: low = value
type Point struct { X, Y float64 }
async function load() { await fetch(url); }
sum = sum + matrix[row][col];""",
}

TOPICS: dict[str, list[str]] = {name: text.splitlines() for name, text in _SENTENCES.items()}
"""Forty short sentences, or lines of code, for each topic."""

"""Descriptions: beam search is exhaustive search, lambda does what its formula says, labels follow information, edits repair."""

import itertools
import math

import pytest
import torch
from sklearn.metrics import mutual_info_score
from torch import nn
from torch.nn import functional as F

from nissl.concepts.descriptions import (
    PAD,
    START,
    STOP,
    UNKNOWN,
    Captioner,
    Description,
    Descriptions,
    LabelDescriber,
    Milan,
    Prior,
    Words,
    bleu,
    masked_features,
    mutual_information,
    plot_edit,
    words_of,
)
from nissl.concepts.exemplars import find_exemplars
from nissl.errors import InputError, SiteError
from nissl.network import Network

QUIET = {"progress": False}


class Colours(nn.Module):
    """Unit u of `maps` is channel u of the image; unit 3 is dead. Classes are the colours' largest values."""

    def __init__(self):
        super().__init__()
        self.maps = nn.Conv2d(3, 4, 1, bias=False)
        with torch.no_grad():
            self.maps.weight.copy_(torch.eye(4, 3)[:, :, None, None])

    def forward(self, x):
        return self.maps(x).amax((2, 3))[:, :3]


@pytest.fixture(scope="module")
def network():
    return Network(Colours())


@pytest.fixture(scope="module")
def images():
    """A square of one colour in each, another elsewhere in every third."""
    g = torch.Generator().manual_seed(0)
    x = 0.1 * torch.rand(90, 3, 12, 12, generator=g)
    for i in range(90):
        r, c = torch.randint(6, (2,), generator=g).tolist()
        x[i, i % 3, r : r + 3, c : c + 3] += 0.5 + 0.5 * torch.rand((), generator=g)
        if i % 3 == 0:
            x[i, 1, 9:11, 9:11] += 0.4
    return x


@pytest.fixture(scope="module")
def exemplars(network, images):
    return find_exemplars(network, images, "maps", k=4, quantile=0.95, **QUIET)


# ---------------------------------------------------------------- words and models


def test_words_keep_punctuation_and_stop_at_the_stop():
    words = Words.of(["Red things, round.", "the Things"])
    assert words.words[4:] == (",", ".", "red", "round", "the", "things")
    tokens = words.encode(["red things, round.", "purple", "red red red red red red red"], 7)
    assert tokens[0].tolist() == [6, 9, 4, 7, 5, STOP, PAD]
    assert tokens[1].tolist() == [UNKNOWN, STOP, PAD, PAD, PAD, PAD, PAD]
    assert tokens[2].tolist() == [6] * 7
    assert words.decode(tokens[0]) == "red things, round."
    assert words_of("A sword's Text-ure") == ["a", "sword", "'", "s", "text", "-", "ure"]


@pytest.fixture(scope="module")
def models():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        words = Words.of(["a b c"])
        captioner = Captioner(words, 6, embedding=5, hidden=7)
        prior = Prior(words, embedding=5, hidden=7)
        for p in [*captioner.parameters(), *prior.parameters()]:
            p.data.mul_(3)  # far from uniform
        return captioner, prior, torch.randn(2, 3, 6)


def test_beam_search_finds_what_exhaustive_search_finds(models):
    captioner, _, features = models
    texts = [t for n in range(1, 4) for t in itertools.product((4, 5, 6), repeat=n)]
    rows = [[*t, STOP] + [PAD] * (3 - len(t)) for t in texts if len(t) < 4]
    rows += [list(t) for t in itertools.product((4, 5, 6), repeat=4)]  # cut at the length
    every = torch.tensor(rows)
    tokens, found = captioner.beam(features, 200, 4)
    for i in range(2):
        log_p = captioner.log_p(features[i].expand(len(every), -1, -1), every)
        order = log_p.argsort(descending=True)
        assert torch.isfinite(found[i]).sum() == len(every)
        assert torch.allclose(found[i, : len(every)], log_p[order], atol=1e-5)
        assert torch.equal(tokens[i, :20], every[order[:20]])
    few, best = captioner.beam(features, 1, 4)  # greedy
    few = few[:, 0]
    v, keys, h, c = captioner.begin(features)
    token, total = torch.full((2,), START), torch.zeros(2)
    for t in range(4):
        log_p, _, h, c = captioner.step(token, v, keys, h, c)
        log_p[:, [PAD, START, UNKNOWN, *([] if t else [STOP])]] = -math.inf
        value, token = log_p.max(1)
        finished = (few[:, :t] == STOP).any(1)
        assert torch.equal(token[~finished], few[~finished, t])
        total += value * ~finished
    assert torch.allclose(total, best[:, 0], atol=1e-5)


def test_a_step_is_that_of_the_formulas(models):
    captioner, _, features = models
    captioner.eval()
    v, keys, h, c = captioner.begin(features)
    log_p, a, _, _ = captioner.step(torch.tensor([4, 5]), v, keys, h, c)
    p = dict(captioner.named_parameters())
    for i in range(2):
        mean = features[i].mean(0)
        h0 = torch.tanh(p["start_h.weight"] @ mean + p["start_h.bias"])
        c0 = torch.tanh(p["start_c.weight"] @ mean + p["start_c.bias"])
        q = p["query.weight"] @ h0 + p["query.bias"]
        energy = torch.stack(
            [p["score.weight"][0] @ torch.tanh(q + p["key.weight"] @ x + p["key.bias"]) for x in features[i]]
        )
        weights = energy.softmax(0)
        assert torch.allclose(weights, a[i], atol=1e-5)
        z = torch.sigmoid(p["gate.weight"] @ h0 + p["gate.bias"]) * (weights[:, None] * features[i]).sum(0)
        x = torch.cat([p["embed.weight"][4 + i], z])
        gates = p["cell.weight_ih"] @ x + p["cell.bias_ih"] + p["cell.weight_hh"] @ h0 + p["cell.bias_hh"]
        i_, f_, g_, o_ = gates.chunk(4)
        c1 = f_.sigmoid() * c0 + i_.sigmoid() * g_.tanh()
        h1 = o_.sigmoid() * c1.tanh()
        expected = (p["out.weight"] @ h1 + p["out.bias"]).log_softmax(0)
        assert torch.allclose(log_p[i], expected, atol=1e-5)


def test_probabilities_end_at_the_first_stop(models):
    captioner, prior, features = models
    short = torch.tensor([[4, STOP]])
    padded = torch.tensor([[4, STOP, PAD, PAD]])
    junk = torch.tensor([[4, STOP, 5, STOP]])
    for texts in (padded, junk):
        assert prior.log_p(texts) == pytest.approx(float(prior.log_p(short)), abs=1e-5)
        assert captioner.log_p(features[:1], texts) == pytest.approx(
            float(captioner.log_p(features[:1], short)), abs=1e-5
        )
    every = torch.tensor([[a, b] for a in range(7) for b in range(1, 7) if a != STOP])
    total = prior.log_p(torch.cat([every[every[:, 0] != PAD], torch.tensor([[STOP, PAD]])])).exp().sum()
    assert 0 < float(total) <= 1 + 1e-5  # padding and starts take the rest


# ---------------------------------------------------------------- lambda


class Fixed:
    """A world of three sentences: d names a set of |S_d| things, k exemplars are drawn from it."""

    words = Words.of(["animal dog poodle"])
    prior = torch.tensor([0.60, 0.05, 0.01]).log()
    sizes = torch.tensor([12.0, 4.0, 2.0]).log()
    tokens = torch.tensor([[4, STOP], [5, STOP], [6, STOP]])

    def __init__(self, k=None):
        self.k = k

    def beam(self, features, size, length):
        n = len(features)
        return self.tokens.expand(n, -1, -1), (self.prior - self.k * self.sizes).expand(n, -1)

    def log_p(self, *given):
        at = (given[-1][..., 0] - 4).reshape(-1)
        return (self.prior if self.k is None else self.prior - self.k * self.sizes)[at].reshape(given[-1].shape[:-1])


@pytest.mark.parametrize(
    ("k", "weight", "winner"),
    [
        (1, 0.0, 0), (1, 0.55, 0), (1, 0.5569, 0), (1, 0.5589, 1), (1, 0.56, 1), (1, 0.5683, 1), (1, 0.5703, 2), (1, 1.0, 2),
        (2, 0.0, 0), (2, 0.1148, 0), (2, 0.1168, 1),
        (2, 0.1376, 1), (2, 0.1396, 2), (2, 0.2, 2), (3, 0.0, 2),
    ],
)  # fmt: skip
def test_lambda_weighs_the_prior(network, exemplars, k, weight, winner):
    """Crossings in closed form: sentence i beats j where (1 - lambda) log(p_i / p_j) > k log(|S_i| / |S_j|)."""
    milan = Milan(network, ["maps"], weight=weight, captioner=Fixed(k), prior=Fixed(), **QUIET)
    said = milan.describe(exemplars)
    text = ["animal", "dog", "poodle"][winner]
    assert [d.text for d in said] == [text, text, text, ""]
    score = (1 - weight) * Fixed.prior[winner] - k * Fixed.sizes[winner]
    assert said[0].score == pytest.approx(float(score), abs=1e-5)
    assert said[0].log_p == pytest.approx(float(Fixed.prior[winner]), abs=1e-6)
    assert len(said[0].others) == 2
    table = milan.score(["animal", "poodle"], exemplars)
    expected = (1 - weight) * Fixed.prior - k * Fixed.sizes
    assert torch.allclose(table[:3], expected[[0, 2]].expand(3, -1), atol=1e-5)
    assert table[3].isnan().all()


# ---------------------------------------------------------------- features of the encoder


class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Conv2d(3, 5, 3, padding=1)
        self.b = nn.Conv2d(5, 4, 3, stride=2)

    def forward(self, x):
        return self.b(self.a(x).relu()).mean((2, 3))


def test_features_are_means_over_the_mask(exemplars, images):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = Encoder()
    encoder = Network(module)
    found = masked_features(exemplars, encoder, ["a", "b"])
    plain = masked_features(exemplars, encoder, ["a", "b"], masked=False)
    assert found.shape == (4, 4, 9)
    assert (found[3] == 0).all()  # the dead unit's masks are empty
    masks = exemplars.masks()
    for u, j in ((0, 0), (1, 3), (2, 2)):
        with torch.no_grad():
            a = module.a(images[exemplars.ids[u, j]][None])
            b = module.b(a.relu())
        expected, means = [], []
        for maps in (a, b):
            weights = F.interpolate(masks[u, j][None, None].float(), maps.shape[-2:], mode="bilinear", antialias=True)[
                0, 0
            ]
            expected.append((maps[0] * weights).sum((1, 2)) / weights.sum())
            means.append(maps[0].mean((1, 2)))
        assert torch.allclose(found[u, j], torch.cat(expected), atol=1e-5)
        assert torch.allclose(plain[u, j], torch.cat(means), atol=1e-5)


def test_training_describes_units_and_keeps_the_best_weights(network, images, monkeypatch):
    """Units that see a colour, from their features alone; the weights in the end are those of the best epoch."""
    g = torch.Generator().manual_seed(1)
    module = nn.Sequential(nn.Conv2d(3, 60, 1, bias=False))
    kind = torch.arange(60) % 3
    with torch.no_grad():
        module[0].weight.copy_(
            F.one_hot(kind, 3).float()[:, :, None, None] * (0.5 + torch.rand(60, 1, 1, 1, generator=g))
        )
    found = find_exemplars(Network(module), images, "0", k=3, quantile=0.95, **QUIET)
    names = ["red squares", "green squares", "blue squares"]
    texts = [[names[i], "a square"] if j % 5 == 0 else [names[i]] for j, i in enumerate(kind)]
    settings = {
        "hidden": 24,
        "embedding": 8,
        "rate": 0.01,
        "epochs": 40,
        "patience": 40,
        "dropout": 0.1,
        "held_out": 0.2,
    }
    states = []
    train = Milan._train

    def watched(self, model, loss_of, score_of, *rest):
        def score():
            value = score_of()
            states.append((type(model).__name__, value, {k: v.clone() for k, v in model.state_dict().items()}))
            return value

        return train(self, model, loss_of, score, *rest)

    monkeypatch.setattr(Milan, "_train", watched)
    milan = Milan(network, ["maps"], **settings, **QUIET).fit(found, texts)
    said = milan.describe(found)
    assert sum(d.text == names[i] for d, i in zip(said, kind, strict=True)) >= 57
    for kind_, model in (("Captioner", milan.captioner_), ("Prior", milan.prior_)):
        top = max(s[1] for s in states if s[0] == kind_)
        best = [s for s in states if s[0] == kind_ and s[1] == top][-1]
        assert all(torch.equal(v, best[2][k]) for k, v in model.state_dict().items())
    losses = milan.history_.loc["captioner", "loss"]
    assert losses.iloc[-1] < 0.5 * losses.iloc[0]
    assert not milan.captioner_.training


# ---------------------------------------------------------------- labels


def test_mutual_information_is_that_of_scikit_learn():
    g = torch.Generator().manual_seed(0)
    a = torch.rand(1000, generator=g) < 0.3
    for b in (
        torch.rand(1000, generator=g) < 0.4,
        a,
        ~a,
        a & (torch.rand(1000, generator=g) < 0.5),
        torch.zeros_like(a),
    ):
        found = mutual_information((a & b).double().mean(), a.double().mean(), b.double().mean())
        assert float(found) == pytest.approx(mutual_info_score(a.numpy(), b.numpy()) / math.log(2), abs=1e-9)


@pytest.mark.parametrize("places", [True, False])
def test_labels_follow_the_unit(network, images, exemplars, places):
    g = torch.Generator().manual_seed(5)
    bright = images > 0.35
    labels = torch.cat([bright, torch.rand(90, 1, 12, 12, generator=g) < 0.05], 1)
    labels = labels if places else labels.flatten(2).any(2)
    words = ["red", "green", "blue", "speckle"]
    for score in ("mutual information", "iou"):
        describer = LabelDescriber(score)
        said = describer.describe(exemplars, images, labels, words)
        if places:
            assert [d.text for d in said] == ["red", "green", "blue", ""]
        else:  # a label of the image: green is beside red in a third of them, and still tells most
            assert [said[0].text, said[2].text, said[3].text] == ["red", "blue", ""]
    fires = torch.cat([images, torch.zeros(90, 1, 12, 12)], 1) > exemplars.threshold[None, :, None, None]
    fires[:, 3] = False
    holds = labels if places else labels[:, :, None, None].expand(-1, -1, 12, 12)
    both, alone, held, n = LabelDescriber().counts(exemplars, images, labels)
    assert torch.equal(both, torch.einsum("nuij,nkij->uk", fires.double(), holds.double()))
    assert torch.equal(alone[:, 0], fires.sum((0, 2, 3)).double())
    assert torch.equal(held[0], holds.sum((0, 2, 3)).double())
    assert (n == 90 * 144).all()


# ---------------------------------------------------------------- auditing and editing


def said_of(network, *texts):
    return Descriptions(tuple(Description("maps", i, t, 0.0) for i, t in enumerate(texts)), network)


def test_search_finds_whole_words(network):
    said = said_of(network, "rough texture", "a sword on a wall", "Text, white", "")
    assert said.search("text") == [2]
    assert said.search("text", whole=False) == [0, 2]
    assert said.search(["word", "wall"]) == [1]
    assert said.search("on a") == [1]
    assert said.search("face") == []
    assert said.table()["text"].tolist()[2] == "Text, white"


class Misled(nn.Module):
    """Classes by units 0 and 1; units 2 and 3 see a mark that misleads, unit 4 is idle."""

    def __init__(self):
        super().__init__()
        self.maps = nn.Identity()
        self.register_buffer("w", torch.tensor([[1.0, -1, 3, 0, 0], [-1, 1, 0, 3, 0]]))

    def forward(self, x):
        return self.maps(x)[:, :, 0, 0] @ self.w.T


def test_an_edit_repairs_a_misled_network():
    network = Network(Misled())
    y = torch.arange(40) % 2
    clean = torch.zeros(40, 5, 1, 1)
    clean[torch.arange(40), y] = 1
    misled = clean.clone()
    misled[:30, 2] = 1  # says class 0
    misled[30:, 3] = 1
    said = said_of(network, "zero", "one", "white mark", "a mark", "remarkable")
    table = said.edit("mark", (misled, y), {"clean": (clean, y), "misled": (misled, y)}, draws=3)
    line = table[(table["method"] == "word") & (table["test"] == "misled")].set_index("n")
    # by hand: without edits half of each is wrong; unit 2 alone repairs 30 of 40, both repair all
    assert line["accuracy"].tolist() == pytest.approx([0.5, 0.875, 1.0])
    assert line["row"].tolist() == [-1, 2, 3]
    assert (table[(table["method"] == "word") & (table["test"] == "clean")]["accuracy"] == 1).all()
    assert set(table[table["method"] == "random"]["draw"]) == {0, 1, 2}
    every = table[(table["method"] == "all units") & (table["test"] == "misled")].set_index("n")
    assert every["accuracy"].iloc[1] == pytest.approx(0.875)
    ax = plot_edit(table, "misled")
    assert len(ax.lines) == 5
    with pytest.raises(InputError, match="no test"):
        plot_edit(table, "other")


def test_bleu():
    reference = [["the", "red", "round", "things"]]
    assert bleu([["the", "red", "round", "things"]], [reference]) == pytest.approx(1)
    # 4, 2, 1, 0 -> .5 matched of 5, 4, 3, 2 n-grams
    longer = ["the", "red", "very", "round", "things"]
    assert bleu([longer], [reference]) == pytest.approx((4 / 5 * 2 / 4 * 0.5 / 3 * 0.5 / 2) ** 0.25)
    # clipped: one of three; brevity
    assert bleu([["red", "red"]], [[["red", "a", "b", "c"]]], order=1) == pytest.approx(0.5 * math.exp(1 - 4 / 2))
    assert bleu([[]], [reference]) == 0


# ---------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"weight": -1.0}, "weight"), ({"beam": 0}, "beam"), ({"held_out": 1.0}, "held_out"), ({"dropout": -0.1}, "dropout"), ({"rate": 0.0}, "rate"),
        ({"captioner": Fixed(1)}, "prior"), ({"captioner": Fixed(1), "prior": Prior(Words.of(["x"]), 4, 4, 1)}, "different words"),
    ],
)  # fmt: skip
def test_bad_settings(network, settings, says):
    with pytest.raises(InputError, match=says):
        Milan(network, ["maps"], **settings)


def test_bad_questions(network, images, exemplars):
    with pytest.raises(SiteError, match="no module"):
        Milan(network, ["nowhere"])
    milan = Milan(network, ["maps"], **QUIET)
    with pytest.raises(InputError, match="fit"):
        milan.describe(exemplars)
    for texts, says in (
        ([["a"]], "4 units"),
        ([["a"], ["b"], [" "], []], "one word"),
        ([["a"], [], [], []], "too few"),
    ):
        with pytest.raises(InputError, match=says):
            milan.fit(exemplars, texts)
    assert milan.captioner_ is None
    with pytest.raises(InputError, match="score"):
        LabelDescriber("accuracy")
    good = torch.zeros(90, 2, dtype=torch.bool)
    for labels, words, says in (
        (good.float(), ["a", "b"], "bool"),
        (good[:5], ["a", "b"], "n = 90"),
        (good, ["a"], "1 words"),
        (torch.zeros(90, 2, 5, 5, dtype=torch.bool), ["a", "b"], "pixels"),
    ):
        with pytest.raises(InputError, match=says):
            LabelDescriber().describe(exemplars, images, labels, words)
    said = said_of(network, "red", "green", "blue", "")
    y = torch.zeros(90, dtype=torch.long)
    with pytest.raises(InputError, match="word"):
        said.search(" ")
    with pytest.raises(InputError, match="nothing to switch off"):
        said.edit("text", (images, y), {"t": (images, y)})
    with pytest.raises(InputError, match="as many labels"):
        said.edit("red", (images, y), {"t": (images, y[:3])})
    with pytest.raises(InputError, match="tests"):
        said.edit("red", (images, y), {})
    one_class = Network(nn.Sequential(nn.Conv2d(3, 1, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten()))
    one = Descriptions((Description("0", 0, "red", 0.0),), one_class)
    with pytest.raises(InputError, match="two classes"):
        one.edit("red", (images, y), {"t": (images, y)})

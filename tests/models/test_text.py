"""Reference classifiers against torch's own LSTM, and what training promises."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from nissl.attribution import DeepLIFT, IntegratedGradients
from nissl.errors import InputError
from nissl.models.text import AttentiveBiLSTM, BiLSTM, TextTransformer, Vocabulary, train_classifier
from nissl.network import Network


def test_the_lstm_is_that_of_torch():
    torch.manual_seed(0)
    theirs, ours = nn.LSTM(5, 4, batch_first=True, bidirectional=True).double(), BiLSTM(5, 4).double()
    x = torch.randn(3, 7, 5).double()

    def gates(name):  # theirs are in, forget, new, out; ours new, in, forget, out
        both = (getattr(theirs, name), getattr(theirs, f"{name}_reverse"))
        return [torch.cat([p[i * 4 : i * 4 + 4] for i in (2, 0, 1, 3)]) for p in both]

    ours.load_state_dict({
        "input.weight": torch.cat(gates("weight_ih_l0")), "state": torch.stack([w.T for w in gates("weight_hh_l0")]),
        "input.bias": torch.cat(gates("bias_ih_l0")) + torch.cat(gates("bias_hh_l0")),
    })  # fmt: skip
    torch.testing.assert_close(ours(x, torch.ones(3, 7, dtype=torch.bool)), theirs(x)[0])


@pytest.mark.parametrize("make", [AttentiveBiLSTM, TextTransformer])
def test_padding_changes_nothing(make):
    torch.manual_seed(0)
    model = make(20).eval()
    ids = torch.randint(1, 20, (4, 9))
    padded = F.pad(ids, (0, 5))
    torch.testing.assert_close(model(padded), model(ids))
    # a padding token inside a text is a place like others where the mask says so
    absent = ids.clone()
    absent[:, 4] = 0
    kept = model(absent, torch.ones_like(ids, dtype=torch.bool))
    assert (kept - model(absent)).abs().max() > 1e-4


@pytest.mark.parametrize("make", [AttentiveBiLSTM, TextTransformer])
def test_deeplift_is_complete_on_them(make):
    torch.manual_seed(0)
    model = make(20).double().eval()
    ids = torch.randint(1, 20, (3, 6))
    ids[1, 4:] = 0
    baselines = model.embedding(torch.randint(1, 20, (4, 6))).detach()
    net = Network(model)
    for baseline in (0.0, baselines):
        scores = DeepLIFT(baseline=baseline).attribute(net, ids, 1)
        assert scores.completeness_gap.max() < 1e-10
        with torch.no_grad():
            absent = baselines if isinstance(baseline, torch.Tensor) else torch.zeros_like(baselines[:1])
            handle = model.embedding.register_forward_hook(lambda m, a, out, b=absent: b)
            at_baseline = [model(row.expand(len(absent), -1))[:, 1].mean() for row in ids]
            handle.remove()
            promised = model(ids)[:, 1] - torch.stack(at_baseline)
        np.testing.assert_allclose(scores.sum(("token", "unit")), promised, rtol=1e-8)
    # averaged over baselines (DeepSHAP) it is the mean of single ones, and of one baseline repeated it is that one
    single = [DeepLIFT(baseline=b).attribute(net, ids, 1).values for b in baselines]
    np.testing.assert_allclose(scores, np.mean(single, 0), atol=1e-12)
    repeated = DeepLIFT(baseline=baselines[:1].repeat(5, 1, 1)).attribute(net, ids, 1)
    np.testing.assert_allclose(repeated, single[0], atol=1e-12)
    assert np.abs(single[0] - IntegratedGradients(baseline=baselines[0]).attribute(net, ids, 1).values).max() > 1e-6


def test_training_is_seeded_learns_and_touches_no_other_randomness():
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 20, (400, 6), generator=generator)
    labels = (ids == 7).any(1).long()
    state = torch.random.get_rng_state()

    def trained(seed, steps=60):
        return train_classifier(lambda: AttentiveBiLSTM(20), ids, labels, steps=steps, rate=1e-2, seed=seed)

    a, b, c = trained(1), trained(1), trained(2, steps=2)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert not a.training
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))
    assert any(not torch.equal(p, q) for p, q in zip(a.parameters(), c.parameters(), strict=True))
    new = torch.randint(3, 20, (300, 6), generator=generator)
    right = (a(new).argmax(1) == (new == 7).any(1)).float().mean()
    assert right > 0.97 > (new != 7).all(1).float().mean() + 0.1


def test_vocabulary():
    texts = [["a", "film", "a"], ["good", "film"], ["good", "[CLS]"]]
    words = Vocabulary.of(texts)
    assert words.words == ("[PAD]", "[CLS]", "[UNK]", "a", "film", "good")
    ids = words.encode([*texts, ["other", "a", "b", "c", "d", "e"]], 4)
    assert ids.tolist() == [[1, 3, 4, 3], [1, 5, 4, 0], [1, 5, 1, 0], [1, 2, 3, 2]]
    assert words.decode(ids[1]) == ["[CLS]", "good", "film", "[PAD]"]


@pytest.mark.parametrize(
    "wrong",
    [
        lambda x: train_classifier(lambda: AttentiveBiLSTM(5), x, torch.zeros(2, dtype=torch.long)),
        lambda x: train_classifier(lambda: AttentiveBiLSTM(5), x[:0], torch.zeros(0, dtype=torch.long)),
        lambda x: train_classifier(lambda: AttentiveBiLSTM(5), x, torch.zeros(4, dtype=torch.long), steps=0),
        lambda x: train_classifier(lambda: AttentiveBiLSTM(5), x, torch.zeros(4, dtype=torch.long), rate=0.0),
        lambda x: TextTransformer(5, width=10, heads=4),
        lambda x: TextTransformer(5, length=2)(x),
        lambda x: Vocabulary.of([["a"]]).encode([["a"]], 1),
    ],
)
def test_wrong_input_raises(wrong):
    with pytest.raises(InputError):
        wrong(torch.ones(4, 3, dtype=torch.long))

"""The quick study finds the planted causes; its helpers do what they say."""

import json

import numpy as np
import torch

from nissl.attribution.causal_paths import CausalPaths
from nissl.network import Network
from nissl.runner import Runner
from nissl.studies import causal_paths as study


def test_the_quick_study_holds_on_planted_chains():
    claims = study.run(quick=True, progress=False)
    assert len(claims) == 6
    assert all(c["holds"] for c in claims)
    assert claims[0]["baseline"] == 0.0  # the loudest units are not the causes
    json.dumps(claims)


def test_random_graphs_have_the_same_sizes():
    network, runner = Network(study.PlantedChain(0)), Runner(progress=False)
    graph = CausalPaths().find(network, study.planted_images(0, 0, 20), 0, runner=runner)
    other = graph.random(np.random.default_rng(0))
    assert [len(c.causes) for c in other.layers] == [len(c.causes) for c in graph.layers]
    assert other.layers[-1].effects.tolist() == [0]
    assert other.layers[0].effects.tolist() == other.layers[1].causes.tolist()
    assert other.layers[-1].causes.tolist() != graph.layers[-1].causes.tolist()


def test_jaccard():
    assert study.jaccard(torch.tensor([1, 2]), torch.tensor([2, 3])) == 1 / 3
    assert study.jaccard(torch.tensor([1]), torch.tensor([1])) == 1

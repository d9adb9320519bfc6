"""The registry of papers: the 59 papers that specify nissl, and where each one lives in it.

``python -m nissl.papers`` prints the table of docs/papers.md.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from typing import Literal

from nissl.errors import InputError

ROOMS: dict[str, str] = {
    "attribution": "Which units are responsible?",
    "concepts": "What do they encode?",
    "intervention": "What happens when I change them?",
    "trust": "Can I believe the answer?",
    "models": "Can the network explain itself?",
    "recordings": "What does this recording say, and does the network say the same?",
    "learning": "How would it learn the way neurons do?",
    "theory": "What can such a network do at all?",
}
"""The rooms of the package and the question that each one answers, in the order of the documentation."""


@dataclass(frozen=True)
class Paper:
    """One paper of the specification.

    Parameters
    ----------
    slug
        Short name, unique; what ``nissl papers`` and ``nissl reproduce`` take.
    title, year
        As published; the year of the first version.
    room
        The part of nissl that it belongs to, a key of `ROOMS`.
    about
        One sentence on what the paper does.
    object
        Dotted public name of the implementation, None while there is none.
    study
        Dotted name of the module whose ``run`` measures the paper's claim, None while there is none.
    status
        ``"works"`` when both exist and are tested, else ``"planned"``.
    """

    slug: str
    title: str
    year: int
    room: str
    about: str
    object: str | None = None
    study: str | None = None
    status: Literal["works", "planned"] = "planned"

    def __post_init__(self) -> None:
        if self.room not in ROOMS:
            raise InputError(f"paper {self.slug!r} names the room {self.room!r}; the rooms are {', '.join(ROOMS)}")
        if self.status == "works" and not (self.object and self.study):
            raise InputError(f"paper {self.slug!r} is said to work, but names no object or no study")


PAPERS: tuple[Paper, ...] = (
    Paper(
        "difull",
        "Better Understanding Differences in Attribution Methods via Systematic Evaluations",
        2023,
        "trust",
        "Builds inputs in which some regions provably cannot reach the output, so that a map that scores them is "
        "wrong; compares all methods at the same layer, shows them over a whole data set, and smooths coarse "
        "ones.",
        object="nissl.trust.DiFull",
        study="nissl.studies.difull",
        status="works",
    ),
    Paper(
        "diffroar",
        "Do Input Gradients Highlight Discriminative Features?",
        2021,
        "trust",
        "Retrains a classifier on images from which the highest- or the lowest-ranked pixels were removed, to "
        "see whether the size of the input gradient marks what separates the classes; only robustly trained "
        "networks pass.",
    ),
    Paper(
        "robust-explainability",
        "How explainable are adversarially-robust CNNs?",
        2022,
        "trust",
        "Sets accuracy, accuracy on shifted data and quality of explanation against each other for ordinary and "
        "adversarially trained image networks, and finds the two usual perturbation scores biased by confidence.",
    ),
    Paper(
        "torch-esegeta",
        "TorchEsegeta: Framework for Interpretability and Explainability of Image-based Deep Learning Models",
        2021,
        "trust",
        "One workbench for explaining classification and segmentation networks in two and three dimensions, "
        "scored by infidelity and sensitivity, tried on vessels in brain angiograms.",
    ),
    Paper(
        "neuroimaging-validation",
        "Explainable AI Methods for Neuroimaging: Systematic Failures of Common Tools, the Need for "
        "Domain-Specific Validation, and a Proposal for Safe Application",
        2025,
        "trust",
        "Makes prediction tasks on brain scans whose informative place is known, and finds that some popular "
        "maps miss it while averaged noisy gradients hit it.",
    ),
    Paper(
        "relp",
        "RelP: Faithful and Efficient Circuit Discovery via Relevance Patching",
        2025,
        "attribution",
        "Approximates activation patching with two forward passes and one backward pass, by replacing each local "
        "derivative with a relevance propagation coefficient.",
        object="nissl.attribution.RelevancePatching",
        study="nissl.studies.relp",
        status="works",
    ),
    Paper(
        "ace",
        "ACE: Attribution-Controlled Knowledge Editing for Multi-hop Factual Recall",
        2025,
        "attribution",
        "Finds which neurons of a language model ask for an intermediate fact and which supply it, and edits "
        "both, so that a changed fact survives reasoning over several steps.",
        object="nissl.intervention.ACE",
        study="nissl.studies.ace",
        status="works",
    ),
    Paper(
        "thought-anchors",
        "Thought Anchors: Which LLM Reasoning Steps Matter?",
        2025,
        "attribution",
        "Measures how much each sentence of a written chain of reasoning matters, by resampling it, by the "
        "attention it receives later, and by hiding it from what follows.",
        object="nissl.attribution.ThoughtAnchors",
        study="nissl.studies.thought_anchors",
        status="works",
    ),
    Paper(
        "lima",
        "Less is More: Efficient Black-box Attribution via Minimal Interpretable Subset Selection",
        2025,
        "attribution",
        "Orders image regions by a greedy search from both ends for a score of sets of regions, and needs nothing from the "
        "network but its outputs.",
        object="nissl.attribution.LiMA",
        study="nissl.studies.lima",
        status="works",
    ),
    Paper(
        "smdl",
        "Less is More: Fewer Interpretable Region via Submodular Subset Selection",
        2024,
        "attribution",
        "Picks a few small image regions one after another so that a set score joining confidence, "
        "effectiveness, consistency and collaboration grows the most.",
        object="nissl.attribution.SMDL",
        study="nissl.studies.smdl",
        status="works",
    ),
    Paper(
        "neuron-path",
        "Discovering Influential Neuron Path in Vision Transformers",
        2025,
        "attribution",
        "Walks through a vision transformer layer by layer, adding the neuron that raises the joint influence of "
        "the path so far on the prediction.",
        object="nissl.attribution.NeuronPath",
        study="nissl.studies.neuron_path",
        status="works",
    ),
    Paper(
        "causal-paths",
        "Causal Analysis for Robust Interpretability of Neural Networks",
        2023,
        "attribution",
        "Switches paths through the hidden layers on and off and keeps those whose removal changes the "
        "prediction, as a causal graph for a task.",
        object="nissl.attribution.CausalPaths",
        study="nissl.studies.causal_paths",
        status="works",
    ),
    Paper(
        "xai-agreement",
        "A Song of (Dis)agreement: Evaluating the Evaluation of Explainable Artificial Intelligence in Natural "
        "Language Processing",
        2022,
        "attribution",
        "Asks whether attributions and attention weights rank the tokens of a text alike, finds that they hardly "
        "do, and concludes that rank agreement is no measure of truth.",
        object="nissl.trust.AttributionAgreement",
        study="nissl.studies.xai_agreement",
        status="works",
    ),
    Paper(
        "lm-head-neurons",
        "Decoding specialised feature neurons in LLMs with the final projection layer",
        2025,
        "concepts",
        "Reads what a neuron stands for by sending its weights through the output vocabulary of a language "
        "model, and confirms it by holding the neuron at a value.",
        object="nissl.concepts.NeuronVocabulary",
        study="nissl.studies.lm_head_neurons",
        status="works",
    ),
    Paper(
        "snmf",
        "Decomposing MLP Activations into Interpretable Features via Semi-Nonnegative Matrix Factorization",
        2025,
        "concepts",
        "Splits the hidden activations of a transformer's MLP into a signed dictionary of neuron groups and "
        "nonnegative weights that say which inputs use them.",
        object="nissl.concepts.SemiNMF",
        study="nissl.studies.snmf",
        status="works",
    ),
    Paper(
        "craft",
        "CRAFT: Concept Recursive Activation FacTorization for Explainability",
        2022,
        "concepts",
        "Factorises the activations of image crops into a few concepts, ranks them by Sobol indices, splits them "
        "again in earlier layers, and maps where each one is.",
        object="nissl.concepts.Craft",
        study="nissl.studies.craft",
        status="works",
    ),
    Paper(
        "milan",
        "Natural Language Descriptions of Deep Visual Features",
        2022,
        "concepts",
        "Describes a visual neuron in words, by searching the phrase that is most specific to the image regions "
        "where the neuron fires.",
        object="nissl.concepts.Milan",
        study="nissl.studies.milan",
        status="works",
    ),
    Paper(
        "multifaceted",
        "Multifaceted Feature Visualization: Uncovering the Different Types of Features Learned By Each Neuron "
        "in Deep Neural Networks",
        2016,
        "concepts",
        "Groups the images that excite one neuron into kinds and synthesises one picture for each kind, instead "
        "of a single picture that mixes them.",
        object="nissl.concepts.Facets",
        study="nissl.studies.multifaceted",
        status="works",
    ),
    Paper(
        "g-act",
        "Steering Conceptual Bias via Transformer Latent-Subspace Activation",
        2025,
        "intervention",
        "Clusters differences of activations into steering directions, and lets small probes in each layer "
        "choose which one to add during generation.",
        object="nissl.intervention.GACT",
        study="nissl.studies.g_act",
        status="works",
    ),
    Paper(
        "neurofeedback",
        "Language Models Are Capable of Metacognitive Monitoring and Control of Their Internal Activations",
        2025,
        "intervention",
        "Tests whether a language model can name, and move, its own activation along a chosen direction, from "
        "labelled sentences given in its context.",
        object="nissl.intervention.NeurofeedbackAxis",
        study="nissl.studies.neurofeedback",
        status="works",
    ),
    Paper(
        "blind-spots",
        "Exploring Geometry of Blind Spots in Vision Models",
        2023,
        "intervention",
        "Walks across an image along directions that leave the network's confidence as it was, until the picture "
        "shows something else, and measures the flat region found on the way.",
        object="nissl.intervention.LevelSetTraversal",
        study="nissl.studies.blind_spots",
        status="works",
    ),
    Paper(
        "cdev",
        "Approaching an unknown communication system by latent space exploration and causal inference",
        2023,
        "intervention",
        "Sets single latent variables of a generative model to extreme values and estimates the effect on the "
        "output; applied to the clicks of sperm whales, to find which properties are meaningful.",
    ),
    Paper(
        "comet",
        "Comprehensive Attribution: Inherently Explainable Vision Model with Feature Detector",
        2024,
        "models",
        "Trains a selector of image regions together with a classifier, and penalises what a fixed detector can "
        "still recognise in the part left out.",
    ),
    Paper(
        "self-interpretable",
        "A Comprehensive Survey on Self-Interpretable Neural Networks",
        2025,
        "models",
        "Orders the networks whose explanation is part of their computation into five families: attributions, "
        "functions, concepts, prototypes and rules.",
    ),
    Paper(
        "biclustering",
        "Bayesian Bi-clustering of Neural Spiking Activity with Latent Structures",
        2023,
        "recordings",
        "Sorts neurons into populations and time into states at once, from shared latent trajectories and local "
        "linear dynamics, with a Bayesian model of unbounded size sampled by MCMC.",
        object="nissl.recordings.spikes.BiClustering",
        study="nissl.studies.biclustering",
        status="works",
    ),
    Paper(
        "at-at",
        "Removing Neural Signal Artifacts with Autoencoder-Targeted Adversarial Transformers (AT-AT)",
        2025,
        "recordings",
        "Cleans muscle noise from EEG with an autoencoder that decides where a small adversarially trained "
        "transformer has to work.",
        object="nissl.recordings.eeg.EMGFilter",
        study="nissl.studies.at_at",
        status="works",
    ),
    Paper(
        "dynamic-connectome",
        "Learning dynamic representations of the functional connectome in neurobiological networks",
        2024,
        "recordings",
        "Factorises a tensor of changing affinities between neurons, then finds weighted communities in each "
        "factor, so that the groups active in each period appear.",
        object="nissl.recordings.spikes.DynamicConnectome",
        study="nissl.studies.dynamic_connectome",
        status="works",
    ),
    Paper(
        "neuroformer",
        "Neuroformer: Multimodal and Multitask Generative Pretraining for Brain Data",
        2023,
        "recordings",
        "A generative transformer that predicts the next spike, its neuron and its time, from earlier spikes, "
        "stimulus and behaviour, and can be tuned to decode behaviour.",
        object="nissl.recordings.spikes.NeuroformerDecoder",
        study="nissl.studies.neuroformer",
        status="works",
    ),
    Paper(
        "du-in",
        "Du-IN: Discrete units-guided mask modeling for decoding speech from Intracranial Neural signals",
        2024,
        "recordings",
        "Learns discrete codes for several intracranial channels of one brain region together, pretrains by "
        "predicting masked codes, and decodes spoken words.",
        object="nissl.recordings.eeg.DuIN",
        study="nissl.studies.du_in",
        status="works",
    ),
    Paper(
        "eegformer",
        "EEGFormer: Towards Transferable and Interpretable Large-Scale EEG Foundation Model",
        2024,
        "recordings",
        "Pretrains a transformer on unlabelled EEG through a discrete codebook, whose entries can then be "
        "searched for patterns that mark a condition.",
        object="nissl.recordings.eeg.EEGFormer",
        study="nissl.studies.eegformer",
        status="works",
    ),
    Paper(
        "augmented-covariance",
        "Classification of BCI-EEG based on augmented covariance matrix",
        2023,
        "recordings",
        "Classifies EEG trials by the covariance of the signals together with delayed copies of themselves, on "
        "the manifold of positive definite matrices.",
        object="nissl.recordings.eeg.AugmentedCovariance",
        study="nissl.studies.augmented_covariance",
        status="works",
    ),
    Paper(
        "dkf",
        "A Discriminative Approach to Bayesian Filtering with Applications to Human Neural Decoding",
        2018,
        "recordings",
        "A Bayesian filter that learns the state given the observation, where this is closer to Gaussian than "
        "the reverse, and still updates in closed form.",
        object="nissl.recordings.spikes.DiscriminativeKalmanFilter",
        study="nissl.studies.dkf",
        status="works",
    ),
    Paper(
        "neuropictor",
        "NeuroPictor: Refining fMRI-to-Image Reconstruction via Multi-individual Pretraining and Multi-level "
        "Modulation",
        2024,
        "recordings",
        "Rebuilds seen pictures from fMRI by steering a diffusion model at a semantic and at a structural level, "
        "after a pretraining shared by many people.",
    ),
    Paper(
        "ldm-reconstruction",
        "Improving visual image reconstruction from human brain activity using latent diffusion models via "
        "multiple decoded inputs",
        2023,
        "recordings",
        "Adds decoded text, decoded depth and an optimised coarse image, one by one, to a diffusion-based "
        "reconstruction of seen pictures from fMRI, and measures what each brings.",
    ),
    Paper(
        "mindbridge",
        "MindBridge: A Cross-Subject Brain Decoding Framework",
        2024,
        "recordings",
        "Decodes pictures from the fMRI of several people with one model: voxel counts are pooled to one size, "
        "and a reconstruction cycle aligns people who saw different pictures.",
    ),
    Paper(
        "whole-brain-decoding",
        "Decoding Visual Experience and Mapping Semantics through Whole-Brain Analysis Using fMRI Foundation Models",
        2024,
        "recordings",
        "Aligns a pretrained encoder of activity in the entire brain with picture embeddings, to decode what was "
        "seen and ask which areas outside visual cortex take part.",
    ),
    Paper(
        "visual-readouts",
        "Modeling the Human Visual System: Comparative Insights from Response-Optimized and Task-Optimized "
        "Vision Models, Language Models, and different Readout Mechanisms",
        2024,
        "recordings",
        "Compares networks trained on neural responses, networks trained on tasks and text embeddings as models "
        "of visual areas, crossed with the ways of reading a voxel out of them.",
    ),
    Paper(
        "trsa",
        "The Topology and Geometry of Neural Representations",
        2023,
        "recordings",
        "Compares representations after their small and large distances have been flattened, so that "
        "neighbourhoods count and exact geometry less, and asks whether models are told apart better.",
    ),
    Paper(
        "hlop",
        "Hebbian Learning based Orthogonal Projection for Continual Learning of Spiking Neural Networks",
        2024,
        "learning",
        "Lets lateral connections of a spiking network learn the main subspace of its activity by Hebbian rules "
        "and projects updates away from it, so that old tasks stay.",
    ),
    Paper(
        "dale-langevin",
        "Dale meets Langevin: A Multiplicative Denoising Diffusion Model",
        2025,
        "learning",
        "Derives, from geometric Brownian motion run backwards, a sampler that multiplies instead of adding, "
        "like learning under fixed signs of synapses, and trains a diffusion model for it.",
    ),
    Paper(
        "lottery-ticket",
        "The Lottery Ticket Hypothesis: Finding Sparse, Trainable Neural Networks",
        2018,
        "learning",
        "Prunes a trained network by the size of its weights, rewinds the survivors to their first values, and "
        "shows that this small network trains as well alone.",
    ),
    Paper(
        "mpnp",
        "Martingale Posterior Neural Processes",
        2023,
        "learning",
        "A neural process whose uncertainty comes from imagined further data rather than from a Gaussian latent "
        "variable.",
    ),
    Paper(
        "granet",
        "Sparse Training via Boosting Pruning Plasticity with Neuroregeneration",
        2021,
        "learning",
        "Prunes gradually while training and regrows as many connections as it cuts, so that the network keeps "
        "the ability to recover from the next cut.",
    ),
    Paper(
        "counter-current",
        "Counter-Current Learning: A Biologically Plausible Dual Network Approach for Deep Learning",
        2024,
        "learning",
        "Trains a forward network on inputs and a backward network on targets, each layer pulled towards its "
        "partner, without an error sent back through the forward weights.",
    ),
    Paper(
        "barlow-twins",
        "Barlow Twins: Self-Supervised Learning via Redundancy Reduction",
        2021,
        "learning",
        "Learns from two distorted views by making the cross-correlation between their embeddings the identity, "
        "which needs no negative pairs and no asymmetry.",
    ),
    Paper(
        "statmech-continual",
        "Statistical mechanics of continual learning: variational principle and mean-field potential",
        2022,
        "learning",
        "Learns tasks in sequence with distributions over binary weights, and predicts the forgetting of old "
        "ones from a Franz–Parisi potential of statistical physics.",
    ),
    Paper(
        "nhl-tta",
        "Neuro-Modulated Hebbian Learning for Fully Test-Time Adaptation",
        2023,
        "learning",
        "Adapts a trained network to shifted test data by soft Hebbian updates of its early layer, modulated by "
        "a feedback signal from the entropy at its output.",
    ),
    Paper(
        "fire-wire",
        "Fire Together Wire Together: A Dynamic Pruning Approach with Self-Supervised Mask Prediction",
        2021,
        "learning",
        "Predicts, from the activations of the layer before, which filters of a layer will be among the "
        "strongest for this input, and computes only those.",
    ),
    Paper(
        "iemf",
        "Incorporating brain-inspired mechanisms for multimodal learning in artificial intelligence",
        2025,
        "learning",
        "Weights the learning of a fusion module by inverse effectiveness: the weaker the single senses, the "
        "more is learnt from their combination.",
    ),
    Paper(
        "l0-sparse-coding",
        "Beyond ell_1 sparse coding in V1",
        2023,
        "learning",
        "Compares thresholding rules for sparse codes of natural images, and finds that penalties nearer to "
        "counting active units need fewer of them and give more fields like those of visual cortex.",
    ),
    Paper(
        "few-shot-continual",
        "Few-shot Continual Learning: a Brain-inspired Approach",
        2021,
        "learning",
        "Keeps a fast and a slow copy of every weight, one for remembering a sequence of tasks and one for "
        "learning from few examples, and consolidates between them.",
    ),
    Paper(
        "what-when",
        'Joint encoding of "what" and "when" predictions through error-modulated plasticity in reservoir spiking '
        "networks",
        2025,
        "learning",
        "A reservoir of spiking neurons whose readout learns, from local errors, which event comes, at what time "
        "and how probably.",
    ),
    Paper(
        "snn-lzc",
        "Learning Internal Biological Neuron Parameters and Complexity-Based Encoding for Improved Spiking "
        "Neural Networks Performance",
        2025,
        "learning",
        "Learns the inner parameters of spiking neurons together with the weights, and classifies spike trains "
        "by how well they compress.",
    ),
    Paper(
        "nested-systems",
        "Deep neural networks as nested dynamical systems",
        2021,
        "theory",
        "Describes trained networks and wired machines as two cases of one structure from category theory, in "
        "which the wiring itself has a state and adapts.",
    ),
    Paper(
        "sdr-dendrites",
        "How do neurons operate on sparse distributed representations? A mathematical theory of sparsity, "
        "neurons and active dendrites",
        2016,
        "theory",
        "Computes how reliably a dendrite with few synapses recognises a sparse pattern under noise, how many "
        "patterns it can hold mixed, and where its threshold should be.",
    ),
    Paper(
        "bandlimited",
        "How Powerful are Shallow Neural Networks with Bandlimited Random Weights?",
        2020,
        "theory",
        "Proves that a two-layer network with frozen random weights from a bounded range cannot reach every "
        "function, and bounds the error that remains.",
    ),
    Paper(
        "inductive-bias",
        "Towards Exact Computation of Inductive Bias",
        2024,
        "theory",
        "Measures the information that is needed to pick out the hypotheses that generalise on a task, from the "
        "losses of randomly drawn ones.",
    ),
    Paper(
        "multitasking-hopfield",
        "Parallel Learning by Multitasking Neural Networks",
        2023,
        "theory",
        "A Hopfield network whose patterns have blank entries retrieves several of them at once, and statistical "
        "mechanics says in what order and how many.",
    ),
    Paper(
        "dynamical-intelligence",
        "A brain basis of dynamical intelligence for AI and computational neuroscience",
        2021,
        "theory",
        "Argues that synchrony, nested rhythms, flexible sequences and acting agents are what present artificial "
        "networks lack, and what theory should supply.",
    ),
)
"""All papers, in the order of the specification."""

_BY_SLUG = {p.slug: p for p in PAPERS}


def paper(slug: str) -> Paper:
    """Look a paper up by its short name.

    Parameters
    ----------
    slug
        For example ``"difull"``.

    Returns
    -------
    Paper

    Raises
    ------
    InputError
        No paper has this short name; the message names the nearest ones.

    Examples
    --------
    >>> paper("difull").year
    2023
    """
    if not isinstance(slug, str):
        raise InputError(f"a paper is named by its short name, such as 'difull', not by {slug!r:.60}")
    if slug in _BY_SLUG:
        return _BY_SLUG[slug]
    near = difflib.get_close_matches(slug, _BY_SLUG, n=3)
    hint = f"did you mean {' or '.join(near)}?" if near else "list them with `nissl papers`."
    raise InputError(f"no paper is called {slug!r}; {hint}")


def papers_markdown() -> str:
    """Render the registry as the documentation page ``docs/papers.md``.

    Returns
    -------
    str
        Markdown: one table for each room, papers in the order of `PAPERS`.
    """
    works = sum(p.status == "works" for p in PAPERS)
    lines = [
        "# Papers",
        "",
        "<!-- Made from src/nissl/papers.py by `make tables`; edit that file. -->",
        "",
        f"{len(PAPERS)} papers are the specification of nissl. A paper *works* when its method can be called under the"
        " name given here and its study measures the paper's claim with `nissl reproduce`; the others are planned."
        f" Now {works} {'works' if works == 1 else 'work'}.",
    ]
    for room, question in ROOMS.items():
        lines += ["", f"## {room}: {question}", "", "| paper | what it does | status |", "|---|---|---|"]
        for p in PAPERS:
            if p.room == room:
                where = f"works: `{p.object}`, `nissl reproduce {p.slug}`" if p.status == "works" else "planned"
                lines.append(f"| `{p.slug}`: {p.title} ({p.year}) | {p.about} | {where} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(papers_markdown(), end="")

"""Layer-wise relevance propagation beside zennit's."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from zennit.attribution import Gradient  # pyright: ignore[reportMissingImports]
from zennit.canonizers import AttributeCanonizer, CompositeCanonizer, NamedMergeBatchNorm  # pyright: ignore[reportMissingImports]
from zennit.composites import LayerMapComposite  # pyright: ignore[reportMissingImports]
from zennit.layer import Sum  # pyright: ignore[reportMissingImports]
from zennit.rules import Epsilon, Norm, Pass  # pyright: ignore[reportMissingImports]
from zennit.types import Activation, AvgPool, Convolution, Linear  # pyright: ignore[reportMissingImports]

from benchmarks.measure import SAME, Case, relative
from benchmarks.subject import Subject
from nissl.attribution import LRP

EPSILON = 0.25


def _with_sum(name: str, module: nn.Module) -> dict[str, Any] | None:
    """EfficientNet's block with its skip connection as a module that a rule can be given to."""
    if type(module).__name__ != "MBConvBlock":
        return None

    def forward(inputs: Tensor, drop_connect_rate: float | None = None) -> Tensor:
        block: Any = module
        x = inputs
        if block._block_args.expand_ratio != 1:
            x = block._swish(block._bn0(block._expand_conv(x)))
        x = block._swish(block._bn1(block._depthwise_conv(x)))
        x = block._bn2(block._project_conv(x))
        if block.id_skip and block._block_args.stride == 1 and x.shape == inputs.shape:
            x = block.canonizer_sum(torch.stack([x, inputs], -1))
        return x

    return {"forward": forward, "canonizer_sum": Sum()}


def _merges(module: nn.Module) -> list[tuple[list[str], str]]:
    """Which batch norm of EfficientNet follows which convolution."""
    pairs = [(["_conv_stem"], "_bn0"), (["_conv_head"], "_bn1")]
    names = {name for name, _ in module.named_modules()}
    for name in names:
        for conv, norm in (("_expand_conv", "_bn0"), ("_depthwise_conv", "_bn1"), ("_project_conv", "_bn2")):
            if name.startswith("_blocks.") and name.endswith(f".{conv}"):
                pairs.append(([name], f"{name.removesuffix(conv)}{norm}"))
    return pairs


def _epsilon_in_variance(module: nn.Module) -> nn.Module:
    """A copy that computes the same function with the epsilon of its batch norms as part of their variances.

    zennit merges a batch norm with the layer before and leaves one of unit variance behind, which divides by
    sqrt(1 + epsilon) once more. Over fifty layers with an epsilon of 1e-3 that is another function, whose relevance for
    ill-conditioned examples differs by as much as its largest value. Without an epsilon zennit's merging is exact.
    """
    copied = copy.deepcopy(module)
    for m in copied.modules():
        if isinstance(m, nn.BatchNorm2d):
            assert m.running_var is not None
            m.running_var += m.eps - 1e-12
            m.eps = 1e-12
    return copied


def lrp(subject: Subject) -> Case:
    s = Subject(_epsilon_in_variance(subject.module), subject.x, subject.y, subject.layer, subject.batch)
    ours = LRP("epsilon", EPSILON)
    composite = LayerMapComposite(
        [
            (Activation, Pass()),
            (Sum, Norm(1e-12)),  # a sum has no epsilon in nissl
            (AvgPool, Norm(EPSILON)),
            (Convolution, Epsilon(EPSILON)),
            (Linear, Epsilon(EPSILON)),
        ],
        canonizers=[CompositeCanonizer([NamedMergeBatchNorm(_merges(s.module)), AttributeCanonizer(_with_sum)])],
    )

    def theirs() -> Tensor:
        found = []
        with Gradient(s.module, composite) as attributor:
            for x, y in zip(s.x.split(s.batch), s.y.split(s.batch), strict=True):
                # zennit begins with the relevance that it is handed: the class's logit
                start = lambda out, y=y: out * nn.functional.one_hot(y, out.shape[1])  # noqa: E731
                found.append(attributor(x, start)[1])
        return torch.cat(found)

    return Case(
        "LRP-epsilon", "zennit", 1.0, s.contenders(ours, "zennit", theirs),
        lambda: {"scores": (relative(s.scores(ours), theirs()), SAME)}, s.module,
        f"ε = {EPSILON}; zennit needs canonizers written for this network's skip connections and batch norms, and "
        "batch norms without an epsilon to merge them exactly; nissl needs neither",
    )  # fmt: skip

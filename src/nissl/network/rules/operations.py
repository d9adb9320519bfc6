"""Which torch operation is of which kind, as far as backward rules are concerned."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch.nn import functional as F


def words(text: str) -> frozenset[str]:
    """A set of words."""
    return frozenset(text.split())


# Moves or copies entries: every entry of the result is one entry of an argument, or a constant.
REARRANGING = words(
    """
    view view_as reshape reshape_as permute transpose t movedim adjoint flatten unflatten ravel squeeze
    unsqueeze expand expand_as broadcast_to broadcast_tensors repeat repeat_interleave tile cat stack hstack
    vstack dstack column_stack split split_with_sizes chunk unbind tensor_split hsplit vsplit getitem index
    index_select gather take take_along_dim narrow select slice diagonal diag diag_embed pad constant_pad_nd
    roll flip fliplr flipud rot90 unfold im2col pixel_shuffle pixel_unshuffle channel_shuffle
    native_channel_shuffle contiguous clone to type type_as float double half bfloat16 cpu cuda alias as_strided
    positive dropout masked_fill where tril triu masked_select masked_scatter scatter index_copy index_fill
    select_scatter slice_scatter real view_as_real identity block_diag atleast_1d atleast_2d atleast_3d meshgrid
    pin_memory nan_to_num get_T get_mT get_H get_mH
    """
)
# Linear in what is dependent, or a choice among its entries: the plain gradient passes relevance on.
STRUCTURE = REARRANGING | words(
    """
    add sub rsub neg mean sum nansum nanmean cumsum trace interpolate upsample upsample_nearest
    upsample_bilinear grid_sample fold col2im scatter_add index_add sum_to_size diff max min amax amin maximum
    minimum max_pool1d max_pool2d max_pool3d max_pool1d_with_indices max_pool2d_with_indices
    max_pool3d_with_indices adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool3d max_unpool1d
    max_unpool2d max_unpool3d
    """
)
CHOICES = words("max min amax amin maximum minimum")
# Say something about a tensor, or end its dependence.
SILENT = words("detach data requires_grad retain_grad register_hook zero fill get_data get_grad")
PRODUCTS = words("mul matmul rmatmul outer einsum tensordot inner")
DIVISIONS = words("div rdiv")
ADDED_PRODUCTS = words("addmm baddbmm addmv addcmul")
LAYERS = words("linear conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d")
RELU = frozenset(("relu", "relu6"))
# Relevance passes as x * (f(x) / x).
ACTIVATIONS = RELU | words(
    """
    hardtanh leaky_relu prelu rrelu elu selu celu gelu silu mish hardswish tanh softsign tanhshrink hardshrink
    softshrink threshold clamp clamp_min clamp_max abs softplus logsigmoid log_sigmoid log1p expm1 sinh asinh
    atan erf sin
    """
)
# Positive factors come out of these, so f(x) / x is the gradient.
HOMOGENEOUS = words("relu leaky_relu prelu rrelu abs")
LIMITS = words("clamp clamp_min clamp_max")
# Say how much of a signal passes.
GATES = words("sigmoid hardsigmoid")
EXPONENTIALS = words("exp exp2 rpow")
POWERS = words("pow square")
SOFTMAX = frozenset(("softmax",))
# Scales that a normalisation divides by.
SCALES = words("rsqrt sqrt std var var_mean std_mean norm reciprocal")
AVERAGE_POOLS = words(
    """
    avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d
    """
)
MAX_POOLS = words(
    """
    max_pool1d max_pool2d max_pool3d adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool3d
    """
)
NORMS = words("layer_norm rms_norm group_norm instance_norm normalize")
ELEMENTWISE = (
    ACTIVATIONS | GATES | EXPONENTIALS | POWERS | words("sqrt rsqrt log log2 log10 reciprocal cos cosh tan")
) - {"rpow"}
# Whole recurrent networks and encoder layers in one call.
SEALED = words(
    """
    lstm gru rnn_tanh rnn_relu lstm_cell gru_cell rnn_tanh_cell rnn_relu_cell quantized_lstm quantized_gru
    _native_multi_head_attention _transformer_encoder_layer_fwd
    """
)

_SYNONYMS = {
    "multiply": "mul", "divide": "div", "true_divide": "div", "truediv": "div", "rtruediv": "rdiv", "subtract": "sub",
    "negative": "neg", "absolute": "abs", "clip": "clamp", "_threshold": "threshold", "special_erf": "erf",
    "special_expit": "sigmoid", "special_softmax": "softmax", "mm": "matmul", "bmm": "matmul", "mv": "matmul",
    "dot": "matmul", "concat": "cat", "concatenate": "cat", "swapaxes": "transpose", "swapdims": "transpose",
    "moveaxis": "movedim", "linalg_norm": "norm", "linalg_vector_norm": "norm", "frobenius_norm": "norm",
    "feature_dropout": "dropout", "alpha_dropout": "dropout", "feature_alpha_dropout": "dropout",
    "dropout1d": "dropout", "dropout2d": "dropout", "dropout3d": "dropout", "fmax": "maximum", "fmin": "minimum",
    "radd": "add", "rmul": "mul", "ger": "outer",
}  # fmt: skip
_IN_PLACE = {
    "__iadd__": "add", "__isub__": "sub", "__imul__": "mul", "__itruediv__": "div", "__idiv__": "div",
    "__ipow__": "pow", "__setitem__": "setitem",
}  # fmt: skip


class Operation(NamedTuple):
    """A torch function by its plain name: no dunders, no trailing underscore, one name for all synonyms.

    Attributes
    ----------
    name : str
    in_place : bool
        Writes over its first argument, whatever its arguments say.
    switch : int or None
        Position of an argument called ``inplace``.
    base : callable or None
        For an operation in place, the same one out of place.
    """

    name: str
    in_place: bool
    switch: int | None
    base: Callable[..., Any] | None


@lru_cache(maxsize=4096)
def operation(function: Callable[..., Any]) -> Operation:
    """What a function that reaches a mode is."""
    name = getattr(function, "__name__", type(function).__name__)
    if name in ("__get__", "__set__", "__delete__"):
        attribute = getattr(getattr(function, "__self__", None), "__name__", "")
        return Operation(f"{name.strip('_')}_{attribute}", False, None, None)
    in_place = name in _IN_PLACE or (name.endswith("_") and not name.endswith("__"))
    if name in _IN_PLACE:
        name = _IN_PLACE[name]
    elif in_place:
        name = name[:-1]
    elif name.startswith("__"):
        name = name.strip("_")
    base = None
    if in_place:
        owners = (torch.Tensor, torch, F, torch._C._nn)  # pyright: ignore[reportAttributeAccessIssue]
        base = next((getattr(o, name) for o in owners if callable(getattr(o, name, None))), None)
    switch = None
    if inspect.isfunction(function):
        parameters = list(inspect.signature(function, follow_wrapped=False).parameters)
        switch = parameters.index("inplace") if "inplace" in parameters else None
    return Operation(_SYNONYMS.get(name, name), in_place, switch, base)

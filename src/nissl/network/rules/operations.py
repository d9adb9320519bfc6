"""Which torch operation is of which kind, as far as backward rules are concerned."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

# Linear in their one dependent argument, or a choice among its entries: the plain gradient passes relevance on.
STRUCTURE = frozenset(
    ["view", "view_as", "reshape", "reshape_as", "permute", "transpose", "t", "movedim", "moveaxis", "swapaxes", "swapdims", "adjoint", "flatten", "unflatten", "ravel", "squeeze", "unsqueeze", "expand", "expand_as", "broadcast_to", "repeat", "repeat_interleave", "tile", "cat", "concat", "concatenate", "stack", "hstack", "vstack", "split", "split_with_sizes", "chunk", "unbind", "tensor_split", "hsplit", "vsplit", "getitem", "index_select", "gather", "take_along_dim", "narrow", "select", "slice", "diagonal", "pad", "constant_pad_nd", "roll", "flip", "fliplr", "flipud", "rot90", "unfold", "fold", "im2col", "col2im", "pixel_shuffle", "pixel_unshuffle", "channel_shuffle", "contiguous", "clone", "to", "type", "type_as", "float", "double", "half", "bfloat16", "cpu", "cuda", "alias", "lift_fresh", "as_strided", "add", "radd", "sub", "subtract", "rsub", "isub", "iadd", "neg", "negative", "positive", "mean", "sum", "nanmean", "cumsum", "trace", "interpolate", "upsample", "upsample_nearest", "upsample_bilinear", "dropout", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout", "feature_alpha_dropout", "feature_dropout", "native_dropout", "max", "min", "amax", "amin", "maximum", "minimum", "fmax", "fmin", "max_pool1d", "max_pool2d", "max_pool3d", "max_pool1d_with_indices", "max_pool2d_with_indices", "max_pool3d_with_indices", "adaptive_max_pool1d", "adaptive_max_pool2d", "adaptive_max_pool3d", "masked_fill", "where", "tril", "triu", "masked_select", "index_put", "scatter", "scatter_add", "index_add", "index_copy", "copy", "setitem", "get", "requires_grad_", "detach", "data", "real", "view_as_real", "new_zeros", "identity", "diff", "block_diag", "rename", "align_to", "atleast_1d", "atleast_2d", "atleast_3d", "meshgrid", "lerp", "nan_to_num", "resize", "pin_memory", "register_hook", "retain_grad"]
)
PRODUCTS = frozenset(
    ["mul", "multiply", "rmul", "imul", "matmul", "rmatmul", "imatmul", "mm", "bmm", "mv", "dot", "inner", "outer", "einsum", "tensordot", "bilinear"]
)
DIVISIONS = frozenset(["div", "divide", "true_divide", "truediv", "rtruediv", "itruediv", "rdiv", "idiv"])
ADDED_PRODUCTS = frozenset(["addmm", "addbmm", "baddbmm", "addmv", "addcmul"])
LAYERS = frozenset(["linear", "conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d"])
RELU = frozenset(("relu", "relu6"))
# f(0) = 0: relevance passes as x * (f(x) / x).
ACTIVATIONS = (
    frozenset(
        ["hardtanh", "leaky_relu", "prelu", "rrelu", "elu", "selu", "celu", "gelu", "silu", "mish", "hardswish", "tanh", "softsign", "tanhshrink", "hardshrink", "softshrink", "threshold", "clamp", "clamp_min", "clamp_max", "clip", "abs", "absolute", "softplus", "logsigmoid", "log1p", "expm1", "sinh", "asinh", "atan", "erf"]
    )
    | RELU
)
# Bounded gates, which say how much of a signal passes: held constant where rules conserve relevance.
GATES = frozenset(["sigmoid", "hardsigmoid", "exp", "exp2", "cos", "sin"])
SOFTMAX = frozenset(["softmax", "softmin", "gumbel_softmax"])
# Scales that a normalisation divides by.
SCALES = frozenset(
    ["rsqrt", "sqrt", "std", "var", "var_mean", "std_mean", "norm", "vector_norm", "linalg_vector_norm", "linalg_norm", "reciprocal"]
)
AVERAGE_POOLS = frozenset(
    ["avg_pool1d", "avg_pool2d", "avg_pool3d", "adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d"]
)
MAX_POOLS = frozenset(
    ["max_pool1d", "max_pool2d", "max_pool3d", "adaptive_max_pool1d", "adaptive_max_pool2d", "adaptive_max_pool3d"]
)
NORMS = frozenset(["layer_norm", "rms_norm", "group_norm", "instance_norm", "normalize"])
ELEMENTWISE = (
    ACTIVATIONS | GATES | frozenset(["pow", "rpow", "square", "sqrt", "rsqrt", "log", "log2", "log10", "reciprocal", "sinh", "cosh", "tan", "exp"])
)
RECURRENT = frozenset(["lstm", "gru", "rnn_tanh", "rnn_relu", "lstm_cell", "gru_cell", "rnn_tanh_cell", "rnn_relu_cell"])
ATTENTION = frozenset(("scaled_dot_product_attention", "multi_head_attention_forward"))


@lru_cache(maxsize=4096)
def name_of(function: Callable[..., Any]) -> tuple[str, bool]:
    """Plain name of a torch function or method, and whether it works in place."""
    name = getattr(function, "__name__", str(function))
    if name.startswith("__") and name.endswith("__"):
        plain = name.strip("_")
        in_place = plain in {"iadd", "isub", "imul", "itruediv", "imatmul", "setitem", "ipow"}
        return plain, in_place
    if name.endswith("_") and not name.endswith("__"):
        return name.strip("_"), True
    return name.lstrip("_"), False

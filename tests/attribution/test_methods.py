"""Methods by their key: the table and the parser of specifications."""

import dataclasses
import inspect

import pytest

from nissl import attribution
from nissl.attribution import METHODS, GradCAMPlusPlus, IntegratedGradients, Method, Saliency, method
from nissl.errors import InputError


def test_the_table_holds_every_method_under_its_own_key():
    classes = {
        c for c in vars(attribution).values() if inspect.isclass(c) and issubclass(c, Method) and c is not Method
    }
    ready = {c for c in classes if all(p.default is not p.empty for p in inspect.signature(c).parameters.values())}
    assert set(METHODS.values()) == ready
    assert all(cls.name == key for key, cls in METHODS.items())
    assert set(attribution.__all__) >= {c.__name__ for c in classes}


@pytest.mark.parametrize("cls", METHODS.values())
def test_every_method_can_be_made_described_and_repeated(cls):
    made = cls()
    assert isinstance(method(cls.name), cls)
    assert cls.title
    assert cls.paper
    assert "References" in (cls.__doc__ or "") or cls.paper == "control"
    parameters = [f.name for f in dataclasses.fields(made)]
    assert parameters == list(inspect.signature(cls).parameters)
    documented = [p for p in parameters if p not in (cls.__doc__ or "")]
    assert cls.name == "vargrad" or not documented  # VarGrad's are those of SmoothGrad
    with pytest.raises(dataclasses.FrozenInstanceError):
        made.layer = "x"  # pyright: ignore[reportAttributeAccessIssue]


def test_specifications():
    made = method(" IG( steps=64, baseline='blur' ) ")
    assert isinstance(made, IntegratedGradients)
    assert (made.steps, made.baseline, made.quadrature) == (64, "blur", "gausslegendre")
    cam = method("gradcam++(layer='features.3:in', upsample=False)")
    assert isinstance(cam, GradCAMPlusPlus)
    assert (cam.layer, cam.upsample) == ("features.3:in", False)
    assert isinstance(method("saliency()"), Saliency)
    assert method(made) is made


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("igg", "did you mean ig"),
        ("IntegratedGradients", "did you mean ig"),
        ("Grad-CAM", "did you mean gradcam"),
        ("ig(step=3)", "did you mean 'steps'"),
        ("saliency(steps=3)", "It takes none"),
        ("ig(3)", "name=value"),
        ("ig(steps=)", "name=value"),
        ("ig(steps=3, steps=4)", "once"),
        ("ig(**{})", "once"),
        ("ig(steps=1)(steps=2)", "name=value"),
        ("ig(steps=3", "is named like"),
        ("", "is named like"),
        ("ig(steps=0)", "at least 1"),
        ("ig(steps=print(1))", "literal"),
        ("ig(steps=__import__('os').getpid())", "literal"),
    ],
)
def test_what_is_no_specification_says_so(spec, says):
    with pytest.raises(InputError) as error:
        method(spec)
    assert says in str(error.value)

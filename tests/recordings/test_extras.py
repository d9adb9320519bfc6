"""Optional packages: there, or said what installs them."""

import math
import sys

import pytest

from nissl.errors import MissingExtraError
from nissl.recordings.extras import need


def test_a_module_that_is_there():
    assert need("math") is math
    assert need("os.path").join("a", "b")


@pytest.mark.parametrize(
    ("extra", "words"), [("recordings", r"nissl\[recordings\]"), ("training", r"nissl\[training\]")]
)
def test_one_that_is_not(monkeypatch, extra, words):
    monkeypatch.setitem(sys.modules, "mne", None)
    with pytest.raises(MissingExtraError, match=words) as caught:
        need("mne", extra)
    assert isinstance(caught.value.__cause__, ImportError)

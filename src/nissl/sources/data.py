"""Data by name: a folder of pictures, an npz file, the user's own factory, or the demo photographs."""

from __future__ import annotations

import csv
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from nissl.arguments import as_path, at_least, instance
from nissl.errors import InputError, MissingExtraError
from nissl.sources.factory import call_factory, current_folder_first, is_factory
from nissl.sources.images import SUFFIXES, Preprocess, read_image
from nissl.sources.models import DEMO_PIP, LoadedModel, package_folder

FORMS = "give a folder of pictures, a picture, an .npz file, package.module:factory, or demo"
TEXT_KEYS = ("input_ids", "attention_mask", "token_type_ids", "position_ids")
_TRAILING = re.compile(r"_(0|[1-9][0-9]*)$")  # a leading zero counts pictures, it names no class


@dataclass(frozen=True)
class Data:
    """Examples to explain.

    Parameters
    ----------
    inputs : Tensor or dict of Tensor
        Rows first; what the network is called with.
    labels : Tensor of int64 (n,), optional
        Index of each example's class among the network's outputs.
    names : list of str
        One for each example.
    images : array of uint8 (n, height, width, 3), optional
        What the network sees, for display, on the same grid as `inputs`.
    masks : array of bool (n, height, width), optional
        Where the object is, on the grid of `inputs`.
    boxes : array of float (n, 4), optional
        Around the object: left, upper, right, lower in pixels of `inputs`.
    note : str
        Where labels come from and what was left aside.
    """

    inputs: Tensor | dict[str, Tensor]
    labels: Tensor | None
    names: list[str]
    images: np.ndarray | None = None
    masks: np.ndarray | None = None
    boxes: np.ndarray | None = None
    note: str = ""

    def __len__(self) -> int:
        return len(self.names)


def load_data(
    spec: str | Path,
    model: LoadedModel,
    n: int | None = None,
    seed: int = 0,
    *,
    size: int | tuple[int, int] | None = None,
    mean: float | Sequence[float] | None = None,
    std: float | Sequence[float] | None = None,
    labels: bool = True,
) -> Data:
    """Load examples for a model by name.

    Parameters
    ----------
    spec : str or Path
        - A folder of pictures. Labels come from ``labels.csv`` in it (columns ``file`` and ``label``, a class's name or
          index), or from sub-folders named after classes or their indices, or from a number after the last underscore
          of every name (``cat_281.jpg``), or there are none.
        - A picture.
        - A file ``.npz`` with ``x`` (or ``inputs``, or ``input_ids`` and what belongs to it), and optionally ``y`` (or
          ``labels``), ``names``, ``images``, ``masks``, ``boxes``. Pictures of uint8 (n, height, width[, 3]) go through
          the model's preprocessing, their masks and boxes too; other numbers are taken as they are.
        - ``package.module:factory``, called without arguments: returns (x, y), a mapping with the keys above, or Data.
        - ``demo``: 20 labelled ImageNet photographs. A folder of that name is ``./demo``.
    model : LoadedModel
        Says how pictures are prepared and which classes there are.
    n : int, optional
        How many examples; all by default. Fewer than there are are drawn evenly over the classes and kept in order.
    seed : int
        Of the draw; default 0.
    size, mean, std : optional
        Instead of the model's own preprocessing: height and width in pixels, and the scaling of pixels in 0..1, one
        number for all channels or one a channel.
    labels : bool
        False leaves labels aside, as for names whose numbers are no classes; default True.

    Returns
    -------
    Data
        Checked: finite, not empty, labels within the classes, lengths that agree.

    Raises
    ------
    InputError
        The data are missing, broken, too few or do not fit the model; says which file and why.
    MissingExtraError
        The demo's package is missing.
    """
    path = as_path("data", spec)
    instance("model", model, LoadedModel)
    if n is not None:
        at_least("n", n, 1)
    at_least("seed", seed, 0)
    prepare = _preprocess(model, size, mean, std)
    draw = _Draw(n, seed, labels)
    if str(spec) == "demo" and not isinstance(spec, Path):
        return _demo(model, prepare, draw)
    try:
        path = path.expanduser()
        is_folder, exists = path.is_dir(), path.exists()
    except (OSError, ValueError) as error:  # too long, with a null byte, or in a folder closed to us
        raise InputError(f"{str(spec)[:80]!r} cannot be looked up: {type(error).__name__}") from error
    if is_folder:
        return _folder(path, model, prepare, draw)
    if exists and path.suffix.lower() in SUFFIXES:
        files, names = [path], [_readable(path.name)]
        return _pictures(files, names, *_labels_from_names(files, names, model, draw), prepare, draw)
    if exists and path.suffix.lower() == ".npz":
        return _arrays(_npz(path), _readable(str(path)), model, prepare, draw)
    if exists:
        raise InputError(f"{str(path)!r} is neither a folder, nor a picture, nor an .npz file; {FORMS}")
    if isinstance(spec, str) and is_factory(spec):
        with current_folder_first():
            return _arrays(_made(spec), spec, model, prepare, draw)
    raise InputError(f"there is no file or folder {str(spec)!r}; {FORMS}")


@dataclass(frozen=True)
class _Draw:
    """Which examples, and whether their labels count."""

    n: int | None
    seed: int
    labels: bool

    def rows(self, total: int, labels: np.ndarray | None, where: str) -> np.ndarray:
        if self.n is not None and self.n > total:
            raise InputError(f"{where} holds {total} examples, n = {self.n} were asked for")
        if self.n is None or self.n == total:
            return np.arange(total)
        order = np.random.default_rng(self.seed).permutation(total)
        if labels is not None:
            # everybody's place within the class, then all firsts, all seconds ...
            by_class = np.argsort(labels[order], kind="stable")
            sorted_labels = labels[order][by_class]
            starts = np.searchsorted(sorted_labels, sorted_labels)
            place = np.empty(total, dtype=np.int64)
            place[by_class] = np.arange(total) - starts
            order = order[np.argsort(place, kind="stable")]
        return np.sort(order[: self.n])


def _preprocess(model: LoadedModel, size: Any, mean: Any, std: Any) -> Any:
    if size is None and mean is None and std is None:
        return model.preprocess
    base = Preprocess() if model.preprocess is None else model.preprocess
    if not isinstance(base, Preprocess):
        raise InputError(f"{model.name} brings preprocessing of its own: size, mean and std cannot be changed")
    return base.changed(size, mean, std)


def _readable(name: str) -> str:
    """File names may hold bytes that are no text; reports are written as UTF-8."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


# ---------------------------------------------------------------- labels


def _fold(name: str) -> str:
    return " ".join(re.split(r"[\s_-]+", name.casefold().strip()))


def labels_of_texts(texts: Sequence[str], model: LoadedModel, whose: Sequence[str], where: str) -> np.ndarray:
    """Class indices for names or numbers of classes."""
    exact: dict[str, set[int]] = {}
    folded: dict[str, set[int]] = {}
    for i, name in enumerate(model.class_names or ()):
        exact.setdefault(name, set()).add(i)
        for synonym in (name, *name.split(",")):
            folded.setdefault(_fold(synonym), set()).add(i)
    known: dict[str, int] = {}
    for text, owner in zip(texts, whose, strict=True):
        if text in known:
            continue
        found = exact.get(text) or folded.get(_fold(text), set())
        if len(found) > 1:
            raise InputError(f"{where}: {text!r} (of {owner!r}) names the classes {sorted(found)}; give the index")
        if found:
            (known[text],) = found
        elif re.fullmatch(r"[0-9]{1,18}", text.strip()):
            known[text] = int(text)
        else:
            classes = (
                f"classes are {', '.join((model.class_names or [])[:5])} ..."
                if model.class_names
                else ("the model does not name its classes: give indices")
            )
            raise InputError(f"{where}: {text!r} (of {owner!r}) is no class of {model.name}; {classes}")
    return _in_range(np.array([known[t] for t in texts], dtype=np.int64), model, whose, where)


def _in_range(indices: np.ndarray, model: LoadedModel, whose: Sequence[str], where: str) -> np.ndarray:
    bad = indices < 0
    if model.n_classes is not None:
        bad |= indices >= model.n_classes
    if bad.any():
        i = int(np.flatnonzero(bad)[0])
        limit = f"0 to {model.n_classes - 1}" if model.n_classes is not None else "0 and above"
        raise InputError(
            f"{where}: label {indices[i]} of {whose[i]!r} is outside the classes of {model.name} ({limit}); "
            "if it is no class, leave labels aside (labels=False)"
        )
    return indices


def _from_array(values: Any, model: LoadedModel, whose: Sequence[str], where: str) -> np.ndarray:
    """Class indices for an array of indices, of class names, or of an estimator's own class values."""
    values = _array(values, f"{where}: labels")
    if values.ndim == 2 and values.shape[1] == 1:
        values = values[:, 0]
    if values.shape != (len(whose),):
        hint = "; one-hot labels become indices with argmax(axis=1)" if values.ndim == 2 else ""
        raise InputError(f"{where}: {len(whose)} inputs need labels of shape ({len(whose)},), got {values.shape}{hint}")
    if values.dtype.kind == "U":
        return labels_of_texts(values.tolist(), model, whose, where)
    if values.dtype.kind not in "biuf" or not np.array_equal(values, np.trunc(values.astype(float))):
        raise InputError(f"{where}: labels must be indices or names of classes, got {values.dtype}: {values[:3]}")
    classes = getattr(model.module, "classes_", None)
    if isinstance(classes, np.ndarray) and classes.dtype.kind in "biuf":
        index = np.clip(np.searchsorted(classes, values), 0, len(classes) - 1)
        unseen = np.flatnonzero(classes[index] != values)
        if len(unseen):
            raise InputError(
                f"{where}: label {values[unseen[0]]} of {whose[unseen[0]]!r} is none of the classes that {model.name} "
                f"was fitted on: {classes.tolist()[:10]}"
            )
        return index.astype(np.int64)
    if np.abs(values.astype(float)).max() > 2**53:
        raise InputError(f"{where}: labels are outside the classes of {model.name}")
    return _in_range(values.astype(np.int64), model, whose, where)


# ---------------------------------------------------------------- pictures


def _is_picture(file: Path) -> bool:
    return file.suffix.lower() in SUFFIXES and not file.name.startswith(".") and file.is_file()


def _folder(folder: Path, model: LoadedModel, prepare: Any, draw: _Draw) -> Data:
    try:
        entries = sorted(folder.iterdir())
        files = [f for f in entries if _is_picture(f)]
        inside = {d: sorted(f for f in d.iterdir() if _is_picture(f)) for d in entries if d.is_dir()}
    except OSError as error:
        raise InputError(f"{str(folder)!r} cannot be read: {error}") from error
    inside = {d: fs for d, fs in inside.items() if fs and not d.name.startswith(".")}
    table = folder / "labels.csv"
    if files and inside and not table.is_file():
        raise InputError(
            f"{str(folder)!r} holds pictures, and so does {next(iter(inside)).name!r} in it; keep them in one place, "
            "or list those meant in labels.csv"
        )
    files += [f for fs in inside.values() for f in fs]
    if not files:
        raise InputError(f"{str(folder)!r} holds no pictures ({', '.join(sorted(SUFFIXES))})")
    names = [f.relative_to(folder).as_posix() for f in files]
    shown = [_readable(n) for n in names]
    if table.is_file() and draw.labels:
        texts = _table(table, names)
        labels, note = labels_of_texts(texts, model, shown, _readable(str(table))), "labels from labels.csv"
    elif inside and draw.labels and not table.is_file():
        texts = [f.parent.name for f in files]
        labels, note = (
            labels_of_texts(texts, model, shown, _readable(str(folder))),
            "labels from the names of the sub-folders",
        )
    else:
        labels, note = _labels_from_names(files, shown, model, draw)
    return _pictures(files, shown, labels, note, prepare, draw)


def _labels_from_names(
    files: Sequence[Path], shown: Sequence[str], model: LoadedModel, draw: _Draw
) -> tuple[np.ndarray | None, str]:
    found = [_TRAILING.search(f.stem) for f in files]
    if not draw.labels or not any(found):
        return None, "no labels"
    if not all(found):
        with_, without = shown[[bool(m) for m in found].index(True)], shown[found.index(None)]
        raise InputError(
            f"the number in {with_!r} would be a label, but {without!r} has none; give every picture one, write "
            "labels.csv, or leave labels aside (labels=False)"
        )
    texts = [m.group(1) for m in found if m is not None]
    if max(map(len, texts)) > 18:
        raise InputError(f"the number in {shown[int(np.argmax([len(t) for t in texts]))]!r} is too large for a label")
    indices = _in_range(np.array([int(t) for t in texts], dtype=np.int64), model, shown, "labels from file names")
    return indices, "labels from the last number of the file names"


def _table(table: Path, names: Sequence[str]) -> list[str]:
    """The label of each picture, as text, from a table with the columns file and label."""
    try:
        with table.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as stream:
            reader = csv.DictReader(stream)
            header = reader.fieldnames = [name.strip() for name in reader.fieldnames or []]
            rows = [(reader.line_num, row) for row in reader]
    except (OSError, csv.Error) as error:
        raise InputError(f"{str(table)!r} cannot be read: {error}") from error
    if not {"file", "label"} <= set(header):
        raise InputError(f"{str(table)!r} needs the columns file and label, it has {header}")
    labels: dict[str, str] = {}
    for line, row in rows:
        name, label = row["file"], row["label"]
        if not name or not label or not label.strip():
            raise InputError(f"{str(table)!r}, line {line}: file or label is empty")
        name = Path(name if name in names else name.strip()).as_posix()
        if name in labels:
            raise InputError(f"{str(table)!r}, line {line}: {name!r} is there twice")
        labels[name] = label.strip()
    unknown = sorted(set(labels) - set(names))
    if unknown:
        raise InputError(f"{str(table)!r} names {unknown[0]!r}, which is no picture of this folder")
    bare = sorted(set(names) - set(labels))
    if bare:
        raise InputError(f"{str(table)!r} has no row for {bare[0]!r}; give every picture one, or take it out")
    return [labels[n] for n in names]


def _pictures(
    files: Sequence[Path], names: Sequence[str], labels: np.ndarray | None, note: str, prepare: Any, draw: _Draw
) -> Data:
    if prepare is None:
        raise InputError(
            "the model takes no pictures, as far as is known; give an .npz file or a factory, or say how pictures are "
            "to be prepared (size, mean and std)"
        )
    where = _readable(str(files[0].parent))
    rows = draw.rows(len(files), labels, where)
    chosen = [names[int(i)] for i in rows]
    inputs, images = _prepared([files[int(i)] for i in rows], chosen, prepare, where)
    picked = None if labels is None else torch.from_numpy(labels[rows])
    return Data(inputs, picked, chosen, images, note=note)


def _prepared(
    pictures: Sequence[Path] | np.ndarray, names: Sequence[str], prepare: Any, where: str
) -> tuple[Tensor, np.ndarray]:
    """Inputs and what to show of them, for files or an array of pictures."""
    read = (read_image(p) if isinstance(p, Path) else p for p in pictures)
    if isinstance(prepare, Preprocess):
        frames = np.stack([prepare.frame(p) for p in read])
        return prepare.scale(frames), frames
    made = []
    for name, picture in zip(names, read, strict=True):
        try:
            made.append(torch.as_tensor(prepare(picture)))
        except Exception as error:  # the user's function may fail in any way
            raise InputError(f"{where}: the model's preprocessing failed on {name!r}: {error}") from error
        if made[-1].shape != made[0].shape or made[-1].ndim != 3:
            raise InputError(
                f"{where}: the model's preprocessing made shape {tuple(made[-1].shape)} of {name!r} and "
                f"{tuple(made[0].shape)} of {names[0]!r}; expected (channel, height, width), the same for all"
            )
    inputs = torch.stack(made).float()
    _require_finite(inputs.numpy(), names, where)
    return inputs, _displayed(inputs)


def _displayed(inputs: Tensor) -> np.ndarray:
    """Pictures of inputs whose scaling is unknown: each from its least to its greatest value."""
    x = inputs.float()[:, :3] if inputs.shape[1] >= 3 else inputs.float()[:, :1].expand(-1, 3, -1, -1)
    low, high = x.amin((1, 2, 3), keepdim=True), x.amax((1, 2, 3), keepdim=True)
    x = (x - low) / (high - low).clamp_min(torch.finfo(torch.float32).tiny)
    return (x * 255).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous().numpy()


def _demo(model: LoadedModel, prepare: Any, draw: _Draw) -> Data:
    files = sorted((package_folder("foolbox") / "data").glob("imagenet_*_*.jpg"))
    if not files:
        raise MissingExtraError(f"foolbox holds no photographs; install it again: {DEMO_PIP}")
    names = [f.name for f in files]
    return _pictures(files, names, *_labels_from_names(files, names, model, draw), prepare, draw)


# ---------------------------------------------------------------- arrays


def _npz(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
            content = {}
            for name in archive.files:
                try:
                    content[name] = archive[name]
                except ValueError as error:
                    if "pickle" in str(error):
                        raise InputError(
                            f"{str(path)!r}: {name!r} is an array of objects, which could run code when read and is "
                            "refused; save numbers or text"
                        ) from error
                    raise
    except InputError:
        raise
    except Exception as error:  # broken archives fail in many ways
        raise InputError(f"{str(path)!r} is broken or no .npz file: {type(error).__name__}: {error}") from error
    return content


def _made(spec: str) -> Mapping[str, Any]:
    made = call_factory(spec, (Data, Mapping, tuple))
    if isinstance(made, Data):
        made = {f.name: getattr(made, f.name) for f in fields(made) if f.name != "note"}
    elif isinstance(made, tuple) and len(made) == 2:
        made = {"x": made[0], "y": made[1]}
    if not isinstance(made, Mapping):
        raise InputError(f"{spec} made a {type(made).__name__}; expected (x, y), a mapping with the key x, or Data")
    return {str(key): value for key, value in made.items() if value is not None}


def _one_of(content: Mapping[str, Any], where: str, *keys: str) -> Any:
    found = [k for k in keys if k in content]
    if len(found) > 1:
        raise InputError(f"{where} holds both {' and '.join(found)}; keep one")
    return content[found[0]] if found else None


def _array(value: Any, what: str) -> np.ndarray:
    if isinstance(value, Tensor):
        value = value.detach().cpu()
        value = value.float() if value.is_floating_point() else value
    try:
        array = np.asarray(value)
    except (ValueError, TypeError) as error:
        raise InputError(f"{what}: no array can be made of it: {error}") from error
    if array.dtype.kind == "T" or (array.dtype.kind == "O" and all(isinstance(v, str) for v in array.flat)):
        return array.astype(str)
    if array.dtype.kind == "O":
        raise InputError(f"{what}: an array of objects, or of rows of different length; expected numbers of one shape")
    return array


def _require_finite(x: np.ndarray, names: Sequence[str], where: str) -> None:
    bad = np.flatnonzero(~np.isfinite(x.reshape(len(x), -1)).all(1))
    if len(bad):
        raise InputError(
            f"{where}: {len(bad)} of {len(x)} examples hold NaN, infinity or numbers too large for float32, "
            f"the first is {names[bad[0]]!r}"
        )


def _numbers(value: Any, what: str, keep_integers: bool) -> np.ndarray:
    array = _array(value, what)
    if array.dtype.kind not in "biuf":
        raise InputError(f"{what}: expected numbers, got {array.dtype}")
    if array.ndim == 0 or array.size == 0:
        raise InputError(f"{what}: expected at least one row, got shape {array.shape}")
    if keep_integers and array.dtype.kind in "biu":
        return array.astype(np.int64)
    if array.dtype == np.uint8:
        return array
    with np.errstate(over="ignore"):
        return np.ascontiguousarray(array, dtype=np.float32)


def _reads_tokens(model: LoadedModel) -> bool:
    # networks for pictures may hold embeddings too, of positions
    module = model.module
    return (
        model.preprocess is None
        and isinstance(module, nn.Module)
        and any(isinstance(m, nn.Embedding) for m in module.modules())
    )


def _arrays(content: Mapping[str, Any], where: str, model: LoadedModel, prepare: Any, draw: _Draw) -> Data:
    x = _one_of(content, where, "x", "inputs", "input_ids")
    if x is None:
        raise InputError(f"{where} has no key x, inputs or input_ids; it has {', '.join(content) or 'nothing'}")
    used = {"x", "inputs", "y", "labels", "names", "images", "masks", "boxes"}
    if "input_ids" in content:
        x = {k: content[k] for k in TEXT_KEYS if k in content}
        used |= set(TEXT_KEYS)
    tokens = _reads_tokens(model)
    mapped = isinstance(x, Mapping)
    parts = {
        str(k): _numbers(v, f"{where}: {k}", tokens or k in TEXT_KEYS) for k, v in (x.items() if mapped else [("x", x)])
    }
    lengths = {k: len(v) for k, v in parts.items()}
    if len(set(lengths.values())) != 1:
        raise InputError(f"{where}: inputs differ in their number of rows: {lengths}")
    total = next(iter(lengths.values()))

    names = _names(content.get("names"), total, where)
    y = _one_of(content, where, "y", "labels") if draw.labels else None
    labels = None if y is None else _from_array(y, model, names, where)
    for key, part in parts.items():
        _require_finite(part, names, f"{where}: {key}")
    first = next(iter(parts.values()))
    pictures = not mapped and first.dtype == np.uint8 and prepare is not None and first.ndim in (3, 4)
    if pictures and first.ndim == 4 and first.shape[3] not in (1, 3) and first.shape[1] in (1, 3):
        first = np.moveaxis(first, 1, 3)
    if pictures and first.ndim == 4 and first.shape[3] not in (1, 3):
        raise InputError(f"{where}: pictures are (n, height, width[, 3]) or (n, 3, height, width), got {first.shape}")
    grid = first.shape[1:3] if pictures else first.shape[2:] if not mapped and first.ndim == 4 else None
    images, masks, boxes = _extras(content, total, grid, names, where)

    rows = draw.rows(total, labels, where)
    chosen = [names[int(i)] for i in rows]
    picked = None if labels is None else torch.from_numpy(labels[rows])
    images, masks, boxes = (None if a is None else a[rows] for a in (images, masks, boxes))
    inputs: Tensor | dict[str, Tensor]
    if pictures:
        inputs, images = _prepared(first[rows], chosen, prepare, where)
        if isinstance(prepare, Preprocess):
            masks = None if masks is None else np.stack([prepare.frame_mask(m) for m in masks])
            boxes = None if boxes is None else prepare.frame_boxes(boxes, first.shape[2], first.shape[1])
        elif masks is not None or boxes is not None:
            raise InputError(
                f"{where}: masks and boxes cannot follow {model.name}'s own preprocessing; give x prepared"
            )
        _require_objects(masks, boxes, chosen, f"{where}, after resizing and cropping")
    else:
        tensors = {
            k: torch.from_numpy(np.ascontiguousarray(v[rows] if v.dtype == np.int64 else v[rows].astype(np.float32)))
            for k, v in parts.items()
        }
        inputs = tensors if mapped else tensors["x"]
        if images is None and grid is not None and first.shape[1] in (1, 3) and not mapped:
            images = _displayed(tensors["x"])
    ignored = sorted(set(content) - used)
    note = "no labels" if labels is None else "labels from the data"
    if ignored:
        note += f"; not used: {', '.join(ignored)}"
    return Data(inputs, picked, chosen, images, masks, boxes, note)


def _names(value: Any, total: int, where: str) -> list[str]:
    if value is None:
        return [str(i) for i in range(total)]
    names = _array(value, f"{where}: names")
    if names.shape != (total,) or names.dtype.kind not in "Uiu":
        raise InputError(f"{where}: expected {total} names of text, got {names.dtype} of shape {names.shape}")
    return [_readable(str(name)) for name in names]


def _extras(
    content: Mapping[str, Any], total: int, grid: tuple[int, ...] | None, names: Sequence[str], where: str
) -> tuple[np.ndarray | None, np.ndarray | None, np.ndarray | None]:
    """The optional arrays images, masks and boxes, checked against the grid of the inputs."""
    given = {k: _array(content[k], f"{where}: {k}") for k in ("images", "masks", "boxes") if k in content}
    if given and grid is None:
        raise InputError(f"{where}: {', '.join(given)} need inputs that are pictures")
    for key, array in given.items():
        if grid is None:
            break
        shape = {"images": (total, *grid, 3), "masks": (total, *grid), "boxes": (total, 4)}[key]
        fits = array.dtype == np.uint8 if key == "images" else array.dtype.kind in "biuf"
        if array.shape != shape or not fits:
            kind = "uint8" if key == "images" else "numbers"
            raise InputError(f"{where}: {key} must be {kind} of shape {shape}, got {array.dtype} of {array.shape}")
        if key != "images":
            _require_finite(array, names, f"{where}: {key}")
    masks = given["masks"] != 0 if "masks" in given else None
    boxes = given["boxes"].astype(np.float64) if "boxes" in given else None
    if boxes is not None and grid is not None:
        limit = np.array([grid[1], grid[0]] * 2)
        outside = np.flatnonzero(((boxes < 0) | (boxes > limit)).any(1))
        if len(outside):
            raise InputError(
                f"{where}: box {boxes[outside[0]].tolist()} of {names[outside[0]]!r} leaves the picture of "
                f"{grid[1]}x{grid[0]} pixels; boxes are left, upper, right, lower"
            )
    _require_objects(masks, boxes, names, where)
    return given.get("images"), masks, boxes


def _require_objects(masks: np.ndarray | None, boxes: np.ndarray | None, names: Sequence[str], where: str) -> None:
    if masks is not None and not masks.any((1, 2)).all():
        raise InputError(f"{where}: the mask of {names[int(np.argmin(masks.any((1, 2))))]!r} is empty")
    if boxes is not None:
        empty = np.flatnonzero((boxes[:, 2] <= boxes[:, 0]) | (boxes[:, 3] <= boxes[:, 1]))
        if len(empty):
            raise InputError(f"{where}: the box of {names[empty[0]]!r} is empty; boxes are left, upper, right, lower")

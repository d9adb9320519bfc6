"""Picture files as 8-bit RGB, and the geometry and scaling between a picture and a network's input."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from nissl.errors import InputError

SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"})
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
RESAMPLING = {
    "nearest": Image.Resampling.NEAREST,
    "box": Image.Resampling.BOX,
    "bilinear": Image.Resampling.BILINEAR,
    "hamming": Image.Resampling.HAMMING,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}


def read_image(path: Path) -> Image.Image:
    """Read a picture file as upright 8-bit RGB.

    Grey, palette, CMYK and 16-bit pictures are converted, EXIF rotation is applied, transparency is laid on white, and
    of an animation the first frame is taken.

    Parameters
    ----------
    path : Path
        A regular file in a format that Pillow reads.

    Returns
    -------
    Image.Image
        Mode RGB.

    Raises
    ------
    InputError
        The file is missing, broken, truncated, implausibly large, or holds values with no known range.
    """
    if not path.is_file():
        raise InputError(f"no such picture file: {str(path)!r}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path) as image:
                return as_rgb(ImageOps.exif_transpose(image))
    except InputError as error:
        raise InputError(f"{str(path)!r}: {error}") from error
    except Exception as error:  # decoders raise many kinds of errors on broken files
        reason = str(error).replace(str(path), path.name) or type(error).__name__
        raise InputError(
            f"{str(path)!r} cannot be read as a picture ({reason}); remove the file or save it again as PNG or JPEG"
        ) from error


def as_rgb(image: Image.Image | np.ndarray) -> Image.Image:
    """Convert a picture to 8-bit RGB.

    Parameters
    ----------
    image : Image.Image or array of uint8 (height, width) or (height, width, 1, 3 or 4)
        Any mode of Pillow except floating point.

    Returns
    -------
    Image.Image
        Mode RGB; 16-bit values are divided by 257, transparent pixels are laid on white.

    Raises
    ------
    InputError
        The array is not a uint8 picture, or the values have no known range.
    """
    if isinstance(image, np.ndarray):
        fits = image.ndim == 2 or (image.ndim == 3 and image.shape[2] in (1, 3, 4))
        if image.dtype != np.uint8 or not fits or image.size == 0:
            raise InputError(
                "a picture is an array of uint8 (height, width) or (height, width, 1, 3 or 4), "
                f"got {image.dtype} of shape {image.shape}"
            )
        image = Image.fromarray(image[..., 0] if image.ndim == 3 and image.shape[2] == 1 else image)
    if image.mode == "F":
        raise InputError("floating-point pixels have no known range; save it as an 8-bit or 16-bit picture")
    if image.mode.startswith("I"):
        values = np.asarray(image).astype(np.int64)
        if values.min() < 0 or values.max() > 65535:
            raise InputError("32-bit pixels have no known range; save it as an 8-bit or 16-bit picture")
        image = Image.fromarray(np.round(values / 257).astype(np.uint8))
    if image.has_transparency_data:
        ground = Image.new("RGBA", image.size, "white")
        ground.alpha_composite(image.convert("RGBA"))
        image = ground
    return image.convert("RGB")


@dataclass(frozen=True)
class Preprocess:
    """From a picture to a network's input: resize, crop in the centre, scale.

    Parameters
    ----------
    size : (int, int)
        Height and width of the input, in pixels; default (224, 224).
    resize : int or (int, int)
        Before the crop the shorter side is resized to this, or height and width to these; default 256.
    mean, std : tuple of float
        Input = (pixel / 255 - mean) / std, one value a channel; one channel means a grey input. Defaults: ImageNet's.
    interpolation : str
        ``nearest``, ``box``, ``bilinear`` (default), ``hamming``, ``bicubic`` or ``lanczos``, all with antialiasing.

    Raises
    ------
    InputError
        Sizes are not positive, the crop is larger than the resized picture, `mean` and `std` are not one or three
        finite numbers each, or an element of `std` is not positive.
    """

    size: tuple[int, int] = (224, 224)
    resize: int | tuple[int, int] = 256
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD
    interpolation: str = "bilinear"

    def __post_init__(self) -> None:
        resize = (self.resize, self.resize) if isinstance(self.resize, int) else self.resize
        if min(*self.size, *resize) < 1:
            raise InputError(f"sizes must be positive, got size {self.size} and resize {self.resize}")
        if self.size[0] > resize[0] or self.size[1] > resize[1]:
            raise InputError(f"a crop of {self.size} does not fit into a picture resized to {self.resize}")
        if len(self.mean) not in (1, 3) or len(self.std) != len(self.mean):
            raise InputError(f"mean and std need one or three numbers each, got {self.mean} and {self.std}")
        if not all(map(math.isfinite, self.mean + self.std)) or min(self.std) <= 0:
            raise InputError(f"mean and std must be finite and std positive, got {self.mean} and {self.std}")
        if self.interpolation not in RESAMPLING:
            raise InputError(f"unknown interpolation {self.interpolation!r}; choose from {', '.join(RESAMPLING)}")

    def __str__(self) -> str:
        height, width = self.size
        if self.resize == self.size:
            frame = f"resized to {height}x{width}"
        elif isinstance(self.resize, int):
            frame = f"shorter side resized to {self.resize}, centre {height}x{width}"
        else:
            frame = f"resized to {self.resize[0]}x{self.resize[1]}, centre {height}x{width}"
        numbers = [", ".join(f"{v:.4g}" for v in values) for values in (self.mean, self.std)]
        grey = "grey, " if len(self.mean) == 1 else ""
        return f"{grey}{frame} ({self.interpolation}), mean ({numbers[0]}), std ({numbers[1]})"

    def __call__(self, image: Image.Image | np.ndarray) -> Tensor:
        """Give the network's input (channel, height, width) for one picture."""
        return self.scale(self.frame(image)[None])[0]

    def window(self, width: int, height: int) -> tuple[float, float, float, float]:
        """Give the part of a picture that the network sees: left, upper, right, lower, in pixels of the picture."""
        if isinstance(self.resize, int):
            short = min(width, height)
            across, down = (int(self.resize * side / short) for side in (width, height))
        else:
            down, across = self.resize
        left, upper = round((across - self.size[1]) / 2), round((down - self.size[0]) / 2)
        return (
            left * width / across,
            upper * height / down,
            (left + self.size[1]) * width / across,
            (upper + self.size[0]) * height / down,
        )

    def _resample(self, image: Image.Image, method: Image.Resampling) -> Image.Image:
        # Pillow's kernels see past the window's edge, so this equals resizing first and cropping then
        return image.resize((self.size[1], self.size[0]), method, box=self.window(*image.size))

    def frame(self, image: Image.Image | np.ndarray) -> np.ndarray:
        """Give what the network sees of a picture, before scaling: uint8 (height, width, 3)."""
        return np.asarray(self._resample(as_rgb(image), RESAMPLING[self.interpolation]))

    def frame_mask(self, mask: np.ndarray) -> np.ndarray:
        """Carry a boolean mask (height, width) of a picture over to what the network sees of it."""
        return np.asarray(self._resample(Image.fromarray(mask.astype(np.uint8)), Image.Resampling.NEAREST)) > 0

    def frame_boxes(self, boxes: np.ndarray, width: int, height: int) -> np.ndarray:
        """Carry boxes (n, 4), in pixels of a picture, over to what the network sees of it, clipped to that."""
        left, upper, right, lower = self.window(width, height)
        zoom = np.array([self.size[1] / (right - left), self.size[0] / (lower - upper)] * 2)
        return np.clip((boxes - np.array([left, upper] * 2)) * zoom, 0, np.array([self.size[1], self.size[0]] * 2))

    def scale(self, frames: np.ndarray) -> Tensor:
        """Give inputs (n, channel, height, width) for frames (n, height, width, 3) of uint8."""
        pixels = torch.from_numpy(np.array(frames)).permute(0, 3, 1, 2).float()
        if len(self.mean) == 1:
            luma = torch.tensor([0.299, 0.587, 0.114])  # ITU-R 601, as Pillow's mode L
            pixels = torch.einsum("nchw,c->nhw", pixels, luma).round().unsqueeze(1)
        mean, std = (torch.tensor(values)[:, None, None] for values in (self.mean, self.std))
        return ((pixels / 255 - mean) / std).contiguous()

    def changed(self, size: Any = None, mean: Any = None, std: Any = None) -> Preprocess:
        """Give a copy with another size (an int or (height, width); resizing follows in proportion), mean or std.

        Raises
        ------
        InputError
            A value does not fit; see the class.
        """
        size_, resize = self.size, self.resize
        if size is not None:
            try:
                height, width = (int(v) for v in ((size, size) if isinstance(size, int) else size))
            except (TypeError, ValueError) as error:
                raise InputError(f"size must be an integer or (height, width), got {size!r}") from error
            if isinstance(resize, int):
                resize = max(round(resize * max(height, width) / max(size_)), height, width)
            else:
                resize = (
                    max(round(resize[0] * height / size_[0]), height),
                    max(round(resize[1] * width / size_[1]), width),
                )
            size_ = (height, width)
        return replace(
            self,
            size=size_,
            resize=resize,
            mean=self.mean if mean is None else _numbers(mean, "mean", len(self.mean)),
            std=self.std if std is None else _numbers(std, "std", len(self.std)),
        )


def _numbers(values: Any, what: str, channels: int) -> tuple[float, ...]:
    try:
        return tuple(float(v) for v in ((values,) * channels if isinstance(values, (int, float)) else values))
    except (TypeError, ValueError) as error:
        raise InputError(f"{what} must be a number or one number a channel, got {values!r}") from error

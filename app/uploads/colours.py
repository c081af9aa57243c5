"""Converts a picture to 8-bit sRGB, whatever its bit depth and its colour space.

Imports Pillow: to be loaded where pictures are decoded, and nowhere else.
"""

from collections.abc import Mapping
from contextlib import suppress
from io import BytesIO
from typing import Any

from PIL import Image, ImageCms, ImageFile

# Pillow multiplies the pixels of these kinds of PNG, and leaves the colour that stands for
# "transparent" (tRNS) as it is in the file.
_FACTORS = {"L;2": 85, "L;4": 17, "I;16B": 1 / 257, "RGB;16B": 1 / 257}

# The mode that has the channels of an ICC profile, by the colour space of the profile; and the
# modes that become it without loss. Another profile is not that of the picture.
_CHANNELS = {"RGB ": "RGB", "GRAY": "L", "CMYK": "CMYK"}
_FITTING = {"RGB": {"RGB", "L"}, "L": {"L"}, "CMYK": {"CMYK"}}

_GAMMA = 2.2  # about that of sRGB
_GAMMAS = (0.1, 10)  # others are nonsense


def in_eight_bits(picture: ImageFile.ImageFile) -> Image.Image:
    """Returns a picture in one of the modes L, LA, RGB, RGBA and CMYK, which can be scaled.

    A colour that stands for "transparent" becomes an alpha channel, because scaling would mix it
    with the colours beside it. A picture that needs no conversion is returned as it is, and not
    decoded yet.
    """
    packed = str(picture.tile[0].args) if picture.tile else ""
    full: Image.Image = picture
    if packed == "LA;16B":
        return full.convert("LA")  # Pillow makes RGBA of it, and a profile of grey would not fit
    if full.mode == "I;16":
        # Pillow's own conversion takes every value above 255 for white.
        full = full.point(lambda value: value * (1 / 257) + 0.5).convert("L")
    if packed in _FACTORS and (colour := full.info.get("transparency")) is not None:
        full.info["transparency"] = _multiplied(colour, _FACTORS[packed])
    if full.has_transparency_data:
        return _in_mode("LA" if full.mode in {"1", "L", "LA"} else "RGBA", full)
    return _in_mode({"1": "L", "P": "RGB"}.get(full.mode, full.mode), full)


def _in_mode(mode: str, picture: Image.Image) -> Image.Image:
    # convert() would decode and copy a picture that is in this mode already.
    return picture if picture.mode == mode else picture.convert(mode)


def _multiplied(colour: int | tuple[int, ...], factor: float) -> int | tuple[int, ...]:
    if isinstance(colour, tuple):
        return tuple(round(value * factor) for value in colour)
    return round(colour * factor)


def in_srgb(picture: Image.Image, info: Mapping[Any, Any]) -> Image.Image:
    """Returns a picture from `in_eight_bits` in RGB, or in RGBA if it is transparent somewhere.

    `info` says how its colours are meant: by an ICC profile, or by PNG's chunk gAMA. Where it does
    not say, or says it in a way that cannot be read, they are meant to be sRGB.
    """
    alpha = picture.getchannel("A") if picture.mode in {"LA", "RGBA"} else None
    colours = _in_mode({"LA": "L", "RGBA": "RGB"}.get(picture.mode, picture.mode), picture)
    if "icc_profile" in info:
        converted = _by_profile(colours, info["icc_profile"])
    else:
        converted = _by_gamma(colours.convert("RGB"), info)
    if alpha is not None:
        converted.putalpha(alpha)
    return converted


def _by_profile(colours: Image.Image, profile: bytes) -> Image.Image:
    with suppress(Exception):  # a broken profile is no reason to have no thumbnail
        source = ImageCms.ImageCmsProfile(BytesIO(profile))
        channels = _CHANNELS[source.profile.xcolor_space]
        if colours.mode in _FITTING[channels]:
            target = ImageCms.createProfile("sRGB")
            converted = ImageCms.profileToProfile(
                colours.convert(channels), source, target, outputMode="RGB"
            )
            assert converted is not None
            return converted
    return colours.convert("RGB")


def _by_gamma(colours: Image.Image, info: Mapping[Any, Any]) -> Image.Image:
    gamma = info.get("gamma", 1 / _GAMMA) * _GAMMA
    if "srgb" in info or not _GAMMAS[0] < gamma < _GAMMAS[1]:
        return colours
    curve = [round(255 * (value / 255) ** (1 / gamma)) for value in range(256)]
    return colours.point(curve * 3)

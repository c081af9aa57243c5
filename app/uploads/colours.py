"""Converts a picture of any bit depth and colour space to 8-bit sRGB.

Imports Pillow, so only the child process that decodes pictures may import it.
"""

from collections.abc import Mapping
from contextlib import suppress
from io import BytesIO
from typing import Any

from PIL import Image, ImageCms, ImageFile

# Kinds of PNG whose pixels Pillow scales to 8 bits, by this factor. It does not scale the colour
# that stands for "transparent" (chunk tRNS). For example, in a PNG of 2 bits, grey 3 becomes 255,
# and a transparent colour of 3 stays 3.
_FACTORS = {"L;2": 85, "L;4": 17, "I;16B": 1 / 257, "RGB;16B": 1 / 257}

# The mode with the channels of an ICC profile, by the profile's colour space, and the modes that
# can be converted to it without loss. A picture in another mode cannot have this profile.
_CHANNELS = {"RGB ": "RGB", "GRAY": "L", "CMYK": "CMYK"}
_FITTING = {"RGB": {"RGB", "L"}, "L": {"L"}, "CMYK": {"CMYK"}}

_GAMMA = 2.2  # approximately the gamma of sRGB
_GAMMAS = (0.1, 10)  # values beyond are ignored


def in_eight_bits(picture: ImageFile.ImageFile) -> Image.Image:
    """Return a picture in one of the modes L, LA, RGB, RGBA and CMYK, which can be scaled.

    A colour that stands for "transparent" becomes an alpha channel, because scaling would mix it
    with the colours beside it. A picture that needs no conversion is returned as it is, before it
    is decoded.
    """
    # 1. Pillow reads a PNG of grey and alpha with 16 bits as RGBA. Make it grey again, because its
    # ICC profile is one for grey.
    packed = str(picture.tile[0].args) if picture.tile else ""
    full: Image.Image = picture
    if packed == "LA;16B":
        return full.convert("LA")
    # 2. Scale grey of 16 bits to 8 bits. Pillow's own conversion makes every value above 255 white.
    if full.mode == "I;16":
        full = full.point(lambda value: value * (1 / 257) + 0.5).convert("L")
    # 3. Scale the transparent colour as Pillow scales the pixels.
    if packed in _FACTORS and (colour := full.info.get("transparency")) is not None:
        full.info["transparency"] = _scaled(colour, _FACTORS[packed])
    # 4. Convert to a mode that can be scaled.
    if full.has_transparency_data:
        return _in_mode("LA" if full.mode in {"1", "L", "LA"} else "RGBA", full)
    return _in_mode({"1": "L", "P": "RGB"}.get(full.mode, full.mode), full)


def _in_mode(mode: str, picture: Image.Image) -> Image.Image:
    # convert() decodes and copies a picture even if it is in this mode already.
    return picture if picture.mode == mode else picture.convert(mode)


def _scaled(colour: int | tuple[int, ...], factor: float) -> int | tuple[int, ...]:
    if isinstance(colour, tuple):
        return tuple(round(value * factor) for value in colour)
    return round(colour * factor)


def in_srgb(picture: Image.Image, info: Mapping[Any, Any]) -> Image.Image:
    """Return a picture from `in_eight_bits` in RGB, or in RGBA if it has an alpha channel.

    `info` may have an ICC profile or the value of PNG's chunk gAMA. If it has neither, or a broken
    one, the colours count as sRGB.
    """
    alpha = picture.getchannel("A") if picture.mode in {"LA", "RGBA"} else None
    colours = _in_mode({"LA": "L", "RGBA": "RGB"}.get(picture.mode, picture.mode), picture)
    if "icc_profile" in info:
        converted = _convert_by_profile(colours, info["icc_profile"])
    else:
        converted = _convert_by_gamma(colours.convert("RGB"), info)
    if alpha is not None:
        converted.putalpha(alpha)
    return converted


def _convert_by_profile(colours: Image.Image, profile: bytes) -> Image.Image:
    with suppress(Exception):  # with a broken profile, the thumbnail has unconverted colours
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


def _convert_by_gamma(colours: Image.Image, info: Mapping[Any, Any]) -> Image.Image:
    gamma = info.get("gamma", 1 / _GAMMA) * _GAMMA
    if "srgb" in info or not _GAMMAS[0] < gamma < _GAMMAS[1]:
        return colours
    curve = [round(255 * (value / 255) ** (1 / gamma)) for value in range(256)]
    return colours.point(curve * 3)

"""What an image file says about itself in its first bytes, read before anything is decoded."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass

_PNG_MAGIC = b"\x89PNG\r\n\x1a\n"
_PNG_PIXELS = (b"IHDR", b"PLTE", b"tRNS", b"eXIf", b"IDAT", b"IEND")
_MARKUP_STARTS = (b"<html", b"<!doctype", b"<?xml", b"<svg", b"<head", b"{")
# Formats without a parser of their own here; PIL reads their headers.
_OTHER_FORMATS = ("BMP", "GIF", "TIFF")


class BadImageError(ValueError):
    """An image that cannot be used; the message is the reason, in a few words."""


@dataclass(frozen=True)
class ImageHeader:
    """Format and stored size (before any EXIF rotation) of an encoded image."""

    format: str
    """`JPEG`, `PNG`, `WEBP`, or one that only PIL reads here (`BMP`, `GIF`, `TIFF`)."""
    width: int
    height: int
    special: bool
    """Transparency, CMYK, 16-bit samples, metadata that some decoders overlook, or another format."""


def read_header(data: bytes, max_pixels: int) -> ImageHeader:
    """Read format and size of an encoded image, and refuse what should not be decoded.

    The chunk checksums of a PNG are verified too: they are cheap, and a decoder may crash on damaged data.

    Args:
        data: the file.
        max_pixels: refuse images with more pixels than this, whatever their bytes say.

    Raises:
        BadImageError: empty, not an image, damaged in its structure, or of an absurd size.
    """
    if not data:
        raise BadImageError("empty file")
    if data[:3] == b"\xff\xd8\xff":
        header = _jpeg(data)
    elif data[:8] == _PNG_MAGIC:
        header = _png(data)
    elif data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        header = _webp(data)
    else:
        header = _other(data)
    if header.width < 1 or header.height < 1:
        raise BadImageError(f"{header.format} of {header.width} x {header.height} pixels")
    if header.width * header.height > max_pixels:
        raise BadImageError(f"{header.width} x {header.height} pixels, more than the limit of {max_pixels}")
    return header


def jpeg_begins(data: bytes) -> bool:
    """Whether libjpeg takes a JPEG's tables and frame: it decodes what stands in front of the pixels, alone.

    That is what decoders fail on; of damaged pixels libjpeg makes what it can. It costs about a thirtieth of
    decoding.
    """
    from PIL import Image

    head = next((at + 2 + length for marker, at, length in _jpeg_segments(data) if marker == 0xDA), None)
    if head is None:
        return False
    try:
        with Image.open(io.BytesIO(data[:head] + b"\xff\xd9"), formats=["JPEG"]) as image:
            image.draft("RGB", (1, 1))
            image.load()
    except Exception:  # PIL's plugins raise anything
        return False
    return True


def webp_is_whole(data: bytes) -> bool:
    """Whether a WebP has as many bytes as it says."""
    return len(data) >= 8 + int.from_bytes(data[4:8], "little")


def without_metadata(data: bytes) -> bytes:
    """Return an image without what says nothing of its pixels, where PIL refuses images for that.

    Of a PNG it reads all: a compressed text or profile of more than a megabyte, or a damaged resolution, is
    an error to it. Other formats are left as they are.
    """
    if data[:8] != _PNG_MAGIC:
        return data
    kept, position = [data[:8]], 8
    while position + 8 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, position)
        end = position + 12 + length
        if kind in _PNG_PIXELS:
            kept.append(data[position:end])
        position = end
    return b"".join(kept)


def _jpeg(data: bytes) -> ImageHeader:
    for marker, position, _ in _jpeg_segments(data):
        # SOF0..SOF15 without DHT (C4), JPG (C8) and DAC (CC)
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            if position + 10 > len(data):
                break
            height, width, components = struct.unpack_from(">HHB", data, position + 5)
            # CMYK: whether its values are inverted is told by a marker that some decoders overlook.
            return ImageHeader("JPEG", width, height, special=components == 4)
    raise BadImageError("damaged JPEG: no size in its header")


def _jpeg_segments(data: bytes) -> Iterator[tuple[int, int, int]]:
    """Marker, its place, and the length behind it of each segment up to the first scan's."""
    position = 2
    while position + 4 <= len(data):
        if data[position] != 0xFF:  # stray bytes before a marker, which libjpeg passes over
            position = data.find(0xFF, position)
            if position < 0:
                break
            continue
        marker = data[position + 1]
        if marker == 0:  # no marker but a stray 0xFF
            position += 2
            continue
        if marker == 0xFF:  # fill byte
            position += 1
            continue
        if marker == 0x01 or 0xD0 <= marker <= 0xD8:  # markers without a length
            position += 2
            continue
        if marker == 0xD9:
            break
        (length,) = struct.unpack_from(">H", data, position + 2)
        yield marker, position, length
        if marker == 0xDA:
            break
        position += 2 + length


def _png(data: bytes) -> ImageHeader:
    header, position, special, pixels, end = None, 8, False, False, False
    while position + 12 <= len(data) and not end:
        length, kind = struct.unpack_from(">I4s", data, position)
        body_end = position + 8 + length
        if body_end + 4 > len(data):
            break
        (checksum,) = struct.unpack_from(">I", data, body_end)
        if zlib.crc32(memoryview(data)[position + 4 : body_end]) != checksum:
            raise BadImageError(f"damaged PNG: checksum of chunk {kind!r}")
        if header is None:
            if kind != b"IHDR" or length != 13:
                raise BadImageError("damaged PNG: no header chunk")
            width, height, bits, colour = struct.unpack_from(">IIBB", data, position + 8)
            header = ImageHeader("PNG", width, height, special=False)
            special = bits == 16 or colour in (4, 6)  # grey or colour with alpha
        special = special or kind in (b"tRNS", b"eXIf", b"acTL")
        pixels = pixels or kind == b"IDAT"
        end = kind == b"IEND"
        position = body_end + 4
    if header is None or not pixels or not end:
        raise BadImageError("truncated PNG")
    return ImageHeader("PNG", header.width, header.height, special)


def _webp(data: bytes) -> ImageHeader:
    kind, body = data[12:16], data[20:30]
    if len(body) < 10:
        raise BadImageError("truncated WebP")
    if kind == b"VP8 ":
        if body[3:6] != b"\x9d\x01\x2a":
            raise BadImageError("damaged WebP: no key frame")
        width, height = struct.unpack_from("<HH", body, 6)
        return ImageHeader("WEBP", width & 0x3FFF, height & 0x3FFF, special=False)
    if kind == b"VP8L":
        if body[0] != 0x2F:
            raise BadImageError("damaged WebP: no lossless signature")
        (bits,) = struct.unpack_from("<I", body, 1)
        alpha = bool(bits >> 28 & 1)
        return ImageHeader("WEBP", (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1, special=alpha)
    if kind == b"VP8X":  # the extended format: alpha, EXIF or animation
        width = int.from_bytes(body[4:7], "little") + 1
        height = int.from_bytes(body[7:10], "little") + 1
        return ImageHeader("WEBP", width, height, special=True)
    raise BadImageError(f"damaged WebP: unknown chunk {kind!r}")


def _other(data: bytes) -> ImageHeader:
    from PIL import Image

    start = data[:256].lstrip().lower()
    if start.startswith(_MARKUP_STARTS):
        raise BadImageError("text or HTML in place of an image")
    try:
        with Image.open(io.BytesIO(data), formats=_OTHER_FORMATS) as image:
            return ImageHeader(image.format or "", image.width, image.height, special=True)
    except Image.DecompressionBombError as error:
        raise BadImageError(str(error)) from error
    except Exception as error:
        raise BadImageError(f"not an image: starts with {data[:8]!r}") from error

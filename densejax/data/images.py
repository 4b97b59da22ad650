"""Image files to upright uint8 arrays on the host, and the one crop of them that is evaluated."""

import contextlib
import functools
import io

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

try:
    import simplejpeg
except ImportError:  # streams need it; without it Pillow decodes to the same bits, more slowly
    simplejpeg = None

# Pillow knows more formats, of which some run programs of the machine.
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
MOST_PIXELS = Image.MAX_IMAGE_PIXELS  # about 89 million: files of more were made to fill the memory
JPEG, EXIF, SCAN = b"\xff\xd8", b"\xff\xe1", b"\xff\xda"  # markers: its start, APP1, its pixels


class Picture:
    """An image file of which the head alone is read: `height` and `width`, pixels, upright.

    Upright is what its EXIF orientation says; one that cannot be read says nothing.
    """

    def __init__(self, encoded: bytes):
        """Raises whatever Pillow does for what it cannot read, or will not."""
        self._encoded, orientation, plain = encoded, 1, _plain_size(encoded)
        height, width = plain or self._image.size[::-1]
        if width * height > MOST_PIXELS:
            raise ValueError(f"{width}x{height} pixels exceed the limit of {MOST_PIXELS:,}")
        if not plain and self._image.format != "TIFF":  # which Pillow turns itself
            try:
                orientation = self._image.getexif().get(ExifTags.Base.Orientation)
            except Exception:  # the half of a PNG that was read on the way would pass for whole
                del self._image
        self._swapped = orientation in (5, 6, 7, 8)
        self._rows = slice(None, None, -1 if orientation in (3, 4, 7, 8) else 1)
        self._columns = slice(None, None, -1 if orientation in (2, 3, 6, 7) else 1)
        self.height, self.width = (width, height) if self._swapped else (height, width)

    @functools.cached_property
    def _image(self):
        try:
            return Image.open(io.BytesIO(self._encoded), formats=FORMATS)
        except UnidentifiedImageError:
            raise ValueError(f"it is not recognised as {', '.join(FORMATS)}") from None

    def decode(self, min_height: int = 0, min_width: int = 0) -> np.ndarray:
        """The pixels, RGB uint8 [height, width, 3].

        A JPEG of at least twice the least size that is asked for is decoded at a half, 3/8, a
        quarter or an eighth: its cosine transform is then its own low-pass filter.

        Raises:
          Exception: whatever Pillow or simplejpeg raises for an image that is not whole.
        """
        least = (min_width, min_height) if self._swapped else (min_height, min_width)
        pixels = self._decode_jpeg(*least)
        if pixels is None:
            if self._image.mode.startswith(("I", "F")):  # they would become white without a word
                raise ValueError("its pixels have more than 8 bits")
            pixels = np.asarray(self._image.convert("RGB"))
        return (pixels.swapaxes(0, 1) if self._swapped else pixels)[self._rows, self._columns]

    def _decode_jpeg(self, min_height, min_width):
        """By simplejpeg, which alone tells of damage; None: it must be Pillow that decodes."""
        encoded = self._encoded
        if simplejpeg is None or not encoded.startswith(JPEG):
            return None
        if encoded[6:11] == b"JFIF\0" and encoded[11] != 1:  # libjpeg would speak of that alone
            encoded = encoded[:11] + b"\1" + encoded[12:]
        least = {"min_height": min_height, "min_width": min_width, "min_factor": 2}
        try:
            inks = simplejpeg.decode_jpeg_header(encoded)[2] in ("CMYK", "YCCK")
            colours = "CMYK" if inks else "RGB"
            pixels = simplejpeg.decode_jpeg(encoded, colours, **least if min_height else {})
        except ValueError as error:
            if str(error).startswith(("Corrupt", "Premature")):
                raise
            return None  # a kind of JPEG that it does not know
        return None if inks else pixels  # Pillow knows what colours the inks make


def _plain_size(encoded: bytes) -> tuple[int, int] | None:
    """(height, width) of a JPEG without EXIF data, in a tenth of Pillow's time; None: of others."""
    if simplejpeg is None or not encoded.startswith(JPEG):
        return None
    at = len(JPEG)  # of a segment: marker, which is 0xFF and a byte, then its length
    while (marker := encoded[at : at + 2])[:1] == b"\xff" and marker not in (EXIF, SCAN):
        at += 2 + int.from_bytes(encoded[at + 2 : at + 4])
    if marker == SCAN:
        with contextlib.suppress(ValueError):
            return simplejpeg.decode_jpeg_header(encoded, strict=False)[:2]
    return None


def evaluation_crop(encoded: bytes, size: int, *, resize: int) -> np.ndarray:
    """The middle of an image whose shorter side was resized, uint8 [size, size, 3].

    The definition is that of torchvision's `Resize` and `CenterCrop` on Pillow images: an
    antialiased bilinear filter, the longer side rounded down, the crop's corner to even.

    Args:
      encoded: the image.
      size: of the crop, pixels; at most `resize`.
      resize: the shorter side, pixels.
    """
    image = Image.fromarray(Picture(encoded).decode())
    short, long = sorted(image.size)
    long = int(resize * long / short)
    width, height = (resize, long) if image.width <= image.height else (long, resize)
    if width * height > MOST_PIXELS:
        raise ValueError(f"{image.width}x{image.height} pixels cannot be made {width}x{height}")
    left, top = round((width - size) / 2), round((height - size) / 2)
    image = image.resize((width, height), Image.Resampling.BILINEAR)
    return np.asarray(image.crop((left, top, left + size, top + size)))

"""Makes upright uint8 arrays of image files, on the host, and the one crop for evaluation."""

import io

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

try:
    import simplejpeg
except ImportError:  # streams need it; without it Pillow decodes to the same bits, more slowly
    simplejpeg = None

# Pillow knows more formats; some of them start programs on the machine.
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
MOST_PIXELS = Image.MAX_IMAGE_PIXELS  # about 89 million; a file with more may fill the memory
JPEG = b"\xff\xd8"  # how the file begins


class Picture:
    """An image file. At first only its head is read: `height` and `width`, pixels, upright.

    Its EXIF orientation says what is upright; if that cannot be read, it is taken as it is stored.
    """

    def __init__(self, encoded: bytes):
        """Reads the head; raises whatever Pillow raises for a file that it does not read."""
        self._encoded, self._image = encoded, _open(encoded)
        width, height = self._image.size
        if width * height > MOST_PIXELS:
            raise ValueError(f"{width}x{height} pixels exceed the limit of {MOST_PIXELS:,}")
        orientation = 1
        if self._image.format != "TIFF":  # which Pillow turns itself
            try:
                orientation = self._image.getexif().get(ExifTags.Base.Orientation)
            except Exception:  # half of a PNG is read by now, and would be taken for the whole
                self._image = _open(encoded)
        self._swapped = orientation in (5, 6, 7, 8)
        self._rows = slice(None, None, -1 if orientation in (3, 4, 7, 8) else 1)
        self._columns = slice(None, None, -1 if orientation in (2, 3, 6, 7) else 1)
        self.height, self.width = (width, height) if self._swapped else (height, width)

    def decode(self, min_height: int = 0, min_width: int = 0) -> np.ndarray:
        """The pixels, RGB uint8 [height, width, 3].

        A JPEG that has at least twice the minimum size is decoded at a half, 3/8, a quarter or an
        eighth of its size: the cosine transform then does the antialiasing.

        Of an animation, the first image is taken. A transparent pixel gets the colour that is
        stored for it. A grey PNG of 16 bits, where 65,535 is white, is divided by 257. Of colours
        of 16 bits, Pillow takes the upper 8.

        Raises:
          Exception: whatever Pillow or simplejpeg raises for an image that is not whole; ValueError
            for other grey pixels of more than 8 bits, since no file says which value is white.
        """
        least = (min_width, min_height) if self._swapped else (min_height, min_width)
        pixels = self._decode_jpeg(*least)
        if pixels is None:
            if self._image.format == "PNG" and self._image.mode == "I;16":
                levels = np.rint(np.asarray(self._image) / 257).astype(np.uint8)
                pixels = np.repeat(levels[..., None], 3, axis=-1)
            elif self._image.mode.startswith(("I", "F")):  # Pillow would make all of them white
                raise ValueError("its pixels have more than 8 bits; save it with 8 bits a channel")
            else:
                pixels = np.asarray(self._image.convert("RGB"))
        return (pixels.swapaxes(0, 1) if self._swapped else pixels)[self._rows, self._columns]

    def _decode_jpeg(self, min_height, min_width):
        """Decodes by simplejpeg, which, unlike Pillow, refuses damaged files; None: use Pillow."""
        encoded = self._encoded
        if simplejpeg is None or not encoded.startswith(JPEG):
            return None
        if encoded[6:11] == b"JFIF\0" and encoded[11] != 1:  # else it would refuse the version
            encoded = encoded[:11] + b"\1" + encoded[12:]
        least = {"min_height": min_height, "min_width": min_width, "min_factor": 2}
        try:
            is_cmyk = simplejpeg.decode_jpeg_header(encoded)[2] in ("CMYK", "YCCK")
            colours = "CMYK" if is_cmyk else "RGB"
            pixels = simplejpeg.decode_jpeg(encoded, colours, **least if min_height else {})
        except ValueError as error:
            if str(error).startswith(("Corrupt", "Premature")):
                raise
            return None  # a kind of JPEG that it does not know
        return None if is_cmyk else pixels  # Pillow knows which colours the four inks make


def _open(encoded):
    try:
        return Image.open(io.BytesIO(encoded), formats=FORMATS)
    except UnidentifiedImageError:
        raise ValueError(f"it is not recognised as {', '.join(FORMATS)}") from None


def in_channels(pixels: np.ndarray, channels: int) -> np.ndarray:
    """RGB pixels; if `channels` is 1, grey ones, uint8 [height, width, 1] (ITU-R 601-2)."""
    return pixels if channels == 3 else np.asarray(Image.fromarray(pixels).convert("L"))[..., None]


def evaluation_crop(encoded: bytes, size: int, *, resize: int) -> np.ndarray:
    """The middle of an image whose shorter side was resized, uint8 [size, size, 3].

    The definition is that of torchvision's `Resize` and `CenterCrop` on Pillow images: an
    antialiased bilinear filter, the longer side rounded down, the crop's corner rounded half to
    even.

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

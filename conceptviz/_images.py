"""What the bytes of an image file say of themselves.

What lives here: pure readings of the leading and trailing bytes of PNG, JPEG, WebP and GIF files. What must never
live here: I/O, or a decoder: an SDK that carries images has no need to open them.
"""

from __future__ import annotations

from attrs import frozen

# Enough leading and trailing bytes for every rule below.
HEAD_BYTES = 32
TAIL_BYTES = 12

_PNG_END = b"\x00\x00\x00\x00IEND\xaeB`\x82"


@frozen
class ImageFormat:
    """A kind of image file.

    Attributes:
        media_type: Its media type, such as "image/png".
        extension: The extension of its file names, with the dot.
    """

    media_type: str
    extension: str


PNG = ImageFormat("image/png", ".png")
JPEG = ImageFormat("image/jpeg", ".jpg")
WEBP = ImageFormat("image/webp", ".webp")
GIF = ImageFormat("image/gif", ".gif")
FORMATS = (PNG, JPEG, WEBP, GIF)


def sniff(head: bytes) -> ImageFormat | None:
    """Return the format that a file's leading bytes announce, or None: names and headers lie, these do not."""
    if head.startswith(b"\x89PNG\r\n\x1a\n"):
        return PNG
    if head.startswith(b"\xff\xd8\xff"):
        return JPEG
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return WEBP
    if head.startswith((b"GIF87a", b"GIF89a")):
        return GIF
    return None


def ends_properly(head: bytes, tail: bytes, size: int) -> bool:
    """Say whether a file of `size` bytes ends as its format ends: a cut one does not.

    Args:
        head: At least the first HEAD_BYTES bytes, or all of a shorter file.
        tail: At least the last TAIL_BYTES bytes, or all of a shorter file.
        size: The size of the whole file in bytes.
    """
    format_ = sniff(head)
    if format_ is PNG:
        return tail.endswith(_PNG_END)
    if format_ is JPEG:
        return tail.endswith(b"\xff\xd9")
    if format_ is WEBP:
        # A RIFF chunk states the bytes that follow its own eight, and is padded to an even size.
        return size - 8 - int.from_bytes(head[4:8], "little") in (0, 1)
    return format_ is GIF and tail.endswith(b"\x3b")

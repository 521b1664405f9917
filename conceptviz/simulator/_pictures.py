"""The bytes of pictures: telling what a file is, drawing a page, and one too small to be worth looking at.

The drawing itself is in `_render`, which needs Pillow and is imported when the first page is drawn.
"""

import base64
import hashlib
import importlib.util
import struct
import threading
import zlib
from collections.abc import Sequence
from typing import Literal, Protocol

import attrs

Format = Literal["jpeg", "png"]


class Render(Protocol):
    """Draws one picture and returns the bytes of its file; called in a worker thread, by several at once."""

    def __call__(
        self,
        prompt: str,
        *,
        model: str,
        quality: str,
        aspect_ratio: str,
        seed: int,
        inputs: Sequence[bytes] = (),
        format: Format = "jpeg",  # noqa: A002 - the word Pillow uses for it
    ) -> bytes:
        """Draw `prompt`; `inputs` are the files an edit began with, b"" for one known only by its URL."""
        ...


def missing(package: str, purpose: str) -> ModuleNotFoundError:
    """The error that says which extra to install."""
    return ModuleNotFoundError(
        f'The ConceptViz simulator needs {package} for {purpose}. Install it with: pip install "conceptviz[simulator]"'
    )


def page_renderer() -> Render:
    """The renderer of whole pages.

    Raises:
        ModuleNotFoundError: Pillow is not installed; said before the first request instead of in the middle
            of one.
    """
    if importlib.util.find_spec("PIL") is None:
        raise missing("Pillow", "drawing its pictures")
    return _render_page


def _render_page(
    prompt: str,
    *,
    model: str,
    quality: str,
    aspect_ratio: str,
    seed: int,
    inputs: Sequence[bytes] = (),
    format: Format = "jpeg",  # noqa: A002 - see Render
) -> bytes:
    from ._render import render

    return render(
        prompt,
        model=model,
        quality=quality,
        aspect_ratio=aspect_ratio,
        seed=seed,
        inputs=inputs,
        format=format,
    )


# One white pixel, the smallest file every decoder accepts; the comment that makes each one different goes
# after its first two bytes.
_JPEG = base64.b64decode(
    "/9j/4AAQSkZJRgABAQAAAQABAAD/2wBDAAMCAgMCAgMDAwMEAwMEBQgFBQQEBQoHBwYIDAoMDAsKCwsNDhIQDQ4RDgsLEBYQERMUFRUV"
    "DA8XGBYUGBIUFRT/wAALCAABAAEBAREA/8QAFAABAAAAAAAAAAAAAAAAAAAACf/EABQQAQAAAAAAAAAAAAAAAAAAAAD/2gAIAQEAAD8A"
    "VN//2Q=="
)


def render_tiny(
    prompt: str,
    *,
    model: str,
    quality: str,
    aspect_ratio: str,
    seed: int,
    inputs: Sequence[bytes] = (),
    format: Format = "jpeg",  # noqa: A002 - see Render
) -> bytes:
    """A valid file of one pixel that costs microseconds, for load tests: `Simulator(render=render_tiny)`.

    It differs for each seed, prompt and setting, so hashes behave as they do with real pictures. Needs no
    Pillow.
    """
    settings = f"simulated {model} {quality} {aspect_ratio} {seed} inputs={len(inputs)} {prompt}"
    comment = settings.encode("utf-8", "replace")[:4096]
    if format == "jpeg":
        return _JPEG[:2] + b"\xff\xfe" + struct.pack(">H", len(comment) + 2) + comment + _JPEG[2:]
    chunks = (
        (b"IHDR", struct.pack(">IIBBBBB", 1, 1, 8, 0, 0, 0, 0)),
        (b"iTXt", b"Comment\0\0\0\0\0" + comment),
        (b"IDAT", zlib.compress(b"\0\xff")),
        (b"IEND", b""),
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    )


def is_image(data: bytes | bytearray) -> bool:
    """Whether the leading bytes are those of a PNG, JPEG, GIF or WebP file."""
    return data.startswith((b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"GIF87a", b"GIF89a")) or (
        data[:4] == b"RIFF" and data[8:12] == b"WEBP"
    )


@attrs.define
class Picture:
    """One picture of a task: how to draw it and, once drawn, its file."""

    prompt: str
    model: str
    quality: str
    aspect_ratio: str
    seed: int
    format: Format
    inputs: tuple[bytes | bytearray, ...] = attrs.field(default=(), repr=False)
    data: bytes | None = attrs.field(default=None, repr=False)
    sha256: str = ""
    _lock: threading.Lock = attrs.field(factory=threading.Lock, repr=False, eq=False, init=False)

    @property
    def extension(self) -> str:
        """The file name's ending, as the service writes it."""
        return "png" if self.format == "png" else "jpg"

    def draw(self, render: Render) -> None:
        """Draw it, once: whoever else wants it at the same moment waits here, in a worker thread."""
        with self._lock:
            if self.data is not None:
                return
            # A lone surrogate passes through JSON but can be drawn by no font library.
            prompt = self.prompt.encode("utf-8", "replace").decode()
            data = render(
                prompt,
                model=self.model,
                quality=self.quality,
                aspect_ratio=self.aspect_ratio,
                seed=self.seed,
                inputs=tuple(bytes(image) for image in self.inputs),
                format=self.format,
            )
            self.sha256 = hashlib.sha256(data).hexdigest()
            self.inputs = ()
            self.data = data

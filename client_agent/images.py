"""Images with labels: by folder, by a path in a column, or inside of Parquet; decoded when they are asked for."""

import base64
import hashlib
import io
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Final

import numpy as np
import torch
from PIL import Image, ImageOps

from client_agent.data import label_index
from client_agent.sources import invalid
from client_agent.spool import ExampleSpool
from client_agent.survey import NO_LIMIT, Survey
from client_agent.tables import first_line, read_records
from shelora import files

SUFFIXES: Final = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
"""Of image files in folders; others are left out."""
PIXELS: Final = "pixels"
MOST_BYTES: Final = 2**28
"""Of the file of an image."""
_SETTING: Final = "data.image_field"
_PATH, _BYTES = "p", "b"
"""How a source begins that is a file's path, or the image itself in Base64."""


@dataclass(frozen=True, slots=True)
class Images:
    """Where each image is, and the index of its label."""

    sources: Sequence[str]
    labels: Sequence[int]

    def __len__(self) -> int:
        return len(self.sources)

    def select(self, indices: Iterable[int]) -> "Images":
        """These examples, in this order."""
        chosen = list(indices)
        return Images(tuple(self.sources[i] for i in chosen), tuple(self.labels[i] for i in chosen))

    def fingerprint(self) -> str:
        """SHA-256 in hex: equal for the same examples in the same order."""
        hashed = hashlib.sha256(repr(tuple(self.labels)).encode())
        for source in self.sources:
            hashed.update(hashlib.sha256(_content(source)).digest())
        return hashed.hexdigest()

    def count_by_label(self, names: Sequence[str]) -> dict[str, int]:
        """Number of examples of every label, in the labels' order."""
        counts = Counter(self.labels)
        return {name: counts[index] for index, name in enumerate(names)}

    def pixels(self, index: int) -> Image.Image:
        """The image in RGB, upright. Raises: DATA_INVALID naming the file, or the image's number."""
        source = self.sources[index]
        place = source[1:] if source.startswith(_PATH) else f"image {index + 1}"
        content = _content(source)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error", Image.DecompressionBombWarning)
                with Image.open(io.BytesIO(content)) as image:
                    return ImageOps.exif_transpose(image).convert("RGB")
        except Exception as error:  # a damaged image can make its decoder raise anything
            raise invalid(f"{place} is not an image that can be read: {first_line(error)}") from error


def read_images(
    path: Path, image_field: str, label_field: str, labels: Sequence[str], cache_dir: Path | None = None
) -> Images:
    """Reads what the path stands for; images are decoded later.

    Args:
        path: A folder with a folder of image files for every label; or what else `client_agent.sources` reads, whose
            rows hold a path from the file's folder, or the image itself (bytes, or an object with `bytes` or `path`).
        image_field: Holds that.
        label_field: Holds the class name.
        labels: Class names in order of their index.
        cache_dir: As `client_agent.spool` has it.

    Raises: DATA_INVALID naming file, row and field.
    """
    index = {name: position for position, name in enumerate(labels)}
    spool = ExampleSpool(cache_dir, encode=str, decode=str)
    numbers: list[int] = []
    for place, source, label in _found(path, image_field, label_field):
        spool.add(source)
        numbers.append(label_index(label, label_field, index, place))
    read = Images(spool.done(), tuple(numbers))
    if not read.sources:
        raise invalid(f"{path} holds no examples")
    return read


def labels_of(path: Path, image_field: str, label_field: str) -> Iterator[tuple[str, object]]:
    """The place and label of every image."""
    return ((place, label) for place, _, label in _found(path, image_field, label_field))


def _found(path: Path, image_field: str, label_field: str) -> Iterator[tuple[str, str, object]]:
    """The place, source and label of every image."""
    files = _by_folder(path)
    if files:
        yield from ((str(file), _PATH + str(file), file.relative_to(path).parts[0]) for file in files)
        return
    folder = path if path.is_dir() else path.parent
    for record in read_records(path, (image_field, label_field)):
        for field, setting in ((image_field, _SETTING), (label_field, "data.label_field")):
            if record.values.get(field) is None:
                raise invalid(f"{record.place}: field {field!r} is missing or null (set {setting})")
        yield (
            record.place,
            _source(record.values[image_field], folder, image_field, record.place),
            record.values[label_field],
        )


def _by_folder(path: Path) -> list[Path]:
    if not path.is_dir():
        return []
    try:
        return sorted(
            file
            for folder in path.iterdir()
            if folder.is_dir() and not folder.name.startswith(".")
            for file in folder.rglob("*")
            if file.suffix.lower() in SUFFIXES and file.is_file()
        )
    except OSError as error:
        raise invalid(f"{path} cannot be read: {error.strerror or error}") from error


def _source(value: object, folder: Path, field: str, place: str) -> str:
    if isinstance(value, tuple):  # an object: as `datasets` stores images
        members = {str(key): inner for key, inner in value}
        value = members.get("bytes") or members.get("path")
    if isinstance(value, bytes):
        return _BYTES + base64.b64encode(value).decode()
    if isinstance(value, str) and value.strip() and "\0" not in value:
        return _PATH + str(folder / value)
    raise invalid(f"{place}: field {field!r} must be a path or an image's bytes")


def _content(source: str) -> bytes:
    if source.startswith(_BYTES):
        return base64.b64decode(source[1:])
    path = Path(source[1:])
    if _waits(path):
        raise invalid(f"{path} is not an image that can be read: it is not a file")
    try:
        return files.read_small(path, MOST_BYTES)
    except files.UnreadableError as error:
        raise invalid(f"{path} is not an image that can be read: {error}") from error


def _waits(path: Path) -> bool:
    """Whether reading it may wait for ever, as at a pipe."""
    try:
        return path.exists() and not path.is_file()
    except (OSError, ValueError):  # reading says what is wrong with it
        return False


@dataclass(frozen=True, slots=True, eq=False)
class EncodedImage:
    """One example as the model takes it."""

    pixels: torch.Tensor
    """[3, height, width], float32."""
    target: int
    ids: Sequence[int] = ()
    """None: images have no tokens."""


@dataclass(frozen=True, slots=True, eq=False)
class ImageBatch:
    """Pixels of some images."""

    pixel_values: torch.Tensor
    """[examples, 3, height, width], float32."""
    targets: torch.Tensor
    """[examples], int64: label indices."""
    mask: ClassVar[None] = None
    """Nothing is padded."""

    def __len__(self) -> int:
        return len(self.targets)

    @property
    def inputs(self) -> dict[str, torch.Tensor]:
        """What the model takes, by its names."""
        return {"pixel_values": self.pixel_values}

    @property
    def described(self) -> str:
        """One of its examples, for people."""
        height, width = self.pixel_values.shape[-2:]
        return f"an image of {width} x {height} pixels"

    def to(self, device: torch.device) -> "ImageBatch":
        """The same batch on a device."""
        return ImageBatch(self.pixel_values.to(device), self.targets.to(device))

    def only(self, index: int) -> "ImageBatch":
        """The batch of that example alone."""
        return ImageBatch(self.pixel_values[index : index + 1], self.targets[index : index + 1])


class ImageEncoder:
    """Decodes, resizes and normalizes as the model's own image processor says. Stateless."""

    limit = NO_LIMIT
    """Nothing is cut."""
    at_once = 64
    """Images held at once."""

    def __init__(self, processor: Callable[..., Any]) -> None:
        self._processor = processor

    def encoded(self, examples: Images) -> list[EncodedImage]:
        """Every example."""
        images = [examples.pixels(index) for index in range(len(examples))]
        pixels = self._processor(images, return_tensors="pt")["pixel_values"]
        return [EncodedImage(*one) for one in zip(pixels, examples.labels, strict=True)]

    def collated(self, encoded: Sequence[EncodedImage]) -> ImageBatch:
        """The batch of images that are encoded already."""
        targets = torch.tensor([one.target for one in encoded], dtype=torch.int64)
        return ImageBatch(torch.stack([one.pixels for one in encoded]), targets)

    def batch(self, examples: Images) -> ImageBatch:
        """The batch of these examples."""
        return self.collated(self.encoded(examples))

    def shown(self, examples: Images) -> Mapping[str, str]:
        """What the first image is, and what it becomes."""
        image, encoded = examples.pixels(0), self.encoded(examples.select([0]))[0]
        _, height, width = encoded.pixels.shape
        values = f"values {float(encoded.pixels.min()):.2f} to {float(encoded.pixels.max()):.2f}"
        return {"the first one": f"{image.width} x {image.height}, becomes {width} x {height}, {values}"}


def survey_images(examples: Images) -> Survey:
    """Decodes every image once. Raises: DATA_INVALID naming one that cannot be read."""
    sizes = np.empty(len(examples), dtype=np.int64)
    for index in range(len(examples)):
        image = examples.pixels(index)
        sizes[index] = image.width * image.height
    return Survey(lengths=sizes, limit=ImageEncoder.limit, largest_id=0, unit=PIXELS)

"""What training reads: images of a data set, cropped, or latents that were encoded before."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

from torch import Tensor

from rae.training.data.image_data import ImageSource
from rae.training.data.transforms import Transform, UnreadableError, decode


class Sample(NamedTuple):
    """An image (3, S, S) uint8 or latents (C, h, w), and its label."""

    value: Tensor
    class_label: int


class Samples(Protocol):
    """Samples by their number; `field` is the `Batch`'s that they fill."""

    @property
    def field(self) -> Literal["images", "latents"]: ...

    @property
    def num_classes(self) -> int: ...

    @property
    def class_names(self) -> tuple[str, ...]:
        """In the order of the labels; none where only labels are known."""
        ...

    def __len__(self) -> int: ...

    def name(self, index: int) -> str: ...

    def load(self, index: int, seed: int, position: int) -> Sample:
        """With what is random as `seed` and `position` say. Raises UnreadableError for a sample
        that may be replaced by another, ValueError where that would not help."""
        ...


@dataclass(frozen=True)
class ImageSamples:
    """The images of `source`, as `transform` makes them."""

    source: ImageSource
    transform: Transform

    @property
    def field(self) -> Literal["images"]:
        return "images"

    @property
    def num_classes(self) -> int:
        """The highest label plus 1."""
        return int(self.source.class_labels.max()) + 1

    @property
    def class_names(self) -> tuple[str, ...]:
        return self.source.class_names

    def __len__(self) -> int:
        return len(self.source)

    def name(self, index: int) -> str:
        return self.source.name(index)

    def load(self, index: int, seed: int, position: int) -> Sample:
        try:
            data = self.source.read(index)
        except OSError as error:
            raise UnreadableError(error.strerror or str(error)) from error
        picture = decode(data, self.transform.size)
        value = self.transform(picture, seed, position)
        return Sample(value, int(self.source.class_labels[index]))

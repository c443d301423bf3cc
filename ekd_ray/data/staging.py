"""One way to sample images, whether they were decoded once or are decoded on demand."""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass
from typing import Protocol, TypeVar

import numpy as np
import numpy.typing as npt
import torch

from ekd_ray.data.counter import Int64Array, UInt64Array
from ekd_ray.data.crops import crop_bits
from ekd_ray.data.datasets import DatasetInfo, EncodedImages, ImageArrays
from ekd_ray.data.decode import decode_view
from ekd_ray.data.loader import Batch, StagedImages, to_device
from ekd_ray.data.views import DEFAULT_POOL, RESIZED_CROP, VIEW_SCHEMES, view_count
from ekd_ray.errors import UserError

ENCODED_SCHEMES = (RESIZED_CROP, "none")
IMAGE_SIZES = (8, 1024)  # bounds of what encoded images are decoded to

T = TypeVar("T")


class Stage(Protocol):
    """A split ready to be sampled on a device: what `stage_images` returns.

    `labels` is int64 [N] on the device; `num_views` the number of views of each sample, and
    `image_size` S the side of every image.
    """

    device: torch.device
    labels: torch.Tensor
    num_views: int
    image_size: int

    def __len__(self) -> int: ...

    def views(
        self, sample_ids: npt.ArrayLike, view_ids: npt.ArrayLike | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(images uint8 [B, 3, S, S], labels int64 [B]) on the device.

        Ids are int64 [B] on the host, `view_ids` in [0, num_views); None stands for the
        evaluation view, which is not augmented. A view of a sample depends on nothing else.
        """

    def stream(
        self, batches: Iterable[Batch]
    ) -> Generator[tuple[Batch, torch.Tensor, torch.Tensor], None, None]:
        """Yield (batch, images, labels) with the `views` of every batch.

        Encoded images are decoded one batch ahead, by threads that live no longer than the
        generator; what they raise is raised here, in its turn.
        """

    def evaluation(
        self, sample_ids: npt.ArrayLike, batch_size: int
    ) -> Generator[tuple[torch.Tensor, torch.Tensor], None, None]:
        """Yield (images, labels) of evaluation views in order; the last part may be smaller."""

    def to_device(self, values: npt.ArrayLike) -> torch.Tensor:
        """Host integers as an int64 tensor on the device."""


def stage_images(
    arrays: ImageArrays | EncodedImages,
    device: str | torch.device,
    *,
    scheme: str,
    image_size: int | None = None,
    pool: int = DEFAULT_POOL,
    seed: int = 0,
) -> Stage:
    """A split of `load_dataset`, ready to be sampled on `device` under a view scheme.

    `image_size` is free for encoded data sets only. `pool` (views of each sample) and `seed`
    concern "resized_crop" only. Raises UserError for a scheme that does not serve the data
    set, and for a size or a pool out of bounds.
    """
    encoded = isinstance(arrays, EncodedImages)
    _check(arrays.name, encoded, arrays.image_size, scheme, image_size)
    if pool < 1:
        raise UserError(f"a pool of views must hold 1 or more, got {pool}.")
    if isinstance(arrays, EncodedImages):
        size = image_size or arrays.image_size
        return StagedEncodedImages(
            arrays, device, scheme=scheme, image_size=size, pool=pool, seed=seed
        )
    return StagedImages(arrays, device, scheme=scheme)


def check_view_scheme(info: DatasetInfo, scheme: str, image_size: int | None = None) -> None:
    """Raises the UserError with which `stage_images` would refuse these settings."""
    _check(info.name, info.encoded, info.image_size, scheme, image_size)


def _check(name: str, encoded: bool, native: int, scheme: str, image_size: int | None) -> None:
    view_count(scheme)  # a name that is wrong everywhere has a nearest one
    legal = ENCODED_SCHEMES if encoded else tuple(VIEW_SCHEMES)
    if scheme not in legal:
        kind = "vary in size" if encoded else "all have one size"
        raise UserError(
            f"the view scheme {scheme!r} does not serve {name}, whose images {kind}; choose "
            f"{', '.join(legal[:-1])} or {legal[-1]}."
        )
    if image_size is None:
        return
    if not encoded and image_size != native:
        raise UserError(
            f"the image_size of {name} is fixed at {native}, got {image_size}; leave it out."
        )
    if not IMAGE_SIZES[0] <= image_size <= IMAGE_SIZES[1]:
        raise UserError(
            f"image_size must be {IMAGE_SIZES[0]} to {IMAGE_SIZES[1]} for {name}, got {image_size}."
        )


class StagedEncodedImages:
    """An encoded split that is decoded as it is sampled; see `Stage`.

    Views of "resized_crop" are drawn from (seed, sample id, view id); "none" has one view, the
    evaluation view. Decoding takes as many threads as torch has.
    """

    def __init__(
        self,
        arrays: EncodedImages,
        device: str | torch.device = "cpu",
        *,
        scheme: str = RESIZED_CROP,
        image_size: int = 224,
        pool: int = DEFAULT_POOL,
        seed: int = 0,
    ) -> None:
        self.device = torch.device(device)
        self.labels = torch.tensor(arrays.labels, device=self.device)
        self.num_views = view_count(scheme, pool=pool)
        self.image_size = image_size
        self._arrays, self._scheme, self._seed = arrays, scheme, seed

    def __len__(self) -> int:
        return len(self.labels)

    def views(
        self, sample_ids: npt.ArrayLike, view_ids: npt.ArrayLike | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As `Stage.views`; raises UserError for a picture that cannot be read."""
        with _decoders() as workers:
            return self._finish(self._begin(workers, sample_ids, view_ids))

    def stream(
        self, batches: Iterable[Batch]
    ) -> Generator[tuple[Batch, torch.Tensor, torch.Tensor], None, None]:
        """As `Stage.stream`."""
        return self._ahead((batch, batch.sample_ids, batch.view_ids) for batch in batches)

    def evaluation(
        self, sample_ids: npt.ArrayLike, batch_size: int
    ) -> Generator[tuple[torch.Tensor, torch.Tensor], None, None]:
        """As `Stage.evaluation`."""
        ids = np.asarray(sample_ids, dtype=np.int64)
        parts = (ids[start : start + batch_size] for start in range(0, len(ids), batch_size))
        with closing(self._ahead((None, part, None) for part in parts)) as decoded:
            for _, images, labels in decoded:
                yield images, labels

    def to_device(self, values: npt.ArrayLike) -> torch.Tensor:
        """Host integers (sample or view ids, [B]) as an int64 tensor on the device."""
        return to_device(values, self.device)

    def _ahead(
        self, jobs: Iterable[tuple[T, npt.ArrayLike, npt.ArrayLike | None]]
    ) -> Generator[tuple[T, torch.Tensor, torch.Tensor], None, None]:
        """Yield (key, images, labels) of (key, sample ids, view ids), one job ahead."""
        with _decoders() as workers:
            waiting: deque[tuple[T, _Pending]] = deque()
            for key, sample_ids, view_ids in jobs:
                waiting.append((key, self._begin(workers, sample_ids, view_ids)))
                if len(waiting) > 1:
                    done, pending = waiting.popleft()
                    yield done, *self._finish(pending)
            for done, pending in waiting:
                yield done, *self._finish(pending)

    def _begin(
        self,
        workers: ThreadPoolExecutor,
        sample_ids: npt.ArrayLike,
        view_ids: npt.ArrayLike | None,
    ) -> _Pending:
        ids = np.asarray(sample_ids, dtype=np.int64)
        if ids.min(initial=0) < 0 or ids.max(initial=-1) >= len(self):
            raise IndexError(f"sample ids must lie in 0..{len(self) - 1}")
        rows: list[UInt64Array | None] = [None] * len(ids)
        if view_ids is not None and self._scheme == RESIZED_CROP:
            rows = list(crop_bits(ids, np.asarray(view_ids, dtype=np.int64), self._seed))
        size = self.image_size
        # Pinned, since only from there does the copy to a GPU not block.
        pinned = self.device.type == "cuda"
        images = torch.empty((len(ids), 3, size, size), dtype=torch.uint8, pin_memory=pinned)
        slots = images.numpy()
        futures = [
            workers.submit(self._decode, slots, slot, index, bits)
            for slot, (index, bits) in enumerate(zip(ids.tolist(), rows, strict=True))
        ]
        return _Pending(ids, images, futures)

    def _finish(self, pending: _Pending) -> tuple[torch.Tensor, torch.Tensor]:
        for future in pending.futures:
            future.result()
        labels = self.labels.index_select(0, self.to_device(pending.ids))
        return pending.images.to(self.device, non_blocking=True), labels

    def _decode(
        self, slots: npt.NDArray[np.uint8], slot: int, index: int, bits: UInt64Array | None
    ) -> None:
        pictures = self._arrays.pictures
        data, where = pictures.read(index), pictures.where(index)
        slots[slot] = decode_view(data, where, self.image_size, bits)


@dataclass(frozen=True, eq=False)
class _Pending:
    """A batch whose images (uint8 [B, 3, S, S], on the host) are being filled in."""

    ids: Int64Array
    images: torch.Tensor
    futures: list[Future[None]]


@contextmanager
def _decoders() -> Iterator[ThreadPoolExecutor]:
    """Threads for the body; work that has not started when it ends is dropped."""
    workers = ThreadPoolExecutor(torch.get_num_threads(), thread_name_prefix="ekd-decode")
    try:
        yield workers
    finally:
        workers.shutdown(wait=True, cancel_futures=True)

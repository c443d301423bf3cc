"""Images on the device, as views: sampled alike whether decoded once or decoded on demand."""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from ekd_ray.data.batches import Batch
from ekd_ray.data.counter import Int64Array, UInt64Array
from ekd_ray.data.decode import decode_view
from ekd_ray.data.registry import IMAGE_SIZES, DatasetInfo
from ekd_ray.data.store import EncodedImages, ImageArrays
from ekd_ray.data.transfer import to_device
from ekd_ray.data.views import (
    DEFAULT_POOL,
    RESIZED_CROP,
    VIEW_SCHEMES,
    apply_views,
    crop_bits,
    view_count,
    view_scheme,
)
from ekd_ray.errors import UserError

ENCODED_SCHEMES = (RESIZED_CROP, "none")

Views = tuple[torch.Tensor, torch.Tensor]  # images uint8 [B, 3, S, S] and labels int64 [B]
Below = Callable[[Int64Array, Int64Array], tuple[Int64Array, Int64Array]]
_Job = tuple[Any, npt.ArrayLike, npt.ArrayLike | None]  # (key, sample ids, view ids)
# Sample ids, images (uint8 [B, 3, S, S], on the host) that are being filled in, and by whom.
_Decoding = tuple[Int64Array, torch.Tensor, list[Future[None]]]
_Done = Generator[tuple[Any, torch.Tensor, torch.Tensor], None, None]  # (key, images, labels)


class Stage(ABC):
    """A split ready to be sampled on a device: what `stage_images` returns.

    `labels` is int64 [N] on the device; `num_views` the number of views of each sample, and
    `image_size` S the side of every image.
    """

    def __init__(
        self,
        arrays: ImageArrays | EncodedImages,
        device: str | torch.device,
        num_views: int,
        image_size: int,
    ) -> None:
        self.device = torch.device(device)
        self.num_views, self.image_size = num_views, image_size
        self.labels = _wrap_read_only(arrays.labels).to(self.device)

    def __len__(self) -> int:
        return len(self.labels)

    @abstractmethod
    def views(self, sample_ids: npt.ArrayLike, view_ids: npt.ArrayLike | None) -> Views:
        """(images uint8 [B, 3, S, S], labels int64 [B]) on the device.

        Ids are int64 [B] on the host, `view_ids` in [0, num_views); None stands for the
        evaluation view, which is not augmented. A view of a sample depends on nothing else.
        Raises IndexError for sample ids out of range, and UserError for a picture that cannot
        be read.
        """

    def stream(
        self, batches: Iterable[Batch], below: Below = lambda samples, views: (samples, views)
    ) -> Generator[tuple[Batch, torch.Tensor, torch.Tensor], None, None]:
        """Yield (batch, images, labels) with the `views` of every batch.

        `below` makes of a batch's ids those of the views that are wanted for it.

        Encoded images are decoded one batch ahead, by threads that live no longer than the
        generator; what they raise is raised here, in its turn.
        """
        return self._run((batch, *below(batch.sample_ids, batch.view_ids)) for batch in batches)

    def evaluation(
        self, sample_ids: npt.ArrayLike, batch_size: int
    ) -> Generator[Views, None, None]:
        """Yield (images, labels) of evaluation views in order; the last part may be smaller."""
        ids = np.asarray(sample_ids, dtype=np.int64)
        parts = (ids[start : start + batch_size] for start in range(0, len(ids), batch_size))
        with closing(self._run((None, part, None) for part in parts)) as done:
            for _, images, labels in done:
                yield images, labels

    def to_device(self, values: npt.ArrayLike) -> torch.Tensor:
        """Host integers (sample or view ids, [B]) as an int64 tensor; a GPU is not waited for."""
        # A writable, contiguous copy: a worker's rows are a strided slice of the order.
        return to_device(np.array(values, dtype=np.int64), self.device)

    def _run(self, jobs: Iterable[_Job]) -> _Done:
        for key, sample_ids, view_ids in jobs:
            yield key, *self.views(sample_ids, view_ids)


class StagedImages(Stage):
    """A decoded split; raises UserError if `scheme` is unknown or not for decoded images.

    On the CPU `images` (uint8 [N, 3, S, S], never to be written to) shares the memory map:
    nothing is copied, and all processes share its pages. To a GPU the whole split moves once.
    """

    def __init__(
        self, arrays: ImageArrays, device: str | torch.device = "cpu", *, scheme: str = "none"
    ) -> None:
        super().__init__(arrays, device, view_scheme(scheme).count, arrays.image_size)
        self.scheme = scheme
        if self.device.type == "cpu":
            # One byte of every page, in order: random cold reads cost 2 ms a batch instead.
            arrays.images.reshape(-1)[::4096].max(initial=0)
        self.images = _wrap_read_only(arrays.images).to(self.device)

    def views(self, sample_ids: npt.ArrayLike, view_ids: npt.ArrayLike | None) -> Views:
        """As `Stage.views`; the images are copies."""
        index = self.to_device(sample_ids)
        images, labels = self.images.index_select(0, index), self.labels.index_select(0, index)
        if view_ids is not None:
            images = apply_views(images, self.to_device(view_ids), self.scheme)
        return images, labels


class StagedEncodedImages(Stage):
    """An encoded split that is decoded as it is sampled, by `threads` threads (torch's number).

    Views of "resized_crop" are drawn from (seed, sample id, view id); "none" has one view, the
    evaluation view.
    """

    def __init__(
        self,
        arrays: EncodedImages,
        device: str | torch.device = "cpu",
        *,
        scheme: str,
        image_size: int,
        pool: int,
        seed: int,
        threads: int | None = None,
    ) -> None:
        super().__init__(arrays, device, view_count(scheme, pool=pool), image_size)
        self._pictures, self._scheme, self._seed = arrays.pictures, scheme, seed
        self._threads = threads

    def views(self, sample_ids: npt.ArrayLike, view_ids: npt.ArrayLike | None) -> Views:
        """As `Stage.views`."""
        with _decoding_threads(self._threads) as threads:
            return self._collect(self._submit(threads, sample_ids, view_ids))

    def _run(self, jobs: Iterable[_Job]) -> _Done:
        """As of the base, decoding one job ahead."""
        with _decoding_threads(self._threads) as threads:
            waiting: deque[tuple[Any, _Decoding]] = deque()
            for key, sample_ids, view_ids in jobs:
                waiting.append((key, self._submit(threads, sample_ids, view_ids)))
                if len(waiting) > 1:
                    done, decoding = waiting.popleft()
                    yield done, *self._collect(decoding)
            for done, decoding in waiting:  # the last one
                yield done, *self._collect(decoding)

    def _submit(
        self,
        threads: ThreadPoolExecutor,
        sample_ids: npt.ArrayLike,
        view_ids: npt.ArrayLike | None,
    ) -> _Decoding:
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
            threads.submit(self._decode, slots[slot], index, bits)
            for slot, (index, bits) in enumerate(zip(ids.tolist(), rows, strict=True))
        ]
        return ids, images, futures

    def _collect(self, decoding: _Decoding) -> Views:
        ids, images, futures = decoding
        for future in futures:
            future.result()
        labels = self.labels.index_select(0, self.to_device(ids))
        return images.to(self.device, non_blocking=True), labels

    def _decode(self, pixels: npt.NDArray[np.uint8], index: int, bits: UInt64Array | None) -> None:
        data, name = self._pictures.read(index), self._pictures.name(index)
        pixels[:] = decode_view(data, name, self.image_size, bits)


@contextmanager
def _decoding_threads(count: int | None) -> Iterator[ThreadPoolExecutor]:
    """Threads for the body; work that has not started when it ends is dropped."""
    threads = ThreadPoolExecutor(count or torch.get_num_threads(), thread_name_prefix="ekd-decode")
    try:
        yield threads
    finally:
        threads.shutdown(wait=True, cancel_futures=True)


def _wrap_read_only(array: npt.NDArray[Any]) -> torch.Tensor:
    """The array as a tensor that shares its memory, and is only ever gathered from."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writ")
        return torch.from_numpy(array)


def stage_images(
    arrays: ImageArrays | EncodedImages,
    device: str | torch.device,
    *,
    scheme: str,
    image_size: int | None = None,
    pool: int = DEFAULT_POOL,
    seed: int = 0,
    threads: int | None = None,
) -> Stage:
    """A split of `load_dataset`, ready to be sampled on `device` under a view scheme.

    `image_size` is free for encoded data sets only, which `threads` (as many as torch has)
    decode. `pool` (views of each sample) and `seed` concern "resized_crop" only. Raises UserError
    for a scheme that does not serve the data set, and for a size or a pool out of bounds.
    """
    check_view_scheme(arrays, scheme, image_size)
    if pool < 1:
        raise UserError(f"a pool of views must hold 1 or more, got {pool}.")
    if isinstance(arrays, EncodedImages):
        size = image_size or arrays.image_size
        return StagedEncodedImages(
            arrays, device, scheme=scheme, image_size=size, pool=pool, seed=seed, threads=threads
        )
    return StagedImages(arrays, device, scheme=scheme)


def check_view_scheme(
    data: DatasetInfo | ImageArrays | EncodedImages, scheme: str, image_size: int | None = None
) -> None:
    """Raises the UserError with which `stage_images` refuses these settings."""
    view_count(scheme)  # a name that is wrong everywhere has a nearest one
    name, native = data.name, data.image_size
    legal = ENCODED_SCHEMES if data.encoded else tuple(VIEW_SCHEMES)
    if scheme not in legal:
        kind = "vary in size" if data.encoded else "all have one size"
        raise UserError(
            f"the view scheme {scheme!r} does not serve {name}, whose images {kind}; choose "
            f"{', '.join(legal[:-1])} or {legal[-1]}."
        )
    if image_size is None:
        return
    if not data.encoded and image_size != native:
        raise UserError(
            f"the image_size of {name} is fixed at {native}, got {image_size}; leave it out."
        )
    if not IMAGE_SIZES[0] <= image_size <= IMAGE_SIZES[1]:
        raise UserError(
            f"image_size must be {IMAGE_SIZES[0]} to {IMAGE_SIZES[1]} for {name}, got {image_size}."
        )

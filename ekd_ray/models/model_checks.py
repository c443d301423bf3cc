"""The rules that every model keeps, as functions that raise `AssertionError` for one that does not.

`ekd_ray.testing.check_model` runs all of them. A check takes a `ModelCase`.
"""

from __future__ import annotations

import contextlib
import functools
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from ekd_ray.errors import require
from ekd_ray.models.weights import load_weights, save_weights
from ekd_ray.models.zoo import build_model

Builder = Callable[[int], nn.Module]
CLASSES = 10


@dataclass(frozen=True)
class ModelCase:
    """A model by its name or builder, and the side of the images that it takes, in pixels."""

    model: str | Builder
    image_size: int = 32

    def __str__(self) -> str:
        named = getattr(self.model, "__qualname__", self.model)
        return f"model {str(named)!r}"

    def build(self, classes: int = CLASSES, seed: int = 0) -> nn.Module:
        """A fresh model whose weights were drawn under a seed."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            if isinstance(self.model, str):
                return build_model(self.model, classes)
            return self.model(classes)

    @functools.cached_property
    def built(self) -> nn.Module:
        """One model of 10 classes for all checks; each leaves its weights as they are."""
        return self.build()

    def images(self, count: int = 2) -> Tensor:
        """Normal noise [count, 3, H, W], always the same."""
        generator = torch.Generator().manual_seed(7)
        return torch.randn(count, 3, self.image_size, self.image_size, generator=generator)


ModelCheck = Callable[[ModelCase], None]


def check_logits(case: ModelCase) -> None:
    """`build(num_classes)` gives a module from [B, 3, H, W] to float32 logits [B, num_classes]."""
    for classes in (2, CLASSES):
        model = case.built if classes == CLASSES else case.build(classes)
        require(
            isinstance(model, nn.Module),
            f"build({classes}) must return an nn.Module, got {type(model).__name__}.",
        )
        for training in (False, True) if classes == CLASSES else (False,):
            with torch.no_grad(), _restored_buffers(model):
                logits = model.train(training)(case.images())
            mode = "training" if training else "evaluation"
            require(
                isinstance(logits, Tensor),
                f"in {mode} mode it must return one tensor, got {type(logits).__name__}.",
            )
            found, expected = (tuple(logits.shape), logits.dtype), ((2, classes), torch.float32)
            require(
                found == expected,
                f"in {mode} mode with {classes} classes 2 images must give logits {expected}, got "
                f"{found}.",
            )
            require(logits.isfinite().all(), f"logits in {mode} mode are not finite.")


def check_seed(case: ModelCase) -> None:
    """Initial weights are float32, and a function of torch's global seed alone."""
    for name, parameter in case.built.named_parameters():
        require(not parameter.is_meta, f"parameter {name} holds no numbers (device meta).")
        require(
            parameter.dtype == torch.float32,
            f"parameter {name} must be float32, got {parameter.dtype}.",
        )
        require(parameter.requires_grad, f"parameter {name} is frozen (requires_grad=False).")
    found = _different(case.build(), case.built)
    require(not found, f"two builds under one seed differ in {found}: draw from torch's seed.")


def check_modes(case: ModelCase) -> None:
    """In evaluation mode a row depends on its image alone, and nothing is learned."""
    model, images = case.built, case.images(3)
    for training in (True, False):
        stuck = [n for n, m in model.train(training).named_modules() if m.training != training]
        require(not stuck, f"train({training}) does not reach {stuck[:3]}.")
    before = {name: value.clone() for name, value in model.named_buffers()}
    with torch.no_grad():
        together, again = model(images), model(images)
        try:
            alone = model(images[:1])
        except Exception as error:
            raise AssertionError(f"a batch of one image stops in evaluation: {error}") from error
    require(
        torch.equal(together, again),
        "in evaluation mode the same images give other logits the second time (dropout?).",
    )
    moved = [n for n, value in model.named_buffers() if not torch.equal(value, before[n])]
    require(not moved, f"a forward pass in evaluation mode changes the buffers {moved[:3]}.")
    require(
        alone.shape == together[:1].shape
        and torch.allclose(alone, together[:1], rtol=1e-3, atol=1e-4),
        "in evaluation mode the logits of an image depend on the rest of its batch, or a batch of "
        "one has another shape (squeeze?).",
    )


def check_gradients(case: ModelCase) -> None:
    """A gradient reaches every parameter, so that DDP need not search for unused ones."""
    model = case.built.train()
    model.zero_grad(set_to_none=True)
    with _restored_buffers(model):
        model(case.images()).square().sum().backward()
    for name, parameter in model.named_parameters():
        gradient, parameter.grad = parameter.grad, None
        require(
            gradient is not None,
            f"no gradient reaches parameter {name}, for which several workers would wait.",
        )
        assert gradient is not None
        require(gradient.isfinite().all(), f"the gradient of {name} is not finite.")


def check_memory_format(case: ModelCase) -> None:
    """channels_last gives the same logits."""
    model, images = case.built.eval(), case.images(1)
    with torch.no_grad():
        expected = model(images)
        try:
            model.to(memory_format=torch.channels_last)
            logits = model(images.to(memory_format=torch.channels_last))
        except Exception as error:
            raise AssertionError(f"it stops in channels_last ({error}): use reshape.") from error
        finally:
            model.to(memory_format=torch.contiguous_format)
    require(
        torch.allclose(logits, expected, rtol=1e-3, atol=1e-4),
        "channels_last gives other logits: the forward pass depends on the memory's layout.",
    )


def check_file(case: ModelCase) -> None:
    """Weights come back from a safetensors file into a model that was drawn by another seed."""
    name, target = str(getattr(case.built, "ekd_name", "model")), case.build(seed=1)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.safetensors"
        save_weights(case.built, path, model_name=name, num_classes=CLASSES, mean=None, std=None)
        load_weights(target, path)
    found = _different(target, case.built)
    require(not found, f"{found} does not come back from a weights file.")
    with torch.no_grad():
        one, other = (model.eval()(case.images(1)) for model in (target, case.built))
    require(
        torch.equal(one, other),
        "a model with the weights of a file gives other logits: some state is no parameter or "
        "buffer.",
    )


def check_autocast(case: ModelCase) -> None:
    """Forward and backward pass in bfloat16 and channels_last, as training runs."""
    model = case.built.train().to(memory_format=torch.channels_last)
    images = case.images().to(memory_format=torch.channels_last)
    with _restored_buffers(model):
        try:
            with torch.autocast("cpu", dtype=torch.bfloat16):
                logits = model(images)
            logits.float().square().sum().backward()
        except Exception as error:
            raise AssertionError(f"it stops under autocast in bfloat16: {error}") from error
        finally:
            model.to(memory_format=torch.contiguous_format)
    require(logits.isfinite().all(), "logits in bfloat16 are not finite.")
    wrong = [
        n for n, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()
    ]
    model.zero_grad(set_to_none=True)
    require(not wrong, f"gradients under bfloat16 are not finite: {wrong[:3]}.")


MODEL_CHECKS: tuple[ModelCheck, ...] = (
    check_logits,
    check_seed,
    check_modes,
    check_gradients,
    check_memory_format,
    check_file,
    check_autocast,
)


def _different(one: nn.Module, other: nn.Module) -> str | None:
    """The first entry in which two states differ, in name, type or value; None where in none."""
    mine, theirs = one.state_dict(), other.state_dict()
    for name in sorted(mine.keys() ^ theirs.keys()):
        return name
    for name, value in mine.items():
        if value.dtype != theirs[name].dtype or not torch.equal(value, theirs[name]):
            return name
    return None


@contextlib.contextmanager
def _restored_buffers(model: nn.Module) -> Iterator[None]:
    """Batch norms' statistics as before, after a forward pass in training mode."""
    before = [(buffer, buffer.clone()) for buffer in model.buffers()]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, value in before:
                buffer.copy_(value)

"""Batch norms of a frozen network, folded into the convolutions before them."""

from __future__ import annotations

import itertools
from collections import Counter

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

# How far a folded network's float32 logits may be from the network's, as a share of the largest:
# a hundred times what the other order of rounding does to a hundred layers.
_TOLERANCE = 1e-3

_Pair = tuple[nn.Conv2d, nn.BatchNorm2d]


@torch.no_grad()
def fold_batch_norms(model: nn.Module, image_size: int) -> int:
    """Fold what can be folded, in place, and return how many batch norms that were.

    In evaluation mode a batch norm is one factor and one summand a channel, which the convolution
    before it can take into its own weights: the same function, rounded in another order, without
    a pass over memory that costs a narrow network as much as the convolution. What follows what is
    seen in a forward pass, and whether the function is the same in its logits.

    Args:
        model: in evaluation mode, on the CPU; its weights must not change any more.
        image_size: side of the images that it takes, in pixels.
    """
    inputs = torch.randn(2, 3, image_size, image_size, generator=torch.Generator().manual_seed(0))
    pairs, expected = _pairs(model, inputs)
    if _folded(model, pairs, inputs, expected):
        return len(pairs)
    # What a shortcut takes from before its batch norm is seen by its being wrong then.
    return sum(_folded(model, [pair], inputs, expected) for pair in pairs)


def _folded(model: nn.Module, pairs: list[_Pair], inputs: Tensor, expected: Tensor) -> bool:
    """Fold these, unless the model gives other logits then."""
    names = {module: name for name, module in model.named_modules()}
    for convolution, norm in pairs:
        model.set_submodule(names[convolution], fuse_conv_bn_eval(convolution, norm))
        model.set_submodule(names[norm], nn.Identity())
    difference = (model(inputs) - expected).abs().max()
    if difference <= _TOLERANCE * expected.abs().max():
        return True
    for module in itertools.chain.from_iterable(pairs):
        model.set_submodule(names[module], module)
    return False


def _pairs(model: nn.Module, inputs: Tensor) -> tuple[list[_Pair], Tensor]:
    """Convolutions whose output goes into a batch norm, each called once, and the logits."""
    made: dict[int, tuple[Tensor, nn.Conv2d]] = {}
    calls: Counter[nn.Module] = Counter()
    found: list[_Pair] = []

    def after(module: nn.Module, given: tuple[Tensor, ...], output: Tensor) -> None:
        calls[module] += 1
        if isinstance(module, nn.Conv2d):
            made[id(output)] = output, module  # held, so that no other tensor gets its id
        elif isinstance(module, nn.BatchNorm2d) and id(given[0]) in made:
            found.append((made[id(given[0])][1], module))

    kinds = (nn.Conv2d, nn.BatchNorm2d)
    modules = [module for module in model.modules() if type(module) in kinds]
    hooks = [module.register_forward_hook(after) for module in modules]
    try:
        logits = model(inputs)
    finally:
        for hook in hooks:
            hook.remove()
    once = [pair for pair in found if all(calls[module] == 1 for module in pair)]
    # A convolution that two norms read would get both.
    readers = Counter(convolution for convolution, _ in found)
    return [pair for pair in once if readers[pair[0]] == 1], logits

"""Parts of a network that methods read beside its logits: outputs of layers, and its classifier."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

from torch import Tensor, nn

from ekd_ray.errors import UserError, nearest_names
from ekd_ray.models.ensemble import Ensemble


@contextlib.contextmanager
def record_features(model: nn.Module, layers: Sequence[str]) -> Iterator[list[Tensor]]:
    """Collect the outputs [B, ...] of `layers` in the one forward pass that is made inside.

    The list is filled when the context ends, in the order of `layers`, which are dotted names as
    in `model.named_modules()`. Autograd sees the tensors that the layers returned. The model is
    left as it was.

    Raises:
        UserError: the model has no layer of that name, or a forward pass does not call it once,
            for one tensor.
    """
    calls: list[list[Any]] = [[] for _ in layers]
    features: list[Tensor] = []
    with contextlib.ExitStack() as hooks:
        for layer, outputs in zip(layers, calls, strict=True):
            module = _find_layer(model, layer)
            hook = module.register_forward_hook(partial(_keep_output, outputs))
            hooks.callback(hook.remove)
        yield features
        for layer, outputs in zip(layers, calls, strict=True):
            if [isinstance(output, Tensor) for output in outputs] != [True]:
                kinds = ", ".join(type(output).__name__ for output in outputs) or "nothing"
                raise UserError(
                    f"the method reads the layer {layer!r} of {_name(model)}, which must give one "
                    f"tensor in a forward pass, got {kinds}: choose another layer.",
                    keys=(),
                )
            features.append(outputs[0])


def find_classifier(model: nn.Module, num_classes: int) -> nn.Linear:
    """The last linear layer that has a row for each class.

    Raises:
        UserError: there is none.
    """
    layers = [module for module in model.modules() if isinstance(module, nn.Linear)]
    if isinstance(model, Ensemble):
        layers = []  # each member has its own
    for layer in reversed(layers):
        if layer.out_features == num_classes:
            return layer
    raise UserError(
        f"the method compares the {num_classes} classes by the rows of the teacher's last linear "
        f"layer, and {_name(model)} has none with {num_classes} rows: choose another teacher, or "
        "another method."
    )


def _keep_output(outputs: list[Any], module: nn.Module, inputs: Any, output: Any) -> None:
    outputs.append(output)


def _find_layer(model: nn.Module, layer: str) -> nn.Module:
    try:
        return model.get_submodule(layer)
    except AttributeError:
        names = [name for name, _ in model.named_modules() if name]
        raise UserError(
            f"the method reads the layer {layer!r}, which {_name(model)} does not have."
            f"{nearest_names(layer, names)}",
            keys=(),
        ) from None


def _name(model: nn.Module) -> str:
    return str(getattr(model, "ekd_name", type(model).__name__))

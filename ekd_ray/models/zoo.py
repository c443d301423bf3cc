"""One call for every model: own networks, those of plugins, of torchvision and of timm."""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from torch import Tensor, nn

from ekd_ray.config.arguments import checks_arguments
from ekd_ray.config.ensembles import is_ensemble, member_names
from ekd_ray.config.normalization import parse_normalization
from ekd_ray.config.plugins import LIBRARIES, is_loaded, load_installed, module_in_name, registers
from ekd_ray.errors import UserError, unknown_name
from ekd_ray.models.ensemble import Ensemble
from ekd_ray.models.mobilenetv2 import MobileNetV2
from ekd_ray.models.pvt import PvtTiny
from ekd_ray.models.resnet import CifarResNet
from ekd_ray.models.resnet_large import LargeResNet
from ekd_ray.models.shufflenet import ShuffleV1, ShuffleV2
from ekd_ray.models.t2t import T2tVit7
from ekd_ray.models.transformer import require_size
from ekd_ray.models.vgg import Vgg
from ekd_ray.models.wrn import WideResNet

Builder = Callable[[int], nn.Module]

#: Own models: name -> builder, called with the number of classes.
MODELS: dict[str, Builder] = {
    **{f"resnet{depth}": partial(CifarResNet, depth) for depth in (8, 14, 20, 32, 44, 56, 110)},
    **{
        f"resnet{depth}a": partial(CifarResNet, depth, shortcut="A")
        for depth in (20, 32, 44, 56, 110)
    },
    **{
        f"resnet{depth}x4": partial(CifarResNet, depth, widths=(32, 64, 128, 256))
        for depth in (8, 32)
    },
    **{
        f"wrn_{depth}_{widen}": partial(WideResNet, depth, widen)
        for depth, widen in ((16, 1), (16, 2), (16, 4), (28, 2), (28, 4), (40, 1), (40, 2))
    },
    **{f"vgg{depth}": partial(Vgg, depth) for depth in (8, 11, 13, 16, 19)},
    **{f"ResNet{depth}": partial(LargeResNet, depth) for depth in (18, 34, 50)},
    "MobileNetV2": MobileNetV2,
    "ShuffleV1": ShuffleV1,
    "ShuffleV2": ShuffleV2,
    "PVT_Ti": PvtTiny,
    "T2T_ViT_7": T2tVit7,
}

#: Short names of models that other libraries build, as the distillation papers call them.
ALIASES: dict[str, str] = {
    "DeiT_Ti": "timm:deit_tiny_patch16_224",
    "PiT_Ti": "timm:pit_ti_224",
    # The ImageNet student of the papers, with timm's ReLU6 where mdistiller's copy has ReLU.
    "MobileNetV1": "timm:mobilenetv1_100",
}


@dataclass(frozen=True, kw_only=True)
class RegisteredModel:
    """A model of a plugin: how it is built, and how its inputs are normalised, if that is known."""

    build: Builder
    normalization: str | None = None


#: The models of plugins, by name.
REGISTERED: dict[str, RegisteredModel] = {}


@registers("model", REGISTERED)
@checks_arguments
def register_model(name: str, build: Builder, *, normalization: str | None = None) -> None:
    """Make a model known by a name, which recipes and flags take as student or teacher.

    Args:
        build: called with the number of classes C; returns an untrained `nn.Module`, float32
            images [B, 3, H, W] -> logits [B, C], whose weights are drawn from torch's global
            random state alone.
        normalization: of the inputs, for weights that do not say: what the setting
            `teacher_normalization` takes.

    Raises:
        UserError: the name is no plain word, or is taken; or an argument is of another kind.
    """
    if not re.fullmatch(r"[\w.+-]+", name):
        raise UserError(f"a model's name has letters, digits and . _ + - only, got {name!r}.")
    if name in MODELS or name in ALIASES or name in REGISTERED:
        raise UserError(f"there is a model {name!r} already: choose another name.")
    if normalization is not None:
        parse_normalization(normalization, setting="normalization")
    REGISTERED[name] = RegisteredModel(build=build, normalization=normalization)


def is_own_model(name: str) -> bool:
    """Whether a model is of this package, so that its weights are known by their shapes."""
    return name in MODELS


def is_of_library(name: str) -> bool:
    """Whether torchvision or timm builds a model, which may be large."""
    return ALIASES.get(name, name).partition(":")[0] in LIBRARIES


def model_normalization(name: str) -> str | None:
    """The normalisation with which a plugin registered a model; None without any."""
    return REGISTERED[name].normalization if name in REGISTERED else None


def model_names() -> list[str]:
    """Names of the own models, in the zoo's order, then of those that plugins registered.

    `ALIASES`, `torchvision:` and `timm:` names come on top.
    """
    return [*MODELS, *REGISTERED]


def build_model(name: str, num_classes: int) -> nn.Module:
    """Build an untrained classifier: images `[B, 3, H, W]` -> logits `[B, num_classes]`.

    `name` is one of `model_names()` or `ALIASES`, `torchvision:<name>`, `timm:<name>`,
    `package.module:function` of a plugin that was loaded, or `ensemble:<name>,<name>`
    (`Ensemble`). Initial weights are float32 and a function of torch's global random state alone:
    seed or fork it around the call. The model carries `ekd_name` (an alias stays the alias) and
    `ekd_num_classes`, which `load_weights` compares with a file. Models for one image size (vision
    transformers, 224 x 224) raise UserError in the forward for another.

    Raises UserError for an unknown name, fewer than two classes, a library that is not installed, a
    module that is no plugin, and a builder of a plugin that fails or builds no `nn.Module`.
    """
    if isinstance(num_classes, bool) or not isinstance(num_classes, int) or num_classes < 2:
        raise UserError(f"num_classes must be a whole number of at least 2, got {num_classes!r}.")
    library, colon, library_name = ALIASES.get(name, str(name)).partition(":")
    if colon and library == "torchvision":
        model = _torchvision(library_name, num_classes)
    elif colon and library == "timm":
        model = _timm(library_name, num_classes)
    elif is_ensemble(name):
        members = member_names(name)
        if len(members) < 2:
            raise UserError(f"an ensemble has at least 2 members, got {name!r}: name the model.")
        model = Ensemble([build_model(member, num_classes) for member in members])
    elif name in MODELS:
        model = MODELS[name](num_classes)
    else:
        model = _call_builder(name, _find_builder(name), num_classes)
    model.ekd_name, model.ekd_num_classes = name, num_classes  # type: ignore[assignment]
    return model


def _find_builder(name: str) -> Builder:
    """The builder of a plugin's model."""
    if name not in REGISTERED:
        load_installed()
    if name in REGISTERED:
        return REGISTERED[name].build
    module = module_in_name(str(name))
    if module and is_loaded(module):
        function = name.rpartition(":")[2]
        found = getattr(importlib.import_module(module), function, None)
        if not callable(found):
            raise UserError(f"the module {module!r} has no function {function!r}: check the name.")
        return found
    known = [*model_names(), *ALIASES, "torchvision:<name>", "timm:<name>"]
    raise unknown_name("model", name, known, keys=())


def _call_builder(name: str, build: Builder, num_classes: int) -> nn.Module:
    try:
        model = build(num_classes)
    except Exception as error:
        raise UserError(
            f"the model {name!r} cannot be built for {num_classes} classes "
            f"({type(error).__name__}: {error})."
        ) from error
    if not isinstance(model, nn.Module):
        raise UserError(
            f"the builder of the model {name!r} must return an nn.Module, got "
            f"{type(model).__name__}."
        )
    return model


def _torchvision(name: str, num_classes: int) -> nn.Module:
    from torchvision import models  # slow import, and most runs need none of it

    known = models.list_models(module=models)  # classifiers only: no detection, no video
    if name not in known:
        raise unknown_name("torchvision model", name, known, keys=())
    options: dict[str, object] = {"weights": None, "num_classes": num_classes}
    if name in ("googlenet", "inception_v3"):
        # With auxiliary heads they return a tuple in training mode instead of logits.
        options |= {"aux_logits": False, "init_weights": True}
    return models.get_model(name, **options)


def _timm(name: str, num_classes: int) -> nn.Module:
    try:
        timm = importlib.import_module("timm")
    except ModuleNotFoundError as error:
        raise UserError(
            f"the model 'timm:{name}' needs the timm library, which is not installed: "
            "run `pip install timm`, or choose a model that is not from timm."
        ) from error
    if not timm.is_model(name):
        raise unknown_name("timm model", name, timm.list_models(), keys=())
    base, dot, _ = name.partition(".")
    if dot and name not in (known := timm.list_pretrained(f"{base}.*")):
        raise unknown_name("timm weights", name, [base, *known], keys=())
    model: nn.Module = timm.create_model(name, pretrained=False, num_classes=num_classes)
    facts = getattr(model, "pretrained_cfg", None) or {}
    if facts.get("fixed_input_size"):
        # In place of timm's assertion, which is a traceback to the user.
        size = tuple(facts["input_size"][-2:])
        model.register_forward_pre_hook(partial(_check_input, size))
    return model


def _check_input(size: tuple[int, int], model: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    require_size(inputs[0], size, str(model.ekd_name))

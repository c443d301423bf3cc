"""A teacher that is not what its user thinks."""

from __future__ import annotations

import argparse
import collections
import datetime
import enum
import functools
import io
import os
import pathlib
import subprocess
import tarfile
import zipfile
from collections.abc import Callable
from typing import Any

import numpy as np
import safetensors.torch
import torch
from cases import Answer, Case, Hands

from ekd_ray.errors import UserError
from ekd_ray.models import build_model, load_weights

State = dict[str, Any]
WRAPPERS, BESIDE, SETS = "wrappers of weights", "objects beside weights", "several sets of weights"
FILES, TEACHER = "files that are no weights", "a teacher that is another"


class Mode(enum.Enum):
    FAST = 1


class CfgNode(dict[str, Any]):
    """As of yacs and EasyDict: a dict with attributes."""

    def __init__(self, values: dict[str, Any]) -> None:
        super().__init__(values)
        self.__dict__["__immutable__"] = True
        self.__dict__.update(values)


class Addict(dict[str, Any]):
    """As of addict, and mmcv's ConfigDict: its state is itself."""

    def __getstate__(self) -> Any:
        return self

    def __setstate__(self, state: Any) -> None:
        raise AssertionError("executed")


class DictConfig:
    """As of OmegaConf: containers in the state of an object, and types."""

    def __init__(self, values: dict[str, Any]) -> None:
        self._content = {name: Addict({"value": value}) for name, value in values.items()}
        self._metadata = {"element_type": Any, "key_type": str, "ref_type": dict}
        self._seen = collections.defaultdict(list, {"train": [1.0]})


class Executed:
    def __reduce__(self) -> Any:
        return os.system, ("touch executed",)


class Evaluated:
    def __reduce__(self) -> Any:
        return subprocess.getoutput, ("touch executed",)


def network(name: str = "resnet8", classes: int = 10, seed: int = 0) -> torch.nn.Module:
    torch.manual_seed(seed)
    return build_model(name, classes)


def weights(seed: int = 0) -> State:
    return dict(network(seed=seed).state_dict())


def under(prefix: str, state: State) -> State:
    return {f"{prefix}{name}": value for name, value in state.items()}


def packed(content: Any, **options: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer, **options)
    return buffer.getvalue()


def gives_the_weights(
    make: Callable[[], Any], *, key: str | None = None, seed: int = 0
) -> Callable[[Hands], None]:
    """A file with this content loads, and the weights are those of this seed."""

    def hand_in(hands: Hands) -> None:
        torch.save(make(), hands.folder / "teacher.pth")
        model = network(seed=7)
        load_weights(model, hands.folder / "teacher.pth", key=key)
        for name, value in weights(seed).items():
            assert torch.equal(model.state_dict()[name], value), name

    return hand_in


def is_refused(
    make: Callable[[], bytes], *, key: str | None = None, name: str = "teacher.pth"
) -> Callable[[Hands], Answer]:
    """A file of these bytes is answered with one sentence, and the model stays as it is."""

    def hand_in(hands: Hands) -> Answer:
        (hands.folder / name).write_bytes(make())
        model = network(seed=7)
        answer = Answer(0, "loaded")
        try:
            load_weights(model, hands.folder / name, key=key)
        except UserError as error:
            answer = Answer(2, str(error))
        assert "\n" not in answer.text
        assert not (hands.folder / "executed").exists()
        for entry, value in weights(7).items():
            assert torch.equal(model.state_dict()[entry], value), entry
        return answer

    return hand_in


def named() -> State:
    return {f"big_model.encoder.{name}": value for name, value in weights().items()}


def beside_others() -> State:
    """A module of Lightning that holds a smaller network, a head and a buffer too."""
    small = {f"net_s.{name}": torch.ones(3) for name in ("conv1.weight", "fc.bias")}
    rest = {"proj.weight": torch.ones(4, 4), "normalize.mean": torch.ones(3)}
    return {"state_dict": {**{f"net_t.{n}": v for n, v in weights().items()}, **small, **rest}}


def lightning() -> State:
    state = under("model.", weights()) | {"criterion.weight": torch.ones(10)}
    return {
        "state_dict": state | {"val_acc.tp": torch.ones(10)},
        "pytorch-lightning_version": "2.4.0", "optimizer_states": [{"state": {}}],
        "hyper_parameters": {"lr": 0.1},
    }  # fmt: skip


def wrapped_within(wrapper: str) -> State:
    """A part of a network is wrapped, and the whole too: `features` of torchvision's examples."""
    names = {name: name.replace("layer1.", f"layer1.{wrapper}.") for name in weights()}
    return {f"{wrapper}.{names[name]}": value for name, value in weights().items()}


def counted_by_thop() -> State:
    extra = {"total_ops": torch.zeros(1), "conv1.total_params": torch.zeros(1)}
    return {"net": under("module.", weights() | extra), "acc": 91.0, "epoch": 3}


def averaged_by_swa() -> State:
    return {"n_averaged": torch.tensor(5)} | under("module.", weights())


def two_networks() -> State:
    return {"state_dict": under("student.", weights(1)) | under("teacher.", weights())}


def with_ema() -> State:
    return {"state_dict": weights(), "state_dict_ema": under("module.", weights(1)), "epoch": 3}


def only_optimizer() -> bytes:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model(torch.randn(2, 3, 32, 32)).sum().backward()
    optimizer.step()
    return packed({"optimizer": optimizer.state_dict(), "epoch": 3})


def zipped() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("teacher/model.pth", packed(weights()))
    return buffer.getvalue()


def tarred(mode: Any) -> bytes:
    buffer, data = io.BytesIO(), packed(weights())
    with tarfile.open(fileobj=buffer, mode=mode) as archive:
        entry = tarfile.TarInfo("model.pth")
        entry.size = len(data)
        archive.addfile(entry, io.BytesIO(data))
    return buffer.getvalue()


def scripted() -> bytes:
    buffer = io.BytesIO()
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 3)), buffer)
    return buffer.getvalue()


def of_numpy(save: Callable[..., Any]) -> bytes:
    buffer = io.BytesIO()
    save(buffer, np.ones(3))
    return buffer.getvalue()


def of_a_relative() -> bytes:
    """ResNet-20 with one layer of its own: the nearest is resnet20."""
    state = {name: value.clone() for name, value in network("resnet20").state_dict().items()}
    return safetensors.torch.save(state | {"attention.weight": torch.ones(3, 3)})


def whole_model() -> bytes:
    return packed({"model": Executed()})


# Handed to commands.

DRY = "--dry-run"
PAIR = ("--dataset", "digits", "--teacher", "resnet8", "--student", "resnet8",
        "--teacher-normalization", "half", "--epochs", "1", "--train-subset", "200")  # fmt: skip


def to_command(content: Callable[[], Any], *argv: str) -> Callable[[Hands], Answer]:
    """`distill` is handed the file."""

    def hand_in(hands: Hands) -> Answer:
        path = hands.folder / "teacher.pth"
        torch.save(content(), path)
        hands.patch.setenv("EKD_CACHE_DIR", str(hands.folder / "cache"))
        answer = hands.launch(
            "distill", *PAIR, "--teacher-weights", path, "--out", hands.folder / "run", *argv
        )
        assert not (hands.folder / "run").exists()
        return answer

    return hand_in


def without_weights(*argv: str) -> Callable[[Hands], Answer]:
    """`distill` with flags of a teacher that nobody gives."""
    return lambda hands: hands.launch("distill", *PAIR, DRY, *argv)


def diverged() -> State:
    state = weights()
    state["layer1.0.conv1.weight"][0] = float("nan")
    return state


def refused_then_another(hands: Hands) -> Answer:
    """A folder that a bad teacher was refused for takes the next one."""
    first = to_command(diverged)(hands)
    assert first.code == 2 and "NaN" in first.text, first
    return to_command(with_ema, DRY)(hands)


CASES = [
    *(
        Case(WRAPPERS, prefix, gives_the_weights(functools.partial(
            lambda prefix: under(prefix, weights()), prefix)), code=None)
        for prefix in (
            "module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module.", "model.", "net.",
            "backbone.", "student.", "teacher.", "ema.", "ema_model.module.", "model.net.module.",
        )
    ),
    *(
        Case(WRAPPERS, f"{wrapper} within", gives_the_weights(functools.partial(
            wrapped_within, wrapper)), code=None)
        for wrapper in ("module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
    ),
    Case(WRAPPERS, "below a name of its own", gives_the_weights(named), code=None),
    Case(WRAPPERS, "beside parts of another kind", gives_the_weights(beside_others), code=None),
    Case(WRAPPERS, "Lightning", gives_the_weights(lightning), code=None),
    Case(WRAPPERS, "thop", gives_the_weights(counted_by_thop), code=None),
    Case(WRAPPERS, "SWA", gives_the_weights(averaged_by_swa), code=None),
    Case(WRAPPERS, "nested", gives_the_weights(lambda: {"a": {"net": {"state_dict": weights()}}}),
         code=None),
    *(
        Case(BESIDE, name, gives_the_weights(functools.partial(
            lambda value: {"state_dict": weights(), "args": value}, value)), code=None)
        for name, value in {
            "Namespace": argparse.Namespace(lr=0.1, out=pathlib.Path("a")),
            "pathlib": pathlib.PosixPath("a/b"),
            "NumPy scalar": np.float64(91.5),
            "NumPy array": np.arange(3),
            "enum": Mode.FAST,
            "datetime": datetime.datetime(2024, 1, 2),
            "yacs": CfgNode({"MODEL": CfgNode({"DEPTH": 8, "NAME": "resnet"}), "LR": 0.1}),
            "addict": Addict({"optimizer": Addict({"lr": 0.1})}),
            "OmegaConf": DictConfig({"lr": 0.1, "model": "resnet"}),
            "defaultdict": collections.defaultdict(float, {"top1": 0.9}),
        }.items()
    ),
    Case(BESIDE, "weights in a dict of its own", gives_the_weights(
        lambda: {"state_dict": CfgNode(weights()), "cfg": Addict({"a": 1})}), code=None),
    Case(BESIDE, "a command in a dict", is_refused(
        lambda: packed({"state_dict": weights(), "a": CfgNode({"b": Executed()})})), code=2,
        words=("not executed", "posix.system")),
    Case(BESIDE, "command", is_refused(lambda: packed({"state_dict": weights(), "a": Executed()})),
         code=2, words=("not executed", "posix.system")),
    Case(BESIDE, "code", is_refused(lambda: packed({"state_dict": weights(), "a": Evaluated()})),
         code=2, words=("not executed", "getoutput")),
    Case(SETS, "a model and another", gives_the_weights(
        lambda: {"model": weights(), "discriminator": weights(1)}), code=None),
    Case(SETS, "the trained one", gives_the_weights(with_ema), code=None),
    Case(SETS, "the averaged one", gives_the_weights(with_ema, key="state_dict_ema", seed=1),
         code=None),
    Case(SETS, "a role", gives_the_weights(two_networks, key="state_dict.student", seed=1),
         code=None),
    Case(SETS, "no role", is_refused(lambda: packed(two_networks())), code=2,
         words=("state_dict.student", "--teacher-key")),
    Case(SETS, "unknown", is_refused(lambda: packed(with_ema()), key="state_dict_ama"), code=2,
         words=("Did you mean 'state_dict_ema'",)),
    Case(FILES, "HTML", is_refused(lambda: b"<!DOCTYPE html><html>404</html>"), code=2,
         words=("web page",)),
    Case(FILES, "LFS", is_refused(lambda: b"version https://git-lfs.github.com/spec/v1\noid x"),
         code=2, words=("git lfs pull",)),
    Case(FILES, "JSON", is_refused(lambda: b'{"error": "not found"}'), code=2, words=("JSON",)),
    Case(FILES, "zip", is_refused(zipped), code=2, words=("ZIP archive", "model.pth", "unpack")),
    Case(FILES, "tar", is_refused(lambda: tarred("w")), code=2, words=("tar archive", "unpack")),
    Case(FILES, "tar.gz", is_refused(lambda: tarred("w:gz")), code=2, words=("archive", "unpack")),
    Case(FILES, "TorchScript", is_refused(scripted), code=2, words=("TorchScript", "state_dict()")),
    Case(FILES, "npz", is_refused(lambda: of_numpy(np.savez)), code=2, words=("NumPy",)),
    Case(FILES, "npy", is_refused(lambda: of_numpy(np.save)), code=2, words=("NumPy",)),
    Case(FILES, "truncated", is_refused(lambda: packed(weights())[:-2000]), code=2,
         words=("truncated",)),
    Case(FILES, "optimizer", is_refused(only_optimizer), code=2, words=("state of an optimizer",)),
    Case(FILES, "whole model", is_refused(whole_model), code=2, words=("state_dict alone",)),
    Case(FILES, "a relative", is_refused(of_a_relative, name="x.safetensors"), code=2,
         words=("nearest", "resnet20")),
    Case(TEACHER, "100 classes", to_command(lambda: network(classes=100).state_dict(), DRY),
         code=2, words=("100 classes", "has 10")),
    Case(TEACHER, "NaN, then another", refused_then_another,
         words=("several sets", "--teacher-key", "warning    The teacher", "chance", "20 images")),
    Case(TEACHER, "a key without weights", without_weights("--teacher-key", "ema"), code=2,
         words=("--teacher-key", "--teacher-weights")),
    Case(TEACHER, "a bound without teacher", without_weights(
        "--min-teacher-accuracy", "0.9", "--method", "none"), code=2,
        words=("--min-teacher-accuracy", "method none")),
    Case(TEACHER, "stopped", to_command(weights, "--min-teacher-accuracy", "0.6"), code=2,
         words=("min_teacher_accuracy", "at least 0.6", "chance", "20 images")),
    Case(TEACHER, "another order", to_command(
        lambda: {"state_dict": weights(), "class_names": [*"9876543210"]}, DRY),
         words=("another order", "class 0")),
    Case(TEACHER, "another order, of NumPy", to_command(
        lambda: {"state_dict": weights(),
                 "class_to_idx": {name: np.int64(9 - i) for i, name in enumerate("0123456789")}},
        DRY), words=("another order", "class 0")),
]  # fmt: skip

"""The operations for which a GPU has no deterministic algorithm, and a mode that finds them."""

from __future__ import annotations

from torch.utils._python_dispatch import TorchDispatchMode

# As torch 2.14's `use_deterministic_algorithms` lists them, and kthvalue, which it forgets. Those
# that read no gradient are refused forward as well. `bincount` with weights is left out: here it
# counts on the CPU only.
REFUSED = {
    *(f"{pool}_backward" for pool in (
        "avg_pool3d", "_adaptive_avg_pool2d", "_adaptive_avg_pool3d", "adaptive_max_pool2d",
        "adaptive_max_pool3d", "fractional_max_pool2d", "fractional_max_pool3d",
        "reflection_pad1d", "reflection_pad2d", "reflection_pad3d", "upsample_linear1d",
        "upsample_bilinear2d", "upsample_bicubic2d", "upsample_trilinear3d",
        "_upsample_bilinear2d_aa", "_upsample_bicubic2d_aa", "grid_sampler_2d", "grid_sampler_3d",
        "nll_loss2d", "_ctc_loss",
    )),
    *("max_unpool2d", "max_unpool3d", "nll_loss2d_forward", "put", "put_", "histc", "kthvalue"),
    *("median.dim", "median.dim_values", "nanmedian.dim"),
}  # fmt: skip


class DeterministicOnly(TorchDispatchMode):
    """Fails at the first operation that a GPU would refuse; `seen` has the names of all."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        self.seen.add(name)
        assert not {name, f"{name}.{function._overloadname}"} & REFUSED, function
        return function(*args, **(kwargs or {}))

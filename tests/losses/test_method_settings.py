"""Settings that methods declare: names of `DistillConfig`, known once they are asked for.

What a method registers stays for good, so each case runs in a Python of its own.
"""

import subprocess
import sys

import pytest

HEAD = """
import dataclasses, pickle, sys
from ekd_ray.config import DistillConfig, StudyConfig
"""
CASES = {
    "asked_for_when_a_configuration_has_one": """
assert "torch" not in sys.modules
early = DistillConfig(seed=3)
assert "torch" not in sys.modules
assert DistillConfig(dkd_beta=8) == DistillConfig() and DistillConfig(dkd_beta=2).dkd_beta == 2.0
assert early.dkd_beta == 8.0 and early == DistillConfig(seed=3)
""",
    "asked_for_when_one_is_read_from_a_file": """
assert DistillConfig.from_dict({"ctkd_t_end": 3}).ctkd_t_end == 3
try: DistillConfig().dkd_betta
except AttributeError as error: assert "no setting 'dkd_betta'" in str(error)
else: raise SystemExit("a misspelt name passed")
""",
    "asked_for_when_a_study_is_written": """
assert StudyConfig().to_dict()["distill"]["evidence"]
# Those that there were before methods had settings of their own count in every fingerprint, so
# that runs of the former default of `evidence` and of this one never share one.
assert DistillConfig(evidence="log1p_softplus").fingerprint() == "b69c786daf5802e0"
assert DistillConfig().fingerprint() == DistillConfig(evidence="softplus").fingerprint()
assert DistillConfig().fingerprint() != "b69c786daf5802e0"
""",
    "added_by_a_new_method": """
from ekd_ray.config.method_settings import MethodSetting
from ekd_ray.errors import UserError
from ekd_ray.losses import METHODS, register_method, resolve_method
before, kd = DistillConfig(seed=3), METHODS["kd"]
printed = before.fingerprint(), resolve_method(before).fingerprint()
share = MethodSetting(name="own_share", kind=float, default=0.5, above=0, high=1, doc="a share")
epochs = MethodSetting(name="own_epochs", kind=int | None, default=lambda c: c.epochs // 4, doc="n")
own = dataclasses.replace(kd, settings=(*kd.settings, share, epochs))
register_method("own", own)
# Fingerprints of runs that leave it alone stay.
assert (before.fingerprint(), resolve_method(before).fingerprint()) == printed
assert before.own_share == 0.5 and before == DistillConfig(seed=3)
assert before.replace(own_share=0.25).fingerprint() != before.fingerprint()
# It is a setting like others.
config = resolve_method(DistillConfig(method="own", own_share=0.25))
assert (config.own_share, config.own_epochs, config.temperature) == (0.25, 60, 4.0)
assert DistillConfig.from_dict(config.to_dict()) == pickle.loads(pickle.dumps(config)) == config
assert dataclasses.replace(config, lr=0.1).own_share == config.replace(lr=0.1).own_share == 0.25
for wrong in ({"own_share": 2}, {"method": "kd", "own_share": 0.25}):
    try: resolve_method(DistillConfig(**wrong))
    except Exception as error: assert "own_share" in str(error)
    else: raise SystemExit("an illegal value passed")
# A name that is taken is refused.
for name in ("lr", "own_share", "dkd_beta"):
    other = dataclasses.replace(share, name=name, high=3)
    method = dataclasses.replace(kd, settings=(*kd.settings, other))
    try: register_method("other", method)
    except UserError as error: assert name in str(error)
    else: raise SystemExit(f"{name} was taken over")
for name, value in (("fine", 3), (3, own)):
    try: register_method(name, value)
    except UserError as error: assert "must be" in str(error)
    else: raise SystemExit("a value of another kind was taken")
try: register_method("kd", own)
except UserError as error: assert "'kd'" in str(error)
else: raise SystemExit("a method was replaced")
""",
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_settings_of_methods_are(case):
    code = HEAD + CASES[case]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr

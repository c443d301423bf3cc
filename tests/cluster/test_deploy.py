"""The files in deploy/, and the commands that they show, fit this code."""

from __future__ import annotations

import argparse
import json
import re
import shlex
import shutil
import subprocess
import tomllib
import zipfile
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import ray
import yaml
from packaging.requirements import Requirement

from ekd_ray.cli import tune_command

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
COMMAND = re.compile(r"ekd-ray tune\s*([^`]*)")


def commands(path: Path) -> list[list[str]]:
    """The arguments of every `ekd-ray tune` that a file shows, comments included."""
    text = path.read_text(encoding="utf-8")
    if path.name == "kuberay-job.yaml":  # folded lines
        text = yaml.safe_load(text)["spec"]["entrypoint"]
    text = re.sub(r"^#+ ?", "", text, flags=re.MULTILINE)
    found = [COMMAND.search(line) for line in re.sub(r"\s*\\\n\s*", " ", text).splitlines()]
    shown = [match[1] for match in found if match and "..." not in match[1]]
    # A command may itself stand in quotes; variables hold one word, or none.
    whole = [rest.rstrip("'") if rest.count("'") % 2 else rest for rest in shown]
    return [shlex.split(rest.replace("${RESUME:-}", ""), comments=True) for rest in whole]


@pytest.mark.parametrize(
    "name", ["aws-gpu-spot.yaml", "kuberay-cluster.yaml", "kuberay-job.yaml", "slurm.sh"]
)
def test_commands_that_are_shown_have_flags_that_tune_knows(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    parser = argparse.ArgumentParser()
    tune_command.add_arguments(parser)
    found = commands(DEPLOY / name)
    assert found
    for arguments in found:
        try:
            parser.parse_args(arguments)
        except SystemExit:
            pytest.fail(f"ekd-ray tune {shlex.join(arguments)}: {capsys.readouterr().err}")


def loaded(name: str) -> Any:
    return yaml.safe_load((DEPLOY / name).read_text(encoding="utf-8"))


def test_the_cluster_file_is_one_of_ray_s() -> None:
    schema = json.loads((Path(ray.__file__).parent / "autoscaler" / "ray-schema.json").read_text())
    values = loaded("aws-gpu-spot.yaml")
    jsonschema.validate(values, schema)
    types = values["available_node_types"]
    head, worker = types[values["head_node_type"]], types["gpu_spot"]
    assert head["resources"]["CPU"] == 0, "spot nodes die, the driver's must not be one of them"
    assert worker["resources"]["GPU"] > 0
    assert worker["min_workers"] >= 1, "a study must find room for one trial"
    assert worker["node_config"]["InstanceMarketOptions"] == {"MarketType": "spot"}
    for kind in ("head", "worker"):
        assert any(
            "RAY_AUTH_MODE=token ray start" in line for line in values[f"{kind}_start_ray_commands"]
        )


@pytest.mark.parametrize(
    ("name", "kind", "path"),
    [("kuberay-cluster.yaml", "RayCluster", ()),
     ("kuberay-job.yaml", "RayJob", ("rayClusterSpec",))],
)  # fmt: skip
def test_kuberay_manifests_have_the_fields_of_their_kind(
    name: str, kind: str, path: tuple[str, ...]
) -> None:
    manifest = loaded(name)
    assert (manifest["apiVersion"], manifest["kind"]) == ("ray.io/v1", kind)
    spec = manifest["spec"]
    for key in path:
        spec = spec[key]
    assert spec["authOptions"] == {"mode": "token"}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    (needed,) = [text for text in project["dependencies"] if text.startswith("ray[")]
    assert Requirement(needed).specifier.contains(spec["rayVersion"])
    head, (worker,) = spec["headGroupSpec"], spec["workerGroupSpecs"]
    assert 1 <= worker["minReplicas"] <= worker["replicas"] <= worker["maxReplicas"]
    assert head["rayStartParams"] == {"num-cpus": "0"}
    images = {_check_pod(group["template"]) for group in (head, worker)}
    assert images == {"REGISTRY/ekd-ray:latest"}
    limits = worker["template"]["spec"]["containers"][0]["resources"]["limits"]
    assert int(limits["nvidia.com/gpu"]) >= 1


def _check_pod(template: dict[str, Any]) -> str:
    """A pod's template fits Kubernetes' own schema and holds together; its image."""
    # The one built-in kind that holds a template and nothing else.
    pod = {"apiVersion": "v1", "kind": "PodTemplate", "metadata": {}, "template": template}
    kubernetes_validate.validate(pod, kubernetes_validate.latest_version(), strict=True)
    spec = template["spec"]
    assert spec["securityContext"]["runAsNonRoot"] is True
    (container,) = spec["containers"]
    resources = container["resources"]
    assert resources["requests"] == resources["limits"], "Ray counts what it may use"
    volumes = {volume["name"] for volume in spec["volumes"]}
    mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    assert set(mounts) == volumes
    image = (DEPLOY / "Dockerfile").read_text()
    for variable, name in (("EKD_DATA_ROOT", "data"), ("EKD_CACHE_DIR", "cache")):
        assert f"{variable}={mounts[name]}" in image
    return str(container["image"])


def test_the_slurm_script_is_bash_and_symmetric_run_takes_its_flags() -> None:
    path = DEPLOY / "slurm.sh"
    subprocess.run(["bash", "-n", str(path)], check=True)
    from ray.scripts.scripts import cli as ray_cli

    text = re.sub(r"\s*\\\n\s*", " ", path.read_text())
    (call,) = re.findall(r"ray symmetric-run (.*?) -- ", text)
    flags = re.findall(r"--[a-z-]+", call)
    known = {
        name
        for command in ("symmetric-run", "start")
        for option in ray_cli.commands[command].params
        for name in option.opts
    }
    assert flags and set(flags) <= known
    assert text.index("RAY_AUTH_MODE=token") < text.index("symmetric-run")


def test_the_image_holds_what_it_copies_and_runs_as_nobody_special() -> None:
    lines = re.sub(r"\s*\\\n\s*", " ", (DEPLOY / "Dockerfile").read_text()).splitlines()
    ignored = (ROOT / ".dockerignore").read_text().split()
    assert ignored[0] == "*"
    for line in lines:
        if line.startswith("COPY ") and "--from" not in line:
            *sources, _ = line.split()[1:]
            for source in sources:
                assert (ROOT / source).exists(), source
                assert f"!{source.split('/')[0]}" in ignored
    (command,) = [json.loads(line[4:]) for line in lines if line.startswith("CMD ")]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert command[0] in project["scripts"]
    users = [line.split()[1] for line in lines if line.startswith("USER ")]
    assert users[-1] == "ray"


def test_a_job_ships_the_code_and_not_the_data(tmp_path: Path) -> None:
    """Ray's own packing of the working directory, with a study, data and an environment in it."""
    from ray._private.ray_constants import get_runtime_env_default_excludes
    from ray._private.runtime_env.packaging import create_package

    checkout = tmp_path / "checkout"
    listed = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split("\n")
    kept = [name for name in listed if name and (ROOT / name).is_file()]
    for name in {*kept, ".rayignore"}:
        (checkout / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / name, checkout / name)
    for name in ("runs/a/study.yaml", "data/train", ".venv/bin/python",
                 "best/model.safetensors", "cache/t/rows.bin", "teacher.pth",
                 ".git/HEAD", "ekd_ray/__pycache__/x.pyc"):  # fmt: skip
        (checkout / name).parent.mkdir(parents=True, exist_ok=True)
        (checkout / name).write_bytes(bytes(1 << 16))
    package = tmp_path / "package.zip"
    create_package(
        str(checkout), package, include_gitignore=True, excludes=get_runtime_env_default_excludes()
    )
    names = {name for name in zipfile.ZipFile(package).namelist() if not name.endswith("/")}
    code = {
        name
        for name in {*kept, "README.md"}
        if name.startswith(("ekd_ray/", "launchers/", "search_spaces/"))
    }
    assert code <= names
    extra = {name for name in names - code if name.startswith(("runs", "data", ".venv", "best",
             "cache", "teacher", ".git/", "tests", "docs")) or "__pycache__" in name}  # fmt: skip
    assert not extra
    assert package.stat().st_size < 3 << 20

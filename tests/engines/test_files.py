"""conf/kubernetes.yaml and conf/skypilot.yaml: they fit their engine's schema, and start the ranks.

Neither engine runs here.
"""

from __future__ import annotations

import os
import subprocess
import tomllib
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.test_house import ROOT

CONF = ROOT / "conf"


def read(name: str) -> Any:
    return yaml.safe_load((CONF / name).read_text())


def require_settings(words: list[str]) -> None:
    """Require that the words set what `python -m harvest` knows, and a bucket for the store."""
    settings = dict(word.split("=", 1) for word in words)
    assert settings.keys() <= read("harvest.yaml").keys()
    assert settings["store"].startswith("s3://")


def test_kubernetes_knows_every_field() -> None:
    validate = pytest.importorskip(
        "kubernetes_validate", reason="no schema of Kubernetes: pip install kubernetes-validate"
    )
    for version in ("1.31", validate.latest_version()):
        validate.validate(read("kubernetes.yaml"), version, strict=True)


def test_kubernetes_starts_as_many_ranks_as_it_tells_them() -> None:
    job = read("kubernetes.yaml")["spec"]
    (container,) = job["template"]["spec"]["containers"]
    assert container["command"] == ["python", "-m", "residual_saes.harvest"]
    require_settings(container["args"])
    assert f"world={job['completions']}" in container["args"]
    assert job["parallelism"] == job["completions"]


@pytest.mark.parametrize(
    ("code", "condition", "action"),
    [
        (2, "", "FailIndex"),
        (75, "", "Count"),
        (137, "", "Count"),  # out of memory
        (137, "DisruptionTarget", "Ignore"),
        (143, "", "Ignore"),
    ],
)
def test_kubernetes_starts_again_what_goes_on(code: int, condition: str, action: str) -> None:
    """The first rule that fits is the one that counts."""
    fitting = []
    for rule in read("kubernetes.yaml")["spec"]["podFailurePolicy"]["rules"]:
        codes = rule.get("onExitCodes", {"operator": "In", "values": []})
        by_code = (code in codes["values"]) == (codes["operator"] == "In")
        by_condition = condition in [each["type"] for each in rule.get("onPodConditions", [])]
        if by_code or by_condition:
            fitting.append(rule["action"])
    assert fitting[0] == action


def test_skypilot_knows_every_field() -> None:
    schemas = pytest.importorskip(
        "sky.utils.schemas", reason="no schema of SkyPilot: pip install skypilot"
    )
    import jsonschema

    task = read("skypilot.yaml")
    jsonschema.validate(task, schemas.get_task_schema())
    jsonschema.validate(task["resources"], schemas.get_resources_schema())


@pytest.mark.parametrize(("failed", "code"), [(0, 0), (2, 2), (75, 75)])
def test_skypilot_starts_a_rank_on_each_gpu(tmp_path: Path, failed: int, code: int) -> None:
    """The first rank ends at once with `failed`, the others later with 0. They are a stand-in."""
    command = tmp_path / "python"
    command.write_text(
        '#!/bin/bash\necho "$RANK of $WORLD_SIZE on GPU $LOCAL_RANK: $*" >> told\n'
        f"[ $RANK != 3 ] || exit {failed}\nsleep 0.3\n"
    )
    command.chmod(0o755)
    task = read("skypilot.yaml")
    require_settings(task["envs"]["SETTINGS"].split())
    node = {"SKYPILOT_NUM_NODES": "2", "SKYPILOT_NODE_RANK": "1", "SKYPILOT_NUM_GPUS_PER_NODE": "3"}
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, **task["envs"], **node, "PATH": path}
    script = tmp_path / "run.sh"  # the shell waits when the first rank has ended
    script.write_text(task["run"].replace("\ncode=0\n", "\nsleep 0.2\ncode=0\n"))
    ended = subprocess.run(["bash", script], env=environment, cwd=tmp_path, check=False)
    assert ended.returncode == code
    told = sorted((tmp_path / "told").read_text().splitlines())
    settings = f"-m residual_saes.harvest {task['envs']['SETTINGS']}"
    assert told == [f"{3 + gpu} of 6 on GPU {gpu}: {settings}" for gpu in range(3)]


def test_a_wheel_has_them_all() -> None:
    data = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    patterns = [*data["package-data"]["*"], *data["package-data"]["residual_saes.conf"]]
    files = [path.name for path in CONF.iterdir() if path.is_file() and path.suffix != ".py"]
    assert {"slurm.sbatch", "kubernetes.yaml", "skypilot.yaml"} <= {*files}
    assert all(any(fnmatchcase(name, pattern) for pattern in patterns) for name in files)

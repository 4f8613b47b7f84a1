"""The examples for clusters: shell scripts parse, YAML files load and have the fields of the published schemas."""

import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest

from ddpm.cli.main import parser
from ddpm.presets import PRESETS

FOLDER = Path(__file__).parents[1] / "examples" / "cluster"
SCRIPTS, TASKS = sorted(FOLDER.glob("*.sh")), sorted(FOLDER.glob("*.yaml"))

# The fields of the CRD TrainJob (trainer.kubeflow.org/v1alpha1) and of the task schema of SkyPilot that may be used.
TRAINJOB = {
    "": {"apiVersion", "kind", "metadata", "spec"},
    "spec": {"activeDeadlineSeconds", "initializer", "managedBy", "runtimePatches", "runtimeRef", "suspend", "trainer"},
    "spec.trainer": {"args", "command", "env", "image", "numNodes", "numProcPerNode", "resourcesPerNode"},
    "spec.runtimeRef": {"apiGroup", "kind", "name"},
}
SKYPILOT = {
    "": {"name", "workdir", "num_nodes", "resources", "envs", "secrets", "file_mounts", "volumes", "setup", "run"},
    "resources": {"accelerators", "use_spot", "job_recovery", "infra", "cpus", "memory", "disk_size", "ports"},
    "resources.job_recovery": {"strategy", "max_restarts_on_errors", "recover_on_exit_codes"},
}


def load(file: Path) -> Any:
    return pytest.importorskip("yaml").safe_load(file.read_text())


def words_of(file: Path) -> list[str]:
    """The words of `torchrun ...` in an example."""
    if file.name == "trainjob.yaml":
        trainer = load(file)["spec"]["trainer"]
        return [*trainer["command"], *trainer["args"]]
    text = load(file)["run"] if file.suffix == ".yaml" else file.read_text()
    command = re.search(r"torchrun --(?:.*\\\n)*.*", text)
    assert command
    return shlex.split(command[0].replace("\\\n", " ").replace('"', "").removesuffix("&"))


@pytest.mark.parametrize("file", SCRIPTS, ids=lambda file: file.name)
def test_scripts_parse(file):
    subprocess.run(["bash", "-n", str(file)], check=True)
    assert file.stat().st_mode & 0o111


@pytest.mark.parametrize("file", [*SCRIPTS, *TASKS], ids=lambda file: file.name)
def test_commands_are_ours(file):
    """The words after `-m ddpm` are options that `ddpm train` has, with a preset that exists."""
    words = words_of(file)
    words = words[words.index("ddpm") + 1 :]
    words = [word for word in words if word not in ("${OPTIONS:-}",)]
    words[1] = re.sub(r"\$\{PRESET:-(\w+)\}", r"\1", words[1])
    assert words[:2] == ["train", words[1]]
    assert words[1] in PRESETS
    args = parser().parse_args(words)
    assert args.data
    assert args.out


@pytest.mark.parametrize("file", [*SCRIPTS, *TASKS], ids=lambda file: file.name)
def test_torchrun_knows_its_options(file):
    """The words between `torchrun` and `-m` are options that torchrun has."""
    from torch.distributed.run import get_args_parser

    words = words_of(file)
    before = [re.sub(r"\$\{?\w+.*", "1", word) for word in words[1 : words.index("-m")]]
    args = get_args_parser().parse_args([*before, "-m", "ddpm"])
    assert args.max_restarts == 3


@pytest.mark.parametrize(("name", "fields"), [("trainjob.yaml", TRAINJOB), ("skypilot.yaml", SKYPILOT)])
def test_fields_are_of_the_schema(name, fields):
    values = load(FOLDER / name)
    for path, known in fields.items():
        part = values
        for key in filter(None, path.split(".")):
            part = part[key]
        assert part.keys() <= known, path


def test_the_kubernetes_patch_names_what_the_runtime_has():
    """The runtime torch-distributed has one replicated job and one container, and both are called node."""
    values = load(FOLDER / "trainjob.yaml")
    assert (values["apiVersion"], values["kind"]) == ("trainer.kubeflow.org/v1alpha1", "TrainJob")
    template = values["spec"]["runtimePatches"][0]["trainingRuntimeSpec"]["template"]["spec"]
    (job,) = template["replicatedJobs"]
    pod = job["template"]["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert (job["name"], container["name"]) == ("node", "node")
    assert {m["name"] for m in container["volumeMounts"]} == {v["name"] for v in pod["volumes"]}


def test_slurm_reads_its_lines():
    """Every #SBATCH line comes before the first command, or sbatch would not read it."""
    lines = (FOLDER / "slurm.sh").read_text().splitlines()
    options = [i for i, line in enumerate(lines) if line.startswith("#SBATCH")]
    first = next(i for i, line in enumerate(lines) if line and not line.startswith("#"))
    assert max(options) < first
    assert {"--requeue", "--open-mode=append"} <= {line.split()[1] for line in lines if line.startswith("#SBATCH")}

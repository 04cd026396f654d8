# SPDX-License-Identifier: Apache-2.0
"""The launch recipes: their commands are accepted for the true sizes of the models, they are the guide's where they say so, and signals
of a scheduler reach the ranks. Stand-ins take the place of torchrun's ranks, srun and scontrol."""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_bagel.config.parser import Config, parse_config
from megatron_bagel.config.validate import validate
from tests.examples.kubeflow_fields import SPECS, wrong_fields
from tests.examples.launch_models import make_models

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "examples"
RECIPES = {
    "pretrain_qwen2.5_0.5b": "qwen0.5b", "pretrain_qwen2.5_7b": "qwen7b", "finetune_bagel_7b": "qwen7b", "lora_bagel_7b_1gpu": "qwen7b",
    "lora_bagel_7b_2gpu": "qwen7b", "lora_small_data": "qwen7b",
}  # fmt: skip
GUIDE = {
    "pretrain_qwen2.5_0.5b": "--layer_module Qwen2MoTDecoderLayer --use_flex True --max_latent_size 64",
    "finetune_bagel_7b": (
        "--layer_module Qwen2MoTDecoderLayer --max_latent_size 64 --resume-from MODEL --finetune_from_hf True --auto_resume True "
        "--resume-model-only True --finetune-from-ema True --log_every 1 --lr 2e-5 --num_worker 1 --expected_num_tokens 10240 "
        "--max_num_tokens 11520 --max_num_tokens_per_sample 10240"
    ),
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return make_models(tmp_path_factory.mktemp("models"))


def environment(**settings: Any) -> dict[str, str]:
    """This process's, without what a launcher or a scheduler would have set, and with ``settings``."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "MASTER_"))}
    return kept | {name: str(value) for name, value in settings.items()}


def dry_run(words: list[str], **settings: Any) -> list[str]:
    """The command that a script would run, as words."""
    done = subprocess.run(["bash", *words], env=environment(DRY_RUN=1, **settings), cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (line,) = done.stdout.splitlines()
    return shlex.split(line)


def accepted(command: list[str]) -> tuple[Any, Config]:
    """(torchrun's settings, the run's), both as their own parsers read them and, for the run, as it would check them on GPUs."""
    from torch.distributed.run import get_args_parser

    launch = get_args_parser().parse_args(command[1:])
    assert command[0] == "torchrun" and launch.module and launch.training_script == "megatron_bagel.train"
    config = parse_config(launch.training_script_args)
    validate(config, int(launch.nnodes.split(":")[0]) * int(launch.nproc_per_node), has_gpu=True)
    return launch, config


@pytest.mark.parametrize("nodes", [1, 3, 4, 8, 128])
@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_is_accepted_on_any_number_of_nodes(recipe: str, nodes: int, models: dict[str, str]) -> None:
    llm = Path(models["model_path"]).with_name(RECIPES[recipe])
    command = dry_run([f"examples/{recipe}.sh", "--lr", "3e-5"], **models, llm_path=llm, num_nodes=nodes, master_addr="node0", job_id="7")
    launch, config = accepted(command)
    assert config.training.lr == 3e-5, "flags of the command line come last"
    assert config.training.eps == 1e-8, "the original's 1e-15 steps on rounding noise (docs/differences.md)"
    assert config.training.auto_resume and config.training.results_dir in config.training.checkpoint_dir
    assert launch.standalone == (nodes == 1) and int(launch.max_restarts) == 3
    assert nodes == 1 or (launch.rdzv_backend, launch.rdzv_endpoint, launch.rdzv_id) == ("c10d", "node0:29500", "7")


def test_with_a_node_rank_the_launcher_is_the_guides(models: dict[str, str]) -> None:
    settings = {"num_nodes": 2, "node_rank": 1, "nproc_per_node": 4, "master_addr": "10.0.0.1", "master_port": 12345}
    command = dry_run(["examples/finetune_bagel_7b.sh"], **models, **settings)
    assert command[1:6] == ["--nnodes=2", "--node_rank=1", "--master_addr=10.0.0.1", "--master_port=12345", "--nproc_per_node=4"]
    accepted(command)


@pytest.mark.parametrize("recipe", GUIDE)
def test_the_guides_flags_have_the_guides_values(recipe: str, models: dict[str, str]) -> None:
    llm = Path(models["model_path"]).with_name(RECIPES[recipe])
    _, config = accepted(dry_run([f"examples/{recipe}.sh"], **models, llm_path=llm))
    guide = parse_config(GUIDE[recipe].replace("MODEL", models["model_path"]).split())
    assert guide.given <= config.given
    for section in ("model", "data", "training"):
        for name in guide.given & set(vars(getattr(guide, section))):
            assert getattr(getattr(config, section), name) == getattr(getattr(guide, section), name), name


#: Starts a rank that writes down the signal it gets, and ends as the rank does. Like torchrun it would end itself at SIGUSR1.
LAUNCHER = """#!/usr/bin/env bash
bash -c 'trap "echo saved > $OUT/rank; exit $STATUS" USR1; echo ready > $OUT/ready; while :; do sleep 0.05; done'
exit $?
"""


def program(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)
    return path


def wait_for(path: Path, process: subprocess.Popen) -> None:
    until = time.monotonic() + 60
    while not path.exists():
        assert process.poll() is None and time.monotonic() < until, f"{path.name} does not appear"
        time.sleep(0.02)


@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGUSR1])
@pytest.mark.parametrize("status", [0, 3])
def test_a_warning_reaches_the_ranks_and_their_status_comes_back(tmp_path: Path, sent: signal.Signals, status: int) -> None:
    launcher = program(tmp_path, "launcher", LAUNCHER)
    script = ["bash", str(EXAMPLES / "pretrain_qwen2.5_0.5b.sh")]
    process = subprocess.Popen(script, env=environment(TORCHRUN=launcher, OUT=tmp_path, STATUS=status))
    wait_for(tmp_path / "ready", process)
    process.send_signal(sent)
    assert process.wait(60) == status and (tmp_path / "rank").read_text() == "saved\n"


def test_without_a_warning_the_launchers_status_comes_back(tmp_path: Path) -> None:
    launcher = program(tmp_path, "launcher", "#!/usr/bin/env bash\nexit 5\n")
    script = ["bash", str(EXAMPLES / "finetune_bagel_7b.sh")]
    assert subprocess.run(script, env=environment(TORCHRUN=launcher), check=False).returncode == 5


SCONTROL = """#!/usr/bin/env bash
case $1 in
  show) echo node7; echo node8 ;;
  requeue) echo "$2" > "$OUT/requeued" ;;
esac
"""
#: One task, as of one node; hands SIGUSR1 on, as srun does.
SRUN = """#!/usr/bin/env bash
echo "$@" > "$OUT/srun"
while [[ $1 == --* ]]; do shift; done
"$@" &
task=$!
trap 'kill -USR1 $task' USR1
wait $task; wait $task 2>/dev/null
exit 0
"""


def slurm(folder: Path, models: dict[str, str], launcher: str) -> subprocess.Popen:
    """The job script as Slurm would start it on two nodes."""
    program(folder, "bin/srun", SRUN)
    program(folder, "bin/scontrol", SCONTROL)
    settings = {
        "PATH": f"{folder}/bin:{os.environ['PATH']}", "OUT": folder, "STATUS": 0, "SLURM_JOB_ID": "40123", "SLURM_JOB_NUM_NODES": "2",
        "SLURM_JOB_NODELIST": "node[7-8]", "TORCHRUN": program(folder, "launcher", launcher),
    }  # fmt: skip
    words = ["bash", "examples/train.sbatch", "examples/finetune_bagel_7b.sh", "--lr", "1e-5"]
    return subprocess.Popen(words, env=environment(**models, **settings), cwd=ROOT)


def test_slurm_warns_the_ranks_and_queues_the_job_again(models: dict[str, str], tmp_path: Path) -> None:
    process = slurm(tmp_path, models, LAUNCHER)
    wait_for(tmp_path / "ready", process)
    process.send_signal(signal.SIGUSR1)
    assert process.wait(60) == 0
    assert (tmp_path / "rank").read_text() == "saved\n", "the ranks saved first"
    assert (tmp_path / "requeued").read_text() == "40123\n"


def test_slurm_runs_a_launcher_per_node_and_ends_with_it(models: dict[str, str], tmp_path: Path) -> None:
    process = slurm(tmp_path, models, '#!/usr/bin/env bash\nprintf "%q " torchrun "$@" > "$OUT/command"\n')
    assert process.wait(60) == 0 and not (tmp_path / "requeued").exists()
    assert "--ntasks-per-node=1" in (tmp_path / "srun").read_text()
    launch, config = accepted(shlex.split((tmp_path / "command").read_text()))
    assert (launch.nnodes, launch.rdzv_endpoint, launch.rdzv_id) == ("2", "node7:20123", "40123") and config.training.lr == 1e-5


def test_slurm_needs_a_recipe() -> None:
    done = subprocess.run(["bash", "examples/train.sbatch"], env=environment(), cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode and "a recipe, such as" in done.stderr


def test_the_kubernetes_manifest_runs_a_recipe_on_as_many_nodes_as_it_asks_for(models: dict[str, str]) -> None:
    job = yaml.safe_load((EXAMPLES / "kubernetes/pytorchjob.yaml").read_text())
    roles = job["spec"]["pytorchReplicaSpecs"]
    pods = [role["template"]["spec"] for role in roles.values()]
    for pod in pods:
        (container,) = pod["containers"]
        variables = {entry["name"]: entry["value"] for entry in container["env"]}
        assert int(variables["num_nodes"]) == sum(role["replicas"] for role in roles.values())
        assert int(variables["nproc_per_node"]) == container["resources"]["limits"]["nvidia.com/gpu"]
        assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
        known = re.findall(r"\$\{(\w+):-", (EXAMPLES / "launch.sh").read_text() + (EXAMPLES / "finetune_bagel_7b.sh").read_text())
        assert set(variables) <= {*known, "index_dir"}, "a variable that no script reads"
        bash, *words = container["command"]
        settings = {**variables, **models, "MASTER_ADDR": "bagel-master-0", "MASTER_PORT": "23456"}
        del settings["index_dir"]
        launch, _ = accepted(dry_run(words, **settings))
        assert bash == "bash" and launch.nnodes == "4" and launch.rdzv_endpoint == "bagel-master-0:23456"


def test_the_train_job_is_what_a_server_takes_and_runs_a_recipe_on_its_nodes(models: dict[str, str]) -> None:
    documents = list(yaml.safe_load_all((EXAMPLES / "kubernetes/trainjob.yaml").read_text()))
    runtime, job = documents
    for document in documents:
        assert document["apiVersion"] == "trainer.kubeflow.org/v1alpha1" and set(document) == {"apiVersion", "kind", "metadata", "spec"}
        assert not wrong_fields(document["spec"], SPECS[document["kind"]])
    assert job["spec"]["runtimeRef"] == {
        "apiGroup": "trainer.kubeflow.org", "kind": runtime["kind"], "name": runtime["metadata"]["name"],
    }  # fmt: skip
    (node,) = runtime["spec"]["template"]["spec"]["replicatedJobs"]
    assert node["template"]["metadata"]["labels"]["trainer.kubeflow.org/trainjob-ancestor-step"] == "trainer"
    pod = node["template"]["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
    trainer = job["spec"]["trainer"]
    assert trainer["resourcesPerNode"]["limits"]["nvidia.com/gpu"] == trainer["numProcPerNode"]
    variables = {entry["name"]: entry["value"] for entry in trainer["env"] if entry["name"] != "index_dir"}
    injected = {
        "PET_NNODES": str(trainer["numNodes"]), "PET_NPROC_PER_NODE": str(trainer["numProcPerNode"]), "PET_MASTER_ADDR": "bagel-node-0-0",
        "PET_MASTER_PORT": "29500",
    }  # fmt: skip
    bash, *words = trainer["command"]
    launch, _ = accepted(dry_run(words, **{**variables, **models, **injected}))
    assert bash == "bash" and (launch.nnodes, launch.nproc_per_node) == ("4", "8") and launch.rdzv_endpoint == "bagel-node-0-0:29500"


@pytest.mark.parametrize(
    ("field", "value", "problem"),
    [
        ("numNodes", "4", "spec.trainer.numNodes: '4' is no integer"),
        ("numNode", 4, "spec.trainer.numNode: unknown"),
        ("env", [{"value": "x"}], "spec.trainer.env[0].name: missing"),
    ],
)
def test_a_wrong_field_of_a_train_job_is_noticed(field: str, value: Any, problem: str) -> None:
    spec = {"runtimeRef": {"name": "bagel"}, "trainer": {field: value}}
    assert wrong_fields(spec, SPECS["TrainJob"]) == [problem]


def test_the_skypilot_file_runs_a_recipe_on_its_nodes(models: dict[str, str], tmp_path: Path) -> None:
    task = yaml.safe_load((EXAMPLES / "skypilot.yaml").read_text())
    # Fields of SkyPilot's YAML specification; what it does not know it refuses.
    assert set(task) == {"name", "resources", "num_nodes", "workdir", "envs", "file_mounts", "setup", "run"}
    assert set(task["resources"]) == {"accelerators", "disk_size", "network_tier"} and task["resources"]["accelerators"].endswith(":8")
    assert set(task["file_mounts"]["/data"]) == {"source", "mode"}
    assert "examples/setup_env.sh" in task["setup"] and ".[cuda]" in task["setup"]
    given = {
        "SKYPILOT_NUM_NODES": str(task["num_nodes"]), "SKYPILOT_NUM_GPUS_PER_NODE": "8", "SKYPILOT_NODE_IPS": "10.0.0.7\n10.0.0.8",
        "SKYPILOT_TASK_ID": "sky-4711",
    }  # fmt: skip
    # A recipe takes an index that exists; what this one names lies in the bucket.
    text = task["run"].replace("index_dir=/data/index ", "").replace("/data/dataset.yaml", models["dataset_config_file"])
    text = text.replace("TORCHRUN=.venv/bin/torchrun ", "")
    launch, _ = accepted(dry_run(["-c", text], **{**task["envs"], "MODEL": models["model_path"], **given}))
    assert (launch.nnodes, launch.rdzv_endpoint, launch.rdzv_id) == ("2", "10.0.0.7:29500", "sky-4711")


def test_the_container_copies_what_exists_and_installs_what_setup_offers() -> None:
    lines = (EXAMPLES / "container/Dockerfile").read_text().splitlines()
    copied = [word for line in lines if line.startswith("COPY ") for word in line.split()[1:-1]]
    assert copied and all((ROOT / word).exists() for word in copied)
    (extras,) = re.findall(r'"\.\[(.+)\]"', "\n".join(lines))
    assert all(f'"{extra}": [' in (ROOT / "setup.py").read_text() for extra in extras.split(","))


@pytest.mark.slow
@pytest.mark.distributed
def test_a_recipe_trains_on_cpu_with_tiny_paths(tmp_path: Path) -> None:
    """The fine-tuning recipe by the real torchrun, on two processes, from a folder that the converter made."""
    from megatron_bagel.cli.convert import megatron_to_hf
    from megatron_bagel.training.observability.metrics_file import read_history
    from tests.runs import make_world, run, run_config

    world = make_world(tmp_path)
    run(run_config(world, tmp_path / "first", max_latent_size=64, total_steps=1, tokenizer_path=str(world / "data/tokenizer")))
    words = ["--checkpoint", str(tmp_path / "first/checkpoints"), "--output", str(tmp_path / "model"), "--dtype", "fp32"]
    assert not megatron_to_hf.main(words)
    settings = {
        "model_path": tmp_path / "model", "dataset_config_file": world / "data/dataset.yaml", "output_path": tmp_path / "tuned",
        "nproc_per_node": 2, "TORCHRUN": program(tmp_path, "torchrun", f'#!/bin/sh\nexec {sys.executable} -m torch.distributed.run "$@"\n'),
        "OMP_NUM_THREADS": 1, "max_restarts": 0,
    }  # fmt: skip
    tiny = ["--expected_num_tokens", "256", "--max_num_tokens", "320", "--max_num_tokens_per_sample", "256", "--total_steps", "2",
            "--warmup_steps", "1", "--tensor_model_parallel_size", "2", "--vit_max_num_patch_per_side", "10"]  # fmt: skip
    script = ["bash", str(EXAMPLES / "finetune_bagel_7b.sh"), *tiny]
    done = subprocess.run(script, env=environment(**settings), capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert len(read_history(tmp_path / "tuned/metrics.jsonl")) == 2

"""The files in launch/, each of them started as far as a machine without a GPU can.

`accelerate launch` itself looks for no GPU: told how many processes to start, it starts those of the GPU files too. So
every file is really launched, all its machines side by side, with a probe in the program's place that writes down what
it was given. Only `num_processes: gpu` needs GPUs to count; torch's own function is asked about a pretended number.
slurm.sbatch is run by bash, with SLURM's programs replaced by small scripts.
"""

import contextlib
import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from accelerate.commands.config import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.parallelism_config import ParallelismConfig
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from accelerate.utils.launch import prepare_multi_gpu_env
from PIL import Image
from tiny_runs import arguments
from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy
from torch.distributed.run import determine_local_world_size, get_args_parser

from ssl_global import command_line

ROOT = Path(__file__).resolve().parents[1]
FILES = sorted((ROOT / "launch").iterdir())
CONFIGS = [file for file in FILES if file.suffix == ".yaml"]
BATCH = ROOT / "launch" / "slurm.sbatch"
LAUNCHERS_OWN = re.compile("ACCELERATE_|FSDP_|PARALLELISM_|PET_|TORCH|SLURM_|(LOCAL_|GROUP_)?(RANK|WORLD_SIZE)|MASTER_")

by_name = pytest.mark.parametrize("file", CONFIGS, ids=lambda file: file.name)

PROBE = """
import json, os, sys
from pathlib import Path
Path(sys.argv[1], f"{os.getpid()}.json").write_text(json.dumps(dict(os.environ)))
"""

RESTARTED = """
import os, signal, sys
from pathlib import Path
import torch
import torch.distributed as dist
from ssl_global.training.processes import meet
meet(on_gpu=False)
dist.all_reduce(torch.ones(1))
rank, restarts = dist.get_rank(), os.environ["TORCHELASTIC_RESTART_COUNT"]
if rank == 1 and restarts == "0":
    os.kill(os.getpid(), signal.SIGKILL)
dist.barrier()
Path(sys.argv[1], f"{rank}.ended").write_text(restarts)
dist.destroy_process_group()
"""


def surroundings(**more: str) -> dict[str, str]:
    """The environment without what a launcher of these very tests may have put there, and without GPUs."""
    kept = {name: value for name, value in os.environ.items() if not LAUNCHERS_OWN.match(name)}
    return kept | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)} | more


def launch(file: Path, *words: object) -> subprocess.Popen:
    """`accelerate launch --config_file FILE WORDS`."""
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", file, *words]
    return subprocess.Popen(
        [str(word) for word in command],
        env=surroundings(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


def finish(process: subprocess.Popen) -> tuple[int, str]:
    try:
        out, _ = process.communicate(timeout=120)
    except subprocess.TimeoutExpired:
        process.terminate()  # a launcher ends what it has started
        out, _ = process.communicate(timeout=60)
        pytest.fail(f"has not ended within two minutes:\n{out[-3000:]}")
    return process.returncode, out


def probe(file: Path, folder: Path, *words: str) -> list[dict[str, str]]:
    """Launch the file on all its machines at once; what each process found in its environment, by rank."""
    program, seen = folder / "probe.py", folder / "seen"
    program.write_text(PROBE)
    seen.mkdir()
    config = load_config_from_file(str(file))
    machines = config.num_machines
    if config.distributed_type != DistributedType.NO:
        words = (f"--num_processes={2 * machines}", *words)
    if machines > 1:
        words = ("--main_process_ip=127.0.0.1", f"--main_process_port={free_port()}", *words)
    ranks = [[f"--machine_rank={rank}"] if machines > 1 else [] for rank in range(machines)]
    for running in [launch(file, *rank, *words, program, seen) for rank in ranks]:
        code, out = finish(running)
        assert code == 0, out[-3000:]
    found = [json.loads(each.read_text()) for each in seen.iterdir()]
    return sorted(found, key=lambda environment: int(environment.get("RANK", 0)))


def free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return listening.getsockname()[1]


def as_launched(*words: str):
    """All that `accelerate launch` knows before it starts anything: the command line, over the file, over defaults."""
    return _validate_launch_command(launch_command_parser().parse_args(list(words)))[0]


def commands_shown(file: Path) -> list[tuple[dict[str, str], list[str]]]:
    """Each command that the file's first comment shows: the variables before it, and its words."""
    header = "".join(re.findall(r"^#     (.*\n)", file.read_text(), re.MULTILINE)).replace("\\\n", " ")
    found = []
    for words in map(shlex.split, header.splitlines()):
        variables = words[: next(i for i, word in enumerate(words) if "=" not in word)]
        found.append((dict(word.split("=", 1) for word in variables), words[len(variables) :]))
    return found


# ------------------------------------------------------------------------------------------------------- what they say


def test_all_files_of_the_folder_are_found_and_of_a_kind_that_is_tested():
    print(f"{len(FILES)} files in launch/: {', '.join(file.name for file in FILES)}")
    assert len(FILES) >= 6
    assert {file.suffix for file in FILES} == {".yaml", ".sbatch"}
    assert [file for file in FILES if file.suffix == ".sbatch"] == [BATCH]


@by_name
def test_every_setting_is_known_to_accelerate_and_none_is_lost_on_the_way(file):
    """accelerate refuses unknown settings, but passes over unknown ones inside of others, and over some known ones."""
    load_config_from_file(str(file))
    known, arrived = vars(as_launched("pretrain.py")), vars(as_launched("--config_file", str(file), "pretrain.py"))
    for name, value in yaml.safe_load(file.read_text()).items():
        if isinstance(value, dict):
            assert value.keys() <= known.keys()
            assert value == {inner: arrived[inner] for inner in value}
        elif name not in ("compute_environment", "distributed_type"):
            assert arrived[name] == value, name
    kind = load_config_from_file(str(file)).distributed_type
    assert arrived["use_fsdp"] == (kind == DistributedType.FSDP)
    assert arrived["multi_gpu"] == (kind == DistributedType.MULTI_GPU)


@by_name
def test_every_setting_has_a_comment(file):
    settings = [line for line in file.read_text().splitlines() if line and not line.startswith("#")]
    assert len(settings) >= 5
    for line in settings:
        assert re.fullmatch(r" *[a-z_0-9]+:( \S+)?  # .{20,}", line), line
        assert len(line) <= 120


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_the_commands_that_a_file_shows_are_right(file, monkeypatch):
    monkeypatch.chdir(ROOT)
    name, shown = f"launch/{file.name}", commands_shown(file)
    assert shown
    assert any(name in words for _, words in shown)
    for variables, words in shown:
        if words[:2] == ["accelerate", "launch"]:
            args = as_launched(*words[2:])
            assert args.config_file == name
            program = [args.training_script, *args.training_script_args]
        elif words[0] == "torchrun":
            args = get_args_parser().parse_args(words[1:])
            program = [args.training_script, *args.training_script_args]
        else:
            assert words[0] == "sbatch"
            given = [f"--{name.lower()}={value}" for name, value in variables.items()]
            program = ["pretrain.py", *given, *words[words.index(name) + 1 :]]
        assert program[0] == "pretrain.py"
        command, _ = command_line.parse(program[1:], command_line.Command)
        assert command.recipe == "dino:recipe"
        assert command.out.parts[-2] == "runs"


@by_name
def test_precision_is_left_to_the_recipe(file):
    assert load_config_from_file(str(file)).mixed_precision == "no"


@pytest.mark.parametrize("file", [f for f in CONFIGS if "num_processes: gpu" in f.read_text()], ids=lambda f: f.name)
def test_a_process_for_every_gpu_there_is(file, monkeypatch):
    args = as_launched("--config_file", str(file), "pretrain.py")
    prepare_multi_gpu_env(args)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 5)
    assert determine_local_world_size(args.nproc_per_node) == 5
    args = as_launched("--config_file", str(file), "--num_processes", "3", "pretrain.py")
    prepare_multi_gpu_env(args)
    assert determine_local_world_size(args.nproc_per_node) == 3


def test_copies_and_shares_make_up_all_processes():
    config = load_config_from_file(str(ROOT / "launch" / "hsdp.yaml"))
    sizes = config.parallelism_config
    copies, shares = (sizes[f"parallelism_config_dp_{name}_size"] for name in ("replicate", "shard"))
    assert copies * shares == config.num_processes
    assert copies == config.num_machines


# --------------------------------------------------------------------------------------------------------- what starts


@by_name
def test_the_file_starts_all_its_processes_and_they_get_what_it_says(file, tmp_path, monkeypatch):
    config, found = load_config_from_file(str(file)), probe(file, tmp_path)
    assert all(environment["ACCELERATE_MIXED_PRECISION"] == "no" for environment in found)
    if config.distributed_type == DistributedType.NO:
        assert len(found) == 1
        assert found[0]["ACCELERATE_USE_CPU"] == str(config.use_cpu)
        assert "WORLD_SIZE" not in found[0]
        return
    processes = 2 * config.num_machines
    assert [int(environment["RANK"]) for environment in found] == list(range(processes))
    assert {(environment["WORLD_SIZE"], environment["LOCAL_WORLD_SIZE"]) for environment in found} == {
        (str(processes), "2")
    }
    assert len({(environment["MASTER_ADDR"], environment["MASTER_PORT"]) for environment in found}) == 1

    sharded = config.distributed_type == DistributedType.FSDP
    for environment in found:
        assert environment.get("ACCELERATE_USE_FSDP", "false") == str(sharded).lower()
        assert ("ACCELERATE_USE_PARALLELISM_CONFIG" in environment) == bool(config.parallelism_config)
    if not sharded:
        return
    for name, value in found[-1].items():
        if name.startswith(("ACCELERATE_", "FSDP_", "PARALLELISM_CONFIG_")):
            monkeypatch.setenv(name, value)
    plugin = FullyShardedDataParallelPlugin()  # as Accelerator makes it
    assert plugin.fsdp_version == 2
    assert plugin.reshard_after_forward is True
    assert plugin.cpu_ram_efficient_loading is False
    assert plugin.activation_checkpointing is False
    assert plugin.auto_wrap_policy is transformer_auto_wrap_policy
    assert plugin.transformer_cls_names_to_wrap is None  # the program names them
    assert plugin.mixed_precision_policy is None  # and this comes from the recipe
    if config.parallelism_config:
        sizes = ParallelismConfig()
        assert sizes.dp_replicate_size == config.parallelism_config["parallelism_config_dp_replicate_size"]
        assert sizes.dp_shard_size == config.parallelism_config["parallelism_config_dp_shard_size"]
        assert sizes.total_size == config.num_processes


def test_a_run_on_the_cpu(tmp_path):
    rng = np.random.default_rng(0)
    (tmp_path / "images").mkdir()
    for number in range(24):
        noise = Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8))
        noise.save(tmp_path / "images" / f"{number:02d}.jpg")
    words = arguments("mae", tmp_path / "images", tmp_path / "run", "--train.steps=3")
    words.remove("--device=cpu")  # the file says it
    code, out = finish(launch(ROOT / "launch" / "cpu.yaml", ROOT / "pretrain.py", *words))
    assert code == 0, out[-3000:]
    assert "device cpu" in out
    assert load_config_from_file(str(ROOT / "launch" / "cpu.yaml")).use_cpu  # also where there is a GPU
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["steps"] == 3


def test_accelerate_starts_one_process_on_a_cpu_whatever_it_is_asked_for(tmp_path):
    """The day it starts two, cpu.yaml and the README can say something simpler."""
    (found,) = probe(ROOT / "launch" / "cpu.yaml", tmp_path, "--cpu", "--num_processes=2")
    assert "WORLD_SIZE" not in found


@pytest.mark.slow
def test_processes_go_on_by_themselves_after_one_was_killed(tmp_path):
    """With the command that ddp.yaml shows, at the first restart, where the dead ones' addresses are still to be found.

    The program is only as much of pretrain.py as must start anew: how its processes meet.
    """
    (tmp_path / "program.py").write_text(RESTARTED)
    file = ROOT / "launch" / "ddp.yaml"
    (words,) = [words for _, words in commands_shown(file) if "--max_restarts" in words]
    options = words[words.index("launch/ddp.yaml") + 1 : words.index("pretrain.py")]
    code, out = finish(launch(file, "--num_processes=2", *options, tmp_path / "program.py", tmp_path))
    assert code == 0, out[-3000:]
    assert {ended.name: ended.read_text() for ended in tmp_path.glob("*.ended")} == {"0.ended": "1", "1.ended": "1"}


# --------------------------------------------------------------------------------------------------------------- SLURM

SCONTROL = """#!/bin/bash
# "show hostnames" expands a list; all else is written down, and whether the step has ended by then.
if [[ $1 == show ]]; then
    [[ $3 == 'node[1-2]' ]] && printf '127.0.0.1\\nnode2\\n'
else
    printf '%s ' "$@" >> "$RECORDS/scontrol"
    [[ ! -e $RECORDS/running ]] || printf 'too early ' >> "$RECORDS/scontrol"
fi
"""
SRUN_PRETENDS = """#!/bin/bash
# Writes down what it should start. With WAITS=yes it runs until the signal comes, and saves for a while.
printf '%s\\0' "$@" > "$RECORDS/srun"
[[ $FINISHES == no ]] || { mkdir -p "$OUT" && touch "$OUT/summary.json"; }
trap 'touch "$RECORDS/signalled"; sleep 0.3; rm "$RECORDS/running"; exit "$CODE"' USR1
[[ $WAITS == no ]] || touch "$RECORDS/running"
touch "$RECORDS/started"
while [[ $WAITS == yes ]]; do sleep 0.02; done
exit "$CODE"
"""
SRUN_RUNS = """#!/bin/bash
# The command once for each node, side by side; hands SIGUSR1 on; ends with the highest code.
while [[ $1 == --* ]]; do shift; done
touch "$RECORDS/running"
for node in 0 1; do SLURM_NODEID=$node "$@" & tasks+=($!); done
trap 'signalled=yes; kill -USR1 "${tasks[@]}"' USR1
highest=0
for task in "${tasks[@]}"; do
    while true; do
        signalled='' code=0
        wait "$task" || code=$?
        [[ -n $signalled ]] || break
    done
    ((code <= highest)) || highest=$code
done
rm "$RECORDS/running"
exit "$highest"
"""
PROGRAM = """
import os, signal, sys, time
from pathlib import Path
out, rank = Path(sys.argv[sys.argv.index("--out") + 1]), os.environ["RANK"]
def save(number, frame):
    (out / f"saved-{rank}").write_text(signal.Signals(number).name)
    sys.exit(0)
signal.signal(signal.SIGUSR1, save)
if (out / f"saved-{rank}").exists():
    (out / "summary.json").touch()
    sys.exit(0)
(out / f"ready-{rank}").touch()
time.sleep(100)
"""


class Cluster:
    """A folder of programs that stand in for SLURM's, and what they wrote down."""

    def __init__(self, folder: Path, srun: str) -> None:
        self.folder, self.records, self.out = folder, folder / "records", folder / "runs" / "a run"
        self.batches: list[subprocess.Popen] = []
        programs = folder / "programs"
        for made in (programs, self.records):
            made.mkdir()
        # `accelerate launch` without the imports of accelerate's other commands, which take longer than the test
        accelerate = f'#!/bin/bash\nshift\nexec {shlex.quote(sys.executable)} -m accelerate.commands.launch "$@"\n'
        for name, text in {
            "srun": srun,
            "scontrol": SCONTROL,
            "sbatch": '#!/bin/bash\ntouch "$RECORDS/sbatch"\n',
            "accelerate": accelerate,
        }.items():
            (programs / name).write_text(text)
            (programs / name).chmod(0o755)
        self.environment = surroundings(
            PATH=f"{programs}:{os.environ['PATH']}", RECORDS=str(self.records),
            SLURM_JOB_ID="4711", SLURM_SUBMIT_DIR=str(folder), SLURM_NNODES="2", SLURM_JOB_NODELIST="node[1-2]",
            SLURM_GPUS_ON_NODE="8", SLURM_CPUS_PER_TASK="64",
            RECIPE="mae", DATA="shards of mine/{000..099}-*.tar", OUT=str(self.out),
        )  # fmt: skip

    def run(self, *words: str, **more: str) -> subprocess.Popen:
        batch = subprocess.Popen(
            ["bash", str(BATCH), *words],
            env=self.environment | more, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            start_new_session=True,
        )  # fmt: skip
        self.batches.append(batch)
        return batch

    def until(self, *files: Path) -> None:
        end = time.monotonic() + 120
        while not all(file.exists() for file in files):
            assert time.monotonic() < end, self.batches[-1].communicate(timeout=1)
            time.sleep(0.02)

    @property
    def requeued(self) -> str:
        file = self.records / "scontrol"
        return file.read_text().strip() if file.exists() else ""


@pytest.fixture
def cluster(tmp_path):
    """cluster(srun) makes one; whatever it started has ended after the test."""
    made = []

    def make(srun: str) -> Cluster:
        made.append(Cluster(tmp_path, srun))
        return made[-1]

    yield make
    for batch in (batch for each in made for batch in each.batches):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(batch.pid, signal.SIGTERM)
        batch.wait()


def test_the_batch_script_is_good_bash():
    subprocess.run(["bash", "-n", str(BATCH)], check=True)
    assert "\nset -euo pipefail\n" in BATCH.read_text()
    if shutil.which("shellcheck"):
        subprocess.run(["shellcheck", str(BATCH)], check=True)


def test_every_directive_of_the_batch_script_has_a_comment_and_those_that_it_relies_on_are_there():
    lines = BATCH.read_text().splitlines()
    directives = {line.split()[1]: lines[at - 1] for at, line in enumerate(lines) if line.startswith("#SBATCH")}
    assert all(re.match("# .{15,}", above) for above in directives.values()), directives
    assert {"--requeue", "--open-mode=append", "--ntasks-per-node=1"} <= directives.keys()
    first_command = next(at for at, line in enumerate(lines) if line and not line.startswith("#"))
    assert not any("#SBATCH" in line for line in lines[first_command:])  # SLURM would pass over it
    (notice,) = [re.fullmatch("--signal=B:USR1@([0-9]+)", word) for word in directives if "--signal" in word]
    (given,) = re.findall("^export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=([0-9]+)$", BATCH.read_text(), re.MULTILINE)
    assert int(notice[1]) >= int(given) + 30


def test_the_batch_script_starts_one_launcher_on_every_node(cluster):
    slurm = cluster(SRUN_PRETENDS)
    batch = slurm.run("--train.epochs", "3", WAITS="no", FINISHES="yes", CODE="0")
    code, out = finish(batch)
    assert code == 0, out
    words = (slurm.records / "srun").read_text().split("\0")[:-1]
    own = words[: words.index("bash")]
    assert {"--nodes=2", "--ntasks-per-node=1", "--cpus-per-task=64", "--kill-on-bad-exit=0"} <= set(own)
    task = words[len(own) :]
    assert task[:2] == ["bash", "-c"]
    said = subprocess.run(
        ["bash", "-c", task[2].replace("exec accelerate", "printf '%s\\0'"), *task[3:]],
        env=slurm.environment | {"SLURM_NODEID": "1"}, capture_output=True, text=True, check=True,
    ).stdout.split("\0")[:-1]  # fmt: skip
    assert said[0] == "launch"
    args = launch_command_parser().parse_args(said[1:])
    assert args.config_file == "launch/multi_node.yaml"
    assert (args.num_machines, args.machine_rank, args.num_processes) == (2, 1, 16)
    assert (args.main_process_ip, args.main_process_port) == ("127.0.0.1", 15000 + 4711)
    assert (args.parallelism_config_dp_replicate_size, args.parallelism_config_dp_shard_size) == (2, 8)
    program = [args.training_script, *args.training_script_args]
    assert program == [
        "pretrain.py", "--recipe", "mae", "--data", "shards of mine/{000..099}-*.tar", "--out", str(slurm.out),
        "--train.epochs", "3",
    ]  # fmt: skip


@by_name
def test_any_of_the_gpu_files_can_be_what_the_batch_script_starts(file):
    """Its options reach all of them; the two sizes count only where the file has sizes."""
    config = load_config_from_file(str(file))
    if config.use_cpu:
        return
    sizes = ["--parallelism_config_dp_replicate_size=4", "--parallelism_config_dp_shard_size=2"]
    where = ["--main_process_ip=127.0.0.1", f"--main_process_port={free_port()}", "--machine_rank=3"]
    args = as_launched(
        "--config_file", str(file), "--num_machines=4", "--num_processes=8", *where, *sizes, "pretrain.py"
    )
    environment = prepare_multi_gpu_env(args)
    assert (args.nnodes, args.nproc_per_node, args.node_rank) == ("4", "2", 3)
    sizes_given = [environment.get(f"PARALLELISM_CONFIG_DP_{name}_SIZE") for name in ("REPLICATE", "SHARD")]
    assert sizes_given == (["4", "2"] if config.parallelism_config else [None, None])


@pytest.mark.parametrize(
    ("signalled", "finishes", "turn", "code", "then"),
    [
        (True, False, 0, 1, "requeue"),
        (True, False, 0, 0, "requeue"),
        (True, False, 99, 1, "requeue"),
        (True, False, 100, 1, 1),  # often enough
        (True, True, 3, 1, 0),  # the signal came when all was done
        (False, True, 0, 0, 0),
        (False, False, 0, 2, 2),  # a mistake in the command
        (False, False, 0, 1, 1),  # the same behind accelerate, or a crash
    ],
)
def test_the_job_is_requeued_after_a_signal_unless_it_is_finished(cluster, signalled, finishes, turn, code, then):
    slurm = cluster(SRUN_PRETENDS)
    yes_no = {True: "yes", False: "no"}
    batch = slurm.run(SLURM_RESTART_COUNT=str(turn), WAITS=yes_no[signalled], FINISHES=yes_no[finishes], CODE=str(code))
    slurm.until(slurm.records / "started")
    if signalled:
        batch.send_signal(signal.SIGUSR1)
    ended, out = finish(batch)
    assert (slurm.records / "signalled").exists() == signalled
    assert slurm.requeued == ("requeue 4711" if then == "requeue" else "")
    assert ended == (0 if then == "requeue" else then), out
    assert not (slurm.records / "sbatch").exists()


@pytest.mark.parametrize("words", [["--fresh"], ["--out", "elsewhere"], ["--out=elsewhere"]])
def test_options_that_a_requeued_job_cannot_have_are_refused(cluster, words):
    slurm = cluster(SRUN_PRETENDS)
    code, out = finish(slurm.run("--train.epochs", "3", *words))
    assert code == 2
    assert out.count("\n") == 1
    assert words[0].partition("=")[0] in out
    assert not (slurm.records / "srun").exists()


def test_a_batch_script_without_data_or_without_slurm_says_so(cluster):
    slurm = cluster(SRUN_PRETENDS)
    for missing, words in (("DATA", "a folder or shards"), ("SLURM_JOB_ID", "sbatch")):
        code, out = finish(slurm.run(**{missing: ""}))
        assert code != 0
        assert missing in out
        assert words in out


def test_the_signal_reaches_the_program_on_all_nodes_and_the_requeued_job_goes_on(cluster):
    """Two real launchers, as on two nodes, with a small program in pretrain.py's place."""
    slurm = cluster(SRUN_RUNS)
    (slurm.folder / "pretrain.py").write_text(PROGRAM)
    slurm.out.mkdir(parents=True)
    settings = {"SLURM_GPUS_ON_NODE": "1", "CONFIG": str(ROOT / "launch" / "multi_node.yaml")}
    batch = slurm.run(**settings, MAIN_PORT=str(free_port()))
    slurm.until(slurm.out / "ready-0", slurm.out / "ready-1")
    batch.send_signal(signal.SIGUSR1)
    code, out = finish(batch)
    assert code == 0, out[-3000:]
    assert {file.name: file.read_text() for file in slurm.out.glob("saved-*")} == {
        "saved-0": "SIGUSR1",
        "saved-1": "SIGUSR1",
    }
    assert slurm.requeued == "requeue 4711"
    code, out = finish(slurm.run(**settings, MAIN_PORT=str(free_port()), SLURM_RESTART_COUNT="1"))
    assert code == 0, out[-3000:]
    assert "turn 2" in out
    assert (slurm.out / "summary.json").exists()
    assert slurm.requeued == "requeue 4711"  # once

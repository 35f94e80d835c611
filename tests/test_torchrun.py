"""Runs shared by several processes: the same files, and one clear error on each when one fails."""

import os
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from lora_init.integrations.checkpoint import initialize_checkpoint
from tests.streaming import (
    ARGUMENTS,
    OPTIONS,
    Files,
    Mishap,
    files,
    leftovers,
    save_model,
    worker_command,
)

TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("models") / "llama")


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "place" / "out"


@pytest.fixture
def expected(model: Path, out: Path) -> Files:
    """What one process writes to `out`, which is free again."""
    initialize_checkpoint(model, out, **OPTIONS)
    found = files(out)
    shutil.rmtree(out)
    return found


def run_ranks(commands: Sequence[Sequence[str]]) -> list[Any]:
    """A process per rank, without torchrun to end the others when one dies."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    job = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": len(commands)}
    job["TORCHELASTIC_RUN_ID"] = "test"
    processes = []
    for rank, command in enumerate(commands):
        own = job | {"RANK": rank, "LOCAL_RANK": rank, "OMP_NUM_THREADS": 1}
        processes.append(
            subprocess.Popen(
                [sys.executable, *command],
                env=os.environ | {name: str(value) for name, value in own.items()},
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    results = []
    for process in processes:
        stdout, stderr = process.communicate(timeout=120)
        ours = [line for line in stderr.splitlines() if line.startswith("lora-init:")]
        results.append((process.returncode, stdout, ours))
    return results


def test_torchrun_gives_the_files_of_one_process(model, out, expected):
    command = [*TORCHRUN, "2", "-m", "lora_init", "run", model, "--out", out, *ARGUMENTS]
    process = subprocess.run(
        list(map(str, command)), capture_output=True, text=True, timeout=120, check=False
    )
    assert process.returncode == 0, process.stderr
    assert files(out) == expected
    assert process.stdout.count("pissa: 8 layers (8 solved") == 1
    assert not leftovers(out)


def test_three_processes_give_the_files_of_one(model, out, expected, tmp_path):
    command = worker_command(model, out, tmp_path / "plan", [], ("--group-bytes", "1"))
    results = run_ranks([command] * 3)
    assert [status for status, *_ in results] == [0, 0, 0]
    assert files(out) == expected
    assert [bool(stdout) for _, stdout, _ in results] == [True, False, False]


@pytest.mark.parametrize("dying", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_rank_that_dies_ends_the_job_which_one_process_resumes(
    dying, model, out, expected, tmp_path
):
    mishaps: list[Mishap] = [(dying, "layer", 2, "kill")]
    command = worker_command(model, out, tmp_path / "plan", mishaps, ("--group-bytes", "1"))
    began = time.monotonic()
    results = run_ranks([command] * 2)
    assert time.monotonic() - began < 60
    status, _, messages = results[1 - dying]
    assert results[dying][0] == -9
    assert status == 2
    (message,) = messages
    assert "another process of this job is gone" in message
    assert "finished layers are kept in" in message
    assert len(leftovers(out)) == 1
    initialize_checkpoint(model, out, **OPTIONS, resume=True)
    assert files(out) == expected


def test_rank_that_fails_is_heard_of_by_all_at_once_and_resumed_by_three(
    model, out, expected, tmp_path
):
    mishaps: list[Mishap] = [(1, "layer", 1, "full"), (0, "layer", 1, "wait")]
    command = worker_command(model, out, tmp_path / "plan", mishaps, ("--group-bytes", "1"))
    (first, _, (one,)), (second, _, (other,)) = run_ranks([command] * 2)
    assert first == second == 2
    assert one.startswith("lora-init: rank 1: could not write")
    assert other.startswith("lora-init: could not write")
    for message in (one, other):
        assert "No space left on device" in message
        finished = re.search(r"(\d) finished layers are kept in", message)
        assert finished is not None
        assert int(finished[1]) < 4  # as many as rank 0 had to solve
    assert [
        s
        for s, *_ in run_ranks(
            [[*worker_command(model, out, tmp_path / "plan", [], ("--resume",))]] * 3
        )
    ] == [0, 0, 0]
    assert files(out) == expected


@pytest.mark.slow
def test_ranks_with_other_arguments_are_refused(model, out, tmp_path):
    one = worker_command(model, out, tmp_path / "plan", [], ())
    other = worker_command(model, out, tmp_path / "plan", [], ("--seed", "7"))
    for status, stdout, messages in run_ranks([one, other]):
        assert (status, stdout) == (2, "")
        (message,) = messages
        assert "seed is 0 on rank 0 and 7 on rank 1" in message
    assert not leftovers(out)

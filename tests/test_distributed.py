"""The place that a launcher gave to a process, and what an earlier one left behind."""

from __future__ import annotations

import pytest
from small_data import refusal, write_jpegs

from sra_fast import distributed
from sra_fast.distributed import Place, first_host, place

ADDRESS = ("MASTER_ADDR", "MASTER_PORT", "SLURM_JOB_NODELIST", "SLURM_JOB_ID")
NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID")


@pytest.fixture
def environment(monkeypatch):
    def put(**values: str) -> None:
        for name in (*NAMES, *ADDRESS):
            monkeypatch.delenv(name, raising=False)
        for name, value in values.items():
            monkeypatch.setenv(name, value)

    put()
    return put


def test_torchrun_precedes_slurm_and_alone_a_process_is_the_only_one(environment):
    assert place() == (0, 1, 0)
    environment(SLURM_PROCID="5", SLURM_STEP_NUM_TASKS="8", SLURM_LOCALID="1")
    assert place() == (5, 8, 1)
    environment(SLURM_PROCID="0", SLURM_STEP_NUM_TASKS="1", RANK="3", WORLD_SIZE="4", LOCAL_RANK="3")
    assert place() == (3, 4, 3)


@pytest.mark.parametrize(
    ("values", "line"),
    [
        ({"RANK": "1"}, "RANK: '1' given; but there is no WORLD_SIZE; without a launcher, unset RANK"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, "RANK: '2' given; but WORLD_SIZE = 2"),
        ({"RANK": "-1", "WORLD_SIZE": "2"}, "RANK: '-1' given; must be a number"),
        ({"RANK": "1" * 5000, "WORLD_SIZE": "2"}, "must be a number"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE: '0' given; must be a number, 1 or more"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE: 'two' given"),
        ({"LOCAL_RANK": "x"}, "LOCAL_RANK: 'x' given"),
    ],
)
def test_a_place_that_cannot_be_is_refused(environment, values, line):
    environment(**values)
    assert line in refusal(place)


def test_a_rank_that_a_launcher_left_behind_hides_no_damage(environment, main, refused, tmp_path):
    """Only rank 0 repairs a set; this one is none."""
    words = ["prepare", "--images", write_jpegs(tmp_path / "images", count=6), "--no-vae", "--resolution", "16"]
    words += ["--out", tmp_path / "set", "--reader", "pillow"]
    assert main(words)[0] == 0
    (tmp_path / "set/moments-00000.npy").write_bytes(b"")
    environment(RANK="1")
    assert "unset RANK" in refused(words)
    environment()
    assert "made again" in main(words)[2]


@pytest.mark.parametrize(
    ("hosts", "first"),
    [
        ("node03", "node03"),
        ("a1,a2", "a1"),
        ("node[03-07,12],login1", "node03"),
        ("n[1,3]-ib", "n1-ib"),
        ("g-x,", "g-x"),
    ],
)
def test_the_first_host_of_slurms_list(hosts, first):
    assert first_host(hosts) == first


def test_under_srun_the_address_is_found_and_is_the_jobs_own(environment, monkeypatch):
    environment(SLURM_JOB_NODELIST="node[03-07]", SLURM_JOB_ID="123456")
    monkeypatch.setattr(distributed.os, "environ", dict(distributed.os.environ))
    distributed._set_address(Place(1, 4, 1))
    address = distributed.os.environ["MASTER_ADDR"], int(distributed.os.environ["MASTER_PORT"])
    assert address[0] == "node03"
    assert 20_000 <= address[1] < 40_000
    distributed.os.environ["MASTER_ADDR"] = "10.0.0.1"  # torchrun's are kept
    distributed._set_address(Place(1, 4, 1))
    assert distributed.os.environ["MASTER_ADDR"] == "10.0.0.1"


def test_a_batch_script_without_srun_is_one_process(environment):
    environment(SLURM_PROCID="0", SLURM_LOCALID="0", SLURM_NTASKS="8")
    assert place() == (0, 1, 0)

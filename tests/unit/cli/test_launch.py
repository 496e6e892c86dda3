import pytest

from omnilit.cli.launch import plan_launch

TORCHRUN = {
    "TORCHELASTIC_RUN_ID": "none",
    "LOCAL_WORLD_SIZE": "4",
    "WORLD_SIZE": "8",
    "RANK": "5",
    "LOCAL_RANK": "1",
}


def test_without_a_launcher_devices_and_nodes_are_as_given():
    launch, problems = plan_launch({"accelerator": "cpu", "devices": 2, "num_nodes": 3}, {})
    assert not problems
    assert (launch.world_size, launch.num_devices, launch.launcher) == (6, 2, "")


def test_on_cpu_auto_is_one_process():
    launch, problems = plan_launch({"accelerator": "cpu"}, {})
    assert not problems
    assert launch.world_size == 1


def test_under_torchrun_devices_and_nodes_come_from_it():
    launch, problems = plan_launch({"accelerator": "cpu"}, TORCHRUN)
    assert not problems
    assert (launch.num_devices, launch.num_nodes, launch.rank) == (4, 2, 5)


def test_under_slurm_devices_and_nodes_come_from_it():
    environment = {"SLURM_NTASKS": "8", "SLURM_PROCID": "3", "SLURM_NNODES": "4"}
    launch, _ = plan_launch({"accelerator": "cpu"}, environment)
    assert (launch.num_devices, launch.num_nodes, launch.rank) == (2, 4, 3)


def test_another_number_of_devices_than_the_launcher_started_is_a_problem():
    _, (problem,) = plan_launch({"accelerator": "cpu", "devices": 2}, TORCHRUN)
    assert str(problem) == (
        "trainer.devices: 2 was given, but torchrun started 4. "
        "To fix: leave it out under a launcher."
    )


@pytest.mark.parametrize(
    ("given", "key", "message"),
    [
        ({"accelerator": "gpu"}, "trainer.accelerator", "has no CUDA device"),
        ({"accelerator": "npu"}, "trainer.accelerator", "torch-npu finds no device"),
        ({"accelerator": "tpu"}, "trainer.accelerator", "'tpu' is not supported"),
        ({"accelerator": "cpu", "devices": 0}, "trainer.devices", "0 is not a number"),
        ({"accelerator": "cpu", "devices": "two"}, "trainer.devices", "'two' is not a number"),
        ({"accelerator": "cpu", "num_nodes": True}, "trainer.num_nodes", "True is not a number"),
    ],
)
def test_what_this_machine_cannot_start_is_a_problem(given, key, message):
    _, (problem,) = plan_launch(given, {})
    assert problem.key == key
    assert message in problem.problem

import pytest
import torch

from omnilit.parallel.determinism import (
    ENVIRONMENT,
    HASH_SEED,
    has_fixed_hashes,
    make_deterministic,
    restore,
)


def torch_settings():
    return (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        torch.backends.cudnn.deterministic,
        torch.backends.cudnn.benchmark,
    )


@pytest.mark.parametrize("warned_before", [False, True])
def test_everything_is_put_back(warned_before):
    if warned_before:
        torch.use_deterministic_algorithms(True, warn_only=True)
    found, environment = torch_settings(), {"PATH": "/bin", "NCCL_ALGO": "Tree"}
    before = make_deterministic(environment)
    assert torch_settings() == (True, False, True, False)
    assert environment == {**ENVIRONMENT, "PATH": "/bin", "NCCL_ALGO": "Tree"}  # the user's stays
    restore(before, environment)
    assert environment == {"PATH": "/bin", "NCCL_ALGO": "Tree"}
    assert torch_settings() == found
    torch.use_deterministic_algorithms(False)


def test_what_has_no_deterministic_form_is_an_error_until_then():
    def scatter() -> torch.Tensor:
        return torch.zeros(2).put_(torch.tensor([0, 0]), torch.tensor([1.0, 2.0]))

    before = make_deterministic({})
    try:
        with pytest.raises(RuntimeError, match="does not have a deterministic implementation"):
            scatter()
    finally:
        restore(before, {})
    assert scatter()[0] > 0


@pytest.mark.parametrize(
    ("environment", "is_fixed"),
    [
        ({}, False),
        ({HASH_SEED: "random"}, False),
        ({HASH_SEED: "0"}, True),
        ({HASH_SEED: "42"}, True),
    ],
)
def test_hashes_are_fixed_by_a_number(environment, is_fixed):
    assert has_fixed_hashes(environment) is is_fixed

"""torchvision beside a torch that it was not compiled for."""

import subprocess
import sys
from pathlib import Path

import pytest
import transformers

FAILS = "raise RuntimeError({error!r})\n"
REGISTERS = """
import torch
from torchvision import transforms

@torch.library.register_fake("torchvision::nms")
def nms(boxes): return boxes

raised = []
try:
    @torch.library.register_fake("{other}")
    def other(x): return x
except RuntimeError as error:
    raised.append(str(error))
"""


def run(tmp_path: Path, body: str, code: str) -> subprocess.CompletedProcess[str]:
    """Run code where torchvision is a package of this body."""
    package = tmp_path / "torchvision"
    package.mkdir()
    (package / "__init__.py").write_text(body)
    (package / "transforms.py").write_text("LOADED = True\n")
    start = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import logging\n"
    start += "logging.basicConfig(level=logging.INFO, format='%(message)s', stream=sys.stdout)\n"
    command = [sys.executable, "-W", "error", "-c", start + code]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_missing_operators_do_not_keep_torchvision_from_being_imported(tmp_path):
    code = """
import omnilit, torch
before = torch.library.register_fake
import torchvision
from torchvision.transforms import LOADED
assert torch.library.register_fake is before
print(LOADED, *torchvision.raised)
"""
    done = run(tmp_path, REGISTERS.format(other="nowhere::nothing"), code)
    log, said = done.stdout.splitlines()
    assert log.startswith("torchvision: it is compiled for another build of torch")
    assert said == "True operator nowhere::nothing does not exist"  # others are still told


def test_any_other_error_of_torchvision_is_raised_as_it_is(tmp_path):
    done = run(tmp_path, FAILS.format(error="out of luck"), "import omnilit, torchvision")
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == "RuntimeError: out of luck"


def test_a_torchvision_that_imports_is_left_alone(tmp_path):
    done = run(tmp_path, "print('whole')\n", "import omnilit, torchvision")
    assert done.stdout == "whole\n"


def test_without_torchvision_nothing_is_found():
    from omnilit.torchvision_import import TorchvisionFinder, install_finder

    finder = install_finder()
    assert install_finder() is finder
    assert finder.find_spec("torch", None) is None
    assert TorchvisionFinder().find_spec("torchvision", ["/nowhere"]) is None


@pytest.mark.parametrize("family", ["Qwen3VL", "Qwen2_5_VL", "Qwen2_5Omni"])
def test_processors_of_videos_can_be_imported_here(family):
    assert isinstance(getattr(transformers, f"{family}Processor"), type)

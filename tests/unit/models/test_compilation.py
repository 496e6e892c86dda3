from __future__ import annotations

import copy
import logging
from types import MappingProxyType

import pytest
import torch
from torch._dynamo.utils import counters

from omnilit.config import OpsImplementationConfig
from omnilit.errors import ConfigError, TrainingError
from omnilit.kernels.machine import Machine
from omnilit.kernels.resolve import resolve_kernels
from omnilit.models.attention import BOUNDARY
from omnilit.models.bind import bind_kernels
from omnilit.models.blocks import decoder_blocks
from omnilit.models.calls import CallCounter
from omnilit.models.compilation import (
    Compilation,
    compile_blocks,
    lacks_compiler,
)
from omnilit.optim.groups import parameter_groups
from tests.helpers.models import packed_batch, tiny

CPU = Machine("cpu")
CUDA = Machine("cuda", sm=90, packages=MappingProxyType({}))


def test_names_of_modules_classes_and_weights_stay():
    plain, compiled = tiny("qwen3"), tiny("qwen3")
    compilation = compile_blocks(decoder_blocks(compiled), CPU)
    assert compilation.num_blocks == 2
    assert list(compiled.state_dict()) == list(plain.state_dict())
    for mine, other in zip(compiled.modules(), plain.modules(), strict=True):
        assert type(mine).__name__ == type(other).__name__
    assert decoder_blocks(compiled) == list(compiled.model.layers)
    blocks = {"no_decay_modules": ["Qwen3RMSNorm"], "lr": 1.0, "weight_decay": 0.1}
    assert len(parameter_groups(compiled, **blocks)) == 2
    assert type(plain.model.layers[0]) is not type(compiled.model.layers[0])  # its own stays


def test_blocks_of_one_class_share_their_compiled_class():
    model = tiny("deepseek_v3")  # dense and mixture layers are of one class
    compile_blocks(decoder_blocks(model), CPU)
    assert type(model.model.layers[0]) is type(model.model.layers[1])


def test_a_deepcopy_computes_with_its_own_weights():
    model = tiny("qwen3_moe")
    compile_blocks(decoder_blocks(model), CPU)
    copied = copy.deepcopy(model)
    ids = packed_batch([9]).input_ids
    with torch.compiler.set_stance("force_eager"), torch.no_grad():
        before = model(input_ids=ids, use_cache=False).logits
        for parameter in model.parameters():
            parameter.zero_()
        assert torch.equal(copied(input_ids=ids, use_cache=False).logits, before)


def test_recomputation_still_runs_every_block_twice():
    model, batch = tiny("qwen3"), packed_batch([9, 5])
    kernels = resolve_kernels(OpsImplementationConfig(), given=frozenset(), machine=CPU)
    binding = bind_kernels(model, kernels)
    model.activation_checkpointing_enable()
    compile_blocks(decoder_blocks(model), CPU)
    with torch.compiler.set_stance("force_eager"):
        losses = binding.head.forward(model, batch).token_losses
        assert binding._counter.of("attn_implementation") == 2
        losses.sum().backward()
    assert binding._counter.of("attn_implementation") == 4


def test_places_left_to_python_are_named(caplog, monkeypatch):
    logger = logging.getLogger("omnilit")
    monkeypatch.setattr(logger, "propagate", True)
    found = Compilation(2)
    known, unknown = f"Skip\n {BOUNDARY}", "Dynamic shape operator\n  Explanation: nonzero\n  Hint"
    monkeypatch.setitem(counters["stats"], "unique_graphs", found._before[0] + 5)
    monkeypatch.setitem(counters["graph_break"], known, 4)
    monkeypatch.setitem(counters["graph_break"], unknown, 3)
    with caplog.at_level("INFO", logger="omnilit"):
        found.report()
        found.report()  # once
    assert [record.getMessage() for record in caplog.records] == [
        "compile: 2 blocks run as 5 graphs; 4 breaks at attention or experts, by design; 3 others",
        "compile: 3 breaks: Dynamic shape operator Explanation: nonzero",
    ]


def test_a_model_without_blocks_is_refused():
    with pytest.raises(ConfigError, match=r"train\.enable_compile: the model has no repeated"):
        compile_blocks(decoder_blocks(torch.nn.Linear(2, 2)), CPU)


def test_a_step_in_which_nothing_was_compiled_is_an_error_and_not_a_slow_run():
    with pytest.raises(TrainingError, match="took no part of any block"):
        Compilation(2).report()


@pytest.mark.parametrize(
    ("machine", "environment", "reason"),
    [
        (Machine("npu"), {}, "there is no compiler for NPUs"),
        (CUDA, {}, "triton is not installed"),
        (
            Machine("cpu"),
            {"CXX": "no-such-g++ -m64"},
            "there is no C++ compiler (no-such-g++ -m64)",
        ),
    ],
)
def test_what_a_machine_lacks_to_compile_is_said(machine, environment, reason):
    assert lacks_compiler(machine, environment) == reason


def test_a_compiler_is_looked_for_where_torch_will(tmp_path, monkeypatch):
    compiler = tmp_path / "my-g++"
    compiler.write_text("#!/bin/sh\n")
    compiler.chmod(0o755)
    with_triton = Machine("cuda", sm=90, packages=MappingProxyType({"triton": "3.9"}))
    (tmp_path / "Python.h").write_text("")
    monkeypatch.setattr("sysconfig.get_path", lambda _: str(tmp_path))
    for machine in (Machine("cpu"), with_triton):
        assert lacks_compiler(machine, {"CXX": str(compiler)}) == ""
    (tmp_path / "Python.h").unlink()
    assert "Python's headers are not installed" in lacks_compiler(
        Machine("cpu"), {"CXX": str(compiler)}
    )


def test_a_machine_without_a_compiler_is_refused():
    with pytest.raises(ConfigError) as error:
        compile_blocks(decoder_blocks(tiny("qwen3")), CUDA)
    assert str(error.value) == (
        "train.enable_compile: triton is not installed. To fix: install it, or set "
        "train.enable_compile: false."
    )


def test_a_call_in_compiled_code_is_counted_without_compiling_anew():
    counter, graphs = CallCounter(), []
    count = counter.adder("mine")

    def run(x: torch.Tensor) -> torch.Tensor:
        count()
        return x + 1

    def keep(graph: torch.fx.GraphModule, _: object) -> object:
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(run, backend=keep)
    for _ in range(3):
        assert torch.equal(compiled(torch.ones(2)), torch.full((2,), 2.0))
    assert (counter.of("mine"), len(graphs)) == (1, 1)
    run(torch.ones(2))
    assert counter.of("mine") == 2
    counter.stop()
    run(torch.ones(2))
    assert counter.of("mine") == 2

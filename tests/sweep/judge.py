"""One architecture trained by omnilit and by transformers alone, and what differs."""

from __future__ import annotations

import copy
import gc
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
import torch.distributed as dist
import transformers
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils.logging import disable_progress_bar

from omnilit.checkpoint.hf import export
from omnilit.config import (
    AcceleratorConfig,
    FSDPConfig,
    GradientCheckpointingConfig,
    MixedPrecisionConfig,
    OpsImplementationConfig,
    TrainingArguments,
)
from omnilit.errors import ConfigError
from omnilit.kernels.machine import Machine
from omnilit.models.sequence import layout_of
from omnilit.modules.assembly import AssembledModel, ModelRequest, assemble
from omnilit.parallel.collectives import gather_objects, sum_over
from omnilit.parallel.mesh import ParallelSizes, Topology
from omnilit.parallel.sequence import split_sequence
from omnilit.types import IGNORE, MicroBatch, StepWindow
from tests.helpers.models import packed_batch, reference_loss
from tests.sweep.tiny import class_of, tiny_config, tiny_model

TOLERANCE: Final = 1e-4
NOISE: Final = 1e-3  # of the largest gradient: what is smaller is held against this
ROWS: Final = ((5, 1, 13, 9), (17, 2, 9))
CPU: Final = torch.device("cpu")
PACKED, SHARDED, EXPORT = "packed", "FSDP2", "export"
LAYOUTS: Final[dict[str, dict[str, Any]]] = {
    SHARDED: {},
    "EP": {"ep_size": 2},
    "TP": {"tp_size": 2},
    "Ulysses": {"ulysses_size": 2},
    "PP": {"pp_size": 2},
}
YES: Final = ""
DIFFERS: Final = "differs: "  # what follows is no refusal, but a mistake of ours
_REFERENCE: Final = "reference.pt"


@dataclass(frozen=True, slots=True)
class Trained:
    """What a backward pass of both rows came to.

    Args:
        loss: Mean over the supervised tokens.
        gradients: Whole, by the parameter's name; those that are not trained may be missing.
    """

    loss: float
    gradients: dict[str, Tensor]


def rows() -> list[MicroBatch]:
    """Two micro-batches of one length, with segments of very different lengths."""
    return [packed_batch(lengths, seed=n, vocab=100) for n, lengths in enumerate(ROWS)]


def num_targets() -> int:
    """Supervised tokens of both rows."""
    return sum(int((row.labels != IGNORE).sum()) for row in rows())


def judge_alone(model_type: str, folder: Path) -> dict[str, str]:
    """Build the architecture, and train it packed in one process; leaves its files in `folder`.

    Returns:
        By column why not, and `YES` where it does; only the first where that is a refusal.
    """
    disable_progress_bar()
    try:
        config = tiny_config(model_type)
        plain = tiny_model(config)
    except Exception as error:  # the library's own code; it says what it lacks
        return {PACKED: f"transformers does not build it by default ({_in_short(error)})"}
    plain.save_pretrained(folder)
    try:
        found, _ = train(folder, config, {})
    except ConfigError as error:
        return {PACKED: _reason(error, config)}
    expected = train_alone(plain)
    torch.save((expected.loss, expected.gradients), folder / _REFERENCE)
    return {PACKED: difference(found, expected)}


def judge_split(
    model_type: str, folder: Path, layouts: Sequence[str] = tuple(LAYOUTS)
) -> dict[str, str]:
    """Train the model that `judge_alone` left on these ranks, in each layout; all of them call.

    Args:
        model_type: Of the model.
        folder: Where its files are.
        layouts: Names of `LAYOUTS`.

    Returns:
        By column why not, and `YES` where it does; with FSDP2 comes the export.
    """
    disable_progress_bar()
    config = tiny_config(model_type)
    expected = Trained(*torch.load(folder / _REFERENCE, weights_only=True))
    judged: dict[str, str] = {}
    for name in layouts:
        try:
            found, assembled = train(folder, config, LAYOUTS[name])
        except ConfigError as error:
            judged[name] = _reason(error, config)
            continue
        judged[name] = difference(found, expected)
        if name == SHARDED:
            judged[EXPORT] = check_export(assembled, config, folder)
        del found, assembled
        gc.collect()
    return judged


def train_alone(model: PreTrainedModel) -> Trained:
    """By transformers alone, a sequence at a time, with eager attention, in float64."""
    model = copy.deepcopy(model).double()
    model.set_experts_implementation("eager")
    losses = [reference_loss(model, row) * row.counts["tokens"] for row in rows()]
    loss = torch.stack(losses).sum() / num_targets()
    loss.backward()
    return Trained(loss.item(), _gradients(model))


def train(
    folder: Path, config: PreTrainedConfig, sizes: dict[str, Any]
) -> tuple[Trained, AssembledModel]:
    """As a run trains the model in `folder`, on as many ranks as there are; all of them call.

    Raises:
        ConfigError: It is refused, before the first step or in it.
    """
    fsdp = FSDPConfig(mixed_precision=MixedPrecisionConfig(enable=False))
    accelerator = AcceleratorConfig(**sizes, fsdp_config=fsdp)
    again = GradientCheckpointingConfig(enable=_class_of(config).supports_gradient_checkpointing)
    topology = Topology.build(ParallelSizes.of(accelerator).resolve(dist.get_world_size()), CPU)
    request = ModelRequest(
        config=config,
        weights_path=str(folder),
        strict=True,
        trust_remote_code=False,
        ops=OpsImplementationConfig(),
        given=frozenset(),
        train=TrainingArguments(gradient_checkpointing=again),
        accelerator=accelerator,
        is_resume=False,
    )
    assembled = assemble(request, topology=topology, machine=Machine("cpu"))
    for part in assembled.parts:
        part.train()
    loss = _backward(assembled, topology)
    assembled.verify_step()
    world = dist.group.WORLD
    assert world is not None
    gradients = _gradients(assembled.model)
    if assembled.stages is not None:
        others = gather_objects(gradients, assembled.stages)
        gradients = {name: grad for other in others for name, grad in other.items()}
    return Trained(sum_over({"loss": loss}, world)["loss"], gradients), assembled


def _backward(assembled: AssembledModel, topology: Topology) -> float:
    """This rank's share of the loss, whose gradients are left where they belong."""
    own, count = rows()[topology.data_rank :: topology.data_size], num_targets()

    def loss_of(row: MicroBatch) -> Tensor:
        return assembled.forward(row).token_losses.sum() / count

    if assembled.pipeline is not None:
        total = assembled.pipeline.train(StepWindow(tuple(own)), loss_of).item()
        return total if assembled.pipeline.has_last else 0.0
    total = 0.0
    for row in own:
        part = split_sequence(row, layout_of(topology), topology.sequence_rank)
        loss = loss_of(part)
        loss.backward()
        total += loss.item()
    return total / topology.tp.size()  # its ranks have the same one


def _gradients(model: nn.Module) -> dict[str, Tensor]:
    found = {}
    for name, parameter in model.named_parameters():
        grad = parameter.grad
        if grad is not None:
            whole = grad.full_tensor() if isinstance(grad, DTensor) else grad
            found[name] = whole.detach().clone()
    return found


def difference(found: Trained, expected: Trained) -> str:
    """How the first is not the second; empty where it is, up to `TOLERANCE`."""
    largest = max(float(gradient.abs().max()) for gradient in expected.gradients.values())
    if not 0 < largest < float("inf"):
        return f"{DIFFERS}the reference has a largest gradient of {largest}"
    if not abs(found.loss - expected.loss) <= TOLERANCE * abs(expected.loss):
        return f"{DIFFERS}loss {found.loss:.5f}, not {expected.loss:.5f}"
    wrong = []
    for name in sorted(found.gradients.keys() | expected.gradients.keys()):
        a, b = found.gradients.get(name), expected.gradients.get(name)
        if a is None or b is None:  # what is not used has no gradient, or zeros
            a, b = (torch.zeros(()) if x is None else x for x in (a, b))
        elif a.shape != b.shape:
            return f"{DIFFERS}{name} has the shape {list(a.shape)}, not {list(b.shape)}"
        scale = max(float(b.abs().max()), NOISE * largest)
        error = float((a.double() - b.double()).abs().max()) / scale
        if not error <= TOLERANCE:
            wrong.append(f"{name} by {error:.1e}")
    many = f" and {len(wrong) - 1} more" if len(wrong) > 1 else ""
    return f"{DIFFERS}the gradient of {wrong[0]}{many}" if wrong else YES


def check_export(assembled: AssembledModel, config: PreTrainedConfig, folder: Path) -> str:
    """Whether plain transformers reads an export as the very model that training began with."""
    gathered = assembled.gather_weights()
    if dist.get_rank() != 0:
        return YES
    target = folder / "hf_ckpt"
    export(config, gathered, None, target, dtype=torch.float32)
    before, after = (
        _class_of(config).from_pretrained(path, dtype=torch.float32).eval()
        for path in (folder, target)
    )
    shutil.rmtree(target)
    tensors, others = before.state_dict(), after.state_dict()
    if tensors.keys() != others.keys():
        return f"{DIFFERS}names {sorted(tensors.keys() ^ others.keys())[:3]}"
    changed = [name for name, tensor in tensors.items() if not torch.equal(tensor, others[name])]
    if changed:
        return f"{DIFFERS}{len(changed)} tensors, {changed[0]} first"
    ids = rows()[0].input_ids
    with torch.no_grad():
        logits = [model(input_ids=ids, use_cache=False).logits for model in (before, after)]
    return YES if torch.equal(*logits) else f"{DIFFERS}logits"


def _class_of(config: PreTrainedConfig) -> type[PreTrainedModel]:
    """By name: some configurations are saved as those of a part, which has another name there."""
    return getattr(transformers, class_of(config.model_type))


def _reason(error: ConfigError, config: PreTrainedConfig) -> str:
    """Without the name of the model, so that it is one for many."""
    types = {config.model_type, config.get_text_config(decoder=True).model_type}
    names = sorted({*types, class_of(config.model_type)}, key=len, reverse=True)
    why = "; ".join(dict.fromkeys(problem.problem for problem in error.problems))
    return re.sub(rf"(?<!\w)({'|'.join(map(re.escape, names))})(?!\w)", "the model", why)


def _in_short(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[-1] if lines else ''}"[:160]

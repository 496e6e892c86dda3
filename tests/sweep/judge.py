"""One architecture trained by omnilit and by transformers alone, and what differs."""

from __future__ import annotations

import copy
import gc
import math
import re
import shutil
import tempfile
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
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
from omnilit.kernels.resolve import resolve_kernels
from omnilit.models.bind import bind_kernels
from omnilit.models.build import build_meta
from omnilit.models.sequence import layout_of
from omnilit.modules.assembly import AssembledModel, ModelRequest, assemble
from omnilit.parallel.collectives import gather_objects, sum_over
from omnilit.parallel.mesh import ParallelSizes, Topology
from omnilit.parallel.sequence import split_sequence
from omnilit.types import IGNORE, MicroBatch, StepStamp, StepWindow
from tests.helpers.models import packed_batch, reference_loss
from tests.sweep.media import MediaSample, media_loss, media_samples, pack_media, sample_inputs
from tests.sweep.subject import EXPORT, LANGUAGE, LAYOUTS, PACKED, Subject
from tests.sweep.tiny import tiny_config, tiny_model

TOLERANCE: Final = 1e-4
LONGEST: Final = 300  # characters of a reason
NOISE: Final = 1e-3  # of the largest gradient: what is smaller is held against this
ROWS: Final = ((5, 1, 13, 9), (17, 2, 9))
CPU: Final = torch.device("cpu")
YES: Final = ""
DIFFERS: Final = "differs: "  # what follows is no refusal, but a mistake of ours
_REFERENCE: Final = "reference.pt"


@dataclass(frozen=True, slots=True)
class Trained:
    """What a backward pass of both rows came to.

    Args:
        loss: Mean over the supervised tokens.
        gradients: Whole, by the parameter's name; those that are not trained may be missing.
        noise: Of a reference: how far float32 alone takes transformers' own gradients off.
    """

    loss: float
    gradients: dict[str, Tensor]
    noise: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Row:
    """A micro-batch, and what it was packed from where it holds media.

    Args:
        batch: Whole.
        samples: Empty for text.
    """

    batch: MicroBatch
    samples: tuple[MediaSample, ...] = ()

    def loss(self, model: PreTrainedModel) -> Tensor:
        """The sum of its losses by transformers alone, one sequence at a time."""
        if self.samples:
            return media_loss(model, self.samples, self.batch)
        return reference_loss(model, self.batch) * self.batch.counts["tokens"]

    def inputs(self, model: PreTrainedModel) -> dict[str, Any]:
        """What a plain forward takes, with media where it has any."""
        if self.samples:
            return sample_inputs(model, max(self.samples, key=lambda one: len(one.media)))
        return {"input_ids": self.batch.input_ids}


def rows_for(model: PreTrainedModel, *, takes_media: bool) -> list[Row]:
    """Two rows with segments of very different lengths; the second of them has no media."""
    if takes_media:
        made = media_samples(model)
        return [Row(pack_media(model, m, seed=n), tuple(m)) for n, m in enumerate(made)]
    return [Row(packed_batch(lengths, seed=n, vocab=100)) for n, lengths in enumerate(ROWS)]


def num_targets(rows: Sequence[Row]) -> int:
    """Supervised tokens of all rows."""
    return sum(int((row.batch.labels != IGNORE).sum()) for row in rows)


def judge_alone(model_type: str, folder: Path, *, subject: Subject = LANGUAGE) -> dict[str, str]:
    """Build the architecture, and train it packed in one process; leaves its files in `folder`.

    Returns:
        By column why not, and `YES` where it does; only the first where that is a refusal.
    """
    disable_progress_bar()
    try:
        config = _config_of(model_type, subject)
        plain = tiny_model(config, takes_media=subject.takes_media)
    except Exception as error:  # the library's own code; it says what it lacks
        return {PACKED: f"transformers does not build it by default ({_in_short(error)})"}
    plain.save_pretrained(folder)
    try:
        refuse_alone(plain, takes_media=subject.takes_media)
        rows = rows_for(plain, takes_media=subject.takes_media)
        found, _ = train(folder, config, {}, rows, takes_media=subject.takes_media)
    except ConfigError as error:
        return {PACKED: _reason(error, config, subject)}
    expected = train_alone(plain, rows)
    torch.save((expected, rows), folder / _REFERENCE)
    return {PACKED: difference(found, expected)}


def judge_split(
    model_type: str,
    folder: Path,
    layouts: Sequence[str] | None = None,
    *,
    subject: Subject = LANGUAGE,
) -> dict[str, str]:
    """Train the model that `judge_alone` left on these ranks, in each layout; all of them call.

    Args:
        model_type: Of the model.
        folder: Where its files are.
        layouts: Names of `LAYOUTS`; all of the subject by default.
        subject: What the model is judged as.

    Returns:
        By column why not, and `YES` where it does; the first layout that trains is exported.
    """
    disable_progress_bar()
    config, takes_media = _config_of(model_type, subject), subject.takes_media
    expected, rows = torch.load(folder / _REFERENCE, weights_only=False)
    judged: dict[str, str] = {}
    for name in subject.layouts if layouts is None else layouts:
        try:
            found, assembled = train(folder, config, LAYOUTS[name], rows, takes_media=takes_media)
        except ConfigError as error:
            judged[name] = _reason(error, config, subject)
            continue
        judged[name] = difference(found, expected)
        if EXPORT not in judged:
            judged[EXPORT] = check_export(assembled, config, folder, rows[0], subject)
        del found, assembled
        gc.collect()
    return judged


def _config_of(model_type: str, subject: Subject) -> PreTrainedConfig:
    config = tiny_config(model_type)
    if subject.takes_media:
        config.architectures = [subject.class_of(model_type)]
    return config


def refuse_alone(model: PreTrainedModel, *, takes_media: bool) -> None:
    """Refuse what cannot be trained before its rows are made, which ask the model for features.

    Raises:
        ConfigError: With the reason.
    """
    if takes_media:
        kernels = resolve_kernels(
            OpsImplementationConfig(), given=frozenset(), machine=Machine("cpu")
        )
        bind_kernels(copy.deepcopy(model), kernels, takes_media=True)


def train_alone(model: PreTrainedModel, rows: Sequence[Row]) -> Trained:
    """By transformers alone, a sequence at a time, with eager attention, in float64."""
    exact = _train_plain(copy.deepcopy(model).double(), rows)
    rounded = _train_plain(copy.deepcopy(model), rows)
    return replace(exact, noise=dict(_errors(rounded.gradients, exact.gradients)))


def _train_plain(model: PreTrainedModel, rows: Sequence[Row]) -> Trained:
    model.set_experts_implementation("eager")
    loss = torch.stack([row.loss(model) for row in rows]).sum() / num_targets(rows)
    loss.backward()
    return Trained(loss.item(), _gradients(model))


def _errors(
    found: Mapping[str, Tensor], expected: Mapping[str, Tensor]
) -> Iterator[tuple[str, float]]:
    """The largest difference of each gradient, beside its largest entry; infinite by shape."""
    largest = max(float(gradient.abs().max()) for gradient in expected.values())
    for name in sorted(found.keys() | expected.keys()):
        a, b = found.get(name), expected.get(name)
        if a is None or b is None:  # what is not used has no gradient, or zeros
            a, b = (torch.zeros(()) if x is None else x for x in (a, b))
        elif a.shape != b.shape:
            yield name, math.inf
            continue
        scale = max(float(b.abs().max()), NOISE * largest)
        yield name, float((a.double() - b.double()).abs().max()) / scale


def train(
    folder: Path,
    config: PreTrainedConfig,
    sizes: dict[str, Any],
    rows: Sequence[Row],
    *,
    takes_media: bool,
) -> tuple[Trained, AssembledModel]:
    """As a run trains the model in `folder`, on as many ranks as there are; all of them call.

    Raises:
        ConfigError: It is refused, before the first step or in it.
    """
    fsdp = FSDPConfig(mixed_precision=MixedPrecisionConfig(enable=False))
    accelerator = AcceleratorConfig(**sizes, fsdp_config=fsdp)
    can = build_meta(config, dtype=torch.float32).supports_gradient_checkpointing
    again = GradientCheckpointingConfig(enable=can)
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
        takes_media=takes_media,
    )
    assembled = assemble(request, topology=topology, machine=Machine("cpu"))
    for part in assembled.parts:
        part.train()
    loss = _backward(assembled, topology, rows)
    assembled.verify_step()
    world = dist.group.WORLD
    assert world is not None
    gradients = _gradients(assembled.model)
    if assembled.stages is not None:
        others = gather_objects(gradients, assembled.stages)
        gradients = {name: grad for other in others for name, grad in other.items()}
    return Trained(sum_over({"loss": loss}, world)["loss"], gradients), assembled


def _backward(assembled: AssembledModel, topology: Topology, rows: Sequence[Row]) -> float:
    """This rank's share of the loss, whose gradients are left where they belong."""
    size, count = topology.data_size, num_targets(rows)
    own = stamped([row.batch for row in rows], size)[topology.data_rank :: size]

    def loss_of(row: MicroBatch) -> Tensor:
        return assembled.forward(row).token_losses.sum() / count

    if assembled.pipeline is not None:
        total = assembled.pipeline.train(StepWindow(tuple(own)), loss_of).item()
        return total if assembled.pipeline.has_last else 0.0
    total, media = 0.0, assembled.binding.media
    for row in own:
        whole = row if media is None else media.prepare(row)
        part = split_sequence(whole, layout_of(topology), topology.sequence_rank)
        loss = loss_of(part)
        loss.backward()
        total += loss.item()
    return total / topology.tp.size()  # its ranks have the same one


def stamped(batches: Sequence[MicroBatch], size: int) -> list[MicroBatch]:
    """Rows that know which media the others of their place in the step have, as from a loader.

    Args:
        batches: Of a step; `size` of them make a place.
        size: Data ranks.
    """
    found = []
    for at, batch in enumerate(batches):
        place = batches[at - at % size :][:size]
        media = frozenset[str]().union(*(one.modalities for one in place))
        stamp = StepStamp(batch.counts, 0, at // size, len(batches) // size, 0.0, media)
        found.append(replace(batch, stamp=stamp))
    return found


def _gradients(model: nn.Module) -> dict[str, Tensor]:
    found = {}
    for name, parameter in model.named_parameters():
        grad = parameter.grad
        if grad is not None:
            whole = grad.full_tensor() if isinstance(grad, DTensor) else grad
            found[name] = whole.detach().clone()
    return found


def difference(found: Trained, expected: Trained) -> str:
    """How the first is not the second; empty where it is, up to `TOLERANCE`.

    What float32 takes transformers itself off by is allowed beside it, up to ten times as much.
    """
    largest = max(float(gradient.abs().max()) for gradient in expected.gradients.values())
    if not 0 < largest < float("inf"):
        return f"{DIFFERS}the reference has a largest gradient of {largest}"
    if not abs(found.loss - expected.loss) <= TOLERANCE * abs(expected.loss):
        return f"{DIFFERS}loss {found.loss:.5f}, not {expected.loss:.5f}"
    wrong = [
        f"{name} by {error:.1e}"
        for name, error in _errors(found.gradients, expected.gradients)
        if not error <= TOLERANCE + min(expected.noise.get(name, 0.0), 10 * TOLERANCE)
    ]
    many = f" and {len(wrong) - 1} more" if len(wrong) > 1 else ""
    return f"{DIFFERS}the gradient of {wrong[0]}{many}" if wrong else YES


def check_export(
    assembled: AssembledModel, config: PreTrainedConfig, folder: Path, row: Row, subject: Subject
) -> str:
    """Whether plain transformers reads an export as the very model that training began with."""
    gathered = assembled.gather_weights()
    if dist.get_rank() != 0:
        return YES
    target = folder / "hf_ckpt"
    export(config, gathered, None, target, dtype=torch.float32)
    before, after = (
        _class_of(config, subject).from_pretrained(path, dtype=torch.float32).eval()
        for path in (folder, target)
    )
    shutil.rmtree(target)
    tensors, others = before.state_dict(), after.state_dict()
    if tensors.keys() != others.keys():
        return f"{DIFFERS}names {sorted(tensors.keys() ^ others.keys())[:3]}"
    changed = [name for name, tensor in tensors.items() if not torch.equal(tensor, others[name])]
    if changed:
        return f"{DIFFERS}{len(changed)} tensors, {changed[0]} first"
    inputs = row.inputs(before)
    with torch.no_grad():
        logits = [model(**inputs, use_cache=False).logits for model in (before, after)]
    return YES if torch.equal(*logits) else f"{DIFFERS}logits"


def _class_of(config: PreTrainedConfig, subject: Subject) -> type[PreTrainedModel]:
    """By name: some configurations are saved as those of a part, which has another name there."""
    return getattr(transformers, subject.class_of(config.model_type))


def _reason(error: ConfigError, config: PreTrainedConfig, subject: Subject) -> str:
    """Without the names of the model and of its folder, so that it is one for many; in short."""
    types = {config.model_type, config.get_text_config(decoder=True).model_type}
    names = sorted({*types, subject.class_of(config.model_type)}, key=len, reverse=True)
    why = "; ".join(dict.fromkeys(problem.problem for problem in error.problems))
    why = re.sub(rf"{re.escape(tempfile.gettempdir())}/\S*", "its folder", why)
    why = re.sub(rf"(?<!\w)({'|'.join(map(re.escape, names))})(?!\w)", "the model", why)
    return textwrap.shorten(why, LONGEST, placeholder=" ...")


def _in_short(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[-1] if lines else ''}"[:160]

"""Rules on several fields together: pure functions of the values, without a file or a device."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Final

from omnilit.config import (
    checkpoint_rules,
    class_rules,
    data_rules,
    evaluation_rules,
    invariance_rules,
    lora_rules,
    media,
    optimizer_rules,
    parallel_rules,
    pipeline_rules,
    preference_rules,
    tensor_rules,
    watch_rules,
)
from omnilit.config.ranges import NAMES, RANGES, check_name, check_range
from omnilit.config.view import View
from omnilit.errors import Problem


@dataclass(frozen=True, slots=True)
class Rule:
    """One check.

    Args:
        reads: Paths of the fields that it looks at; it is skipped where one of them already has
            a problem, or where the chosen task lacks one.
        check: The problems of a run, none where all is well.
    """

    reads: tuple[str, ...]
    check: Callable[[View], list[Problem]]


def run_rules(view: View, *, doubtful: Iterable[str] = ()) -> list[Problem]:
    """The problems of all rules.

    Args:
        view: The values.
        doubtful: Paths, of fields or whole groups, that earlier checks found wrong.
    """
    wrong = set(doubtful)
    problems: list[Problem] = []
    for rule in all_rules():
        if any(path not in view or _is_within(path, wrong) for path in rule.reads):
            continue
        found = rule.check(view)
        problems += found
        wrong.update(problem.key for problem in found)
    return problems


def _is_within(path: str, wrong: set[str]) -> bool:
    """Whether `path` or a group around it is among `wrong`."""
    parts = path.split(".")
    return any(".".join(parts[:end]) in wrong for end in range(1, len(parts) + 1))


OPTIMIZER: Final = "train.optimizer"
STYLE: Final = f"{OPTIMIZER}.lr_decay_style"
BATCH: Final = "train.global_batch_size"
MICRO: Final = "train.micro_batch_size"
START: Final = f"{OPTIMIZER}.lr_start"


def all_rules() -> list[Rule]:
    """Every rule: single fields first, so that rules on several skip the wrong ones."""
    patterns = (f"{OPTIMIZER}.no_decay_modules", f"{OPTIMIZER}.no_decay_params")
    decays = (f"{OPTIMIZER}.lr_min", f"{OPTIMIZER}.lr_decay_ratio")
    return [
        *(Rule((path,), partial(check_range, path=path)) for path in RANGES),
        *(Rule((path,), partial(check_name, path=path)) for path in NAMES),
        *(Rule((path,), partial(_patterns_have_text, path=path)) for path in patterns),
        *_data_rules(),
        *_watch_rules(),
        *_preference_rules(),
        Rule((class_rules.NUMBER, class_rules.NAMES), class_rules.classes_are_clear),
        Rule(("model.config_path", "model.model_path"), _model_is_given),
        Rule(lora_rules.READ, lora_rules.adapters_are_possible),
        Rule(("data.train_path",), _training_data_is_given),
        Rule(("data.eval_path",), _validation_data_is_given),
        Rule(("infer.model_path",), _answering_model_is_given),
        *_evaluation_rules(),
        *(Rule((STYLE, path), partial(_constant_rate_stays, path=path)) for path in decays),
        Rule((STYLE, f"{OPTIMIZER}.lr", f"{OPTIMIZER}.lr_min"), _floor_is_below_peak),
        Rule((START, f"{OPTIMIZER}.lr_warmup_ratio"), _start_has_a_warm_up),
        *_optimizer_rules(),
        Rule(("train.checkpoint.load_path", "train.checkpoint.overwrite"), _resume_overwrites_not),
        *_checkpoint_rules(),
        *_parallel_rules(),
        Rule((MICRO, BATCH, parallel_rules.MODE, *parallel_rules.SIZES), _step_is_whole_batches),
    ]


def _parallel_rules() -> list[Rule]:
    mode = parallel_rules.MODE
    recompute = parallel_rules.RECOMPUTE
    options = tuple(f"{recompute}.{name}" for name in ("enable", "debug", "enable_reentrant"))
    return [
        Rule((mode, *parallel_rules.SIZES), parallel_rules.sizes_fit),
        *(
            Rule((path, size), partial(parallel_rules.option_has_its_axis, path=path, size=size))
            for path, size in parallel_rules.OF_AXIS
        ),
        Rule(parallel_rules.OF_RING, parallel_rules.ring_attends_itself),
        *(
            Rule((mode, field), partial(parallel_rules.ddp_reads_it, path=field))
            for field in parallel_rules.FSDP2_ONLY
        ),
        Rule(options, parallel_rules.debugging_is_not_reentrant),
        Rule((parallel_rules.FROM_RANK0, parallel_rules.CHUNK), parallel_rules.chunks_are_sent),
        Rule((parallel_rules.MOVED, parallel_rules.KEPT), parallel_rules.activations_have_a_limit),
        Rule((tensor_rules.TP, tensor_rules.HEAD), tensor_rules.head_takes_a_part),
        Rule((tensor_rules.TP, tensor_rules.COMPILE), tensor_rules.compiled_blocks_are_whole),
        Rule(
            (invariance_rules.INVARIANT, optimizer_rules.COMPILE, *invariance_rules.SPLITS),
            invariance_rules.rows_stay_whole,
        ),
        *_pipeline_rules(),
    ]


def _evaluation_rules() -> list[Rule]:
    own = evaluation_rules
    return [
        Rule((own.STEPS, own.DATA), own.evaluation_has_data),
        Rule((own.SAMPLES, own.DATA, own.DATA_TYPE), own.samples_have_prompts),
        Rule((own.SAMPLES, own.MAX_TOKENS), own.length_has_samples),
    ]


def _preference_rules() -> list[Rule]:
    loss = preference_rules.LOSS
    return [
        Rule((preference_rules.SMOOTHING, loss), preference_rules.smoothing_has_its_loss),
        Rule((preference_rules.GAMMA, loss), preference_rules.margin_has_its_loss),
        Rule(
            (
                preference_rules.PRECISION,
                loss,
                preference_rules.FREE,
                preference_rules.LORA,
                preference_rules.WHOLE,
            ),
            preference_rules.precision_has_a_reference,
        ),
        Rule(
            (
                preference_rules.PRECOMPUTE,
                loss,
                preference_rules.FREE,
                preference_rules.DATASETS,
            ),
            preference_rules.precomputing_has_pairs,
        ),
    ]


def _pipeline_rules() -> list[Rule]:
    size, schedule = parallel_rules.STAGES, parallel_rules.SCHEDULE
    number = pipeline_rules.PER_RANK
    dealt = (size, schedule, BATCH, MICRO, parallel_rules.MODE, *parallel_rules.SIZES)
    return [
        Rule((schedule, number), pipeline_rules.stages_have_their_schedule),
        Rule(dealt, pipeline_rules.micro_batches_are_dealt),
        Rule((size, pipeline_rules.LOAD), pipeline_rules.load_is_not_logged),
    ]


def _checkpoint_rules() -> list[Rule]:
    saves, exports = checkpoint_rules.saves_are_on, checkpoint_rules.exports_are_on
    return [
        *(
            Rule((*checkpoint_rules.SAVES, path), partial(saves, path=path))
            for path in checkpoint_rules.NEEDS_SAVES
        ),
        *(
            Rule((checkpoint_rules.EXPORTS, path), partial(exports, path=path))
            for path in checkpoint_rules.NEEDS_EXPORTS
        ),
    ]


def _optimizer_rules() -> list[Rule]:
    fields = (
        optimizer_rules.TYPE,
        optimizer_rules.BETAS,
        optimizer_rules.KAHAN,
        optimizer_rules.MASTER,
    )
    watched = (optimizer_rules.COMPILE, optimizer_rules.RECOMPUTE, optimizer_rules.DEBUG)
    return [
        Rule(fields, optimizer_rules.optimizer_fits_its_type),
        Rule(watched, optimizer_rules.compiled_blocks_are_not_watched),
    ]


def _data_rules() -> list[Rule]:
    dyn = data_rules.DYN
    kinds = (dyn, data_rules.DATASETS)
    epoch = (*kinds, data_rules.TOKENS, "train.max_steps")
    batch = (data_rules.RATIO, data_rules.INIT, MICRO, "data.max_seq_len")
    path = data_rules.TRAIN_PATH
    return [
        Rule(("data.text_keys",), data_rules.text_keys_have_text),
        *(
            Rule((key,), lambda view, key=key: media.check_media_config(view[key], key))
            for key in (media.KEY, media.INFER_KEY)
        ),
        *(
            Rule(
                (data_rules.KIND, data_rules.TRANSFORM, field),
                partial(data_rules.kind_reads_it, path=field),
            )
            for field in data_rules.NOT_READ
        ),
        Rule(
            (data_rules.KIND, data_rules.TRANSFORM, "data.overlong", data_rules.SIDE),
            data_rules.side_has_a_cut,
        ),
        Rule((dyn, "data.dataloader.drop_last"), data_rules.packing_drops_no_batch),
        *(
            Rule((dyn, field), partial(data_rules.packing_is_on, path=field))
            for field in data_rules.NEEDS_PACKING
        ),
        Rule((dyn, data_rules.KIND, *batch), data_rules.warm_up_is_on),
        Rule((*kinds, data_rules.SAMPLES), data_rules.samples_are_counted),
        Rule(epoch, data_rules.stream_has_an_end),
        Rule(("data.silent_exception", "data.max_bad_fraction"), data_rules.limit_has_skipping),
        Rule((path, data_rules.MIXING), data_rules.mixing_has_sources),
        Rule((path, data_rules.SOURCE_NAME), data_rules.one_source_has_one_name),
    ]


def _watch_rules() -> list[Rule]:
    start, end, wandb = watch_rules.START, watch_rules.END, watch_rules.WANDB
    length = ("train.max_steps", "train.num_train_epochs")
    return [
        Rule((start, end), watch_rules.range_has_a_step),
        Rule((f"{watch_rules.PROFILE}.enable", start, *length), watch_rules.range_is_reached),
        *(
            Rule((path,), partial(watch_rules.name_is_legal, path=path))
            for path in watch_rules.NAMED
        ),
        Rule((f"{wandb}.tags",), watch_rules.tags_are_legal),
    ]


def _patterns_have_text(view: View, path: str) -> list[Problem]:
    if all(pattern.strip() for pattern in view[path]):
        return []
    return [Problem(path, "an empty pattern would match every name", "take it out of the list")]


def _model_is_given(view: View) -> list[Problem]:
    if view.verb in ("infer", "data") or view["model.config_path"] or view["model.model_path"]:
        return []
    return [
        Problem(
            "model.model_path",
            "neither model.model_path nor model.config_path is given",
            "give model_path to start from weights, or config_path to start from random ones",
        )
    ]


def _training_data_is_given(view: View) -> list[Problem]:
    if view.verb not in ("fit", "data") or view["data.train_path"]:
        return []
    return [Problem("data.train_path", "no training data is given", "name a file or a folder")]


def _validation_data_is_given(view: View) -> list[Problem]:
    if view.verb != "validate" or view["data.eval_path"]:
        return []
    return [Problem("data.eval_path", "no evaluation data is given", "name a file or a folder")]


def _answering_model_is_given(view: View) -> list[Problem]:
    if view.verb != "infer" or view["infer.model_path"]:
        return []
    return [Problem("infer.model_path", "no model is given", "name the folder of a trained model")]


def _constant_rate_stays(view: View, path: str) -> list[Problem]:
    if view[STYLE] != "constant" or not view.is_changed(path):
        return []
    return [
        Problem(
            path,
            f"{view[path]} has no effect, because lr_decay_style: constant never decays",
            "leave it out, or set lr_decay_style to linear or cosine",
        )
    ]


def _floor_is_below_peak(view: View) -> list[Problem]:
    peak, floor = view[f"{OPTIMIZER}.lr"], view[f"{OPTIMIZER}.lr_min"]
    path = f"{OPTIMIZER}.lr_min"
    if view[STYLE] == "constant" or not view.is_changed(path) or floor <= peak:
        return []
    problem = f"{floor} is above lr {peak}, so the rate would rise in its decay"
    return [Problem(path, problem, "choose lr_min at most lr")]


def _start_has_a_warm_up(view: View) -> list[Problem]:
    ratio = view[f"{OPTIMIZER}.lr_warmup_ratio"]
    if ratio > 0 or not view.is_changed(START):
        return []
    return [
        Problem(
            START,
            f"{view[START]} has no effect, because lr_warmup_ratio: {ratio} leaves no warm-up",
            "leave it out, or set lr_warmup_ratio above 0",
        )
    ]


def _resume_overwrites_not(view: View) -> list[Problem]:
    if view["train.checkpoint.load_path"] != "auto" or not view["train.checkpoint.overwrite"]:
        return []
    return [
        Problem(
            "train.checkpoint.overwrite",
            "load_path: auto goes on from the checkpoints that overwrite: true gives up",
            "keep one of the two",
        )
    ]


def _step_is_whole_batches(view: View) -> list[Problem]:
    batch, micro, ranks = view[BATCH], view[MICRO], parallel_rules.data_ranks(view)
    if batch is None or ranks is None or batch % (micro * ranks) == 0:
        return []
    unit = micro * ranks
    near = max(unit, batch // unit * unit)
    return [
        Problem(
            BATCH,
            f"{batch} is not a multiple of micro_batch_size {micro} * {ranks} data-parallel ranks",
            f"use a multiple of {unit}, such as {near}",
        )
    ]

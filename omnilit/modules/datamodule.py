"""The data of a run: prepared once, dealt to the ranks in windows."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from lightning.pytorch import LightningDataModule
from transformers import PretrainedConfig, PreTrainedTokenizerBase
from typing_extensions import override

from omnilit.config import DataloaderConfig, TrainingArguments
from omnilit.data.batches import WorkerSettings
from omnilit.data.cache import TokenDataset, open_prepared
from omnilit.data.encode import decode_spans
from omnilit.data.evaluation import EvalLoader
from omnilit.data.packing import PlanSettings
from omnilit.data.passes import EpochSteps
from omnilit.data.prepare import PreparedInfo, PrepareRequest, prepare
from omnilit.data.sources import list_files
from omnilit.data.templates import select_template
from omnilit.data.transforms import TransformSettings
from omnilit.data.window import TrainLoader, WindowLayout
from omnilit.errors import ConfigError
from omnilit.logging import get_logger
from omnilit.modules.availability import refuse_arguments, refuse_unavailable
from omnilit.modules.base import OmniModule
from omnilit.parallel.collectives import run_on_first, sum_or_raise
from omnilit.parallel.mesh import Topology

log = get_logger(__name__)


class OmniDataModule(LightningDataModule):
    """Reads, tokenises, packs and deals the data of a run.

    Args:
        train_path: Data to train on: jsonl files and folders of them, separated by commas.
        eval_path: Data to evaluate on, in the same form.
        train_size: Tokens of an epoch; null makes an epoch one pass through the data.
        train_sample: Samples of an epoch, for data without a length and without `dyn_bsz`.
        data_type: What a record is.
        datasets_type: How data is read: by position, or as a stream.
        multisource_datasets_type: How several sources are mixed.
        source_name: Name of the source in metrics.
        dyn_bsz_buffer_size: Samples that packing chooses from; left out, it chooses from the
            whole pass.
        text_keys: Field of a record that holds its text or messages; default by `data_type`.
        chat_template: How a conversation becomes text: `default` is the tokenizer's own template
            where it has one, else `plain`.
        max_seq_len: Longest sample, in tokens.
        silent_exception: Skip records that cannot be used.
        dataloader: Worker processes.
        mm_configs: How images, videos and sounds are prepared.
        overlong: What to do with a longer sample.
        truncation_side: Which side loses tokens.
        max_bad_fraction: Share of skipped records above which the run stops.
        train: The `train` group; the command line fills it in.
    """

    def __init__(
        self,
        *,
        train_path: str,
        eval_path: str | None = None,
        train_size: int | None = 10_000_000,
        train_sample: int = 10_000,
        data_type: Literal[
            "plaintext", "conversation", "diffusion", "classification", "dpo"
        ] = "conversation",
        datasets_type: str = "mapping",
        multisource_datasets_type: str = "interleave",
        source_name: str | None = None,
        dyn_bsz_buffer_size: int = 200,
        text_keys: str | None = None,
        chat_template: str = "default",
        max_seq_len: int = 2048,
        silent_exception: bool = False,
        dataloader: DataloaderConfig = DataloaderConfig(),
        mm_configs: dict[str, Any] | None = {},  # noqa: B006 - the reference's default
        overlong: Literal["truncate", "drop", "error"] = "truncate",
        truncation_side: Literal["left", "right"] = "right",
        max_bad_fraction: float = 0.01,
        train: TrainingArguments = TrainingArguments(),
    ) -> None:
        super().__init__()
        later = {
            "train_sample": train_sample,
            "data_type": data_type,
            "datasets_type": datasets_type,
            "multisource_datasets_type": multisource_datasets_type,
            "source_name": source_name,
            "silent_exception": silent_exception,
            "mm_configs": mm_configs,
            "max_bad_fraction": max_bad_fraction,
        }
        refuse_arguments(OmniDataModule, "data", later)
        refuse_unavailable(dataloader, "data.dataloader")
        refuse_unavailable(train, "train")
        self.paths = {"train": train_path, "eval": eval_path}
        self.train_size = train_size
        self.dataloader_config = dataloader
        self.train_arguments = train
        self.budget = train.micro_batch_size * max_seq_len
        self.max_seq_len = max_seq_len
        self.dyn_bsz_buffer_size = dyn_bsz_buffer_size
        # in plain Python a value counts as given where it differs from its default
        self.is_buffer_size_given = dyn_bsz_buffer_size != 200
        self.transform = TransformSettings(
            data_type=data_type,
            text_key=text_keys,
            chat_template=chat_template,
            max_seq_len=max_seq_len,
            overlong=overlong,
            truncation_side=truncation_side,
        )
        self._loaders: dict[str, TrainLoader | EvalLoader] = {}
        self._info: dict[str, PreparedInfo] = {}
        self._tokenizer: PreTrainedTokenizerBase | None = None
        self._workers = WorkerSettings()

    @override
    def setup(self, stage: str) -> None:
        module = self._module
        self._tokenizer = module.tokenizer
        is_first = module.topology.data_rank == 0
        check_positions(self.max_seq_len, module.model_config, is_loud=is_first)
        self._workers = self._choose_workers(module.topology)
        if stage == "fit" and "train" not in self._loaders:
            accumulation = self._set_accumulation(module.topology)
            self._loaders["train"] = self._train_loader(module.topology, accumulation)
        if self.paths["eval"] and "eval" not in self._loaders:
            self._loaders["eval"] = self._eval_loader(module.topology)
        if self.transform.data_type == "conversation":
            # what is exported asks its questions as training did
            template = select_template(self.transform.chat_template, self._tokenizer)
            self._tokenizer.chat_template = template.jinja

    @override
    def train_dataloader(self) -> TrainLoader:
        return self.train_loader

    @override
    def val_dataloader(self) -> EvalLoader | list[Any]:
        loader = self._loaders.get("eval")
        return loader if isinstance(loader, EvalLoader) else []

    @property
    def train_loader(self) -> TrainLoader:
        """The loader of windows; there once `setup` has run for fit."""
        loader = self._loaders["train"]
        assert isinstance(loader, TrainLoader)
        return loader

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps of the epoch at hand."""
        return self.train_loader.num_windows

    @property
    def epoch_steps(self) -> EpochSteps:
        """Optimizer steps of the epoch at hand that are done, and those left."""
        return self.train_loader.epoch_steps

    @property
    def num_steps(self) -> int:
        """Optimizer steps of the whole run, for the schedule, as if all were of today's size."""
        return self.train_loader.count_windows(self.train_arguments.num_train_epochs)

    @property
    def passes_per_epoch(self) -> float:
        """Trips through the data in an epoch."""
        return self.train_loader.passes_per_epoch

    @override
    def state_dict(self) -> dict[str, Any]:
        return self.train_loader.state_dict() if "train" in self._loaders else {}

    @override
    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        if "train" in self._loaders:
            self.train_loader.load_state_dict(state_dict)

    def rows(self) -> tuple[tuple[str, ...], list[tuple[object, ...]]]:
        """Header and rows of the table that is logged at the start."""
        header = ("data", "records", "samples", "tokens", "supervised", "truncated", "dropped")
        names = (
            "num_records",
            "num_samples",
            "num_tokens",
            "num_targets",
            "num_truncated",
            "num_dropped",
        )
        rows: list[tuple[object, ...]] = [
            (name, *(info[key] for key in names)) for name, info in self._info.items()
        ]
        return header, rows

    def first_sample_text(self) -> str:
        """The first training sample decoded, each supervised part in [[double brackets]]."""
        assert self._tokenizer is not None
        spans = decode_spans(self.train_loader.dataset[0], self._tokenizer)
        return "".join(f"[[{text}]]" if is_label else text for text, is_label in spans)

    @property
    def _module(self) -> OmniModule:
        module = self.trainer.lightning_module if self.trainer else None
        if not isinstance(module, OmniModule):
            raise ConfigError(
                key="model.class_path",
                problem=f"{type(module).__name__} has no tokenizer for OmniDataModule",
                fix="train a subclass of OmniModule, or bring a data module of your own",
            )
        return module

    def _set_accumulation(self, topology: Topology) -> int:
        """Micro-batches of a step on each rank, told to the trainer.

        Without `global_batch_size` the trainer's own number stands.

        Raises:
            ConfigError: The global batch is no multiple of one micro-batch a data rank.
        """
        assert self.trainer is not None
        micro, whole = self.train_arguments.micro_batch_size, self.train_arguments.global_batch_size
        if whole is not None:
            at_once = micro * topology.data_size
            if whole % at_once:
                raise ConfigError(
                    key="train.global_batch_size",
                    problem=f"{whole} is no multiple of micro_batch_size {micro} * "
                    f"{topology.data_size} data-parallel ranks",
                    fix=f"use a multiple of {at_once}",
                )
            self.trainer.accumulate_grad_batches = whole // at_once
        return self.trainer.accumulate_grad_batches

    def _train_loader(self, topology: Topology, accumulation: int) -> TrainLoader:
        buffer_size = self.dyn_bsz_buffer_size if self.is_buffer_size_given else None
        return TrainLoader(
            self._prepare("train"),
            plan=PlanSettings(self.train_arguments.seed, self.budget, buffer_size),
            layout=WindowLayout(topology.data_rank, topology.data_size, accumulation),
            train_size=self.train_size,
            max_steps=self.train_arguments.max_steps,
            workers=self._workers,
            reduce_counts=_Reducer(topology),
        )

    def _eval_loader(self, topology: Topology) -> EvalLoader:
        return EvalLoader(
            self._prepare("eval"),
            budget=self.budget,
            layout=WindowLayout(topology.data_rank, topology.data_size, 1),
            workers=self._workers,
        )

    def _prepare(self, name: str) -> TokenDataset:
        """Tokenise on rank 0 only, into a cache on a file system that all ranks share."""
        path, key = self.paths[name], f"data.{name}_path"
        assert path is not None
        assert self._tokenizer is not None
        tokenizer = self._tokenizer
        files = tuple(list_files(path, key=key))
        request = PrepareRequest(files, self.transform, _cache_dir(), source=name)
        info = run_on_first(lambda: prepare(request, tokenizer), name=f"prepare/{name}")
        self._info[name] = info
        return open_prepared(info["path"])

    def _choose_workers(self, topology: Topology) -> WorkerSettings:
        config = self.dataloader_config
        is_pinned = config.pin_memory and topology.device.type != "cpu"
        if config.pin_memory and not is_pinned:
            log.info("data.dataloader.pin_memory: off, there is no accelerator")
        return WorkerSettings(config.num_workers, config.prefetch_factor, is_pinned)


class _Reducer:
    """Sums a window's counts over the data ranks, or raises on all of them."""

    def __init__(self, topology: Topology) -> None:
        self._topology = topology

    def __call__(
        self, counts: Mapping[str, float], error: BaseException | None
    ) -> Mapping[str, float]:
        topology = self._topology
        return sum_or_raise(counts, error, topology.data.get_group(), topology.device)


def check_positions(max_seq_len: int, config: PretrainedConfig, *, is_loud: bool) -> None:
    """Compare the longest sample with the positions that the model has.

    Args:
        max_seq_len: Tokens of the longest sample.
        config: The model's.
        is_loud: True on the one rank that warns.

    Raises:
        ConfigError: The model looks positions up in a table that ends before.
    """
    text = config.get_text_config()
    limit = getattr(text, "max_position_embeddings", None)
    if not isinstance(limit, int) or max_seq_len <= limit:
        return
    rotary = (getattr(text, name, None) for name in ("rope_parameters", "rope_theta"))
    if not any(rotary):
        raise ConfigError(
            key="data.max_seq_len",
            problem=f"{max_seq_len} tokens are more than the {limit} positions of the model",
            fix=f"give at most {limit}",
        )
    if is_loud:
        log.warning(
            "data.max_seq_len: %d tokens are more than the %d positions that the model was made "
            "for; what it does beyond them is untrained",
            max_seq_len,
            limit,
        )


def _cache_dir() -> Path:
    """Where tokenised data is kept: $OMNILIT_CACHE, else the user's cache folder."""
    own = os.environ.get("OMNILIT_CACHE")
    if own:
        return Path(own).expanduser() / "data"
    home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(home).expanduser() / "omnilit" / "data"

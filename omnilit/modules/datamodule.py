"""The data of a run: prepared once, dealt to the ranks in windows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from lightning.pytorch import LightningDataModule
from transformers import PretrainedConfig, PreTrainedTokenizerBase
from typing_extensions import override

from omnilit.config import DataloaderConfig, TrainingArguments
from omnilit.config.data import micro_batch_tokens
from omnilit.config.media import read_media_config
from omnilit.data.cache import TokenDataset
from omnilit.data.collate import COLLATORS
from omnilit.data.encode import Encoder, decode_spans
from omnilit.data.epochs import EpochSteps
from omnilit.data.evaluation import EvalLoader
from omnilit.data.media.processor import MediaProcessor, check_hearing
from omnilit.data.planned import PlannedItems
from omnilit.data.prompts import PromptSet, take_prompts
from omnilit.data.quarantine import FILE, BadRecord, Quarantine
from omnilit.data.templates import ChatTemplate, select_template
from omnilit.data.transforms import CLASSIFICATION, TransformSettings, build_transform
from omnilit.data.window import TrainLoader, WholeWindows
from omnilit.errors import ConfigError
from omnilit.logging import get_logger
from omnilit.modules.availability import refuse_arguments, refuse_unavailable
from omnilit.modules.base import OmniModule
from omnilit.modules.data_requests import read_text_keys, settle_classes
from omnilit.modules.loaders import LoaderFactory, LoaderSettings
from omnilit.modules.preparation import Preparation
from omnilit.parallel.mesh import Topology

log = get_logger(__name__)


class OmniDataModule(LightningDataModule):
    """Reads, tokenises, packs and deals the data of a run.

    Args:
        train_path: Data to train on: files, folders, patterns, URLs, data sets of the hub,
            separated by commas; or a YAML file of several sources.
        eval_path: Data to evaluate on, in the same form.
        train_size: Tokens of an epoch; null makes an epoch one pass through the data.
        train_sample: Samples of an epoch, for data without a length and without `dyn_bsz`.
        data_type: What a record is.
        datasets_type: `mapping` tokenises everything before training, `iterable` while it
            trains; `package.module:Class` is a reader of your own.
        multisource_datasets_type: How several sources are mixed.
        source_name: Name of the source in metrics.
        dyn_bsz_buffer_size: Samples that packing chooses from; left out, it chooses from the
            whole pass.
        text_keys: Field of a record that holds its text or messages; of several the first one
            that is there counts; default by `data_type`.
        chat_template: How a conversation becomes text: `default` is the tokenizer's own template
            where it has one, else `plain`; or `tokenizer`, `chatml`, `llama2`, `gpt_oss`, or the
            path of a jinja file.
        max_seq_len: Longest sample, in tokens.
        silent_exception: Skip records that cannot be used.
        dataloader: Worker processes.
        mm_configs: How images, videos and sounds are prepared; the keys of `MediaConfig`.
        overlong: What to do with a longer sample.
        truncation_side: Which side loses tokens.
        max_bad_fraction: Share of skipped records above which the run stops.
        transform: A class of your own that makes samples of records, `package.module:Class` or
            a registered name, in place of the one of `data_type`.
        collator: A function of your own that makes micro-batches of samples,
            `package.module:function` or a registered name.
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
        text_keys: str | list[str] | None = None,
        chat_template: str = "default",
        max_seq_len: int = 2048,
        silent_exception: bool = False,
        dataloader: DataloaderConfig = DataloaderConfig(),
        mm_configs: dict[str, Any] | None = {},  # noqa: B006 - the reference's default
        overlong: Literal["truncate", "drop", "error"] = "truncate",
        truncation_side: Literal["left", "right"] = "right",
        max_bad_fraction: float = 0.01,
        transform: str | None = None,
        collator: str | None = None,
        train: TrainingArguments = TrainingArguments(),
    ) -> None:
        super().__init__()
        later = {"data_type": data_type}
        refuse_arguments(OmniDataModule, "data", later)
        refuse_unavailable(dataloader, "data.dataloader")
        refuse_unavailable(train, "train")
        self.paths = {"train": train_path, "eval": eval_path}
        self.train_size = train_size
        self.train_arguments = train
        self.max_seq_len = max_seq_len
        self.transform = TransformSettings(
            data_type=data_type,
            text_keys=read_text_keys(text_keys),
            chat_template=chat_template,
            max_seq_len=max_seq_len,
            overlong=overlong,
            truncation_side=truncation_side,
            transform=transform,
        )
        epoch_size = train_size
        if not train.dyn_bsz:
            epoch_size = train_sample if datasets_type == "iterable" else None
        self._settings = LoaderSettings(
            train,
            dataloader,
            budget=micro_batch_tokens(train.micro_batch_size, max_seq_len, data_type),
            epoch_size=epoch_size,
            buffer_size=dyn_bsz_buffer_size,
            # in plain Python a value counts as given where it differs from its default
            is_buffer_size_given=dyn_bsz_buffer_size != 200,
            collator=None if collator is None else COLLATORS.load(collator),
        )
        self._preparation = Preparation(
            self.paths,
            self.transform,
            datasets_type,
            source_name,
            silent_exception=silent_exception,
            max_bad_fraction=max_bad_fraction,
            on_bad=self._quarantine,
        )
        self._loaders: dict[str, TrainLoader | EvalLoader] = {}
        self._tokenizer: PreTrainedTokenizerBase | None = None
        self._media_config = read_media_config(mm_configs)
        self._media: MediaProcessor | None = None
        self._quarantined = Quarantine(Path(train.checkpoint.output_dir) / FILE)

    @property
    def is_buffer_size_given(self) -> bool:
        """Whether prepared data is packed from `dyn_bsz_buffer_size` samples at a time, too."""
        return self._settings.is_buffer_size_given

    @is_buffer_size_given.setter
    def is_buffer_size_given(self, is_given: bool) -> None:
        self._settings = replace(self._settings, is_buffer_size_given=is_given)

    @override
    def setup(self, stage: str) -> None:
        module = self._module
        self._tokenizer = module.tokenizer
        topology = module.topology
        is_first = topology.data_rank == 0 and topology.is_first_of_data
        check_positions(self.max_seq_len, module.model_config, is_loud=is_first)
        self.transform = settle_classes(self.transform, module.model_config)
        self._preparation = replace(self._preparation, transform=self.transform)
        self._media = self._find_media(module)
        factory = self._factory
        if stage == "fit" and "train" not in self._loaders:
            accumulation = self._set_accumulation(topology)
            self._log_pinning(topology)
            self._loaders["train"] = factory.train_loader(accumulation)
        if self.paths["eval"] and "eval" not in self._loaders:
            self._loaders["eval"] = factory.eval_loader()
        if (template := self._find_template()) is not None:
            # what is exported asks its questions as training did
            self._tokenizer.chat_template = template.jinja

    @override
    def train_dataloader(self) -> TrainLoader | WholeWindows:
        loader = self.train_loader
        return WholeWindows(loader) if self._is_pipelined else loader

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
    def passes_per_epoch(self) -> float | None:
        """Trips through the data in an epoch; None where its length is not known."""
        return self.train_loader.passes_per_epoch

    @override
    def state_dict(self) -> dict[str, Any]:
        return self.train_loader.state_dict() if "train" in self._loaders else {}

    def load_state_dicts(self, states: Sequence[Mapping[str, Any]]) -> None:
        """Go on from what `state_dict` gave: one that all ranks share, or one of each rank."""
        if "train" in self._loaders:
            self.train_loader.load_state_dicts(states)

    def prepared(self) -> list[TokenDataset]:
        """All prepared data that the run reads; there once `setup` has run."""
        return self._preparation.datasets

    def score_loader(self, dataset: TokenDataset) -> EvalLoader:
        """Every sample of some prepared data once, dealt to the ranks."""
        return self._factory.loader_of(dataset)

    def eval_prompts(self, number: int) -> PromptSet:
        """What the first records of the evaluation data ask for; there once `setup` has run."""
        loader = self._loaders["eval"]
        assert isinstance(loader, EvalLoader)
        prompts = take_prompts(loader.dataset, number)
        return PromptSet(prompts, loader.settings, self._settings.budget, self.max_seq_len)

    def rows(self) -> tuple[tuple[str, ...], list[tuple[object, ...]]]:
        """Header and rows of the table that is logged at the start."""
        header = (
            *("data", "records", "samples", "tokens", "supervised"),
            *("truncated", "cut", "dropped", "bad"),
        )
        names = (
            "num_records",
            "num_samples",
            "num_tokens",
            "num_targets",
            "num_truncated",
            "num_cut",
            "num_dropped",
            "num_bad",
        )
        rows: list[tuple[object, ...]] = [
            (name, *(info[key] for key in names)) for name, info in self._preparation.infos.items()
        ]
        return header, rows

    def first_sample_text(self) -> str:
        """The first training sample decoded, each supervised part in [[double brackets]]."""
        assert self._tokenizer is not None
        items = self.train_loader.items
        if not isinstance(items, PlannedItems):
            return ""
        spans = decode_spans(items.dataset[0], Encoder.of(self._tokenizer))
        return "".join(f"[[{text}]]" if is_label else text for text, is_label in spans)

    @property
    def _factory(self) -> LoaderFactory:
        assert self._tokenizer is not None, "setup has run"
        return LoaderFactory(
            self._settings,
            self._preparation,
            self._module.topology,
            self._tokenizer,
            self._media,
            tells_grids=self._module.shares_media,
        )

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

    def _find_media(self, module: OmniModule) -> MediaProcessor | None:
        """What the model takes beside text; None for a model of text."""
        if module.processor is None:
            return None
        media = MediaProcessor(module.processor, self._media_config)
        check_hearing(media)
        return media

    def _find_template(self) -> ChatTemplate | None:
        """How conversations are written; None where there are none."""
        assert self._tokenizer is not None
        if self.transform.transform is not None:
            return build_transform(self.transform, self._tokenizer, self._media).template
        if self.transform.data_type in ("conversation", "dpo"):
            processor = None if self._media is None else self._media.processor
            return select_template(self.transform.chat_template, self._tokenizer, processor)
        if self.transform.data_type == CLASSIFICATION and self.transform.chat_template != "default":
            return select_template(self.transform.chat_template, self._tokenizer)
        return None

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
        accumulation = self.trainer.accumulate_grad_batches
        if self._is_pipelined:  # Lightning's batch is then the whole step
            self.trainer.accumulate_grad_batches = 1
        return accumulation

    @property
    def _is_pipelined(self) -> bool:
        return self._module.topology.stages is not None

    def _quarantine(self, bad: Sequence[BadRecord]) -> None:
        """Write down what was skipped."""
        if not self._module.topology.is_first_of_data:
            return
        if bad and (num_new := self._quarantined.add(bad)):
            log.warning("skipped %d bad records: %s", num_new, self._quarantined.file)

    def _log_pinning(self, topology: Topology) -> None:
        if self._settings.dataloader.pin_memory and topology.device.type == "cpu":
            log.info("data.dataloader.pin_memory: off, there is no accelerator")


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

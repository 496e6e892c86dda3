"""The strategy: process group, meshes, gradient synchronisation, checkpoints."""

from __future__ import annotations

import os
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.trainer.states import TrainerFn
from torch import nn
from torch.optim import Optimizer
from typing_extensions import override

from omnilit.checkpoint.background import BackgroundWriter, SaveOptions
from omnilit.checkpoint.data_state import (
    DataState,
    LoadedDataState,
    capture_random,
    restore_random,
    seed_random,
)
from omnilit.checkpoint.save import DataRank, load_checkpoint, take_snapshot, write_snapshot
from omnilit.checkpoint.together import run_together
from omnilit.config import AcceleratorConfig
from omnilit.errors import ConfigError
from omnilit.kernels.batch_invariant import invariant_operators
from omnilit.kernels.machine import Machine
from omnilit.kernels.overrides import replace_operators
from omnilit.kernels.products import FLOAT32_PRODUCTS
from omnilit.logging import get_logger
from omnilit.models.sequence import layout_of
from omnilit.parallel import determinism
from omnilit.parallel.fsdp import set_gradient_sync, set_resharding
from omnilit.parallel.host_memory import keep_freed_blocks
from omnilit.parallel.materialize import move_unsharded
from omnilit.parallel.mesh import ParallelSizes, Topology
from omnilit.parallel.sequence import split_sequence
from omnilit.strategies.progress import ResumableData, read_place, resume_at, resume_loops
from omnilit.types import MicroBatch, StepWindow

log = get_logger(__name__)

NO_HASH_SEED = (
    "train.enable_full_determinism: PYTHONHASHSEED was not set when Python started, so what goes "
    "by the order of a set of strings may differ between runs; the command line sees to it"
)
WIDE_PRODUCTS = (
    "this CPU has no fast instructions for bfloat16: products of matrices are computed in float32 "
    "and rounded; with enable_compile those within a block are not, and param_dtype: auto takes "
    "float32 here for all"
)
INVARIANT_ROWS = (
    "train.enable_batch_invariant_mode: products, means and log-softmax are computed so that a "
    "sample's rows do not depend on what it is packed with; it costs speed"
)
META_KEYS = ("callbacks", "lr_schedulers", "loops", "omnilit", "pytorch-lightning_version")


class OmniStrategy(ModelParallelStrategy):
    """Builds the meshes of `train.accelerator` and saves and loads across them.

    Args:
        config: Sizes of the parallel axes, the process group's timeout, and how the module's
            model is sharded and in which precision.
    """

    def __init__(self, config: AcceleratorConfig = AcceleratorConfig()) -> None:
        super().__init__(
            data_parallel_size=1,
            tensor_parallel_size=1,
            timeout=timedelta(seconds=config.timeout_s),
        )
        self.config = config
        self.sizes = ParallelSizes.of(config)
        self._topology: Topology | None = None
        self._writer = BackgroundWriter(timeout_s=config.timeout_s)
        self._before: determinism.Settings | None = None
        self._undo_operators: Callable[[], None] | None = None

    @property
    def topology(self) -> Topology:
        """The meshes; there once the processes have met.

        Raises:
            RuntimeError: They have not met yet.
        """
        if self._topology is None:
            raise RuntimeError("the meshes are built when fit or validate starts")
        return self._topology

    @property
    @override
    def distributed_sampler_kwargs(self) -> dict[str, Any]:
        return {"num_replicas": self.topology.data_size, "rank": self.topology.data_rank}

    @override
    def setup_environment(self) -> None:
        if self._asks_for("enable_full_determinism") and self._before is None:
            self._before = determinism.make_deterministic()
            if not determinism.has_fixed_hashes():
                log.warning(NO_HASH_SEED)
        self._setup_distributed()
        if "OMP_NUM_THREADS" not in os.environ:  # cores shared out, else ranks fight for them
            torch.set_num_threads(max((os.cpu_count() or 1) // self.num_processes, 1))
        if self.root_device.type == "cpu":
            keep_freed_blocks()
        self._replace_operators()
        self._topology = Topology.build(self.sizes, self.root_device)
        assert self.lightning_module is not None
        self.lightning_module._device_mesh = self._topology.fsdp  # noqa: SLF001 - Lightning's own way

    @override
    def setup(self, trainer: Trainer) -> None:
        assert self.model is not None
        left = [n for n, p in self.model.named_parameters() if p.is_meta]
        if left:  # Lightning would fill them with whatever lies in memory
            raise ConfigError(
                key="model",
                problem=f"configure_model left {len(left)} parameters without values: {left[0]}",
                fix="call super().configure_model(), or fill every parameter there",
            )
        super().setup(trainer)

    @override
    def model_to_device(self) -> None:
        if not self.config.fsdp_config.offload:
            super().model_to_device()
            return
        assert self.model is not None
        move_unsharded(self.model, self.root_device)

    @override
    def teardown(self) -> None:  # after errors too
        try:
            self._writer.close()
            super().teardown()
        finally:
            if self._before is not None:
                determinism.restore(self._before)
                self._before = None
            if self._undo_operators is not None:
                self._undo_operators()
                self._undo_operators = None

    @override
    def batch_to_device(
        self, batch: Any, device: torch.device | None = None, dataloader_idx: int = 0
    ) -> Any:
        # split first: the other ranks' parts never move
        if isinstance(batch, MicroBatch):
            batch = self._own_part(batch)
        elif isinstance(batch, StepWindow):
            batch = StepWindow(tuple(map(self._own_part, batch)))
        return super().batch_to_device(batch, device, dataloader_idx)

    def _own_part(self, batch: MicroBatch) -> MicroBatch:
        topology, prepare = self.topology, getattr(self.lightning_module, "prepare_row", None)
        batch = batch if prepare is None else prepare(batch)
        return split_sequence(batch, layout_of(topology), topology.sequence_rank)

    def _asks_for(self, field: str) -> bool:
        """Whether a field of `train` is true; a module without such arguments has no say."""
        arguments = getattr(self.lightning_module, "train_arguments", None)
        return getattr(arguments, field, False)

    def _replace_operators(self) -> None:
        """Put our own in place of torch's operators, where the run wants that."""
        if self._undo_operators is not None:
            return
        operators, device = self._wide_products(), self.root_device.type
        if self._asks_for("enable_batch_invariant_mode"):
            log.info("%s", INVARIANT_ROWS)
            operators |= invariant_operators(device)
        if operators:
            key = "CPU" if device == "cpu" else "CUDA"
            self._undo_operators = replace_operators(operators, key)

    def _wide_products(self) -> dict[str, Callable[..., Any]]:
        mixed = self.config.fsdp_config.mixed_precision
        compute = mixed.param_dtype if mixed.enable else mixed.master_dtype
        dtypes = {compute, *getattr(self.lightning_module, "further_dtypes", ())}
        if self.root_device.type != "cpu" or "bfloat16" not in dtypes:
            return {}
        if Machine.detect("cpu").has_fast_bf16:
            return {}
        log.info("%s", WIDE_PRODUCTS)
        return dict(FLOAT32_PRODUCTS)

    @contextmanager
    def block_backward_sync(self) -> Generator[None, None, None]:
        """Lightning enters it for all but a step's last batch: there is nothing to reduce yet."""
        assert self.model is not None
        config = self.config.fsdp_config
        set_gradient_sync(self.model, is_on=config.sync_each_micro_batch)
        set_resharding(self.model, is_on=config.reshard_after_backward)
        try:
            yield
        finally:
            set_gradient_sync(self.model, is_on=True)
            set_resharding(self.model, is_on=True)

    @override
    def on_train_start(self) -> None:
        super().on_train_start()
        trainer = self._trainer
        keeps_gathered = not self.config.fsdp_config.reshard_after_backward
        if keeps_gathered and trainer.accumulate_grad_batches == 1:
            log.info(
                "reshard_after_backward: false keeps parameters from one micro-batch of a step to "
                "the next, and a step of this run has one: nothing is kept"
            )
        loader, limit = trainer.fit_loop._combined_loader, trainer.limit_train_batches  # noqa: SLF001
        if loader is not None and isinstance(limit, float) and limit == 1.0:
            # No limit was asked for, but Lightning cuts every epoch to the first one's length
            loader.limits = None

    # Checkpoints: the tensors go to and come from disk here, never through Lightning's dict

    @override
    def lightning_module_state_dict(self) -> dict[str, Any]:
        return {}

    @override
    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        return {}

    @override
    def save_checkpoint(
        self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: Any = None
    ) -> None:
        options = SaveOptions() if storage_options is None else storage_options
        if not isinstance(options, SaveOptions):
            raise TypeError(f"storage_options are SaveOptions, not {type(options).__name__}")
        self.finish_save()
        trainer, topology = self._trainer, self.topology
        if "lr_schedulers" not in checkpoint:
            raise ConfigError(
                key="trainer.callbacks",
                problem="a checkpoint of weights alone was asked for, and they are saved whole",
                fix="leave out save_weights_only; the export of a checkpoint holds weights alone",
            )
        final = Path(filepath)
        meta = {key: checkpoint[key] for key in META_KEYS if key in checkpoint}
        meta["position"] = read_place(checkpoint["loops"], step=trainer.global_step)
        snapshot = take_snapshot(
            models=self._models(),
            optimizers=self._named_optimizers(),
            meta=meta,
            data=DataState(self._data_position(checkpoint), capture_random(topology.device)),
            data_rank=self._data_rank(),
            files=self._config_files(final),
        )
        if not options.is_background:
            write_snapshot(final, snapshot, keep_last=options.keep_last)
            return
        copied = run_together(snapshot.copied, name="copying the checkpoint")  # or out of memory
        assert copied is not None
        self._writer.start(final, copied, keep_last=options.keep_last)

    def check_save(self) -> None:
        """Raise on all ranks where the checkpoint being written in the background has failed."""
        self._writer.check(self.topology.device)

    def finish_save(self) -> None:
        """Wait for the checkpoint being written in the background; raise where it failed."""
        self._writer.finish()

    @override
    def on_exception(self, exception: BaseException) -> None:
        self._writer.close()  # a whole checkpoint is worth the wait

    @override
    def load_checkpoint(
        self, checkpoint_path: str | Path, weights_only: bool | None = None
    ) -> dict[str, Any]:
        trainer = self._trainer
        is_fit = trainer.state.fn == TrainerFn.FITTING
        loaded = load_checkpoint(
            Path(checkpoint_path),
            models=self._models(),
            optimizers=self._named_optimizers() if is_fit else {},
            data_rank=self._data_rank(),
            stages=self.topology.stages,
        )
        checkpoint = {key: loaded.meta[key] for key in META_KEYS if key in loaded.meta}
        checkpoint["state_dict"] = {}
        if is_fit:
            self._resume(checkpoint, loaded.meta, loaded.data)
        return checkpoint

    def _resume(
        self, checkpoint: dict[str, Any], meta: Mapping[str, Any], data: LoadedDataState
    ) -> None:
        """Put loops, loader and random states where the run was."""
        trainer, topology = self._trainer, self.topology
        step, epoch = meta["position"]["step"], meta["position"]["epoch"]
        datamodule = _datamodule(trainer)
        if isinstance(datamodule, ResumableData):
            # first of all: only the loader knows what is left of the epoch
            datamodule.load_state_dicts(data.loaders)
            position = resume_at(step=step, epoch=epoch, steps=datamodule.epoch_steps)
            checkpoint["loops"] = resume_loops(
                checkpoint["loops"], position, accumulation=trainer.accumulate_grad_batches
            )
            epoch = position.epoch
        elif datamodule is not None:
            checkpoint[type(datamodule).__qualname__] = dict(data.loaders[0])
        checkpoint["epoch"], checkpoint["global_step"] = epoch, step
        if data.random is not None:
            restore_random(data.random, topology.device)
        else:
            seed = getattr(getattr(trainer.lightning_module, "train_arguments", None), "seed", 0)
            seed_random(seed=seed, step=step, data_rank=topology.data_rank)

    @property
    def _trainer(self) -> Trainer:
        assert self.lightning_module is not None
        return self.lightning_module.trainer

    def _models(self) -> dict[str, nn.Module]:
        """The models to save, by name: a module's own children that have parameters."""
        assert self.lightning_module is not None
        children = self.lightning_module.named_children()
        return {name: child for name, child in children if any(True for _ in child.parameters())}

    def _named_optimizers(self) -> dict[str, Optimizer]:
        plain = [o.optimizer if isinstance(o, LightningOptimizer) else o for o in self.optimizers]
        return {f"optimizer_{index}": optimizer for index, optimizer in enumerate(plain)}

    def _data_rank(self) -> DataRank:
        topology = self.topology
        return DataRank(topology.data_rank, topology.data_size, topology.is_first_of_data)

    def _data_position(self, checkpoint: Mapping[str, Any]) -> Mapping[str, Any]:
        datamodule = _datamodule(self._trainer)
        name = type(datamodule).__qualname__ if datamodule is not None else ""
        return checkpoint.get(name, {})

    def _config_files(self, folder: Path) -> dict[str, str]:
        """The run's two configuration files, where the command line wrote them."""
        run = folder.parent.parent
        names = ("config.yaml", "config.resolved.yaml")
        return {n: (run / n).read_text(encoding="utf-8") for n in names if (run / n).is_file()}


def _datamodule(trainer: Trainer) -> object | None:
    return getattr(trainer, "datamodule", None)

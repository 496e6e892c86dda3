"""What a run reads, tokenised once by one process and opened by all."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from transformers import PreTrainedTokenizerBase

from omnilit.data.cache import TokenDataset, open_prepared
from omnilit.data.media.processor import MediaProcessor
from omnilit.data.multisource import Mixture, SourceSpec
from omnilit.data.prepare import PreparedInfo, PrepareRequest, prepare
from omnilit.data.quarantine import BadRecord, Skipping
from omnilit.data.transforms import TransformSettings
from omnilit.modules.data_requests import find_mixture, prepare_requests
from omnilit.parallel.collectives import run_on_first


@dataclass(frozen=True)
class Preparation:
    """The sources of a run and what was made of them.

    Args:
        paths: What `train` and `eval` read; None for nothing.
        transform: How records become samples.
        datasets_type: `mapping`, `iterable`, or a reader of the user's own.
        source_name: Name of the one source in metrics.
        silent_exception: Skip bad records.
        max_bad_fraction: Share of them that stops all the same.
        on_bad: Is given what was skipped.
        infos: What was prepared so far, by its name in the table of the start.
    """

    paths: Mapping[str, str | None]
    transform: TransformSettings
    datasets_type: str
    source_name: str | None
    silent_exception: bool
    max_bad_fraction: float
    on_bad: Callable[[Sequence[BadRecord]], None]
    infos: dict[str, PreparedInfo] = field(default_factory=dict)
    _datasets: dict[str, list[TokenDataset]] = field(default_factory=dict)

    @cached_property
    def mixture(self) -> Mixture | None:
        """The mixture that is trained on; None where there is one source.

        Raises:
            ConfigError: Everything that is wrong with its file.
        """
        return find_mixture(self._path("train"), key="data.train_path")

    @property
    def skipping(self) -> Skipping:
        """What becomes of records that are found to be bad while training."""
        return Skipping(self.on_bad, self.max_bad_fraction)

    @property
    def sources(self) -> Mixture:
        """What is trained on, as a mixture of one where there is one source."""
        return self.mixture or Mixture((self._only_source("train"),))

    @property
    def source_names(self) -> tuple[str, ...]:
        """Names of the sources to count tokens of; none where there is one without a name."""
        mixture = self.mixture
        if mixture is not None:
            return mixture.names
        return (self.source_name,) if self.source_name else ()

    def requests(self, name: str) -> list[PrepareRequest]:
        """What to prepare for `train` or `eval`, one a source.

        Raises:
            ConfigError: Every source that does not exist or holds no data.
        """
        mixture = self.mixture if name == "train" else None
        return prepare_requests(
            mixture.sources if mixture else (self._only_source(name),),
            self.transform,
            key=f"data.{name}_path",
            mixture_file=self._path(name) if mixture else None,
            datasets_type=self.datasets_type,
            silent_exception=self.silent_exception,
            max_bad_fraction=self.max_bad_fraction,
        )

    def prepare(
        self,
        name: str,
        tokenizer: PreTrainedTokenizerBase,
        media: MediaProcessor | None = None,
    ) -> list[TokenDataset]:
        """Tokenise on rank 0 only, into a cache on a file system that all ranks share.

        Args:
            name: `train` or `eval`.
            tokenizer: The model's.
            media: Of a model that takes images, videos or sounds.

        Raises:
            DataError: A record cannot be used, see `data.prepare.prepare`; on all ranks.
            ConfigError: A source, the tokenizer or the template cannot be used; likewise.
        """
        if name in self._datasets:
            return self._datasets[name]

        def prepare_all() -> list[PreparedInfo]:
            requests = self.requests(name)
            return [prepare(one, tokenizer, media=media, on_bad=self.on_bad) for one in requests]

        infos = run_on_first(prepare_all, name=f"prepare/{name}")
        self.infos.update({_part_name(name, info["source"]): info for info in infos})
        found = [open_prepared(info["path"], info["source"], info["files"]) for info in infos]
        self._datasets[name] = found
        return found

    @property
    def datasets(self) -> list[TokenDataset]:
        """All that was prepared so far."""
        return [dataset for found in self._datasets.values() for dataset in found]

    def _only_source(self, name: str) -> SourceSpec:
        own = self.source_name if name == "train" else None
        return SourceSpec(own or name, self._path(name))

    def _path(self, name: str) -> str:
        path = self.paths[name]
        assert path is not None, f"asked for what data.{name}_path does not give"
        return path


def _part_name(name: str, source: str) -> str:
    """What a source of the training or evaluation data is called in the table."""
    return name if source == name else f"{name}/{source}"

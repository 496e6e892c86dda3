"""A transform, a collator and a template of a user's own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from omnilit.data.collate import CollateSettings, collate
from omnilit.data.transforms import Outcome, TransformSettings
from omnilit.types import MicroBatch, Record, Sample

TEMPLATE = (
    "{% for m in messages %}{{ m.role }}> "
    "{% generation %}{{ m.content }}{{ eos_token }}{% endgeneration %}{% endfor %}"
)


class Backwards:
    """The letters of each text in reverse order, as the ids of their bytes."""

    template = None

    def __init__(self, settings: TransformSettings, tokenizer: Any) -> None:
        self.settings = settings

    def fingerprint(self) -> str:
        return "backwards-1"

    def encode(self, records: Sequence[Record]) -> Outcome:
        samples = []
        for record in records:
            text = str(record.fields["text"])[::-1].encode()
            ids = np.frombuffer(text, np.uint8).astype(np.int32)[: self.settings.max_seq_len]
            samples.append(Sample(ids, ids, record.origin))
        return Outcome(samples)

    def check(self, record: Record) -> None:
        """Nothing to see."""


class Faulty(Backwards):
    """Gives what the settings' template names, to see what is refused."""

    def encode(self, records: Sequence[Record]) -> Outcome:
        (sample,) = super().encode(records).samples
        ids, origin = sample.input_ids, sample.origin
        ones: Any = np.ones(len(ids))
        wide: Any = ids.astype(np.int64)
        return {
            "type": lambda: Outcome([ids]),  # type: ignore[list-item]
            "dtype": lambda: Outcome([Sample(wide, ids, origin)]),
            "empty": lambda: Outcome([Sample(ids[:0], ids[:0], origin)]),
            "long": lambda: Outcome([Sample(np.repeat(ids, 99), np.repeat(ids, 99), origin)]),
            "weights": lambda: Outcome([Sample(ids, ids, origin, ones)]),
            "labels": lambda: Outcome([Sample(ids, np.roll(ids, 1), origin)]),
        }[self.settings.chat_template]()


def longest_first(samples: Sequence[Sample], settings: CollateSettings) -> MicroBatch:
    """The samples of a micro-batch by their length."""
    return collate(sorted(samples, key=len, reverse=True), settings)


def nothing(samples: Sequence[Sample], settings: CollateSettings) -> None:
    """What is no micro-batch."""

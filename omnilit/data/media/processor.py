"""A model's own processor of transformers: what it writes for a medium, and makes of it."""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from omnilit.config.media import KEY as DATA_KEY
from omnilit.config.media import MediaConfig
from omnilit.data.media.bounds import FORMULAS, PixelBounds, find_bounds
from omnilit.errors import ConfigError
from omnilit.types import MODALITIES

if TYPE_CHECKING:
    from PIL import Image
    from transformers import ProcessorMixin

KEY: Final = "model.tokenizer_path"
FILES: Final = ("processor_config.json", "preprocessor_config.json")
PARTS: Final = {
    "image": ("image_processor",),
    "video": ("video_processor",),
    "audio": ("feature_extractor", "audio_processor"),
}
OFFSETS: Final = "text_replacement_offsets"
ASKED: Final = {f"return_{OFFSETS}": True, "return_tensors": "pt"}
TYPES: Final = ("mm_token_type_ids", "token_type_ids")  # which tokens are of which kind
TEXT: Final = frozenset({"input_ids", "attention_mask", OFFSETS, *TYPES})
INTERLEAVE: Final = "replace_video_with_audio_token"  # of processors that hear videos, and ...
LOAD_SOUND: Final = "load_audio_from_video"  # ... what these are told
SOUND_OF: Final = "video_to_audio_indices"
PACE: Final = ("seconds_per_chunk", "position_id_per_seconds")
SECONDS: Final = "video_second_per_grid"  # what omni models are told of videos
# How processors name the tokens around a medium
AROUND: Final = ("vision", "image", "video", "audio")
SIDES: Final = (("start", "bos"), ("end", "eos"))  # in front and behind
CAP: Final = "cap_pixels_per_frame"
PROBES: Final = ((64, 96), (333, 151))  # heights and widths that a formula is tried with


class Clip(NamedTuple):
    """The frames that are taken of a video.

    Args:
        size: Height and width of each.
        indices: Which frames of the video they are.
        fps: Frames of the video a second.
        total: Frames of the video.
    """

    size: tuple[int, int]
    indices: tuple[int, ...]
    fps: float
    total: int

    @classmethod
    def of_plan(cls, plan: Mapping[str, Any]) -> Clip:
        """What was planned of a video when its text was written, read from JSON."""
        height, width = plan["size"]
        return cls((height, width), tuple(plan["indices"]), plan["fps"], plan["total"])


class Decoded(NamedTuple):
    """What was read of the media of a micro-batch, in the order of their places.

    Args:
        kinds: Of each medium.
        images: Of the kind `image`.
        videos: Frames of each video, uint8 [F, 3, H, W].
        clips: Where these come from.
        sounds: Samples of each, float32 [S].
        sources: Of each of these the number of the video that it belongs to, None for a sound of
            its own.
    """

    kinds: list[str]
    images: list[Image.Image]
    videos: list[Tensor]
    clips: list[Clip]
    sounds: list[npt.NDArray[np.float32]]
    sources: list[int | None]


@dataclass(frozen=True)
class MediaProcessor:
    """A processor, and how media are prepared for it.

    What it writes for a medium is asked of the processor itself, with a blank one of the same
    size, and remembered. Where the processor has a formula for the number of places and that
    agrees with what it does, the formula is asked.

    Args:
        processor: Of transformers.
        config: `mm_configs`.
    """

    processor: ProcessorMixin
    config: MediaConfig = field(default_factory=MediaConfig)
    _texts: dict[object, str] = field(default_factory=dict)

    def __getstate__(self) -> dict[str, Any]:
        """Without what is remembered."""
        return {"processor": self.processor, "config": self.config, "_texts": {}}

    @cached_property
    def tokens(self) -> dict[str, str]:
        """The token that stands for each kind of medium that the model takes."""
        found = {}
        for kind in MODALITIES:
            token = getattr(self.processor, f"{kind}_token", None)
            if isinstance(token, str) and self._part(kind) is not None:
                found[kind] = token
        return found

    @cached_property
    def places(self) -> dict[str, list[int]]:
        """The ids of the tokens that a medium of each kind takes the places of."""
        found = {kind: getattr(self.processor, f"{kind}_token_ids", []) for kind in self.tokens}
        return {kind: [i for i in ids if i is not None] for kind, ids in found.items()}

    @cached_property
    def edges(self) -> tuple[frozenset[int], frozenset[int]]:
        """The ids of the tokens that stand in front of a medium, and behind it."""
        before, behind = (self._find_edges(sides) for sides in SIDES)
        return before, behind

    def _find_edges(self, sides: Sequence[str]) -> frozenset[int]:
        tokenizer: Any = self.processor.tokenizer
        names = [f"{what}_{side}_token" for what in AROUND for side in sides]
        texts = [getattr(one, name, None) for one in (self.processor, tokenizer) for name in names]
        named = [text for text in texts if isinstance(text, str)]
        return frozenset(tokenizer.convert_tokens_to_ids(named))

    @property
    def sample_rate(self) -> int:
        """Samples a second of sounds."""
        return self.config.sample_rate

    @property
    def least_frames(self) -> int:
        """Frames that a video must have."""
        return int(getattr(self._part("video"), "temporal_patch_size", 1))

    @cached_property
    def bounds(self) -> dict[str, PixelBounds]:
        """How many pixels the processor gives images and videos, where it says so."""
        found = {k: find_bounds(self.processor, self._part(k), k, self.config) for k in FORMULAS}
        return {kind: bounds for kind, bounds in found.items() if bounds is not None}

    @cached_property
    def types_name(self) -> str | None:
        """What the model calls the kinds of its tokens, where it is told them."""
        text = "".join(self.tokens.values()) and self._blank_image((64, 64))
        return next((name for name in TYPES if text and name in text), None)

    def fingerprint(self) -> str:
        """Another text where the same media have other places."""
        settings = json.dumps(self.processor.to_dict(), sort_keys=True, default=str)
        yielding = {kind: one.size() for kind, one in self.bounds.items() if one.gives_way}
        whole = f"{settings} {self.config} {yielding}"
        return hashlib.blake2b(whole.encode(), digest_size=16).hexdigest()

    def count_places(self, text: str) -> int:
        """Tokens of a text that are places of media."""
        tokenizer: Any = self.processor.tokenizer
        ids = np.asarray(tokenizer(text, add_special_tokens=False)["input_ids"])
        return int(self.is_place(ids).sum())

    def is_place(self, ids: npt.NDArray[Any]) -> npt.NDArray[np.bool_]:
        """Which tokens are places of media; shape of `ids`."""
        return np.isin(ids, [one for ids in self.places.values() for one in ids])

    def token_types(self, ids: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """0 for text, else the kind of each token, as transformers counts them; shape of `ids`."""
        return np.asarray(self.processor.create_mm_token_type_ids([ids.tolist()])[0], np.int64)

    def write_image(self, size: tuple[int, int]) -> str:
        """What stands in the text for an image.

        Args:
            size: Its height and width, as `mm_configs` leave it.

        Raises:
            ValueError: The processor takes no such image.
        """
        key = ("image", size)
        if key not in self._texts:
            if self._has_image_formula:
                self._texts[key] = self.tokens["image"] * self._count_image(size)
            else:
                self._texts[key] = _replacement(self._blank_image(size))
        return self._texts[key]

    @property
    def hears_videos(self) -> bool:
        """Whether it takes the sound of a video with it."""
        from transformers.processing_utils import OmniModalProcessorMixin as Base

        own = getattr(type(self.processor), INTERLEAVE, None)
        return own is not None and own is not getattr(Base, INTERLEAVE)

    def write_video(self, clip: Clip, num_samples: int = 0) -> str:
        """What stands in the text for a video.

        Args:
            clip: The frames that are taken.
            num_samples: Of its sound, where that is taken, too.

        Raises:
            ValueError: The processor takes no such video.
        """
        if not self._has_video_formula:
            return _replacement(self._blank_video(clip, num_samples))
        return self._write_clip(clip, num_samples)

    def write_sound(self, num_samples: int) -> str:
        """What stands in the text for a sound; raises as `write_image`."""
        extractor = self._part("audio")
        hop = int(getattr(extractor, "hop_length", 1))
        key = ("audio", num_samples // hop)
        if key not in self._texts:
            blank = np.zeros(num_samples, np.float32)
            self._texts[key] = _replacement(self._call("audio", audio=[blank]))
        return self._texts[key]

    def process(self, media: Decoded) -> tuple[dict[str, Tensor], list[str]]:
        """What a model takes of media, and what stands in the text for each.

        Returns:
            Tensors under the names of the model's `forward`, and the texts in the order of
            the places.

        Raises:
            ValueError: The processor takes no such media.
        """
        given: dict[str, Any] = {}
        if media.images:
            given["images"] = media.images
        if media.videos:
            given |= {"videos": media.videos, **_describe(media.clips)}
        if media.sounds:
            given |= {"audio": media.sounds}
        if any(source is not None for source in media.sources):
            given |= _from_videos(media.sources)
        text = "".join(self.tokens[kind] for kind in media.kinds)
        found = self._run(text, given)
        tensors = {
            name: value
            for name, value in found.items()
            if name not in TEXT and isinstance(value, Tensor)
        }
        if SECONDS in tensors:  # of all videos alike, and of frames at a rate of its own
            tensors[SECONDS] = torch.tensor([self._seconds(clip) for clip in media.clips])
        return tensors, [one["replacement"] for one in found[OFFSETS][0]]

    def _seconds(self, clip: Clip) -> float:
        """The time that a step of a video stands for, as Qwen2.5-VL's processor counts it."""
        return self.least_frames * clip.total / (len(clip.indices) * clip.fps)

    @cached_property
    def _has_image_formula(self) -> bool:
        """Whether images are so many tokens as the processor's formula says, and nothing more."""
        part = self._part("image")
        if not hasattr(part, FORMULAS["image"]) or not hasattr(part, "merge_size"):
            return False
        token = self.tokens["image"]
        return all(
            _replacement(self._blank_image(size)) == token * self._count_image(size)
            for size in PROBES
        )

    @cached_property
    def _has_video_formula(self) -> bool:
        """The same of videos, whose text the processor writes from the numbers of patches."""
        part = self._part("video")
        formula = getattr(part, FORMULAS["video"], None)
        if formula is None or not hasattr(part, "merge_size"):
            return False
        if getattr(part, CAP, False) and CAP not in inspect.getsource(formula):
            return False  # with many frames, which are too many to try, it would be wrong
        clips = [Clip(size, (0, 2, 4, 6), 8.0, 9) for size in PROBES]
        sounds = (0, 5 * self.sample_rate // 2) if self.hears_videos else (0,)
        return all(
            _replacement(self._blank_video(one, sound)) == self._write_clip(one, sound)
            for one in clips
            for sound in sounds
        )

    def _count_image(self, size: tuple[int, int]) -> int:
        part = self._part("image")
        bounds = self.bounds.get("image")
        if bounds is None:
            return int(part.get_number_of_image_patches(*size, {})) // part.merge_size**2
        return bounds.count_patches(size) // part.merge_size**2

    def _write_clip(self, clip: Clip, num_samples: int) -> str:
        part: Any = self._part("video")
        frames = len(clip.indices)
        steps, bounds = -(-frames // part.temporal_patch_size), self.bounds.get("video")
        if bounds is None:
            patches = int(part.get_num_of_video_patches(frames, *clip.size, {}))
        else:
            patches = bounds.count_patches(clip.size, frames)
        # of this many patches; places in turn with a sound are counted by rows and columns
        rows = part.merge_size
        grid = torch.tensor([[steps, rows, patches // (steps * rows)]])
        inputs = {"video_grid_thw": grid, SECONDS: [self._seconds(clip)], **_describe([clip])}
        kwargs: dict[str, Any] = {LOAD_SOUND: bool(num_samples)}  # what omni models ask for
        if num_samples:
            number = self.write_sound(num_samples).count(self.tokens["audio"])
            kwargs |= {name: getattr(self.processor, name) for name in PACE}
            kwargs |= {"processed_audio": {"num_audio_tokens": [number]}, SOUND_OF: [0]}
        return self.processor.replace_video_token(inputs, 0, **kwargs)

    def _blank_image(self, size: tuple[int, int]) -> Mapping[str, Any]:
        from PIL import Image

        return self._call("image", images=[Image.new("RGB", (size[1], size[0]))])

    def _blank_video(self, clip: Clip, num_samples: int) -> Mapping[str, Any]:
        frames = torch.zeros(len(clip.indices), 3, *clip.size, dtype=torch.uint8)
        given = {"videos": [frames], **_describe([clip])}
        if num_samples:
            given |= {"audio": [np.zeros(num_samples, np.float32)], **_from_videos([0])}
            given |= {"fps": self.least_frames / self._seconds(clip)}
        return self._call("video", **given)

    def _call(self, kind: str, **given: Any) -> Mapping[str, Any]:
        return self._run(self.tokens[kind], given)

    def _run(self, text: str, given: dict[str, Any]) -> Mapping[str, Any]:
        processor: Any = self.processor
        if "videos" in given:
            given["do_sample_frames"] = False
        for kind, bounds in self.bounds.items():
            if f"{kind}s" in given and bounds.gives_way:
                given[f"{kind}s_kwargs"] = {"size": bounds.size()}
        if "audio" in given:
            given["sampling_rate"] = self.sample_rate
        found = processor(text=[text], **ASKED, **given)
        if OFFSETS not in found:
            raise ConfigError(
                key=KEY,
                problem=f"{type(processor).__name__} does not say what it writes for a medium",
                fix="use a model whose processor follows transformers' conventions",
            )
        return found

    def _part(self, kind: str) -> Any:
        names = PARTS[kind]
        return next((p for n in names if (p := getattr(self.processor, n, None))), None)


def find_processor(
    path: str, *, trust_remote_code: bool = False, key: str = KEY
) -> ProcessorMixin | None:
    """The processor beside a tokenizer; None where its folder holds none.

    Args:
        path: A folder, or a model of the hub.
        trust_remote_code: Whether Python code beside it may run.
        key: The setting that names `path`.

    Raises:
        ConfigError: It cannot be loaded.
    """
    folder = Path(path).expanduser()
    if folder.is_dir() and not any((folder / name).is_file() for name in FILES):
        return None
    return load_processor(path, trust_remote_code=trust_remote_code, key=key)


def load_processor(path: str, *, trust_remote_code: bool = False, key: str = KEY) -> ProcessorMixin:
    """The processor of a folder or a model of the hub; arguments as `find_processor`'s.

    Raises:
        ConfigError: There is none, or a package is missing that it needs.
    """
    from transformers import AutoProcessor, ProcessorMixin

    try:
        found = AutoProcessor.from_pretrained(path, trust_remote_code=trust_remote_code)
    except (ImportError, OSError, ValueError, AttributeError) as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ConfigError(
            key=key,
            problem=f"no processor can be loaded from {path} ({first})",
            fix="give a folder with processor_config.json; pip install omnilit[vlm] brings what "
            "processors need",
        ) from error
    if not isinstance(found, ProcessorMixin):
        raise ConfigError(
            key=key,
            problem=f"{path} holds a {type(found).__name__}, which takes no images",
            fix="give a folder with the processor of the model",
        )
    return found


def hearing_rate(processor: ProcessorMixin) -> int | None:
    """Samples a second of the sounds that a model hears; None of one that hears none."""
    extractor = getattr(processor, "feature_extractor", None)
    return getattr(extractor, "sampling_rate", None)


def check_hearing(media: MediaProcessor, key: str = DATA_KEY) -> None:
    """See that sounds are brought to what the model hears, and those of videos heard at all.

    Args:
        media: To be seen through.
        key: The field that its settings come from.

    Raises:
        ConfigError: These say otherwise.
    """
    if media.config.use_audio_in_video and not media.hears_videos:
        raise ConfigError(
            key=f"{key}.use_audio_in_video",
            problem=f"{type(media.processor).__name__} takes no sound with a video",
            fix="leave it out, or train a model that hears and sees, such as Qwen2.5-Omni",
        )
    rate = hearing_rate(media.processor)
    if rate is None or rate == media.sample_rate:
        return
    raise ConfigError(
        key=f"{key}.sample_rate",
        problem=f"{media.sample_rate} samples a second, where the model hears {rate}",
        fix=f"give {rate}",
    )


def _describe(clips: Sequence[Clip]) -> dict[str, Any]:
    from transformers.video_utils import VideoMetadata

    return {
        "video_metadata": [
            VideoMetadata(
                total_num_frames=clip.total,
                fps=clip.fps,
                height=clip.size[0],
                width=clip.size[1],
                frames_indices=list(clip.indices),
            )
            for clip in clips
        ]
    }


def _from_videos(sources: Sequence[int | None]) -> dict[str, Any]:
    return {LOAD_SOUND: True, "audio_from_video_indices": sources}


def _replacement(found: Mapping[str, Any]) -> str:
    ((only,),) = found[OFFSETS]
    return only["replacement"]

"""Gated linear attention: references of three slots, which respect the bounds of packing."""

# T packed tokens, C channels, W width of the convolution, N value heads, K key heads,
# R value heads of a key head, D key dim, V value dim, G chunks of L tokens

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import torch
from torch import Tensor
from torch.nn.functional import conv1d, pad, silu

CHUNK: Final = 64  # tokens that are solved for together
NORM_EPS: Final = (
    1e-6  # added to the squared length of queries and keys, as in transformers and fla
)


def rms_norm_gated(x: Tensor, gate: Tensor, weight: Tensor, *, eps: float) -> Tensor:
    """RMSNorm of `x` times the SiLU of `gate`, both [..., D]; statistics and gate in float32."""
    wide = x.float()
    normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return ((weight * normed.to(x.dtype)) * silu(gate.float())).to(x.dtype)


def causal_conv1d(
    x_TC: Tensor, weight_CW: Tensor, bias_C: Tensor | None, *, bounds: Sequence[int]
) -> Tensor:
    """Convolve each channel with its past, never across a bound, then apply SiLU.

    The segments are laid out with W - 1 zeros before each, and convolved in one go.

    Args:
        x_TC: Packed tokens [T, C].
        weight_CW: One filter a channel [C, W]; the last tap meets the token itself.
        bias_C: [C], or None.
        bounds: Ends of the segments, [0, ..., T].

    Returns:
        Shape [T, C].
    """
    num_tokens, (num_channels, width) = len(x_TC), weight_CW.shape
    gap, num_segments = width - 1, len(bounds) - 1
    place = torch.arange(num_tokens) + gap * (_segment_of_tokens(bounds) + 1)
    place = place.to(x_TC.device)
    spaced = x_TC.new_zeros(num_tokens + gap * num_segments, num_channels)
    spaced = spaced.index_copy(0, place, x_TC).to(weight_CW.dtype)
    out = conv1d(spaced.t()[None], weight_CW[:, None], bias_C, groups=num_channels)[0].t()
    return silu(out[place - gap]).to(x_TC.dtype)


def chunk_gated_delta_rule(
    q_TKD: Tensor,
    k_TKD: Tensor,
    v_TNV: Tensor,
    log_decay_TN: Tensor,
    beta_TN: Tensor,
    *,
    bounds: Sequence[int],
) -> Tensor:
    """The gated delta rule chunk by chunk, its state set to zero at every bound.

    The state S [N, D, V] decays, is corrected towards the value at the key, and is read at the
    query: S <- exp(g) S; S <- S + k (beta (v - k S)); out = q S. Queries and keys are
    normalised, queries scaled by D ** -0.5.

    Within a chunk the corrections are the solution of a triangular system. Chunks are cut without
    regard to bounds: tokens of different segments do not see each other, and a token reads the
    state from before its chunk only where its segment began before it.

    Args:
        q_TKD: Queries [T, K, D].
        k_TKD: Keys [T, K, D].
        v_TNV: Values [T, N, V]; each key head serves N / K of their heads.
        log_decay_TN: Logarithm of the decay, at most 0, [T, N].
        beta_TN: How much of the correction is written, [T, N].
        bounds: Ends of the segments, [0, ..., T].

    Returns:
        Shape [T, N, V], in the dtype of the values.

    Source: Gated Delta Networks, arXiv 2412.06464, section 3.3.
    """
    num_tokens, num_heads, value_dim = v_TNV.shape
    size, num_keys = min(CHUNK, num_tokens), k_TKD.shape[1]
    grid = _Grid.of(bounds, size, v_TNV.device)
    q, k, v, decay, beta = (
        _cut(x.float(), size) for x in (q_TKD, k_TKD, v_TNV, log_decay_TN, beta_TN)
    )
    q, k = (x * torch.rsqrt(x.square().sum(-1, keepdim=True) + NORM_EPS) for x in (q, k))
    q = q * q.shape[-1] ** -0.5
    by_key = (num_keys, num_heads // num_keys)
    q, k = (x.transpose(1, 2).unsqueeze(2) for x in (q, k))  # [G, K, 1, L, D]
    v = v.transpose(1, 2).unflatten(1, by_key)  # [G, K, R, L, V]
    decay, beta = (x.transpose(1, 2).unflatten(1, by_key) for x in (decay, beta))  # [G, K, R, L]

    reach = grid.accumulate(decay)
    between = (reach.unsqueeze(-1) - reach.unsqueeze(-2)).masked_fill(~grid.sees, -torch.inf).exp()
    keys_LL = k @ k.transpose(-1, -2)
    system = keys_LL * between * beta.unsqueeze(-1)
    carried = (
        reach.exp() * grid.reads_state
    )  # what a token still sees of the state before its chunk
    wanted = torch.cat((v, k * carried.unsqueeze(-1)), -1) * beta.unsqueeze(-1)
    solved = torch.linalg.solve_triangular(system, wanted, upper=False, unitriangular=True)
    corrections, of_state = solved.split((value_dim, k.shape[-1]), -1)
    scores = (q @ k.transpose(-1, -2)) * between
    out = _scan(
        corrections,
        of_state,
        scores,
        q * carried.unsqueeze(-1),
        k * between[..., -1, :].unsqueeze(-1),  # what the chunk's end still sees of a token
        carried[..., -1],
    )
    return out.flatten(1, 2).transpose(1, 2).flatten(0, 1)[:num_tokens].to(v_TNV.dtype)


def _scan(
    corrections: Tensor,
    of_state: Tensor,
    scores: Tensor,
    queries: Tensor,
    keys: Tensor,
    kept: Tensor,
) -> Tensor:
    """Carry the state from chunk to chunk.

    Args:
        corrections: What each token writes after a state of zero, [G, K, R, L, V].
        of_state: How much less it writes for what the state holds already, [G, K, R, L, D].
        scores: Of queries and keys in a chunk, [G, K, R, L, L].
        queries: Into the state from before the chunk, [G, K, R, L, D].
        keys: Into the state after the chunk, [G, K, R, L, D].
        kept: Share of the state that outlives the chunk, [G, K, R].

    Returns:
        Shape [G, K, R, L, V].
    """
    by_key, (key_dim, value_dim) = corrections.shape[1:3], (keys.shape[-1], corrections.shape[-1])
    state = keys.new_zeros(*by_key, key_dim, value_dim)
    reads, written = [], []
    for number in range(len(corrections)):
        reads.append(queries[number] @ state)
        written.append(corrections[number] - of_state[number] @ state)
        update = keys[number].transpose(-1, -2) @ written[-1]
        state = state * kept[number][..., None, None] + update
    return torch.stack(reads) + scores @ torch.stack(written)


class _Grid:
    """Which tokens of a chunk belong together.

    Attributes:
        sees: Token and earlier token of one segment, or the token itself, [G, 1, 1, L, L].
        reads_state: Tokens whose segment began before their chunk, as 0 and 1, [G, 1, 1, L].
    """

    def __init__(self, segments: Tensor, start: Tensor, reads_state: Tensor) -> None:
        same = segments.unsqueeze(-1) == segments.unsqueeze(-2)
        self.sees = same.tril()[:, None, None]
        self.reads_state = reads_state[:, None, None]
        self._start = start[:, None, None]

    @classmethod
    def of(cls, bounds: Sequence[int], size: int, device: torch.device) -> _Grid:
        """Read the bounds; what fills the last chunk is a segment of its own."""
        num_tokens = bounds[-1]
        filling = -num_tokens % size
        whole = [*bounds, num_tokens + filling] if filling else bounds
        segments = _segment_of_tokens(whole).view(-1, size)
        places = torch.arange(segments.numel()).view(-1, size)
        start = (torch.tensor(whole)[segments] - places[:, :1]).clamp(min=0)
        began = torch.tensor(whole)[segments] < places[:, :1]
        return cls(*(x.to(device) for x in (segments, start, began)))

    def accumulate(self, log_decay: Tensor) -> Tensor:
        """Sums from the first token of the segment, or of the chunk, to each token, [G, K, R, L].

        In float64, so that what was summed before a bound costs no accuracy behind it.
        """
        total = log_decay.double().cumsum(-1)
        before = pad(total, (1, 0)).gather(-1, self._start.expand(total.shape))
        return (total - before).to(log_decay.dtype)


def _segment_of_tokens(bounds: Sequence[int]) -> Tensor:
    """Number of the segment of every token, int64 [T] on the CPU."""
    lengths = torch.tensor(bounds).diff()
    return torch.arange(len(lengths)).repeat_interleave(lengths)


def _cut(x: Tensor, size: int) -> Tensor:
    """Chunks of `size` tokens, [G, L, ...], the last one filled up with zeros."""
    filling = -len(x) % size
    return pad(x, (0, 0) * (x.ndim - 1) + (0, filling)).unflatten(0, (-1, size))

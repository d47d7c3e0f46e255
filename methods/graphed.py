"""Decoding on a CUDA card: one token of a batch is one recorded graph, started by one call.

A graph replays the same kernels on the same addresses, so everything it reads lies in tensors of
its own: the token, the position, and keys and values with room for a fixed number of tokens, of
which a mask hides what was not read yet. A cache that is decoded moves into those tensors once and
stays (`methods.kv_cache`): its buffers are the graph's, so prefill goes on in them and nothing is
copied from token to token. Buffers hold 256 tokens, then 512 and so on; each size has a graph.

https://docs.pytorch.org/docs/stable/notes/cuda.html#cuda-graphs; the static layer is a smaller
`StaticLayer` of transformers 5 (cache_utils), without its counter in every layer.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.cache_utils import Cache as TransformersCache
from transformers.cache_utils import CacheLayerMixin

from methods.base import Cache, Hardware
from methods.engine import cap_attention, relative_difference
from methods.kv_cache import BufferedCache, BufferedLayer
from methods.step_pieces import rms_norms, short_pieces

SMALLEST_BUFFER = 256
"""Tokens that the smallest buffers have room for; larger ones have twice as much, and so on."""

IDLE_GRAPHS = 2
"""Graphs that are kept although no cache lies in their buffers: two, so that repeated runs which
grow out of one size into the next record nothing again."""

WARM_UP = 2
"""Runs before a graph is recorded: libraries choose kernels and take memory in the first ones."""

CHECKED_TOKENS = 4
"""Tokens that are read before, and then decoded in, the comparison with the model itself."""

TOLERANCES = {torch.float32: 1e-3, torch.float16: 0.02, torch.bfloat16: 0.05}
"""Largest difference of the logits of graph and model, root mean square over that of the logits
about their mean. Attention over a masked buffer may be another kernel than attention over a whole
one: tiny random models differ by 2e-7, 7e-4 and 5e-3, and by 0.02 to 0.4 where the position is
wrong by one."""

Replay = Callable[[], Tensor]


class RefusedError(RuntimeError):
    """The model cannot be recorded; the text says what it does, as half a sentence."""


def record(step: Replay) -> Replay:
    """Record `step` as a CUDA graph in a memory pool of its own; return what replays it.

    The tensor that a replay returns is overwritten by the next one. `step` runs `WARM_UP` times.
    """
    side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(WARM_UP):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    # Another thread that asks the card for its memory must not spoil the recording.
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        output = step()

    def replay() -> Tensor:
        graph.replay()
        return output

    return replay


class StaticLayer(CacheLayerMixin):  # type: ignore[misc]
    """Keys and values at fixed addresses [B, H, capacity, D]; one token is put at `position`."""

    is_compileable = True
    is_sliding = False

    def __init__(self, keys: Tensor, values: Tensor, position: Tensor) -> None:
        super().__init__()
        self.keys, self.values, self.position = keys, values, position
        self.is_initialized = True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Everything is there from the start."""

    def update(
        self, key_states: Tensor, value_states: Tensor, *_: object, **__: object
    ) -> tuple[Tensor, Tensor]:
        """Put keys and values [B, H, 1, D] in; return the whole buffers."""
        self.keys.index_copy_(2, self.position, key_states)
        self.values.index_copy_(2, self.position, value_states)
        return self.keys, self.values

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset of what is attended to: all of the buffer."""
        return self.get_max_length(), 0

    def get_seq_length(self) -> Tensor:
        """Tokens read, on the device: int64 [1]."""
        return self.position

    def get_max_length(self) -> int:
        """Capacity of the buffers."""
        return int(self.keys.shape[2])


class StaticStep:
    """Reads one token a sequence from tensors at fixed addresses; calling it changes only those.

    Run again with the same token and position it writes the same keys and values again.

    Attributes:
        size: B and the capacity of the buffers.
        token: int64 [B, 1]. position: int64 [1], tokens that were read before.
        layers: keys and values; must be finite where nothing was read.
    """

    def __init__(self, model: Any, layers: list[BufferedLayer], capacity: int) -> None:
        self.model = model
        self._norms = rms_norms(model)
        kept = [_kept(layer) for layer in layers]
        batch, device = kept[0][0].shape[0], kept[0][0].device
        self.size = (batch, capacity)
        self.token = torch.zeros((batch, 1), dtype=torch.int64, device=device)
        self.position = torch.zeros(1, dtype=torch.int64, device=device)
        self.slots = torch.arange(capacity, device=device)
        self.layers = [
            StaticLayer(_room(keys, capacity), _room(values, capacity), self.position)
            for keys, values in kept
        ]

    def __call__(self) -> Tensor:
        """Return float32 logits [B, 1, V]."""
        batch, capacity = self.size
        dtype = self.layers[0].keys.dtype
        # Made once for all layers, and additive: that is what both attentions of transformers take.
        hidden = (self.slots > self.position).to(dtype) * torch.finfo(dtype).min
        with short_pieces(self.model, self._norms):
            output = self.model(
                input_ids=self.token,
                attention_mask=hidden.expand(batch, 1, 1, capacity),
                position_ids=self.position.expand(batch, 1),
                past_key_values=TransformersCache(layers=list(self.layers)),
                use_cache=True,
            )
        logits: Tensor = output.logits.float()
        return logits


class GraphedDecode:
    """Decodes one token of every sequence of a batch by replaying a graph made for its size.

    `recorder` makes the replay of a step; the step itself is one that records nothing.
    """

    name = "one CUDA graph a token"

    def __init__(self, model: Any, recorder: Callable[[Replay], Replay] = record) -> None:
        self.model = model
        self._recorder = recorder
        self._graphs: list[_Graph] = []

    def decode(self, token: Tensor, cache: Cache) -> Tensor | None:
        """Read int64 [B, 1]; return float32 logits [B, 1, V] and advance `cache` in place.

        None, and nothing done, for a cache of another kind or without the tokens before.

        Raises:
            RefusedError: the model does what no graph can hold; nothing was recorded.
        """
        if not _fits(cache, token.shape[0]):
            return None
        layers: list[BufferedLayer] = cache.layers
        graph = next((graph for graph in self._graphs if graph.holds(layers)), None)
        if graph is None:
            graph = self._graph_for(layers)
            graph.take_in(layers)
        logits = graph.run(token, layers[0].length)
        for layer in layers:
            layer.length += 1
        return logits

    def _graph_for(self, layers: list[BufferedLayer]) -> _Graph:
        """Return a graph with room for one more token than `layers` have, which is not in use."""
        capacity = SMALLEST_BUFFER
        while capacity <= layers[0].length:
            capacity *= 2
        size = (_kept(layers[0])[0].shape[0], capacity)
        idle = [graph for graph in self._graphs if graph.idle()]
        for graph in idle:
            if graph.step.size == size:
                self._graphs.remove(graph)
                self._graphs.append(graph)
                return graph
        for graph in idle[: max(0, len(idle) + 1 - IDLE_GRAPHS)]:
            self._graphs.remove(graph)
        self._graphs.append(_Graph(StaticStep(self.model, layers, capacity), self._recorder))
        return self._graphs[-1]


class _Graph:
    """A step, what replays it, and its buffers, in which the tokens of one cache may lie."""

    def __init__(self, step: StaticStep, recorder: Callable[[Replay], Replay]) -> None:
        self.step = step
        self._recorder = recorder
        self._replay: Replay | None = None
        self._lent: list[tuple[weakref.ref[Tensor], weakref.ref[Tensor]]] = []

    def run(self, token: Tensor, position: int) -> Tensor:
        """Read `token` behind `position` others; return logits of the caller's own."""
        self.step.token.copy_(token)
        self.step.position.fill_(position)
        if self._replay is None:
            # Recording what waits for the device can leave the device unusable: look first.
            with _NothingWaits():  # type: ignore[no-untyped-call]
                self.step()
            self._replay = self._recorder(self.step)
        return self._replay().clone()

    def holds(self, layers: list[BufferedLayer]) -> bool:
        """Whether the tokens of `layers` lie in this graph's buffers, with room for one more.

        Forks of such layers have views of their own, since they must not write there.
        """
        return (
            bool(self._lent)
            and layers[0].length < self.step.size[1]
            and all(
                keys() is layer.key_buffer and values() is layer.value_buffer
                for layer, (keys, values) in zip(layers, self._lent, strict=True)
            )
        )

    def take_in(self, layers: list[BufferedLayer]) -> None:
        """Copy the tokens of `layers` into the buffers, which become theirs."""
        self._lent = []
        for layer, static in zip(layers, self.step.layers, strict=True):
            for buffer, tokens in zip((static.keys, static.values), _kept(layer), strict=True):
                buffer[:, :, : layer.length].copy_(tokens)
                # What the mask hides is multiplied by zero, and must not be infinite or NaN.
                buffer[:, :, layer.length :].zero_()
            # Aliases, so that the memory counts its users: see `idle`.
            keys, values = static.keys.detach(), static.values.detach()
            layer.key_buffer, layer.value_buffer = keys, values
            self._lent.append((weakref.ref(keys), weakref.ref(values)))

    def idle(self) -> bool:
        """Whether no cache, fork or view uses the buffers."""
        return all(
            _users(tensor) == 1
            for static in self.step.layers
            for tensor in (static.keys, static.values)
        )


class _NothingWaits(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Raises RefusedError at an operation whose result the host must know to go on."""

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if _waits(func, args, kwargs or {}):
            raise RefusedError(f"{func} waits for values that are on the device")
        return func(*args, **(kwargs or {}))


def _waits(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    aten = torch.ops.aten
    if func in (aten.index.Tensor, aten.index_put.default, aten.index_put_.default):
        return any(index is not None and index.dtype == torch.bool for index in args[1])
    if func is aten._to_copy.default:
        return bool(
            torch.device(kwargs.get("device") or args[0].device).type != args[0].device.type
        )
    if func is aten.copy_.default:
        return bool(args[0].device != args[1].device)
    tags = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}
    return not tags.isdisjoint(func.tags)


def fast_decode(model: Any, hardware: Hardware) -> tuple[GraphedDecode | None, str]:
    """Return what decodes `model` on the card, and its name; or None, and why there is none."""
    if hardware.device != "cuda":
        return None, f"no CUDA graphs on {hardware.device}"
    if hardware.offload:
        return None, "decoder blocks are brought to the device at each call"
    # Before anything is recorded: a graph keeps the attention it was recorded with.
    cap_attention(model)
    return checked(GraphedDecode(model))


@torch.no_grad()
def checked(decode: GraphedDecode) -> tuple[GraphedDecode | None, str]:
    """Return `decode` and its name where it agrees with its model; else None and why not.

    The model reads `CHECKED_TOKENS` drawn tokens, then both read as many one by one.
    """
    try:
        difference = _difference(decode)
    except (RuntimeError, TypeError, ValueError, AttributeError) as error:
        reason = str(error).partition("\n")[0]
        return None, f"decoding cannot be recorded as a CUDA graph: {reason}"
    tolerance = TOLERANCES[decode.model.dtype]
    # Written so that NaN, too, is a disagreement.
    if not difference <= tolerance:
        return None, (
            f"logits of a CUDA graph differ from the model's by {difference:.2g} of their size, "
            f"and {tolerance:.2g} is tolerated"
        )
    return decode, decode.name


def _difference(decode: GraphedDecode) -> float:
    """Return the relative root mean square difference of the logits of decoded tokens."""
    model = decode.model
    for layer in BufferedCache(model.config).layers:
        if type(layer) is not BufferedLayer:
            raise RefusedError(
                f"a layer keeps a {type(layer).__name__}, not keys and values of all tokens"
            )
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(model.config.vocab_size, (1, 2 * CHECKED_TOKENS), generator=generator)
    ids = ids.to(model.device)
    caches = BufferedCache(model.config), BufferedCache(model.config)
    for cache in caches:
        model(input_ids=ids[:, :CHECKED_TOKENS], past_key_values=cache, use_cache=True)
    expected, found = [], []
    for at in range(CHECKED_TOKENS, 2 * CHECKED_TOKENS):
        token = ids[:, at : at + 1]
        own = model(input_ids=token, past_key_values=caches[0], use_cache=True).logits
        expected.append(own.float())
        replayed = decode.decode(token, caches[1])
        if replayed is None:
            raise RefusedError(
                "the model does not keep its keys and values in the cache it is given"
            )
        found.append(replayed)
    return relative_difference(torch.cat(found), torch.cat(expected))


def _fits(cache: Cache, batch: int) -> bool:
    """Whether `cache` holds tokens of `batch` sequences, in every layer all of them."""
    return isinstance(cache, BufferedCache) and all(
        type(layer) is BufferedLayer
        and layer.key_buffer is not None
        and layer.key_buffer.shape[0] == batch
        and layer.length == cache.layers[0].length
        for layer in cache.layers
    )


def _kept(layer: BufferedLayer) -> tuple[Tensor, Tensor]:
    """Return keys and values [B, H, length, D]."""
    keys, values = layer.keys, layer.values
    if keys is None or values is None:
        raise ValueError("a layer without a token does not know the shape of its keys")
    return keys, values


def _room(tensor: Tensor, capacity: int) -> Tensor:
    """Return an empty [B, H, capacity, D] of the type of `tensor` [B, H, length, D]."""
    batch, heads, _, size = tensor.shape
    return tensor.new_empty(batch, heads, capacity, size)


def _users(tensor: Tensor) -> int:
    """Return how many tensors use the memory of `tensor`, itself included."""
    storage = tensor.untyped_storage()
    # The storage object made here is one more.
    return int(torch._C._storage_Use_Count(storage._cdata)) - 1

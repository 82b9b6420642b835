"""Where the seconds of a latent go: marks between latents and parts within them, on a CPU or a CUDA device."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from orthus.backbone_rows import BackboneRows
from orthus.modeling import OrthusForConditionalGeneration
from orthus.sampling import LatentSampler

PARTS = ("backbone", "embedding", "head", "lm_head")
Seconds = dict[str, float]


class Clock:
    """Marks, and the seconds that parts took between them. On a CUDA device parts are timed by events in its stream, so that
    only a mark waits for the device."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.is_cuda = device, device.type == "cuda"
        self.marks: list[float] = []
        self.spent: list[Seconds] = []  # of the parts, before each mark
        self.passes: list[int] = []  # loops of the sampler over its weights, before each mark; 0 where graphs are replayed
        self.sampler: LatentSampler | None = None  # the last that drew
        self.num_passes = 0
        self._timed: list[tuple[str, Any, Any]] = []

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Its seconds count for part `name`; nothing is timed while a CUDA graph is captured."""
        if self.is_cuda and torch.cuda.is_current_stream_capturing():
            yield
            return
        start = self._now()
        yield
        self._timed.append((name, start, self._now()))

    def mark(self) -> None:
        """The end of what came before: the prompt, or a latent."""
        if self.is_cuda:
            torch.cuda.synchronize(self.device)
        self.marks.append(time.perf_counter())
        spent = dict.fromkeys(PARTS, 0.0)
        for name, start, end in self._timed:
            spent[name] += start.elapsed_time(end) / 1000 if self.is_cuda else end - start
        self.spent.append(spent)
        self.passes.append(self.num_passes)
        self.num_passes = 0
        self._timed.clear()

    def cycles(self) -> list[Seconds]:
        """Between each mark and the next: seconds in all, of each part, and of the rest."""
        found = []
        for start, end, spent in zip(self.marks, self.marks[1:], self.spent[1:], strict=False):
            found.append({"total": end - start, **spent, "overhead": end - start - sum(spent.values())})
        return found

    def _now(self) -> Any:
        if not self.is_cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.device))
        return event


@contextmanager
def watched(model: OrthusForConditionalGeneration, clock: Clock) -> Iterator[None]:
    """While it lasts, the parts of `model` as `generate` calls them report to `clock`."""
    draw = LatentSampler.draw

    def timed_draw(sampler: LatentSampler, *arguments: Any, **options: Any) -> Any:
        before = sampler.num_passes
        with clock.part("head"):
            latents = draw(sampler, *arguments, **options)
        clock.num_passes += sampler.num_passes - before
        clock.sampler = sampler
        return latents

    watched_methods: list[tuple[Any, str, Callable[..., Any]]] = [
        (LatentSampler, "draw", timed_draw),
        # Not the module's forward, which replayed graphs do not call.
        (BackboneRows, "feed", _timed(BackboneRows.feed, "backbone", clock)),
        (BackboneRows, "read_prompts", _timed(BackboneRows.read_prompts, "backbone", clock)),
        (model.latent_embedding, "forward", _timed(model.latent_embedding.forward, "embedding", clock)),
        (model.lm_head, "forward", _timed(model.lm_head.forward, "lm_head", clock)),
    ]
    kept = [(owner, name, vars(owner).get(name)) for owner, name, _ in watched_methods]
    try:
        for owner, name, method in watched_methods:
            setattr(owner, name, method)
        yield
    finally:
        for owner, name, method in kept:
            if method is None:
                delattr(owner, name)
            else:
                setattr(owner, name, method)


def _timed(method: Callable[..., Any], name: str, clock: Clock) -> Callable[..., Any]:
    def timed(*arguments: Any, **options: Any) -> Any:
        with clock.part(name):
            return method(*arguments, **options)

    return timed

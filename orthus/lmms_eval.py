"""Orthus as a model of lmms-eval 0.7: `lmms-eval --model orthus --model_args pretrained=FOLDER --tasks pope`.

lmms-eval finds the class through its entry point group `lmms_eval.models` (`orthus.harness.manifests`). Every process holds the
model and answers its own share: `torchrun --nproc-per-node 8 -m lmms_eval ...` or `accelerate launch -m lmms_eval ...`.
"""

import logging
from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from accelerate import Accelerator
from lmms_eval.api.model import lmms
from tqdm import tqdm

from orthus.harness import Answerer, Decoding, Question, decoding_of, settings_of, turns_of
from orthus.modeling import OrthusForConditionalGeneration
from orthus.processing import OrthusProcessor

logger = logging.getLogger(__name__)
MAX_ROUNDS = 64
PADDING = "__padding_only__"  # marks the copies with which lmms-eval gives all processes equally many requests


class OrthusChat(lmms):
    """Answers requests whose prompts are chat messages.

    Args:
        pretrained: folder or hub name.
        device: None for `accelerate`'s choice, which is a device of its own for each process.
        dtype: as in `from_pretrained`; `auto` is what the weights are saved in.
        batch_size: questions that are answered together.
        settings: fields of [`orthus.harness.Settings`].

    Raises:
        ValueError: unknown settings, a batch size below 1, one numbered device for several processes.
    """

    is_simple = False

    def __init__(
        self,
        pretrained: str,
        device: str | None = None,
        dtype: str = "auto",
        batch_size: int | str = 1,
        max_batch_size: int | None = None,
        **settings: Any,
    ) -> None:
        super().__init__()
        if max_batch_size is not None:
            raise ValueError(f"max_batch_size={max_batch_size}: the batch size is not searched here; give batch_size")
        if not str(batch_size).isdecimal() or int(batch_size) < 1:
            raise ValueError(f"batch_size={batch_size!r}; give an integer of at least 1")
        checked = settings_of(settings)
        self.batch_size = int(batch_size)
        self.accelerator = Accelerator(cpu=device is not None and torch.device(device).type == "cpu")
        self.device = _device(self.accelerator, device)
        self._rank, self._world_size = self.accelerator.process_index, self.accelerator.num_processes
        model = OrthusForConditionalGeneration.from_pretrained(pretrained, dtype=dtype).eval().to(self.device)
        # Not an attribute of this object, so that lmms-eval's `clean` leaves it and the object can be used again.
        self.answerer = Answerer(model, OrthusProcessor.from_pretrained(pretrained), checked)
        self._unused: set[str] = set()

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """Answers in the order of the requests, in batches of those that are decoded alike; padding is not answered."""
        answers = [""] * len(requests)
        alike: dict[Decoding, list[tuple[int, int]]] = defaultdict(list)
        asked: Counter[tuple[str, Any]] = Counter()
        for place, request in enumerate(requests):
            if request.metadata.get(PADDING):
                continue
            _, _, options, doc_id, task, _ = request.args
            alike[self._decoding(options)].append((place, asked[task, doc_id]))
            asked[task, doc_id] += 1
        with tqdm(total=sum(asked.values()), desc="orthus", unit="answer", disable=self.rank != 0) as bar:
            for decoding, places in alike.items():
                for start in range(0, len(places), self.batch_size):
                    batch = places[start : start + self.batch_size]
                    questions = [self._question(requests[place], repeat) for place, repeat in batch]
                    for (place, _), answer in zip(batch, self.answerer.answer(questions, decoding), strict=True):
                        answers[place] = answer
                    bar.update(len(batch))
        return answers

    def generate_until_multi_round(self, requests: Sequence[Any]) -> list[list[str]]:
        """Per request the answers of all rounds; the task says when the last one is."""
        answers: list[list[str]] = []
        asked: Counter[tuple[str, Any]] = Counter()
        for request in requests:
            said: list[str] = []
            answers.append(said)
            if request.metadata.get(PADDING):
                continue
            _, doc_to_messages, options, doc_id, task, split = request.args
            document, decoding = self.task_dict[task][split][doc_id], self._decoding(options)
            messages, is_last, info = doc_to_messages(document), False, None
            while not is_last:
                if len(said) == MAX_ROUNDS:
                    raise ValueError(f"{task} {doc_id} has not ended after {MAX_ROUNDS} rounds; its doc_to_text never says so")
                question = self._named(request, messages, asked[task, doc_id], len(said))
                said += self.answerer.answer([question], decoding)
                rounds = {"round_idx": len(said), "previous_output": list(said), "previous_round_info": info}
                messages, is_last, _, info = doc_to_messages(document, **rounds)
            asked[task, doc_id] += 1
        return answers

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """Not there: lmms-eval 0.7 builds such requests for its simple models only, never for chat models."""
        raise NotImplementedError("lmms-eval does not send log-likelihood requests to chat models; use a task that generates")

    def _decoding(self, options: dict[str, Any]) -> Decoding:
        decoding, unused = decoding_of(options)
        for name in set(unused) - self._unused:
            logger.warning("the task's generation option %s=%r is not used", name, options.get(name))
        self._unused |= set(unused)
        return decoding

    def _question(self, request: Any, repeat: int) -> Question:
        _, doc_to_messages, _, doc_id, task, split = request.args
        return self._named(request, doc_to_messages(self.task_dict[task][split][doc_id]), repeat)

    def _named(self, request: Any, messages: Any, repeat: int, round_number: int = 0) -> Question:
        _, _, _, doc_id, task, _ = request.args
        turns = turns_of(messages, self.answerer.processor.image_processor.max_pixels)
        return Question(task, doc_id, turns, repeat, round_number)


def _device(accelerator: Accelerator, device: str | None) -> torch.device:
    """The device asked for; with one process per device, that of this process."""
    wanted = accelerator.device if device is None else torch.device(device)
    if wanted.index is not None and device is not None and accelerator.num_processes > 1:
        raise ValueError(f"device={device} for {accelerator.num_processes} processes; give its kind only: device={wanted.type}")
    return accelerator.device if wanted.type == accelerator.device.type and wanted.index is None else wanted

"""The small world as an endless data set: item i is a pure function of (split, i, configuration)."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from orthus.data.schema import Example
from orthus.data.world.captions import draft_describe, draft_t2i
from orthus.data.world.draft import Draft, Source
from orthus.data.world.drills import draft_look_up, draft_read, draft_recite
from orthus.data.world.edits import draft_edit
from orthus.data.world.language import CaptionMix
from orthus.data.world.questions import draft_vqa
from orthus.data.world.sampling import pick_weighted
from orthus.data.world.scene import Scene, WorldConfig
from orthus.data.world.splits import SPLITS, is_strict
from orthus.data.world.stories import draft_story

NUM_ITEMS = 2**31
TASKS: dict[str, Callable[[Source], Draft]] = {
    "vqa": draft_vqa,
    "describe": draft_describe,
    "recite": draft_recite,
    "look_up": draft_look_up,
    "read": draft_read,
    "edit": draft_edit,
    "story": draft_story,
}
TASK_NAMES = ("t2i", *TASKS)
IN_WORDS_FIRST: dict[str, Callable[[Draft], Draft]] = {
    "t2i": Draft.with_plan,
    "edit": Draft.with_plan,
    "vqa": Draft.with_reasons,
    "read": Draft.with_reasons,
}
DEFAULT_TASKS: Mapping[str, float] = {"t2i": 0.45, "vqa": 0.25, "describe": 0.1, "edit": 0.12, "story": 0.08}


class WorldDataset:
    """`dataset[i] -> Example` for 0 <= i < 2**31, in any order and by any worker.

    split: "train" and "validation" hold no held-out clause in any scene; "test" has no such rule.
    tasks: weights of TASK_NAMES, of which "recite", "look_up" and "read" are text only; ValueError for other names or when
        no weight is positive.
    captions: weights of the caption kinds within "t2i".
    plans: share of "t2i" and "edit" examples in which the assistant first says what it will draw, every object with its
        colour and place, and then draws it; and of "vqa" and "read" examples in which it first says what each
        answer follows from.
    """

    def __init__(
        self,
        split: str,
        tasks: Mapping[str, float] = DEFAULT_TASKS,
        config: WorldConfig | None = None,
        captions: CaptionMix | None = None,
        plans: float = 0.0,
    ) -> None:
        if not 0 <= plans <= 1:
            raise ValueError(f"plans={plans} is not a share from 0 to 1")
        self.strict = is_strict(split)
        for task, weight in tasks.items():
            if task not in TASK_NAMES:
                raise ValueError(f"task {task!r} is unknown; use some of {', '.join(TASK_NAMES)}")
            if weight < 0:
                raise ValueError(f"weight {weight} of task {task!r} is negative; use 0 to leave the task out")
        self.weights = [(task, float(tasks[task])) for task in TASK_NAMES if tasks.get(task, 0) > 0]
        if not self.weights:
            raise ValueError(f"tasks={dict(tasks)} has no positive weight; give one to some of {', '.join(TASK_NAMES)}")
        self.split = split
        self.config = config or WorldConfig()
        self.captions = captions or CaptionMix()
        self.plans = plans

    def __len__(self) -> int:
        return NUM_ITEMS

    def draft(self, index: int) -> Draft:
        """Item `index` before rendering. IndexError outside 0 <= index < 2**31."""
        if not 0 <= index < NUM_ITEMS:
            raise IndexError(f"index {index} is outside 0 to {NUM_ITEMS - 1}")
        rng = np.random.default_rng([self.config.world_seed, SPLITS.index(self.split), int(index)])
        source = Source(rng, self.config, self.strict)
        task = pick_weighted(rng, self.weights)
        draft = draft_t2i(source, self.captions) if task == "t2i" else TASKS[task](source)
        is_in_words = task in IN_WORDS_FIRST and self.plans > 0 and rng.random() < self.plans
        return IN_WORDS_FIRST[task](draft) if is_in_words else draft

    def scenes(self, index: int) -> list[Scene]:
        """The scenes behind all pictures of item `index`, in reading order."""
        return self.draft(index).scenes()

    def __getitem__(self, index: int) -> Example:
        return self.draft(index).render()

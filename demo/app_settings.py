"""Settings of the app in its address: read when a page loads, written back when one changes."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import gradio as gr

MAX_TEXT = 500  # characters of a setting in the address


@dataclass(frozen=True)
class Setting:
    """A component whose value stands in the address as `name`. A value that the component would not allow is ignored."""

    name: str
    component: Any

    def spec(self) -> dict[str, Any]:
        """What the page's script needs to know. Raises TypeError for a component that is not supported."""
        part = self.component
        known: dict[str, Any] = {"name": self.name, "value": part.value}
        if isinstance(part, gr.Slider | gr.Number):
            return known | {"kind": "number", "low": part.minimum, "high": part.maximum, "whole": isinstance(part.step, int)}
        if isinstance(part, gr.Dropdown | gr.Radio):
            return known | {"kind": "choice", "choices": [value for _, value in part.choices]}
        if isinstance(part, gr.Checkbox):
            return known | {"kind": "flag"}
        if isinstance(part, gr.Textbox):
            return known | {"kind": "text", "most": MAX_TEXT}
        raise TypeError(f"setting {self.name!r} is a {type(part).__name__}; use a number, choice, checkbox or textbox")


def connect(blocks: gr.Blocks, settings: Sequence[Setting]) -> None:
    """Tie the settings to the address of the page. Raises ValueError for a name that is used twice."""
    names = [setting.name for setting in settings]
    if len(set(names)) < len(names):
        raise ValueError(f"settings {sorted(name for name in set(names) if names.count(name) > 1)} are named twice")
    parts = [setting.component for setting in settings]
    specs = json.dumps([setting.spec() for setting in settings])
    blocks.load(None, None, parts, js=f"() => orthus.read({specs})", api_visibility="private")
    changes = [part.change for part in parts]
    gr.on(changes, None, parts, None, js=f"(...values) => orthus.write({specs}, values)", api_visibility="private")


def example_buttons(label: str, examples: Sequence[Sequence[Any]], outputs: Sequence[Any]) -> None:
    """One button per example; a click fills `outputs`. The first entry, a text, is what the button says."""
    gr.Markdown(f"**{label}**", elem_classes="examples-label")
    with gr.Row(elem_classes="examples"):
        for example in examples:
            button = gr.Button(str(example[0]), size="sm", min_width=0)
            js = f"() => {json.dumps(list(example) if len(example) > 1 else example[0])}"
            button.click(None, None, list(outputs), js=js, api_visibility="private")

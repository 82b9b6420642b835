"""`transformers`' own common tests of models and generation, on our class.

They are in its repository and not in its package, so they run only where a checkout at the installed version is at hand:
`git clone --depth 1 --branch v$(python -c "import transformers; print(transformers.__version__)")
https://github.com/huggingface/transformers ../transformers`, `pip install parameterized`, then
`TRANSFORMERS_CHECKOUT=../transformers python -m pytest -o addopts= -q -rs tests/test_transformers_mixins.py`.
docs/DESIGN.md lists what does not apply, with the reason; SKIPPED is that list.
"""

import os
import sys
import unittest

import pytest
import torch
from conftest import tiny_config
from transformers import GenerationMixin

from orthus import OrthusConfig, OrthusForConditionalGeneration

CHECKOUT = os.environ.get("TRANSFORMERS_CHECKOUT", "")
if not CHECKOUT:
    pytest.skip("set TRANSFORMERS_CHECKOUT to a checkout of transformers at the installed version", allow_module_level=True)
sys.path.insert(0, CHECKOUT)
for name in [name for name in sys.modules if name == "tests" or name.startswith("tests.")]:
    del sys.modules[name]  # ours; what follows means theirs
from tests.generation.test_utils import GenerationTesterMixin  # noqa: E402
from tests.test_configuration_common import ConfigTester  # noqa: E402
from tests.test_modeling_common import ModelTesterMixin  # noqa: E402

from tests import test_modeling_common as common  # noqa: E402

BOI, EOI, SEP, IMG = 4, 5, 6, 7
SKIPPED = {
    "test_model_base_model_prefix": "no base model with one head on top: five children side by side (docs/DESIGN.md)",
    "test_resize_tokens_embeddings": "shrinks the vocabulary, whose last rows are the image codes; growing works (test_modeling)",
    "test_resize_embeddings_untied": "the same",
}


def less_flaky(config: OrthusConfig) -> None:
    """Theirs also sets keys that no Orthus has, and an unknown key is refused when the config is read again."""
    config.text_config.rms_norm_eps = 1.0


common.set_config_for_less_flaky_test = less_flaky


class LenientOrthus(OrthusForConditionalGeneration):
    """Accepts incomplete checkpoints, as their tests of loading want; ours refuses them unless it is told."""

    @classmethod
    def from_pretrained(cls, *args, **options):
        return super().from_pretrained(*args, **{"allow_missing": True, **options})


class OrthusAsTextModel(LenientOrthus, GenerationMixin):
    """Our class with `transformers`' own loop as `generate`, which is what their tests of generation call."""

    def generate(self, *args, **options):
        return GenerationMixin.generate(self, *args, **options)


class OrthusTester:
    """Configuration and inputs: rows of text with one picture each."""

    def __init__(self, parent: unittest.TestCase) -> None:
        self.parent = parent
        config = tiny_config()
        self.is_training = True
        self.batch_size, self.seq_length = 7, 12  # 7 rows, or one test appends rows without pictures
        self.hidden_size = config.text_config.hidden_size
        self.num_hidden_layers = config.text_config.num_hidden_layers
        self.num_attention_heads = config.text_config.num_attention_heads
        self.image_token_id = IMG
        self.image_size, self.patch_size, self.num_channels = 8, 4, 3

    def get_config(self) -> OrthusConfig:
        return tiny_config()

    def prepare_config_and_inputs_for_common(self):
        ids = torch.randint(10, 40, (self.batch_size, self.seq_length))
        ids[:, 2:8] = torch.tensor([BOI, IMG, IMG, IMG, IMG, EOI])
        pixels = torch.rand(self.batch_size, 3, 8, 8) * 2 - 1
        return self.get_config(), {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}


class OrthusModelTest(ModelTesterMixin, GenerationTesterMixin, unittest.TestCase):
    all_model_classes = (LenientOrthus,)
    all_generative_model_classes = (OrthusAsTextModel,)
    additional_model_inputs = ["pixel_values"]
    _is_composite = True
    test_resize_embeddings = True

    def setUp(self) -> None:
        self.model_tester = OrthusTester(self)
        self.config_tester = ConfigTester(self, config_class=OrthusConfig, has_text_modality=False)

        reason = SKIPPED.get(self._testMethodName)
        if reason:
            self.skipTest(reason)

    def _prepare_for_class(self, inputs_dict, model_class, return_labels=False):
        inputs = super()._prepare_for_class(inputs_dict, model_class)
        if return_labels:
            inputs["labels"] = torch.where(inputs["input_ids"] == EOI, -100, inputs["input_ids"])
            num_targets = int((inputs["input_ids"] == IMG).sum())  # one noise draw each, fixed: their tests compare two forwards
            inputs["timesteps"] = torch.arange(num_targets) * 27 % 1000
            inputs["noise"] = torch.randn(num_targets, 3, generator=torch.Generator().manual_seed(0))
        return inputs

    def test_config(self) -> None:
        self.config_tester.run_common_tests()

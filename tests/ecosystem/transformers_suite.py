"""transformers' own tests of a model, run against BamModel and BamForCausalLM of one configuration. No test file of ours: test_transformers_own.py
runs it, in a process for each configuration.

The environment says what it is run on: BAM_SUITE, the folder of a transformers source package's tests under the name `theirs`; BAM_CONFIG, the
file of a config.json.
"""

import json
import os
import sys
import unittest
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, os.environ["BAM_SUITE"])
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from theirs.test_modeling_common import ModelTesterMixin, ids_tensor  # type: ignore[import-not-found]
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_MAPPING_NAMES

from bam_merge.exported.configuration_bam import BamConfig
from bam_merge.exported.modeling_bam import BamForCausalLM, BamModel

AutoConfig.register("bam", BamConfig)
AutoModel.register(BamConfig, BamModel)
AutoModelForCausalLM.register(BamConfig, BamForCausalLM)
MODEL_MAPPING_NAMES["bam"], MODEL_FOR_CAUSAL_LM_MAPPING_NAMES["bam"] = "BamModel", "BamForCausalLM"  # which inputs a class takes

CONFIG = json.loads(Path(os.environ["BAM_CONFIG"]).read_text())


class Tester:
    """What the tests ask for: a small configuration, and inputs for it."""

    batch_size, seq_length, is_training = 3, 7, True

    def __init__(self, parent: Any) -> None:
        self.parent, config = parent, self.get_config()
        self.hidden_size, self.num_hidden_layers, self.vocab_size = config.hidden_size, config.num_hidden_layers, config.vocab_size
        self.num_attention_heads = config.num_attention_heads

    def get_config(self) -> BamConfig:
        return BamConfig(**{key: value for key, value in CONFIG.items() if key not in ("auto_map", "dtype", "architectures")})

    def prepare_config_and_inputs_for_common(self) -> tuple[BamConfig, dict[str, torch.Tensor]]:
        ids = ids_tensor([self.batch_size, self.seq_length], self.vocab_size)
        return self.get_config(), {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


NO_BUFFER = "rotary frequencies are worked out anew in each pass, so that no cast of the model rounds them: there is no inv_freq to look at"
NOT_PACKED = "the source package has no tests of generation to inherit from; tests/exported and test_ecosystem.py generate"
CAPPED = "scores of this model are capped, which sdpa has no way to do: it is refused, and eager is the default"
SOME = "layers of linear attention have no weights of attention to give, and the test counts one of each layer"
FLAG = "the test sets every key with such a name to a small number, and here layer_scale is a flag"
STILL = "no layer has rotary embeddings, so nothing scales them"
EXCEPTIONS = {
    "test_model_rope_scaling_frequencies": (NO_BUFFER, True),
    **{
        f"test_model_rope_scaling_from_config_{kind}": (STILL, CONFIG.get("rope_layers") == [])
        for kind in ("0_linear", "1_dynamic", "2_yarn")
    },
    "test_generation_tester_mixin_inheritance": (NOT_PACKED, True),
    "test_attention_outputs": (SOME, "linear_attention" in (CONFIG.get("layer_types") or [])),
    "test_can_load_ignoring_mismatched_shapes": (FLAG, hasattr(BamConfig, "layer_scale")),
    "test_can_set_attention_dynamically": (CAPPED, CONFIG.get("attention_softcap") is not None),
    "test_sdpa_can_dispatch_non_composite_models": (CAPPED, CONFIG.get("attention_softcap") is not None),
}
"""Tests that fail, why, and of which models; one that passes all the same is a failure."""


class BamTest(ModelTesterMixin, unittest.TestCase):
    all_model_classes = (BamModel, BamForCausalLM)
    test_all_params_have_gradient = False  # an expert that no token goes to has none

    def setUp(self) -> None:
        self.model_tester = Tester(self)


for _name, (_reason, _applies) in EXCEPTIONS.items():
    if _applies:
        setattr(BamTest, _name, pytest.mark.xfail(reason=_reason, strict=True)(getattr(BamTest, _name)))

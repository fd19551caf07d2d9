"""A few of vLLM's architectures, one of each kind, in every mode. `make test-architectures` takes them all."""

import pytest

from .comparing import compare

pytestmark = pytest.mark.engine


@pytest.mark.parametrize(
    "architecture",
    [
        "Qwen3MoeForCausalLM",  # experts
        "FalconH1ForCausalLM",  # state space
        "DeepseekV3ForCausalLM",  # latent attention
        "RobertaForSequenceClassification",  # an encoder with a head
        "Blip2ForConditionalGeneration",  # three models in one
        "WhisperForConditionalGeneration",  # encoder and decoder
        "InternLM2ForRewardModel",  # none of transformers: what vLLM asks for
    ],
)
def test_every_parameter_is_the_default_loaders(architecture: str) -> None:
    outcome = compare(architecture)
    assert outcome.obstacle is None
    assert outcome.differing == {}
    assert outcome.tensors > 10

"""LoRA adapters of PEFT on patched models, beside the same models unpatched."""

import pytest
import torch

import aigc_fast
from aigc_fast.integrations._patching import Replacement
from tests.integrations.diffusers_zoo import exact, gradients, inputs_of, make, outputs
from tests.integrations.test_diffusers_models import assert_error_ratio
from tests.models.checkpoints import VOCAB, hf_config, hf_model
from tests.ops.test_every_op import recorded

peft = pytest.importorskip("peft")
pytest.importorskip("diffusers")
pytest.importorskip("transformers")

#: layers with an adapter, and operators that run beside them
CASES = {
    "unet with text": (["to_q", "to_v", "conv1", "conv2", "ff.net.0.proj"], {"group_norm_act"}),
    "dit": (["to_q", "to_out.0", "ff.net.2", "linear"], {"modulated_norm", "gated_residual"}),
    "llama": (["q_proj", "gate_proj", "down_proj"], {"rms_norm", "apply_rotary"}),
}


class Logits(torch.nn.Module):
    """A language model called as those of diffusers are."""

    def __init__(self) -> None:
        super().__init__()
        self.lm = hf_model(hf_config("llama"))

    def forward(self, **inputs):
        class Output:
            sample = self.lm(**inputs).logits

        return Output


def build(name):
    if name != "llama":
        return make(name), inputs_of(name)
    ids = torch.randint(VOCAB, (2, 11), generator=torch.Generator().manual_seed(1))
    return Logits(), {"input_ids": ids}


def adapted_model(model, targets):
    config = peft.LoraConfig(r=2, lora_alpha=4, target_modules=targets, init_lora_weights=False)
    torch.manual_seed(1)
    adapted = peft.get_peft_model(model, config)
    names = [name for name, p in adapted.named_parameters() if p.requires_grad]
    assert names and all("lora_" in name for name in names)
    return adapted


@pytest.mark.parametrize("first", ["adapter", "patch", "frozen"])
@pytest.mark.parametrize("name", CASES)
def test_lora(name, first) -> None:
    targets, operators = CASES[name]
    model, inputs = build(name)
    bare = outputs(model, inputs)
    if first != "adapter":
        aigc_fast.patch(model, freeze=first == "frozen")
    adapted = adapted_model(model, targets)
    if first == "adapter":
        aigc_fast.patch(adapted)
    with recorded() as calls:
        ours = gradients(adapted, inputs)
    assert operators <= {op.name.removesuffix("_full") for op, _ in calls}
    with adapted.disable_adapter():
        off = outputs(adapted, inputs)
    again = outputs(adapted, inputs)
    aigc_fast.unpatch(adapted)
    assert not any(isinstance(module, Replacement) for module in adapted.modules())
    stock, want = gradients(adapted, inputs), exact(gradients, adapted, inputs)
    assert_error_ratio(ours, stock, want, torch.float32)
    assert_error_ratio(again, stock[:1], want[:1], torch.float32)
    with adapted.disable_adapter():
        want = exact(outputs, adapted, inputs)
        assert torch.equal(outputs(adapted, inputs)[0], bare[0])
    assert_error_ratio(off, bare, want, torch.float32)
    assert not torch.allclose(off[0], ours[0], rtol=0.1)

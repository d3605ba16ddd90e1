"""VQVAE with the weights of diffusers' VQModel, beside that model; a few steps of training."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from aigc_fast.models.vae import VQVAE

pytest.importorskip("diffusers")

from tests.integrations.diffusers_zoo import CASES, Case, exact, gradients, image, inputs_of, make
from tests.integrations.test_diffusers_models import assert_error_ratio

SIZES = {
    key: CASES["autoencoder"].options[key]
    for key in ("block_out_channels", "norm_num_groups", "down_block_types", "up_block_types")
}


@pytest.fixture
def model(monkeypatch):
    options = SIZES | dict(num_vq_embeddings=20, vq_embed_dim=4)
    case = Case("VQModel", options, lambda: dict(sample=image()), set())
    monkeypatch.setitem(CASES, "vq", case)
    model = make("vq")
    nn.init.normal_(model.quantize.embedding.weight, std=0.3)
    return model


def test_as_good_as_diffusers(model) -> None:
    inputs = inputs_of("vq")
    ours = VQVAE.from_diffusers(model.config, model.state_dict())
    keys = [key for key, _ in model.named_parameters()]
    assert set(ours.state_dict()) == set(keys)
    parameters = dict(ours.named_parameters())

    class AsDiffusers(nn.Module):
        def forward(self, sample):
            return type("Output", (), {"sample": ours(sample)[0]})

        def parameters(self):  # in diffusers' order
            return (parameters[key] for key in keys)

    want, theirs = exact(gradients, model, inputs), gradients(model, inputs)
    assert_error_ratio(gradients(AsDiffusers(), inputs), theirs, want, torch.float32)


def test_from_a_folder_and_from_indices(model, tmp_path) -> None:
    model.save_pretrained(tmp_path)
    ours = VQVAE.from_pretrained(tmp_path)
    with torch.no_grad():
        images, indices, _ = ours(image())
        assert indices.shape == (2, 4, 4) and len(indices.unique()) > 1
        torch.testing.assert_close(ours.decode(ours.quantize.lookup(indices)), images)


def test_refuses_configurations() -> None:
    with pytest.raises(ValueError, match="norm_type must be 'group', got 'spatial'"):
        VQVAE(dict(norm_type="spatial"))


@pytest.mark.parametrize("options", [dict(), dict(decay=0.9, restart_below=0.1)])
def test_learns(options) -> None:
    torch.manual_seed(0)
    model = VQVAE(SIZES | dict(num_vq_embeddings=16, mid_block_add_attention=False), **options)
    images = image().tanh()
    optimizer = torch.optim.Adam((p for p in model.parameters() if p.requires_grad), 3e-3)
    losses = []
    for _ in range(20):
        reconstruction, _, loss = model(images)
        losses.append(F.mse_loss(reconstruction, images))
        optimizer.zero_grad()
        (losses[-1] + loss).backward()
        optimizer.step()
    assert losses[-1] < 0.7 * losses[0]

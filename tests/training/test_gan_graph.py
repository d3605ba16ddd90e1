"""A training step recorded once: the losses and weights are those of plain steps, to the bit."""

import itertools
from dataclasses import replace

import pytest
import torch

from aigc_fast.models.gan import DCGANDiscriminator, DCGANGenerator
from aigc_fast.training import RECIPES, GANTrainer
from tests.tape import tapes
from tests.training.test_gan import LABELS, SAMPLES, stylegan2, trainer

BATCHES = list(itertools.islice(itertools.cycle([slice(0, 4), slice(4, 8), slice(2, 6)]), 11))
CASES = {
    "plain batch norm": (RECIPES["non-saturating"], 3),
    "rates that fall, a penalty, two kinds of step": (RECIPES["wgan-gp"], None),
    "lazy penalty, instance noise": (replace(RECIPES["r1"], instance_noise=0.1), None),
    "clipped weights": (replace(RECIPES["wgan"], n_critic=2), None),
    "relativistic, clipped gradients": (replace(RECIPES["r3gan"], max_norm=0.1), 3),
    "bfloat16": (replace(RECIPES["hinge"], bf16=True), None),
}


def trained(ours, batches=BATCHES, device="cpu"):
    """Losses of every step."""
    ours.done = lambda step: step / 12
    labels = LABELS if ours.generator.num_classes else None
    found = []
    for batch in batches:
        given = None if labels is None else labels[batch].to(device)
        found.append(ours.step(SAMPLES[batch].to(device), given))
    return [(g.item(), d.item()) for g, d in found]


def weights(ours):
    parts = {"average": ours.average, **ours.networks}
    found = {f"{part}.{k}": v for part, net in parts.items() for k, v in net.state_dict().items()}
    return found | {"updates": torch.tensor(ours.ema.updates), "random": ours.random.get_state()}


@pytest.mark.parametrize("name", CASES)
def test_replayed_steps_are_plain_steps(name):
    recipe, classes = CASES[name]
    plain = trainer(recipe, num_classes=classes)
    expected = trained(plain)
    with tapes():
        ours = trainer(recipe, num_classes=classes, cuda_graph=True)
        found = trained(ours)
    assert plain._graph is None
    assert found == expected and ours.skipped == plain.skipped == 0
    kinds = max(recipe.n_critic, 2 if recipe.penalty_interval > 1 else 1)
    assert len(ours._graph._recorded) == kinds
    for key, value in weights(ours).items():
        assert value.equal(weights(plain)[key]), key


def test_path_length_in_replays():
    options = dict(path_length_weight=2.0, path_length_interval=2)
    real, plain = torch.rand(4, 3, 8, 8, dtype=torch.float64), stylegan2(**options)
    expected = [plain.step(real)[0].item() for _ in range(9)]
    with tapes():
        ours = stylegan2(cuda_graph=True, **options)
        assert [ours.step(real)[0].item() for _ in range(9)] == expected
    assert len(ours._graph._recorded) == 2
    assert ours.path_length.equal(plain.path_length) and plain.path_length > 0


def test_nan_is_skipped_and_counted_in_replays():
    with tapes():
        ours = trainer(RECIPES["wgan-gp"], cuda_graph=True)
        trained(ours, BATCHES[:6])
        before = [p.clone() for p in ours.d_parameters]
        ours.step(SAMPLES[:4] * torch.nan)
    assert ours.skipped >= 1
    assert all(map(torch.equal, before, ours.d_parameters))


def test_going_on_from_a_checkpoint_records_anew():
    expected = trained(trainer(RECIPES["wgan-gp"]))
    with tapes():
        begun, other = (trainer(RECIPES["wgan-gp"], cuda_graph=True) for _ in range(2))
        part = trained(begun, BATCHES[:5])
        trained(other)
        other.load_state_dict(begun.state_dict())
        assert part + trained(other, BATCHES[5:]) == expected


def networks():
    return DCGANGenerator(28, 1, 2, latent_dim=4), DCGANDiscriminator(28, 1, 2, None)


def test_a_graph_on_the_cpu_is_refused():
    with pytest.raises(ValueError, match="cuda_graph must be False for a model on cpu"):
        GANTrainer(*networks(), 4, cuda_graph=True)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", ["wgan-gp", "non-saturating"])
def test_captured_on_cuda(name):
    def run(cuda_graph):
        torch.manual_seed(0)
        on_device = (network.cuda() for network in networks())
        ours = GANTrainer(*on_device, 4, RECIPES[name], cuda_graph=cuda_graph)
        return trained(ours, device="cuda"), ours

    expected, _ = run(False)
    found, ours = run(True)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
    assert ours._graph._recorded and ours.skipped == 0

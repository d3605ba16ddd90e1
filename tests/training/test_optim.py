"""Adam and AdamW against torch's own, over several steps."""

import copy

import pytest
import torch
from torch import nn

from aigc_fast.training import EMA, Adam, AdamW

PAIRS = {
    "adam": (Adam, torch.optim.Adam, {"weight_decay": 0.1}),
    "adamw": (AdamW, torch.optim.AdamW, {"weight_decay": 0.1}),
    "no_momentum": (AdamW, torch.optim.AdamW, {"betas": (0.0, 0.9), "eps": 1e-6}),
}


def model(dtype=torch.float64):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 3)).to(dtype)


def take_steps(network, optimizer, steps, scale=1.0, seed=0, after=lambda: None):
    random = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        optimizer.zero_grad()
        x = torch.randn(4, 5, generator=random, dtype=torch.float64)
        (scale * network(x).square().mean()).backward()
        after()
        optimizer.step()


def assert_same(a, b, **tolerance):
    for x, y in zip(a.parameters(), b.parameters(), strict=True):
        torch.testing.assert_close(x, y, **tolerance)


@pytest.mark.parametrize("name", PAIRS)
def test_steps_are_those_of_torch(name):
    ours, theirs, options = PAIRS[name]
    a, b = model(), model()
    groups = lambda m: [{"params": m[0].parameters()}, {"params": m[1].parameters(), "lr": 0.01}]  # noqa: E731
    take_steps(a, ours(groups(a), 0.1, **options), 5)
    take_steps(b, theirs(groups(b), 0.1, **options), 5)
    assert_same(a, b)


def test_clips_by_the_norm_of_all_groups():
    a, b = model(), model()
    groups = [{"params": a[0].parameters()}, {"params": a[1].parameters()}]
    take_steps(a, AdamW(groups, 0.1, max_norm=0.01), 4, scale=100)
    clip = lambda: nn.utils.clip_grad_norm_(b.parameters(), 0.01)  # noqa: E731
    take_steps(b, torch.optim.AdamW(b.parameters(), 0.1), 4, scale=100, after=clip)
    assert_same(a, b)


def test_average_moves_as_by_itself():
    a, b = model(), model()
    ema, plain = EMA(a, 0.9), EMA(b, 0.9)
    take_steps(a, Adam(a.parameters(), 0.1, average=ema), 5)
    optimizer = torch.optim.Adam(b.parameters(), 0.1)
    optimizer.register_step_post_hook(lambda *_: plain.update(b))
    take_steps(b, optimizer, 5)
    assert ema.updates == plain.updates == 5
    assert_same(ema.model, plain.model)


@pytest.mark.parametrize("guard", [True, False])
@pytest.mark.parametrize("groups", [1, 2])
def test_parameters_of_several_dtypes(groups, guard):
    """As float32 norms among bfloat16 weights."""
    networks = model(torch.float32), model(torch.float32)
    for network in networks:
        network[0].bfloat16()

    def steps(network, kind, **options):
        params = list(network.parameters())
        some = [params] if groups == 1 else [params[:2], params[2:]]
        optimizer = kind([{"params": p} for p in some], 0.1, **options)
        for step in range(3):
            for i, p in enumerate(params):
                p.grad = torch.full_like(p, 0.5 * i - step)
            if not options:
                nn.utils.clip_grad_norm_(params, 0.3)
            optimizer.step()

    steps(networks[0], AdamW, max_norm=0.3, guard=guard)
    steps(networks[1], torch.optim.AdamW)
    assert_same(*networks, rtol=0.02, atol=0.02)


def test_averages_belong_to_their_parameters_in_any_order():
    a, b = model(), model()
    ema, plain = EMA(a, 0.9), EMA(b, 0.9)
    groups = lambda m: [{"params": [m[1].weight, m[0].bias]}, {"params": [m[0].weight, m[1].bias]}]  # noqa: E731
    take_steps(a, Adam(groups(a), 0.1, average=ema), 3)
    optimizer = torch.optim.Adam(groups(b), 0.1)
    optimizer.register_step_post_hook(lambda *_: plain.update(b))
    take_steps(b, optimizer, 3)
    assert_same(ema.model, plain.model)
    with pytest.raises(ValueError, match="average must be an EMA of the model"):
        Adam(b.parameters(), average=ema)


@pytest.mark.parametrize("spoil", ["gradient", "loss"])
def test_a_step_that_is_not_finite_changes_nothing_and_is_counted(spoil):
    network = model()
    ema = EMA(network)
    optimizer = AdamW(network.parameters(), 0.1, average=ema)
    take_steps(network, optimizer, 2)
    before = copy.deepcopy((network.state_dict(), optimizer.state_dict(), ema.model.state_dict()))
    network(torch.ones(1, 5).double()).sum().backward()
    loss = torch.tensor(1.0)
    if spoil == "gradient":
        network[1].bias.grad[0] = torch.inf
    else:
        loss = loss * torch.nan
    optimizer.step(loss=loss)
    after = network.state_dict(), optimizer.state_dict(), ema.model.state_dict()
    torch.testing.assert_close(after, before, rtol=0, atol=0)
    assert optimizer.skipped == 1
    take_steps(network, optimizer, 1)
    assert optimizer.skipped == 1 and optimizer.state_dict()["state"][0]["step"] == 3


@pytest.mark.parametrize("first", ["ours", "theirs"])
def test_state_dicts_load_in_either_direction(first):
    kinds = {"ours": AdamW, "theirs": torch.optim.AdamW}
    second = "theirs" if first == "ours" else "ours"
    a = model()
    begun = kinds[first](a.parameters(), 0.1)
    take_steps(a, begun, 3)
    b = copy.deepcopy(a)
    continued = kinds[second](b.parameters(), 0.7)
    continued.load_state_dict(copy.deepcopy(begun.state_dict()))
    take_steps(a, begun, 3, seed=1)
    take_steps(b, continued, 3, seed=1)
    assert_same(a, b)


def test_parameters_without_a_gradient_stay():
    network = model()
    network[0].requires_grad_(False)
    before = network[0].weight.clone()
    take_steps(network, AdamW(network.parameters(), 0.1, weight_decay=0.5), 2)
    assert torch.equal(network[0].weight, before)


def test_refuses_what_it_does_not_have():
    network = model()
    theirs = torch.optim.AdamW(network.parameters(), amsgrad=True)
    with pytest.raises(ValueError, match="amsgrad must be False"):
        AdamW(network.parameters()).load_state_dict(theirs.state_dict())
    with pytest.raises(ValueError, match="max_norm must be positive"):
        AdamW(network.parameters(), max_norm=0.0)


def test_a_closure_is_called_with_gradients():
    network = model()
    optimizer = AdamW(network.parameters(), 0.1)

    def closure():
        loss = network(torch.ones(1, 5).double()).sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).requires_grad
    assert optimizer.state_dict()["state"][0]["step"] == 1

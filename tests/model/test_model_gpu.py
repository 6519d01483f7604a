"""On a GPU: the same network as on the CPU, and steps that never wait for the device."""

from __future__ import annotations

import copy

import pytest
import torch
from model_tiny import IMAGE, Paged, gap, logits, prompt, random_model, tiny

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

CONFIG = tiny(head_dim=32, rotary_dim=16, hidden_size=64, intermediate_size=32, sparse=dict(index_dim=32))
PARTS = (3, ("image", 1, 4, 6), 60, ("video", 2, 4, 4), 90)


def on_gpu(p):
    return {name: tensor.cuda() if "pixel" in name else tensor for name, tensor in p.media.items()}


def test_logits_are_those_of_the_cpu():
    model, p = random_model(CONFIG), prompt(CONFIG, *PARTS)
    wanted = logits(model, p)
    gpu = copy.deepcopy(model).cuda()
    with torch.no_grad():
        found = gpu.logits(gpu(p.ids, **on_gpu(p)).hidden).cpu()
    # A choice of blocks or experts near a tie may differ under TF32: all but a few rows are close.
    rows = (found - wanted).abs().amax(-1) / wanted.abs().max()
    assert float((rows < 1e-2).float().mean()) > 0.9


def test_gradients_are_those_of_the_cpu():
    model = random_model(tiny(head_dim=32, rotary_dim=16, num_local_experts=2,
                              sparse=dict(topk_blocks=40, index_dim=16)))  # fmt: skip
    p, found = prompt(model.config, 100), {}
    for device in ("cpu", "cuda"):
        one = copy.deepcopy(model).to(device)
        out = one(p.ids.to(device), msa="train")
        (out.hidden.square().mean() + out.index_loss).backward()
        found[device] = {n: q.grad.cpu() for n, q in one.named_parameters() if q.grad is not None}
    assert found["cuda"].keys() == found["cpu"].keys()
    for name, wanted in found["cpu"].items():
        if bool(wanted.any()):
            assert gap(found["cuda"][name], wanted) <= 2e-2, name


@pytest.mark.parametrize("stage", ["train", "warmup"])
def test_a_bf16_training_step_moves_every_parameter(stage):
    model, p = random_model(CONFIG).cuda(), prompt(CONFIG, *PARTS)
    before = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
    with torch.autocast("cuda", torch.bfloat16):
        out = model(p.ids, cu_seqlens=[0, 70, len(p.ids)], msa=stage, **on_gpu(p))
        loss = torch.nn.functional.cross_entropy(model.logits(out.hidden)[:-1], p.ids[1:].cuda()) + out.index_loss
    loss.backward()
    assert bool(loss.isfinite())
    optimizer.step()
    for name, q in model.named_parameters():
        assert bool(q.isfinite().all()), name
        assert not torch.equal(q, before[name]), name


def test_cached_decode_equals_prefill():
    model = random_model(CONFIG).cuda()
    ids = prompt(CONFIG, 40).ids
    paged = Paged(model)
    paged.cache = type(paged.cache)(CONFIG, paged.cache.num_pages, device="cuda")
    paged.table = paged.table.cuda()
    found = torch.cat([paged.step({0: piece}) for piece in (ids[:30], *ids[30:].split(1))])
    with torch.no_grad():
        wanted = model.logits(model(ids).hidden)
    rows = (found - wanted).abs().amax(-1) / wanted.abs().max()
    assert float((rows < 1e-2).float().mean()) > 0.9


def test_the_mixture_of_experts_never_waits_for_the_device():
    moe = random_model(CONFIG).layers[1].mlp.cuda().bfloat16()
    x = torch.randn(200, 64, device="cuda", dtype=torch.bfloat16)
    moe(x)  # the first call may set up libraries
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        out, _, _ = moe(x)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert bool(out.isfinite().all())


def test_a_training_step_never_waits_for_the_device():
    model = random_model(CONFIG).cuda()
    ids = prompt(CONFIG, 200).ids
    assert not bool((ids == IMAGE).any())
    for mode in ("default", "error"):
        torch.cuda.set_sync_debug_mode(mode)
        try:
            with torch.autocast("cuda", torch.bfloat16):
                out = model(ids, cu_seqlens=[0, 90, 200], msa="train")
                loss = out.hidden.float().square().mean() + out.index_loss
            loss.backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert bool(loss.isfinite())

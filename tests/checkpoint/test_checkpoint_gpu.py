"""Loading straight onto a GPU and saving from it."""

from __future__ import annotations

import pytest
import torch

from openm3.checkpoint import load_model, save_model

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize("quantization", [None, "mxfp8"])
def test_a_gpu_gets_the_checkpoints_dtype_and_the_same_numbers(tiny_model, tmp_path, quantization):
    save_model(tiny_model(hidden_size=64), tmp_path / "m", dtype=torch.bfloat16, quantization=quantization)
    on_gpu, on_cpu = load_model(tmp_path / "m", device="cuda"), load_model(tmp_path / "m")
    assert {p.dtype for p in on_gpu.parameters()} == {torch.bfloat16}
    assert {b.dtype for b in on_gpu.buffers()} == {torch.float32}
    for name, tensor in on_gpu.state_dict().items():
        assert tensor.device.type == "cuda"
        assert torch.equal(tensor.cpu().float(), on_cpu.state_dict()[name])


@pytest.mark.parametrize("quantization", [None, "mxfp8"])
def test_a_save_from_the_gpu_writes_the_same_bytes(tiny_model, tmp_path, quantization):
    model = tiny_model(hidden_size=64, dtype=torch.bfloat16)
    save_model(model, tmp_path / "cpu", quantization=quantization)
    save_model(model.cuda(), tmp_path / "gpu", quantization=quantization)
    for file in (tmp_path / "cpu").iterdir():
        assert (tmp_path / "gpu" / file.name).read_bytes() == file.read_bytes()


@pytest.mark.parametrize("quantization", [None, "mxfp8"])
def test_peak_memory_on_the_gpu_is_the_model_and_its_largest_tensor(tiny_model, tmp_path, quantization):
    model = tiny_model(hidden_size=512, vocab_size=60_000, dense_intermediate_size=24_000)
    save_model(model, tmp_path / "m", quantization=quantization, dtype=torch.bfloat16)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    loaded = load_model(tmp_path / "m", device="cuda")
    own = [*loaded.parameters(), *loaded.buffers()]
    peak = torch.cuda.max_memory_allocated() - before
    print(f"peak {peak / 1e6:.0f} MB, model {sum(t.nbytes for t in own) / 1e6:.0f} MB")
    assert peak <= sum(t.nbytes for t in own) + max(t.nbytes for t in own) + (1 << 20)

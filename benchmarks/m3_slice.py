"""Claim: decode of M3 on one H100 comes near what its memory allows, and is 10 times transformers' at batch 32, 32 K.

Four layers of the released sizes (one dense, three with MoE and MSA), embedding and head, random weights made on the
device: 50 GB in bf16. Caches are filled with random keys and values, not by a prompt; then the engine decodes, whole
steps: scheduling, model, sampling. Beside each time its floor: the bytes of the weights and experts actually used and
of the caches that have to be read, at the copy speed of the same run. The baseline is transformers' own forward on the
same weights (shared, not copied) and the same cache contents, a greedy step at a time, as its `generate` decodes.

    python benchmarks/m3_slice.py --quick --seconds 240     # the most important sizes; resume with --resume
    python benchmarks/m3_slice.py --device cpu --tiny       # the same on a CPU, with a model of nothing

Writes benchmarks/results/m3_slice_DEVICE.json after each measurement. What cannot run is a record with an `error`.
"""

from __future__ import annotations

import argparse
import gc
import inspect
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median

import torch
from msa_attention import Clock, DeviceLost, OutOfTime, Record, about, device_name
from torch import Tensor

from openm3.config import M3Config, SparseConfig, VisionConfig
from openm3.engine.core import Engine
from openm3.engine.output import TextOutput
from openm3.engine.request import Request, SamplingParams
from openm3.engine.runner import Runner
from openm3.model import M3

K = 1 << 10
QUICK = ((32, 32 * K), (1, 32 * K), (8, 32 * K), (64, 32 * K), (1, 128 * K))


@dataclass(frozen=True)
class Settings:
    """What is measured, in this order; `repeats` steps at most after two that are not counted."""

    device: str = "cuda"
    dtype: torch.dtype = torch.bfloat16
    cases: tuple[tuple[int, int], ...] = (
        *QUICK, *((batch, 4 * K) for batch in (1, 8, 32, 64)), (8, 128 * K), (32, 128 * K), (64, 128 * K),
    )  # fmt: skip
    copied: int = 2 << 30
    budget_ms: float = 2000.0
    repeats: tuple[int, int] = (3, 30)
    seconds: float = 3600.0
    cold: int | None = None
    tiny: bool = False


def slice_config(tiny: bool) -> M3Config:
    """One dense and three sparse layers of M3's sizes; tiny: of none to speak of."""
    m3, layers = M3Config.preset("m3"), (False, True, True, True)
    text = replace(m3.text, num_hidden_layers=4, sparse_layers=layers, moe_layers=layers)
    if tiny:
        sizes = dict(vocab_size=256, hidden_size=64, num_attention_heads=4, num_key_value_heads=2, head_dim=16,
                     rotary_dim=8, dense_intermediate_size=96, intermediate_size=32, shared_intermediate_size=32,
                     num_local_experts=8, num_experts_per_tok=2, bos_token_id=1, eos_token_id=2)  # fmt: skip
        text = replace(text, **sizes, sparse=SparseConfig(index_heads=2, index_dim=16, block_size=8, topk_blocks=3))
    vision = VisionConfig(hidden_size=48, intermediate_size=96, num_hidden_layers=1, num_attention_heads=2)
    last = text.vocab_size - 1
    return M3Config(text=text, vision=vision, projector_hidden_size=64, image_token_id=last - 1, video_token_id=last)


class Nothing:
    """A decoder of texts that nobody reads."""

    def push(self, token: int) -> str:
        return ""

    def flush(self) -> str:
        return ""


class Slice:
    """The model and one batch of contexts in its cache."""

    def __init__(self, model: M3, batch: int, context: int, steps: int) -> None:
        self.model, self.batch, self.context = model, batch, context
        text = model.config.text
        page = text.sparse.block_size
        pages = batch * -(-(context + steps) // page)
        self.engine = Engine(
            Runner(model, pages),
            num_pages=pages,
            page_size=page,
            max_batch_tokens=batch * context,
            ahead=model.device.type == "cuda",  # as LLM does
        )
        generator = torch.Generator(model.device).manual_seed(1)
        for layer in self.engine.runner.cache.layers:
            for tensor in (layer.k, layer.v, layer.index_k):
                if tensor is not None:
                    tensor.normal_(generator=generator)
        ids = torch.randint(3, text.vocab_size - 2, (batch, context), generator=torch.Generator().manual_seed(2))
        greedy = SamplingParams(temperature=0.0, top_p=1.0, top_k=0)
        self.requests = [Request(row, greedy, steps, output=TextOutput(Nothing())) for row in ids.tolist()]
        for request in self.requests:
            self.engine.add(request)
        self.engine.scheduler.schedule()  # gives everyone pages
        for request in self.requests:
            request.computed = context - 1

    def contents(self, layer: int) -> list[Tensor | None]:
        """Keys, values [B, Hkv, context - 1, D] and index keys [B, 1, context - 1, Di] of a layer, copied."""
        cache = self.engine.runner.cache.layers[layer]
        found: list[Tensor | None] = []
        for tensor in (cache.k, cache.v, None if cache.index_k is None else cache.index_k[:, None]):
            if tensor is not None:
                each = [tensor[r.pages].transpose(0, 1).flatten(1, 2)[:, : self.context - 1] for r in self.requests]
                tensor = torch.stack(each)
            found.append(tensor)
        return found

    def floor_bytes(self, hit: Tensor) -> int:
        """What a step has to read: hit [MoE layers, E], the tokens that each expert got."""
        text, model, width = self.model.config.text, self.model, self.model.embed.weight.itemsize
        experts = {
            id(p) for layer in model.layers for p in getattr(layer.mlp, "experts", torch.nn.Module()).parameters()
        }
        skipped = {id(model.embed.weight), *experts}
        skipped |= {id(p) for part in (model.vision, model.projector) for p in part.parameters()}
        weights = sum(p.nbytes for p in model.parameters() if id(p) not in skipped)
        one_expert = 3 * text.hidden_size * text.intermediate_size * width
        block = text.sparse.block_size
        own = (self.context - 1) % block + 1
        selected = min(self.context, (text.sparse.topk_blocks - 1) * block + own)
        a_key = 2 * text.num_key_value_heads * text.head_dim * width
        keys = sum(
            selected * a_key + self.context * text.sparse.index_dim * width if sparse else self.context * a_key
            for sparse in text.sparse_layers
        )
        return weights + int((hit > 0).sum()) * one_expert + self.batch * keys


def baseline(model: M3):
    """transformers' model on the same parameters; ImportError without transformers."""
    from transformers import AutoConfig
    from transformers.models.minimax_m3_vl.modeling_minimax_m3_vl import MiniMaxM3VLForCausalLM

    with tempfile.TemporaryDirectory() as directory:
        model.config.save_pretrained(directory)
        config = AutoConfig.from_pretrained(directory).text_config
    with torch.device("meta"):
        theirs = MiniMaxM3VLForCausalLM(config)
    theirs.load_state_dict(dict(shared(model)), assign=True)
    with torch.device(model.device):
        theirs.model.rotary_emb = type(theirs.model.rotary_emb)(config=config)
    return theirs.eval().requires_grad_(False)


def shared(model: M3):
    """(transformers' name, our tensor or a view of it)."""
    yield from (("model.embed_tokens.weight", model.embed.weight), ("model.norm.weight", model.norm.weight))
    yield "lm_head.weight", model.lm_head.weight
    for i, layer in enumerate(model.layers):
        at, attn = f"model.layers.{i}.", layer.attn
        yield at + "input_layernorm.weight", layer.attn_norm.weight
        yield at + "post_attention_layernorm.weight", layer.mlp_norm.weight
        sizes = [n * attn.head_dim for n in (attn.q_heads, attn.kv_heads, attn.kv_heads)]
        for name, part in zip("qkv", attn.qkv_proj.weight.split(sizes)):
            yield f"{at}self_attn.{name}_proj.weight", part
        for name in ("o_proj", "q_norm", "k_norm"):
            yield f"{at}self_attn.{name}.weight", getattr(attn, name).weight
        if attn.index_heads:
            q, k = attn.index_proj.weight.tensor_split([-len(attn.index_k_norm.weight)])
            parts = (("q_proj", q), ("k_proj", k), ("q_norm", attn.index_q_norm.weight))
            for name, part in (*parts, ("k_norm", attn.index_k_norm.weight)):
                yield f"{at}self_attn.indexer.{name}.weight", part
        mlp = layer.mlp
        if hasattr(mlp, "experts"):
            yield at + "mlp.gate.weight", mlp.router.weight
            yield at + "mlp.gate.e_score_correction_bias", mlp.router.bias
            yield at + "mlp.experts.gate_up_proj", mlp.experts.gate_up
            yield at + "mlp.experts.down_proj", mlp.experts.down
        inner, prefix = (mlp.shared, "mlp.shared_experts.") if hasattr(mlp, "experts") else (mlp, "mlp.")
        yield f"{at}{prefix}gate_up_proj.weight", inner.gate_up_proj.weight
        yield f"{at}{prefix}down_proj.weight", inner.down_proj.weight


class Bench:
    """One run: the copy's speed, then case by case the engine and transformers."""

    def __init__(self, settings: Settings, output: Path, resume: bool = False) -> None:
        self.settings, self.clock = settings, Clock(settings)
        header = about(settings) | {"benchmark": "slice"}
        self.record = Record(output, header, settings.seconds, resume, self.clock)
        self.loads: list[Tensor] = []

    def run(self) -> dict:
        s = self.settings
        try:
            with torch.inference_mode():
                self.record.measure(self.copy, what="ceilings", side="copy")
                torch.manual_seed(0)
                self.model = M3(slice_config(s.tiny), device=s.device, dtype=s.dtype).eval()
                self.model.register_forward_hook(lambda _, args, out: self.loads.append(out.router_load))
                for batch, context in s.cases:
                    for side in ("openm3", "transformers"):
                        work = getattr(self, side)
                        self.record.measure(lambda row, work=work, at=(batch, context): work(row, *at), what="decode",
                                            side=side, batch=batch, context=context)  # fmt: skip
                        self.free()
        except OutOfTime:
            self.record.data["stopped"] = f"the {s.seconds:.0f} seconds of this run were over"
            self.record.write()
        return self.record.data

    def copy(self, row: dict) -> None:
        x = torch.zeros(self.settings.copied, dtype=torch.uint8, device=self.settings.device)
        y = torch.empty_like(x)
        row |= self.record.rate(self.clock.times(lambda: y.copy_(x)), bytes=2 * len(x))

    def openm3(self, row: dict, batch: int, context: int) -> None:
        case = self.slice(batch, context)
        row["logits"] = self.first_logits(case)
        times = self.steps(case.engine.step)
        floor = case.floor_bytes(self.loads[-1])
        row |= self.record.rate(times, bytes=floor)
        row |= {"experts_hit": (self.loads[-1] > 0).sum(1).tolist(), "tokens_per_second": 1e3 * batch / row["ms"]}

    def transformers(self, row: dict, batch: int, context: int) -> None:
        try:
            from transformers import DynamicCache

            theirs = baseline(self.model)
        except ImportError:
            raise RuntimeError("transformers missing") from None
        case, cache = self.slice(batch, context), DynamicCache(config=theirs.config)
        ids = torch.tensor([[r.token_ids[-1]] for r in case.requests], device=self.settings.device)
        for i, layer in enumerate(cache.layers):
            keys, values, index = case.contents(i)
            layer.update(keys, values)
            if index is not None:
                layer.update_index(index)
        del case, keys, values, index
        self.free()
        first: list[Tensor] = []
        accepted = inspect.signature(theirs.forward).parameters
        given = {"cache" if "cache" in accepted else "past_key_values": cache}  # by transformers' version

        def step() -> None:
            logits = theirs(input_ids=ids, **given, use_cache=True, logits_to_keep=1).logits[:, -1].float()
            first.append(logits[:1, :8]) if not first else None
            ids.copy_(logits.argmax(-1, keepdim=True))
            ids.tolist()

        row |= self.record.rate(self.steps(step))
        row |= {"logits": first[0][0].tolist(), "tokens_per_second": 1e3 * batch / row["ms"]}
        ours = self.record.find(what="decode", side="openm3", batch=batch, context=context)
        if ours and "ms" in ours[0]:
            row["ours_times_as_fast"] = row["ms"] / ours[0]["ms"]
            row["logits_gap"] = max(abs(a - b) for a, b in zip(row["logits"], ours[0]["logits"]))

    def slice(self, batch: int, context: int) -> Slice:
        self.loads.clear()
        return Slice(self.model, batch, context, self.settings.repeats[1] + 8)

    def first_logits(self, case: Slice) -> list[float]:
        """Of the first row's next token, some: both sides must say the same."""
        batch = case.engine.scheduler.schedule()
        return case.engine.runner.run(batch)[0, :8].tolist()

    def steps(self, step) -> list[float]:
        """ms of whole steps, each of which ends with its tokens on the host."""
        least, most = self.settings.repeats
        times: list[float] = []
        while len(times) < most + 2 and (len(times) < least + 2 or sum(times[2:]) < self.settings.budget_ms):
            start = time.perf_counter()
            step()
            times.append(1e3 * (time.perf_counter() - start))
        return times[2:]

    def free(self) -> None:
        gc.collect()
        if self.clock.cuda:
            torch.cuda.empty_cache()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="32 K and 128 K only, fewer steps")
    parser.add_argument("--tiny", action="store_true", help="a tiny model and short contexts, to try the benchmark")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--seconds", type=float, default=3600.0, help="begin no measurement after so many")
    parser.add_argument("--resume", action="store_true", help="measure what is missing in the output")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    settings = Settings(device=args.device, seconds=args.seconds, tiny=args.tiny)
    if args.quick:
        settings = replace(settings, cases=QUICK, budget_ms=500.0, repeats=(3, 12))
    if args.tiny:
        settings = replace(settings, cases=((1, 64), (3, 40)), dtype=torch.float32, copied=1 << 20, repeats=(2, 3))
    name = device_name(args.device).replace(" ", "_").replace("/", "_")
    output = args.output or Path(__file__).parent / "results" / f"m3_slice_{name}.json"
    try:
        data = Bench(settings, output, args.resume).run()
    except DeviceLost as error:
        print(f"the device is lost: {error}")
        return 3
    rows = [row for row in data["results"] if "ms" in row and row["what"] == "decode"]
    for row in rows:
        print(f"{row['side']:>12} {row['batch']:3} x {row['context']:6}: {row['ms']:.3g} ms, "
              f"{row['tokens_per_second']:.0f} tokens/s")  # fmt: skip
    print(
        f"median of the shares of the copy's speed: {median([r['of_ceiling'] for r in rows if 'of_ceiling' in r]):.0%}"
    )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

"""One scheduled batch as one packed forward of the model over the page cache.

The runner owns the cache's tensors and knows no queue. Media are encoded once, each picture or segment of a clip when
the prompt's chunks reach its placeholders, and handed to the model slice by slice; the embeddings of the last pictures
and clips are kept for the next request that shows them.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import OrderedDict
from collections.abc import Iterable

import torch
from torch import Tensor

from openm3.engine.graphs import DecodeGraphs
from openm3.engine.request import Media, MediaPiece
from openm3.engine.sampler import logprobs_of
from openm3.engine.scheduler import Chunk, ScheduledBatch
from openm3.engine.threads import one_thread
from openm3.model import M3, KVCache, plan_args
from openm3.msa import Plan
from openm3.msa.plan import to_device

# On a CPU, a step of fewer multiply-adds than this (about 0.1 s of a core), or one that answers wait for (kept short by
# the engine), of a model that a core reads in as long, runs on one thread: it gains little from more, and loses a
# hundredfold where another process, such as the reader of those answers, wants one of the cores.
ONE_THREAD_STEP, ONE_THREAD_PARAMETERS = 1 << 32, 1 << 26
MEDIA_CACHE_BYTES = 256 << 20
LOGPROB_ROWS = 64  # prompt tokens whose logits over the whole vocabulary are held at a time


class MediaCache:
    """Embeddings [tokens, H] by the digest of what they show, at most `max_bytes` of them: the last used ones."""

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes, self.bytes = max_bytes, 0
        self._embeds: OrderedDict[str, Tensor] = OrderedDict()

    def get(self, digest: str) -> Tensor | None:
        if digest in self._embeds:
            self._embeds.move_to_end(digest)
        return self._embeds.get(digest)

    def put(self, digest: str, embeds: Tensor) -> None:
        if digest in self._embeds or embeds.nbytes > self.max_bytes:
            return
        self._embeds[digest] = embeds
        self.bytes += embeds.nbytes
        while self.bytes > self.max_bytes:
            self.bytes -= self._embeds.popitem(last=False)[1].nbytes


class Runner:
    """Runs batches of `model`, with `num_pages` pages of cache beside it on its device, in its dtype.

    media_cache_bytes: bound of the embeddings kept of pictures and clips already seen; decode_graphs: steps of answers
    alone go through CUDA graphs (`graphs.py`), for which there is one page more; None: on a GPU in half precision.
    """

    def __init__(
        self,
        model: M3,
        num_pages: int,
        *,
        media_cache_bytes: int = MEDIA_CACHE_BYTES,
        decode_graphs: bool | None = None,
    ) -> None:
        weight = model.embed.weight
        if decode_graphs is None:
            decode_graphs = weight.is_cuda and weight.dtype in (torch.bfloat16, torch.float16)
        self.model = model
        self.device = weight.device
        self.cache = KVCache(model.config, num_pages + decode_graphs, device=weight.device, dtype=weight.dtype)
        self.media_cache = MediaCache(media_cache_bytes)
        self._plan_args = plan_args(model.config)
        self._parameters = sum(p.numel() for p in model.parameters())
        # The model reads these tokens, it does not write them: they stand for embeddings it would not have.
        unwritable = [t for t in (model.config.image_token_id, model.config.video_token_id) if t is not None]
        self._unwritable = torch.tensor(unwritable, dtype=torch.int64, device=weight.device)
        context = model.config.text.max_position_embeddings
        self.graphs = DecodeGraphs(self._decode, self.cache, self._plan_args, context) if decode_graphs else None
        self._table = torch.empty(0, 0, dtype=torch.int32)
        self._table_of: list[tuple[list[int], int]] = []  # the page lists in the table, and how much of each

    def run(self, batch: ScheduledBatch, tokens: Tensor | None = None) -> Tensor:
        """Computes the batch's tokens into their pages; float32 logits [len(batch.sampling), V] of the last ones.

        tokens int64 [chunks]: on the device, the one token of each answer, where its request does not hold it yet.
        Prompts whose log-probabilities are wanted get those of their chunk in `prompt_logprobs`.
        """
        short = self._parameters * batch.tokens <= ONE_THREAD_STEP or any(map(self._is_answer, batch.chunks))
        with one_thread(short and self._parameters <= ONE_THREAD_PARAMETERS and self.device.type == "cpu"):
            return self._run(batch.chunks, tokens)

    @torch.inference_mode()
    def _run(self, chunks: list[Chunk], tokens: Tensor | None) -> Tensor:
        if self.graphs is not None and all(self._is_answer(chunk) for chunk in chunks):
            newest = [c.request.token_ids[c.start] for c in chunks] if tokens is None else tokens
            return self.graphs.run(newest, [c.request.pages for c in chunks], [c.end for c in chunks])
        ids: list[int] = []
        offsets, last = [0], []
        for chunk in chunks:
            ids += chunk.request.token_ids[chunk.start : chunk.end]
            offsets.append(offsets[-1] + chunk.tokens)
            if chunk.samples:
                last.append(offsets[-1] - 1)
        plan = Plan.paged(self._page_table(chunks), [c.end for c in chunks], offsets, **self._plan_args)
        hidden = self.model(
            torch.tensor(ids) if tokens is None else tokens,
            cache=self.cache,
            plan=plan,
            media_embeds=self._media_embeds(chunks),
        ).hidden  # [T, H]
        for chunk, offset in zip(chunks, offsets):
            if chunk.request.params.prompt_logprobs is not None:
                self._score_prompt(chunk, hidden[offset : offset + chunk.tokens])
        return self._logits(hidden if len(last) == offsets[-1] else hidden[last])

    @staticmethod
    def _is_answer(chunk: Chunk) -> bool:
        """Whether a chunk is the newest token of an answer, which is no picture and has no log-probabilities left."""
        return chunk.samples and chunk.tokens == 1 and chunk.start >= len(chunk.request.prompt_ids)

    def _decode(self, ids: Tensor, plan: Plan) -> Tensor:
        return self._logits(self.model(ids, cache=self.cache, plan=plan).hidden)

    def _logits(self, hidden: Tensor) -> Tensor:
        return self.model.logits(hidden).index_fill_(1, self._unwritable, -torch.inf)

    def _score_prompt(self, chunk: Chunk, hidden: Tensor) -> None:
        """The log-probabilities of the prompt's tokens after those of the chunk, each from the hidden row before it."""
        request = chunk.request
        tokens = request.prompt_ids[chunk.start + 1 : chunk.end + 1]
        found = []
        for a in range(0, len(tokens), LOGPROB_ROWS):
            rows = tokens[a : a + LOGPROB_ROWS]
            found += logprobs_of(self._logits(hidden[a : a + len(rows)]), rows, request.params.prompt_logprobs)
        if found:
            request.prompt_logprobs = [*(request.prompt_logprobs or [None])[: chunk.start + 1], *found]

    def _page_table(self, chunks: list[Chunk]) -> Tensor:
        """int32 [B, max_pages], built anew only when a sequence came, went or grew by a page."""
        now = [(chunk.request.pages, len(chunk.request.pages)) for chunk in chunks]
        known = self._table_of
        if len(now) != len(known) or any(a is not b or n != m for (a, n), (b, m) in zip(now, known)):
            width = max(n for _, n in now)
            rows = [pages + [0] * (width - n) for pages, n in now]
            self._table, self._table_of = torch.tensor(rows, dtype=torch.int32).to(self.device), now
        return self._table

    def _media_embeds(self, chunks: list[Chunk]) -> Tensor | None:
        """[M, H]: the embeddings of all placeholder tokens in the chunks, in order; None if there are none."""
        parts = []
        for chunk in chunks:
            media = chunk.request.media
            if media is None:
                continue
            first, end = bisect_left(media.positions, chunk.start), bisect_left(media.positions, chunk.end)
            if first < end:
                self._encode_missing(media, media.missing(chunk.start, chunk.end))
                parts.append(media.embeds[to_device(torch.tensor(media.rows[first:end]), self.device)])
        return torch.cat(parts) if parts else None

    def _encode_missing(self, media: Media, missing: Iterable[MediaPiece]) -> None:
        """Fills in the embeddings of these pieces, and of the rest of an item that was seen before."""
        if media.embeds is None:
            weight = self.model.embed.weight
            rows = sum(item.tokens for item in media.items)
            media.embeds = torch.empty(rows, weight.shape[1], dtype=weight.dtype, device=self.device)
        pieces = [piece for piece in missing if not self._recall(media, piece.item)]
        # One by one on a CPU, which gains nothing from more: what a picture gives does not depend on the others.
        for group in [[piece] for piece in pieces] if self.device.type == "cpu" else [pieces]:
            if group:
                pixels = torch.cat([media.items[piece.item].pixels[piece.patches] for piece in group])
                grids = torch.stack([media.items[piece.item].grid_thw[piece.grid] for piece in group])
                embeds = self.model.encode_media(pixels.to(self.device), grids)
                for piece, part in zip(group, embeds.split([p.rows.stop - p.rows.start for p in group])):
                    media.embeds[piece.rows] = part
                    media.encoded.add(piece)
        for i in {piece.item for piece in pieces}:
            mine = [piece for piece in media.pieces if piece.item == i]
            if media.encoded.issuperset(mine):
                whole = media.embeds[mine[0].rows.start : mine[-1].rows.stop]
                self.media_cache.put(media.items[i].digest, whole.clone())
                media.items[i].pixels = None

    def _recall(self, media: Media, i: int) -> bool:
        """Takes the embeddings of an item out of those kept, if they are there."""
        known = self.media_cache.get(media.items[i].digest)
        if known is not None:
            mine = [piece for piece in media.pieces if piece.item == i]
            media.embeds[mine[0].rows.start : mine[-1].rows.stop] = known
            media.encoded.update(mine)
            media.items[i].pixels = None
        return known is not None

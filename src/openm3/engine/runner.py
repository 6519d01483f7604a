"""One scheduled batch as one packed forward of the model over the page cache.

The runner owns the cache's tensors and knows no queue; it keeps nothing of a request but its media embeddings, which
are computed once and handed to the model slice by slice as the prompt's chunks reach their placeholders.
"""

from __future__ import annotations

from bisect import bisect_left

import torch
from torch import Tensor

from openm3.engine.request import Media
from openm3.engine.scheduler import Chunk, ScheduledBatch
from openm3.model import M3, KVCache, plan_args
from openm3.msa import Plan

# On a CPU, a step of fewer multiply-adds than this (about 0.1 s of a core), of a model that a core reads in as long,
# runs on one thread: it gains little from more, and loses a hundredfold where another process wants one of the cores.
ONE_THREAD_STEP, ONE_THREAD_PARAMETERS = 1 << 32, 1 << 26


class Runner:
    """Runs batches of `model`, with `num_pages` pages of cache beside it on its device, in its dtype."""

    def __init__(self, model: M3, num_pages: int) -> None:
        weight = model.embed.weight
        self.model = model
        self.device = weight.device
        self.cache = KVCache(model.config, num_pages, device=weight.device, dtype=weight.dtype)
        self._plan_args = plan_args(model.config)
        self._parameters = sum(p.numel() for p in model.parameters())
        # The model reads these tokens, it does not write them: they stand for embeddings it would not have.
        self._unwritable = [t for t in (model.config.image_token_id, model.config.video_token_id) if t is not None]
        self._table = torch.empty(0, 0, dtype=torch.int32)
        self._table_of: list[tuple[list[int], int]] = []  # the page lists in the table, and how much of each

    def run(self, batch: ScheduledBatch) -> Tensor:
        """Computes the batch's tokens into their pages; float32 logits [len(batch.sampling), V] of the last ones."""
        tokens = sum(chunk.end - chunk.start for chunk in batch.chunks)
        small = self._parameters <= ONE_THREAD_PARAMETERS and self._parameters * tokens <= ONE_THREAD_STEP
        threads = torch.get_num_threads()
        if not small or threads == 1 or self.device.type != "cpu":
            return self._run(batch.chunks)
        torch.set_num_threads(1)
        try:
            return self._run(batch.chunks)
        finally:
            torch.set_num_threads(threads)

    @torch.inference_mode()
    def _run(self, chunks: list[Chunk]) -> Tensor:
        ids: list[int] = []
        offsets, last = [0], []
        for chunk in chunks:
            ids += chunk.request.token_ids[chunk.start : chunk.end]
            offsets.append(len(ids))
            if chunk.samples:
                last.append(len(ids) - 1)
        plan = Plan.paged(self._page_table(chunks), [c.end for c in chunks], offsets, **self._plan_args)
        hidden = self.model(
            torch.tensor(ids), cache=self.cache, plan=plan, media_embeds=self._media_embeds(chunks)
        ).hidden  # [T, H]
        logits = self.model.logits(hidden if len(last) == len(ids) else hidden[last])
        logits[:, self._unwritable] = -torch.inf
        return logits

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
                parts.append(self._encoded(media)[first:end])
        return torch.cat(parts) if parts else None

    def _encoded(self, media: Media) -> Tensor:
        if media.embeds is None:
            pixels = [p for p in (media.images, media.videos) if p is not None]
            embeds = [self.model.encode_media(rows.to(self.device), grid) for rows, grid in pixels]
            media.embeds = torch.cat(embeds)[torch.tensor(media.rows, device=self.device)]
            media.images = media.videos = None
        return media.embeds

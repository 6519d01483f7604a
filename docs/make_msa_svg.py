"""Makes docs/msa.svg, the drawing of docs/msa.md: one query, its index scores, the block maxima, top-k, the attention.

python docs/make_msa_svg.py

What it draws is computed: maxima and selection follow from SCORES by the operator's own rules.
"""

from __future__ import annotations

import math
from pathlib import Path

SCORES = (  # index score of each key, block by block
    (0.5, 0.9, 0.3, 0.6), (1.0, 3.1, 0.7, 0.4), (0.2, 0.4, 0.1, 0.3), (0.6, 0.3, 1.2, 0.5),
    (0.8, 1.5, 2.6, 1.1), (1.2, 0.4, 0.2, 0.7), (0.3, 0.1, 0.5, 0.2), (0.4, 0.7, 0.0, 0.0),
)  # fmt: skip
BLOCK, TOPK, QUERY = 4, 4, 29  # the query's own position: two keys of its block are still ahead of it
LEFT, CELL, GAP, WIDTH = 192, 21, 12, 984
STYLE = """
  text { font-family: system-ui, -apple-system, "Segoe UI", "DejaVu Sans", sans-serif; font-size: 13px; fill: #1f2328 }
  .paper { fill: #ffffff; stroke: #d0d7de } .step { font-weight: 600; font-size: 14px }
  .note { fill: #57606a; font-size: 12px }
  .mid { text-anchor: middle } .key { fill: #d8dee4 } .ahead { fill: none; stroke: #8c959f; stroke-dasharray: 2 2 }
  .query { fill: #8250df } .score { fill: #9ec5f4 } .most { fill: #0969da } .weight { fill: #1a7f37 }
  .line { stroke: #8c959f; fill: none } .chosen { fill: #dafbe1; stroke: #1a7f37; stroke-width: 1.5 }
  .local { fill: #eee5ff; stroke: #8250df; stroke-width: 1.5 } .left-out { fill: none; stroke: #d0d7de }
  .faint { fill: #8c959f }
  @media (prefers-color-scheme: dark) {
    text { fill: #e6edf3 } .paper { fill: #0d1117; stroke: #30363d } .note { fill: #9198a1 } .key { fill: #3d444d }
    .query { fill: #ab7df8 } .score { fill: #1f4b80 } .most { fill: #4493f8 } .weight { fill: #3fb950 }
    .chosen { fill: #12361f; stroke: #3fb950 } .local { fill: #2e2150; stroke: #ab7df8 } .left-out { stroke: #3d444d }
  }
"""


def key_x(key: int) -> int:
    return LEFT + key * CELL + key // BLOCK * GAP


def block_x(block: int) -> int:
    return key_x(block * BLOCK)


BLOCK_WIDTH = BLOCK * CELL - 3
MIDDLE = BLOCK_WIDTH / 2


def select() -> tuple[list[float], list[int]]:
    """(largest visible score of each block, chosen blocks): the local one, then the largest, ties to the lower."""
    own = QUERY // BLOCK
    best = [max(s for j, s in enumerate(row) if b * BLOCK + j <= QUERY) for b, row in enumerate(SCORES)]
    order = sorted(range(len(best)), key=lambda b: (b != own, -best[b], b))
    return best, sorted(order[:TOPK])


def text(x: float, y: float, content: str, kind: str = "") -> str:
    return f'<text x="{x:g}" y="{y:g}"' + (f' class="{kind}"' if kind else "") + f">{content}</text>"


def box(x: float, y: float, width: float, height: float, kind: str, radius: float = 3) -> str:
    return f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="{radius:g}" class="{kind}"/>'


def label(y: float, step: str, *notes: str) -> list[str]:
    return [text(20, y, step, "step"), *(text(20, y + 18 * (i + 1), note, "note") for i, note in enumerate(notes))]


def keys(y: float) -> list[str]:
    out = label(y + 14, "Keys in blocks", "cut at absolute positions;", "dashed: not yet visible")
    for block in range(len(SCORES)):
        out.append(text(block_x(block) + MIDDLE, y - 10, f"block {block}", "note mid"))
    for key in range(len(SCORES) * BLOCK):
        kind = "query" if key == QUERY else "key" if key < QUERY else "ahead"
        out.append(box(key_x(key), y, CELL - 3, 18, kind))
    tip = key_x(QUERY) + (CELL - 3) / 2
    out.append(text(tip, y + 34, "the query is here", "note mid"))
    return out


def scores(y: float) -> list[str]:
    """Bars that stand on y + 76."""
    out = label(y + 32, "1  Score", "one dot product a key,", "q_idx · k_idx")
    best, _ = select()
    floor = y + 76
    for key in range(QUERY + 1):
        value = SCORES[key // BLOCK][key % BLOCK]
        first = SCORES[key // BLOCK].index(best[key // BLOCK]) == key % BLOCK
        out.append(box(key_x(key), floor - 22 * value, CELL - 3, 22 * value, "most" if first else "score", 2))
    out.append(f'<path d="M{LEFT} {floor} H{WIDTH - 24}" class="line"/>')
    return out


def maxima(y: float) -> list[str]:
    best, chosen = select()
    out = label(y + 12, "2  Block max", "the largest score in it")
    for block, value in enumerate(best):
        kind = "step mid" if block in chosen else "mid faint"
        out.append(text(block_x(block) + MIDDLE, y + 18, f"{value:.1f}", kind))
    return out


def topk(y: float) -> list[str]:
    best, chosen = select()
    own = QUERY // BLOCK
    out = label(y + 14, f"3  Top-k, here {TOPK}", "the query's own block", "takes one of the slots")
    for block in range(len(best)):
        kind = "local" if block == own else "chosen" if block in chosen else "left-out"
        word = "local" if block == own else "chosen" if block in chosen else "left out"
        out.append(box(block_x(block), y, BLOCK_WIDTH, 28, kind, 6))
        out.append(text(block_x(block) + MIDDLE, y + 18.5, word, "mid" if block in chosen else "mid faint"))
    tie = next(b for b in chosen if b != own and any(best[b] == best[c] for c in range(b + 1, len(best))))
    out.append(text(block_x(tie) + MIDDLE, y + 46, "tie: the lower", "note mid"))
    out.append(text(block_x(own) + MIDDLE, y + 46, "whatever its score", "note mid"))
    out.append(text(block_x(0), y + 46, f"blocks = {chosen}", "note"))
    return out


def attention(y: float) -> list[str]:
    """Weights of a made-up main branch over the visible keys of the chosen blocks; they sum to one."""
    _, chosen = select()
    out = label(y + 22, "4  Attend", "softmax over the visible", "keys of those blocks;", "no other key is read")
    seen = [key for key in range(QUERY + 1) if key // BLOCK in chosen]
    logits = {key: 1.5 * SCORES[key // BLOCK][key % BLOCK] ** 0.6 + 0.25 * math.sin(2.3 * key) for key in seen}
    total = sum(math.exp(v) for v in logits.values())
    floor = y + 66
    for key, logit in logits.items():
        height = max(3, 270 * math.exp(logit) / total)
        out.append(box(key_x(key), floor - height, CELL - 3, height, "weight", 2))
    for block in range(len(SCORES)):
        if block in chosen:
            out.append(f'<path d="M{block_x(block)} {floor} h{BLOCK_WIDTH}" class="line"/>')
    middle = (block_x(1) + block_x(7) + BLOCK_WIDTH) / 2
    for block in chosen:
        x = block_x(block) + MIDDLE
        curve = f"M{x:g} {floor + 4} C{x:g} {floor + 26} {middle:g} {floor + 14} {middle:g} {floor + 38}"
        out.append(f'<path d="{curve}" class="line"/>')
    out.append(text(middle, floor + 54, "output of the query's heads: the weighted sum of the values v", "mid"))
    return out


def main() -> None:
    lines = [
        text(20, 34, "MiniMax Sparse Attention: one query, one index head and its group of query heads", "step"),
        text(20, 54, "Drawn with blocks of 4 and top-k 4. MiniMax-M3: blocks of 128, top-k 16, four such groups of 16 "
                     "query heads, up to 8,192 blocks.", "note"),
        *keys(100), *scores(146), *maxima(240), *topk(290), *attention(362),
    ]  # fmt: skip
    height = 508
    out = Path(__file__).with_name("msa.svg")
    size = f'viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img">'
    title = "<title>MSA: a query scores all keys, keeps the best blocks and attends to those only</title>"
    paper = box(0.5, 0.5, WIDTH - 1, height - 1, "paper", 8)
    out.write_text("\n".join([head, title, f"<style>{STYLE}</style>", paper, *lines, "</svg>"]) + "\n")
    print(out)


if __name__ == "__main__":
    main()

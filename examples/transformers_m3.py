"""transformers' own M3 with openm3's selection and attention: the same answer, in memory linear in the prompt's length.

    python examples/transformers_m3.py

The bundled small model, loaded by transformers. Any MiniMax-M3 that transformers loads goes the same way.
"""

from __future__ import annotations

import torch
from transformers import AutoTokenizer, MiniMaxM3SparseForConditionalGeneration

from openm3.checkpoint import resolve
from openm3.integrations.transformers import disable, enable


@torch.inference_mode()
def main() -> None:
    directory = resolve("openm3-nano")
    tokenizer = AutoTokenizer.from_pretrained(directory)
    model = MiniMaxM3SparseForConditionalGeneration.from_pretrained(directory, dtype=torch.float32).eval()
    messages = [{"role": "user", "content": "What is 12 plus 30?"}]
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)

    answers = []
    for switch in (disable, enable):
        out = switch(model).generate(**prompt, max_new_tokens=60, do_sample=False)
        answers.append(tokenizer.decode(out[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True).strip())
    print("transformers alone:    ", answers[0])
    print("with openm3's attention:", answers[1])

    enable(model)
    ids = prompt["input_ids"].repeat(1, 4096 // prompt["input_ids"].shape[1] + 1)[:, :4096]
    logits = model(input_ids=ids, logits_to_keep=1).logits
    print(f"{ids.shape[1]:,} tokens read at once: logits {list(logits.shape)}")


if __name__ == "__main__":
    main()

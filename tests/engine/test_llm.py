"""LLM on a tiny random M3 with the bundled tokenizer and chat template."""

import dataclasses
import json
import shutil

import pytest
import torch
from engine_tiny import tiny_config
from PIL import Image

from openm3.checkpoint import resolve, save_model
from openm3.config import NANO_SPECIALS
from openm3.engine import LLM, ChatResult, Finish, Grammar, RequestError, SamplingParams
from openm3.engine.llm import read_generation_config
from openm3.engine.memory import cache_bytes_per_token, cache_pages
from openm3.model import M3
from openm3.processing import ContentDelta, Processor, ThinkingDelta, ToolCall

CONTEXT = 1024
GREEDY = SamplingParams(temperature=0, max_tokens=20)
SEEDED = SamplingParams(temperature=1.0, seed=7, max_tokens=20)
HELLO = [{"role": "user", "content": "hello"}]
TOOL = {"type": "function", "function": {"name": "add", "description": "Adds.", "parameters": {
    "type": "object", "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}}}}}  # fmt: skip
NS = "]<]minimax[>["


def with_nano_tokens(**changes):
    config = tiny_config()
    text = dataclasses.replace(config.text, vocab_size=3072, max_position_embeddings=CONTEXT,
                               eos_token_id=NANO_SPECIALS["[e~["], **changes)  # fmt: skip
    tokens = {"image_token_id": NANO_SPECIALS["]<]image[>["], "video_token_id": NANO_SPECIALS["]<]video[>["]}
    return dataclasses.replace(config, text=text, **tokens)


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(3)
    model = M3(with_nano_tokens()).eval()
    model.reset_parameters(std=0.15)
    return model


@pytest.fixture(scope="module")
def processor(network):
    return Processor.from_pretrained(resolve("openm3-nano"), network.config)


@pytest.fixture
def llm(network, processor):
    llm = LLM.from_model(network, processor, cache_tokens=2048, max_batch_tokens=64)
    yield llm
    assert llm.engine.scheduler.pool.free == 2048 // 8, "a test left pages behind"
    assert not llm.engine.scheduler.running
    assert not llm.engine.scheduler.waiting


def picture(colour="red", size=(56, 56)):
    part = {"type": "image", "image": Image.new("RGB", size, colour)}
    return [{"role": "user", "content": [part, {"type": "text", "text": "what is this?"}]}]


class Script:
    """A runner that answers with given tokens, whatever it reads."""

    def __init__(self, llm, text: str, end="[e~["):
        self.ids = llm.processor.tokenizer.encode(text + end, specials=True)
        self.device = llm.device

    def run(self, batch):
        chosen = [self.ids[min(r.generated, len(self.ids) - 1)] for r in batch.sampling]
        return torch.nn.functional.one_hot(torch.tensor(chosen, dtype=torch.int64), 3072).float() * 1e6


def test_generate_takes_one_text_or_many_and_a_batch_changes_nothing(llm):
    texts = ["a", "The quick brown fox jumps over the lazy dog. " * 5, "to be or not"]
    for params in (GREEDY, SEEDED):
        batch = llm.generate(texts, params)
        assert batch == [llm.generate(text, params)[0] for text in texts]
        assert len({c.text for c in batch}) == 3
        for text, completion in zip(texts, batch, strict=True):
            assert completion.finish_reason == "length"
            assert len(completion.token_ids) == 20
            assert completion.text == llm.processor.tokenizer.decode(completion.token_ids)
            assert completion.prompt_tokens == len(llm.processor.tokenizer.encode(text))


def test_streamed_text_is_the_whole_answer_in_pieces(llm):
    pieces = list(llm.generate("once upon", SEEDED, stream=True))
    assert len(pieces) > 5
    assert "".join(pieces) == llm.generate("once upon", SEEDED)[0].text


def test_a_stop_string_ends_the_answer_at_the_same_place_streamed_or_not(llm):
    whole = llm.generate("once upon", GREEDY)[0].text
    stop = whole[7:10]
    params = dataclasses.replace(GREEDY, stop=stop)
    [completion] = llm.generate("once upon", params)
    assert completion.text == whole[: whole.index(stop)]
    assert completion.finish_reason == "stop"
    assert "".join(llm.generate("once upon", params, stream=True)) == completion.text


def test_a_chat_result_is_its_stream_put_together(llm):
    for messages in (HELLO, picture()):
        result = llm.chat(messages, SEEDED)
        *events, end = llm.chat(messages, SEEDED, stream=True)
        assert isinstance(end, Finish)
        assert result.content == "".join(e.text for e in events if isinstance(e, ContentDelta))
        assert (end.finish_reason, end.completion_tokens) == (result.finish_reason, 20) == ("length", 20)
        assert result.prompt_tokens == end.prompt_tokens > 1


def test_without_a_seed_every_answer_is_another(llm):
    params = SamplingParams(temperature=1.0, max_tokens=20)
    assert len({llm.generate("once upon", params)[0].text for _ in range(3)}) == 3


def test_a_picture_and_a_clip_in_one_chat_are_seen_as_the_plain_model_sees_them(llm):
    frames = [Image.new("RGB", (56, 56), (40 * i, 200 - 40 * i, 90)) for i in range(4)]
    parts = [{"type": "video", "video": frames}, *picture()[0]["content"], {"type": "video", "video": frames[::-1]}]
    prompt = llm.processor.prepare([{"role": "user", "content": parts}])
    joined = [
        (torch.cat([m.pixels for m in media]), torch.cat([m.grid_thw for m in media]))
        for media in (prompt.images, prompt.videos)
    ]
    with torch.inference_mode():
        (images, image_grid), (videos, video_grid) = joined
        hidden = llm.model(torch.tensor(prompt.input_ids), pixel_values=images, image_grid_thw=image_grid,
                           pixel_values_videos=videos, video_grid_thw=video_grid).hidden  # fmt: skip
        logits = llm.model.logits(hidden[-1:])
        logits[:, [llm.config.image_token_id, llm.config.video_token_id]] = -torch.inf
    seen = []
    run = llm.engine.runner.run
    llm.engine.runner.run = lambda batch: seen.append(run(batch)) or seen[-1]
    llm.chat([{"role": "user", "content": parts}], SamplingParams(temperature=0, max_tokens=1))
    assert torch.allclose(seen[-1], logits, rtol=1e-4, atol=1e-4)


def test_a_batch_of_chats_is_each_alone(llm):
    conversations = [HELLO, picture(), picture("blue", (84, 140)), [{"role": "user", "content": "long " * 60}]]
    modes = ["adaptive", "enabled", "disabled", "enabled"]
    batch = llm.chat_batch(conversations, SEEDED, thinking=modes)
    assert batch == [llm.chat(c, SEEDED, thinking=m) for c, m in zip(conversations, modes, strict=True)]
    assert llm.chat_batch([], SEEDED) == []


def test_a_batch_with_lists_of_another_length_is_refused(llm):
    with pytest.raises(RequestError, match="2 conversations, 1 thinking modes"):
        llm.chat_batch([HELLO, HELLO], thinking=["enabled"])
    with pytest.raises(RequestError, match="2 conversations, 2 thinking modes, 3 tool lists"):
        llm.chat_batch([HELLO, HELLO], tools=[[TOOL], None, None])


def test_thinking_content_and_calls_come_as_events_and_the_end_says_why(llm):
    call = f'{NS}<tool_call>\n{NS}<invoke name="add">{NS}<a>1{NS}</a>{NS}<b>2{NS}</b>{NS}</invoke>\n{NS}</tool_call>'
    llm.engine.runner = Script(llm, f"<mm:think>let me see</mm:think>I add.\n{call}")
    result = llm.chat(HELLO, tools=[TOOL])
    assert isinstance(result, ChatResult)
    assert result.reasoning.strip() == "let me see"
    assert result.content.strip() == "I add."
    assert [(c.name, c.arguments) for c in result.tool_calls] == [("add", {"a": 1, "b": 2})]
    assert result.finish_reason == "tool_calls"
    kinds = [type(e) for e in llm.chat(HELLO, tools=[TOOL], stream=True)]
    assert {ThinkingDelta, ContentDelta, ToolCall} < set(kinds)
    assert kinds[-1] is Finish
    assert llm.chat_batch([HELLO], tools=[TOOL]) == [result]
    assert llm.chat_batch([HELLO, HELLO], tools=[[TOOL], None])[0] == result
    cut = llm.chat(HELLO, SamplingParams(max_tokens=3))
    assert (cut.finish_reason, cut.content) == ("length", "")
    assert cut.reasoning


def test_without_thinking_there_is_no_reasoning(llm):
    llm.engine.runner = Script(llm, "</mm:think>Hi.")
    result = llm.chat(HELLO)
    assert (result.reasoning, result.content.strip(), result.finish_reason) == (None, "Hi.", "stop")


def test_closing_a_stream_frees_its_pages(llm):
    pool = llm.engine.scheduler.pool
    for pieces in (1, 5):
        stream = llm.chat(HELLO, SEEDED, stream=True)
        assert pool.free == pool.num_pages  # not begun: holds nothing
        for _ in range(pieces):
            next(stream)
        assert pool.free < pool.num_pages
        stream.close()
        assert pool.free == pool.num_pages
    stream = llm.generate("left without a word", SEEDED, stream=True)
    next(stream)
    del stream
    assert pool.free == pool.num_pages


def test_streams_interleave_on_one_thread(llm):
    texts = ["one", "two two", "three three three"]
    wanted = [llm.generate(text, SEEDED)[0].text for text in texts]
    streams = [llm.generate(text, SEEDED, stream=True) for text in texts]
    got = ["", "", ""]
    running = {0, 1, 2}
    while running:
        for i in sorted(running):
            piece = next(streams[i], None)
            if piece is None:
                running.remove(i)
            else:
                got[i] += piece
    assert got == wanted


def test_an_interrupt_in_the_model_frees_the_pages_and_the_next_answer_is_right(llm, monkeypatch):
    wanted = llm.generate("once upon", GREEDY)
    other = llm.generate("another", GREEDY, stream=True)
    piece = next(other)
    run, calls = llm.engine.runner.run, []

    def interrupted(batch):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return run(batch)

    monkeypatch.setattr(llm.engine.runner, "run", interrupted)
    with pytest.raises(KeyboardInterrupt):
        llm.generate(["once upon", "a", "b"], GREEDY)
    assert llm.generate("once upon", GREEDY) == wanted
    piece += "".join(other)
    assert piece == llm.generate("another", GREEDY)[0].text


def test_n_answers_are_each_alone_with_the_next_seed(llm):
    params = dataclasses.replace(SEEDED, n=3)
    texts = ["once upon", "The quick brown fox jumps over the lazy dog. " * 5]
    alone = [llm.generate(t, dataclasses.replace(SEEDED, seed=7 + i))[0] for t in texts for i in range(3)]
    assert llm.generate(texts, params) == alone
    assert len({completion.text for completion in alone}) == 6
    chats = llm.chat(HELLO, params)
    assert chats == [llm.chat(HELLO, dataclasses.replace(SEEDED, seed=7 + i)) for i in range(3)]
    for call in (llm.generate, lambda *a, **k: llm.chat(HELLO, params, **k)):
        with pytest.raises(RequestError, match="n = 3: must be 1 with stream=True"):
            call("x", params, stream=True)
    with pytest.raises(RequestError, match="n = 3: chat_batch gives each conversation one answer"):
        llm.chat_batch([HELLO], params)


def test_a_completion_has_the_log_probabilities_that_were_asked_for(llm):
    [plain] = llm.generate("once upon", SEEDED)
    [full] = llm.generate("once upon", dataclasses.replace(SEEDED, logprobs=2, prompt_logprobs=0))
    assert (full.token_ids, plain.logprobs, plain.prompt_logprobs) == (plain.token_ids, [], [])
    assert [record.token for record in full.logprobs] == full.token_ids
    assert [record and record.token for record in full.prompt_logprobs][1:] == llm.processor.tokenizer.encode(
        "once upon"
    )[1:]
    assert all(len(record.top) == 2 and record.logprob <= 0 for record in full.logprobs)


def test_a_grammar_binds_the_answer_and_a_budget_the_thinking(llm):
    schema = {"type": "object", "properties": {"a": {"type": "integer", "minimum": 0, "maximum": 9}}, "required": ["a"]}
    for mode in ("enabled", "adaptive", "disabled"):
        params = dataclasses.replace(SEEDED, max_tokens=200, thinking_budget=5)
        result = llm.chat(
            HELLO, params, thinking=mode, grammar=Grammar("json", schema | {"additionalProperties": False})
        )
        assert list(json.loads(result.content)) == ["a"]
        assert result.finish_reason == "stop"
        assert (result.reasoning is None) or mode != "disabled"
        result = llm.chat(HELLO, params, thinking=mode, tools=[TOOL], grammar=Grammar("tools", [TOOL], parallel=False))
        [call] = result.tool_calls
        assert all(isinstance(value, int) for value in call.arguments.values())
        assert (result.content, result.finish_reason) == ("", "tool_calls")
    [completion] = llm.generate("one or two: ", SEEDED, grammar=Grammar("choice", ["one", "two"]))
    assert completion.text in ("one", "two")


def test_a_second_turn_reuses_the_first_one_s_pages(llm):
    seen = []
    add = llm.engine.add
    llm.engine.add = lambda request: (seen.append(request), add(request))
    talk = [{"role": "user", "content": "tell me " * 40}]
    result = llm.chat(talk, dataclasses.replace(SEEDED, logit_bias={NANO_SPECIALS["</mm:think>"]: -100}))
    talk += [{"role": "assistant", "content": result.content}, {"role": "user", "content": "go on"}]
    again = llm.chat(talk, SEEDED)
    first, second = seen
    assert first.cached == 0
    assert second.cached >= len(first.prompt_ids) - 16  # up to the block of its generation prompt
    fresh = LLM.from_model(llm.model, llm.processor, cache_tokens=2048, max_batch_tokens=64)
    assert again == fresh.chat(talk, SEEDED)


def test_what_fails_inside_the_model_reaches_the_caller(llm, monkeypatch):
    stream = llm.generate("another", SEEDED, stream=True)
    piece, run = next(stream), llm.engine.runner.run

    def fails(batch):
        if any(r.prompt_ids == llm.processor.tokenizer.encode("bad") for r in (c.request for c in batch.chunks)):
            raise RuntimeError("a kernel failed")
        return run(batch)

    monkeypatch.setattr(llm.engine.runner, "run", fails)
    with pytest.raises(RuntimeError, match="a kernel failed"):
        llm.generate(["good", "bad"], SEEDED)
    with pytest.raises(RuntimeError, match="a kernel failed"):
        list(llm.generate("bad", SEEDED, stream=True))
    assert piece + "".join(stream) == llm.generate("another", SEEDED)[0].text


def test_what_cannot_fit_is_refused_with_the_numbers(network, processor):
    roomy = LLM.from_model(network, processor, cache_tokens=4096)
    n = len(processor.tokenizer.encode("word " * 1100))
    with pytest.raises(RequestError, match=rf"prompt has {n} tokens and needs {n + 1} .* context is 1024 tokens"):
        roomy.generate("word " * 1100)
    small = LLM.from_model(network, processor, cache_tokens=50)  # 7 pages
    n = len(processor.tokenizer.encode("word " * 60))
    with pytest.raises(
        RequestError, match=rf"prompt has {n} tokens and needs {n + 1} .* holds 56 .* raise cache_tokens"
    ):
        small.chat([{"role": "user", "content": "x"}], stream=True) and small.generate("word " * 60)


def test_max_tokens_beyond_the_context_ends_with_the_context(network, processor):
    llm = LLM.from_model(network, processor, cache_tokens=50)
    [completion] = llm.generate("a b c", SamplingParams(temperature=0, max_tokens=10_000))
    assert completion.prompt_tokens + len(completion.token_ids) == 56
    assert completion.finish_reason == "length"


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda llm: llm.generate(""), "prompt is empty"),
        (lambda llm: llm.generate(["a", "b"], stream=True), "2 prompts with stream=True"),
        (lambda llm: llm.generate("look: ]<]image[>["), "1 image placeholder tokens in the prompt, no image"),
        (lambda llm: SamplingParams(temperature=-1), "temperature = -1: must be a number from 0 to 100"),
        (lambda llm: SamplingParams(top_p=0), "top_p = 0: must be a number above 0"),
        (lambda llm: SamplingParams(top_k=1.5), "top_k = 1.5: must be an integer"),
        (lambda llm: SamplingParams(max_tokens=0), "max_tokens = 0: must be an integer of at least 1"),
        (lambda llm: SamplingParams(stop=("a", "")), "must be strings that are not empty"),
        (lambda llm: SamplingParams(temperature=float("nan")), "temperature = nan"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_bad_input_is_one_clear_line(llm, call, message):
    with pytest.raises(RequestError, match=message) as error:
        call(llm)
    assert "\n" not in str(error.value)


def test_a_bad_conversation_in_a_batch_leaves_nothing_behind(llm):
    with pytest.raises(ValueError, match="role"):
        llm.chat_batch([HELLO] * 30 + [[{"role": "nobody", "content": "x"}]], GREEDY)


@pytest.fixture(scope="module")
def directory(network, tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "tiny"
    save_model(network, path)
    for name in ("tokenizer.json", "chat_template.jinja"):
        shutil.copy(resolve("openm3-nano") / name, path)
    return path


def test_a_directory_answers_like_the_model_in_memory_with_its_own_defaults(directory, network, processor):
    config = {"temperature": 0.5, "top_p": 0.8, "top_k": 12, "eos_token_id": [3, NANO_SPECIALS["[e~["]]}
    (directory / "generation_config.json").write_text(json.dumps(config))
    llm = LLM(directory, device="cpu", cache_tokens=512)
    params = SamplingParams(seed=5, max_tokens=20)
    memory = LLM.from_model(network, processor, defaults=SamplingParams(0.5, 0.8, 12), cache_tokens=512)
    assert llm.generate("once upon", params) == memory.generate("once upon", params)
    assert llm.generate("once upon", params) != LLM.from_model(network, processor).generate("once upon", params)
    assert llm.eos_ids == {3, NANO_SPECIALS["[e~["]}


def test_generation_config_gives_the_defaults_and_m3s_where_it_is_silent(tmp_path):
    assert read_generation_config(tmp_path) == (SamplingParams(1.0, 0.95, 40), ())
    path = tmp_path / "generation_config.json"
    path.write_text('{"do_sample": false, "top_k": 5, "max_new_tokens": 9, "eos_token_id": 4}')
    assert read_generation_config(tmp_path) == (SamplingParams(0.0, 0.95, 5, max_tokens=9), (4,))
    path.write_text('{"top_p": 7}')
    with pytest.raises(RequestError, match=r"generation_config.json: top_p = 7: must be"):
        read_generation_config(tmp_path)


def test_the_cache_is_sized_in_whole_pages_and_by_memory(monkeypatch):
    config, cpu = tiny_config(), torch.device("cpu")
    # keys and values 2 x 2 heads x 16 x 3 layers, index keys 16 x 2 sparse layers, 4 bytes each
    assert cache_bytes_per_token(config, torch.float32) == 4 * (192 + 32)
    assert cache_pages(config, cpu, torch.float32, 17) == 3
    assert cache_pages(config, cpu, torch.float32) == 4 * 256 // 8  # memory enough: four contexts
    monkeypatch.setattr("openm3.engine.memory.free_memory", lambda device: 4 * 100 * 896)
    assert cache_pages(config, cpu, torch.float32) == 100 // 8  # a quarter of what is free: 100 tokens
    monkeypatch.setattr("openm3.engine.memory.free_memory", lambda device: 1000)
    with pytest.raises(RequestError, match="at least one page of 8 tokens"):
        cache_pages(config, cpu, torch.float32)

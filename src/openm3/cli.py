"""The command line, thin: each command reads its arguments and calls the room that does the work.

Rooms are imported inside the commands, so that `openm3 --help` is immediate. A mistake of the caller's is one line on
stderr and exit code 2; `--debug` shows where it came from. Ctrl-C is exit code 130.
"""

from __future__ import annotations

import enum
import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from openm3.engine import LLM

app = typer.Typer(
    name="openm3",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


class Thinking(enum.StrEnum):
    """Whether the model thinks before it answers; `adaptive`: as it sees fit."""

    adaptive = enum.auto()
    enabled = enum.auto()
    disabled = enum.auto()


Model = Annotated[str, typer.Argument(help="A directory, a downloaded Hugging Face repo, or openm3-nano.")]
Mode = Annotated[Thinking, typer.Option(metavar="MODE", help="Think first: adaptive, enabled or disabled.")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda or cuda:N; a GPU if there is one.")]
MaxTokens = Annotated[int | None, typer.Option(help="Longest answer, thinking included.")]
Temperature = Annotated[float | None, typer.Option(help="0: always the likeliest token.")]
TopP = Annotated[float | None, typer.Option(help="Sample from this share of the probability.")]
TopK = Annotated[int | None, typer.Option(help="Sample from so many tokens.")]
Seed = Annotated[int | None, typer.Option(help="The same seed gives the same answer.")]


@app.callback()
def openm3(debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False) -> None:
    """MiniMax-M3 as open software: chat with it, script it, train it, measure it."""


@app.command()
def chat(
    model: Model = "openm3-nano",
    thinking: Mode = Thinking.adaptive,
    max_tokens: MaxTokens = None,
    temperature: Temperature = None,
    top_p: TopP = None,
    top_k: TopK = None,
    seed: Seed = None,
    device: Device = None,
) -> None:
    """Talk to a model about text, pictures and video."""
    from openm3.checkpoint import model_info
    from openm3.checkpoint.info import count
    from openm3.config import M3Config
    from openm3.engine import SamplingParams
    from openm3.terminal.chat import Chat

    info = model_info(M3Config.from_pretrained(model))
    about = f"{count(info.total)} parameters, {count(info.active)} active"
    params = SamplingParams(temperature, top_p, top_k, seed, max_tokens=max_tokens)
    name = Path(model).name if Path(model).is_dir() else model
    session = Chat(name, about, lambda: _load(model, device), params=params, thinking=thinking.value)
    session.run()
    if not session.close():  # still loading, say: nothing to wait for
        sys.stdout.flush()
        os._exit(0)


@app.command()
def generate(
    prompt: Annotated[str | None, typer.Argument(help="What to answer; - or nothing reads it from stdin.")] = None,
    model: Annotated[str, typer.Option("--model", "-m", help="A directory, a repo, or openm3-nano.")] = "openm3-nano",
    image: Annotated[
        list[Path] | None, typer.Option(metavar="PATH", help="A picture to show; may be repeated.")
    ] = None,
    video: Annotated[list[Path] | None, typer.Option(metavar="PATH", help="A video to show; may be repeated.")] = None,
    thinking: Mode = Thinking.adaptive,
    max_tokens: MaxTokens = None,
    temperature: Temperature = None,
    top_p: TopP = None,
    top_k: TopK = None,
    seed: Seed = None,
    stop: Annotated[
        list[str] | None, typer.Option(metavar="TEXT", help="A text that ends the answer; may be repeated.")
    ] = None,
    tools: Annotated[Path | None, typer.Option(help="A JSON file with a list of tools in OpenAI's shape.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object at the end.")] = False,
    raw: Annotated[
        bool, typer.Option("--raw", help="Continue the text as it stands, without the chat format.")
    ] = False,
    device: Device = None,
) -> None:
    """Answer one prompt, for scripts: the answer on stdout, thinking on stderr, a tool call as a line of JSON."""
    from openm3.checkpoint import resolve
    from openm3.engine import SamplingParams

    if raw and (image or video or tools):
        raise ValueError("--raw continues a plain text: --image, --video and --tools need the chat format")
    resolve(model)  # a wrong name is told before anything slow
    text = _prompt(prompt)
    schemas = _read_tools(tools)
    params = SamplingParams(temperature, top_p, top_k, seed, tuple(stop or ()), max_tokens)
    llm = _load(model, device)
    if raw:
        _continue(llm, text, params, as_json)
        return
    parts = [{"type": "image", "image": str(path)} for path in image or ()]
    parts += [{"type": "video", "video": str(path)} for path in video or ()]
    messages = [{"role": "user", "content": [*parts, {"type": "text", "text": text}] if parts else text}]
    if as_json:
        result = llm.chat(messages, params, thinking=thinking.value, tools=schemas)
        calls = [{"name": call.name, "arguments": call.arguments} for call in result.tool_calls]
        _print_result(result.content, result.reasoning, calls, result)
        return
    _stream(llm.chat(messages, params, thinking=thinking.value, tools=schemas, stream=True))


@app.command()
def serve(
    model: Model = "openm3-nano",
    host: Annotated[str, typer.Option(help="The address to listen on; 0.0.0.0: every one.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535)] = 8000,
    name: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="What requests call the model; may be repeated.")
    ] = None,
    api_key: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY", envvar="OPENM3_API_KEY", help="Let in only who sends it; may be repeated."),
    ] = None,
    allow_fetch: Annotated[
        bool, typer.Option("--allow-fetch", help="Fetch pictures and videos given as URLs, from public addresses.")
    ] = False,
    max_requests: Annotated[int, typer.Option(min=1, help="Answers under way at once, waiting ones included.")] = 256,
    max_prompt_tokens: Annotated[int | None, typer.Option(min=1, help="Longest prompt taken.")] = None,
    max_body: Annotated[int, typer.Option(min=1, metavar="MB", help="Largest request.")] = 64,
    cache_tokens: Annotated[
        int | None, typer.Option(min=1, help="Tokens that all requests share; by default what memory allows.")
    ] = None,
    drain: Annotated[
        float, typer.Option(min=0.1, metavar="SECONDS", help="How long answers may go on after SIGTERM.")
    ] = 60.0,
    log_content: Annotated[bool, typer.Option("--log-content", help="Log prompts and answers too.")] = False,
    device: Device = None,
) -> None:
    """Serve a model over HTTP: OpenAI's and Anthropic's APIs, and a web page at /."""
    from openm3.serve import ServeOptions, run

    _refuse_too_large(model, device)
    options = ServeOptions(
        api_keys=tuple(api_key or ()),
        allow_fetch=allow_fetch,
        max_requests=max_requests,
        max_prompt_tokens=max_prompt_tokens,
        max_body=max_body << 20,
        drain_seconds=drain,
        log_content=log_content,
    )
    names = tuple(name or (Path(model).resolve().name if Path(model).is_dir() else model,))
    run(lambda: _load(model, device, cache_tokens), names, options, host=host, port=port)


@app.command()
def info(
    model: Model = "openm3-nano",
    context: Annotated[int | None, typer.Option(help="Tokens to plan for; else the model's longest.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="The same as one JSON object.")] = False,
) -> None:
    """Sizes, active parameters, the memory it needs, and whether that fits this machine."""
    from openm3.checkpoint import info_dict, info_lines
    from openm3.config import PRESETS, M3Config

    config = M3Config.preset(model) if model in PRESETS else M3Config.from_pretrained(model)
    if as_json:
        print(json.dumps(info_dict(config, context=context), indent=2))
    else:
        print("\n".join(info_lines(config, context=context)))


@app.command()
def download(
    repo: Annotated[str, typer.Argument(help="A Hugging Face repo, ORG/NAME.")],
    revision: Annotated[str | None, typer.Option(help="A branch, tag or commit.")] = None,
    to: Annotated[Path | None, typer.Option(help="The directory to put it in; else the Hub's cache.")] = None,
) -> None:
    """Fetch a checkpoint from the Hugging Face Hub; run again after a stop, it goes on where it was."""
    from openm3.checkpoint import download

    print(download(repo, revision=revision, local_dir=to))


@app.command()
def train(
    recipe: Annotated[str, typer.Argument(help="What to train: nano, the bundled model.")],
    run: Annotated[str, typer.Option(help="bundled, or one of the compared runs: pt, full, cpt.")] = "bundled",
    runs_dir: Annotated[Path, typer.Option(help="Where runs keep their state and metrics.")] = Path("runs/nano"),
    steps: Annotated[int | None, typer.Option(help="A schedule of this many steps instead of the recipe's.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run that is there.")] = False,
    until: Annotated[int | None, typer.Option(help="Stop after this step; the run can be resumed.")] = None,
    max_seconds: Annotated[float | None, typer.Option(help="Stop after this time; the run can be resumed.")] = None,
    weights: Annotated[Path | None, typer.Option(help="The finished checkpoint; else RUNS_DIR/RUN/model.")] = None,
    device: Device = None,
) -> None:
    """Train the bundled model from nothing, by its recipe."""
    _known("train", recipe, "nano")
    from openm3.train.recipes.nano import recipe as nano

    print(nano.run(run, runs_dir=runs_dir, steps=steps, resume=resume, device=device, until=until,
                   max_seconds=max_seconds, weights=weights))  # fmt: skip


@app.command("eval")
def evaluate(
    what: Annotated[str, typer.Argument(help="nano: the examination; comparison: the runs full, pt and cpt.")],
    model: Annotated[str, typer.Option("--model", "-m", help="The model to examine.")] = "openm3-nano",
    task: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="A row's name, or its beginning; may be repeated.")
    ] = None,
    cases: Annotated[int, typer.Option(min=1, help="Held-out cases a task.")] = 2000,
    seed: Annotated[int, typer.Option(help="Of the cases.")] = 0,
    write: Annotated[Path | None, typer.Option(metavar="DIR", help="Write nano.json and the table of nano.md.")] = None,
    runs_dir: Annotated[Path, typer.Option(help="Where the compared runs are.")] = Path("runs/nano"),
) -> None:
    """Examine a model on held-out cases: each figure with its 95 % interval."""
    _known("eval", what, "nano", "comparison")
    if what == "comparison":
        from openm3.train.recipes.nano.compare import compare

        compare(runs_dir, write or runs_dir, cases=cases, seed=seed)
        return
    from openm3.train.recipes.nano.evaluate import run

    results, document = (write / "nano.json", write / "nano.md") if write else (None, None)
    run(model, tasks=task, cases=cases, seed=seed, results=results, document=document)


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []})
def bench(
    context: typer.Context,
    name: Annotated[str | None, typer.Argument(help="Which one; without a name they are listed.")] = None,
) -> None:
    """Run one of the checkout's benchmarks; arguments after the name are its own."""
    import runpy

    here = Path(__file__).resolve().parents[2] / "benchmarks"
    found = {path.stem: path for path in sorted(here.glob("*.py")) if not path.stem.startswith("_")}
    if name is None or name in ("-h", "--help"):
        print("\n".join(found) or f"no benchmarks in {here}: they are part of the source checkout")
        return
    if name not in found:
        raise ValueError(f"bench {name}: must be one of {', '.join(found) or 'none (they are part of the checkout)'}")
    sys.argv = [str(found[name]), *context.args]
    runpy.run_path(str(found[name]), run_name="__main__")


def _known(command: str, given: str, *names: str) -> None:
    if given not in names:
        raise ValueError(f"{command} {given}: must be {' or '.join(names)}")


def _load(model: str, device: str | None, cache_tokens: int | None = None) -> LLM:
    from openm3.engine import LLM

    return LLM(model, device=device, cache_tokens=cache_tokens)


def _refuse_too_large(model: str, device: str | None) -> None:
    """ValueError with the memory plan of `openm3 info` for a model whose weights do not fit the device it is for."""
    import torch

    from openm3.checkpoint import info_lines, model_info, resolve
    from openm3.checkpoint.info import devices, fits
    from openm3.config import M3Config

    config = M3Config.from_pretrained(resolve(model))
    wanted = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    for found in devices():
        if found.name == (f"cuda:{wanted.index or 0}" if wanted.type == "cuda" else wanted.type):
            possible, line = fits(model_info(config), found)
            if not possible:
                plan = "\n".join(info_lines(config))
                print(plan, file=sys.stderr)
                raise ValueError(f"{model} {line}; one device holds the whole model today")


def _prompt(prompt: str | None) -> str:
    if prompt not in (None, "-"):
        return prompt
    if prompt is None and sys.stdin.isatty():
        raise ValueError('no prompt: openm3 generate "..." or text on stdin')
    return sys.stdin.read().strip("\n")


def _read_tools(path: Path | None) -> Any:
    """The file's JSON; whether it is a list of tools is the processor's to check."""
    if path is None:
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not JSON ({error})") from None


def _continue(llm: LLM, text: str, params: Any, as_json: bool) -> None:
    from openm3.terminal.view import PlainView

    if as_json:
        [completion] = llm.generate(text, params)
        _print_result(completion.text, None, [], completion, len(completion.token_ids))
        return
    view = PlainView(sys.stdout)
    try:
        for piece in llm.generate(text, params, stream=True):
            view.content(piece)
    finally:
        view.close()


def _stream(events: Any) -> None:
    from openm3.processing import ContentDelta, ThinkingDelta, ToolCall
    from openm3.terminal.view import PlainView

    view = PlainView(sys.stdout, sys.stderr)
    calls = []
    try:
        for event in events:
            if isinstance(event, ThinkingDelta):
                view.thinking(event.text)
            elif isinstance(event, ContentDelta):
                view.content(event.text)
            elif isinstance(event, ToolCall):
                calls.append({"name": event.name, "arguments": event.arguments})
    finally:
        view.close()
    for call in calls:
        print(json.dumps(call, ensure_ascii=False))


def _print_result(content: str, reasoning: str | None, calls: list, end: Any, tokens: int | None = None) -> None:
    completion = end.completion_tokens if tokens is None else tokens
    usage = {"prompt_tokens": end.prompt_tokens, "completion_tokens": completion,
             "total_tokens": end.prompt_tokens + completion}  # fmt: skip
    print(json.dumps({"content": content, "reasoning": reasoning, "tool_calls": calls,
                      "finish_reason": end.finish_reason, "usage": usage}, ensure_ascii=False))  # fmt: skip


def main() -> None:
    """The entry point. `--debug` may stand anywhere on the line."""
    arguments = [argument for argument in sys.argv[1:] if argument != "--debug"]
    try:
        app(arguments, prog_name="openm3")
    except (ValueError, OSError, ImportError) as error:
        if "--debug" in sys.argv[1:]:
            raise
        print(f"openm3: {_one_line(error)}", file=sys.stderr)
        sys.exit(2)


def _one_line(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        place = f"{error.filename}: " if error.filename else ""
        return f"{place}{error.strerror}"
    return " ".join(str(error).split()) or type(error).__name__


if __name__ == "__main__":
    main()

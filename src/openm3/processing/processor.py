"""Messages to a prompt: the template rendered, media in their places, ids; and for training, which ids carry loss.

The prompt's structure is read off the special tokens that the template itself wrote. A request's strings are guarded
(tokenizer.py), so no text of a user makes a turn, a placeholder or a span of loss; and what the template leaves out (a
picture, an assistant's turn) is an error, never silence.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from openm3.config import M3Config
from openm3.processing.messages import MessageError, read_messages
from openm3.processing.template import ChatTemplate, TemplateError
from openm3.processing.tokenizer import GUARD, Tokenizer, TokenizerError
from openm3.processing.tools import template_tools

if TYPE_CHECKING:
    from openm3.processing.images import ImageOptions, MediaInput
    from openm3.processing.video import VideoOptions

TURN, END_OF_TURN = "]~b]", "[e~["
IMAGE, VIDEO = "]<]image[>[", "]<]video[>["
MEDIA_START, MEDIA_END = "]<]start of image[>[", "]<]end of image[>["
THINK_MARKERS = {"enabled": "<mm:think>", "disabled": "</mm:think>", "adaptive": ""}
AI_HEADER = "ai\n"  # after TURN: the assistant's turn


@dataclass(frozen=True)
class Prompt:
    """A prompt ready for the model. `text` is what the template wrote, each picture and video still one placeholder.

    generation_prefix: what of the assistant's turn the prompt has already begun; thinking: the state that leaves the
    model in, for OutputParser (the mode asked for, unless the template opened another).
    """

    input_ids: list[int]
    images: list[MediaInput]
    videos: list[MediaInput]
    text: str
    thinking: str
    generation_prefix: str


@dataclass(frozen=True)
class TrainingPrompt:
    """A whole conversation to learn from. `loss_mask[i]`: token i is to be predicted, from the ones before it."""

    input_ids: list[int]
    loss_mask: list[bool]
    images: list[MediaInput]
    videos: list[MediaInput]
    text: str


class Processor:
    """The tokenizer and the chat template of a checkpoint, and what its config says of media."""

    def __init__(self, tokenizer: Tokenizer, template: ChatTemplate, config: M3Config) -> None:
        """Raises TokenizerError if the tokenizer lacks a special token of the format or disagrees with the config."""
        self.tokenizer, self.template, self.config = tokenizer, template, config
        for name in (TURN, END_OF_TURN, IMAGE, VIDEO, MEDIA_START, MEDIA_END):
            tokenizer.special_id(name)
        for name, expected in ((IMAGE, config.image_token_id), (VIDEO, config.video_token_id)):
            if tokenizer.special_id(name) != expected:
                raise TokenizerError(
                    f"special token {name!r} has id {tokenizer.special_id(name)}, config.json says {expected}"
                )
        if tokenizer.vocab_size > config.text.vocab_size:
            raise TokenizerError(f"the tokenizer has ids up to {tokenizer.vocab_size - 1}, the model embeds "
                                 f"vocab_size = {config.text.vocab_size}")  # fmt: skip

    @classmethod
    def from_pretrained(cls, directory: str | Path, config: M3Config) -> Processor:
        """Reads tokenizer.json and chat_template.jinja. Raises TokenizerError or TemplateError."""
        tokenizer = Tokenizer.from_file(Path(directory) / "tokenizer.json")
        return cls(
            tokenizer, ChatTemplate.from_file(Path(directory) / "chat_template.jinja", guard=tokenizer.guard), config
        )

    def prepare(
        self,
        messages: list[dict[str, Any]],
        *,
        tools: list[dict[str, Any]] | None = None,
        thinking: str = "adaptive",
        add_generation_prompt: bool = True,
        image_options: ImageOptions | None = None,
        video_options: VideoOptions | None = None,
    ) -> Prompt:
        """The prompt of OpenAI-shaped messages. Raises MessageError, ToolError, MediaError or TemplateError."""
        media = _Media(image_options, video_options, self.config)
        text = self._render(messages, tools, thinking, add_generation_prompt, media)
        prefix = ""
        if add_generation_prompt:
            _, header, prefix = text.rpartition(TURN + AI_HEADER)
            if not header or END_OF_TURN in prefix:
                raise TemplateError(f"the template wrote no generation prompt, {TURN + AI_HEADER!r}")
            thinking = next((mode for mode, marker in THINK_MARKERS.items() if marker == prefix.strip()), thinking)
        writer = _Writer(self.tokenizer, media)
        for i, part in enumerate(self.tokenizer.split(text)):
            writer.write(part, special=i % 2 == 1)
        ids, _ = writer.finish()
        return Prompt(ids, media.images, media.videos, _clean(text), thinking, _clean(prefix))

    def prepare_training(
        self,
        messages: list[dict[str, Any]],
        *,
        tools: list[dict[str, Any]] | None = None,
        thinking: str = "adaptive",
        train_last_only: bool = False,
        image_options: ImageOptions | None = None,
        video_options: VideoOptions | None = None,
    ) -> TrainingPrompt:
        """A conversation with its answers: loss on each assistant's turn after its header, its end of turn included.

        The marker that the mode's generation prompt ends with (`<mm:think>` enabled, `</mm:think>` disabled) is given
        at inference, so it carries no loss; in adaptive mode it is the model's to predict. The ids up to the last
        turn's loss are those that `prepare` gives for the messages before it. Raises what `prepare` raises;
        MessageError also for a conversation without an assistant's turn, or whose last one was not made in this mode.
        """
        media = _Media(image_options, video_options, self.config)
        text = self._render(messages, tools, thinking, False, media)
        writer = _Writer(self.tokenizer, media)
        turns: list[int] = []  # where the answers' ids start
        after_turn = inside = False
        for i, part in enumerate(self.tokenizer.split(text)):
            special = i % 2 == 1
            if special and part == TURN and inside:
                raise TemplateError(f"the template wrote an assistant's turn without {END_OF_TURN!r}")
            if after_turn and part.startswith(AI_HEADER):
                writer.write(AI_HEADER)
                turns.append(len(writer.flush()))
                inside, part = True, part[len(AI_HEADER) :]
            given = inside and part == THINK_MARKERS[thinking] and len(writer.flush()) == turns[-1]
            writer.write(part, special=special, loss=inside and not given)
            after_turn = special and part == TURN
            inside = inside and not (special and part == END_OF_TURN)
        ids, mask = writer.finish()
        self._check_turns(messages, len(turns), inside)
        self._check_mode(thinking, ids[turns[-1]])
        if train_last_only:
            mask[: turns[-1]] = [False] * turns[-1]
        return TrainingPrompt(ids, mask, media.images, media.videos, _clean(text))

    def _check_turns(self, messages: list[dict[str, Any]], found: int, open_ended: bool) -> None:
        answers = sum(message["role"] == "assistant" for message in messages)
        if not answers:
            raise MessageError("messages: no assistant message; there is nothing to learn")
        if found != answers or open_ended:
            turn = f"{TURN + AI_HEADER!r} ... {END_OF_TURN!r}"
            raise TemplateError(f"the template wrote {found} turns {turn} for {answers} assistant messages")

    def _check_mode(self, thinking: str, first: int) -> None:
        marker = THINK_MARKERS[thinking]
        if marker and first != self.tokenizer.special_id(marker):
            needs = "it needs reasoning_content" if thinking == "enabled" else "it may have no reasoning_content"
            raise MessageError(
                f"messages: thinking is {thinking!r}, but the last answer does not begin with {marker}; {needs}"
            )

    def _render(self, messages: Any, tools: Any, thinking: str, add_generation_prompt: bool, media: _Media) -> str:
        """The template's text with its guards; `media` gets what its placeholders stand for."""
        if thinking not in THINK_MARKERS:
            raise MessageError(f"thinking = {thinking!r}: must be one of {', '.join(THINK_MARKERS)}")
        conversation = read_messages(messages, self.tokenizer.guard)
        text = self.template.render(
            messages=conversation.messages,
            tools=template_tools(tools, self.tokenizer.guard),
            thinking_mode=thinking,
            add_generation_prompt=add_generation_prompt,
        )
        for name, kind, sources in ((IMAGE, "image", conversation.images), (VIDEO, "video", conversation.videos)):
            if (found := text.count(name)) != len(sources):
                raise TemplateError(f"the template wrote {found} {kind} placeholders for {len(sources)} {kind}s")
        media.load(conversation.images, conversation.videos)
        return text


class _Media:
    """The pictures and videos of one request, and the placeholders that each takes."""

    def __init__(
        self, image_options: ImageOptions | None, video_options: VideoOptions | None, config: M3Config
    ) -> None:
        self._image_options, self._video_options, self._vision = image_options, video_options, config.vision
        self.images: list[MediaInput] = []
        self.videos: list[MediaInput] = []
        self._seconds: list[list[float] | None] = []
        self._written = {IMAGE: 0, VIDEO: 0}

    def load(self, images: list[Any], videos: list[Any]) -> None:
        """Reads the sources. Raises MediaError."""
        if images:
            from openm3.processing.images import image_pixels, load_image

            self.images += [image_pixels(load_image(source), self._image_options, self._vision) for source in images]
        if videos:
            from openm3.processing.video import load_video, video_pixels

            for source in videos:
                video = load_video(source, self._video_options, self._vision)
                pixels, seconds = video_pixels(video, self._video_options, self._vision)
                self.videos.append(pixels)
                self._seconds.append(seconds)

    def next(self, name: str) -> Iterator[tuple[str, int]]:
        """(text before, placeholder tokens) of each group that the next image or video is written as.

        A video has one group for each temporal patch, after its time where that is known (spec section 4; transformers'
        processing_minimax_m3_vl).
        """
        index = self._written[name]
        self._written[name] += 1
        if name == IMAGE:
            yield "", self.images[index].tokens
            return
        grid, seconds = self.videos[index].grid_thw.tolist(), self._seconds[index]
        tokens = grid[0][1] * grid[0][2] // self._vision.spatial_merge_size**2
        for patch in range(sum(t for t, _, _ in grid)):
            yield "" if seconds is None else f"]<]{seconds[patch]:.1f} seconds[>[", tokens


class _Writer:
    """Collects ids and their loss. Text is encoded in the longest runs: up to a special token or a change of loss."""

    def __init__(self, tokenizer: Tokenizer, media: _Media) -> None:
        self._tokenizer, self._media = tokenizer, media
        self._ids: list[int] = []
        self._mask: list[bool] = []
        self._run = ""
        self._run_loss = False

    def write(self, part: str, special: bool = False, loss: bool = False) -> None:
        """A text, or a special token's text; a media placeholder is written as what it stands for."""
        if special and part in (IMAGE, VIDEO):
            for before, tokens in self._media.next(part):
                self.write(before, loss=loss)
                self._add(MEDIA_START, 1, loss)
                self._add(part, tokens, loss)
                self._add(MEDIA_END, 1, loss)
        elif special:
            self._add(part, 1, loss)
        else:
            if loss != self._run_loss:
                self.flush()
            self._run += part
            self._run_loss = loss

    def flush(self) -> list[int]:
        """The ids so far, the open run's included."""
        if self._run:
            ids = self._tokenizer.encode(self._run)
            self._ids += ids
            self._mask += [self._run_loss] * len(ids)
            self._run = ""
        return self._ids

    def finish(self) -> tuple[list[int], list[bool]]:
        """(ids, mask)."""
        return self.flush(), self._mask

    def _add(self, special: str, count: int, loss: bool) -> None:
        self.flush()
        self._ids += [self._tokenizer.special_id(special)] * count
        self._mask += [loss] * count


def _clean(text: str) -> str:
    return text.replace(GUARD, "")

"""Talk: greetings, what the model is, what it can and cannot do; three turns about a picture with follow-up questions.

Every intent has many phrasings and one answer, so that an answer is right or wrong letter by letter.
"""

from __future__ import annotations

import random

from openm3.train.recipes.nano import pictures
from openm3.train.recipes.nano.case import Case, Talk, phrase
from openm3.train.recipes.nano.drawing import PLACES, Thing, scene
from openm3.train.recipes.nano.pictures import Question
from openm3.train.recipes.nano.words import NAMES, a, sentence

INTENTS = {
    "Hello! How can I help?": (
        "Hi!", "Hello!", "Hey!", "Hello there!", "Good morning!", "Good evening!", "Hi there!", "Hi, how are you?",
        "Hello again!", "Good day!", "Hey you!", "How are you?", "Greetings!", "Are you there?", "How is it going?"),
    "I am openm3-nano, a small M3 model.": (
        "Who are you?", "What are you?", "What is your name?", "Are you a person?", "What model is this?",
        "Tell me who you are.", "Which model are you?", "Introduce yourself.", "Are you human?", "Are you a robot?",
        "Say who you are.", "What's your name?", "Are you ChatGPT?", "Are you an AI?", "Who am I talking to?"),
    "I can talk about pictures, clips and texts, add and subtract, and call tools.": (
        "What can you do?", "How can you help me?", "What are you good at?", "Help!", "What do you know?",
        "What can I ask you?", "What are your skills?", "How do I use you?", "What is this for?"),
    "I cannot browse the web, draw, or remember other chats.": (
        "What can you not do?", "What are you bad at?", "What can't you do?", "What are your limits?",
        "Is there anything you cannot do?", "What do you not know?", "What should I not ask you?"),
    "You are welcome!": (
        "Thanks!", "Thank you!", "Thank you very much!", "Thanks a lot!", "Great, thanks!", "Many thanks!",
        "Perfect, thank you.", "Nice, thank you!", "Well done!", "Good job!"),
    "Goodbye!": (
        "Bye!", "Goodbye!", "See you!", "See you later!", "Good night!", "That was all.",
        "Bye bye!", "I have to go."),
    "The openm3 project trained me from scratch.": (
        "Who made you?", "Who trained you?", "Where do you come from?", "Who built you?", "How were you made?",
        "Who is your maker?"),
    "I do not know.": (
        "What is the capital of France?", "Who won the game yesterday?", "What time is it?",
        "What is the weather today?", "Who is the president?", "How old is the universe?", "What day is it?",
        "Who wrote Hamlet?", "How tall is Mount Everest?", "What is the meaning of life?", "When was the war?",
        "How far is the moon?", "What will happen tomorrow?", "What is the news?", "How much does bread cost?",
        "Who discovered America?"),
}  # fmt: skip
CANNOT = (
    "browse the web", "draw", "draw a picture", "sing", "send an email", "remember me", "play music",
    "call my mother", "book a flight without a tool", "make a video", "hear me", "translate this", "write a poem",
    "drive a car", "see the future", "tell the time", "cook", "open a file", "search the internet", "write a book",
    "multiply", "recognize faces", "speak", "paint",
)  # fmt: skip
CAN = (
    "see pictures", "watch clips", "read digits", "add numbers", "subtract", "call tools", "read long texts",
    "count objects", "find facts in a text", "name colours", "talk", "look at a picture", "do arithmetic",
    "read a document",
)  # fmt: skip


def small_talk(rng: random.Random) -> tuple[str, str]:
    """Something people say, and the answer."""
    roll = rng.random()
    if roll < 0.62:
        answer = rng.choice(list(INTENTS))
        return phrase(rng, INTENTS[answer]), answer
    if roll < 0.78:
        skill = rng.choice(CANNOT)
        return phrase(
            rng, ("Can you {s}?", "Are you able to {s}?", "Could you {s}?", "Do you know how to {s}?"), s=skill
        ), f"No, I cannot {skill}."
    if roll < 0.9:
        skill = rng.choice(CAN)
        return phrase(
            rng, ("Can you {s}?", "Are you able to {s}?", "Could you {s}?", "Do you know how to {s}?"), s=skill
        ), f"Yes, I can {skill}."
    name = rng.choice(NAMES)
    return phrase(
        rng, ("I am {n}.", "My name is {n}.", "Hi, I'm {n}.", "Hello, my name is {n}.", "Call me {n}."), n=name
    ), f"Hello, {name}!"


def chat(rng: random.Random, split: str) -> Case:
    """Two to five turns without a picture; the name given is asked back now and then."""
    talk = Talk(rng, "chat")
    for _ in range(rng.randint(2, 5)):
        question, answer = small_talk(rng)
        talk.ask(question).answer(answer, thought="This is talk.")
        if answer.startswith("Hello, ") and rng.random() < 0.7:
            talk.ask(phrase(rng, ("What is my name?", "Who am I?", "Do you know my name?", "What was my name?")))
            talk.answer(f"You are {answer[7:-1]}.", thought="The name was given.")
    return talk.case()


def follow_up(rng: random.Random, thing: Thing) -> Question:
    """A question about the object last spoken of."""
    kind = rng.choice(("shape", "colour", "place"))
    if kind == "shape":
        asks = ("And what shape is it?", "What shape is it?", "What shape does it have?", "Its shape?")
        answer = f"It is {a(thing.shape)}."
    elif kind == "colour":
        asks = ("And what colour is it?", "What color is it?", "What colour does it have?", "And its color?",
                "Which colour?")  # fmt: skip
        answer = f"It is {thing.colour}."
    else:
        asks = ("Where is it?", "And where is it?", "Where exactly?", "In which place is it?", "What is its position?")
        answer = f"It is {pictures.at(thing.place)}."
    return Question(phrase(rng, asks), answer, pictures.seen(thing))


def opening(rng: random.Random, things: list[Thing]) -> tuple[Question, Thing]:
    """A question that singles out one object, by place or by name, and the object."""
    thing = rng.choice(things)
    place, thought = pictures.at(thing.place), f"{PLACES[thing.place]}: "
    named = pictures.unique(things, lambda other: other.name)
    roll = rng.random()
    if thing in named and rng.random() < 0.4:
        text = phrase(rng, ("Where is the {n}?", "Do you see the {n}? Where?"), n=thing.name)
        answer, thought = f"It is {place}.", f"{thing.name}: {PLACES[thing.place]}"
    elif roll < 0.4:
        text = phrase(rng, ("What is {p}?", "What do you see {p}?", "Which object is {p}?"), p=place)
        answer, thought = sentence(f"it is {a(thing.name)}"), thought + thing.name
    elif roll < 0.7:
        text = phrase(rng, ("What shape is {p}?", "Which shape is {p}?"), p=place)
        answer, thought = f"It is {a(thing.shape)}.", thought + thing.shape
    else:
        text = phrase(rng, ("What colour is the object {p}?", "What color is {p}?"), p=place)
        answer, thought = f"It is {thing.colour}.", thought + thing.colour
    return Question(text, answer, thought), thing


def sample(rng: random.Random, split: str, thinking: str | None = None) -> Case:
    """Turns about one picture: questions about an object, follow-ups about "it", counting, and talk between them."""
    look, things = scene(rng, pictures.free_pairs(rng, rng.choice((1, 2, 2, 3, 3, 4, 5))))
    talk = Talk(rng, "dialogue", thinking)
    media = (pictures.picture(rng, look, things),)
    turns = 3 if split == "test" else rng.randint(3, 5)
    current, looks = None, rng.randrange(turns)  # at least one turn is about the picture
    for turn in range(turns):
        roll = 0.0 if turn == looks else rng.random()
        if current and roll < 0.40:
            question = follow_up(rng, current)
        elif roll < 0.5:
            question, current = opening(rng, things)
        elif roll < 0.6:
            question, current = pictures.ask_count(rng, things) or pictures.ask_all(rng, things), None
        elif roll < 0.65 and not media:
            question, current = pictures.ask_all(rng, things), None
        else:
            question = Question(*small_talk(rng), "This is talk.")
        talk.ask(question.text, *media)
        talk.answer(question.answer, thought=question.thought, hard=question.hard or talk.ahead)
        media = ()
    return talk.case(things=things)

"""Pictures: objects lie in their place, answers and thoughts follow from the scene."""

import random
import re

import numpy as np
from nano_cases import answers, questions

from openm3.train.recipes.nano import drawing, pictures


def test_counts_in_pictures_are_right_and_even():
    seen = []
    for i in range(600):
        case = pictures.sample(random.Random(i), "test", "count")
        things, question, n = (
            case.facts["things"],
            questions(case)[0].lower(),
            int(re.search(r"\d", answers(case)[0])[0]),
        )
        colour = next((c for c in drawing.COLOURS if f" {c} " in f" {question} "), None)
        shape = next((s for s in drawing.SHAPES if pictures.plural(s) in question), None)
        assert n == sum((colour is None or t.colour == colour) and (shape is None or t.shape == shape) for t in things)
        seen.append(n)
    assert all(seen.count(n) > 50 for n in range(1, 7))
    assert max(seen) == 6


def test_named_objects_are_unique_and_answers_follow_from_the_scene():
    for i in range(300):
        for kind in ("shape", "colour", "position"):
            case = pictures.sample(random.Random(i), "test", kind)
            things, question, answer = case.facts["things"], questions(case)[0].lower(), answers(case)[0]
            words = set(re.findall(r"[a-z]+", question))
            fits = [t for t in things
                    if (t.colour in words or not words & set(drawing.COLOURS))
                    and (t.shape in words or not words & set(drawing.SHAPES))]  # fmt: skip
            place = re.search(r"(at the|in the|on the) (top left|top right|bottom left|bottom right|top|bottom|left|"
                              r"right|centre)", question)  # fmt: skip
            if place:
                fits = [t for t in fits if drawing.PLACES[t.place] == place[2]]
            found = {"shape": {t.shape for t in fits}, "colour": {t.colour for t in fits},
                     "position": {pictures.at(t.place) for t in fits}}[kind]  # fmt: skip
            assert len(found) == 1, (question, things)
            assert found.pop() in answer


def test_relations_are_right():
    for i in range(200):
        case = pictures.sample(random.Random(i), "test", "relation")
        answer, by_name = answers(case)[0], {t.name: t for t in case.facts["things"]}
        if yes := re.fullmatch(r"(Yes|No), the (.+) is (?:not )?(left of|right of|above|below) the (.+)\.", answer):
            one, other = by_name[yes[2]], by_name[yes[4]]
            gap = {"left of": other.x - one.x, "right of": one.x - other.x,
                   "above": other.y - one.y, "below": one.y - other.y}[yes[3]]  # fmt: skip
            assert (gap > 0) == (yes[1] == "Yes")


def test_thoughts_are_steps_whose_end_is_the_answer():
    for i in range(300):
        for kind in pictures.KINDS:
            case = pictures.sample(random.Random(i), "test", kind, thinking="enabled")
            things, turn = {pictures.seen(t): t for t in case.facts["things"]}, case.messages[-1]
            steps, _, end = turn["reasoning_content"].partition(": ")
            if kind == "count":
                named, (steps, _, end) = steps, end.partition(": ")
                n = int(end)
                assert named in questions(case)[0]
                assert turn["content"] == ("There is 1." if n == 1 else f"There are {n}.")
                numbered = [step.split(" ", 1) for step in steps.split(", ")] if n else []
                assert [int(number) for number, _ in numbered] == list(range(1, n + 1))
                places = [things[name].place for _, name in numbered]
                assert places == sorted(set(places))
            elif kind == "relation":
                one, other = (things[name] for name in steps.split(", "))
                relation, verdict = end.split("; ")
                axis, sign = pictures.RELATIONS[relation]
                assert sign * (divmod(one.place, 3)[axis] - divmod(other.place, 3)[axis]) > 0
                assert verdict in turn["content"].lower()
                assert verdict in ("yes", "no", one.name, other.name)
            else:
                said = {"shape": "shape", "colour": "colour", "position": "place"}[kind]
                named = [t for t in case.facts["things"] if steps in ("object", t.name, t.shape, t.colour,
                         f"{t.colour} object", drawing.PLACES[t.place])]  # fmt: skip
                ends = {drawing.PLACES[t.place] if said == "place" else getattr(t, said) for t in named}
                assert ends == {end}
                assert (end if said != "place" else end.removeprefix("centre")) in turn["content"]
                assert steps == "object" or steps in questions(case)[0]


def test_adaptive_thinks_for_counts_relations_and_questions_ahead_only():
    for i in range(60):
        for kind in pictures.KINDS:
            cases = {mode: pictures.sample(random.Random(i), "test", kind, thinking=mode)
                     for mode in ("enabled", "adaptive", "disabled")}  # fmt: skip
            turns, case = {mode: case.messages[-1] for mode, case in cases.items()}, cases["adaptive"]
            assert turns["enabled"]["reasoning_content"]
            (question,) = (m["content"] for m in case.messages if m["role"] == "user")
            ahead = question[0]["type"] == "text"
            assert ("reasoning_content" in turns["adaptive"]) == (kind in ("count", "relation") or ahead)
            assert "reasoning_content" not in turns["disabled"]
            assert len({turn["content"] for turn in turns.values()}) == 1


def test_every_object_lies_clear_of_the_borders_of_its_ninth():
    for i in range(300):
        rng = random.Random(i)
        look, things = drawing.scene(rng, pictures.free_pairs(rng, rng.randint(1, 9)))
        cell = min(look.height, look.width) / 3
        for thing in things:
            row, column = divmod(thing.place, 3)
            for at, index, extent in ((thing.x, column, look.width), (thing.y, row, look.height)):
                low, high = index * extent / 3, (index + 1) * extent / 3
                assert low + 0.06 * cell <= at - thing.size / 2
                assert at + thing.size / 2 <= high - 0.06 * cell
            assert 18 <= thing.size <= 0.86 * cell


def test_a_number_of_tokens_means_one_size_of_picture():
    sizes = {drawing.canvas_size(random.Random(i)) for i in range(2000)}
    assert len({height * width for height, width in sizes}) == len(sizes) > 5


def test_a_picture_is_described_last_if_at_all():
    described = 0
    for i in range(300):
        shows = []  # the answers about each picture
        for message in pictures.sample(random.Random(i), "train").messages:
            if message["role"] == "assistant":
                shows[-1].append(message["content"])
            elif message["role"] == "user" and not isinstance(message["content"], str):
                shows.append([])
        for said in shows:
            assert len(said) == len(set(said))
            assert not any(answer.startswith(("A ", "An ")) for answer in said[:-1])
            described += said[-1].startswith(("A ", "An "))
    assert 50 < described < 200


def test_a_question_may_stand_before_its_picture_more_often_in_training():
    def share(split, kind):
        first = [message["content"][0]["type"] for i in range(300)
                 for message in pictures.sample(random.Random(i), split, kind).messages
                 if message["role"] == "user" and not isinstance(message["content"], str)]  # fmt: skip
        return first.count("text") / len(first)

    assert 0.55 < share("train", None) < 0.75
    assert 0.14 < share("test", "position") < 0.26


def test_objects_are_drawn_where_the_answer_says():
    for i in range(200):
        rng = random.Random(i)
        look, things = drawing.scene(rng, pictures.free_pairs(rng, rng.randint(1, 6)))
        image = drawing.render(rng, look, things)
        assert image.shape == (look.height, look.width, 3)
        assert look.height % 28 == look.width % 28 == 0
        for thing in things:
            row, column = int(thing.y // (look.height / 3)), int(thing.x // (look.width / 3))
            assert (row, column) == divmod(thing.place, 3)
            x, y, half = int(thing.x), int(thing.y), thing.size // 2
            patch = image[max(0, y - half) : y + half, max(0, x - half) : x + half].reshape(-1, 3)
            distance = np.abs(patch.astype(int) - drawing.COLOURS[thing.colour]).sum(1)
            assert (distance < 80).mean() > 0.15, (thing, look)

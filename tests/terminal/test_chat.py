"""The chat as a person meets it: in a real pseudo-terminal, key by key."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from screen import Program

PICTURE = Path(__file__).parent.parent / "golden" / "processor" / "image1.png"
CTRL_C, CTRL_D = "\x03", "\x04"


def test_the_prompt_is_there_before_the_model_and_the_banner_is_completed_after(standin, tmp_path):
    chat = standin(str(tmp_path / "loaded"))
    assert "stand-in · 1 parameter\n" in chat.expect("❯") + "\n"
    (tmp_path / "loaded").write_text("yes")
    chat.expect("❯")  # still the same one
    chat.seen = 0
    chat.expect("stand-in · 1 parameter · cpu\n")


def test_what_is_typed_while_the_model_loads_is_answered(standin, tmp_path):
    chat = standin(str(tmp_path / "loaded"))
    chat.expect("❯")
    chat.line("hello")
    chat.expect("loading stand-in")
    (tmp_path / "loaded").write_text("yes")
    chat.expect("1 'hello' [] adaptive")
    assert "loading" not in chat.screen.text


def test_a_model_that_does_not_load_ends_the_chat_without_a_key_pressed(standin, tmp_path):
    chat = standin(str(tmp_path / "loaded"))
    chat.expect("❯")
    (tmp_path / "loaded").write_text("broken")
    assert chat.leave() == 2
    assert "the model is broken" in chat.screen.text
    assert "Traceback" not in chat.screen.text


def test_thinking_folds_to_one_line_and_unfolds(standin):
    chat = standin()
    chat.line("apples and pears")
    shown = chat.expect("closed: 0")
    assert "▸ thought for 6 tokens\n\n1 'apples and pears'" in shown
    assert "I think of" not in shown
    chat.line("/unfold")
    chat.expect("  I think of apples and pears")
    chat.line("plums")
    shown = chat.expect("3 'plums'")
    assert "  I think of plums\n" in shown
    chat.line("/fold")
    chat.expect("thinking folds")
    chat.line("figs")
    assert "I think of figs" not in chat.expect("5 'figs'")


def test_ctrl_c_stops_the_answer_and_not_the_program(standin):
    chat = standin()
    chat.line("for ever")
    chat.expect("and on and on")
    chat.press(CTRL_C)
    chat.expect("stopped")
    chat.line("still there?")
    shown = chat.expect("closed: 1")  # the stream was closed: its request is cancelled
    assert "3 'still there?'" in shown  # what was said until then is part of the conversation
    assert "^C" not in shown


def test_ctrl_c_at_the_prompt_drops_the_line_and_twice_leaves(standin):
    chat = standin()
    chat.expect("❯")
    chat.send("half a line")
    chat.expect("half a line")
    chat.press(CTRL_C)
    chat.expect("Ctrl-C again, or Ctrl-D, leaves")
    chat.line("hello")
    chat.expect("1 'hello'")
    chat.expect("❯")
    chat.press(CTRL_C)
    chat.expect("Ctrl-C again")
    chat.expect("❯")
    chat.press(CTRL_C)
    assert chat.leave() == 0


def test_ctrl_d_and_quit_leave(standin):
    for keys in (CTRL_D, "/quit\r"):
        chat = standin()
        chat.expect("❯")
        chat.send(keys)
        assert chat.leave() == 0


def test_pictures_are_attached_by_command_or_dropped_and_shown_once(standin, tmp_path):
    (tmp_path / "my picture.png").write_bytes(PICTURE.read_bytes())
    chat = standin()
    chat.line("/image my picture.png")
    chat.expect("image: my picture.png, ")
    chat.line("what is it?")
    chat.expect("1 'what is it?' ['image'] adaptive")
    chat.line("and now?")
    chat.expect("3 'and now?' [] adaptive")
    escaped = str(tmp_path / "my picture.png").replace(" ", "\\ ")
    chat.line(f"what is on {escaped} here?")
    chat.expect("5 'what is on here?' ['image'] adaptive")
    chat.line("/image 'my picture.png' and this?")
    chat.expect("7 'and this?' ['image'] adaptive")
    chat.line(f"'{tmp_path}/my picture.png'")
    chat.expect("now ask about it")


def test_a_file_that_is_no_picture_is_one_line_and_attaches_nothing(standin, tmp_path):
    (tmp_path / "notes.png").write_text("just text")
    chat = standin()
    chat.line("/image notes.png")
    chat.expect("notes.png': not a picture")
    chat.line("/image missing.png")
    chat.expect("missing.png': no such file")
    chat.line("/video")
    chat.expect("/video needs a path")
    chat.line("hello")
    assert "Traceback" not in chat.expect("1 'hello' [] adaptive")


def test_the_mode_of_thinking_is_set_and_a_wrong_one_refused(standin):
    chat = standin()
    chat.line("/thinking disabled")
    chat.expect("thinking: disabled")
    chat.line("hello")
    assert "thought" not in chat.expect("1 'hello' [] disabled")
    chat.line("/thinking hard")
    chat.expect("/thinking hard: the modes are adaptive, enabled, disabled; it is disabled now")


def test_reset_forgets_the_conversation(standin):
    chat = standin()
    for count, line in ((1, "one"), (3, "two")):
        chat.line(line)
        chat.expect(f"{count} '{line}'")
    chat.line("/reset")
    chat.expect("starting over")
    chat.line("three")
    chat.expect("1 'three'")


def test_an_unknown_command_suggests_the_nearest(standin):
    chat = standin()
    chat.line("/thinkin enabled")
    chat.expect("there is no command /thinkin; did you mean /thinking?")
    chat.line("/xyz")
    chat.expect("there is no command /xyz; /help lists them all")
    chat.line("/help")
    for command in ("/image PATH", "/video PATH", "/thinking MODE", "/fold", "/unfold", "/reset", "/help", "/quit"):
        chat.expect(command)


def test_an_error_of_the_model_is_one_line_and_takes_the_question_back(standin):
    chat = standin()
    chat.line("too long")
    chat.expect("the prompt has 1,200 tokens; the model's context is 1000 tokens")
    chat.line("hello")
    chat.expect("1 'hello'")


def test_a_full_context_says_so_and_how_to_go_on(standin):
    chat = standin()
    chat.line("fill")
    chat.expect("cut off: the context of 1,000 tokens is full; /reset starts over")


def test_lines_go_on_after_a_backslash_and_in_a_paste(standin):
    chat = standin()
    chat.line("one\\")
    chat.line("two")
    chat.expect(r"1 'one\ntwo'")
    chat.expect("❯")
    chat.send("\x1b[200~three\nfour\x1b[201~\r")
    chat.expect(r"3 'three\nfour'")


def test_a_long_answer_stands_in_the_scrollback_once_and_in_order(standin):
    chat = standin(height=12)
    chat.line("long")
    chat.expect("closed: 0")
    lines = [line for line in chat.screen.lines if "of the" in line]
    assert lines == [f" • line {i} of the answer" for i in range(120)]


def test_tab_completes_commands_modes_and_paths(standin, tmp_path):
    (tmp_path / "some picture.png").write_bytes(PICTURE.read_bytes())
    chat = standin()
    chat.expect("❯")
    chat.send("/thi\tdis\t\r")
    chat.expect("thinking: disabled")
    chat.send("/im\tsome\t\r")
    chat.expect("image: some picture.png")


def test_the_history_comes_back_the_next_time_and_only_its_owner_reads_it(standin, tmp_path):
    chat = standin()
    chat.line("remember me")
    chat.expect("1 'remember me'")
    chat.expect("❯")
    chat.send(CTRL_D)
    assert chat.leave() == 0
    assert (tmp_path / "state" / "openm3" / "history").stat().st_mode & 0o777 == 0o600
    chat = standin()
    chat.expect("❯")
    chat.send("\x1b[A\r")
    chat.expect("1 'remember me'")


def test_without_a_terminal_it_streams_plain_text(tmp_path):
    script = Path(__file__).with_name("standin.py")
    run = subprocess.run([sys.executable, str(script)], input="hello\n/thinking disabled\nbye\n", cwd=tmp_path,
                         capture_output=True, text=True, timeout=60)  # fmt: skip
    assert run.returncode == 0
    assert run.stdout == "**1** 'hello' [] adaptive\n\nclosed: 0\n**3** 'bye' [] disabled\n\nclosed: 1\n"
    assert run.stderr == ""


def test_the_real_model_answers_stops_and_goes_on(random_nano, tmp_path):
    """The whole way through the engine: an answer is stopped, its pages are free again, a picture follows."""
    env = os.environ | {"HOME": str(tmp_path), "TERM": "xterm-256color", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "openm3.cli", "chat", str(random_nano), "--thinking", "disabled", "--seed", "1"]
    chat = Program(command, env, str(tmp_path), height=40)
    try:
        assert "nano · " in chat.expect("❯")
        chat.line("hello")
        chat.expect("hello\n")
        chat.expect_more(60)  # in the middle of an answer that would fill the context
        chat.press(CTRL_C)
        chat.expect("stopped")
        chat.line("/reset")
        chat.expect("starting over")
        chat.line(f"/image {PICTURE}")
        chat.expect("image: image1.png")
        chat.line("what is it?")
        chat.expect("what is it?\n")
        chat.expect_more(60)
        chat.press(CTRL_C)
        chat.expect("stopped")
        chat.line("/quit")
        assert chat.leave() == 0
        assert "Traceback" not in chat.screen.text
    finally:
        chat.close()

"""The command line's writing and talking, in a real terminal and in pipes."""

import io
import json
import os
import pty
import re
import select
import subprocess
import sys
import termios
import time
from codecs import getincrementaldecoder
from dataclasses import replace
from functools import partial
from pathlib import Path

import jax
import jsonschema
import numpy as np
import pytest

from jaxgpt import cli, model, paths, terminal
from jaxgpt.chat import equipped
from jaxgpt.cli import main
from jaxgpt.data.records import open_records
from jaxgpt.display import printable
from jaxgpt.generation.stream import CHUNK
from jaxgpt.objectives import Instruct
from tests.tiny import LLAMA, PLAIN, ROOT, bpe, write_hugging_face

# What the model writes, again and again, after a line break and where nothing is left to chance. It
# knows which byte comes after which, so none is in it twice; the next best is a line break.
SENT = "ABCDEFGHIJKLMNOPQRSTUVWXYZ\x1b[31m\x07\r\x9b4abcdefghijkl.".encode()
SEEN = SENT.decode().translate(dict.fromkeys((0x1B, 0x07, 0x0D, 0x9B), "\ufffd"))
FIRST = SEEN[:CHUNK]
CHUNKS = 3
ANSWER = SENT[: CHUNKS * CHUNK].decode()
CUT = "(truncated at the limit of --tokens, or because the context is full)"
T = 256
BYTES = bpe()


def save(folder, tokenizer):
    """The model, in Hugging Face's layout."""
    sizes = {"L": 1, "D": 288, "N": 1, "K": 1, "H": 8, "F": 8, "T": T, "V": tokenizer.vocab_size}
    cfg = replace(LLAMA, **sizes, qk_norm=True, tied=False)
    shapes = jax.eval_shape(partial(model.init, cfg.build(PLAIN)), jax.random.key(0))
    params = jax.tree.map(lambda x: np.zeros(x.shape, np.float32), shapes)
    params["norm"]["scale"] += 1
    params["wte"] += np.eye(*shapes["wte"].shape, dtype=np.float32)
    for before, after in zip(b"\n" + SENT, SENT + SENT[:1], strict=True):
        params["head"][after, before] = 6 / np.sqrt(cfg.D)
        params["head"][10, before] = 5 / np.sqrt(cfg.D)
    return write_hugging_face(folder, cfg, tokenizer, params)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    place = tmp_path_factory.mktemp("models")
    return save(place / "talks", equipped(BYTES)), save(place / "goes-on", BYTES)


@pytest.fixture(scope="module")
def talks(folders):
    return str(folders[0])


@pytest.fixture(scope="module")
def goes_on(folders):
    return str(folders[1])


# A terminal.

PROGRAM = """
import fcntl, os, signal, sys, termios
from jaxgpt import cli, signals
from jaxgpt.generation import stream

steps = stream.decode_steps

def gated(*args, **rest):
    os.read(gate, 1)
    return steps(*args, **rest)

gate = int(sys.argv[1])
stream.decode_steps = gated
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
signal.signal(signal.SIGINT, signal.default_int_handler)
status = cli.main(sys.argv[2:])
signals.end_if_abandoned(status)
sys.exit(status)
"""
UP, CTRL_C, CTRL_D = "\x1b[A", "\x03", "\x04"


def environment(other):
    """The programs' environment: this one, but for some variables, None for those to leave out."""
    here = {"TERM": "xterm", "INPUTRC": "/dev/null", "PYTHONIOENCODING": "utf-8"}
    every = {**os.environ, **here, **other}
    return {name: value for name, value in every.items() if value is not None}


class Terminal:
    """The command line in a terminal; it writes so many chunks as it is let."""

    def __init__(self, *args, **env):
        self.keys, tty = pty.openpty()
        gate, self.gate = os.pipe()
        termios.tcsetwinsize(tty, (24, 100))
        self.process = subprocess.Popen(
            [sys.executable, "-c", PROGRAM, str(gate), *args],
            stdin=tty,
            stdout=tty,
            stderr=tty,
            pass_fds=[gate],
            start_new_session=True,
            cwd=ROOT,
            env=environment(env),
        )
        os.close(tty)
        os.close(gate)
        self.unread = ""
        self.decoder = getincrementaldecoder("utf-8")("replace")

    def type(self, text):
        os.write(self.keys, text.encode() if isinstance(text, str) else text)

    def let(self, chunks):
        os.write(self.gate, bytes(chunks))

    def until(self, pattern, seconds=30):
        """What is sent up to where a pattern ends."""
        end = time.monotonic() + seconds
        while not (found := re.search(pattern, self.unread)):
            ready, *_ = select.select([self.keys], [], [], max(0, end - time.monotonic()))
            assert ready, f"{pattern} is not in {self.unread!r}"
            self.unread += self.decoder.decode(os.read(self.keys, 1 << 16))
        text, self.unread = self.unread[: found.end()], self.unread[found.end() :]
        return text

    def ask(self, line, chunks=0):
        """What is sent between a line that is typed and the next prompt."""
        self.let(chunks)
        self.type(line + "\r")
        return self.until("> $")

    def interrupt(self):
        """Ctrl-C, once the program has read every key and waits.

        Python's readline leaves one that comes between a key and the wait for the next to that key.
        """
        asleep = 0
        while asleep < 3:
            time.sleep(0.01)
            state = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(") ")[2][0]
            asleep = asleep + 1 if state == "S" else 0
        self.type(CTRL_C)

    def close(self):
        """The exit status of the program, which is about to end."""
        try:
            return self.process.wait(timeout=10)
        finally:
            self.process.kill()
            self.process.wait()
            os.close(self.keys)
            os.close(self.gate)


def screen(sent):
    """The lines one sees on a terminal to which this is sent."""
    lines, row, column = [""], 0, 0
    for number, letter, other in re.findall(r"\x1b\[\??([\d;]*)([A-Za-z])|(.)", sent, re.DOTALL):
        line = lines[row]
        if letter == "A":
            row -= int(number or 1)
        elif letter == "K":
            lines[row] = "" if number == "2" else line[:column]
        elif other == "\r":
            column = 0
        elif other == "\n":
            row += 1
            lines += [""] * (row == len(lines))
        elif other == "\b":
            column -= 1
        elif other:
            assert other.isprintable(), other
            lines[row] = line[:column].ljust(column) + other + line[column + 1 :]
            column += 1
        else:
            assert letter in "hlm", letter  # modes and colors
    return [line.rstrip() for line in lines]


@pytest.fixture(scope="module")
def program(talks):
    options = ("--system", "Be brief.", "--tokens", str(CHUNKS * CHUNK), "--temperature", "0")
    program = Terminal("chat", talks, *options)
    try:
        program.until("> $")
        yield program
    finally:
        program.type(CTRL_D)
        program.close()


@pytest.fixture
def chat(program):
    for line in ("/system Be brief.", "/set temperature 0"):
        program.ask(line)
    return program


@pytest.fixture
def said(chat, tmp_path):
    """What has been said, but for the system message, as one finds it in a file."""

    def said():
        file = tmp_path / f"{len(list(tmp_path.iterdir()))}.jsonl"
        chat.ask(f"/save {file}")
        (line,) = file.read_text().splitlines()
        system, *messages = json.loads(line)["messages"]
        assert system == {"role": "system", "content": "Be brief."}
        assert [m["role"] for m in messages] == ["user", "assistant"] * (len(messages) // 2)
        return [m["content"] for m in messages]

    return said


def test_an_answer_is_seen_while_it_is_written(chat):
    chat.let(1)
    chat.type("Hello\r")
    assert chat.until(FIRST).endswith(FIRST)
    assert chat.unread == ""
    chat.let(CHUNKS - 1)
    assert chat.until("> $").startswith(SEEN[CHUNK : len(ANSWER)] + "\r\n")


def test_control_characters_of_generated_text_are_replaced(chat):
    sent = chat.ask("Hello", CHUNKS)
    assert "Z\ufffd[31m\ufffd\ufffd\ufffd4abc" in sent
    assert "\x1b[31m" not in sent and "\x07" not in sent and "\x9b" not in sent


def test_the_screen_shows_messages_and_answers_alone(chat):
    sent = "".join(chat.ask(*line) for line in (("Hello", CHUNKS), ("/reset",), ("Bye", CHUNKS)))
    answer = SEEN[: len(ANSWER)]
    shown = ["> Hello", answer, CUT, "> /reset", "> Bye", answer, CUT, ">"]
    assert screen("> " + sent) == shown


def test_a_message_may_have_several_lines(chat, said):
    for lines in (["one \\", "two\\", "three"], ['"""', "/help", 'x = """a', "", '"""']):
        for line in lines[:-1]:
            chat.type(line + "\r")
            chat.until("… $")
        chat.ask(lines[-1], CHUNKS)
    assert said() == ["one \ntwo\nthree", ANSWER, '/help\nx = """a\n', ANSWER]


def test_the_up_key_recalls_the_last_message(chat, said):
    chat.ask("Hello again", CHUNKS)
    chat.ask(UP, CHUNKS)
    assert said() == ["Hello again", ANSWER] * 2


def test_a_conversation_can_be_forgotten(chat, said):
    chat.ask("Hello", CHUNKS)
    chat.ask("/reset")
    chat.ask("Hello again", CHUNKS)
    assert said() == ["Hello again", ANSWER]


def test_a_new_system_message_starts_a_new_conversation(chat, tmp_path):
    file = tmp_path / "said.jsonl"
    for line in ("Hello", "/system  Speak up,\\", "Hello", "/system", "Hello"):
        if line.endswith("\\"):
            chat.type(line + "\r")
            chat.until("… $")
            chat.ask("and clearly.")
        else:
            chat.ask(line, CHUNKS if line == "Hello" else 0)
            chat.ask(f"/save {file}")
    saved = [json.loads(line)["messages"] for line in file.read_text().splitlines()]
    hello = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": ANSWER}]
    assert [messages[:-2] for messages in saved] == [
        [{"role": "system", "content": "Be brief."}],
        [{"role": "system", "content": "Speak up,\nand clearly."}],
        [],
    ]
    assert all(messages[-2:] == hello for messages in saved)


def test_a_message_is_answered_again_in_another_way(chat, said):
    for line in ("/set temperature 1", "/set top_k 2"):
        chat.ask(line)
    chat.ask("Hello", CHUNKS)
    (_, before) = said()
    chat.ask("/retry", CHUNKS)
    (message, after) = said()
    assert message == "Hello" and after != before
    chat.ask("Hello again", CHUNKS)
    chat.ask("/retry", CHUNKS)
    assert said()[:3] == ["Hello", after, "Hello again"]


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("/set temprature 1", "/set temprature 1: there are temperature, top_k, .*, seed"),
        ("/set logit_bias 1", "/set logit_bias 1: there are temperature"),
        ("/set", "/set : there are temperature"),
        ("/set temperature", "/set temperature: give a name and a number"),
        ("/set temperature hot", "/set temperature hot: give a name and a number"),
        ("/set top_k 2.5", "/set top_k 2.5: give a name and a number"),
        ("/set temperature -1", "temperature=-1.0; set it from 0"),
        ("/set top_p 0", "top_p=0.0; set it above 0"),
        ("/set min_p nan", "min_p=nan"),
        ("/retry", "there is no message to answer again"),
        ("/save", "/save needs a file's name"),
        ("/save said.jsonl", "there is no answer to save"),
        ("/hlep", "/hlep is no command; /help lists them"),
        ("/", "/ is no command"),
        ("Hello " * 40, rf"the conversation has \d+ tokens with this message, .* {T}; use /reset"),
        (b"\xff", "can't decode byte 0xff"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_an_invalid_line_is_one_line_of_error_and_the_conversation_continues(
    chat, said, line, says
):
    chat.type(line)
    _, error, prompt = screen(chat.ask(""))[-3:]
    assert re.match(f"error: .*{says}", error) and prompt == ">"
    chat.ask("Hello", CHUNKS)
    assert said() == ["Hello", ANSWER]


def test_ctrl_c_stops_an_answer_and_keeps_what_was_said(chat, said):
    chat.ask("Hello", CHUNKS)
    chat.let(1)
    chat.type("Go on\r")
    chat.until(FIRST)
    chat.interrupt()
    chat.until("> $")
    chat.let(1)  # for the thread that was abandoned
    chat.ask("And now?", CHUNKS)
    assert said() == ["Hello", ANSWER, "Go on", ANSWER[:CHUNK], "And now?", ANSWER]


def test_ctrl_c_stops_an_answer_that_has_not_begun(chat, said):
    chat.ask("Hello", CHUNKS)
    for line in ("Go on", "/retry"):
        chat.type(f"{line}\r")
        chat.until(r"compiling… \d+ s")
        chat.interrupt()
        assert "there was no answer" in chat.until("> $")
        chat.let(1)  # for the thread that was abandoned
        assert said() == ["Hello", ANSWER]
    chat.ask("And now?", CHUNKS)
    assert said() == ["Hello", ANSWER, "And now?", ANSWER]


@pytest.mark.parametrize("lines", [["Hel"], ['"""', "Hello", "th"], ["Hello\\", ""]], ids=str)
def test_ctrl_c_drops_what_is_being_typed(chat, said, lines):
    *whole, part = lines
    for line in whole:
        chat.type(line + "\r")
        chat.until("… $")
    chat.type(part)
    chat.until(f"{part}$")
    chat.interrupt()
    assert "(Ctrl-D leaves)" in chat.until("> $")
    chat.ask("Hello again", CHUNKS)
    assert said() == ["Hello again", ANSWER]


def test_ctrl_c_ends_generate_with_what_it_wrote(goes_on):
    program = Terminal("generate", goes_on, "12A", "--tokens", "40", "--temperature", "0")
    try:
        program.let(1)
        program.until(f"12A{SEEN[1:CHUNK]}.$")
        program.interrupt()
        assert program.until("\n$").replace("^C", "") == "\r\n"
    finally:
        assert program.close() == 130


def test_ctrl_c_before_anything_is_written_says_no_more(goes_on):
    program = Terminal("generate", goes_on, "12A")
    try:
        program.until(r"compiling… \d+ s")
        program.interrupt()
        assert "Traceback" not in program.until("\n$")
    finally:
        assert program.close() == 130


def test_a_clock_is_shown_while_one_waits_and_then_removed(chat):
    chat.type("Hello\r")
    sent = chat.until(r"compiling… \d+ s")
    assert screen("> " + sent)[:2] == ["> Hello", re.search(r"compiling… \d+ s", sent)[0]]
    chat.let(CHUNKS)
    sent += chat.until("> $")
    assert screen("> " + sent) == ["> Hello", SEEN[: len(ANSWER)], CUT, ">"]


def test_a_saved_conversation_can_be_learned_from(chat, tmp_path):
    file, tokenizer = tmp_path / "said.jsonl", equipped(BYTES)
    for message in ("Hello", "Tschüß 天"):
        chat.ask(message, CHUNKS)
        chat.ask(f"/save {file}")
    for turns, record in enumerate(open_records(str(file)), 1):
        arrays = Instruct().encode(record, tokenizer)
        learned = arrays["targets"][arrays["weights"] > 0].tolist()
        assert tokenizer.decode(learned) == f"{ANSWER}<|im_end|>" * turns
    assert turns == 2 and "Tschüß 天" in tokenizer.decode(arrays["tokens"].tolist())


def test_help_names_every_command(chat):
    sent = chat.ask("/help")
    for name in ("reset", "system", "retry", "set", "save", "help", "quit"):
        assert f"/{name} " in sent
    assert '"""' in sent and "Ctrl-C" in sent and "Ctrl-D" in sent


def test_a_model_without_a_chat_format_goes_on_from_a_text_until_ctrl_d(goes_on):
    program = Terminal("chat", goes_on, "--tokens", "8", "--temperature", "0")
    try:
        assert "it has no chat format, and continues your text" in program.until("> $")
        assert screen(program.ask("12A", 1))[1] == "BCDEFGHI"
        assert screen(program.ask("34P", 1))[1] == "QRSTUVWX"
        assert "error: this model has no chat format" in program.ask("/system Be brief.")
        program.type(CTRL_D)
    finally:
        assert program.close() == 0


def test_a_second_start_compiles_nothing_anew_and_the_programs_are_private(goes_on, tmp_path):
    line = ("generate", goes_on, "12\x1b[31mA", "--tokens", "8", "--temperature", "0")
    own = dict.fromkeys([name for name in os.environ if name.startswith(("JAX_COMP", "JAX_PERS"))])
    own["JAXGPT_CACHE"] = str(tmp_path / "cache")
    folder = tmp_path / "cache" / "compiled"
    folder.mkdir(parents=True)
    folder.chmod(0o777)

    first = Terminal(*line, **own)
    try:
        sent = first.until(r"compiling… \d+ s")
        first.let(1)
        sent += first.until("HI\r\n$")
    finally:
        assert first.close() == 0
    assert screen(sent) == ["12\ufffd[31mABCDEFGHI", ""]
    kept = {file.name for file in folder.iterdir() if file.name.endswith("-cache")}
    assert len(kept) > 1 and folder.stat().st_mode & 0o777 == 0o700

    again = subprocess.run(
        [sys.executable, "-m", "jaxgpt", *line],
        cwd=ROOT,
        env=environment(own),
        capture_output=True,
        text=True,
    )
    assert (again.returncode, again.stdout, again.stderr) == (0, "12\ufffd[31mABCDEFGHI\n", "")
    assert {file.name for file in folder.iterdir() if file.name.endswith("-cache")} == kept


# In pipes, in this process.


@pytest.fixture
def run(capsys, monkeypatch):
    """Runs a command with an input; its exit status, output and errors."""

    def run(*args, given=""):
        monkeypatch.setattr("sys.stdin", io.StringIO(given))
        status = main([*map(str, args)])
        return status, *capsys.readouterr()

    return run


GREEDY = ("--temperature", 0, "--tokens", 8)
HOT = ("--temperature", 9, "--tokens", 100)


def test_in_a_pipe_one_gets_the_text_and_no_clock(run, goes_on, monkeypatch):
    monkeypatch.setattr(terminal, "MOMENT", -1)
    assert run("generate", goes_on, "12A", *GREEDY) == (0, "12ABCDEFGHI\n", "")
    status, out, errors = run("chat", goes_on, *GREEDY, given="12A\n\n  \n34P\n/quit\n56A\n")
    assert (status, errors) == (0, "")
    assert out.splitlines()[1:] == ["> BCDEFGHI", "> > > QRSTUVWX", "> "]
    assert run("chat", goes_on, *GREEDY, given="12A") == (0, out[: out.index("I") + 2] + "> \n", "")


def test_a_text_ends_before_a_stop(run, goes_on):
    _, out, _ = run("generate", goes_on, "12A", *GREEDY, "--stop", "FG", "XY")
    assert out == "12ABCDE\n"
    _, out, _ = run("chat", goes_on, *GREEDY, "--stop", "FG", "--cache", "int8", given="12A\n")
    assert out.splitlines()[1] == "> BCDE"


def test_a_beam_takes_the_likeliest_text(run, goes_on):
    likeliest = ("--beam", 3, "--tokens", 8)
    assert run("generate", goes_on, "12A", *likeliest) == (0, "12ABCDEFGHI\n", "")
    _, out, _ = run("chat", goes_on, *likeliest, given="12A\n/set top_k 3\n/retry\n")
    assert out.splitlines()[1] == "> BCDEFGHI"
    assert (
        "error: beam=3 searches the most likely text, without sampling or constraints; remove top_k"
        in out
    )


@pytest.mark.parametrize("seed", range(2))
def test_generated_text_keeps_choices_regex_and_schema(run, goes_on, seed, tmp_path):
    at = ("--seed", seed, *HOT)
    _, out, _ = run("generate", goes_on, "Is it? ", "--choices", "yes", "no", "maybe so", *at)
    assert out in ("Is it? yes\n", "Is it? no\n", "Is it? maybe so\n")
    _, out, _ = run("generate", goes_on, "--regex", r"[0-9]{3}-[a-c]+!", *at)
    assert re.fullmatch(r"[0-9]{3}-[a-c]+!\n", out)
    schema = {
        "type": "object",
        "properties": {
            "age": {"type": "integer", "minimum": 0, "maximum": 99},
            "mood": {"enum": ["good", "bad"]},
        },
        "required": ["age", "mood"],
    }
    (tmp_path / "schema.json").write_text(json.dumps(schema))
    _, out, _ = run("generate", goes_on, "--schema", tmp_path / "schema.json", *at)
    jsonschema.validate(json.loads(out), schema)


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["generate", "--schema", "none.json"], "none.json cannot be read as JSON"),
        (["generate", "--schema", "half.json"], "half.json cannot be read as JSON"),
        (["generate", "--schema", "list.json"], "list.json holds list; a schema is an object"),
        (["generate", "--schema", "odd.json"], "type"),
        (["generate", "--regex", "(a"], "pattern"),
        (["generate", "--choices", "a", "a"], "'a' is twice among the choices"),
        (["generate", "--choices", "a", "--regex", "a"], "choices and regex cannot be combined"),
        (["generate", "--stop", ""], "a stop string is empty"),
        (["generate", "--tokens", "0"], "tokens=0"),
        (["generate", "--temperature", "-1"], "temperature=-1"),
        (["generate", "A" * T], f"{T + 1} tokens, .* context of {T}"),
        (["generate", "--beam", "0"], "beam=0"),
        (["generate", "--beam", "2", "--regex", "a"], "remove regex"),
        (["generate", "--beam", "2", "--tokens", "300"], "tokens=300 .* set tokens to 1 to 256"),
        (["chat", "--tokens", "0"], "tokens=0"),
        (["chat", "--top_p", "0"], "top_p=0"),
        (["chat", "--system", "Be brief."], "no chat format"),
    ],
    ids=lambda value: " ".join(value)[:30] if isinstance(value, list) else "",
)
def test_an_invalid_option_is_one_line_of_error_before_any_text(
    run, goes_on, tmp_path, monkeypatch, args, says
):
    monkeypatch.chdir(tmp_path)
    for name, text in (("half", '{"type":'), ("list", "[]"), ("odd", '{"type": "dog"}')):
        Path(f"{name}.json").write_text(text)
    status, out, errors = run(args[0], goes_on, *args[1:])
    assert (status, out) == (2, "")
    assert re.fullmatch(f"error: .*{says}.*\n", errors)


def test_printable_text_is_shown_unchanged():
    text = "é\u00a0天\u3000\u0645\u200c\u0646 👩\u200d👩\u200d👧 e\u0301\tx\n\U0001fae8"
    assert printable(text) == text
    for code in [*range(9), *range(11, 32), *range(127, 160), 0xD800, 0xDFFF]:
        assert printable(f"a{chr(code)}b") == "a\ufffdb"


def test_control_characters_of_labels_and_translations_are_replaced(run, monkeypatch):
    class Objective:
        labels = ("\x1b[2J",)

        def predict(self, trained, texts):
            return np.ones((len(texts), 1))

        def translate(self, trained, texts, beam):
            return ["\x1b[2J"] * len(texts)

    monkeypatch.setattr(cli, "_trained", lambda *_: (None, Objective()))
    assert run("classify", "run", "a") == (0, "\ufffd[2J\t1.0000\ta\n", "")
    assert run("translate", "run", "a") == (0, "\ufffd[2J\n", "")


def test_programs_are_not_cached_without_a_private_folder(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("JAXGPT_CACHE", str(tmp_path / "file"))
    before = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", None)
    try:
        paths.keep_compiled_programs()
        assert jax.config.jax_compilation_cache_dir is None
    finally:
        jax.config.update("jax_compilation_cache_dir", before)


def test_a_closed_pipe_ends_generate_without_an_error(goes_on):
    options = ("--tokens", "60", "--temperature", "0")  # a program that other tests compile too
    line = [sys.executable, "-m", "jaxgpt", "generate", goes_on, "12A", *options]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(line, cwd=ROOT, **pipes) as process:
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait() == 128 + 13

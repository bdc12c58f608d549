import contextlib
import json
import threading
import time
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from jaxgpt import chat, cli, load
from jaxgpt.errors import InputError
from jaxgpt.evaluation.judge import (
    PROMPT,
    REPLY_TOKENS,
    Example,
    ServerJudge,
    answer_records,
    judge_examples,
    mean_score,
    parse_score,
    summary,
)
from tests.tiny import LLAMA, ROOT, bpe, write_hugging_face

RECORDS = [{"instruction": f"Add {n} and 1.", "output": f"{n + 1}"} for n in range(4)]


@pytest.mark.parametrize(
    "reply, score",
    [
        *(("85", 85), (" 0\n", 0), ("100.", 100), ("Score: 70", 70), ("**42**", 42)),
        *(("85/100", 85), ("92.5", 92.5), ("### Score: **7** / 100", 7)),
        *(("101", None), ("-5", None), ("", None), ("I'd say 85", None), ("85 or 90", None)),
        *(("8/10", None), ("1e2", None), ("nan", None), ("eighty", None), ("٨٥", None)),
        *(("100%", None), ("0x10", None), ("50\n\nbecause it is half right", None)),
    ],
)
def test_only_a_number_from_0_to_100_is_a_score(reply, score):
    assert parse_score(reply) == score


def test_answers_without_a_score_are_counted_and_not_guessed():
    replies = {"a": "80", "b": "good", "c": "90", "d": "100"}
    examples = [Example(f"f:{n}", "say", "x", answer) for n, answer in enumerate(replies)]
    judged = list(
        judge_examples(examples, lambda prompts: [replies[one.split("\n")[-3]] for one in prompts])
    )
    assert [example.score for example in judged] == [80, None, 90, 100]
    assert mean_score(judged).value == 90
    assert mean_score(judged).error == pytest.approx(10 / 3**0.5)
    assert summary(judged).splitlines() == [
        "mean score  90.00 ± 5.77, 3 answers",
        "no score    1 of 4 answers: the judge's reply is no number from 0 to 100, such as 'good'",
    ]
    assert mean_score(judged[1:2]) is None


def test_the_prompt_is_in_the_documentation():
    assert PROMPT in (ROOT / "docs/evaluation.md").read_text(encoding="utf-8")


def test_braces_in_an_answer_are_text():
    (judged,) = judge_examples([Example("f:1", "{answer}", "{0}", "{{x}")], list)
    assert "\n{{x}\n" in judged.reply and "\n{answer}\n" in judged.reply


@contextlib.contextmanager
def scripted(*answers):
    """A server that gives these answers in turn, (status, body, headers), and notes requests."""
    left, seen = list(answers), []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = self.rfile.read(int(self.headers["content-length"]))
            seen.append((self.path, self.headers, json.loads(body)))
            status, content, headers = left.pop(0)
            if status is None:  # no answer in time
                time.sleep(content)
                return
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(content.encode())

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}/v1", seen
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def said(text):
    return (200, json.dumps({"choices": [{"message": {"content": text}}]}), {})


def refused(status, message="no", param=None, **headers):
    return (status, json.dumps({"error": {"message": message, "param": param}}), headers)


def test_a_judge_behind_an_api_gets_the_key_and_replies(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-1")
    with scripted(said("75")) as (url, seen):
        assert ServerJudge(url + "/", "big").ask("How good?") == "75"
    path, headers, body = seen[0]
    assert path == "/v1/chat/completions" and headers["authorization"] == "Bearer sk-1"
    assert body == {
        **{"model": "big", "temperature": 0, "max_tokens": REPLY_TOKENS},
        "messages": [{"role": "user", "content": "How good?"}],
    }


def test_a_busy_judge_is_asked_again_after_the_time_that_it_says():
    pauses = []
    answers = (refused(429, **{"retry-after": "7"}), (503, "<html>", {}), said("1"))
    with scripted(*answers) as (url, seen):
        assert ServerJudge(url, "big", sleep=pauses.append).ask("x") == "1"
    assert pauses == [7, 14] and len(seen) == 3
    with scripted(*[refused(429, "slow down", **{"retry-after": "9999"})] * 3) as (url, seen):
        with pytest.raises(InputError, match="asked 3 times: status 429: slow down"):
            ServerJudge(url, "big", tries=3, sleep=pauses.append).ask("x")
    assert pauses[2:] == [60, 60]


@pytest.mark.parametrize(
    "answer, error",
    [
        (refused(401, "bad key"), "refuses the request, status 401: bad key; check .*OPENAI_API_"),
        (refused(404, "no model big"), "status 404: no model big"),
        (refused(400, "too long", param="messages"), "status 400: too long"),
        ((302, "", {"location": "http://127.0.0.1:9/v1"}), "status 302"),
        ((200, "<html>hello", {}), "does not answer as OpenAI's API does: b'<html>hello'; use an"),
        ((200, '{"choices": []}', {}), "does not answer as OpenAI's API does"),
    ],
)
def test_a_refusal_is_an_error_at_once(answer, error):
    with scripted(answer) as (url, seen):
        with pytest.raises(InputError, match=error):
            ServerJudge(url, "big", sleep=lambda _: None).ask("x")
    assert len(seen) == 1


def test_an_option_that_the_model_does_not_have_is_left_out():
    answers = (refused(400, param="max_tokens"), refused(400, param="temperature"), said("3"))
    with scripted(*answers) as (url, seen):
        assert ServerJudge(url, "big", sleep=lambda _: None).ask("x") == "3"
    assert [len(body) for *_, body in seen] == [4, 3, 2]


def test_a_judge_that_does_not_answer_in_time_is_asked_again():
    with scripted((None, 0.3, {}), said("5")) as (url, _):
        assert ServerJudge(url, "big", timeout=0.1, sleep=lambda _: None).ask("x") == "5"
    with pytest.raises(InputError, match="does not answer, asked 2 times: .*refused"):
        ServerJudge(url, "big", tries=2, sleep=lambda _: None).ask("x")  # nobody listens there now


def test_a_judge_needs_an_address_and_a_model():
    with pytest.raises(InputError, match="begins with http:// or https://"):
        ServerJudge("file:///etc/passwd", "big")
    with pytest.raises(InputError, match="set judge_model"):
        ServerJudge("http://127.0.0.1/v1", "")
    with pytest.raises(InputError, match="parallel=0; set it to 1 or more"):
        ServerJudge("http://127.0.0.1/v1", "big", parallel=0)


def test_replies_have_the_order_of_the_prompts():
    with scripted(*[said("7")] * 6) as (url, seen):
        replies = list(ServerJudge(url, "big", parallel=3)([f"{n}" for n in range(6)]))
    assert replies == ["7"] * 6
    assert sorted(body["messages"][0]["content"] for *_, body in seen) == list("012345")


def test_our_own_server_is_a_judge():
    fake_server = pytest.importorskip("tests.serve.fake_server")
    engine = fake_server.FakeEngine(text="64", context=2048)
    with fake_server.serving(engine) as port:
        judge = ServerJudge(f"http://127.0.0.1:{port}/v1", "little")
        (judged,) = judge_examples([Example("f:1", "Add 1 and 1.", "2", "3")], judge)
    assert judged.score == 64
    (request,) = engine.requests
    asked = engine.trained.tokenizer.decode(request.prompt)
    assert "Add 1 and 1." in asked and request.tokens == REPLY_TOKENS
    assert request.sampling.temperature == 0


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A model with a chat format, and a file of instructions."""
    folder = tmp_path_factory.mktemp("judge")
    tokenizer = chat.equipped(bpe())
    cfg = replace(LLAMA, L=1, D=16, N=2, K=1, F=16, T=1024, V=tokenizer.vocab_size)
    write_hugging_face(folder / "model", cfg, tokenizer)
    (folder / "records.jsonl").write_text("".join(json.dumps(one) + "\n" for one in RECORDS))
    return folder


def test_the_command_writes_every_score(model, capsys):
    records, out = str(model / "records.jsonl"), model / "judged.jsonl"
    options = ["judge", str(model / "model"), "--records", records, "--tokens", "4"]
    with scripted(*map(said, ("10", "20", "none", "30"))) as (url, seen):
        server = ["--judge", url, "--judge-model", "big", "--parallel", "1", "--output", str(out)]
        assert cli.main(options + server) == 0
    assert capsys.readouterr().out.startswith(
        "mean score  20.00 ± 5.77, 3 answers\nno score    1 of"
    )
    lines = list(map(json.loads, out.read_text().splitlines()))
    assert [line["score"] for line in lines] == [10, 20, None, 30]
    assert lines[2]["instruction"] == "Add 2 and 1." and lines[2]["reference"] == "3"
    assert lines[1]["answer"] in seen[1][2]["messages"][0]["content"]
    with scripted(said("10"), refused(401)) as (url, _):
        server[1] = url
        assert cli.main([*options, *server, "--limit", "2"]) == 2
    assert "status 401" in capsys.readouterr().err
    assert [json.loads(line)["score"] for line in out.read_text().splitlines()] == [10]


def test_answers_are_those_of_a_chat(model):
    trained = load(str(model / "model"))
    examples = answer_records(trained, str(model / "records.jsonl"), tokens=6)
    for example, record in zip(examples, RECORDS, strict=True):
        asked = [{"role": "user", "content": record["instruction"]}]
        assert example.answer == trained.chat(asked, 6, temperature=0)
    with pytest.raises(InputError, match=r"records.jsonl.*1.* do not fit the model's context of"):
        answer_records(trained, str(model / "records.jsonl"), tokens=1020)


def test_another_model_is_a_judge(model, capsys):
    options = ["judge", str(model / "model"), "--records", str(model / "records.jsonl")]
    options += ["--judge", str(model / "model"), "--limit", "1", "--tokens", "4"]
    assert cli.main(options) == 1  # a model of random numbers gives no score
    assert "no score    1 of 1 answers: the judge's reply is no number" in capsys.readouterr().out
    assert cli.main([*options, "--limit", "-1"]) == 2
    assert "limit=-1" in capsys.readouterr().err

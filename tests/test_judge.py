"""The judge of free-form answers, against an HTTP server of the test's."""

import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

import data
import rewards
import train
from conftest import flags, run
from infra.errors import DataError
from infra.judge import Judge, Question, endpoint, parse_score


class Server(ThreadingHTTPServer):
    """Replies as `script` says: one entry a request, the last one again and again. An entry is a
    number or text (the reply), an HTTP status of at least 300, a dict (the whole JSON), or None: it
    answers after half a second."""

    daemon_threads = True

    def __init__(self, script):
        super().__init__(("127.0.0.1", 0), Handler)
        self.script, self.requests, self.lock = list(script), [], threading.Lock()
        self.url = f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, *args):  # a client that timed out
        pass


class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            self.server.requests.append((self.path, dict(self.headers), body))
            script = self.server.script
            reply = script.pop(0) if len(script) > 1 else script[0]
        if callable(reply):
            reply = reply(body["messages"][0]["content"])
        if reply is None:
            time.sleep(0.5)
        status = reply if isinstance(reply, int) and reply >= 300 else 200
        message = {"choices": [{"message": {"content": str(reply)}}]}
        self.send_response(status)
        if status == 302:
            self.send_header("Location", self.server.to)
        self.end_headers()
        self.wfile.write(json.dumps(reply if isinstance(reply, dict) else message).encode())

    def log_message(self, *args):
        pass


@pytest.fixture()
def serve():
    """serve(*script) -> a Server that runs until the test ends."""
    servers = []

    def start(*script):
        servers.append(Server(script))
        threading.Thread(target=servers[-1].serve_forever, args=(0.01,), daemon=True).start()
        return servers[-1]

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def judge_of(server, out, **how):
    return Judge(server.url, "big", out, **dict(timeout=5, waits=(0.01, 0.02)) | how)


def question(response="a red lamp", i=0):
    return Question(f"f.json, record {i}", "What flashes?", "the red lamp", response)


def by_answer(prompt):
    """A judge that can be computed by hand: 1 for red, 0.25 for lamp, else 0."""
    answer = prompt.split("Answer to grade: ")[1].split("\n")[0]
    return "1" if "red" in answer else "0.25" if "lamp" in answer else "0"


def test_scores_are_those_of_the_replies_in_order(tmp_path, serve, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    server = serve(by_answer)
    judge = judge_of(server, tmp_path)
    asked = [question(x) for x in ("red", "a lamp", "a car", "red", "{0.answer} red")]
    assert judge(asked) == [1.0, 0.25, 0.0, 1.0, 1.0]
    assert len(server.requests) == 4  # "red" is asked once
    path, headers, body = server.requests[0]
    assert path == "/v1/chat/completions" and headers["Authorization"] == "Bearer secret"
    assert (body["model"], body["temperature"]) == ("big", 0)
    (message,) = body["messages"]
    assert message["role"] == "user" and "Question: What flashes?\n" in message["content"]
    assert "Reference answer: the red lamp\n" in message["content"]
    assert judge.step_counts() == {"judge_requests": 4, "judge_fallbacks": 0}
    assert judge.step_counts() == {"judge_requests": 0, "judge_fallbacks": 0}
    assert not any("secret" in x.read_text() for x in tmp_path.iterdir())


def test_a_step_is_judged_at_once(tmp_path, serve):
    """16 answers that each take half a second take less than 16 times that long."""
    server = serve(None)
    began = time.monotonic()
    with pytest.raises(DataError, match="the reply is 'None'"):
        judge_of(server, tmp_path, waits=())([question(str(i)) for i in range(16)])
    assert time.monotonic() - began < 4


@pytest.mark.parametrize("first", [500, 429, None, "I would say 0.8", {"error": "busy"}], ids=str)
def test_what_fails_once_is_asked_again(tmp_path, serve, first):
    """An error of the server, too many requests, a timeout, a reply that is no number, no reply."""
    server = serve(first, 0.5)
    judge = judge_of(server, tmp_path, timeout=0.2 if first is None else 5)
    assert judge([question()]) == [0.5] and len(server.requests) == 2


def test_the_cache_needs_no_request_and_survives_a_torn_line(tmp_path, serve):
    server = serve(0.75)
    judge = judge_of(server, tmp_path)
    assert judge([question()]) == judge([question(i=7)]) == [0.75]
    file = tmp_path / "judge-0.jsonl"
    assert json.loads(file.read_text()) == question()._asdict() | {"judge": "big", "score": 0.75}
    file.write_text(file.read_text() + '{"record": "f.js')
    resumed = judge_of(server, tmp_path)
    assert resumed([question(), question("blue")]) == [0.75, 0.75]
    assert len(server.requests) == 2  # of the first judge, and for blue
    assert len(judge_of(server, tmp_path).scores) == 2
    assert Judge(server.url, "other", tmp_path).scores == {}  # another judge, other scores


@pytest.mark.parametrize(
    "reply, tries, message",
    [
        (503, 3, "HTTP 503 Service Unavailable"),
        ("0.5 or so", 3, "ValueError: the reply is '0.5 or so', expected one number from 0 to 1"),
        (
            {"choices": []},
            3,
            """ValueError: the reply is '{"choices": []}', expected a chat compl""",
        ),
        (401, 1, 'HTTP 401 Unauthorized: {"choices"'),  # asking again would not help
    ],
)
def test_a_judge_that_fails_for_good_stops_the_run_by_name(tmp_path, serve, reply, tries, message):
    server = serve(reply)
    with pytest.raises(DataError) as error:
        judge_of(server, tmp_path)([question()])
    start = f"f.json, record 0: the judge {server.url}/v1/chat/completions failed: "
    assert str(error.value).startswith(start + message) and len(server.requests) == tries
    assert not (tmp_path / "judge-0.jsonl").exists()  # no score, so nothing to keep


def test_a_redirect_is_not_followed(tmp_path, serve):
    """It would lose the question, and take the key to another server."""
    other = serve(1)
    server = serve(302)
    server.to = other.url
    with pytest.raises(DataError, match=r"the judge .* failed: HTTP 302"):
        judge_of(server, tmp_path)([question()])
    assert len(server.requests) == 1 and not other.requests


def test_the_key_is_in_no_message(tmp_path, serve, monkeypatch):
    server = serve(1)
    monkeypatch.setenv("OPENAI_API_KEY", "sk-1\n")  # as a file holds it
    assert judge_of(server, tmp_path)([question()]) == [1.0]
    assert server.requests[0][1]["Authorization"] == "Bearer sk-1"
    monkeypatch.setenv("OPENAI_API_KEY", "sk-1\nsk-2")
    with pytest.raises(DataError, match="failed: ValueError: OPENAI_API_KEY is no key") as error:
        judge_of(server, tmp_path)([question("blue")])
    assert "sk-" not in str(error.value)


def test_where_no_server_is(tmp_path, serve):
    server = serve(1)
    server.shutdown()
    server.server_close()
    with pytest.raises(DataError, match="failed: URLError: .*refused"):
        judge_of(server, tmp_path)([question()])


def test_or_rules_decide_and_it_is_counted(tmp_path, serve, capsys):
    """One reply, then errors. What failed is not kept, so it is asked again in the next step."""
    server = serve(0.5, 500)
    judge = judge_of(server, tmp_path, fails="rules")
    assert judge([question("x")]) == [0.5]
    assert judge([question("x"), question("y", 1), question("y", 2)]) == [0.5, None, None]
    assert judge.step_counts() == {"judge_requests": 2, "judge_fallbacks": 2}
    assert "2 responses were graded by rules; f.json, record 2: the judge" in (
        capsys.readouterr().out
    )
    server.script = [0.25]
    assert judge([question("y")]) == [0.25]


@pytest.mark.parametrize(
    "url",
    ["http://h:8000", "http://h:8000/", "http://h:8000/v1", "http://h:8000/v1/chat/completions"],
)
def test_the_address_with_or_without_its_end(url):
    assert endpoint(url) == "http://h:8000/v1/chat/completions"
    assert endpoint("https://h/api/openai") == "https://h/api/openai/chat/completions"


@pytest.mark.parametrize(
    "reply, score",
    [("1", 1), (" 0.30\n", 0.3), (".5", 0.5), ("1.0", 1), ("<think>0.1?</think>\n\n0.9", 0.9)],
)
def test_a_number_and_nothing_else_is_a_score(reply, score):
    assert parse_score(reply) == score


@pytest.mark.parametrize("reply", ["", "1.5", "-1", "yes", "Score: 1", "0.5/1", "nan", "1e-3", "2"])
def test_anything_else_is_none(reply):
    with pytest.raises(ValueError, match="expected one number from 0 to 1"):
        parse_score(reply)


def sample(kind, answer):
    about = dict(options=[], problem_type=kind, data_type="text", path="", answer=answer)
    return data.Sample("3", "What flashes?", **about)


def test_only_free_form_answers_are_judged(tmp_path, serve):
    """By the answer that a response gives; one without an answer is 0, without a request."""
    server = serve(by_answer)
    texts = [
        ["<answer>red</answer>", "<think>red</think><answer>a lamp</answer>", "red"],
        ["<answer>7</answer>", "<answer>8</answer>"],
    ]
    samples = [sample("free-form", "the red lamp"), sample("numerical", "7")]
    judged = rewards.accuracies(texts, samples, judge_of(server, tmp_path))
    assert judged == [[1.0, 0.25, 0.0], [1.0, 0.0]] and len(server.requests) == 2
    by_rule = rewards.accuracies(texts, samples)
    assert by_rule == [[rewards.accuracy_reward(t, s) for t in of] for of, s in zip(texts, samples)]
    failing = judge_of(serve(500), tmp_path / "none", fails="rules")
    assert rewards.accuracies(texts, samples, failing) == by_rule


@pytest.mark.parametrize(
    "changed, message",
    [
        (["--algo", "sft"], "--judge: expected with --algo grpo or tgrpo"),
        (["--judge", "localhost:8000"], "--judge localhost:8000: expected http://HOST:PORT"),
        (["--judge_timeout", "0"], "--judge_timeout 0.0: expected above 0"),
    ],
)
def test_flags_that_are_refused(changed, message, capsys):
    command = ["--model", "m", "--data", "d", "--judge", "http://h", "--judge_model", "big"]
    with pytest.raises(SystemExit):
        train.parse_args([*command, *changed])
    assert message in capsys.readouterr().err
    with pytest.raises(SystemExit):
        train.parse_args(command[:-2])
    assert "--judge and --judge_model: expected both or none" in capsys.readouterr().err


def test_a_run_with_a_judge(tmp_path, world, cold_start, serve):
    """T-GRPO on free-form questions, on two ranks that share their rows: the judge gives 0.5 for
    every answer, to ordered and to shuffled frames, and is asked by one of the ranks only."""
    records = json.loads((world / "train.json").read_text())
    for r in records:
        r |= {"problem_type": "free-form", "options": []}
    file = tmp_path / "free.json"
    file.write_text(json.dumps(records))
    server, out = serve(0.5), tmp_path / "run"
    how = dict(steps=1, prompts=2, group=2, model=cold_start, data=file, media_root=world, sp=2)
    how |= dict(judge=server.url, judge_model="big")
    run(*flags(world, out, "tgrpo", **how), ranks=2)
    (entry,) = map(json.loads, (out / "log.jsonl").read_text().splitlines())
    lines = [json.loads(x) for x in (out / "samples.jsonl").read_text().splitlines()]
    assert len(lines) == 4 and all(
        x["accuracy"] == 0.5 * (rewards.extract_answer(x["response"]) is not None) for x in lines
    )
    assert entry["judge_requests"] == len(server.requests) > 0 == entry["judge_fallbacks"]
    assert len((out / "judge-0.jsonl").read_text().splitlines()) == len(server.requests)
    assert not (out / "judge-1.jsonl").exists()
    assert entry["shuffled_accuracy"] in (0, 0.25, 0.5)

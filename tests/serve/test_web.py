"""The page in a real Chromium, against the real application with tiny models."""

import json
import re
import shutil
import socket
import threading
import time

import pytest
import uvicorn
from hands import answered, say, settle, shown, text_of
from playwright.sync_api import expect, sync_playwright
from starlette.testclient import TestClient
from talkers import HOSTILE, circling, endless, hostile

from serve.drafters.ngram import NGram
from serve.engine import Engine
from serve.http import pages
from serve.http.api import create_app
from serve.http.served import Served, Service
from serve.sampler import Sampling
from serve.template import Template
from serve.worker import Worker

MAX_LEN = 6000  # takes longer than any test waits: such an answer has to be stopped


@pytest.fixture(scope="module")
def served(decoder, tokenizer):
    """By name: tiny, a chat model; plain, one without a template; hostile; circles, with drafts."""
    evil, words = hostile(tokenizer)
    own = {"tiny": (endless(decoder, tokenizer), tokenizer), "plain": (decoder, tokenizer), "hostile": (evil, words)}
    own["circles"] = (circling(tokenizer), tokenizer)
    made = {}
    for name, (model, its) in own.items():
        drafter = NGram() if name == "circles" else None
        engine = Engine(model, its, max_rows=4, max_len=MAX_LEN, drafter=drafter)
        engine.generate([[0, 0]], Sampling(max_tokens=2))  # kernels are built once; a worker would take it for a stall
        worker = Worker(engine, stall=60)
        made[name] = Served.local(worker, name, None if name == "plain" else Template(its))
    yield made
    for each in made.values():
        each.backend.stop()


@pytest.fixture(scope="module")
def listen():
    """Runs an application at an address of its own."""
    running = []

    def listen(app) -> str:
        place = socket.socket()
        place.bind(("127.0.0.1", 0))
        server = uvicorn.Server(uvicorn.Config(app, log_level="error", timeout_graceful_shutdown=1))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [place]})
        thread.start()
        running.append((server, thread, place))
        return f"http://127.0.0.1:{place.getsockname()[1]}/"

    yield listen
    for server, thread, place in running:
        server.should_exit = True
        thread.join()
        place.close()


@pytest.fixture(scope="module")
def url(served, listen):
    return listen(create_app(Service(served)))


@pytest.fixture(scope="module")
def browser():
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    assert found, "these tests need Chromium: apt-get install chromium"
    expect.set_options(timeout=30_000)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=found, args=["--no-sandbox", "--disable-gpu"])
        yield browser
        browser.close()


@pytest.fixture
def visit(browser):
    """Opens the page in a fresh context; in the end nothing may have broken, been blocked or gone elsewhere."""
    contexts, wrong = [], []

    def visit(url, width=1200, height=800, greedy=True):
        context = browser.new_context(viewport={"width": width, "height": height})
        contexts.append(context)
        context.set_default_timeout(30_000)
        page = context.new_page()
        page.add_init_script(
            "addEventListener('securitypolicyviolation', (e) => console.error('policy', e.blockedURI))"
        )
        page.on("pageerror", lambda error: wrong.append(error))
        page.on("console", lambda message: message.type == "error" and wrong.append(message.text))
        page.on("request", lambda request: request.url.startswith(url) or wrong.append(request.url))
        page.on("dialog", lambda dialog: wrong.append(dialog.message))
        page.wrong = wrong
        page.goto(url)
        if greedy:
            expect(page.locator("#model option").first).to_be_attached()
            settle(page, temperature="0")
        return page

    yield visit
    for context in contexts:
        context.close()
    assert wrong == []


def greedy(served, messages, tokens):
    """What the model says, computed here."""
    engine = Engine(served.backend.engine.model, served.prompts.tokenizer, max_rows=1, max_len=512)
    prompt = served.template.encode(messages) if served.template else served.prompts.encode(messages)
    return engine.generate([prompt], Sampling(max_tokens=tokens, temperature=0))[0].text


def test_a_conversation(visit, url, served):
    page = visit(url)
    settle(page, max_tokens="40")
    page.evaluate(
        """() => {
            window.lengths = new Set();
            const watch = () => lengths.add(document.querySelector('.turn.busy .body')?.textContent.length ?? 0);
            new MutationObserver(watch).observe(document.querySelector('#turns'),
                {subtree: true, childList: true, characterData: true});
        }"""
    )
    said = [{"role": "user", "content": "def f(x)\nreturn <b>x</b>"}]
    say(page, said[0]["content"])
    first = greedy(served["tiny"], said, 40)
    turn = answered(page)
    assert turn.locator(".body").evaluate("e => e.textContent") == shown(first)
    assert page.evaluate("lengths.size") > 2, "the answer came in pieces"
    assert text_of(page.locator("#turns > li").first) == said[0]["content"]
    foot = turn.locator(".foot").inner_text()
    assert "40 tokens" in foot and "tokens/s" in foot and "first after" in foot and "cut off" in foot
    assert first.strip() in page.locator("#announce").text_content()

    said += [{"role": "assistant", "content": first}, {"role": "user", "content": "again"}]
    say(page, "again")
    assert answered(page, 4).locator(".body").evaluate("e => e.textContent") == shown(greedy(served["tiny"], said, 40))
    page.reload()
    expect(page.locator("#turns > li")).to_have_count(4)
    page.get_by_role("button", name="New").click()
    expect(page.locator("#turns > li")).to_have_count(0)
    expect(page.locator("#empty")).to_be_visible()


def test_what_was_spared_is_told(visit, url):
    """Prompt tokens of the turn before are in the prefix cache, and a text that goes in circles is guessed."""
    page = visit(url)
    page.locator("#model").select_option("circles")
    settle(page, max_tokens="400")
    say(page, "for i in range(10): print(i) " * 8)
    foot = answered(page).locator(".foot")
    expect(foot).to_contain_text(re.compile(r"[1-9]\d* of \d+ drafts"))
    settle(page, max_tokens="4")
    say(page, "and then")
    expect(answered(page, 4).locator(".foot")).to_contain_text(re.compile(r"[1-9]\d* cached"))
    server = page.locator("#server")
    expect(server).to_contain_text("6000 tokens")
    expect(server).to_contain_text(re.compile(r"accepted\s*\d+%"))


def test_an_answer_by_a_schema(visit, url):
    page = visit(url)
    schema = {"type": "object", "properties": {"a": {"enum": [1, 2]}}, "required": ["a"], "additionalProperties": False}
    settle(page, schema=json.dumps(schema), max_tokens="100")
    say(page, "which one?")
    assert json.loads(answered(page).locator(".body").text_content())["a"] in (1, 2)


def test_stop(visit, url, served):
    page, worker = visit(url), served["tiny"].backend
    for stop in (lambda: page.keyboard.press("Escape"), lambda: page.get_by_role("button", name="Stop").click()):
        say(page, "for i in range")
        expect(page.locator(".turn.busy .body")).to_have_text(re.compile(r".{20}", re.DOTALL))
        assert worker.stats()["running"] == 1
        stop()
        turn = page.locator("#turns > li").last
        expect(turn.locator(".foot")).to_contain_text("stopped")
        assert len(text_of(turn)) > 10
        deadline = time.monotonic() + 10
        while worker.stats()["running"]:
            assert time.monotonic() < deadline, "the row is free soon after"
            time.sleep(0.02)
        expect(page.locator("#prompt")).to_be_enabled()
        page.get_by_role("button", name="New").click()
    settle(page, max_tokens="5")
    say(page, "and now")
    expect(answered(page).locator(".foot")).to_contain_text("5 tokens")


def test_another_model_which_has_no_template(visit, url, served):
    page = visit(url)
    settle(page, max_tokens="20")
    page.locator("#model").select_option("plain")
    assert page.locator("[name=mode][value=chat]").is_disabled() and page.locator("[name=system]").is_hidden()
    say(page, "def f")
    assert text_of(answered(page)).strip() == greedy(served["plain"], "def f", 20).strip()
    page.locator("#model").select_option("tiny")
    page.locator("label", has=page.locator("[name=mode][value=chat]")).click()
    say(page, "def f")
    expected = greedy(served["tiny"], [{"role": "user", "content": "def f"}], 20)
    assert answered(page, 4).locator(".body").evaluate("e => e.textContent") == shown(expected)


def test_with_the_keyboard_alone(visit, url):
    page = visit(url)
    settle(page, max_tokens="8")
    page.locator(".skip").focus()
    for name in ("Skip to the message box", None, "New", "Settings"):
        focused = page.evaluate("document.activeElement.innerText")
        assert name is None or focused == name
        width = page.evaluate("getComputedStyle(document.activeElement).outlineWidth")
        assert width == "2px", f"{name}: where the focus is can be seen"
        page.keyboard.press("Tab")
    page.locator(".skip").focus()
    page.keyboard.press("Enter")
    page.keyboard.type("one")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("two")
    page.keyboard.press("Enter")
    assert text_of(answered(page).locator("xpath=preceding-sibling::li")) == "one\ntwo"
    page.keyboard.press("ArrowUp")
    page.keyboard.press("End")
    page.keyboard.type("!")
    page.keyboard.press("Enter")
    assert answered(page).locator(".body").inner_text()
    assert text_of(page.locator("#turns > li").first) == "one\ntwo!"
    page.evaluate("document.querySelector('#prompt').focus()")
    page.keyboard.press("Escape")
    expect(page.locator("#settings")).to_be_hidden()
    assert page.evaluate("document.activeElement.id") == "toggle"


def test_edit_again_and_copy(visit, url):
    page = visit(url)
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    settle(page, max_tokens="12", temperature="1", seed="4")
    say(page, "x")
    first = text_of(answered(page))
    page.get_by_role("button", name="Again").click()
    assert text_of(answered(page)) == first, "the same seed"
    page.locator(".turn.assistant").get_by_role("button", name="Copy").first.click()
    expect(page.locator(".turn.assistant").get_by_role("button", name="Copied")).to_be_visible()
    assert page.evaluate("navigator.clipboard.readText()").strip() == first
    settle(page, seed="5")
    page.get_by_role("button", name="Again").click()
    expect(page.locator(".assistant .foot")).to_contain_text("12 tokens")
    assert text_of(answered(page)) != first
    page.get_by_role("button", name="Edit").click()
    page.get_by_label("Edit your message").fill("y")
    page.locator(".editor").get_by_role("button", name="Send").click()
    answered(page)
    assert text_of(page.locator("#turns > li").first) == "y"


def test_on_a_phone(visit, url):
    page = visit(url, width=360, height=640)
    settle(page, max_tokens="30")
    page.locator("#model").select_option("hostile")
    say(page, "unbroken" * 60)
    answered(page)
    inside = "[...document.querySelectorAll('body *')].every(e => e.closest('pre') || e.matches('.unseen, .unseen *')"
    inside += " || e.getBoundingClientRect().right <= innerWidth + 1)"
    assert page.evaluate("document.documentElement.scrollWidth") == 360 and page.evaluate(inside)
    expect(page.locator("#prompt")).to_be_in_viewport()
    page.get_by_role("button", name="Settings", exact=True).click()
    assert page.evaluate("document.documentElement.scrollWidth") == 360 and page.evaluate(inside)
    page.locator("[name=system]").fill("return")
    small = (
        "[...document.querySelectorAll('button, select, input')].filter(e => e.checkVisibility() && e.type !== 'radio'"
    )
    small += " && e.type !== 'range' && e.getBoundingClientRect().height < 24).map(e => e.outerHTML)"
    assert page.evaluate(small) == []
    page.get_by_role("button", name="Close settings").click()
    expect(page.locator("#settings")).to_be_hidden()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_texts_can_be_read_by_day_and_by_night(visit, url, scheme):
    """WCAG's contrast, at least 4.5."""
    page = visit(url)
    page.emulate_media(color_scheme=scheme)
    ratio = """() => {
        const style = getComputedStyle(document.documentElement);
        const light = (name) => {
            const parts = style.getPropertyValue(name).trim().match(/[0-9a-f]{2}/gi).map((v) => parseInt(v, 16) / 255);
            const [r, g, b] = parts.map((v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4));
            return 0.2126 * r + 0.7152 * g + 0.0722 * b;
        };
        const pairs = [['--ink', '--page'], ['--ink', '--card'], ['--ink', '--tint'], ['--ink', '--code'],
            ['--soft', '--page'], ['--soft', '--card'], ['--wrong', '--page'], ['--on-accent', '--accent']];
        return pairs.map(([a, b]) => {
            const [low, high] = [light(a), light(b)].sort((x, y) => x - y);
            return (high + 0.05) / (low + 0.05);
        });
    }"""
    assert min(page.evaluate(ratio)) >= 4.5


def test_markup_from_a_model_is_text(visit, url):
    page = visit(url)
    page.locator("#model").select_option("hostile")
    settle(page, max_tokens="100", temperature="1", seed="1")
    say(page, HOSTILE[0] + HOSTILE[1])
    turn = answered(page)
    text = turn.locator(".body").evaluate("e => e.textContent")
    assert all(piece in text for piece in HOSTILE[:6]), "the model has tried everything"
    made = set(page.evaluate("[...document.querySelectorAll('#turns .body *')].map(e => e.localName)"))
    assert made <= {"p", "figure", "figcaption", "button", "pre", "code"} and "code" in made
    assert page.evaluate("typeof hacked") == "undefined"
    page.reload()
    expect(page.locator("#turns > li")).to_have_count(2)
    assert page.evaluate("typeof hacked") == "undefined"


def test_even_markup_could_do_nothing(visit, url):
    """The net below: what the policy is for."""
    page = visit(url)
    refused = page.evaluate("() => { try { document.body.innerHTML = '<p>'; } catch (e) { return e.name; } }")
    assert refused == "TypeError"
    page.evaluate("() => { const i = new Image(); i.src = 'http://127.0.0.2:9/x'; document.body.append(i); }")
    page.wait_for_timeout(300)
    assert any("127.0.0.2" in str(each) for each in page.wrong)
    page.wrong.clear()


def test_settings_are_what_is_asked_for(visit, url):
    page, bodies = visit(url), []
    page.on("request", lambda request: request.method == "POST" and bodies.append(request.post_data_json))
    settle(page, temperature="0.5", top_p="0.9", top_k="7", max_tokens="6", seed="3", system="return")
    settle(page, stop="a\\nb\nc")
    say(page, "hi")
    answered(page)
    assert bodies.pop() == {
        "model": "tiny",
        "messages": [{"role": "system", "content": "return"}, {"role": "user", "content": "hi"}],
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 7,
        "max_tokens": 6,
        "seed": 3,
        "stop": ["a\nb", "c"],
        "stream": True,
        "stream_options": {"include_usage": True, "continuous_usage_stats": True},
    }
    settle(page, schema="{type: 1}")
    expect(page.locator("#schema-wrong")).to_contain_text("not JSON")
    page.get_by_role("button", name="Again").click()
    assert page.evaluate("document.activeElement.name") == "schema" and not bodies
    settle(page, schema="", max_tokens=str(2 * MAX_LEN))
    page.get_by_role("button", name="Again").click()
    expect(page.locator(".turn.assistant .wrong")).to_contain_text("together at most")
    page.wrong.clear()  # Chromium tells of every status 400
    page.reload()
    assert page.locator("[name=system]").input_value() == "return"


def test_keys(visit, listen, served):
    url = listen(create_app(Service(served, keys=["secret"])))
    page = visit(url, greedy=False)
    expect(page.locator("#notice")).to_contain_text("API keys")
    expect(page.locator("[name=key]")).to_be_focused()
    page.wrong.clear()
    page.keyboard.type("secret")
    page.keyboard.press("Tab")
    expect(page.locator("#model option")).to_have_count(4)
    expect(page.locator("#notice")).to_be_empty()
    settle(page, max_tokens="5", temperature="0")
    say(page, "hi")
    answered(page)
    assert page.evaluate("sessionStorage['edifice.key']") == "secret"
    assert "secret" not in page.evaluate("JSON.stringify(localStorage)")


def test_files(served):
    http = TestClient(create_app(Service(served, keys=["secret"])), client=("127.0.0.1", 1))
    page = http.get("/")
    assert page.status_code == 200 and page.headers["content-type"].startswith("text/html")
    policy = page.headers["content-security-policy"]
    assert "default-src 'none'" in policy and "unsafe" not in policy
    for name in pages.FILES:
        answer = http.get(f"/web/{name}")
        assert answer.status_code == 200 and answer.headers["x-content-type-options"] == "nosniff"
        again = http.get(f"/web/{name}", headers={"If-None-Match": answer.headers["etag"]})
        assert (again.status_code, again.content) == (304, b"")
    for path in ("/web/nothing.js", "/web/../pages.py", "/web/%2e%2e%2fpages.py"):
        assert http.get(path).status_code in (401, 404)
    assert http.get("/stats").status_code == 401
    numbers = http.get("/stats", headers={"Authorization": "Bearer secret"}).json()["models"]
    assert {name: numbers[name]["chat"] for name in numbers} == {name: name != "plain" for name in served}
    assert numbers["tiny"]["max_len"] == MAX_LEN and numbers["tiny"]["running"] == 0

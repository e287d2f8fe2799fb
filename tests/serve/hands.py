"""What a person does on the page, and sees of it."""

from playwright.sync_api import expect


def settle(page, **values):
    """Gives settings, as typing does."""
    for name, value in values.items():
        script = "(e, v) => { e.value = v; e.dispatchEvent(new Event('input', {bubbles: true})); }"
        page.locator(f"#options [name={name}]").evaluate(script, value)


def say(page, text):
    page.locator("#prompt").fill(text)
    page.locator("#prompt").press("Enter")


def answered(page, turns=2):
    """The last of `turns` turns, complete and whole."""
    expect(page.locator("#turns > li")).to_have_count(turns)
    expect(page.locator("body.busy")).to_have_count(0)
    assert page.locator("#turns > li").last.locator(".wrong").text_content() == ""
    return page.locator("#turns > li").last


def text_of(turn) -> str:
    return turn.locator(":scope > .body").inner_text()


def shown(text) -> str:
    """As a browser's inner_text tells it: without the ends' blanks."""
    return text.strip()

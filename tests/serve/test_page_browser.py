"""The status page in Chromium. Skipped if playwright or Chromium is missing."""

from __future__ import annotations

import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from tests.serve.service import ScriptedEngine, running, scripted, tiny_service

api = pytest.importorskip("playwright.sync_api")
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"]
QUIET = ["--disable-background-networking", "--disable-component-update", "--disable-sync"]
HELLO: list[Any] = [{"role": "user", "content": "a secret prompt"}]
CODE = "".join(f"def function_{number}():\n    return {number}\n\n\n" for number in range(40))
MERGED = CODE.replace("return 7\n", "return 77\n").replace("def function_30():\n    return 30\n\n\n", "")
UPDATE = "# ... existing code ...\ndef function_7():\n    return 77\n\n\ndef function_8():\n# ... existing code ...\n"


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with api.sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS + QUIET)
        yield chromium
        chromium.close()


CONTRASTS = """() => {
  const context = new OffscreenCanvas(1, 1).getContext("2d", { willReadFrequently: true });
  const luminance = (colours) => {  // of the colours painted over each other
    for (const each of colours) { context.fillStyle = each; context.fillRect(0, 0, 1, 1); }
    const parts = [...context.getImageData(0, 0, 1, 1).data].slice(0, 3).map((part) => part / 255)
      .map((part) => part <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4);
    return 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2];
  };
  const low = [];
  for (const element of document.querySelectorAll("body *")) {
    const own = [...element.childNodes].some((node) => node.nodeType === 3 && node.data.trim()) || element.value;
    if (!own || !element.checkVisibility() || element.closest("script")) continue;
    const grounds = [];
    for (let each = element; each; each = each.parentElement) grounds.unshift(getComputedStyle(each).backgroundColor);
    const [dark, bright] = [luminance(grounds), luminance([...grounds, getComputedStyle(element).color])].sort((a, b) => a - b);
    const contrast = (bright + 0.05) / (dark + 0.05);
    if (contrast < 4.5) low.push(`${element.tagName} ${element.id} ${element.className}: ${contrast.toFixed(2)}`);
  }
  return low;
}"""


class Opened:
    """A browser page, with its console errors and its requests to other hosts."""

    def __init__(self, browser: Any, url: str, **options: Any) -> None:
        self.page = browser.new_page(**options)
        self.page.set_default_timeout(10_000)
        self.complaints: list[str] = []
        self.outside: list[str] = []
        self.page.on("console", lambda message: self.complaints.append(message.text))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("request", lambda asked: None if asked.url.startswith((url, "data:")) else self._left(asked.url))
        self.page.goto(url)

    def _left(self, url: str) -> None:
        self.outside.append(url)

    def check_width(self) -> None:
        wide = self.page.evaluate("document.scrollingElement.scrollWidth - innerWidth")
        assert wide <= 0, f"{wide} pixels too wide"

    def finish(self) -> None:
        self.page.close()
        assert not self.complaints and not self.outside


def test_a_streamed_request_shows_with_its_drafted_tokens_coloured(browser: Any, tmp_path: Path) -> None:
    text = "Riders in a paceline go faster on the same legs.\n" * 12
    with running(scripted(ScriptedEngine(text, size=9, drafted=True, seconds=0.03))) as url:
        opened = Opened(browser, url, viewport={"width": 1400, "height": 1000})
        page = opened.page
        api.expect(page.locator("#status")).to_have_text("live")
        with openai.OpenAI(base_url=f"{url}/v1", api_key="none") as client:
            chunks: Any = client.chat.completions.create(model="tiny", messages=HELLO, stream=True)
            said = "".join(each.choices[0].delta.content or "" for each in chunks)
        one = page.locator("#requests article")
        api.expect(one.locator("h3")).to_have_text("request-1")
        api.expect(one).to_have_class("card done")
        assert one.locator("pre").text_content() == said == text
        drafted = one.locator("mark").all_text_contents()
        assert drafted[0] == text[9:17] and 0.85 < len("".join(drafted)) / len(text) < 0.9
        colours = "element => [getComputedStyle(element).color, getComputedStyle(element.parentElement).color]"
        assert len(set(one.locator("mark").first.evaluate(colours))) == 2
        api.expect(page.locator("#share")).to_have_text("87%")
        api.expect(page.locator("#share-more")).to_contain_text("8.9 tokens a step")
        assert page.locator("#chart path.drafted").get_attribute("d").count("L") == 61
        assert "secret" not in page.content()
        page.screenshot(path=tmp_path / "wide.png", full_page=True)
        opened.check_width()
        opened.finish()


@pytest.mark.parametrize("width", [360, 1400])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_playground_merges_and_shows_the_change(browser: Any, tmp_path: Path, width: int, scheme: Any) -> None:
    with running(scripted(ScriptedEngine(MERGED + "```", size=40, drafted=True, seconds=0.005))) as url:
        opened = Opened(browser, url, viewport={"width": width, "height": 800}, color_scheme=scheme)
        page = opened.page
        page.get_by_label("Instruction").fill("Make it 77.")
        page.get_by_label("File", exact=True).fill(CODE)
        page.get_by_label("Edit", exact=True).fill(UPDATE)
        page.get_by_role("button", name="Apply").click()
        outcome = page.locator("#outcome")
        api.expect(outcome).to_have_text("+1 −1 lines; merged by rule, no tokens generated")
        assert page.locator("#flags").is_hidden()
        page.get_by_label("Always generate with the model").check()
        page.get_by_role("button", name="Apply").click()
        api.expect(outcome).to_contain_text("+1 −5 lines")
        assert "tokens in" in outcome.text_content() and "drafted" in outcome.text_content()
        rows = [row.text_content() for row in page.locator("#diff .minus, #diff .plus").all()]
        changed = ["30−    return 7", "30+    return 77"]
        assert rows == [*changed, "121−def function_30():", "122−    return 30", "123−", "124−"]
        assert page.locator("#diff .gap").count() == 3
        assert "missing: 'def function_30():'" in page.locator("#flags").text_content()
        page.screenshot(path=tmp_path / f"{width}-{scheme}.png", full_page=True)
        assert page.evaluate(CONTRASTS) == []
        opened.check_width()
        opened.finish()


def test_the_diff_holds_for_any_two_files(browser: Any) -> None:
    draw = random.Random(5)
    pairs = []
    for _ in range(150):
        before = [draw.choice("abcdef") for _ in range(draw.randrange(30))]
        after = [each for each in before if draw.random() < 0.8]
        for _ in range(draw.randrange(6)):
            after.insert(draw.randint(0, len(after)), draw.choice("abcxyz"))
        pairs.append((before, after))
    pairs.append(([str(each) for each in range(2000)], [str(-each) for each in range(2000)]))
    pairs.append(([str(each) for each in range(2000)], [str(each) for each in range(2000) if each % 4]))
    with running(scripted(ScriptedEngine("word"))) as url:
        opened = Opened(browser, url)
        results = opened.page.evaluate("pairs => pairs.map(([before, after]) => compare(before, after))", pairs)
        opened.finish()
    for (before, after), rows in zip(pairs, results, strict=True):
        assert [line for sign, line, _, _ in rows if sign != "+"] == before
        assert [line for sign, line, _, _ in rows if sign != "−"] == after
        assert sum(sign == " " for sign, *_ in rows) == _longest_common(before, after)
        assert [old for sign, _, old, _ in rows if sign != "+"] == list(range(1, len(before) + 1))
        assert [new for sign, _, _, new in rows if sign != "−"] == list(range(1, len(after) + 1))


def _longest_common(before: list[str], after: list[str]) -> int:
    lengths = [0] * (len(after) + 1)
    for one in before:
        diagonal = 0
        for index, other in enumerate(after):
            above = lengths[index + 1]
            lengths[index + 1] = diagonal + 1 if one == other else max(above, lengths[index])
            diagonal = above
    return lengths[-1]


def test_a_key_is_requested_and_kept_in_the_tab(browser: Any) -> None:
    with running(tiny_service(keys=("the key",))) as url:
        opened = Opened(browser, url)
        page = opened.page
        field = page.get_by_label("This server requires an API key.")
        for key in ("another", "the key"):
            field.fill(key)
            page.get_by_role("button", name="Use the key").click()
            if key == "another":
                api.expect(page.locator("#key-error")).to_have_text("The key is wrong.")
        api.expect(page.locator("#status")).to_have_text("live")
        api.expect(page.locator("#pages-more")).to_contain_text("in use of")
        page.reload()
        api.expect(page.locator("#status")).to_have_text("live")
        assert page.locator("#key-form").is_hidden()
        page.get_by_role("button", name="Forget the key").click()
        api.expect(page.locator("#status")).to_have_text("needs a key")
        assert all("401" in each for each in opened.complaints), "Chromium logs each refusal"
        opened.complaints.clear()
        opened.finish()

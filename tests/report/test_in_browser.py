"""The page in a real browser: it opens without errors and requests, shows its figures, and its examples can be read."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests.report.chromium import browser
from tests.report.synthetic_study import make_study
from trainer.report.build import build_report
from trainer.report.drawing import NEUTRALS, PAPER, method_styles
from trainer.report.error_types import LABELS
from trainer.report.methods import DISPLAYED_METHODS


@dataclass
class Opened:
    page: Any
    url: str
    errors: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)

    def choose(self, **filters: str) -> None:
        """Set filters by the label or value of an option; `search` takes text."""
        for name, value in filters.items():
            if name == "search":
                self.page.fill("#browser [name=search]", value)
            else:
                self.page.select_option(f"#browser [name={name}]", value)

    @property
    def count(self) -> int:
        """Number of matching predictions."""
        words = self.text("[data-part=count]").split()
        return int(words[2]) if words[0] != "Nothing" else 0

    def text(self, selector: str) -> str:
        return self.page.inner_text(f"#browser {selector}")


@pytest.fixture(scope="module")
def running() -> Iterator[Any]:
    with browser() as started:
        yield started


def _open(running: Any, path: Path, **look: Any) -> Opened:
    page = running.new_page(**look)
    page.set_default_timeout(60_000)
    opened = Opened(page, path.as_uri())
    page.on("console", lambda message: opened.errors.append(f"{message.type}: {message.text}"))
    page.on("pageerror", lambda error: opened.errors.append(str(error)))
    page.on("request", lambda request: opened.requests.append(request.url))
    page.goto(opened.url)
    return opened


@pytest.fixture
def opened(running: Any, whole_report: Path) -> Iterator[Opened]:
    opened = _open(running, whole_report / "index.html", viewport={"width": 1280, "height": 900})
    yield opened
    assert opened.errors == [] and opened.requests == [opened.url], "errors, or something was loaded"
    opened.page.close()


@pytest.fixture(scope="module")
def data(whole_report: Path) -> dict[str, Any]:
    text = (whole_report / "index.html").read_text()
    begin = text.index('id="predictions">') + len('id="predictions">')
    return json.loads(text[begin : text.index("</script>", begin)])


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280, 1800])
def test_it_opens_and_its_figures_are_there(
    running: Any, whole_report: Path, scheme: str, width: int
) -> None:
    look = {"viewport": {"width": width, "height": 900}, "color_scheme": scheme}
    opened = _open(running, whole_report / "index.html", **look)
    page = opened.page
    boxes = page.eval_on_selector_all(
        "figure svg", "all => all.map(svg => svg.getBoundingClientRect().toJSON())"
    )
    assert len(boxes) == 2 * 2 + 6 + 2 * 2 + 2 * 1 + 3
    boxes = [box for box in boxes if box["width"]]  # of two forms, one is shown
    assert len(boxes) == 2 + 6 + 2 + 1 + 3 and all(b["width"] > 200 and b["height"] > 100 for b in boxes)
    labels = page.eval_on_selector_all(
        "figure svg", "all => all.filter(svg => svg.clientWidth).map(svg => svg.getAttribute('aria-label'))"
    )
    assert all(labels) and len(set(labels)) == len(labels)
    assert page.evaluate("document.documentElement.scrollWidth") <= width, "nothing sticks out at the side"
    light = page.evaluate("getComputedStyle(document.documentElement).backgroundColor")
    assert (light == "rgb(254, 254, 254)") == (scheme == "light")
    anchors = page.eval_on_selector_all(
        ".toc a", "all => all.map(a => document.querySelector(a.hash) !== null)"
    )
    assert len(anchors) == 10 and all(anchors)
    links = page.eval_on_selector_all("figcaption a", "all => all.map(a => a.getAttribute('href'))")
    links = [link for link in links if not link.startswith("#")]
    assert len(links) == 2 * 6 and all((whole_report / name).is_file() for name in links)
    assert opened.errors == [] and opened.requests == [opened.url]
    page.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_first_screen_holds_headline_figure_and_certainty(
    running: Any, scaling_report: Path, scheme: str
) -> None:
    look = {"viewport": {"width": 1400, "height": 900}, "color_scheme": scheme}
    opened = _open(running, scaling_report / "index.html", **look)
    boxes = {
        name: opened.page.locator(name).bounding_box()
        for name in (".headline", "#overview figure svg:visible", "#certainty", ".key")
    }
    for name, box in boxes.items():
        assert box and box["x"] >= 0 and box["x"] + box["width"] <= 1400, f"{name} sticks out at a side"
        assert box["y"] >= 0 and box["y"] + box["height"] <= 900, f"{name} is not on the first screen: {box}"
    figure, certainty = boxes["#overview figure svg:visible"], boxes["#certainty"]
    assert figure["width"] > 700 and figure["height"] > 400
    assert certainty["x"] > 900 and certainty["width"] > 300, "the right third is empty"
    text = opened.page.inner_text("#certainty")
    assert "cot is significantly better than answer_only at " in text and "3 training seeds" in text
    # One plot with everything: a curve, a band, and the intervals and means of each of the four methods.
    curves = opened.page.eval_on_selector(
        "#overview figure svg:not(.narrow)",
        """svg => {
            const style = (e) => e.getAttribute("style") || "";
            const shapes = [...svg.querySelectorAll("path, use")].map(style);
            return ["method-0", "method-1", "method-2", "method-3"].map((method) => {
                const own = shapes.filter((text) => text.includes(`--${method})`));
                return [own.length, own.filter((text) => text.includes("opacity: 0.13")).length];
            });
        }""",
    )
    assert all(shapes >= 12 and bands >= 1 for shapes, bands in curves), curves
    assert "logarithmic" in opened.page.inner_html("#overview figure")
    assert opened.errors == [] and opened.requests == [opened.url]
    opened.page.close()


@pytest.mark.parametrize("report", ["scaling_report", "whole_report"])
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [400, 1400])
def test_nothing_is_cut_off(
    running: Any, request: pytest.FixtureRequest, report: str, scheme: str, width: int
) -> None:
    look = {"viewport": {"width": width, "height": 800}, "color_scheme": scheme}
    opened = _open(running, request.getfixturevalue(report) / "index.html", **look)
    page = opened.page
    page.evaluate("document.querySelectorAll('details').forEach(details => { details.open = true; })")
    assert page.evaluate("document.scrollingElement.scrollWidth") <= width
    outside = page.evaluate(
        """width => [...document.querySelectorAll("body *")]
            .filter(e => !e.closest(".scroll") && (!e.closest("svg") || e.tagName === "text"))
            .map(e => [e.tagName, e.textContent.trim().slice(0, 40), e.getBoundingClientRect()])
            .filter(([, , box]) => box.width && (box.left < -0.5 || box.right > width + 0.5))
            .map(([tag, text, box]) => `${tag} ${text} ${box.left} ${box.right}`)""",
        width,
    )
    assert outside == []
    heights = page.eval_on_selector_all(
        "figure svg text",
        "all => all.map(e => e.getBoundingClientRect().height).filter(height => height > 0)",
    )
    assert len(heights) > 100 and min(heights) > 8.5, "a text of a figure is too small to read"
    scrolled = page.eval_on_selector_all(
        ".scroll",
        "all => all.filter(e => e.scrollWidth > e.clientWidth).map(e => getComputedStyle(e).backgroundImage)",
    )
    assert len(scrolled) >= (3 if width == 400 else 0)
    assert all("linear-gradient" in image for image in scrolled), "no hint that the table scrolls"
    assert opened.errors == [] and opened.requests == [opened.url]
    page.close()


def _contrast(first: str, second: str) -> float:
    """Return the contrast ratio of WCAG 2 of two colours like #1b6a8c."""
    luminances = []
    for color in (first, second):
        channels = [int(color[at : at + 2], 16) / 255 for at in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
        luminances.append(0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2])
    return (max(luminances) + 0.05) / (min(luminances) + 0.05)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_colours_can_be_told_apart(running: Any, whole_report: Path, scheme: str) -> None:
    """The ratio of luminances does not depend on hues, so colour-blind readers see the difference, too."""
    opened = _open(running, whole_report / "index.html", color_scheme=scheme)
    names = set(re.findall(r"--([\w-]+): #", (whole_report / "index.html").read_text()))
    color = {
        name: opened.page.evaluate(
            "name => getComputedStyle(document.documentElement).getPropertyValue(name)", f"--{name}"
        )
        for name in names
    }
    methods = [name for name in names if name.startswith("method-")]
    assert len(methods) == 7
    assert {name: color[name] for name in methods if _contrast(color[name], color["paper"]) < 3} == {}
    assert _contrast(color["cause-right"], color["cause-other"]) >= 3
    assert _contrast(color["cause-right"], color["paper"]) >= 4.5
    assert _contrast(color["cause-other"], color["paper"]) >= 1.5
    for name in names:
        if name.startswith("cause-") and name != "cause-right":
            assert color[name] != color["cause-right"] and _contrast(color[name], color["paper"]) >= 1.4, name
    opened.page.close()


def test_the_colours_of_unknown_methods_are_visible() -> None:
    styles = method_styles([*DISPLAYED_METHODS, *(f"method of a user {number}" for number in range(4))])
    for style in styles.values():
        assert _contrast(style.color, PAPER) >= 3 and _contrast(style.dark, NEUTRALS["paper"][1]) >= 3, style


def test_filters_count_the_matching_predictions(opened: Opened, data: dict[str, Any]) -> None:
    evaluations, problems, predictions = (data[name] for name in ("evaluations", "problems", "predictions"))

    def expected(**wanted: Any) -> int:
        found = 0
        for evaluation, problem, _, _, correct, cause, *_ in predictions:
            facts = evaluations[evaluation] | {"right": bool(correct), "cause": cause}
            facts["steps"] = len(problems[problem]["steps"])
            found += all(facts[name] == value for name, value in {"problems": "gsm8k test", **wanted}.items())
        return found

    assert opened.count == expected() > 100
    opened.choose(result="wrong")
    assert opened.count == expected(right=False) > 0
    assert "✗ wrong" in opened.text("[data-part=example]") and "✓ right" not in opened.text(
        "[data-part=example]"
    )
    for cause in ("operation", "no_answer"):
        opened.choose(cause=cause)
        assert opened.count == expected(cause=cause) > 0
        assert LABELS[cause] in opened.text(".answer:not(.gold) h3")
    opened.choose(cause="", method="iterative_interleaved", model="gpt2", steps="5")
    assert opened.count == expected(method="iterative_interleaved", model="gpt2", steps=5, right=False) > 0
    opened.choose(result="right")
    assert opened.count == expected(method="iterative_interleaved", model="gpt2", steps=5, right=True)
    opened.choose(problems="gsm8k test · no calculator", result="", steps="")
    assert opened.count == expected(
        problems="gsm8k test · no calculator", method="iterative_interleaved", model="gpt2"
    )
    assert "no calculator" in opened.text(".answer:not(.gold)")


def test_searching_and_paging(opened: Opened, data: dict[str, Any]) -> None:
    problem = data["problems"][3]
    words = problem["question"].split(".")[0].upper()
    opened.choose(search=words)
    assert 0 < opened.count < 200 and words.lower() in opened.text(".question").lower()
    opened.choose(search="no such words anywhere")
    assert opened.count == 0 and opened.text("[data-part=example]") == ""
    opened.page.keyboard.press("j")  # typed into the search field, so the page does not change
    assert opened.page.input_value("#browser [name=search]").endswith("j")
    opened.choose(search="", model="gpt2", method="cot")
    opened.page.locator("#browser h3").first.click()
    first = opened.text(".question")
    assert opened.text("[data-part=count]").startswith("1 of ")
    assert opened.page.is_disabled("[data-part=previous]") and opened.page.is_enabled("[data-part=next]")
    opened.page.keyboard.press("ArrowRight")
    opened.page.keyboard.press("j")
    assert opened.text("[data-part=count]").startswith("3 of ") and opened.text(".question") != first
    opened.page.keyboard.press("ArrowLeft")
    opened.page.click("[data-part=previous]")
    assert opened.text(".question") == first and opened.text("[data-part=count]").startswith("1 of ")
    for _ in range(opened.count + 3):
        opened.page.keyboard.press("ArrowRight")
    assert opened.text("[data-part=count]").startswith(f"{opened.count} of ")
    assert opened.page.is_disabled("[data-part=next]")


def test_gold_beside_ours_with_steps_and_calculations_marked(opened: Opened) -> None:
    opened.choose(method="iterative_interleaved", model="gpt2", cause="subquestion")
    assert opened.page.locator("#browser .answer").count() == 2
    gold, ours = opened.page.locator("#browser .answer").all()
    assert gold.locator(".subquestion").count() == ours.locator(".subquestion").count() > 1
    assert ours.locator(".wrong-step").count() == 1 and gold.locator(".wrong-step").count() == 0
    assert "How far is the moon from Paris?" in ours.locator(".wrong-step").inner_text()
    assert gold.locator("mark.by-calculator").count() == gold.locator("mark").count() > 1
    opened.choose(method="", model="", cause="arithmetic")
    assert ours.locator(".wrong-step mark.by-hand").count() == 1, "the calculator would not have written this"
    opened.choose(other="gpt2-large, socratic, seed 0")
    assert opened.page.locator("#browser .answer").count() == 3
    assert "socratic gpt2-large" in opened.page.locator("#browser .answer").nth(2).inner_text()


def test_texts_of_models_are_not_interpreted_as_html(running: Any, tmp_path: Path) -> None:
    study = make_study(tmp_path / "study", {"<b>m": 1000}, ("cot",), seeds=(0,), num_problems=5)
    path = next(study.path.rglob("predictions.jsonl"))
    nasty = "</script><script>alert(1)</script><!--<img src=x onerror=alert(2)>\u2028 <<1+1=2>>2\n#### \ud800"
    lines = [
        json.loads(line) | {"text": nasty, "question": f"{nasty} ?"} for line in path.read_text().splitlines()
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    opened = _open(running, build_report([study.path], tmp_path / "report"))
    assert opened.count == 5 and "</script><script>alert(1)</script><!--<img" in opened.text(".question")
    assert opened.page.locator("#browser img").count() == 0
    assert opened.errors == [] and opened.requests == [opened.url]
    opened.page.close()

"""The page in a real browser: Chromium, headless, where the machine has one."""

import json
import math
import re
import shutil
import subprocess

import pytest

from pref_jax.report import Report, TokenMap, TokenMaps, TokenSample, write_report

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
BROWSER = next(filter(None, map(shutil.which, NAMES)), None)
HOSTILE = "<img src=x onerror=\"document.title='bad'\">&amp;'"

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(BROWSER is None, reason=f"no browser: {', '.join(NAMES)}"),
]

_LOOKS = """
<script>
const look = () => Array.from(document.querySelectorAll(".token"), (token) => ({
  text: token.textContent,
  background: getComputedStyle(token).backgroundColor,
  underlined: getComputedStyle(token).textDecorationLine,
  tip: getComputedStyle(token, "::after").content,
  width: token.getBoundingClientRect().width,
}));
const found = {before: look()};
document.querySelectorAll("label")[1].click();
found.after = look();
found.title = document.title;
found.images = document.images.length;
document.body.innerHTML = "";
document.body.appendChild(document.createElement("pre")).textContent =
  "FOUND" + JSON.stringify(found) + "END";
</script>
"""


@pytest.fixture(scope="module")
def looked_at(tmp_path_factory):
    """What Chromium makes of a page of tokens, before and after a quantity is chosen.

    A copy is looked at that may run a script, and in which the rules for the pointer
    hold everywhere, as nobody moves one here.
    """
    folder = tmp_path_factory.mktemp("browser")
    tokens = ("good", HOSTILE, " bad\n", "end")
    values = {"advantage": (2.0, -1.0, -2.0, math.nan), "V": (0.5, 0.0, -0.5, 0.25)}
    page = Report(
        "Tokens",
        sections=(
            TokenMaps(
                "Heat",
                columns=("policy",),
                quantities={"advantage": "beta log pi", "V": "value"},
                rows=(
                    TokenSample(HOSTILE, "row 0", (TokenMap(tokens, values, (2,)),)),
                ),
            ),
        ),
    )
    write_report(page, folder / "page.html")
    text = (folder / "page.html").read_text()
    text, count = re.subn(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", text)
    assert count == 1 and text.count(".token:hover") == 2
    text = text.replace(".token:hover", ".token").replace("</body>", _LOOKS + "</body>")
    copy = folder / "copy.html"
    copy.write_text(text)
    result = subprocess.run(
        [
            BROWSER,
            *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic"),
            *("--no-first-run", "--disable-background-networking", "--disable-sync"),
            *("--disable-component-update", "--force-color-profile=srgb"),
            f"--user-data-dir={folder / 'profile'}",
            "--dump-dom",
            copy.as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=120,
    )
    match = re.search("FOUND(.*)END", result.stdout, re.DOTALL)
    assert match, result.stdout[-1000:] + result.stderr[-1000:]
    plain = match[1].replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&")
    return json.loads(plain)


def test_tokens_are_drawn_as_text_and_run_nothing(looked_at):
    texts = [token["text"] for token in looked_at["before"]]
    assert texts == ["good", HOSTILE, " bad\u21b5\n", "end"]
    assert all(token["width"] > 0 for token in looked_at["before"])
    assert (looked_at["title"], looked_at["images"]) == ("Tokens", 0)


def test_a_token_tells_all_of_its_numbers(looked_at):
    tips = [
        json.loads(token["tip"].replace("\n", "\\n").replace("\\a ", "\\n"))
        for token in looked_at["before"]
    ]
    assert tips[0] == "advantage 2.000\nV 0.500"
    assert tips[1] == "advantage \u22121.000\nV 0.000"
    assert tips[3] == "advantage \u2013\nV 0.250"


def test_the_colour_follows_the_quantity_that_is_chosen(looked_at):
    def colours(when):
        return [token["background"] for token in looked_at[when]]

    assert colours("before") == [
        "rgba(15, 98, 196, 0.75)",
        "rgba(220, 106, 12, 0.38)",
        "rgba(220, 106, 12, 0.75)",
        "rgba(0, 0, 0, 0)",
    ]
    assert colours("after") == [
        "rgba(15, 98, 196, 0.75)",
        "rgba(220, 106, 12, 0)",
        "rgba(220, 106, 12, 0.75)",
        "rgba(15, 98, 196, 0.38)",
    ]


def test_what_is_marked_is_underlined(looked_at):
    lines = [token["underlined"] for token in looked_at["before"]]
    assert lines == ["none", "none", "underline", "none"]

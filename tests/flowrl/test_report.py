"""The report shows what the files say, escapes what they hold, and survives what they lack."""

import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest
import yaml
from fake_run import CONFIG, eval_rows, fake_run, write_rows

from flowrl import charts, summary
from flowrl.errors import UserError
from flowrl.report import model_name, number, signed, write_report
from flowrl.statistics import Estimate

VOID = {"meta", "img", "br", "path", "use", "link", "rect", "circle", "line"}


class Page(HTMLParser):
    """Text, tags and links of a page; fails on tags that do not nest."""

    def __init__(self, html):
        super().__init__()
        self.open, self.tags, self.texts, self.links = [], [], [], []
        self.feed(html)
        assert not self.open, self.open

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.links += [value for key, value in attributes if key in ("src", "href", "xlink:href")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append(tag)

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag, (tag, self.open, self.getpos())

    def handle_data(self, data):
        self.texts.append(data)

    @property
    def text(self):
        return re.sub(r"\s+", " ", " ".join(self.texts))


def report(folder):
    html = write_report(folder).read_text(encoding="utf-8")
    return html, Page(html)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = fake_run(tmp_path_factory.mktemp("runs") / "my-run")
    return folder, *report(folder)


def test_the_numbers_are_those_of_the_summary(finished):
    folder, _, page = finished
    facts = json.loads((folder / "summary.json").read_text())["eval"]
    for stage in ("before", "before_guided", "after"):
        entry = facts[stage]["shapes"]
        assert f"{entry['mean']:.3f} [{entry['ci95'][0]:.3f}, {entry['ci95'][1]:.3f}]" in page.text
    gain = facts["paired"]["shapes"]
    assert gain["mean_diff"] > 0.1  # or the fake run is not worth testing with
    assert f"+{gain['mean_diff']:.3f} paired gain [+{gain['ci95'][0]:.3f}, +{gain['ci95'][1]:.3f}] better" in page.text
    assert "42 prompts" not in page.text and "40 prompts × 4 images" in page.text


def test_the_page_is_self_contained(finished):
    _, html, page = finished
    assert all(link.startswith(("data:image/png;base64,", "#")) for link in page.links)
    assert not re.search(r"@import|url\((?!#)|<script", html)
    assert "prefers-color-scheme: dark" in html


def test_prompts_are_escaped(finished):
    _, html, page = finished
    assert "<b>shape" not in html
    assert "a photo of <b>shape 0</b> & more" in page.text  # as a person reads it


def test_every_section_is_there(finished):
    _, _, page = finished
    for part in (
        "tiny-sd3 aligned with flow_grpo", "run my-run", "60 of 60 updates in 2m51s", "No alarm.",
        "the ratio was 1 for every step", "What the pictures are like", "Tasks", "Before and after",
        "Most improved", "Most worsened", "Held-out judge", "Gradient norm", "KL to the starting weights",
        "38 400", "calls per image 15.0", "peak memory 1 400 MB", "rollout 1m12s", "output_dir: runs/fake",
    ):  # fmt: skip
        assert part in page.text, part
    assert page.tags.count("svg") >= 13


def test_changed_prompts_are_ranked_by_their_paired_change(finished):
    folder, html, _ = finished
    before, after = summary.read_rows(folder, "before"), summary.read_rows(folder, "after")
    change = {}
    for old, new in summary.pair_rows(before, after):
        change[old["prompt_id"]] = change.get(old["prompt_id"], 0) + new["scores"]["shapes"] - old["scores"]["shapes"]
    section = html[html.index("Most improved") : html.index('id="curves"')]
    improved, worsened = section.split("Most worsened")
    shown = [[change[int(p)] for p in re.findall(r"shape (\d+)&lt;", part)] for part in (improved, worsened)]
    ranked = sorted(change.values())
    assert shown[0] == [c for c in reversed(ranked) if c > 0][:6]
    assert shown[1] == [c for c in ranked if c < 0][:6]


def test_pictures_with_scores(finished):
    folder, html, page = finished
    card = html[html.index('id="pairs"') :]
    card = card[: card.index("</article>")]
    scores = [float(text) for text in re.findall(r"<small>([\d.]+)</small>", card)]
    pairs = summary.pair_rows(summary.read_rows(folder, "before"), summary.read_rows(folder, "after"))[:4]
    assert scores == [row["scores"]["shapes"] for pair in pairs for row in pair]
    assert card.count("data:image/png") == 8
    assert "image-rendering: pixelated" in html


def test_the_report_can_be_made_again(finished):
    folder, html, _ = finished
    assert write_report(folder).read_text(encoding="utf-8") == html
    assert not (folder / "report.html.part").exists()


def test_alarms_are_prominent(tmp_path):
    _, page = report(fake_run(tmp_path / "run", updates=31, alarms=True))
    assert "3 alarms. Look at the pictures" in page.text
    assert "update 30: saturation <rose> by 60 %" in page.text and "after training: the judge fell" in page.text
    assert "No alarm" not in page.text


def test_a_run_that_stopped_early(tmp_path):
    folder = fake_run(tmp_path / "run", updates=3, finished=False)
    _, page = report(folder)
    assert "This run has no final evaluation." in page.text and "3 of 60 updates" in page.text
    assert "Most improved" not in page.text and "Pictures before training" in page.text
    estimate = summary.headline(summary.read_rows(folder, "before"), "scores", "shapes")
    assert f"{estimate.mean:.3f}" in page.text


@pytest.mark.parametrize("eval_config", [None, {"steps": 20, "guidance": 1.0}])
def test_a_folder_with_nothing_but_a_config(tmp_path, eval_config):
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({**yaml.safe_load(CONFIG), "eval": eval_config}))
    _, page = report(tmp_path)
    assert "No evaluation was made" in page.text and "not recorded" in page.text


def test_a_finished_run_without_evaluation_did_not_stop_early(tmp_path):
    folder = fake_run(tmp_path / "run", updates=60, finished=False)
    for file in summary.ROW_FILES.values():
        (folder / file).unlink(missing_ok=True)
    (folder / "config.yaml").write_text(yaml.safe_dump({**yaml.safe_load(CONFIG), "eval": None}))
    _, page = report(folder)
    assert "no final evaluation" not in page.text and "Reward" in page.text


def test_missing_damaged_and_foreign_pictures_cost_their_place_only(tmp_path):
    from PIL import Image

    folder = fake_run(tmp_path / "run", updates=2)
    Image.new("RGB", (64, 64), "red").save(tmp_path / "secret.png")
    rows = eval_rows("before", 0.5, prompts=4, images=1)
    write_rows(folder, "before", rows)
    (folder / rows[0]["path"]).write_bytes(b"no picture")
    (folder / rows[1]["path"]).unlink()
    rows[2]["path"] = "../secret.png"
    (folder / "eval_before.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "eval_after.jsonl").unlink()
    html, page = report(folder)
    assert html.count("data:image/png") == 1


def test_missing_scores_are_dashes_not_zeros(tmp_path):
    folder = fake_run(tmp_path / "run", updates=2)
    for stage in ("before", "after"):
        rows = eval_rows(stage, 0.5, prompts=8)
        for row in rows[:4]:
            row["scores"]["shapes"] = None
        write_rows(folder, stage, rows)
    html, _ = report(folder)
    card = html[html.index('id="pairs"') :]
    assert "– → –" in card[: card.index("</article>")]


def test_few_prompts_are_not_called_better(tmp_path):
    folder = fake_run(tmp_path / "run", updates=2)
    for stage in ("before", "after"):
        rows = eval_rows(stage, 0.5, prompts=5)
        for row in rows:
            row["scores"]["shapes"], row["tag"] = float(stage == "after"), None
        write_rows(folder, stage, rows, pictures_of=0)
    _, page = report(folder)
    assert "+1.000 paired gain [+1.000, +1.000] too few prompts to tell" in page.text


def test_no_run_folder(tmp_path):
    with pytest.raises(UserError, match="holds no config.yaml"):
        write_report(tmp_path)
    fake_run(tmp_path / "run", updates=2)
    (tmp_path / "run" / "summary.json").write_text("{")
    with pytest.raises(UserError, match="summary.json is damaged"):
        write_report(tmp_path / "run")


# ---- charts and numbers ----------------------------------------------------------------------------------------------


def test_charts_hold_names_as_text_and_no_fixed_colours():
    series = [charts.Series("cost $x$ <&>", range(60), np.arange(60.0)), charts.Series("b", [0, 1], [1, float("nan")])]
    svg = charts.line_chart(series)
    assert "cost $x$ &lt;&amp;&gt;" in svg and "var(--after)" in svg and "var(--soft)" in svg
    assert not re.search(r"#0\d0\d0\d", svg) and "font-family" not in svg
    Page(svg)
    assert svg == charts.line_chart(series)  # byte for byte


def test_charts_take_missing_intervals():
    nan = float("nan")
    one, none = Estimate(0.5, nan, nan), Estimate(nan, nan, nan)
    Page(charts.interval_chart([("before", one, charts.BEFORE), ("after", none, charts.AFTER)]))
    Page(charts.task_chart([("a", one, None), ("b", none, one)]))
    Page(charts.line_chart([charts.Series("a", [1, 2], [nan, nan])]))


def test_smoothing_is_a_line_fitted_on_both_sides():
    line = np.linspace(3, 7, 50)
    np.testing.assert_allclose(charts._smoothed(line, 6), line)
    y = np.array([4.0, 1.0, 7.0, 2.0, 0.0])
    np.testing.assert_allclose(charts._smoothed(y, 1)[1:4], [4.0, 10 / 3, 3.0])  # means of three
    np.testing.assert_allclose(charts._smoothed(y, 2)[0], np.polyval(np.polyfit([0, 1, 2], y[:3], 1), 0))
    gap = np.array([1.0, np.nan, 3.0, np.nan, np.nan, np.nan])
    np.testing.assert_allclose(charts._smoothed(gap, 1), [1.0, 2.0, 3.0, 3.0, np.nan, np.nan])


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("tiny-sd3", ("tiny-sd3", True)),
        ("stabilityai/stable-diffusion-3.5-medium", ("stabilityai/stable-diffusion-3.5-medium", True)),
        ("/home/me/models/mine", ("mine", False)),
        ("./mine", ("mine", False)),
    ],
)
def test_model_name(path, name):
    assert model_name(path) == name


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.12345, "0.123"),
        (38400, "38\u202f400"),
        (15.0, "15.000"),
        (float("nan"), "–"),
        (None, "–"),
        (-0.5, "−0.500"),
        (0.00123456, "0.00123"),
        (-6.7e-7, "−6.7e−07"),
        (0.01, "0.010"),
        (0.0, "0.000"),
        (7, "7"),
    ],  # fmt: skip
)
def test_number(value, text):
    assert number(value) == text


def test_signed():
    assert (signed(0.25), signed(-0.25), signed(float("nan")), signed(0.0)) == ("+0.250", "−0.250", "–", "+0.000")

"""Pictures of plans: what is drawn, and files that need nothing else."""

from __future__ import annotations

import builtins
import os
import sys
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest

from tests.plan import synthetic
from tests.plan.synthetic import KIB, NOTHING, OFFLOAD, PLAIN, PRODUCT
from wrappers.plan import plot
from wrappers.plan.parts import Point

SVG = "{http://www.w3.org/2000/svg}"


def full_plan():
    return synthetic.plan(
        (OFFLOAD, PRODUCT, PLAIN),
        frontier=[(300 * KIB, 1200.0), (350 * KIB, 1100.0), (404 * KIB, 1030.0)],
        hand_made=[Point("full <recompute>", 310 * KIB, 1210.0)],
    )


# --- What is drawn --------------------------------------------------------------------------


@pytest.mark.parametrize("choice", [(2, 1, 0), (3, 3, 3), (0, 0, 0), tuple(range(4)) * 10])
def test_layers_add_up_to_the_planned_memory(choice):
    plan = synthetic.plan(choice, budget_bytes=10_000 * KIB)
    layers = plot.layers_of(plan)
    for i, span in enumerate(plan.spans):
        assert sum(layer[i] for _, layer in layers) == span.planned_bytes
        assert all(layer[i] >= 0 for _, layer in layers)


def test_a_layer_is_what_a_region_keeps_while_it_is_alive():
    layers = dict(plot.layers_of(synthetic.plan((NOTHING, PRODUCT, PLAIN))))
    assert list(layers)[1:-1] == ["blocks.0", "blocks.1", "blocks.2"]
    # In the order of spans: forwards of the three, the loss, backwards of the three, the rest.
    kept = [50 * KIB if i in (4, 5, 6, 7) else 0 for i in range(12)]
    assert layers["blocks.1"] == kept


@pytest.mark.parametrize("num", [0, 1, 3, 12, 13, 96, 100])
def test_many_regions_are_drawn_in_groups(num):
    groups = plot.groups_of(num)
    assert len(groups) == min(num, plot.MAX_GROUPS)
    assert [i for group in groups for i in group] == list(range(num))
    sizes = {len(group) for group in groups}
    assert not sizes or max(sizes) - min(sizes) <= 1


# --- Files ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A picture of each kind, drawn twice."""
    pytest.importorskip("matplotlib")
    folder = tmp_path_factory.mktemp("plot")
    for suffix in plot.SUFFIXES:
        full_plan().plot(folder / f"plan{suffix}")
    return folder


def texts_of(svg):
    """Texts in an SVG; matplotlib draws glyphs and puts the text into a comment."""
    parser = ElementTree.XMLParser(target=ElementTree.TreeBuilder(insert_comments=True))
    root = ElementTree.fromstring(svg, parser)
    assert root.tag == f"{SVG}svg"
    return [each.text.strip() for each in root.iter() if each.tag is ElementTree.Comment]


def test_a_picture_says_all_that_matters(files):
    plan = full_plan()
    texts = texts_of((files / "plan.svg").read_text())
    for text in (
        *("outside of regions", "blocks.0", "blocks.1", "the region that runs, and copies"),
        *("plain step", "budget", "this plan", "fastest within a budget"),
        *("time in the step [ms]", "memory [MiB]", "peak memory [MiB]", "step time [ms]"),
        f"404.0 KiB: {plan.plain_peak.label}",
        "full &lt;recompute&gt;",
    ):
        assert text in texts, text
    assert any(plan.peak.label in text and text.startswith("2") for text in texts)


def test_the_same_plan_gives_the_same_picture(files, tmp_path):
    full_plan().plot(tmp_path / "again.svg")
    assert (tmp_path / "again.svg").read_bytes() == (files / "plan.svg").read_bytes()


def test_a_png_is_one(files):
    data = (files / "plan.png").read_bytes()
    assert data.startswith(b"\x89PNG\r\n\x1a\n")
    assert data.endswith(b"IEND\xaeB`\x82")


class Page(HTMLParser):
    """Tags, attributes that could load something, and the cells of tables."""

    def __init__(self):
        super().__init__()
        self.tags = []
        self.links = []
        self.cells = []
        self._in_cell = False

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.links += [v for k, v in attrs if k in ("src", "href", "xlink:href", "srcset")]
        self._in_cell = tag in ("td", "th")
        if self._in_cell:
            self.cells.append("")

    def handle_endtag(self, tag):
        self._in_cell = self._in_cell and tag not in ("td", "th")

    def handle_data(self, data):
        if self._in_cell:
            self.cells[-1] += data


def test_a_page_holds_everything_and_loads_nothing(files):
    text = (files / "plan.html").read_text()
    page = Page()
    page.feed(text)
    assert page.tags.count("svg") == 1
    assert not {"script", "link", "img", "iframe", "image"} & set(page.tags)
    assert all(link.startswith("#") for link in page.links)
    assert "@import" not in text
    assert text.startswith("<!DOCTYPE html>")
    expected = [cell for table in full_plan().report().tables for row in table.rows for cell in row]
    assert [cell for cell in expected if cell not in page.cells] == []
    assert "full <recompute>" in page.cells  # escaped on the page
    assert "<recompute>" not in text


@pytest.mark.parametrize("name", ["plan.pdf", "plan", "plan.json", "plan.png.gz"])
def test_other_files_are_refused(name, tmp_path):
    with pytest.raises(ValueError, match=r"\.html, \.png, \.svg, got") as caught:
        full_plan().plot(tmp_path / name)
    assert name in str(caught.value)
    assert os.listdir(tmp_path) == []


def test_a_suffix_may_be_in_capitals(tmp_path, monkeypatch):
    monkeypatch.setattr(plot, "_picture", lambda plan, kind: kind.encode())
    full_plan().plot(tmp_path / "PLAN.PNG")
    assert (tmp_path / "PLAN.PNG").read_bytes() == b"png"


def test_a_plan_of_many_regions_or_none_can_be_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    synthetic.plan((NOTHING,) * 40, budget_bytes=9000 * KIB).plot(tmp_path / "many.svg")
    texts = texts_of((tmp_path / "many.svg").read_text())
    assert "blocks.0..blocks.2 x3" in texts
    synthetic.plan((), budget_bytes=KIB).plot(tmp_path / "none.svg")
    assert "the region that runs, and copies" in texts_of((tmp_path / "none.svg").read_text())


def test_without_matplotlib_the_error_names_the_extra(tmp_path, monkeypatch):
    for name in [name for name in sys.modules if name.split(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    imported = builtins.__import__

    def refuse(name, *args, **kwargs):
        if name.split(".")[0] == "matplotlib":
            raise ImportError(name)
        return imported(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(ImportError, match=r"pip install 'activation-wrappers\[plot\]'"):
        full_plan().plot(tmp_path / "plan.png")
    assert os.listdir(tmp_path) == []

import re
from html.parser import HTMLParser

import pytest

from volumejax import plots, report
from volumejax.cli import main
from volumejax.records import write_run

VOID = {"meta", "br", "link", "img", "path", "use", "rect"}


class Page(HTMLParser):
    """Checks that tags balance, and collects ids, references and visible text."""

    def __init__(self):
        super().__init__()
        self.open, self.ids, self.references, self.text, self.tags = [], [], [], [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        if tag not in VOID:
            self.open.append(tag)
        for name, value in attrs:
            if name == "id":
                self.ids.append(value)
            if name in ("href", "src", "xlink:href", "srcset", "action"):
                self.references.append(value)

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_data(self, data):
        self.text.append(data)


@pytest.fixture
def html(example_run, tmp_path):
    """The report of the example."""
    return report.publish(tmp_path, example_run).read_text(encoding="utf-8")


def read(html):
    page = Page()
    page.feed(html)
    assert page.open == []
    return page


def test_publish_writes_every_figure_and_the_report(example_run, tmp_path):
    path = report.publish(tmp_path, example_run)
    names = {entry.name for entry in (tmp_path / "figures").iterdir()}
    assert names == {f"{name}.{kind}" for name in ("summary", "log_mass", "radius") for kind in ("png", "svg")}
    assert path.name == "report.html" and path.stat().st_size > 20_000


def test_the_report_needs_nothing_else(html):
    page = read(html)
    assert "://" not in html
    assert not {"script", "link", "iframe", "object", "embed", "img", "base"} & set(page.tags)
    assert all(reference.startswith("#") for reference in page.references)
    assert {reference[1:] for reference in page.references} <= set(page.ids)
    assert not re.findall(r"url\((?!#)|@import|@font-face", html)
    assert set(re.findall(r"url\(#([^)]*)\)", html)) <= set(page.ids)


def test_ids_are_unique(html):
    ids = read(html).ids
    assert len(ids) == len(set(ids)) > 50


def test_it_reads_on_a_phone_and_in_the_dark(html):
    assert 'name="viewport"' in html and "@media (max-width" in html
    assert "prefers-color-scheme: dark" in html
    drawings = "".join(re.findall(r"<svg.*?</svg>", html, flags=re.DOTALL))
    assert drawings.count("<svg") == 3
    for code in (plots.INK, plots.PAPER, *plots.COLOURS.values()):
        assert code not in drawings
    for name in set(re.findall(r"var\(--(\w+)\)", html)):
        assert html.count(f"--{name}: #") == 2, name


def test_it_tells_question_table_config_and_versions(html, example_run):
    text = " ".join(" ".join(read(html).text).split())
    assert "What is the probability of drawing, at random from the prior" in text
    assert "4,810 parameters" in text and "σ = 1.3975" in text
    for row in example_run.rows:
        assert row.label in text
    assert "name: example" in text
    assert "jax" in text and "0.8.0" in text
    assert "−11,903 ± 828" in text


def test_every_figure_is_explained_in_two_sentences(html):
    captions = re.findall(r"<figcaption>(.*?)</figcaption>", html, flags=re.DOTALL)
    assert len(captions) == 3
    for caption in captions:
        assert len(re.findall(r"\.(?:\s|$)", caption)) == 2


def test_partial_and_quick_runs_say_so(example_run, html):
    assert "Partial." not in html and "Quick run." not in html
    changed = example_run.model_copy(update={"complete": False, "quick": True})
    page = report.render_report(changed, {})
    assert "Partial." in page and "Quick run." in page


def test_labels_and_config_are_escaped(make_row, make_run):
    label = "<script>alert('$1$')</script>"
    run = make_run(make_row(label, "adam", [-5.0, -6.0]), config="name: <b>&amp;", name="<i>")
    drawings = {name: plots.render(figure, "svg").decode() for name, figure in plots.figures(run).items()}
    page = read(report.render_report(run, drawings))
    assert "script" not in page.tags and "b" not in page.tags and "i" not in page.tags
    assert label in "".join(page.text) and "name: <b>&amp;" in "".join(page.text)


def test_plot_redraws_what_was_lost(example_run, tmp_path, capsys):
    write_run(tmp_path, example_run)
    assert main(["plot", str(tmp_path)]) == 0
    first = (tmp_path / "report.html").read_bytes()
    (tmp_path / "report.html").unlink()
    (tmp_path / "figures" / "radius.png").unlink()
    assert main(["plot", str(tmp_path)]) == 0
    assert (tmp_path / "report.html").read_bytes() == first
    assert (tmp_path / "figures" / "radius.png").exists()
    assert f"report: {tmp_path / 'report.html'}" in capsys.readouterr().out


@pytest.fixture
def chain_html(make_row, make_run, make_tether, tmp_path):
    """The report of a run with rays and chains."""
    rows = (
        make_row("isotropic", "isotropic", [-9000.0] * 40),
        make_tether("tether, star", region="star"),
        make_tether("walkers", kind="not_mixed", status="not mixed: raise effort"),
    )
    return report.publish(tmp_path, make_run(*rows)).read_text(encoding="utf-8")


def text_of(html):
    return " ".join(" ".join(read(html).text).split())


def test_chains_add_their_figures_after_the_summary(chain_html, tmp_path):
    names = {entry.name for entry in (tmp_path / "figures").iterdir()}
    expected = ("summary", "curve", "ladder", "log_mass", "radius")
    assert names == {f"{name}.{kind}" for name in expected for kind in ("png", "svg")}
    assert re.findall(r'aria-label="([^"]*)"', chain_html) == [name.replace("_", " ") for name in expected]
    captions = re.findall(r"<figcaption>(.*?)</figcaption>", chain_html, flags=re.DOTALL)
    assert len(captions) == 5 and "what the best rays miss" in captions[0]
    for caption in captions:
        assert len(re.findall(r"\.(?:\s|$)", caption)) == 2
    ids = read(chain_html).ids
    assert len(ids) == len(set(ids))
    assert "://" not in chain_html


def test_chains_are_explained(chain_html):
    text = text_of(chain_html)
    for words in (
        "Rays see the star region",
        "The connected region is all that can be reached",
        "at least The bound",
        "passes The tether's log mass from the cooling pass",
        "gradients per chain, pilot included",
        "≥ −614.3 not mixed",
        "−600.0 ± 2.0",
        "walkers: not mixed: raise effort.",
        "Nats that the best rays (isotropic, ≥ −9,003.0) leave out: tether, star 8,403.0, walkers at least 8,388.8.",
    ):
        assert words in text, words


def test_rays_alone_are_not_told_about_chains(html):
    text = text_of(re.sub(r"<style>.*?</style>", "", html, flags=re.DOTALL))
    assert "Rays see the star region" in text
    assert not re.search(r"tether|chains|passes", re.sub(r"short chains", "", text), flags=re.IGNORECASE)


def test_chains_alone_are_not_told_about_rays(make_run, make_tether, tmp_path):
    html = report.publish(tmp_path, make_run(make_tether("tether, star", region="star"))).read_text(encoding="utf-8")
    text = text_of(html)
    assert "Rays see" not in text and "k-hat" not in text and "The connected region" not in text
    assert "Gradients per chain, pilot included, and wall time" in text
    assert re.findall(r"<th scope=.col.>(.*?)</th>", html) == ["method", "log mass", "at least", "passes", "evals", "s"]


def test_the_tether_has_its_own_colour_by_day_and_by_night(chain_html):
    assert chain_html.count("--tether: #") == 2 and chain_html.count("--other: #") == 2
    drawings = "".join(re.findall(r"<svg.*?</svg>", chain_html, flags=re.DOTALL))
    assert "var(--tether)" in drawings
    for code in (plots.INK, plots.PAPER, *plots.COLOURS.values()):
        assert code not in drawings


def test_particles_are_drawn_and_explained(make_run, make_particles, make_tether, tmp_path):
    task = {"dimension": 4810, "sigma": 0.2, "cost": "loss", "anchor_cost": 0.0107}
    run = make_run(make_tether("tether, connected"), make_particles(), task=task)
    html = report.publish(tmp_path, run).read_text(encoding="utf-8")
    assert (tmp_path / "figures" / "guessing.png").stat().st_size > 1000
    assert "mean training loss of at most 0.01 nats; the trained network has 0.0107" in html
    assert "Particles come from the prior" in html and "gradients per chain or particle" in html.lower()
    assert "KL divergence" not in html and "var(--particles)" in html
    assert re.search(r"--particles:\s*#", html), "its own colour by day and by night"

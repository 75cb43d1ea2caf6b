"""The page of an explanation, in a real browser."""

import re
import shutil
import subprocess

import jax.numpy as jnp
import pytest

import kpx
from tests import intel
from tests.optional import torch

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
browser = pytest.mark.skipif(CHROMIUM is None, reason="not run: no Chromium is installed")


@pytest.fixture(scope="module")
def explanation():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(256, 512), torch.nn.GELU(), torch.nn.Linear(512, 256)).eval()
    with intel.hidden():
        return kpx.explain(model, torch.ones(64, 256), targets=["cuda:h100", "tpu-v5e", "xpu:pvc"])


def _dom(page, folder, script=""):
    """What a browser has made of a page, after a script of ours ran in it."""
    copy = folder / "page.html"
    copy.write_text(page.read_text().replace("</body>", f"<script>{script}</script></body>"))
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
               "--disable-background-networking", "--disable-component-update", "--disable-sync",
               f"--user-data-dir={folder / 'profile'}", "--virtual-time-budget=3000", "--dump-dom", copy.as_uri()]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=1200, check=True)
    return done.stdout


def test_the_page_asks_for_nothing_from_the_network(explanation, tmp_path):
    text = explanation.to_html(tmp_path / "page.html").read_text()
    assert set(re.findall(r"https?://[\w./]+", text)) <= {"http://www.w3.org/2000/svg"}
    assert "__DATA__" not in text
    assert not re.search(r"<(?:link|img|iframe)|\bsrc=|@import|fetch\(", text)


@browser
def test_a_browser_draws_modules_roofline_memory_and_targets(explanation, tmp_path):
    dom = _dom(explanation.to_html(tmp_path / "made.html"), tmp_path)
    assert '<h1 id="name">Sequential</h1>' in dom
    assert re.findall(r'<button role="tab"[^>]*>([^<]*)</button>', dom) == ["cuda:h100", "tpu-v5e:1x1", "xpu:pvc"]
    assert len(re.findall(r'<rect class="cell ', dom)) >= 3
    assert len(re.findall(r'<circle class="(?:compute|memory)"', dom)) >= 2
    assert re.search(r"a call on 1 . NVIDIA H100", dom)
    assert "It fits." in dom
    assert "is not installed" in dom


@browser
def test_another_target_is_shown_when_its_tab_is_chosen(explanation, tmp_path):
    page = explanation.to_html(tmp_path / "made.html")
    dom = _dom(page, tmp_path, "document.querySelectorAll('nav button')[1].click();")
    assert re.search(r"a call on 1 . Google TPU v5e", dom)
    assert 'aria-selected="true">tpu-v5e:1x1' in dom


@browser
def test_a_module_is_opened_and_left_again(explanation, tmp_path):
    page = explanation.to_html(tmp_path / "made.html")
    inside = "const c = () => document.querySelectorAll('rect.cell'); const n = c().length; c()[n - 1].onclick();"
    opened = _dom(page, tmp_path, f"{inside} document.title = n + ' ' + c().length;")
    before, after = map(int, re.search(r"<title>(\d+) (\d+)</title>", opened).groups())
    assert after < before
    left = _dom(page, tmp_path, f"{inside} c()[0].onclick(); document.title = n + ' ' + c().length;")
    assert len(set(re.search(r"<title>(\d+) (\d+)</title>", left).groups())) == 1


@browser
def test_names_in_a_model_cannot_break_the_page(tmp_path):
    def odd(x):
        return jnp.tanh(x)

    odd.__name__ = "</script><b>&\"'`"
    dom = _dom(kpx.explain(odd, jnp.ones((8, 8)), targets="tpu-v5e").to_html(tmp_path / "made.html"), tmp_path)
    assert '<h1 id="name">&lt;/script&gt;&lt;b&gt;&amp;"\'`</h1>' in dom

"""The operator's page in a real browser, on a real cluster: a federation from the form to a finished adapter.

One agent enrols with the command line that the page shows, one is refused for its base model, one is killed, one is
revoked on the page.
SCREENSHOTS names a folder to leave pictures in.
"""

import asyncio
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from safetensors.numpy import load_file, save_file

from shelora.cli.cluster import LocalCluster
from shelora.cli.page import open_beside
from shelora.exits import EXIT_REFUSED
from tests.e2e import agents as tiny

playwright = pytest.importorskip(
    "playwright.async_api", reason="playwright is not installed: make test-dashboard"
)
CHROMIUM = Path("/usr/bin/chromium")
FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
PATIENCE_MS = 600_000
PHONE = {"width": 375, "height": 800}
DESK = {"width": 1280, "height": 900}
FORM = {
    "name": "weather",
    "training.base_model": "tiny-bert",
    "training.labels": "cold, warm",
    "training.local_steps": "40",
    "round.rounds": "4",
    "round.clients": "5",
    "round.min_updates": "2",
    "round.deadline_s": "90",
}
FOLDED = {
    "training.batch_size": "32",
    "training.learning_rate": "0.01",
    "training.max_tokens": "16",
    "training.calibration_examples": "16",
    "training.evaluation_examples": "20",
}
AGENTS = (*tiny.AGENTS, tiny.Agent("lab", rank=2, alpha=4, budget=0.5, suffix=".jsonl"))
GUEST = tiny.Agent("guest", rank=2, alpha=4, budget=1.0, suffix=".jsonl")
"""Its base model has the shapes of the others' and other weights."""

pytestmark = [
    pytest.mark.skipif(
        not CHROMIUM.exists(), reason="there is no /usr/bin/chromium: apt-get install chromium"
    ),
    pytest.mark.timeout(1800),
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_tiny_bert(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def other_model(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("other") / "model"
    shutil.copytree(model, folder)
    weights = load_file(folder / "model.safetensors")
    save_file(
        {name: 0.9 * value for name, value in weights.items()}, folder / "model.safetensors", {"format": "pt"}
    )
    return folder


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[LocalCluster]:
    with LocalCluster(tmp_path / "cluster", fixed_ports=False, workers=1) as running:
        yield running


@pytest.fixture
def address(cluster: LocalCluster) -> str:
    """The page's, which `shelora dashboard` prints."""
    return open_beside(cluster)


@pytest.fixture
async def page(address: str, tmp_path: Path):
    """A browser that has never been anywhere; fails the test if the policy stops anything, or a script fails."""
    async with playwright.async_playwright() as driver:
        context = await driver.chromium.launch_persistent_context(
            str(tmp_path / "profile"), executable_path=str(CHROMIUM), args=FLAGS, viewport=DESK
        )
        page, said = context.pages[0], []
        page.on("console", lambda m: said.append(m.text) if m.type == "error" else None)
        page.on("pageerror", lambda error: said.append(str(error)))
        page.set_default_timeout(180_000)
        yield page
        await context.close()
    expected = ("422", "ERR_INCOMPLETE_CHUNKED")  # of the mistaken form; of a stream that ends with its page
    assert [text for text in said if not any(words in text for words in expected)] == []


async def look(page, name: str, **media) -> None:
    """Leaves a picture, if somebody wants pictures."""
    await page.emulate_media(**media)
    if folder := os.environ.get("SCREENSHOTS"):
        await page.screenshot(path=Path(folder) / f"{name}.png", full_page=True)


async def fits_a_phone(page) -> None:
    await page.wait_for_load_state("load")  # with its style
    await page.set_viewport_size(PHONE)
    assert await page.evaluate("document.documentElement.scrollWidth") <= PHONE["width"]
    nameless = await page.evaluate(
        """() => [...document.querySelectorAll("a, button, input:not([type=hidden]), select, progress, svg")]
            .filter(e =>
            !(e.textContent.trim() && ["A", "BUTTON"].includes(e.tagName)) && !e.getAttribute("aria-label")
            && !(e.labels && e.labels.length)).map(e => e.outerHTML)"""
    )
    assert nameless == []
    await page.set_viewport_size(DESK)


async def test_from_the_form_to_a_finished_adapter(page, address, cluster, model, other_model, tmp_path):
    await page.goto(address)
    assert "token" not in page.url
    await page.keyboard.press("Tab")
    assert await page.evaluate("document.activeElement.textContent") == "Skip to content"
    await create(page)
    await enrol_with_the_command_of_the_page(page, tmp_path)
    for agent in (*AGENTS[1:], GUEST):
        await tiny.enrol(cluster, agent, tmp_path)
    clinic, bank, sensor, lab = (
        tiny.spawn_agent(cluster, agent, cluster.addresses, model, tmp_path) for agent in AGENTS
    )
    guest = tiny.spawn_agent(cluster, GUEST, cluster.addresses, other_model, tmp_path)
    await page.get_by_text("of 4 rounds").wait_for()
    await page.locator("table.members tbody tr").nth(4).wait_for(timeout=PATIENCE_MS)
    await page.locator(".stages .now").first.wait_for(timeout=PATIENCE_MS)
    await page.locator(".chart").first.wait_for(timeout=PATIENCE_MS)  # the first round's result is there

    assert (await page.locator('td[data-label="certificate ends"]').first.inner_text()).startswith("in ")

    await page.get_by_text("MODEL_MISMATCH").first.wait_for(timeout=PATIENCE_MS)
    sensor.popen.kill()
    await page.get_by_label("Revoke lab").click()
    await page.get_by_text("no server admits lab").wait_for()
    await page.get_by_role("button", name="Revoke it").click()
    await page.locator("table.members").wait_for()
    await fits_a_phone(page)
    await look(page, "running-light", color_scheme="light")
    await page.locator(".head .phase.finished").wait_for(timeout=PATIENCE_MS)
    assert await page.get_by_label("Revoke lab").count() == 0
    async with asyncio.timeout(180):
        while any(process.popen.poll() is None for process in (clinic, bank, lab)):  # noqa: ASYNC110 - other processes
            await asyncio.sleep(0.2)
    assert [clinic.popen.returncode, bank.popen.returncode, lab.popen.returncode] == [0, 0, EXIT_REFUSED]
    assert guest.popen.wait(180) == EXIT_REFUSED
    assert (tmp_path / "clinic" / "state" / "adapter").is_dir()
    assert "4" in await page.locator(".tiles dd").first.inner_text()
    assert await page.locator(".chart").count() == 3
    assert await page.locator("#servers tbody tr").count() >= 4
    await look(page, "finished-dark", color_scheme="dark")
    await page.set_viewport_size(PHONE)
    await look(page, "finished-phone", color_scheme="light")
    await page.set_viewport_size(DESK)
    await the_report_stands_alone(page, tmp_path)
    await delete(page)


async def create(page) -> None:
    """Wrong first: what is wrong stands beside the fields, and what was typed is still there."""
    await page.get_by_role("link", name="New federation").click()
    for path, text in {**FORM, "round.rounds": "many"}.items():
        await page.locator(f'[name="{path}"]').fill(text)
    for summary in await page.locator("summary").all():
        await summary.click()
    for path, text in FOLDED.items():
        await page.locator(f'[name="{path}"]').fill(text)
    await page.get_by_role("button", name="Create").click()
    await page.get_by_text("write a whole number").wait_for()
    await fits_a_phone(page)
    await look(page, "form-light", color_scheme="light")
    assert await page.locator('[name="training.labels"]').input_value() == "cold, warm"
    await page.locator('[name="round.rounds"]').fill(FORM["round.rounds"])
    await page.get_by_role("button", name="Create").click()
    await page.get_by_role("heading", name="weather").wait_for()


async def enrol_with_the_command_of_the_page(page, folder: Path) -> None:
    await page.locator("#do-token").click()
    await page.get_by_label("Name of the client").fill("clinic")
    await page.get_by_role("button", name="Issue a token").click()
    command = shlex.split(await page.locator("#command").inner_text())
    assert command[0] == "client-agent"
    home = folder / "clinic"
    home.mkdir()
    agent = [sys.executable, "-m", "client_agent.main", *command[1:]]
    done = await asyncio.to_thread(
        subprocess.run, agent, cwd=home, env={**os.environ, "PYTHONPATH": str(Path.cwd())}, check=False
    )
    assert done.returncode == 0
    await page.get_by_role("link", name="Back").click()


async def the_report_stands_alone(page, folder: Path) -> None:
    async with page.expect_download() as download:
        await page.locator("#get-report").click()
    file = folder / "report.html"
    await (await download.value).save_as(file)
    asked, report = [], await page.context.new_page()
    report.on("request", lambda request: asked.append(request.url))
    await report.goto(file.as_uri())
    assert await report.locator(".chart").count() == 3
    assert asked == [file.as_uri()]
    await look(report, "report", color_scheme="light")
    await report.close()


async def delete(page) -> None:
    await page.locator("#do-delete").click()
    await page.get_by_label("Type weather to delete it").fill("weather")
    await page.get_by_role("button", name="Delete it").click()
    await page.get_by_text("There is no federation yet").wait_for()

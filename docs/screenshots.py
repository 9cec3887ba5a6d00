"""Takes the pictures of the page that python -m serving shows, into docs/pictures/.

python docs/screenshots.py

It needs Chromium (apt-get install chromium), and playwright and pillow (python3 -m pip install playwright pillow).
"""

import io
import re
import shutil
import subprocess
import sys
from pathlib import Path

from PIL import Image
from playwright.sync_api import sync_playwright

ROOT = Path(__file__).resolve().parent.parent
PROMPT = "Once upon a time, there was a little girl named Lily. She"
BLOCK, HEAD = 1, 2  # a head that looks for the person that "She" means


def main():
    command = [sys.executable, "-m", "serving", "--model_size", "3M", "--port", "0"]
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True) as server, sync_playwright() as driver:
        address = re.search(r"http://\S+", server.stderr.readline())[0]
        browser = driver.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1240, "height": 860})
        page.goto(address)
        page.wait_for_selector("body[data-ready]")
        page.fill("#prompt", PROMPT)
        show(page, "walkthrough")
        page.select_option("#block", str(BLOCK))
        page.wait_for_selector("main[aria-busy=false]")
        page.select_option("#head", str(HEAD))
        page.locator(".recorded", has_text="weights = softmax").click()
        page.evaluate("scrollTo(0, 280)")
        save(page, "page-walkthrough.png")
        show(page, "attention")
        save(page, "page-attention.png", full_page=True)
        browser.close()
        server.terminate()


def show(page, view):
    page.evaluate(f"location.hash = '{view}'")
    page.wait_for_selector("main h2:visible")
    page.wait_for_selector("main[aria-busy=false]")


def save(page, name, **settings):
    """A picture with few colours, which is a third as large."""
    page.wait_for_timeout(500)
    picture = Image.open(io.BytesIO(page.screenshot(**settings))).convert("RGB")
    picture.quantize(255, dither=Image.Dither.NONE).save(ROOT / "docs" / "pictures" / name, optimize=True)


if __name__ == "__main__":
    main()

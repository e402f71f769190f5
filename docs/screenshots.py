"""Pictures of a run's report: on a desk, on a phone, in the dark; and as it is printed. The first screens go to
docs/images.

    python docs/screenshots.py --run runs/demo --output runs/screenshots

Needs playwright and a Chromium of the system.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from cyclopts import run as run_script
from playwright.sync_api import sync_playwright

from adapruner.run.folder import RunFolder, write_report

CHROMIUM = ("chromium", "chromium-browser", "google-chrome")
IMAGES = Path(__file__).parent / "images"
FIRST_SCREEN = {"width": 1000, "height": 640}
PICTURES = {
    "desktop": {"viewport": {"width": 1280, "height": 900}},
    "dark": {"viewport": {"width": 1280, "height": 900}, "color_scheme": "dark"},
    "phone": {"viewport": {"width": 390, "height": 844}, "device_scale_factor": 2, "has_touch": True},
}


def main(*, run: Path = Path("runs/demo"), output: Path = Path("runs/screenshots")) -> None:
    """Writes the report again, and pictures of the whole page."""
    page_file = write_report(RunFolder(run))
    executable = next(filter(None, map(shutil.which, CHROMIUM)))
    output.mkdir(parents=True, exist_ok=True)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=executable, args=["--no-sandbox"])
        for name, options in PICTURES.items():
            page = browser.new_page(**options)
            page.goto(page_file.absolute().as_uri())
            picture = output / f"report-{name}.png"
            page.screenshot(path=picture, full_page=True)
            print(picture)
            if name != "phone":
                page.set_viewport_size(FIRST_SCREEN)
                page.screenshot(path=IMAGES / f"report-{name}.png")
        printed = output / "report-print.pdf"
        page.pdf(path=printed, prefer_css_page_size=True)
        print(printed)
        browser.close()


if __name__ == "__main__":
    run_script(main)
